"""Loops as people write them: ids from the data loader, closures, compiled models, two calls in place of a block."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ExampleIdError, RecordingError, RunExistsError
from tests.conftest import RecordedTraining, batches, digits, mlp

EXAMPLES = 24


class WithIds(torch.utils.data.Dataset):
    """Rows that begin with their number, written down independently of `pk.indexed`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return i, *self.rows[i]


class Rows(torch.utils.data.Dataset):
    """Digits as tuples; their own number can be told from the data."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return self.inputs[i], self.targets[i]


def seeded():
    return torch.Generator().manual_seed(3)


LOADERS = {
    "shuffled": lambda rows: DataLoader(rows, batch_size=7, shuffle=True, generator=seeded()),
    "in order": lambda rows: DataLoader(rows, batch_size=7),
    "workers": lambda rows: DataLoader(rows, batch_size=5, shuffle=True, generator=seeded(), num_workers=2),
    "persistent workers": lambda rows: DataLoader(
        rows, batch_size=5, shuffle=True, generator=seeded(), num_workers=1, persistent_workers=True
    ),
    "drop last": lambda rows: DataLoader(rows, batch_size=7, shuffle=True, generator=seeded(), drop_last=True),
    "weighted": lambda rows: DataLoader(
        rows, batch_size=8, sampler=WeightedRandomSampler(torch.arange(1.0, 25.0), 24, generator=seeded())
    ),
    "distributed": lambda rows: DataLoader(
        rows, batch_size=4, sampler=DistributedSampler(rows, num_replicas=2, rank=1, seed=5)
    ),
    "list of batches": lambda rows: DataLoader(rows, batch_sampler=[[0, 5, 2], [7, 7, 1], [3, 4, 23]]),
    "batches from the sampler": lambda rows: DataLoader(
        rows,
        sampler=BatchSampler(RandomSampler(rows, generator=seeded()), 6, drop_last=False),
        batch_size=None,
        collate_fn=None,
    ),
}


def training(**options):
    return RecordedTraining(mlp(), lambda p: torch.optim.AdamW(p, lr=1e-2), **options)


def plain_steps(loop, loader, epochs=3):
    for _ in range(epochs):
        for *_, x, y in loader:
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            loop.optimizer.step()


def contributions(loop):
    return torch.from_numpy(pk.Explainer(loop.store, loop.model).contributions(loop.inputs[:3], output=pk.Logit(1)))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.filterwarnings("ignore:.*process.*is multi-threaded:DeprecationWarning")
def test_a_loaders_own_ids_are_those_that_the_data_set_returns(kind):
    inputs, targets = digits(EXAMPLES)
    make = LOADERS[kind]
    rows = TensorDataset(inputs, targets) if kind == "batches from the sampler" else Rows(inputs, targets)
    unrecorded = training()
    plain_steps(unrecorded, make(rows))
    loop, loader = training(), make(rows)
    sampler = loader.batch_sampler
    with loop.recorder:
        for _ in range(3):
            for x, y in loop.recorder.batches(loader):
                loop.optimizer.zero_grad()
                F.cross_entropy(loop.model(x), y).backward()
                loop.optimizer.step()
    assert loader.batch_sampler is sampler
    told = training()
    ids_too = [torch.arange(EXAMPLES), inputs, targets]
    with told.recorder:
        loader = make(TensorDataset(*ids_too) if kind == "batches from the sampler" else WithIds(rows))
        for _ in range(3):
            for ids, x, y in loader:
                with told.recorder.step(ids):
                    told.optimizer.zero_grad()
                    F.cross_entropy(told.model(x), y).backward()
                    told.optimizer.step()
    assert equal(loop.parameters(), unrecorded.parameters())
    assert equal(loop.parameters(), told.parameters())
    assert torch.equal(contributions(loop), contributions(told))


def equal(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_rows_of_hugging_face_data_sets():
    inputs, targets = digits(EXAMPLES)
    rows = datasets.Dataset.from_dict({"x": inputs.tolist(), "y": targets.tolist()}).with_format("torch")
    loop = training()
    seen = []
    with loop.recorder:
        for batch in loop.recorder.batches(DataLoader(rows, batch_size=6, shuffle=True, generator=seeded())):
            seen += [int((inputs.float() == row).all(1).nonzero()) for row in batch["x"]]
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(batch["x"].double()), batch["y"]).backward()
            loop.optimizer.step()
    assert sorted(seen) == list(range(EXAMPLES))
    segment = loop.store.trajectory().segment(0)
    assert segment.shards[0].ids.tolist() == sorted(seen[:6])


def test_another_pass_over_the_same_loader_in_between_changes_no_id():
    inputs, targets = digits(EXAMPLES)
    loop, told = training(), training()
    loader = DataLoader(WithIds(Rows(inputs, targets)), batch_size=6, shuffle=True, generator=seeded())
    with loop.recorder, told.recorder:
        for ids, x, y in loop.recorder.batches(loader):
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            loop.optimizer.step()
            with told.recorder.step(ids):
                told.optimizer.zero_grad()
                F.cross_entropy(told.model(x), y).backward()
                told.optimizer.step()
            state = loader.generator.get_state()
            assert sum(len(labels) for _, _, labels in loader) == EXAMPLES
            loader.generator.set_state(state)
    assert torch.equal(contributions(loop), contributions(told))


def test_a_loop_that_is_left_and_entered_again():
    inputs, targets = digits(EXAMPLES)
    loader = DataLoader(WithIds(Rows(inputs, targets)), batch_size=6, shuffle=True, generator=seeded())
    loop, visits = training(segments=1), []
    with loop.recorder:
        for _ in range(3):
            for done, (ids, x, y) in enumerate(loop.recorder.batches(loader)):
                if done == 2:
                    break  # before anything came of this batch
                loop.optimizer.zero_grad()
                F.cross_entropy(loop.model(x), y).backward()
                loop.optimizer.step()
                visits.append(sorted(ids.tolist()))
                if done == 1 and len(visits) == 4:
                    break  # after the step was taken
    trajectory = loop.store.trajectory()
    with_momentum = [set(trajectory.segment(t).shards[0].ids.tolist()) for t in range(len(trajectory))]
    assert len(trajectory) == len(visits) == 6
    assert all(set(ids) <= found for ids, found in zip(visits, with_momentum, strict=True))


def test_accumulation_is_seen_when_the_optimizer_steps():
    inputs, targets = digits(EXAMPLES)
    make = LOADERS["shuffled"]
    loop, told = training(), training()

    with loop.recorder:
        for done, (x, y) in enumerate(loop.recorder.batches(make(Rows(inputs, targets)))):
            if done % 2 == 0:
                loop.optimizer.zero_grad()
            (F.cross_entropy(loop.model(x), y) / 2).backward()
            if done % 2 == 1:
                loop.optimizer.step()
    with told.recorder:
        for done, (ids, x, y) in enumerate(make(WithIds(Rows(inputs, targets)))):
            with told.recorder.step(ids, accumulate=done % 2 == 0):
                if done % 2 == 0:
                    told.optimizer.zero_grad()
                (F.cross_entropy(told.model(x), y) / 2).backward()
                if done % 2 == 1:
                    told.optimizer.step()
    assert torch.equal(contributions(loop), contributions(told))


def test_gradients_that_were_never_applied_are_named():
    inputs, targets = digits(EXAMPLES)
    loop = training()
    loader = DataLoader(Rows(inputs, targets), batch_size=6)
    loop.recorder.__enter__()
    for done, (x, y) in enumerate(loop.recorder.batches(loader)):
        F.cross_entropy(loop.model(x), y).backward()
        if done < 2:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    with pytest.warns(UserWarning, match="gradients of the last 12 examples were never applied"):
        loop.recorder.__exit__(None, None, None)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_closure_is_evaluated_once(kind):
    plain, recorded, closed = (RecordedTraining(mlp(), lambda p: kind(p, lr=1e-2)) for _ in range(3))
    calls = []

    def steps(loop, ids):
        def closure():
            calls.append(ids)
            loop.optimizer.zero_grad()
            loss = F.cross_entropy(loop.model(loop.inputs[ids]), loop.targets[ids])
            loss.backward()
            return loss

        return loop.optimizer.step(closure)

    batches = [[0, 1, 2], [5, 3, 9], [11, 2, 20]]
    losses = [steps(plain, ids) for ids in batches]
    assert calls == batches
    with closed.recorder, recorded.recorder:
        for ids, loss in zip(batches, losses, strict=True):
            with closed.recorder.step(ids):
                assert torch.equal(steps(closed, ids), loss)
            recorded.step(ids)
    assert calls == batches * 2
    assert equal(plain.parameters(), closed.parameters())
    assert torch.equal(contributions(closed), contributions(recorded))


def test_begin_and_end_are_a_step():
    loop, blocks = training(), training()
    with loop.recorder, blocks.recorder:
        for ids in ([0, 1, 2], [3, 4, 5]):
            loop.recorder.begin(ids)
            loop.backward(ids)
            loop.optimizer.step()
            loop.recorder.end()
            blocks.step(ids)
        with pytest.raises(RecordingError, match=r"recorder\.end\(\) has no step to end"):
            loop.recorder.end()
        loop.recorder.begin([6])
        with pytest.raises(RecordingError, match="nested in another step"):
            loop.recorder.begin([7])
        loop.backward([6])
        loop.optimizer.step()
        loop.recorder.end()
        blocks.step([6])
    assert torch.equal(contributions(loop), contributions(blocks))


def test_a_repeated_example_counts_as_often_as_it_comes():
    """Against a training set that holds the example twice."""
    twice, once = training(examples=25), training(examples=24)
    twice.inputs[24], twice.targets[24] = twice.inputs[3], twice.targets[3]
    for loop, other in ((twice, 24), (once, 3)):
        with loop:
            for _ in range(3):
                loop.step([3, 1, other], rows=[3, 1, 3])
                loop.step([0, 3, 2, other], rows=[0, 3, 2, 3])
    found, wanted = contributions(once), contributions(twice)
    assert equal(once.parameters(), twice.parameters())
    torch.testing.assert_close(found[:, 3], wanted[:, 3] + wanted[:, 24])
    torch.testing.assert_close(found[:, :3], wanted[:, :3])


@pytest.mark.parametrize("projection", [pk.Identity(), pk.Kronecker(16, warm_up_examples=8)])
def test_a_repeated_example_under_audit(projection):
    """Every example is audited here."""
    loop = training(examples=8, projection=projection, segments=2)
    with loop:
        for _ in range(4):
            loop.step([3, 1, 3, 7])
            loop.step([0, 7, 7, 2])
    checks = {check.name: check for check in loop.explain(tolerance=1.0).checks}
    assert checks["displacement gap"].value < 1e-8
    assert checks["capture gap"].value < 1e-12
    assert checks["audit error"].value < (1e-10 if isinstance(projection, pk.Identity) else 0.9)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(24)


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "an iterable data set has no row numbers"),
        (lambda: [[0, 1], [2, 3]], r"it is not a torch\.utils\.data\.DataLoader\. Got list"),
        (lambda: DataLoader(range(30), batch_size=4), r"not the one that the recorder was made for\. Got 30 rows"),
        (lambda: DataLoader(Subset(range(25), [3, 5]), batch_size=4), r"Got 2 rows; expected 24 rows"),
        (lambda: DataLoader(range(24), num_workers=2, in_order=False), "in another order than they were drawn"),
    ],
)
def test_loaders_whose_rows_have_no_numbers_of_the_run_are_refused(loader, why):
    loop = training()
    with loop.recorder, pytest.raises(ConfigurationError, match=why):
        next(iter(loop.recorder.batches(loader())))


def test_ids_of_a_subset_are_row_numbers_of_the_training_set():
    inputs, targets = digits(EXAMPLES)
    rows = Subset(Subset(WithIds(Rows(inputs, targets)), [9, 3, 5, 7, 20, 11]), [5, 1, 0, 2])
    loop = training(segments=1)
    with loop.recorder:
        for ids, x, y in loop.recorder.batches(DataLoader(rows, batch_size=2)):
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            loop.optimizer.step()
            assert set(ids.tolist()) <= {11, 3, 9, 5}
    assert loop.store.trajectory().segment(0).shards[0].ids.tolist() == [3, 11]
    assert loop.store.trajectory().segment(1).shards[0].ids.tolist() == [3, 5, 9, 11]


def test_a_loader_that_was_iterated_before_is_followed_from_its_next_epoch():
    inputs, targets = digits(EXAMPLES)
    loop = training()
    loader = DataLoader(
        WithIds(Rows(inputs, targets)), 6, shuffle=True, num_workers=1, persistent_workers=True, generator=seeded()
    )
    assert len(list(loader)) == 4
    with loop.recorder:
        for ids, x, y in loop.recorder.batches(loader):
            assert torch.equal(inputs[ids], x)
            loop.optimizer.zero_grad()
            F.cross_entropy(loop.model(x), y).backward()
            loop.optimizer.step()
    assert len(loop.store.trajectory().segment(0).shards[0]) > 0


def test_ids_of_another_length_are_refused():
    loop = training()
    with loop.recorder, pytest.raises(ExampleIdError), loop.recorder.step([0, 1, 2]):
        loop.backward([0, 1])


@pytest.mark.parametrize("rows", [[("a", 1), ("b", 2)], [{"text": "a"}, {"text": "b"}], ["a", "b"]])
def test_indexed_rows_begin_with_their_number(rows):
    found = pk.indexed(rows)
    expected = {tuple: (1, "b", 2), dict: {"id": 1, "text": "b"}, str: (1, "b")}[type(rows[0])]
    assert len(found) == 2
    assert found[1] == expected
    assert next(iter(DataLoader(found, batch_size=2, collate_fn=list)))[1] == expected


def test_indexed_rows_fetched_together():
    rows = datasets.Dataset.from_dict({"x": [5, 6, 7]})
    assert pk.indexed(rows).__getitems__([2, 0]) == [{"id": 2, "x": 7}, {"id": 0, "x": 5}]


COMPILED = {
    "function": lambda model: torch.compile(model, backend="eager"),
    "method": lambda model: model.compile(backend="eager") or model,
    "part": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
    "part in place": lambda model: model[0].compile(backend="eager") or model,
}


@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_model_is_recorded_eagerly_and_explained(kind):
    plain = training()
    plain.train(2)
    model = COMPILED[kind](mlp())
    with pytest.warns(UserWarning, match="the model is compiled; while it is recorded it runs eagerly"):
        loop = RecordedTraining(model, lambda p: torch.optim.AdamW(p, lr=1e-2))
    loop.train(2)
    assert equal(loop.parameters(), plain.parameters())
    assert torch.equal(contributions(loop), contributions(plain))
    loop.model = plain.model  # as it was before it was compiled
    assert torch.equal(contributions(loop), contributions(plain))


def test_a_compiled_function_that_calls_the_model():
    plain, loop = training(), training()
    plain.train(2)
    backward = torch.compile(lambda x, y: F.cross_entropy(loop.model(x), y), backend="eager")
    with loop:
        for ids in batches(EXAMPLES, 8, 2):
            with loop.recorder.step(ids):
                loop.optimizer.zero_grad()
                backward(loop.inputs[ids], loop.targets[ids]).backward()
                loop.optimizer.step()
    assert torch.equal(contributions(loop), contributions(plain))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_is_overwritten_only_where_that_is_asked_for(where, tmp_path):
    store = pk.MemoryStore() if where == "memory" else pk.DirectoryStore(tmp_path / "run")
    training(store=store, segments=1).train(1)
    first = store.manifest().run_id
    with pytest.raises(RunExistsError, match="overwrite=True"):
        training(store=store).recorder.__enter__()
    assert store.manifest().run_id == first
    loop = training(store=store, overwrite=True).train(2)
    fresh = training().train(2)
    assert len(store.manifest().segments) == len(fresh.store.manifest().segments)
    assert torch.equal(contributions(loop), contributions(fresh))
    if where == "disk":
        on_disk = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*.safetensors")}
        assert on_disk == set(store.manifest().files)

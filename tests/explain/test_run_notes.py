"""What explanations say about their run: that it did not finish, whom it never visited, which model was passed."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

import pkexplain as pk
from tests.conftest import RecordedTraining, mlp


@contextlib.contextmanager
def warned():
    """Collect the texts of the warnings about the run."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in found if str(w.message).startswith("pkexplain: explaining")]


def explainer_of(training, model=None, **options):
    with warned() as texts:
        explainer = pk.Explainer(training.store, training.model if model is None else model, **options)
    return explainer, texts


def interrupted(error, steps=4):
    def stop(done, training):
        if done == steps:
            raise error

    training = RecordedTraining(queries=2)
    with contextlib.suppress(type(error)):
        training.train(on_step=stop)
    return training


def test_a_finished_run_and_its_own_model_need_no_note(run):
    explainer, texts = explainer_of(run)
    assert texts == []
    assert explainer.explain(run.queries[0]).notes == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["by hand", "by an error"])
def test_an_interrupted_run_says_so_everywhere_and_warns_once(error, tmp_path):
    training = interrupted(error)
    name = type(error).__name__
    note = f"The run was interrupted by {name}; the model is explained as it was after step 4."
    explainer, texts = explainer_of(training)
    assert texts == [f"pkexplain: explaining the run in memory: {note}"]
    with warned() as more:
        explanations = explainer.explain(training.queries)
        explainer.contributions(training.queries)
    assert more == []
    for explanation in explanations:
        assert explanation.notes == (note,)
        assert f"Note: {note}" in str(explanation)
        assert note in explanation._repr_html_()
    assert str(explanations).count(note) == explanations._repr_html_().count(note) == 1
    assert pk.write_report(explanations, tmp_path / "why.html").read_text(encoding="utf-8").count(note) == 2


def test_a_run_that_still_goes_on_says_so():
    training = RecordedTraining(segments=2)
    with training:
        for _ in range(2):
            training.step(range(24))
        explainer, texts = explainer_of(training)
        note = (
            "The run is still being recorded, or its process was killed; the model is explained as it was after step 2."
        )
        assert texts == [f"pkexplain: explaining the run in memory: {note}"]
        assert explainer.explain(training.inputs[0]).notes == (note,)


def test_a_salvaged_run_says_so(disk_run):
    (disk_run.store / "segments" / "00001.safetensors").unlink()
    pk.salvage(disk_run.store)
    explainer, _ = explainer_of(disk_run)
    note = explainer.explain(disk_run.queries[0]).notes[0]
    assert note == "The run was salvaged: 1 of 2 segments are left; the model is explained as it was after step 3."


def test_examples_that_were_never_visited_are_counted():
    training = RecordedTraining(queries=1)
    with training:
        for ids in ([0, 1, 2, 3], [2, 3, 4, 9], [23]):
            training.step(ids)
    note = "Never visited in this run: 17 of 24 training examples. They contribute nothing."
    explainer, texts = explainer_of(training)
    assert texts == [f"pkexplain: explaining the run in memory: {note}"]
    explanation = explainer.explain(training.queries[0])
    assert explanation.notes == (note,)
    visited = {0, 1, 2, 3, 4, 9, 23}
    assert {i for i, c in enumerate(explanation.contributions) if c != 0.0} <= visited
    pk.withdraw(training.store, [2, 5, 6])  # of these, two were never visited
    assert explainer.explain(training.queries[0]).notes == (note.replace("17", "15"),)


def test_examples_are_counted_over_files_and_segments(tmp_path):
    training = RecordedTraining(store=tmp_path / "run", segments=1)
    with training:
        for ids in ([0, 1, 2, 3], [10, 11], [23]):
            training.step(ids)
    pk.merge(tmp_path / "run", shards=3)
    explainer, _ = explainer_of(training)
    assert explainer.explain(training.inputs[0]).notes[0].startswith("Never visited in this run: 17 of 24 ")


def test_an_untrained_model_is_a_note_without_a_warning(run):
    passed = mlp(activation=nn.ReLU, dtype=torch.float32)
    with torch.no_grad():
        for parameter, start in zip(passed.parameters(), run.start, strict=True):
            parameter.copy_(start)
    explainer, texts = explainer_of(run, passed)
    assert texts == []
    note = "The model that was passed has the weights from before training; the recorded weights are explained."
    explanation = explainer.explain(run.queries[0])
    assert explanation.notes == (note,)
    assert explanation.final == pk.Explainer(run.store, run.model).explain(run.queries[0]).final
    for seed in range(5):
        explainer, texts = explainer_of(run, mlp(seed=100 + seed, activation=nn.ReLU, dtype=torch.float32))
        assert texts == []
        note = (
            "The model that was passed has other weights than the run's last ones; the recorded weights are explained."
        )
        assert explainer.explain(run.queries[0]).notes == (note,)


def test_a_model_that_was_trained_further_is_a_warning(run):
    passed = mlp(activation=nn.ReLU, dtype=torch.float32)
    passed.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.SGD(passed.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(passed(run.inputs[:32]), run.targets[:32]).backward()
        optimizer.step()
    ends = [torch.cat([p.detach().flatten() for p in each]).double() for each in
            (passed.parameters(), run.model.parameters(), run.start)]  # fmt: skip
    share = float((ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm())
    assert 0.0 < share < 0.9
    _, texts = explainer_of(run, passed)
    assert len(texts) == 1
    assert f"near the run's last weights, but not at them (its distance is {share:.2g} times what training" in texts[0]
    assert texts[0].endswith("The recorded weights are explained.")


def test_a_model_that_was_rounded_is_a_note_without_a_warning(run):
    passed = mlp(activation=nn.ReLU, dtype=torch.float32)
    passed.load_state_dict({name: value * (1 + 1e-6) for name, value in run.model.state_dict().items()})
    explainer, texts = explainer_of(run, passed)
    assert texts == []
    (note,) = explainer.explain(run.queries[0]).notes
    assert note.startswith(
        "The model that was passed differs from the run's last weights as if by rounding (its distance"
    )


def test_a_part_of_a_run_says_nothing_of_the_model_passed(disk_run):
    explainer, texts = explainer_of(disk_run, segments=1)
    assert texts == []
    assert explainer.explain(disk_run.queries[0]).notes == ()


def test_the_mean_of_runs_says_what_its_numbers_are():
    first, second = RecordedTraining(queries=1).train(), RecordedTraining(mlp(seed=1), queries=1)
    with second:
        for _ in range(3):
            second.step(range(20))
            second.step([20, 21, 22])
            second.step([0])
    stores = [first.store, second.store]
    with warned() as texts:
        explainer = pk.Explainer(stores, first.model)
    unvisited = "Run 1: Never visited in this run: 1 of 24 training examples. They contribute nothing."
    assert texts == [f"pkexplain: explaining the run in memory, the run in memory: {unvisited}"]
    notes = explainer.explain(first.queries[0]).notes
    mean = "All numbers are means over 2 runs, and each check shows the run in which it is worst."
    assert notes == (mean, unvisited)


def test_explainers_recorders_and_stores_describe_themselves_in_a_line(disk_run):
    store, recorder = disk_run.store, disk_run.recorder
    explainer = pk.Explainer(store, disk_run.model)
    assert repr(explainer) == f"<Explainer of the run in {store}: 96 examples, 2 segments, 6 steps>"
    assert repr(recorder) == f"<Recorder into {store}: 96 examples, 2 layers, not recording>"
    assert repr(pk.DirectoryStore(store)) == f"<DirectoryStore {store}>"
    assert repr(pk.MemoryStore()) == "<MemoryStore, empty>"
    training = RecordedTraining()
    with training:
        training.step(range(24))
        assert repr(training.recorder).endswith("24 examples, 2 layers, recording>")
    assert repr(training.store).startswith("<MemoryStore: 24 examples, 1 segment, 0.")
    many = pk.Explainer([RecordedTraining(mlp(seed=s)).train(1).store for s in range(4)], mlp())
    assert repr(many).startswith("<Explainer of the run in memory, the run in memory, the run in memory and 1 more: 24")

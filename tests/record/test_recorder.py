"""The recorder in a training loop: what it refuses, and that it changes nothing."""

from __future__ import annotations

import contextlib
import random
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import (
    ConfigurationError,
    ExampleIdError,
    NonFiniteGradientError,
    RecordingError,
    UnsupportedOptimizerError,
)
from pkexplain.ids import check_ids
from tests.conftest import RecordedTraining, batches, digits, mlp, train

ALL = slice(None)
EXAMPLES = 24


@pytest.fixture
def loop():
    with RecordedTraining() as entered:
        yield entered


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooks(model, optimizer):
    found = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()]
    found += [p._backward_hooks for p in model.parameters()]
    return [h for h in (*found, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks) if h]


def values(explanation):
    return {check.name: check.value for check in explanation.checks}


def failed(explanation):
    return {check.name for check in explanation.checks if not check.passed}


# --------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [
        ([0, 24], r"ids are out of range\. Got \[24\]; expected integers from 0 to 23"),
        ([0, -1], r"ids are out of range\. Got \[-1\]; "),
        ([0.0, 1.0], r"the ids are not integers\. Got torch\.float32; "),
        (torch.tensor([True, False]), r"the ids are not integers\. Got torch\.bool; "),
        (["a", "b"], r"the ids are not numbers\. Got \['a', 'b'\];"),
        (3, r"the ids are not numbers\. Got 3; "),
        (None, r"the ids are not numbers\. Got None; "),
        ([[0, 1], [2]], r"the ids are not numbers\. "),
        ([[0, 1], [2, 3]], r"a list with one id per example\. Got shape \(2, 2\); "),
        ([], r"a list with one id per example\. Got shape \(0,\); "),
        (np.array([1.5]), r"the ids are not integers"),
    ],
)
def test_ids_that_cannot_be_are_refused(loop, ids, wrong):
    with (
        pytest.raises(ExampleIdError, match=rf"^recorder\.step\(ids\): .*{wrong}.*\(from num_examples=24\)"),
        loop.recorder.step(ids),
    ):
        pytest.fail("the block must not run")
    loop.step([0, 1])  # and nothing is broken


@pytest.mark.parametrize("ids", [[0, 1, 2], [0], range(5)])
def test_another_number_of_ids_than_rows_is_refused_before_the_optimizer_steps(loop, ids):
    before = loop.parameters()
    wrong = rf"no tensor between the loss and the parameters has one row .* Got {len(ids)} ids, .*"
    with pytest.raises(ExampleIdError, match=wrong):
        loop.step(ids, rows=[0, 1])
    assert equal(before, loop.parameters())


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_ids_of_a_type_that_cannot_number_all_examples_are_refused(dtype):
    """300 examples in a byte: number 299 has become 43, and nothing else would show it."""
    wrapped = np.array([0, 299, 65_537 % 2**16]).astype(dtype)
    most = np.iinfo(dtype).max
    message = rf"and wrap round\. Got torch\.{dtype.__name__}, whose largest number is {most}"
    with pytest.raises(ExampleIdError, match=message):
        check_ids(wrapped, most + 2)
    assert check_ids(np.arange(3).astype(dtype), most + 1).tolist() == [0, 1, 2]
    if hasattr(torch, dtype.__name__):
        with pytest.raises(ExampleIdError, match="wrap round"):
            check_ids(torch.arange(3).to(getattr(torch, dtype.__name__)), most + 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_ids_are_whole_numbers(dtype):
    assert check_ids(np.array([5, 0, 3], dtype=dtype), 6).tolist() == [5, 0, 3]
    with pytest.raises(ExampleIdError, match=r"ids are out of range\. Got \[6\]"):
        check_ids(np.array([6, 0], dtype=dtype), 6)


@pytest.mark.parametrize(
    "ids", [[5, 3], (5, 3), range(2, 4), np.array([5, 3]), np.array([5, 3], dtype=np.int32), torch.tensor([5, 3])]
)
def test_ids_may_be_any_whole_numbers(loop, ids):
    with loop.recorder.step(ids):
        loop.backward([int(i) for i in ids])
        loop.optimizer.step()
    loop.__exit__(None, None, None)
    rows = loop.store.trajectory().segment(0).read_rows(ALL, torch.float64)
    assert sorted(int(i) for i in ids) == rows.abs().sum(1).nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------- broken contract


def test_an_example_whose_loss_is_nan_is_named_and_the_optimizer_does_not_step(loop):
    loop.step([0, 1])
    before = loop.parameters()
    loop.inputs[7, 3] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"the optimizer did not step\. Got .* example 7; expected"):
        loop.step([6, 7, 8])
    assert equal(before, loop.parameters())
    loop.step([6, 8])
    loop.__exit__(None, None, None)
    assert values(loop.explain())["displacement gap"] < 1e-12


def test_a_loss_that_is_infinite_as_a_whole_names_the_batch(loop):
    with pytest.raises(NonFiniteGradientError, match=r"from examples 6, 8; .*skip the batch or lower the rate"):
        loop.step([6, 8], factor=float("inf"))


def broken(wrong):
    return pytest.raises(RecordingError, match=rf"^recorder\.step\(ids\): {wrong}")


def test_backward_that_is_never_called(loop):
    before = loop.parameters()
    with broken(r"backward was never called\. Got .* Call loss\.backward\(\) inside"), loop.recorder.step([0, 1]):
        loop.model(loop.inputs[:2])
    with broken("backward was never called"), loop.recorder.step([0, 1]):
        loop.optimizer.step()
    with broken("backward was never called"), loop.recorder.step([0, 1], accumulate=True):
        pass
    loop.optimizer.zero_grad()
    with (
        broken(r"optimizer\.step\(\) was given arguments\. Got float; .*or with a closure"),
        loop.recorder.step([0, 1]),
    ):
        loop.optimizer.step(0.5)
    assert equal(before, loop.parameters())


def test_several_backward_passes_of_a_step_are_summed():
    found = []
    for times in (1, 2):
        with RecordedTraining() as loop, loop.recorder.step(range(8)):
            loop.optimizer.zero_grad()
            loss = F.cross_entropy(loop.model(loop.inputs[:8]), loop.targets[:8])
            other = loop.model(loop.inputs[:8]).square().mean()
            if times == 1:
                (loss + other).backward()
            else:
                loss.backward()
                other.backward()
            loop.optimizer.step()
        found.append(account(loop)[0][0])
    torch.testing.assert_close(
        found[0].read_rows(ALL, torch.float64),
        found[1].read_rows(ALL, torch.float64),
        rtol=1e-10,
        atol=1e-12,
    )
    assert found[1].optimizer.norm() < 1e-12


def test_a_step_inside_a_step(loop):
    with broken("it is nested in another step"), loop.recorder.step([0, 1]), loop.recorder.step([2, 3]):
        pass
    loop.step([0, 1])


def test_a_step_outside_the_recorder():
    loop = RecordedTraining()
    with broken("the recorder is not open"), loop.recorder.step([0]):
        pass
    with loop:
        loop.step([0, 1])
    with broken(r"the recorder is not open\. Got a step before it was entered or after it was closed"):
        loop.step([0, 1])


def test_an_optimizer_step_outside_a_recorded_step(loop):
    loop.backward([0, 1])
    before = loop.parameters()
    with broken(r"optimizer\.step\(\) was called outside a recorded step"):
        loop.optimizer.step()
    assert equal(before, loop.parameters())


def test_two_optimizer_steps_in_one_recorded_step(loop):
    with broken(r"optimizer\.step\(\) was called a second time"), loop.recorder.step([0, 1]):
        loop.backward([0, 1])
        loop.optimizer.step()
        once = loop.parameters()
        loop.optimizer.step()
    assert equal(once, loop.parameters())


def test_no_optimizer_step(loop):
    with broken(r"the optimizer did not step\. .* or pass accumulate=True"), loop.recorder.step([0, 1]):
        loop.backward([0, 1])


def test_an_optimizer_step_on_a_batch_that_only_accumulates(loop):
    with broken("the optimizer stepped on a batch that should only accumulate"):
        loop.step([0, 1], accumulate=True)


class ByHand(nn.Module):
    by_hand = True

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(64, 12, bias=False), nn.Linear(12, 10)

    def forward(self, x):
        return self.out(F.gelu(F.linear(x, self.inner.weight) if self.by_hand else self.inner(x)))


def test_a_parameter_used_by_hand_is_split_like_any_other():
    with RecordedTraining(ByHand().double()) as loop:
        loop.step([0, 1])
    assert loop.explain().passed


def test_a_parameter_used_by_hand_later_on_is_split_from_the_first_time():
    model = ByHand().double()
    model.by_hand = False
    with RecordedTraining(model, segments=20) as loop:
        for _ in range(20):
            loop.step([0, 1])
        loop.model.by_hand = True
        for _ in range(20):
            loop.step([2, 3])
    assert not failed(loop.explain())


@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_have_a_line_of_their_own(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 10)).double()
    with RecordedTraining(model.train(), segments=2) as loop:
        if frozen:
            model[1].eval()
        for ids in batches(EXAMPLES, 8, 4):
            loop.step(ids)
    explanation = loop.explain(tolerance=1e-6)
    assert values(explanation)["displacement gap"] < 1e-12
    assert values(explanation)["quadrature gap"] < 1e-6
    assert abs(explanation.gap) < 1e-9
    line = explanation.ledger.remainders.get("buffers")
    assert line is None if frozen else abs(line) > 1e-2


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"num_examples": 0}, r"Recorder\(num_examples=…\): .* Got 0; expected an integer from 1 up"),
        ({"num_examples": 8.0}, r"Recorder\(num_examples=…\): .* Got 8\.0; "),
        ({"num_examples": True}, r"Recorder\(num_examples=…\): .* Got True; "),
        ({"segments": "step"}, r"Recorder\(segments=…\): .* Got 'step'; expected \"epoch\" or a number of steps"),
        ({"segments": 0}, r"Recorder\(segments=…\): .* Got 0; "),
        ({"dtype": torch.float16}, r"Recorder\(dtype=…\): .* Got torch\.float16; expected float32 or float64"),
    ],
)
def test_arguments_that_cannot_be(options, wrong):
    with pytest.raises(ConfigurationError, match=f"^{wrong}"):
        RecordedTraining(**options)


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.LBFGS])
def test_an_optimizer_without_a_rule_is_refused_with_those_that_have_one(kind):
    model = mlp()
    name = re.escape(f"{kind.__module__}.{kind.__name__}")
    with pytest.raises(UnsupportedOptimizerError, match=rf"Got {name}; expected ASGD, .*Adam, .* SGD \(from"):
        RecordedTraining(model, kind(model.parameters()))


def test_an_optimizer_that_steps_in_its_own_way_is_not_taken_for_its_parent():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)

    model = mlp()
    with pytest.raises(UnsupportedOptimizerError, match=r"Got .*Mine; expected ASGD, .*register_update_rule"):
        RecordedTraining(model, Mine(model.parameters(), lr=0.1))


def test_a_model_without_a_trainable_parameter():
    model = mlp().requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"no parameter would change\. Got no trainable parameter"):
        RecordedTraining(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = mlp()
    with pytest.raises(ConfigurationError, match="no parameter would change"):
        RecordedTraining(mlp(), torch.optim.SGD(other.parameters(), lr=0.1))


def test_data_parallel_is_refused():
    with pytest.raises(ConfigurationError, match=r"hooks do not reach the copies .* Got DataParallel; "):
        RecordedTraining(nn.DataParallel(mlp()))


def test_nothing_is_written_before_the_model_is_accepted(tmp_path):
    model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ConfigurationError, match="complex parameters have no rule"):
        pk.Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1), num_examples=3)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ it changes nothing


@pytest.mark.parametrize("projection", [pk.Identity(), pk.SparseSign(64), pk.Kronecker(64)], ids=lambda p: p.kind)
def test_the_trained_model_is_bitwise_that_of_training_without_a_recorder(projection):
    inputs, targets = digits(EXAMPLES, torch.float32)

    def trained(record):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(12, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)
        options = {"num_examples": EXAMPLES, "projection": projection, "segments": 4}
        recorder = pk.Recorder(pk.MemoryStore(), model, optimizer, **options) if record else None
        random.seed(1), np.random.seed(1)
        train(model, optimizer, inputs, targets, batches(EXAMPLES, 8, 3), recorder=recorder, clip_norm=0.7)
        states = torch.get_rng_state(), random.random(), np.random.rand()
        return [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()], states, model, optimizer

    plain, plain_grads, plain_states, _, _ = trained(False)
    recorded, grads, states, model, optimizer = trained(True)
    assert equal(plain, recorded)
    assert equal(plain_grads, grads)
    assert torch.equal(plain_states[0], states[0])
    assert plain_states[1:] == states[1:]
    assert not hooks(model, optimizer)


@pytest.mark.parametrize("where", ["block", "loop", "backward"])
def test_no_hook_is_left_after_an_exception(where):
    loop = RecordedTraining()

    def interrupted():
        with loop:
            loop.step([0, 1])
            if where == "loop":
                raise ZeroDivisionError
            with loop.recorder.step([2, 3]):
                if where == "backward":
                    loop.backward([2, 3])
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not hooks(loop.model, loop.optimizer)
    assert len(loop.store.trajectory()) == 1
    assert loop.explain().passed


def test_only_the_hooks_of_the_recorder_are_removed(loop):
    seen = []
    handle = loop.model[0].register_forward_hook(lambda *_: seen.append(1))
    loop.step([0, 1])
    loop.__exit__(None, None, None)
    assert len(hooks(loop.model, loop.optimizer)) == 1
    handle.remove()
    assert seen == [1]


def test_a_users_hook_on_a_layer_that_is_differentiated_again_runs_once():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.out = nn.Parameter(torch.ones(64)), nn.Linear(64, 10)

        def forward(self, x):
            return self.out(x * self.gate)

    seen = []
    for batch in ([0], [1, 2]):  # a batch of one, too, in which a layer's example looks like the whole batch
        with RecordedTraining(Gate().double()) as loop:
            handle = loop.model.register_forward_hook(lambda *_: seen.append(1))
            loop.step(batch)
            handle.remove()
        assert len(seen) == 1
        seen.clear()
        assert loop.explain().passed


# ------------------------------------------------------------------------------------------ what is recorded


def account(loop):
    trajectory = loop.store.trajectory()
    return [trajectory.segment(t) for t in range(len(trajectory))], trajectory


def test_two_accumulated_batches_are_one_large_batch():
    with RecordedTraining(segments=2) as whole:
        for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
            whole.step(ids)
    with RecordedTraining(segments=2) as parts:
        for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
            parts.optimizer.zero_grad()
            for half, accumulate in ((ids[:3], True), (ids[3:], False)):
                with parts.recorder.step(half, accumulate=accumulate):
                    loss = F.cross_entropy(parts.model(parts.inputs[half]), parts.targets[half], reduction="sum")
                    (loss / 4).backward()
                    if not accumulate:
                        parts.optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    np.testing.assert_allclose(parts.explain().contributions, whole.explain().contributions, rtol=1e-9, atol=1e-14)
    assert parts.store.trajectory().boundaries == (0, 2)


def test_an_accumulated_example_may_come_twice():
    with RecordedTraining() as loop:
        with loop.recorder.step([0, 1], accumulate=True):
            loop.backward([0, 1])
        with loop.recorder.step([1, 2]):
            F.cross_entropy(loop.model(loop.inputs[1:3]), loop.targets[1:3]).backward()
            loop.optimizer.step()
    assert loop.explain().passed
    assert values(loop.explain())["displacement gap"] < 1e-12


@pytest.mark.parametrize("change", ["clip", "unscale", "both"])
def test_one_factor_on_the_gradient_is_found_and_recorded(change):
    with RecordedTraining() as loop:
        for ids in batches(EXAMPLES, 8, 1):
            with loop.recorder.step(ids):
                loop.backward(ids, 1.0 if change == "clip" else 512.0)
                if change != "clip":
                    for p in loop.model.parameters():
                        p.grad /= 512.0
                if change != "unscale":
                    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.3)
                loop.optimizer.step()
    (segment,), trajectory = account(loop)
    low, high = trajectory.summaries[0].rescaled
    assert low < (1.0 if change == "clip" else 1 / 500)
    assert high <= 1.0
    assert segment.optimizer.norm() < 1e-12
    assert loop.explain().passed


@pytest.mark.parametrize("change", ["noise", "clip by value", "penalty", "parameter"])
def test_what_belongs_to_no_example_is_on_the_optimizer_line_and_fails_its_check(change):
    torch.manual_seed(0)
    match = r"not a multiple of .* Clipping by value, .* optimizer line"
    match = r"what moved 2\.weight .* outside optimizer\.step\(\)" if change == "parameter" else match
    said = pytest.warns(UserWarning, match=match)
    with said, RecordedTraining() as loop:
        for ids in batches(EXAMPLES, 8, 1):
            with loop.recorder.step(ids):
                loop.backward(ids)
                for p in loop.model.parameters():
                    if change == "noise":
                        p.grad += 0.05 * torch.randn_like(p.grad)
                    if change == "clip by value":
                        p.grad.clamp_(-0.01, 0.01)
                    if change == "penalty":
                        p.grad += 0.1 * p.detach()
                loop.optimizer.step()
            if change == "parameter":
                with torch.no_grad():
                    loop.model[2].weight += 0.01
    (segment,), trajectory = account(loop)
    moved = trajectory.checkpoint(1).parameters - trajectory.checkpoint(0).parameters
    whole = segment.read_rows(ALL, torch.float64).sum(0) + segment.weight_decay + segment.optimizer
    torch.testing.assert_close(whole, moved)
    assert trajectory.summaries[0].optimizer_share > 0.01
    explanation = loop.explain()
    assert failed(explanation) == {"optimizer share"}
    assert abs(explanation.ledger.remainders["optimizer"]) > 1e-3
    assert abs(explanation.gap) < 1e-9  # it is named, not lost


def test_frozen_parameters_are_not_recorded_and_not_moved():
    model = mlp()
    model[0].weight.requires_grad_(False)
    with RecordedTraining(model) as loop:
        for ids in batches(EXAMPLES, 8, 2):
            loop.step(ids)
    _, trajectory = account(loop)
    assert [block.parameters for block in trajectory.fingerprint.blocks] == [("0.bias",), ("2.weight", "2.bias")]
    assert set(trajectory.fingerprint.frozen) == {"0.weight"}
    assert loop.explain().passed


def test_parameters_that_the_optimizer_does_not_hold_are_not_recorded():
    model = mlp()
    with RecordedTraining(model, torch.optim.SGD(model[2].parameters(), lr=0.1)) as loop:
        loop.step([0, 1])
    assert set(account(loop)[1].fingerprint.frozen) == {"0.weight", "0.bias"}


def test_a_schedule_is_followed():
    with RecordedTraining(segments=3) as loop:
        schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1, gamma=0.5)
        for ids in batches(EXAMPLES, 8, 2):
            loop.step(ids)
            schedule.step()
    segments, trajectory = account(loop)
    sums = [summary.learning_rate_sum[0] for summary in trajectory.summaries]
    assert sums == pytest.approx([0.05 * 1.75, 0.05 * 1.75 / 8])
    assert all(segment.optimizer.norm() < 1e-12 for segment in segments)


def test_a_segment_is_an_epoch_also_where_the_last_batch_is_dropped():
    with RecordedTraining() as loop:
        for _ in range(3):
            for ids in ([*range(10)], [*range(10, 20)]):  # of 24 examples
                loop.step(ids)
    _, trajectory = account(loop)
    assert trajectory.boundaries == (0, 2, 4, 6)
    assert [summary.visits for summary in trajectory.summaries] == [20, 20, 20]


def test_a_segment_is_an_epoch():
    with RecordedTraining() as loop:
        for ids in batches(EXAMPLES, 10, 2):
            loop.step(ids)
    _, trajectory = account(loop)
    assert trajectory.boundaries == (0, 3, 6)
    assert [summary.visits for summary in trajectory.summaries] == [24, 24]


def test_a_segment_is_a_number_of_steps_and_the_last_may_be_shorter():
    with RecordedTraining(segments=2) as loop:
        for ids in batches(EXAMPLES, 8, 1) + batches(EXAMPLES, 8, 1):
            loop.step(ids)
        loop.step([0])
    assert account(loop)[1].boundaries == (0, 2, 4, 6, 7)


def interrupted(loop):
    with loop.recorder.step([2, 3]):
        loop.backward([2, 3])
        loop.optimizer.step()
        raise TypeError


def test_a_segment_ends_also_where_its_last_step_raised_behind_the_optimizer():
    with RecordedTraining(segments=2) as loop:
        loop.step([0, 1])
        with pytest.raises(TypeError):
            interrupted(loop)
        for _ in range(4):
            loop.step([4, 5])
    assert account(loop)[1].boundaries == (0, 3, 5, 6)


def test_momentum_goes_on_moving_parameters_in_the_next_segment():
    with RecordedTraining(segments=1) as loop:
        loop.step([0, 1])
        loop.step([2, 3])
    segments, _ = account(loop)
    assert segments[0].read_rows(ALL, torch.float64).abs().sum(1).nonzero()[:, 0].tolist() == [0, 1]
    assert segments[1].read_rows(ALL, torch.float64).abs().sum(1).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(
        segments[1].read_rows(ALL, torch.float64)[:2],
        0.9 * segments[0].read_rows(ALL, torch.float64)[:2],
    )


def test_an_input_buffer_that_is_written_over_does_no_harm():
    inputs, targets = digits(EXAMPLES, torch.float32)
    found = []
    for reused in (False, True):
        model, store = mlp(dtype=torch.float32), pk.MemoryStore()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Kronecker(40)) as recorder:
            buffer = torch.empty(8, 64)
            for ids in torch.arange(EXAMPLES).split(8):
                x = buffer.copy_(inputs[ids]) if reused else inputs[ids]
                with recorder.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), targets[ids]).backward()
                    optimizer.step()
        found.append(store.trajectory().segment(0))
    torch.testing.assert_close(found[1].row_sum, found[0].row_sum)
    torch.testing.assert_close(found[1].read_rows(ALL, torch.float64), found[0].read_rows(ALL, torch.float64))


def test_a_layer_whose_input_is_a_parameter_is_recorded_as_it_was():
    class LearnedQuery(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.out = nn.Parameter(torch.randn(1, 64)), nn.Linear(64, 10)

        def forward(self, x):
            return self.out(self.query.expand(len(x), 64)) * x[:, :10]

    torch.manual_seed(0)
    model = LearnedQuery().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with RecordedTraining(model, optimizer, projection=pk.Kronecker(60)) as loop:
        for ids in batches(EXAMPLES, 8, 1):
            loop.step(ids)
    assert values(loop.explain())["displacement gap"] < 1e-12


@pytest.mark.parametrize("projection", [pk.Identity(), pk.SparseSign(256), pk.Kronecker(256)], ids=lambda p: p.kind)
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_the_run_may_have_another_number_format_than_the_model(projection, kinds):
    model_dtype, run_dtype = kinds
    inputs, targets = digits(EXAMPLES, model_dtype)
    model, store = mlp(dtype=model_dtype), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=projection, dtype=run_dtype)
    train(model, optimizer, inputs, targets, batches(EXAMPLES, 8, 1), recorder=recorder)
    explanation = pk.Explainer(store, model).explain(inputs[0], output=pk.Logit(0))
    assert values(explanation)["displacement gap"] < 1e-3
    assert values(explanation)["quadrature gap"] < 1e-2
    assert store.trajectory().checkpoint(0).parameters.dtype == run_dtype


def test_training_under_autocast_is_recorded():
    inputs, targets = digits(EXAMPLES, torch.float32)
    model, store = mlp(dtype=torch.float32), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Kronecker(256)) as recorder:
        for ids in batches(EXAMPLES, 8, 1):
            with recorder.step(ids):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(inputs[ids]), targets[ids])
                loss.backward()
                optimizer.step()
    assert values(pk.Explainer(store, model).explain(inputs[0]))["displacement gap"] < 1e-2


def test_vanishing_gradients_leave_finite_rows():
    inputs, targets = digits(EXAMPLES, torch.float32)
    model, store = mlp(dtype=torch.float32), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Kronecker(64)) as recorder:
        for factor, ids in ((1.0, [0, 1]), (1e-39, [2, 3])):
            with recorder.step(ids):
                optimizer.zero_grad()
                (F.cross_entropy(model(inputs[ids]), targets[ids]) * factor).backward()
                optimizer.step()
    segment = store.trajectory().segment(0)
    assert torch.isfinite(segment.shards[0].rows).all()
    assert torch.isfinite(segment.row_sum).all()
    assert np.isfinite(pk.Explainer(store, model).explain(inputs[0]).contributions).all()


def test_a_recorder_cannot_be_entered_twice(loop):
    with pytest.raises(pk.PkexplainError, match=r"the recorder is already open\. "):
        loop.recorder.__enter__()
    loop.step([0, 1])


@pytest.mark.parametrize("strength", [1e-4, 1e-2])
def test_a_penalty_in_the_loss_goes_to_the_optimizer_line(strength):
    """What the penalty moves is what weight decay of twice its strength moves: there it is the decay line."""
    inputs, targets = digits(64)
    loop = batches(48, 16, 2)
    lines = []
    for penalty in (True, False):
        model, store = mlp(), pk.MemoryStore()
        decay = 0.0 if penalty else 2 * strength
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
        recorder = pk.Recorder(
            store, model, optimizer, num_examples=48, projection=pk.Identity(), segments=3, dtype=torch.float64
        )

        def loss(outputs, wanted, model=model, penalty=penalty):
            squares = sum(p.square().sum() for p in model.parameters())
            return F.cross_entropy(outputs, wanted) + penalty * strength * squares

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, inputs, targets, loop, recorder=recorder, loss=loss)
        warned = [str(w.message) for w in caught if "weight_decay" in str(w.message)]
        assert bool(warned) == (penalty and strength > 1e-3)
        explainer = pk.Explainer(store, model, tolerance=1e-9, quadrature=pk.Quadrature(nodes=8, budget=256))
        explanation = explainer.explain(inputs[50], output=pk.Logit(0))
        lines.append((explanation.ledger.remainders, explanation.contributions))
        gaps = {check.name: check.value for check in explanation.checks}
        assert gaps["displacement gap"] < 1e-9
        assert gaps["capture gap"] < 1e-9  # what is missing is on its line
        assert not [w for w in caught if "captured gradients missed" in str(w.message)]
    (with_penalty, these), (with_decay, those) = lines
    assert with_penalty["optimizer"] == pytest.approx(with_decay["weight_decay"], rel=1e-6)
    assert abs(with_penalty["optimizer"]) > 1e-6
    np.testing.assert_allclose(these, those, rtol=1e-6, atol=1e-12)


def test_a_run_says_how_it_ended():
    inputs, targets = digits(32)
    ends = []
    for error in (None, KeyboardInterrupt):
        model, store = mlp(), pk.MemoryStore()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = pk.Recorder(store, model, optimizer, num_examples=32, dtype=torch.float64)
        with contextlib.suppress(KeyboardInterrupt), recorder:
            assert store.manifest().ended == "still recording, or killed"
            with recorder.step(range(16)):
                F.cross_entropy(model(inputs[:16]), targets[:16]).backward()
                optimizer.step()
            if error:
                raise error
        ends.append(store.manifest().ended)
    assert ends == ["finished", "interrupted by KeyboardInterrupt"]


def test_a_penalty_that_sets_in_later_is_followed_once_it_is_seen():
    inputs, targets = digits(48)
    model, store = mlp(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = pk.Recorder(
        store, model, optimizer, num_examples=48, projection=pk.Identity(), segments=3, dtype=torch.float64
    )
    with warnings.catch_warnings(record=True) as caught, recorder:
        warnings.simplefilter("always")
        for step, ids in enumerate(batches(48, 16, 3)):
            with recorder.step(ids):
                optimizer.zero_grad()
                squares = sum(p.square().sum() for p in model.parameters())
                (F.cross_entropy(model(inputs[ids]), targets[ids]) + (step >= 3) * 0.1 * squares).backward()
                optimizer.step()
    before, seen, after = store.trajectory().summaries
    assert before.capture_gap < 1e-9
    assert seen.capture_gap > 0.01
    assert seen.displacement_gap > 1e-3  # its first step was taken for the examples'
    assert after.capture_gap < 1e-9
    assert after.displacement_gap < 1e-9
    assert after.optimizer_share > 0.01
    assert ["segment 1" in str(w.message) for w in caught] == [True]


def test_a_parameter_moved_from_outside_is_warned_about_also_where_gradients_are_rounded():
    inputs, targets = digits(48, torch.float32)
    model, store = mlp().float(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = pytest.warns(UserWarning, match=r"of what moved 2\.weight in segment 1 came from no example")
    recorder = pk.Recorder(store, model, optimizer, num_examples=48, segments=3)
    with said, recorder:
        for step, ids in enumerate(batches(48, 16, 3)):
            with recorder.step(ids):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(inputs[ids]), targets[ids])
                loss.backward()
                optimizer.step()
            if step == 4:
                with torch.no_grad():
                    model[2].weight += 0.1
    assert store.trajectory().summaries[0].capture_gap > 1e-4  # rounding, which was followed

"""Habits of real training under AdamW: whatever the loop does, the account closes or says where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import NonFiniteGradientError, RecordingError
from pkexplain.optimizers.accumulator import DisplacementAccumulator
from tests.conftest import RecordedTraining, batches, cnn, mlp

EXAMPLES = 48


def adamw(make=mlp, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), dtype=torch.float64, **options):
    """AdamW around a small model, every coordinate in double precision unless told otherwise."""
    options = {"examples": EXAMPLES, "segments": 6, **options}
    return RecordedTraining(make(dtype=dtype), optimizer, dtype=dtype, **options)


def assert_closes(loop, tolerance=1e-8):
    values = loop.values()
    for name in ("optimizer share", "displacement gap", "capture gap", "audit error"):
        assert values[name] < tolerance, name
    assert values["quadrature gap"] < 1e-4


LOSSES = {
    "sum": lambda y, t: F.cross_entropy(y, t, reduction="sum") / 8,
    "class weights": lambda y, t: F.cross_entropy(y, t, weight=torch.linspace(0.2, 3, 10, dtype=y.dtype)),
    "several": lambda y, t: F.cross_entropy(y, t) + 0.3 * F.mse_loss(y, F.one_hot(t, 10).to(y.dtype)),
    "smoothed": lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1),
    "contrastive": lambda y, t: F.cross_entropy(y @ y.T / 10, torch.arange(len(y))),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_of_every_kind(loss):
    assert_closes(adamw().train(loss=loss))


def test_losses_of_tokens_are_means_over_all_tokens_of_a_batch():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, x):
            return self.out(self.body(x.view(len(x), 8, 8))[0]).transpose(1, 2)

    def make(dtype):
        torch.manual_seed(0)
        return Tagger().to(dtype)

    def loss(y, t):
        tokens = torch.stack([t + place for place in range(8)], dim=1) % 10
        return F.cross_entropy(y, tokens.masked_fill(tokens > 7, -100))  # a batch has as many tokens as are not masked

    loop = adamw(make).train(loss=loss)
    values = loop.values(output=lambda y: y[:, 3, -1])
    assert values["optimizer share"] < 1e-8
    assert values["displacement gap"] < 1e-8


def test_accumulation_warm_up_groups_and_both_decays():
    def of(parameters):
        weights = list(parameters)
        return torch.optim.AdamW(
            [{"params": weights[:1], "lr": 1e-2, "weight_decay": 0.1}, {"params": weights[1:], "betas": (0.8, 0.99)}],
            lr=2e-3,
        )

    loop = adamw(cnn, of, image=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: min(1.0, step / 4))  # from zero
    with loop.recorder:
        for epoch in range(3):
            for first, second in zip(*[iter(batches(EXAMPLES, 8, 1, seed=epoch))] * 2, strict=True):
                loop.optimizer.zero_grad()
                for ids, last in ((first, False), (second, True)):
                    with loop.recorder.step(ids, accumulate=not last):
                        (F.cross_entropy(loop.model(loop.inputs[ids]), loop.targets[ids]) / 2).backward()
                        if last:
                            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.7)
                            loop.optimizer.step()
                schedule.step()
    assert_closes(loop)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight"])
def test_parameters_frozen_and_thawed_midway(name):
    def on_step(done, loop):
        loop.model.get_parameter(name).requires_grad_(not 4 <= done < 11)

    loop = adamw().train(on_step=on_step)
    assert_closes(loop)
    before, after = (loop.store.trajectory().checkpoint(t).parameters for t in (1, 2))
    assert (before != after).any()


def test_a_parameter_without_a_gradient_stands_still():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.use = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)]), 0

        def forward(self, x):
            return self.heads[self.use](x)

    def make(dtype):
        torch.manual_seed(0)
        return Two().to(dtype)

    def on_step(done, loop):
        loop.model.use = int(done % 3 == 2)

    assert_closes(adamw(make).train(on_step=on_step))
    assert_closes(adamw(make, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)).train(on_step=on_step))


@pytest.mark.parametrize("projection", [pk.SparseSign(300), pk.Kronecker(200, 20)], ids=lambda p: p.kind)
@pytest.mark.parametrize("segments", [1, 3, 12])
@pytest.mark.filterwarnings("ignore:pkexplain. .* record shorter segments")
def test_the_account_closes_in_projection_space(projection, segments):
    loop = adamw(cnn, image=True, projection=projection, segments=segments).train()
    values = loop.values()
    assert values["displacement gap"] < 1e-8
    assert values["capture gap"] < 1e-8
    assert values["optimizer share"] < (1e-9 if segments == 1 else 0.2)


@pytest.mark.filterwarnings("ignore:pkexplain. .* record shorter segments")
def test_shorter_segments_leave_less_on_the_optimizer_line():
    shares = []
    for segments in (24, 6, 2, 1):
        options = {"segments": segments, "projection": pk.Kronecker(300)}
        loop = adamw(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **options).train(epochs=6)
        shares.append(max(s.optimizer_share for s in loop.store.trajectory().summaries[-2:]))
    assert shares[0] > shares[1] > shares[2] > shares[3]
    assert shares[0] < 0.5
    assert shares[3] < 1e-9


def test_the_first_segments_under_a_second_moment_are_short():
    def boundaries(optimizer, **options):
        options = {"segments": 12, "projection": pk.Kronecker(300), **options}
        return adamw(optimizer=optimizer, **options).train(epochs=4).store.trajectory().boundaries

    adam, sgd = (lambda p: torch.optim.Adam(p, lr=1e-3)), (lambda p: torch.optim.SGD(p, lr=1e-2))
    assert boundaries(adam) == (0, 1, 2, 4, 12, 24)
    assert boundaries(adam, segments="epoch") == (0, 1, 2, 6, 12, 18, 24)
    assert boundaries(adam, projection=pk.Identity()) == (0, 1, 2, 4, 12, 24)
    assert boundaries(sgd) == (0, 12, 24)


def test_a_projection_with_room_for_everything_is_exact_if_every_step_is_a_segment():
    exact = adamw(segments=1).train()
    roomy = adamw(projection=pk.Kronecker(100_000), segments=1).train()
    found, expected = (
        pk.Explainer(run.store, run.model, tolerance=1e-9, quadrature=pk.Quadrature(8, 512)).contributions(
            run.inputs[:3]
        )
        for run in (roomy, exact)
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    assert len(roomy.store.trajectory().segment(0).operator)


# ------------------------------------------------------------------------------------------------------ low precision


def test_autocast_leaves_little_to_the_optimizer_line():
    loop = adamw(cnn, image=True, dtype=torch.float32)
    with loop.recorder:
        for ids in batches(EXAMPLES, 8, 3):
            with loop.recorder.step(ids):
                loop.optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(loop.model(loop.inputs[ids]), loop.targets[ids])
                loss.backward()
                loop.optimizer.step()
    assert loop.values()["optimizer share"] < 2e-2


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_that_skips_steps(fused):
    def of(parameters):
        return torch.optim.AdamW(parameters, lr=3e-3, fused=fused)

    loop = adamw(optimizer=of, dtype=torch.float32, segments="epoch")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with loop.recorder:
        for done, ids in enumerate(batches(EXAMPLES, 8, 2)):
            with loop.recorder.step(ids):
                loop.optimizer.zero_grad()
                loss = F.cross_entropy(loop.model(loop.inputs[ids]), loop.targets[ids])
                scaler.scale(loss * (float("inf") if done in (2, 9) else 1.0)).backward()
                if not fused:
                    scaler.unscale_(loop.optimizer)
                    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
                scaler.step(loop.optimizer)
                scaler.update()
    assert loop.store.trajectory().boundaries == (0, 1, 2, 5, 10)  # five of an epoch's six steps were taken
    assert [s.skipped_steps for s in loop.store.trajectory().summaries] == [0, 0, 1, 1]
    assert sum(s.visits for s in loop.store.trajectory().summaries) == 2 * EXAMPLES
    values = loop.values()
    assert values["optimizer share"] < 1e-3
    assert values["displacement gap"] < 1e-4


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_parameter_that_is_added_or_thawed_later_is_refused_by_name():
    def on_step(done, loop):
        if done == 2:
            loop.model.register_parameter("late", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
            loop.optimizer.add_param_group({"params": [loop.model.late]})

    with pytest.raises(RecordingError, match=r"^recording parameter 'late': the optimizer updates it, and"):
        adamw().train(on_step=on_step)

    def make(dtype):
        model = mlp(dtype=dtype)
        model[0].weight.requires_grad_(False)
        return model

    def thaw(done, loop):
        loop.model[0].weight.requires_grad_(done >= 2)

    with pytest.raises(RecordingError, match=r"^recording parameter '0\.weight': .* keep it trainable until"):
        adamw(make).train(on_step=thaw)


def test_nan_in_one_example_is_named_by_its_id():
    loop = adamw()
    loop.inputs[17] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"nan or infinity from example 17; expected finite"):
        loop.train()


def test_a_parameter_changed_by_hand_is_named():
    def on_step(done, loop):
        if done == 3:
            loop.model[2].weight.data += 0.05

    said = pytest.warns(UserWarning, match=r"2\.weight .* outside optimizer\.step\(\)")
    with said:
        loop = adamw().train(on_step=on_step)
    assert loop.values()["optimizer share"] > 1e-2


def test_a_run_without_surprises_warns_of_nothing():
    assert_closes(adamw(dtype=torch.float32).train(), tolerance=1e-4)  # warnings are errors here


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=3e-3), lambda p: torch.optim.SGD(p, lr=0.05)],
    ids=["adamw", "sgd"],
)
def test_an_input_buffer_that_is_written_over_while_gradients_accumulate_does_no_harm(optimizer):
    found = []
    for reused in (False, True):
        loop = adamw(optimizer=optimizer, projection=pk.Kronecker(100_000), segments=1)
        buffer = torch.empty(8, 64, dtype=torch.float64)
        with loop.recorder:
            for place, ids in enumerate(batches(EXAMPLES, 8, 2)):
                with loop.recorder.step(ids, accumulate=place % 3 < 2):
                    if place % 3 == 0:
                        loop.optimizer.zero_grad()
                    x = buffer.copy_(loop.inputs[ids]) if reused else loop.inputs[ids]
                    F.cross_entropy(loop.model(x), loop.targets[ids]).backward()
                    if place % 3 == 2:
                        loop.optimizer.step()
        assert_closes(loop)
        found.append(loop.store.trajectory().segment(0).row_sum)
    torch.testing.assert_close(found[0], found[1])


def test_a_segment_of_many_visits_is_added_up_on_its_way(monkeypatch):
    folded, fold = [], DisplacementAccumulator._fold

    def counting(self, target):
        folded.append(len(self._visits))
        fold(self, target)

    monkeypatch.setattr(DisplacementAccumulator, "_fold", counting)
    options = {"segments": 60, "projection": pk.SparseSign(300)}
    loop = adamw(cnn, image=True, **options).train(epochs=10)
    values = loop.values()
    assert values["displacement gap"] < 1e-8
    assert values["audit error"] < 1.0
    assert len(folded) > 5
    assert max(folded) * 8 <= EXAMPLES  # no more wait than there are examples


def test_nan_under_a_loss_scaler_is_named_once():
    loop = adamw(dtype=torch.float32, segments="epoch")
    loop.inputs[17] = float("nan")
    scaler = torch.amp.GradScaler("cpu")
    said = pytest.warns(UserWarning, match=r"skipped a step .* only some examples is nan: 17\. Scaling")
    with said, loop.recorder:
        for ids in batches(EXAMPLES, 8, 2):
            with loop.recorder.step(ids):
                loop.optimizer.zero_grad()
                scaler.scale(F.cross_entropy(loop.model(loop.inputs[ids]), loop.targets[ids])).backward()
                scaler.step(loop.optimizer)
                scaler.update()
    assert sum(s.skipped_steps for s in loop.store.trajectory().summaries) == 2

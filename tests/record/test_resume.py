"""A run that is put down and taken up again is the run that was never interrupted."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ModelMismatchError, RecordingError, RunBusyError
from pkexplain.projection import base
from tests.conftest import batches, digits
from tests.trainings import EPOCHS, EXAMPLES, Training, small_model


class DiedError(Exception):
    pass


def assert_same_run(one, other):
    """Compare two runs tensor by tensor, to the last bit."""
    first, second = (pk.DirectoryStore(path).trajectory() for path in (one, other))
    assert first.summaries == second.summaries
    for t in range(len(first) + 1):
        assert_same_tensors(first.checkpoint(t).tensors(), second.checkpoint(t).tensors())
    for t in range(len(first)):
        a, b = first.segment(t), second.segment(t)
        assert_same_tensors(a.tensors(), b.tensors())
        assert len(a.shards) == len(b.shards) == 1
        assert_same_tensors(a.shards[0].tensors(), b.shards[0].tensors())


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.nan_to_num(), other[name].nan_to_num()), name


def interrupted(training, after, recorder=None, start=0):
    """Train some epochs, then die between two steps."""
    recorder = recorder or training.new_recorder()
    with contextlib.suppress(DiedError), recorder:
        for epoch in range(start, after + 1):
            for place, ids in enumerate(batches(EXAMPLES, 7, 1, seed=epoch)):
                if epoch == after and place == 2:
                    recorder._session._end_segment = lambda: None  # a killed process does not tidy up
                    raise DiedError
                with recorder.step(ids):
                    training.optimizer.zero_grad()
                    F.cross_entropy(training.model(training.inputs[ids]), training.targets[ids]).backward()
                    training.optimizer.step()
            if (epoch + 1) % training.every == 0:
                training.save(recorder, epoch)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(tmp_path, kind, every, norm):
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    Training(tmp_path / "unbroken", kind, every=every, norm=norm).go()
    interrupted(Training(tmp_path / "broken", kind, every=every, norm=norm), after=3)
    resumed = Training(tmp_path / "broken", kind, every=every, norm=norm)
    resumed.go()
    assert_same_run(tmp_path / "unbroken/run", tmp_path / "broken/run")
    explanation = pk.Explainer(resumed.run, resumed.model).explain(resumed.queries[0])
    assert {check.name: check.passed for check in explanation.checks}["displacement gap"]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_sampled_audit_goes_on_where_it_was(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(base, "_AUDITED_COORDINATES", 200)
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    Training(tmp_path / "unbroken", kind).go()
    interrupted(Training(tmp_path / "broken", kind), after=3)
    Training(tmp_path / "broken", kind).go()
    assert not pk.DirectoryStore(tmp_path / "broken/run").trajectory().coordinates.complete
    assert_same_run(tmp_path / "unbroken/run", tmp_path / "broken/run")


def test_a_state_lost_between_the_two_saves_is_found_one_save_earlier(tmp_path):
    (tmp_path / "whole").mkdir()
    Training(tmp_path / "whole").go()
    training = Training(tmp_path)
    recorder = training.new_recorder()
    with contextlib.suppress(DiedError), recorder:
        for epoch in range(3):
            training.epoch(recorder, epoch)
            if epoch == 2:
                recorder.save()
                raise DiedError  # before the training's own checkpoint was written
            training.save(recorder, epoch)
    assert len(pk.DirectoryStore(training.run).trajectory()) == 6
    Training(tmp_path).go()
    assert_same_run(tmp_path / "whole/run", tmp_path / "run")


# ------------------------------------------------------------------------------------------- runs that are trained on


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_more_training_with_a_new_optimizer_is_one_account(tmp_path, kind):
    training = Training(tmp_path, kind)
    training.go(epochs=2)
    before = len(pk.DirectoryStore(training.run).trajectory())
    inputs, targets = digits(EXAMPLES + 20)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.02, momentum=0.5)
    resumed = pk.Recorder.resume(training.run, training.model, optimizer, num_examples=EXAMPLES + 12)
    new = pytest.warns(UserWarning, match="resuming with (a new )?SGD")
    with new, resumed as recorder:
        for ids in batches(EXAMPLES + 12, 11, 2, seed=7):
            with recorder.step(ids):
                optimizer.zero_grad()
                F.cross_entropy(training.model(inputs[ids]), targets[ids]).backward()
                optimizer.step()
    trajectory = pk.DirectoryStore(training.run).trajectory()
    assert len(trajectory) > before
    assert trajectory.num_examples == EXAMPLES + 12
    explainer = pk.Explainer(training.run, training.model, tolerance=1e-6, quadrature=pk.Quadrature(6, 512))
    explanation = explainer.explain(inputs[-1])
    f_0 = small_model()(inputs[-1:])[0].detach()
    f_T = training.model(inputs[-1:])[0].detach()
    change = float(f_T[int(f_T.argmax())] - f_0[int(f_T.argmax())])
    assert explanation.final - explanation.initial == pytest.approx(change, rel=1e-10)
    assert explanation.contributions.shape == (EXAMPLES + 12,)
    assert np.abs(explanation.contributions[EXAMPLES:]).min() > 0
    values = {check.name: check.value for check in explanation.checks}
    assert values["displacement gap"] < 1e-9
    assert values["quadrature gap"] < 1e-6
    (new,) = explainer.contributions(inputs[-1:])
    assert new.sum() == pytest.approx(explanation.total, rel=1e-9)


def resumed_with(training, optimizer):
    with pk.Recorder.resume(training.run, training.model, optimizer):
        pass


@pytest.mark.parametrize("kind", ["Adam", "NAdam", "SGD"])
def test_the_state_of_another_kind_of_optimizer_is_refused(tmp_path, kind):
    training = Training(tmp_path, "adamw")
    training.go(epochs=1)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    other = getattr(torch.optim, kind)(training.model.parameters(), lr=1e-2, **options)
    other.state.update(training.optimizer.state)  # the same tensors: only the class says what they mean
    message = rf"the optimizer's state is that of another kind of optimizer\. Got {kind}; expected AdamW .* AdamW"
    before = pk.DirectoryStore(training.run).manifest()
    with pytest.raises(ConfigurationError, match=message):
        resumed_with(training, other)
    assert pk.DirectoryStore(training.run).manifest() == before


def test_an_optimizer_whose_state_was_not_loaded_is_said(tmp_path):
    training = Training(tmp_path, "adamw")
    training.go(epochs=1)
    with pytest.warns(
        UserWarning, match=r"a new AdamW, without a state, where .* load what you saved of the optimizer"
    ):
        resumed_with(training, torch.optim.AdamW(training.model.parameters(), lr=1e-2, weight_decay=1e-2))


def test_another_kind_of_optimizer_without_a_state_is_said(tmp_path):
    training = Training(tmp_path, "adamw")
    training.go(epochs=1)
    with pytest.warns(UserWarning, match="resuming with SGD; the run was recorded with AdamW"):
        resumed_with(training, torch.optim.SGD(training.model.parameters(), lr=1e-2))


def test_what_was_saved_last_is_what_is_compared(tmp_path):
    training = Training(tmp_path, "adamw")
    recorder, _ = training.resumed()
    with recorder:
        training.epoch(recorder, 0)
        recorder.save()
        training.optimizer.param_groups[0].update(lr=0.5)  # a scheduler's step
        training.save(recorder, 0)
    resumed_with(training, training.optimizer)  # without a warning


def test_options_of_an_optimizer_without_a_state_are_compared_too(tmp_path):
    training = Training(tmp_path, "sgd")
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05)
    training.recorder = training.new_recorder()
    training.go(epochs=1)
    training.optimizer.param_groups[0].update(lr=7.0)
    with pytest.warns(UserWarning, match=r"other options of SGD than before: lr 0\.05 then, 7\.0 now"):
        resumed_with(training, training.optimizer)


def test_a_run_that_grew_since_it_was_to_be_resumed_is_refused_by_name(tmp_path):
    training = Training(tmp_path, "sgd")
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05)
    training.go(epochs=1)
    stale = pk.Recorder.resume(training.run, training.model, training.optimizer)
    inputs, targets = digits(EXAMPLES + 4)
    resumed = pk.Recorder.resume(training.run, training.model, training.optimizer, num_examples=EXAMPLES + 4)
    with resumed, resumed.step(range(EXAMPLES, EXAMPLES + 4)):
        training.optimizer.zero_grad()
        F.cross_entropy(training.model(inputs[EXAMPLES:]), targets[EXAMPLES:]).backward()
        training.optimizer.step()
    with pytest.raises(RecordingError, match=r"the run has grown since Recorder\.resume was called"):
        stale.__enter__()


def test_options_that_differ_from_those_that_were_saved_are_said(tmp_path):
    training = Training(tmp_path, "adamw")
    training.go(epochs=1)
    training.optimizer.param_groups[0].update(weight_decay=0.5, lr=0.1)
    with pytest.warns(
        UserWarning, match=r"AdamW than were saved: lr 0\.01 then, 0\.1 now, weight_decay 0\.01 then, 0\.5"
    ):
        resumed_with(training, training.optimizer)


def test_examples_that_came_later_have_no_part_in_earlier_segments(tmp_path):
    training = Training(tmp_path)
    training.go(epochs=1)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.02)
    inputs, targets = digits(EXAMPLES + 4)
    resumed = pk.Recorder.resume(training.run, training.model, optimizer, num_examples=EXAMPLES + 4)
    new = pytest.warns(UserWarning, match="a new SGD, without a state, where the state of one was saved")
    with new, resumed, resumed.step(range(EXAMPLES, EXAMPLES + 4)):
        optimizer.zero_grad()
        F.cross_entropy(training.model(inputs[EXAMPLES:]), targets[EXAMPLES:]).backward()
        optimizer.step()
    trajectory = pk.DirectoryStore(training.run).trajectory()
    early, late = trajectory.segment(0), trajectory.segment(len(trajectory) - 1)
    assert early.read_rows(slice(None)).shape == late.read_rows(slice(None)).shape
    assert not early.read_rows(torch.tensor([EXAMPLES, EXAMPLES + 3])).any()
    assert late.read_rows(torch.tensor([EXAMPLES, EXAMPLES + 3])).any(dim=1).all()
    assert not late.read_rows(slice(0, EXAMPLES)).any()
    assert not early.loss_derivatives[EXAMPLES:].any()


# ----------------------------------------------------------------------------------------------- what cannot go on


def resume(training):
    with pk.Recorder.resume(training.run, training.model, training.optimizer):
        pytest.fail("the loop must not run")


def test_a_model_that_stands_elsewhere_is_refused(tmp_path):
    training = Training(tmp_path)
    training.go(epochs=2)
    with torch.no_grad():
        training.model[0].bias += 1
    with pytest.raises(ModelMismatchError, match=r"is at none of its checkpoints.*after step 5, 10 \(from"):
        resume(training)


def test_another_model_is_refused(tmp_path):
    training = Training(tmp_path)
    training.go(epochs=1)
    other = nn.Sequential(nn.Linear(64, 9), nn.Identity(), nn.GELU(), nn.Linear(9, 10)).double()
    with pytest.raises(ModelMismatchError, match=r"^explaining with parameter '0\.weight'"):
        pk.Recorder.resume(training.run, other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_an_optimizer_that_remembers_other_steps_is_refused(tmp_path):
    training = Training(tmp_path)
    training.go(epochs=1)
    training.optimizer.state[training.model[0].weight]["momentum_buffer"] *= 2
    with pytest.raises(ConfigurationError, match=r"state is from another step.* after recorder\.save\(\)"):
        resume(training)


def test_a_moment_that_was_not_saved_is_refused(tmp_path):
    training = Training(tmp_path, every=100)
    training.go(epochs=1)
    with pytest.raises(ConfigurationError, match=r"buffer at this step was not saved.*there are 0 states: none"):
        resume(training)


def test_a_training_set_cannot_shrink(tmp_path):
    training = Training(tmp_path)
    training.go(epochs=1)
    with pytest.raises(ConfigurationError, match=r"a training set can grow, not shrink\. Got 31; expected 32 or more"):
        pk.Recorder.resume(training.run, training.model, training.optimizer, num_examples=EXAMPLES - 1)


def test_saving_in_the_middle_of_a_step_is_refused(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(RecordingError, match=r"recorder\.save\(\) was called where a run cannot be saved"):
        training.new_recorder().save()
    recorder = training.new_recorder()
    with pytest.raises(RecordingError, match=r"an unfinished step"), recorder, recorder.step(range(4)):
        recorder.save()


def test_two_recorders_at_one_place_are_refused(tmp_path):
    training, other = Training(tmp_path), Training(tmp_path)
    with training.new_recorder() as recorder:
        training.epoch(recorder, 0)
        training.save(recorder, 0)
        with pytest.raises(RunBusyError, match=r"^writing to the run in .*: it is already being written to"):
            other.resumed()[0].__enter__()
        training.epoch(recorder, 1)
    other.go()
    assert len(pk.DirectoryStore(other.run).trajectory()) == 2 * EPOCHS


def test_only_the_last_two_states_stay(tmp_path):
    training = Training(tmp_path)
    training.go()
    states = sorted(file.name for file in (training.run / "states").iterdir())
    assert states == ["00010.000.safetensors", "00012.000.safetensors"]
    manifest = json.loads((training.run / "manifest.json").read_text())
    assert {name for state in manifest["states"] for name in state["files"]} == {f"states/{name}" for name in states}
    assert set(manifest["files"]) == {
        file.relative_to(training.run).as_posix() for file in training.run.rglob("*.safetensors")
    }


def test_a_state_that_is_saved_again_after_a_resume_replaces_the_one_before(tmp_path):
    Training(tmp_path).go(epochs=2)
    training = Training(tmp_path)
    recorder, _ = training.resumed()
    with recorder:
        training.save(recorder, 1)
    manifest = json.loads((training.run / "manifest.json").read_text())
    on_disk = {file.relative_to(training.run).as_posix() for file in training.run.rglob("*.safetensors")}
    assert set(manifest["files"]) == on_disk
    assert sorted(name for state in manifest["states"] for name in state["files"]) == sorted(
        name for name in on_disk if name.startswith("states/")
    )
    training = Training(tmp_path)
    training.go()
    assert len(pk.DirectoryStore(training.run).trajectory()) == 2 * EPOCHS


def test_examples_that_no_segment_holds_do_not_count_yet(tmp_path):
    Training(tmp_path).go(epochs=1)
    training = Training(tmp_path)
    training.resumed()
    with pk.Recorder.resume(training.run, training.model, training.optimizer, num_examples=EXAMPLES + 4):
        pass
    trajectory = pk.DirectoryStore(training.run).trajectory()
    assert trajectory.num_examples == EXAMPLES
    assert trajectory.segment(0).read_rows(slice(None)).shape[0] == EXAMPLES

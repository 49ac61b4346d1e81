"""Recording by a callback of skorch."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import RunExistsError
from tests.conftest import digits, mlp

skorch = pytest.importorskip("skorch")

from skorch.callbacks import Callback, GradientNormClipping  # noqa: E402
from skorch.dataset import ValidSplit  # noqa: E402

from pkexplain.integrations.skorch import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EXAMPLES = 30
INPUTS, TARGETS = (value.numpy() for value in digits(EXAMPLES, torch.float32))


class Seen(Callback):
    """Which rows of the data each step was trained on, told by the data themselves."""

    def on_train_begin(self, net, **kwargs):
        self.steps = []

    def on_batch_begin(self, net, batch=None, training=False, **kwargs):
        if training:
            self.steps.append([int((row == INPUTS).all(1).nonzero()[0][0]) for row in batch[0].numpy()])


def net(*callbacks, **options):
    torch.manual_seed(0)
    options = {"train_split": None, "max_epochs": 2, "optimizer": torch.optim.AdamW, **options}
    return skorch.NeuralNetClassifier(
        mlp(dtype=torch.float32),
        criterion=nn.CrossEntropyLoss,
        lr=1e-2,
        batch_size=7,
        iterator_train__shuffle=True,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    )


WAYS = {
    "plain": {},
    "validated on a part": {"train_split": ValidSplit(3)},
    "SGD with momentum": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9},
    "clipped": {"callbacks": [GradientNormClipping(0.1)]},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same_and_the_ids_are_right(way):
    options = dict(WAYS[way])
    more = options.pop("callbacks", [])
    store, seen = pk.MemoryStore(), Seen()
    plain, recorded = net(*more, **options), net(*more, seen, RecordingCallback(store, segments=1), **options)
    for each in (plain, recorded):
        torch.manual_seed(1)
        each.fit(INPUTS, TARGETS)
    pairs = zip(plain.module_.parameters(), recorded.module_.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    trajectory, before = store.trajectory(), set()
    assert trajectory.num_examples == EXAMPLES
    assert len(trajectory) == len(seen.steps)
    for t, ids in enumerate(seen.steps):
        shard = trajectory.segment(t).shards[0]
        assert set(ids) <= set(shard.ids.tolist()) <= before | set(ids)
        assert not shard.loss_derivatives.isnan().any()
        before |= set(ids)
    assert (before == set(range(EXAMPLES))) == ("train_split" not in options)
    assert "get_iterator" not in vars(recorded)
    found = pk.Explainer(store, mlp(dtype=torch.float32)).contributions(INPUTS[:2], output=pk.Logit(1))
    assert np.abs(found).sum() > 0


@pytest.mark.filterwarnings("ignore:pkexplain. explaining:UserWarning")
def test_a_net_that_is_fitted_further_continues_its_run():
    once, twice = pk.MemoryStore(), pk.MemoryStore()
    whole, parts = net(RecordingCallback(once), max_epochs=4), net(RecordingCallback(twice), max_epochs=2)
    torch.manual_seed(1)
    whole.fit(INPUTS, TARGETS)
    torch.manual_seed(1)
    parts.fit(INPUTS, TARGETS).partial_fit(INPUTS, TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(whole.module_.parameters(), parts.module_.parameters(), strict=True))
    found, wanted = (
        pk.Explainer(store, mlp(dtype=torch.float32)).contributions(INPUTS[:2], output=pk.Logit(1))
        for store in (twice, once)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_run_is_not_overwritten_by_another_fit():
    recorded = net(RecordingCallback(pk.MemoryStore()))
    recorded.fit(INPUTS, TARGETS)
    with pytest.raises(RunExistsError, match="overwrite=True"):
        recorded.fit(INPUTS, TARGETS)


def test_a_net_can_be_copied_and_pickled_with_its_callback(tmp_path):
    recorded = net(RecordingCallback(tmp_path / "run"))
    recorded.fit(INPUTS, TARGETS)
    for again in (copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))):
        assert np.array_equal(again.predict(INPUTS), recorded.predict(INPUTS))

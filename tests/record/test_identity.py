"""Ids that do not belong to the data are warned about, on real data sets; right ones never are."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn import datasets as sklearn_datasets
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import pkexplain as pk

BATCH, EPOCHS = 16, 3


class Reader(nn.Module):
    """A model of texts that leaves padding out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(97, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None):
        mask = (input_ids > 0 if attention_mask is None else attention_mask)[:, :, None].float()
        return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1).clamp_min(1))


def table(name):
    found = getattr(sklearn_datasets, f"load_{name}")()
    x = torch.tensor(found.data, dtype=torch.float32)
    y = torch.tensor(found.target, dtype=torch.float32 if name == "diabetes" else torch.int64)
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6), y


def texts(count=150):
    """Token ids of sentences of 3 to 17 words, as lists."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 18, (count,), generator=generator).tolist()
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths], torch.arange(count) % 2


DATA = ("digits", "breast_cancer", "wine", "diabetes", "texts")


def rows_of(name):
    if name == "texts":
        tokens, labels = texts()
        return [{"input_ids": row, "label": int(label)} for row, label in zip(tokens, labels, strict=True)]
    return TensorDataset(*(value[:400] for value in table(name)))


def model_of(name, rows):
    torch.manual_seed(0)
    if name == "texts":
        return Reader()
    outputs = 1 if name == "diabetes" else int(rows.tensors[1].max()) + 1
    return nn.Linear(rows.tensors[0].shape[1], outputs)


def pad(features, left=False, masked=True):
    longest = max(len(f["input_ids"]) for f in features)
    fill = [[0] * (longest - len(f["input_ids"])) for f in features]
    tokens = [z + f["input_ids"] if left else f["input_ids"] + z for f, z in zip(features, fill, strict=True)]
    batch = {"input_ids": torch.tensor(tokens)}
    if masked:
        batch["attention_mask"] = (batch["input_ids"] > 0).long()
    return batch, torch.tensor([f["label"] for f in features])


def order(count, epoch):
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def take(name, rows, places):
    some = [rows[i] for i in places.tolist()]
    if name == "texts":
        return pad(some)
    return tuple(torch.stack(part) for part in zip(*some, strict=True))


def loss_of(model, x, y):
    out = model(**x) if isinstance(x, dict) else model(x)
    return F.mse_loss(out[:, 0], y) if out.shape[1] == 1 else F.cross_entropy(out, y)


def shifted(places, count, epoch, done):
    return (places + 1) % count


def shuffled_again(places, count, epoch, done):
    return order(count, 100 + epoch)[done * BATCH :][: len(places)]


def enumerated(places, count, epoch, done):
    return torch.arange(done * BATCH, done * BATCH + len(places))


WRONG = {"shifted": shifted, "shuffled again": shuffled_again, "enumerated": enumerated}


def warned_in(name, wrong, **options):
    """The epoch and the step in which a recording first warns of its ids, or None."""
    rows = rows_of(name)
    model, count = model_of(name, rows), len(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = {"num_examples": count, **options}
    recorder = pk.Recorder(pk.MemoryStore(), model, optimizer, projection=pk.Identity(), **options)
    with recorder:
        for epoch in range(EPOCHS):
            for done, places in enumerate(order(count, epoch).split(BATCH)):
                x, y = take(name, rows, places)
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    with recorder.step(wrong(places, count, epoch, done)):
                        optimizer.zero_grad()
                        loss_of(model, x, y).backward()
                        optimizer.step()
                if any("the ids do not belong to the data" in str(each.message) for each in said):
                    return epoch, done
    return None


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["shuffled again", "enumerated"])
def test_ids_that_change_from_epoch_to_epoch_are_noticed_in_the_second(name, kind):
    found = warned_in(name, WRONG[kind])
    print(f"{name}, {kind}: epoch {found[0]}, step {found[1]}")
    assert found[0] == 1


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", WRONG)
def test_with_the_training_set_at_hand_they_are_noticed_in_the_first(name, kind):
    found = warned_in(name, WRONG[kind], dataset=rows_of(name))
    print(f"{name}, {kind}, with the data set: epoch {found[0]}, step {found[1]}")
    assert found[0] == 0


@pytest.mark.parametrize("name", DATA)
def test_right_ids_are_not_complained_about(name):
    def right(places, count, epoch, done):
        return places

    assert warned_in(name, right) is None
    assert warned_in(name, right, dataset=rows_of(name)) is None


def record_right(batches, model, count, loss, **options):
    """Record three epochs; any warning is an error."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pk.Recorder(
        pk.MemoryStore(), model, optimizer, num_examples=count, projection=pk.Identity(), **options
    ) as recorder:
        for epoch in range(EPOCHS):
            for ids, batch in batches(epoch):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()


def padded(left=False, masked=True):
    rows = rows_of("texts")

    def batches(epoch):
        for places in order(len(rows), epoch).split(7):
            yield places, pad([rows[i] for i in places.tolist()], left, masked)

    return batches, Reader(), len(rows), lambda model, batch: loss_of(model, *batch)


def images(change=lambda x: x):
    x, y = table("digits")
    x, y = x[:150], y[:150]

    def batches(epoch):
        for places in order(150, epoch).split(16):
            yield places, (change(x[places]), y[places])

    return batches, nn.Linear(64, 10), 150, lambda model, batch: loss_of(model, *batch)


def in_half_precision():
    batches, model, count, loss = images()

    def half(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    return batches, model, count, half


def two_passes():
    batches, model, count, _ = images()

    def both(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y) + F.mse_loss(model(x.flip(1)), model(x).detach())

    return batches, model, count, both


def with_noise():
    return images(lambda x: x + 0.1 * torch.randn_like(x))


def not_a_number():
    """Missing values stay missing."""

    class Filled(nn.Linear):
        def forward(self, x):
            return super().forward(x.nan_to_num())

    batches, _, count, loss = images(lambda x: torch.where(x > 2, float("nan"), x))
    return batches, Filled(64, 10), count, loss


RIGHT = {
    "padded on the right, with a mask": (padded, {}),
    "padded on the left, with a mask": (lambda: padded(left=True), {}),
    "padded without a mask": (lambda: padded(masked=False), {}),
    "images": (images, {}),
    "normalised in the loop": (lambda: images(lambda x: x / 16 - 0.5), {}),
    "half precision": (in_half_precision, {}),
    "several forward passes": (two_passes, {}),
    "integers": (lambda: images(lambda x: x.round().int().float()), {}),
    "values that are missing": (not_a_number, {}),
    "noise, declared": (with_noise, {"augmented": True}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_loops_are_not_complained_about(case):
    make, options = RIGHT[case]
    record_right(*make(), **options)


def test_noise_that_was_not_declared_is_asked_about():
    with pytest.warns(UserWarning, match=r"then say so, Recorder\(augmented=True\)"):
        record_right(*with_noise())


def test_a_sampler_that_repeats_examples_is_right():
    rows = rows_of("digits")
    loader = DataLoader(rows, 16, sampler=WeightedRandomSampler(torch.ones(len(rows)), len(rows)))
    model = model_of("digits", rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pk.Recorder(pk.MemoryStore(), model, optimizer, dataset=rows, projection=pk.Identity()) as recorder:
        for _ in range(EPOCHS):
            for x, y in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

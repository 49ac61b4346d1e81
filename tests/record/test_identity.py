"""Wrong ids are noticed within an epoch, and right ones never complained about: real data in loops of many kinds."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn import datasets as real
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import pkexplain as pk
from pkexplain.ids.digests import differ, digest, read_row, without_padding
from pkexplain.ids.likeness import InputRow, alike, distance
from tests.conftest import digits

BATCH = 16
CODES = {"<": 1}


def flat_rows(load):
    data = load()
    return torch.tensor(data.data[:240], dtype=torch.float32), torch.tensor(data.target[:240])


def photographs():
    """Pieces of two photographs, as a transform leaves them."""
    pieces = [
        torch.tensor(photo)[:256, :320].unfold(0, 32, 32).unfold(1, 32, 32)
        for photo in real.load_sample_images().images
    ]
    rows = torch.stack(pieces).reshape(-1, 3, 32, 32)
    return rows.float() / 255, torch.arange(len(rows)) % 2


def sentences():
    """Sentences about data sets, as lists of the codes of their words."""
    loaders = (real.load_iris, real.load_wine, real.load_digits, real.load_breast_cancer, real.load_diabetes)
    text = " ".join(load().DESCR for load in loaders)
    found = [re.findall(r"\w+", sentence.lower()) for sentence in re.split(r"[.:\n]\s", text)]
    found = list(dict.fromkeys(tuple(words) for words in found if len(words) > 3))
    for word in sorted({word for words in found for word in words}):
        CODES.setdefault(word, len(CODES) + 1)
    return [[CODES[word] for word in words] for words in found]


TEXTS = sentences()
DATA = {
    "digits": lambda: digits(240, torch.float32, image=True),
    "breast cancer": lambda: flat_rows(real.load_breast_cancer),
    "diabetes": lambda: flat_rows(real.load_diabetes),
    "wine": lambda: flat_rows(real.load_wine),
    "photographs": photographs,
    "texts": lambda: (TEXTS, [len(words) % 2 for words in TEXTS]),
}


class Words(nn.Module):
    """A bag of words."""

    def __init__(self, pad=0):
        super().__init__()
        self.embedding, self.out, self.pad = nn.Embedding(len(CODES) + 3, 8), nn.Linear(8, 2), pad

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = (input_ids != self.pad) if attention_mask is None else attention_mask
        vectors = self.embedding(input_ids) * mask[..., None]
        return self.out(vectors.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class Net(nn.Module):
    """A linear layer on whatever it is given first."""

    def __init__(self, count, classes=2):
        super().__init__()
        self.out = nn.Linear(count, classes)

    def forward(self, x, *others, **more):
        return self.out(x.flatten(1).float() * 1e-2)


def padded(rows, left=False, pad=0, extra=0):
    """Pad lists of tokens to the longest, and by some more."""
    longest = max(map(len, rows)) + extra
    fill = [[pad] * (longest - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fill, strict=True)])


def complaints(model, steps, count, store=None, **options):
    """Record steps ``(ids, loss of the model)``; return the warnings about ids, and at which step each came."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pk.Recorder(store or pk.MemoryStore(), model, optimizer, num_examples=count, **options) as recorder:
            for step, (ids, loss) in enumerate(steps, start=1):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    loss(model).backward()
                    optimizer.step()
                texts = [str(each.message) for each in caught]
                found += [(step, text) for text in texts if "recorder.batches(loader)" in text]
                assert {each.filename for each in caught if "recorder.batches" in str(each.message)} <= {__file__}
                caught.clear()
    return found


def cross_entropy(outputs, classes):
    return nn.functional.cross_entropy(outputs.float(), torch.as_tensor(classes).long())


def shuffled(count, epochs=2, size=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(count, generator=generator).split(size)]


def wrong_ids(kind, count, epochs):
    """Row numbers of each batch, and the ids that are passed."""
    rows, other = shuffled(count, epochs), shuffled(count, epochs, seed=1)
    counted = list(torch.arange(count).split(BATCH)) * epochs
    return {
        "right": zip(rows, rows, strict=True),
        "shifted": ((each, (each + 1) % count) for each in rows),
        "shuffled": zip(rows, other, strict=True),
        "counted": zip(rows, counted, strict=True),
    }[kind]


def recorded_with(name, kind, dataset):
    """Record two epochs of a data set; return in which epoch and step a warning came, and the steps of an epoch."""
    torch.manual_seed(0)
    inputs, labels = DATA[name]()
    count, classes = len(inputs), torch.as_tensor(labels)

    def steps():
        for rows, ids in wrong_ids(kind, count, 2):
            if name == "texts":
                x = padded([inputs[int(i)] for i in rows])
                yield ids, lambda model, x=x, rows=rows: cross_entropy(model(x), classes[rows])
            else:
                x = inputs[rows]
                yield ids, lambda model, x=x, rows=rows: model(x).float().square().mean()

    rows = list(zip(inputs, labels, strict=True))
    model = Words() if name == "texts" else Net(inputs[0].numel())
    found = complaints(model, steps(), count, dataset=rows if dataset else None)
    return found, -(-count // BATCH)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["shifted", "shuffled", "counted"])
def test_wrong_ids_are_found_in_the_first_epoch_with_the_data_set(name, kind):
    found, epoch = recorded_with(name, kind, dataset=True)
    assert len(found) == 1
    step, text = found[0]
    assert step <= max(4, epoch // 4), step
    example, row, own = map(
        int, re.search(r"came as example (\d+) is dataset\[(\d+)\], not dataset\[(\d+)\]", text).groups()
    )
    assert example == own != row
    if kind == "shifted":
        assert example in (row + 1, 0)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["shuffled", "counted"])
def test_ids_beside_a_shuffling_loader_are_found_at_the_second_visit(name, kind):
    found, epoch = recorded_with(name, kind, dataset=False)
    assert len(found) == 1
    step, text = found[0]
    assert epoch < step <= epoch + 4, step
    assert "came back with another input '0'" in text


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("dataset", [False, True])
def test_right_ids_are_not_complained_about(name, dataset):
    assert recorded_with(name, "right", dataset)[0] == []


def test_consistently_shifted_ids_are_not_found_without_the_data_set():
    assert recorded_with("digits", "shifted", dataset=False)[0] == []


def test_a_loader_followed_by_the_recorder_cannot_have_wrong_ids():
    x, y = digits(96, torch.float32)
    model = Net(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pk.Recorder(pk.MemoryStore(), model, optimizer, dataset=TensorDataset(x, y)) as recorder:
            for inputs, classes in (batch for _ in range(3) for batch in recorder.batches(loader)):
                optimizer.zero_grad()
                cross_entropy(model(inputs), classes).backward()
                optimizer.step()


# Right loops: nothing may be said of any of them.


def text_loop(collate, epochs=3, model=None):
    def steps():
        for at, rows in enumerate(shuffled(len(TEXTS), epochs)):
            texts = [TEXTS[int(i)] for i in rows]
            classes = [len(text) % 2 for text in texts]
            yield rows, lambda model, t=texts, c=classes, a=at: cross_entropy(collate(model, t, a), c)

    return model or Words(), steps(), len(TEXTS)


def masked(left):
    def collate(model, texts, at):
        tokens, mask = (padded(each, left, extra=at % 5) for each in (texts, [[1] * len(text) for text in texts]))
        tokens = torch.where(mask == 1, tokens, len(CODES) + 1)
        return model(input_ids=tokens, attention_mask=mask)

    return text_loop(collate)


def unmasked(pad, left=False):
    def collate(model, texts, at):
        return model(padded(texts, left, pad, at % 5))

    return text_loop(collate, model=Words(pad))


def labels_padded():
    def collate(model, texts, at):
        labels = padded(texts, pad=-100, extra=at % 5)
        return model(padded(texts, extra=at % 5), labels=labels)

    return text_loop(collate)


def in_a_mapping():
    class Mapped(Words):
        def forward(self, batch):
            return super().forward(**batch)

    def collate(model, texts, at):
        tokens, mask = (padded(each, extra=at % 5) for each in (texts, [[1] * len(text) for text in texts]))
        return model({"input_ids": tokens, "attention_mask": mask})

    return text_loop(collate, model=Mapped())


def image_loop(call, count=96, model=None, epochs=3, ids=None):
    """Digits, of which ``call(model, x, step)`` computes the outputs."""
    x, y = digits(count, torch.float32, image=True)

    def steps():
        for at, rows in enumerate(ids or shuffled(count, epochs)):
            yield rows, lambda model, r=rows, a=at: cross_entropy(call(model, x[r], a), y[r])

    return model or Net(64, 10), steps(), count


def half(dtype):
    def call(model, x, at):
        with torch.autocast("cpu", dtype):
            return model(x.to(dtype))

    return image_loop(call)


def normalised(model, x, at):
    return model((x - 0.3) / 0.7)


def normalised_by_the_batch(model, x, at):
    return model((x - x.mean()) / x.std())


def contrastive(model, x, at):
    return model(x) + model(x.flip(-1))


def with_negatives_first(model, x, at):
    return model(x[torch.randperm(len(x))]) * 0.1 + model(x)


def with_noise_beside(model, x, at):
    return model(x, torch.randn(len(x), 4))


def with_prototypes_beside(model, x, at):
    return model(x, torch.arange(float(len(x) * 3)).reshape(len(x), 3))


class Careful(Net):
    """Leaves nan out."""

    def forward(self, x, *others):
        return super().forward(x.nan_to_num())


def signs_of_zero(model, x, at):
    x = torch.where(x < 0, 0.0, x)
    return model(torch.where(x == 0, -0.0, x) if at % 2 else x)


class Checkpointed(Net):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


FROZEN = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 40)).requires_grad_(False)


def features(model, x, at):
    return model(FROZEN(x))


def rounded_features(model, x, at):
    """As other kernels would give them for another size of the batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=at % 2 == 1):
        found = FROZEN(x)
    return model(found.float())


def time_first():
    class TimeFirst(Net):
        def forward(self, x):
            return super().forward(x.transpose(0, 1).flatten(1))

    return image_loop(
        lambda model, x, at: model(x[:, 0, :, :].transpose(0, 1)), 64, TimeFirst(64, 10), ids=shuffled(64, 3, 8)
    )


def repeated():
    sampler = WeightedRandomSampler(torch.rand(96), 96 * 3)
    ids = torch.tensor(list(sampler)).split(BATCH)
    return image_loop(lambda model, x, at: model(x), ids=ids)


def spectra():
    """Frames in the second dimension, padded to the longest of the batch with what silence is after normalising."""
    x, y = digits(96, torch.float32)
    rows = [x[i].reshape(8, 8)[:, : 3 + i % 6] for i in range(96)]

    def steps():
        for at, ids in enumerate(shuffled(96, 3)):
            longest = max(rows[int(i)].shape[1] for i in ids) + at % 3
            batch = torch.stack(
                [nn.functional.pad(rows[int(i)], (0, longest - rows[int(i)].shape[1]), value=-1.5) for i in ids]
            )
            yield ids, lambda model, b=batch, i=ids: cross_entropy(model(b[:, :, :3]) + model(b).mean() * 0, y[i])

    class Sum(Net):
        def forward(self, x):
            return super().forward(x.mean(-1))

    return Sum(8, 10), steps(), 96


def sparse():
    class FromSparse(Net):
        def forward(self, x):
            return super().forward(x.to_dense())

    return image_loop(lambda model, x, at: model(x.flatten(1).relu().to_sparse()), model=FromSparse(64, 10))


def counts(model, x, at):
    return model((x * 6 + 5).round().long())


def flags(model, x, at):
    return model(x > 0)


RIGHT = {
    "padded right, with a mask": lambda: masked(False),
    "padded left, with a mask": lambda: masked(True),
    "padded with 0, no mask": lambda: unmasked(0),
    "padded left with 0, no mask": lambda: unmasked(0, True),
    "padded with another token, no mask": lambda: unmasked(len(CODES) + 1),
    "padded left with another token, no mask": lambda: unmasked(len(CODES) + 1, True),
    "labels padded with -100": labels_padded,
    "a mapping as the input": in_a_mapping,
    "frames padded with a number": spectra,
    "bfloat16": lambda: half(torch.bfloat16),
    "float16": lambda: half(torch.float16),
    "normalised in the loop": lambda: image_loop(normalised),
    "normalised by the batch": lambda: image_loop(normalised_by_the_batch),
    "two views": lambda: image_loop(contrastive),
    "negatives first": lambda: image_loop(with_negatives_first),
    "noise beside": lambda: image_loop(with_noise_beside),
    "prototypes beside": lambda: image_loop(with_prototypes_beside),
    "gradient checkpointing": lambda: image_loop(lambda model, x, at: model(x), model=Checkpointed(64, 10)),
    "frozen features": lambda: image_loop(features, model=Net(40, 10)),
    "frozen features, rounded otherwise": lambda: image_loop(rounded_features, model=Net(40, 10)),
    "the batch in the second dimension": time_first,
    "repeats": repeated,
    "nan": lambda: image_loop(lambda m, x, at: m(torch.where(x > 1.5, torch.nan, x)), model=Careful(64, 10)),
    "negative zero": lambda: image_loop(signs_of_zero),
    "rows of zeros": lambda: image_loop(lambda model, x, at: model(torch.where(x[:, :, :1, 3:4] > 0, x, 0.0))),
    "sparse": sparse,
    "integers": lambda: image_loop(counts),
    "flags": lambda: image_loop(flags),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_is_not_complained_about(name):
    torch.manual_seed(0)
    model, steps, count = RIGHT[name]()
    store = pk.MemoryStore()
    assert complaints(model, steps, count, store) == []
    assert len(store.manifest().digests) >= 64


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_loop_with_ids_of_its_own_is_complained_about(name):
    """What a right loop is allowed does not hide wrong ids."""
    torch.manual_seed(0)
    model, steps, count = RIGHT[name]()
    steps = list(steps)
    counted = list(torch.arange(count).split(len(steps[0][0])))
    wrong = [(counted[at % len(counted)][: len(ids)], loss) for at, (ids, loss) in enumerate(steps)]
    wrong = [(ids, loss) for (ids, loss), (rows, _) in zip(wrong, steps, strict=True) if len(ids) == len(rows)]
    found = complaints(model, wrong, count)
    assert len(found) == 1
    assert len(counted) < found[0][0] + 2 <= len(counted) + 8


CHANGES = {
    "crops": lambda x: torch.roll(
        nn.functional.pad(x, (2, 2, 2, 2)), tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3)
    )[..., 2:-2, 2:-2],
    "noise": lambda x: x + 0.3 * torch.randn_like(x),
    "masking": lambda x: torch.where(torch.rand_like(x) < 0.15, 9.0, x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("augmented", [True, False])
def test_inputs_changed_at_random_have_to_be_declared(change, augmented):
    torch.manual_seed(0)
    model, steps, count = image_loop(lambda model, x, at: model(CHANGES[change](x)))
    found = complaints(model, steps, count, augmented=augmented)
    assert [("augmented=True" in text) for _, text in found] == [] if augmented else [True]


# Rows of the data set that are, or are not, what the model is given.


def pixels(count=96):
    """Digits as bytes, ``(count, 8, 8)``, and photographs' pieces, channels last."""
    return real.load_digits().images[:count].astype(np.uint8) * 15


def pictures():
    from PIL import Image

    return [Image.fromarray((piece.permute(1, 2, 0) * 255).byte().numpy()) for piece in photographs()[0][:96]]


def channels_first(rows):
    return torch.stack([torch.tensor(np.asarray(row)).movedim(-1, 0).float() / 255 for row in rows])


def with_format():
    from datasets import Dataset

    rows = Dataset.from_dict({"pixels": pixels().reshape(96, -1).tolist(), "label": list(range(96))})
    return rows.with_format("torch")


def stacked(rows):
    return torch.stack([torch.as_tensor(row) for row in rows])


MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TRANSFORMED = {
    "as they are": (lambda: digits(96, torch.float32)[0], stacked, True),
    "tuples": (
        lambda: list(zip(*digits(96, torch.float32), strict=True)),
        lambda rows: stacked([x for x, _ in rows]),
        True,
    ),
    "with the id": (
        lambda: [(i, *row) for i, row in enumerate(zip(*digits(96, torch.float32), strict=True))],
        lambda rows: stacked([row[1] for row in rows]),
        True,
    ),
    "lists in mappings": (
        lambda: [{"tokens": list(text), "n": 3} for text in TEXTS],
        lambda rows: padded([row["tokens"] for row in rows]),
        True,
    ),
    "arrays of float64": (lambda: digits(96)[0].numpy(), lambda rows: stacked(rows).float(), True),
    "bytes, divided": (pixels, lambda rows: stacked(rows).float()[:, None] / 255, True),
    "bytes, as they are": (pixels, lambda rows: stacked(rows), True),
    "pictures": (pictures, channels_first, True),
    "pictures, normalised": (
        pictures,
        lambda rows: (channels_first(rows) - MEAN[:, None, None]) / SPREAD[:, None, None],
        True,
    ),
    "Hugging Face": (with_format, lambda rows: stacked([row["pixels"] for row in rows]).float() / 16, True),
    "half": (lambda: digits(96, torch.float32)[0], lambda rows: stacked(rows).half(), True),
    "bfloat16": (lambda: digits(96, torch.float32)[0], lambda rows: stacked(rows).bfloat16(), True),
    "one more axis": (
        lambda: digits(96, torch.float32)[0],
        lambda rows: stacked([row[None, None] for row in rows]),
        True,
    ),
    "flattened": (lambda: digits(96, torch.float32, image=True)[0], lambda rows: stacked(rows).flatten(1), True),
    "padded left": (lambda: TEXTS, lambda rows: padded([list(row) for row in rows], left=True), True),
    "cut": (lambda: TEXTS, lambda rows: padded([list(row)[:6] for row in rows]), None),
    "the next token": (
        lambda: [torch.arange(i, i + 12) % 97 for i in range(96)],
        lambda rows: stacked(rows)[:, 1:],
        None,
    ),
    "texts": (
        lambda: [" ".join(map(str, text)) for text in TEXTS],
        lambda rows: padded([[int(word) for word in row.split()] for row in rows]),
        False,
    ),
    "of each feature": (
        lambda: flat_rows(real.load_wine)[0],
        lambda rows: (stacked(rows) - flat_rows(real.load_wine)[0].mean(0)) / flat_rows(real.load_wine)[0].std(0),
        False,
    ),
    "resized": (pictures, lambda rows: nn.functional.interpolate(channels_first(rows), (16, 16)), False),
    "smoothed": (
        lambda: digits(96, torch.float32, image=True)[0],
        lambda rows: nn.functional.avg_pool2d(stacked(rows), 3, 1, 1),
        False,
    ),
    "squared": (lambda: flat_rows(real.load_breast_cancer)[0], lambda rows: stacked(rows).log1p(), False),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_rows_are_recognised_or_nothing_is_said(name):
    make, collate, recognised = TRANSFORMED[name]
    rows = make()
    count = len(rows)

    def found(shift):
        def steps():
            for ids in shuffled(count, 1):
                x = collate([rows[int(i)] for i in ids])
                yield (ids + shift) % count, lambda model, x=x: model(x).square().mean()

        width = collate([rows[0], rows[1]])[0].numel()
        tokens = not collate([rows[0], rows[1]]).is_floating_point() and name not in ("bytes, as they are",)
        return complaints(Words() if tokens else Net(width), steps(), count, dataset=rows)

    assert found(0) == []
    if recognised is not None:
        assert len(found(1)) == (1 if recognised else 0)


def test_negatives_are_rows_of_other_examples_and_right():
    x, y = digits(96, torch.float32)

    def steps():
        for ids in shuffled(96, 2):

            def loss(model, r=ids, n=(ids + 1) % 96):
                return cross_entropy(model(x[r], x[n]), y[r])

            yield ids, loss

    assert complaints(Net(64, 10), steps(), 96, dataset=TensorDataset(x, y)) == []


def test_labels_and_numbers_beside_are_given_to_the_model():
    x, y = digits(96, torch.float32)
    rows = [{"x": row, "labels": label, "age": float(i)} for i, (row, label) in enumerate(zip(x, y, strict=True))]

    def found(shift):
        def steps():
            for ids in shuffled(96, 2):
                more = {"labels": y[ids], "age": ids.float()}
                yield (ids + shift) % 96, lambda model, r=ids, more=more: cross_entropy(model(x[r], **more), y[r])

        return complaints(Net(64, 10), steps(), 96, dataset=rows)

    assert found(0) == []
    assert len(found(1)) == 1


def test_rows_are_read_without_drawing_the_random_numbers_of_the_training():
    x, y = digits(96, torch.float32)

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, i):
            return x[i] + torch.randn(()) + random.random() + np.random.rand(), y[i]

    def drawn(dataset):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model, steps, count = image_loop(normalised, epochs=1)
        complaints(model, steps, count, dataset=dataset)
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    assert drawn(Noisy()) == drawn(None)


# Runs that are resumed.


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_a_resumed_run_compares_with_what_came_before(reordered, whole_numbers):
    x, y = digits(96, torch.float32)
    x = (x * 6 + 5).round().long() if whole_numbers else x
    model, store = Net(64, 10), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def epochs(recorder, order):
        for ids in shuffled(96, 2):
            with recorder.step(ids):
                optimizer.zero_grad()
                cross_entropy(model(x[order[ids]]), y[order[ids]]).backward()
                optimizer.step()

    with pk.Recorder(store, model, optimizer, num_examples=96) as recorder:
        epochs(recorder, torch.arange(96))
        recorder.save()
    order = torch.arange(96).flip(0) if reordered else torch.arange(96)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pk.Recorder.resume(store, model, optimizer) as recorder:
            epochs(recorder, order)
    assert len([each for each in caught if "came back" in str(each.message)]) == reordered


def test_withdrawn_examples_leave_no_digest():
    model, steps, count = image_loop(normalised)
    store = pk.MemoryStore()
    complaints(model, steps, count, store)
    assert "7" in store.manifest().digests
    pk.withdraw(store, [7, 8])
    assert not {"7", "8"} & set(store.manifest().digests)
    assert "9" in store.manifest().digests


# What is compared.


def code(row, mask=None):
    return digest(without_padding(row, mask))


def test_a_digest_is_of_the_values_without_padding():
    row = torch.tensor([3.0, 0.0, -2.0])
    assert code(row) == code(torch.tensor([0.0, 3, -0.0, -2, 0, 0])) == code(row.double()) == code(row.half())
    assert code(torch.tensor([3, 0, -2])) == code(row)
    assert code(row) == code(torch.tensor([7.0, 3, 0, -2]), torch.tensor([0, 1, 1, 1]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert code(nans[:1]) == code(nans[1:])
    assert code(torch.zeros(4)).split()[1] == "0"
    image = torch.zeros(6, 6)
    image[1:3, 2:5] = torch.arange(1.0, 7).reshape(2, 3)
    assert code(image).split()[1] == "2x3"
    assert code(image) == code(image[:4, 1:])


def test_digests_differ_for_sure_only_at_one_shape_and_beyond_rounding():
    x = digits(2, torch.float32)[0]
    one, other = code(x[0]), code(x[1])
    assert differ(one, code(x[0] * 1.5))
    assert not differ(one, code(x[0] + 1e-4))
    assert not differ(one, code(x[0][:40]))
    assert not differ("0123456789abcdef", other)


def test_alike_values_are_equal_up_to_rounding_scale_and_offset():
    wine = flat_rows(real.load_wine)[0]
    assert alike(wine[0], wine[0] * 3 - 7)
    assert alike(wine[0], wine[0].bfloat16().float())
    others = [not alike(wine[0], row) for row in wine[1:]]
    assert sum(others) >= 0.99 * len(others)
    stamped = torch.cat([torch.full((178, 1), 1.6e9) + torch.arange(178.0)[:, None], wine], 1)
    assert not any(alike(stamped[0], row) for row in stamped[1:40])
    assert not alike(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))


@pytest.mark.parametrize("seed", range(4))
def test_features_are_alike_in_bfloat16_and_those_of_other_examples_are_not(seed):
    torch.manual_seed(seed)
    frozen = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 40), nn.ReLU(), nn.Linear(40, 40)
    )
    x = digits(120, torch.float32, image=True)[0]
    exact = frozen(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = frozen(x).detach().float()
    assert all(alike(a, b) for a, b in zip(exact, rounded, strict=True))
    assert not any(alike(a, b) for a, b in zip(exact, rounded.roll(1, 0), strict=True))


def test_padding_at_either_end_of_any_dimension_is_looked_past():
    x = digits(2, torch.float32)[0].reshape(2, 8, 8)[:, :, 1:7]
    for pads in [(0, 3), (2, 0), (0, 0, 0, 2), (1, 0, 2, 0)]:
        longer = nn.functional.pad(x[0], pads, value=-1.5)
        assert InputRow.of(x[0]).same_as(InputRow.of(longer))
        assert not InputRow.of(x[1]).same_as(InputRow.of(longer))


def test_the_distance_of_an_input_from_a_row_leaves_out_scale_and_offset():
    x = photographs()[0]
    scaled = (x - MEAN[:, None, None]) / SPREAD[:, None, None]
    assert distance(scaled[0], x[0]) < 1e-3 < 0.05 < distance(scaled[0], x[40])
    assert distance(-x[0], x[0]) == float("inf")


def test_what_a_row_holds_is_named():
    found = read_row([{"text": "né", "parts": (np.arange(3), [1.5, 2.5]), "nothing": None}], 0)
    assert {name: value.tolist() for name, value in found.items()} == {
        ".text": [110, 195, 169],
        ".parts.0": [0, 1, 2],
        ".parts.1": [1.5, 2.5],
    }

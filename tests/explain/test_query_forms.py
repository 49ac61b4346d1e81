"""Queries in the form users have them: each gives bit for bit the numbers of the same query as plain tensors."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import QueryError
from pkexplain.evaluation.retraining import Retraining
from pkexplain.explain import dense
from tests.conftest import batches, digits

EXAMPLES, LENGTH, WORDS, CLASSES = 24, 8, 11, 3


@dataclass
class Sentences:
    """What a model may take or return in one piece."""

    tokens: Tensor
    mask: Tensor
    source: str = "somewhere"


@dataclass(frozen=True)
class Answer:
    hidden: Tensor
    scores: Tensor


class Reader(nn.Module):
    """Reads sequences of any length, and weighs its states by a mask."""

    def __init__(self, recurrent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(WORDS, 6), nn.Linear(6, CLASSES)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.body = nn.LSTM(6, 6, batch_first=True) if recurrent else layer

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        states = self.body(self.words(tokens))
        states = states[0] if isinstance(states, tuple) else states
        mask = torch.ones_like(tokens) if mask is None else mask
        hidden = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.answer(hidden)

    def answer(self, hidden: Tensor) -> Any:
        return self.last(hidden)


class OfMapping(Reader):
    def forward(self, batch: Any) -> Any:
        return super().forward(batch["tokens"], batch["mask"])


class OfDataclass(Reader):
    def forward(self, batch: Sentences) -> Any:
        if batch.source != "somewhere":
            raise KeyError(batch.source)
        return super().forward(batch.tokens, batch.mask)


class OfAttributes(Reader):
    def forward(self, batch: Any) -> Any:
        return super().forward(batch.tokens, batch.mask)


class Attributes(UserDict):
    """A mapping with attributes, like the BatchEncoding of transformers."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


def sentences(count: int, length: int = LENGTH, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (count, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=generator)).long()
    return {"tokens": tokens, "mask": mask}


LABELS = torch.randint(0, CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(2))


def record(
    model: nn.Module,
    call: Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor],
    lengths: tuple[int, ...] = (LENGTH,),
    projection: pk.Projection | None = None,
) -> pk.Explainer:
    """Train a model on sentences of some lengths, with the scores that ``call`` takes from it, and explain it."""
    data = {length: sentences(EXAMPLES, length) for length in lengths}
    optimizer, store = torch.optim.SGD(model.parameters(), lr=0.2), pk.MemoryStore()
    projection = projection or pk.Identity()
    varied = len(lengths) > 1  # an example comes back cut to another length
    with pk.Recorder(
        store, model, optimizer, num_examples=EXAMPLES, projection=projection, augmented=varied
    ) as recorder:
        for step, ids in enumerate(batches(EXAMPLES, 8, 2)):
            batch = {name: value[ids] for name, value in data[lengths[step % len(lengths)]].items()}
            with recorder.step(ids):
                optimizer.zero_grad()
                F.cross_entropy(call(model, batch, LABELS[ids]), LABELS[ids]).backward()
                optimizer.step()
    return pk.Explainer(store, model)


def by_name(model, batch, labels):
    return model(**batch)


def by_position(model, batch, labels):
    return model(batch["tokens"], batch["mask"])


def mixed(model, batch, labels):
    return model(batch["tokens"], mask=batch["mask"])


def in_one(model, batch, labels):
    return model(batch)


def as_dataclass(model, batch, labels):
    return model(Sentences(**batch))


def with_attributes(model, batch, labels):
    return model(Attributes(batch))


@pytest.fixture(scope="module")
def named():
    return record(Reader(), by_name)


def same(explainer: pk.Explainer, query: Any, plain: Any, output: Any = None) -> None:
    """Check that a query gives the numbers of the same query as plain tensors."""
    expected = explainer.contributions(plain, output=output)
    assert np.abs(expected).max() > 0
    found = explainer.contributions(query, output=output)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


ROW = {name: value[0] for name, value in sentences(1, seed=5).items()}
BATCH = sentences(3, seed=5)
LISTS = {name: value.tolist() for name, value in ROW.items()}


@pytest.mark.parametrize(
    "query",
    [
        LISTS,
        {**LISTS, "label": 1, "text": "a text", "idx": 7},
        {name: np.array(value) for name, value in LISTS.items()},
        {"tokens": np.array(LISTS["tokens"], np.int32), "mask": [bool(m) for m in LISTS["mask"]]},
        {"text": ["a", "text"], "mask": tuple(LISTS["mask"]), "tokens": ROW["tokens"]},
        UserDict(LISTS),
        Attributes(LISTS),
        Sentences(LISTS["tokens"], LISTS["mask"]),  # pyright: ignore[reportArgumentType]
        (ROW["tokens"], LISTS["mask"]),
        {"0": ROW["tokens"], "mask": LISTS["mask"]},
    ],
    ids=lambda query: type(query).__name__,
)
def test_a_row_in_any_form(named, query):
    same(named, query, ROW)
    assert isinstance(named.explain(query), pk.Explanation)
    assert set(named.explain(query).query) == {"tokens", "mask"}


@pytest.mark.parametrize(
    "query",
    [
        {name: value.tolist() for name, value in BATCH.items()},
        {name: value.numpy() for name, value in BATCH.items()},
        {name: list(value) for name, value in BATCH.items()},
        {name: list(value.numpy()) for name, value in BATCH.items()},
        {**BATCH, "label": [0, 1, 2], "text": ["a", "b", "c"]},
        [{name: value[q] for name, value in BATCH.items()} for q in range(3)],
        [{name: value[q].tolist() for name, value in BATCH.items()} | {"label": q} for q in range(3)],
        [Sentences(BATCH["tokens"][q], BATCH["mask"][q]) for q in range(3)],
        [(BATCH["tokens"][q], BATCH["mask"][q].numpy()) for q in range(3)],
        (BATCH["tokens"].tolist(), BATCH["mask"]),
    ],
)
def test_a_batch_in_any_form(named, query):
    same(named, query, BATCH, pk.Logit([2, 0, 1]))
    assert len(named.explain(query)) == 3


@pytest.mark.parametrize("call", [by_name, by_position, mixed, in_one, as_dataclass, with_attributes])
def test_a_model_is_called_as_it_was_recorded(call, named):
    """All of them are the same function, so the numbers are those of the model that was called by name."""
    kinds = {in_one: OfMapping, as_dataclass: OfDataclass, with_attributes: OfAttributes}
    explainer = record(kinds.get(call, Reader)(), call)
    prefix = {by_name: ("tokens", "mask"), by_position: ("0", "1"), mixed: ("0", "mask")}
    recorded = set(explainer.trajectory.inputs)
    assert recorded == set(prefix.get(call, ("0.tokens", "0.mask"))) | ({"0.source"} & recorded)
    expected = named.contributions(BATCH)
    forms: list[Any] = [BATCH, [{name: value[q].tolist() for name, value in BATCH.items()} for q in range(3)]]
    if call is as_dataclass:
        forms = [Sentences(**BATCH), [Sentences(BATCH["tokens"][q], BATCH["mask"][q]) for q in range(3)]]
    if call is with_attributes:
        forms = [Attributes(BATCH), Attributes({**BATCH, "text": ["a", "b", "c"]})]
    if call in (by_position, mixed):
        forms += [(BATCH["tokens"], BATCH["mask"]), {"0": BATCH["tokens"], "mask": BATCH["mask"]}]
    if call is in_one:
        forms += [(BATCH,), {"batch": BATCH}, {**BATCH, "label": [0, 1, 2]}, UserDict(BATCH)]
    for form in forms:
        assert np.array_equal(explainer.contributions(form), expected), form
    first = explainer.explain(forms[0])[0].query
    if call in (in_one, with_attributes):
        assert all(set(shown.query) == {"tokens", "mask"} for form in forms for shown in explainer.explain(form))
    again = explainer.explain(first)
    assert isinstance(again, pk.Explanation)
    np.testing.assert_allclose(again.contributions, expected[0], rtol=1e-4, atol=1e-7)


def test_a_dataclass_is_left_as_it_was_given():
    explainer = record(OfDataclass(), as_dataclass)
    query = Sentences(**ROW)
    explanation = explainer.explain(query)
    assert query.tokens is ROW["tokens"]
    assert explanation.query.source == "somewhere"
    assert torch.equal(explanation.query.tokens, ROW["tokens"])
    with pytest.raises(QueryError, match=r"forward pass fails on it \(AttributeError: 'dict' object has no attribute"):
        explainer.explain(ROW)
    with pytest.raises(QueryError, match=r"forward pass fails on it \(KeyError: 'elsewhere'\)"):
        explainer.explain(replace(query, source="elsewhere"))


# ------------------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 5)])
def test_a_length_that_the_training_did_not_have(recurrent, lengths):
    """Against the dense path kernel, which shares no gradient code."""
    explainer = record(Reader(recurrent), by_name, lengths)
    assert explainer.trajectory.inputs["tokens"].shape == ((LENGTH,) if len(lengths) == 1 else (None,))
    query, output = sentences(2, 7, seed=9), pk.Logit(1)
    account = dense.path_kernel(store_of(explainer), explainer.copy_model(), query, output=output)
    found = explainer.contributions(query, output=output)
    np.testing.assert_allclose(found, account.contributions, atol=2e-3 * np.abs(account.contributions).max())
    same(explainer, {name: value.tolist() for name, value in query.items()}, query)


def store_of(explainer: pk.Explainer) -> Any:
    return explainer._open_runs._stores[0]


RAGGED = [{name: value[0].tolist() for name, value in sentences(1, n, seed=n).items()} for n in (5, 8, 5, 3, 8, 5)]


@pytest.mark.parametrize("form", ["rows", "lists", "columns of tensors"])
def test_queries_of_different_lengths_are_explained_by_length(named, form):
    """No padding: the numbers are those of each length asked for as a batch of tensors."""
    query: Any = RAGGED
    if form == "lists":
        query = {name: [row[name] for row in RAGGED] for name in RAGGED[0]}
    if form == "columns of tensors":
        query = {name: [torch.tensor(row[name]) for row in RAGGED] for name in RAGGED[0]}
    found = named.contributions(query, output=pk.Margin([0, 1, 2, 0, 1, 2]))
    explanations = named.explain(query, output=pk.Margin([0, 1, 2, 0, 1, 2]))
    assert [e.output for e in explanations] == [f"margin[{c}]" for c in (0, 1, 2, 0, 1, 2)]
    own = named.self_contributions(query, range(6), output=pk.Margin([0, 1, 2, 0, 1, 2]), reading="path")
    for members in ([0, 2, 5], [1, 4], [3]):
        plain = {name: torch.tensor([RAGGED[q][name] for q in members]) for name in RAGGED[0]}
        classes = [q % 3 for q in members]
        expected = named.contributions(plain, output=pk.Margin(classes))
        assert np.array_equal(found[members], expected)
        assert np.array_equal(np.stack([explanations[q].contributions for q in members]), expected)
        alone = named.self_contributions(plain, members, output=pk.Margin(classes), reading="path")
        assert np.array_equal(own[members], alone)
        assert [len(explanations[q].query["tokens"]) for q in members] == [len(RAGGED[q]["tokens"]) for q in members]


def test_lists_of_tokens_of_different_lengths():
    explainer = record(Reader(), lambda model, batch, labels: model(batch["tokens"]))
    tokens = [[1, 2, 3], [4, 5], [6, 7, 8]]
    found = explainer.contributions(tokens, output=pk.Loss([0, 1, 2]))
    assert np.array_equal(
        found[[0, 2]], explainer.contributions(torch.tensor([tokens[0], tokens[2]]), output=pk.Loss([0, 2]))
    )
    assert np.array_equal(found[1:2], explainer.contributions(torch.tensor(tokens[1:2]), output=pk.Loss(1)))
    assert np.array_equal(explainer.contributions([np.array(t) for t in tokens], output=pk.Loss([0, 1, 2])), found)
    assert np.array_equal(
        explainer.contributions({"tokens": tokens, "label": [0, 1, 2]}, output=pk.Loss([0, 1, 2])), found
    )
    account = dense.path_kernel(store_of(explainer), explainer.copy_model(), tokens, output=pk.Loss([0, 1, 2]))
    np.testing.assert_allclose(found, account.contributions, atol=2e-3 * np.abs(account.contributions).max())
    with pytest.raises(
        QueryError, match=r"there must be one of index for each query\. Got 2 for 3 queries; expected 3"
    ):
        explainer.explain(tokens, output=pk.Logit([0, 1]))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body, self.last = nn.Embedding(WORDS, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.body(self.words(tokens))[0])


def test_completions_of_prompts_of_different_lengths():
    data, model, store = sentences(EXAMPLES)["tokens"], Language(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Identity()) as recorder:
        for ids in batches(EXAMPLES, 8, 2):
            with recorder.step(ids):
                optimizer.zero_grad()
                F.cross_entropy(model(data[ids])[:, :-1].transpose(1, 2), data[ids][:, 1:]).backward()
                optimizer.step()
    explainer = pk.Explainer(store, model)
    prompts, answers = [[1, 2, 3, 4], [5, 6, 7], [7, 8, 9, 1]], [[3, 4], [6, 7], [9, 1]]
    for output, of in (
        (
            pk.TokenLogProbability(answers, start=[2, 1, 2]),
            lambda q: pk.TokenLogProbability(answers[q], start=[2, 1, 2][q]),
        ),
        (pk.TokenLogProbability([4, 4]), lambda q: pk.TokenLogProbability([4, 4])),
        (pk.TokenLogProbability([[4], [6, 7], [1]]), lambda q: pk.TokenLogProbability([[4], [6, 7], [1]][q])),
    ):
        found = explainer.contributions(prompts, output=output)
        for q, prompt in enumerate(prompts):
            alone = explainer.contributions(torch.tensor(prompt), output=of(q))[0]
            np.testing.assert_allclose(found[q], alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())


def test_a_size_that_the_model_does_not_take_is_refused_in_our_words(named):
    longer = {"tokens": ROW["tokens"], "mask": [1] * 5}
    got = r"forward pass fails on it \(RuntimeError: .*\)\. Got 'tokens' of shape \(8,\), 'mask' of shape \(5,\)"
    with pytest.raises(QueryError, match=got + r"; expected 'tokens' of shape \(8,\), 'mask' of shape \(8,\)"):
        named.explain(longer)
    with pytest.raises(QueryError, match=r"forward pass fails on it \(IndexError: index out of range in self\)"):
        named.explain({"tokens": [WORDS] * 4, "mask": [1] * 4})


# ------------------------------------------------------------------------------------------------------- wrong queries


@pytest.mark.parametrize(
    ("query", "match"),
    [
        ({"token": [1, 2], "mask": [1, 1]}, r"input 'token': no such input was seen .* Name it 'tokens'"),
        ({"x": [1, 2]}, r"input 'x': no such input .* Got 'x' next to tokens, mask; .* as in training: tokens, mask"),
        ({"tokens": "a text", "mask": [1]}, r"input 'tokens': it is not a tensor but a text.* Tokenise it"),
        ({"tokens": [1, None], "mask": [1, 1]}, r"input 'tokens': it is not a tensor\. Got list"),
        ({"tokens": [[[1]]], "mask": [1]}, r"input 'tokens': it has another shape\. Got shape \(1, 1, 1\)"),
        ({"tokens": [[1, [2]]], "mask": [1]}, r"input 'tokens': it is not a tensor"),
        ({"tokens": [], "mask": []}, r"input 'tokens': it holds nothing"),
        ({"tokens": [0.5, 1.0], "mask": [1, 1]}, r"input 'tokens': it has another dtype\. Got torch\.float32; .*int64"),
        ({"tokens": [1, 2], "mask": [[1, 1]]}, r"some inputs have a batch dimension and some do not"),
        ({"tokens": [[1, 2], [3, 4]], "mask": [[1, 1]]}, r"inputs hold different numbers of queries\. Got \[2, 1\]"),
        ([ROW, BATCH], r"it is in a list of queries, and has a batch dimension\. Got a batch of 3 as number 1 of the"),
        ([ROW, {}], r"there is none\. Got nothing"),
        ([BATCH["tokens"], LABELS[:3]], r"has a batch dimension.* the inputs alone"),
        ((ROW["tokens"], ROW["mask"], 1), r"input '2': no such input was seen while recording.*the inputs alone"),
        (["a", "b"], r"it is not a tensor but a text\. Got list"),
        (3.5, r"it has another dtype"),
        (object(), r"it is not a tensor\. Got object; .*a row such as dataset\[0\]"),
    ],
)  # fmt: skip
def test_what_to_do_is_said_of_a_query_that_does_not_fit(named, query, match):
    with pytest.raises(QueryError, match=match):
        named.explain(query)


def test_an_input_that_the_model_takes_and_the_training_did_not_use_is_refused():
    explainer = record(Reader(), lambda model, batch, labels: model(tokens=batch["tokens"]))
    with pytest.raises(
        QueryError, match=r"input 'mask': no such input was seen .* Got 'mask' next to tokens; .* Leave it"
    ):
        explainer.explain(ROW)
    same(explainer, ROW["tokens"], {"tokens": ROW["tokens"]})  # the only one needs no name
    same(explainer, {"tokens": ROW["tokens"], "mask": None}, {"tokens": ROW["tokens"]})


def test_numbers_without_a_dtype_take_the_recorded_one_and_no_other_is_changed(run):
    explainer = pk.Explainer(run.store, run.model)
    same(explainer, [1] * 64, torch.ones(64))
    same(explainer, {"input": [[0] * 64, [1] * 64]}, torch.stack([torch.zeros(64), torch.ones(64)]))
    readonly = run.queries[0].numpy().copy()
    readonly.setflags(write=False)
    same(explainer, readonly, run.queries[0])
    same(explainer, readonly[::-1], run.queries[0].flip(0))
    same(explainer, list(run.queries[:3]), run.queries[:3])
    same(explainer, list(run.queries[:3].numpy()), run.queries[:3])
    with pytest.raises(QueryError, match="another dtype"):
        explainer.explain(np.ones(64, np.int64))


def test_a_boolean_mask_is_read_from_whole_numbers():
    def masked(model, batch, labels):
        return model(batch["tokens"], batch["mask"].bool())

    explainer = record(Reader(), masked)
    plain = {"tokens": ROW["tokens"], "mask": ROW["mask"].bool()}
    same(explainer, ROW, plain)
    with pytest.raises(QueryError, match=r"its numbers do not fit in torch\.bool"):
        explainer.explain({**ROW, "mask": ROW["mask"] * 2})


# ------------------------------------------------------------------------------------------------------------- outputs


class Several(Reader):
    """Returns its hidden state beside the scores, in one of several ways."""

    def __init__(self, how: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.how = how

    def answer(self, hidden: Tensor) -> Any:
        return self.how(hidden, self.last(hidden))


@pytest.mark.parametrize(
    ("how", "scores", "path", "words"),
    [
        (lambda h, y: (h, y), lambda out: out[1], "1", "output[1]"),
        (lambda h, y: {"hidden": h, "y": y}, lambda out: out["y"], "y", "output.y"),
        (Answer, lambda out: out.scores, "scores", "output.scores"),
        (lambda h, y: {"heads": [h, y]}, lambda out: out["heads"][1], "heads.1", "output.heads[1]"),
    ],
)
def test_the_tensor_of_the_trainings_loss_is_explained_and_said(named, how, scores, path, words):
    explainer = record(Several(how), lambda model, batch, labels: scores(model(**batch)))
    assert explainer.trajectory.manifest.output == path
    expected = named.contributions(BATCH, output=pk.Margin(1))
    assert np.array_equal(explainer.contributions(BATCH, output=pk.Margin(1)), expected)
    assert np.array_equal(explainer.contributions(BATCH, output=pk.Margin(1, of=path)), expected)
    explanation = explainer.explain(ROW, output=pk.Margin(1))
    assert explanation.prediction == f"{words}, from which the training's loss was computed"
    assert f"prediction: {explanation.prediction}" in str(explanation)
    assert explainer.explain(ROW, output=pk.Margin(1, of=path)).prediction == f"{words}, as asked"
    other = path.replace("1", "0") if "1" in path else "hidden"
    hidden = explainer.explain(ROW, output=pk.Value(4, of=other))  # there are six hidden numbers, and three scores
    assert (hidden.output, hidden.prediction.split(",")[1]) == ("value[4]", " as asked")
    with pytest.raises(QueryError, match=r"has no tensor 'nothing' .* Got '(0|hidden|heads\.0)' of shape \(1, 6\), "):
        explainer.explain(ROW, output=pk.Logit(of="nothing"))
    assert named.explain(ROW).prediction == ""


def test_another_tensor_of_the_output_against_the_dense_path_kernel():
    explainer = record(Several(lambda h, y: (h, y)), lambda model, batch, labels: model(**batch)[1])
    account = dense.path_kernel(store_of(explainer), explainer.copy_model(), BATCH, output=pk.Value(2, of="0"))
    found = explainer.contributions(BATCH, output=pk.Value(2, of="0"))
    np.testing.assert_allclose(found, account.contributions, atol=5e-3 * np.abs(account.contributions).max())


def test_a_tuple_whose_layout_may_differ_is_not_guessed():
    class WithLoss(Reader):
        def forward(self, tokens, mask=None, labels=None):
            scores = super().forward(tokens, mask)
            hidden = scores.detach() * 2
            return (scores, hidden) if labels is None else (F.cross_entropy(scores, labels), scores, hidden)

    explainer = record(WithLoss(), lambda model, batch, labels: model(**batch, labels=labels)[1])
    assert explainer.trajectory.manifest.output == "1"
    with pytest.raises(QueryError, match=r"output\[1\], which may be another one: the query lacks an input"):
        explainer.explain(BATCH)
    found = explainer.contributions(BATCH, output=pk.Logit(0, of="0"))
    labelled = {**BATCH, "labels": [0, 1, 2]}
    assert np.array_equal(explainer.contributions(labelled, output=pk.Logit(0)), found)
    assert np.array_equal(explainer.contributions({**BATCH, "label": [0, 1, 2]}, output=pk.Logit(0)), found)


# -------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rows_of_a_data_set_for_a_classifier_of_transformers():
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=WORDS, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    data = sentences(EXAMPLES)
    columns = {"input_ids": data["tokens"].tolist(), "attention_mask": data["mask"].tolist(), "label": LABELS.tolist()}
    rows = datasets.Dataset.from_dict({**columns, "text": ["a text"] * EXAMPLES})
    optimizer, store = torch.optim.AdamW(model.parameters(), lr=1e-2), pk.MemoryStore()
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Identity()) as recorder:
        for ids in batches(EXAMPLES, 8, 2):
            batch = {"input_ids": data["tokens"][ids], "attention_mask": data["mask"][ids], "labels": LABELS[ids]}
            with recorder.step(ids):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
    explainer = pk.Explainer(store, model)
    plain = {"input_ids": data["tokens"][:2], "attention_mask": data["mask"][:2]}
    same(explainer, rows[:2], plain, pk.Margin(1))
    same(explainer, [rows[0], rows[1]], plain, pk.Margin(1))
    same(explainer, rows[0], {name: value[0] for name, value in plain.items()}, pk.Margin(1))
    same(explainer, transformers.BatchEncoding(plain), plain, pk.Margin(1))
    same(explainer, rows.with_format("numpy")[:2], plain, pk.Margin(1))
    same(explainer, rows.with_format("torch")[:2], plain, pk.Margin(1))
    same(explainer, {**plain, "labels": LABELS[:2]}, plain, pk.Margin(1))
    explanation = explainer.explain(rows[0], output=pk.Margin(1))
    assert explanation.prediction == "output.logits, from which the training's loss was computed"
    shorter = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    found = explainer.contributions(shorter, output=pk.Margin(1))
    for q, row in enumerate(shorter):
        one = explainer.contributions({"input_ids": torch.tensor([row["input_ids"]])}, output=pk.Margin(1))
        assert np.array_equal(found[q : q + 1], one)
    with pytest.raises(QueryError, match=r"'token_type_ids': no such input was seen while recording.*Leave it out"):
        explainer.explain({**plain, "token_type_ids": torch.zeros(2, LENGTH, dtype=torch.long)})
    with pytest.raises(QueryError, match="it is not a tensor but a text"):
        explainer.explain("a text")


def test_images_of_another_size_where_the_model_takes_them(run):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    inputs, targets = digits(EXAMPLES, torch.float32, image=True)
    optimizer, store = torch.optim.SGD(model.parameters(), lr=0.1), pk.MemoryStore()
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=pk.Identity()) as recorder:
        for ids in batches(EXAMPLES, 8, 2):
            with recorder.step(ids):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                optimizer.step()
    explainer = pk.Explainer(store, model)
    wide = F.pad(inputs[:2], (0, 3, 0, 1))
    account = dense.path_kernel(store, model, wide, output=pk.Logit(1), pieces=32)
    found = explainer.contributions(wide, output=pk.Logit(1))
    np.testing.assert_allclose(found, account.contributions, atol=2e-2 * np.abs(account.contributions).max())
    mixed = [wide[0], inputs[0], wide[1]]
    assert np.array_equal(explainer.contributions(mixed, output=pk.Logit(1))[[0, 2]], found)
    with pytest.raises(QueryError, match=r"forward pass fails on it .*expected input.* to have 1 channels, but got 3"):
        explainer.explain(torch.zeros(3, 8, 8))
    with pytest.raises(QueryError, match=r"it has another shape\. Got shape \(8, 8\)"):
        explainer.explain(torch.zeros(8, 8))


def test_retrained_models_are_asked_in_the_same_forms():
    def retrain(ids, seed):
        torch.manual_seed(seed)
        model = Several(lambda h, y: (h, y))
        nn.init.normal_(model.last.weight)
        return model

    model = retrain(None, 3).eval()
    with torch.no_grad():
        expected = model(**BATCH)[1].log_softmax(1)[:, 1].double().numpy()
    for queries in (BATCH, [{name: value[q] for name, value in BATCH.items()} for q in range(3)]):
        asked = Retraining(retrain, queries, output=pk.LogProbability(1, of="1"), num_examples=EXAMPLES)
        np.testing.assert_allclose(asked.ask(np.arange(5), 3).outputs, expected, rtol=1e-6)
    with pytest.raises(QueryError, match=r"which is the prediction is not known.*Logit\(of=\"1\"\)"):
        Retraining(retrain, BATCH, output=pk.Logit(1), num_examples=EXAMPLES).ask(np.arange(5), 3)
    with pytest.raises(QueryError, match=r"they differ in their shapes\. Got 3 different shapes; expected one"):
        Retraining(retrain, RAGGED, output=pk.Logit(1, of="1"), num_examples=EXAMPLES)

"""Explanations as tables: pandas frames and Hugging Face data sets."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import pkexplain as pk
from pkexplain.errors import ConfigurationError
from tests.explanations import make_explanation

COUNT = 60


@pytest.fixture
def explanation():
    return make_explanation(num_examples=COUNT, k=4)


def hugging(**columns):
    names = datasets.ClassLabel(names=["ham", "spam"])
    content = {"text": [f"text {i}" for i in range(COUNT)], "label": [i % 2 for i in range(COUNT)], **columns}
    features = {name: datasets.Dataset.from_dict({name: values}).features[name] for name, values in columns.items()}
    features = datasets.Features({"text": datasets.Value("string"), "label": names, **features})
    return datasets.Dataset.from_dict(content, features=features)


def test_a_row_for_every_example_by_id(explanation):
    table = explanation.to_pandas()
    assert list(table.columns) == ["id", "contribution", "weight", "kernel"]
    assert table["id"].tolist() == list(range(COUNT))
    np.testing.assert_array_equal(table["contribution"], explanation.contributions)
    shown = {c.id: c for c in (*explanation.proponents, *explanation.opponents)}
    for row in table.itertuples():
        if row.id in shown:
            assert (row.weight, row.kernel) == (shown[row.id].weight, shown[row.id].kernel)
        else:
            assert np.isnan(row.weight)
            assert np.isnan(row.kernel)


def test_the_k_strongest_come_largest_first_in_either_direction(explanation):
    table = explanation.to_pandas(k=5)
    by_size = sorted(range(COUNT), key=lambda i: -abs(float(explanation.contributions[i])))
    assert table["id"].tolist() == by_size[:5]
    assert {np.sign(c) for c in table["contribution"]} == {-1.0, 1.0}
    assert len(explanation.to_pandas(k=1000)) == COUNT


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_a_k_that_is_no_number_of_examples_is_refused(explanation, k):
    with pytest.raises(ConfigurationError, match=r"^Explanation\.to_pandas\(k\): it is invalid\. Got "):
        explanation.to_pandas(k=k)
    with pytest.raises(ConfigurationError, match=r"^Explanation\.to_dataset\(k\): it is invalid\. Got "):
        explanation.to_dataset(["text"] * COUNT, k=k)


def test_columns_of_a_hugging_face_data_set(explanation):
    data = hugging(id=[f"name-{i}" for i in range(COUNT)], pixels=[[0.0, 1.0]] * COUNT)
    for dataset in (data, data.with_format("torch")):
        table = explanation.to_pandas(dataset, k=7)
        assert list(table.columns) == ["id", "contribution", "weight", "kernel", "text", "label", "data_id"]
        assert table["text"].tolist() == [f"text {i}" for i in table["id"]]
        assert table["label"].tolist() == [i % 2 for i in table["id"]]
        assert table["data_id"].tolist() == [f"name-{i}" for i in table["id"]]


@pytest.mark.parametrize("kind", ["tuples", "tensors", "with ids", "mappings", "texts", "numbers"])
def test_columns_of_other_data_sets_are_numbers_and_texts_only(explanation, kind):
    x, y = torch.rand(COUNT, 1, 4, 4), torch.arange(COUNT) % 3
    dataset, wanted = {
        "tuples": ([(x[i], y[i]) for i in range(COUNT)], {"label": y}),
        "tensors": (TensorDataset(x, y), {"label": y}),
        "with ids": ([(i, x[i], y[i]) for i in range(COUNT)], {"label": y}),
        "mappings": ([{"n": i, "image": x[i], "y": y[i].item()} for i in range(COUNT)], {"n": range(COUNT), "y": y}),
        "texts": ([(f"text {i}", 0.5 * i) for i in range(COUNT)],
                  {"text": [f"text {i}" for i in range(COUNT)], "label": [0.5 * i for i in range(COUNT)]}),
        "numbers": ([torch.tensor(float(i)) for i in range(COUNT)], {"x": [float(i) for i in range(COUNT)]}),
    }[kind]  # fmt: skip
    table = explanation.to_pandas(dataset)
    assert list(table.columns) == ["id", "contribution", "weight", "kernel", *wanted]
    for name, values in wanted.items():
        assert table[name].tolist() == [getattr(v, "item", lambda v=v: v)() for v in values]


def test_only_the_rows_that_are_shown_are_read(explanation):
    read = []

    class Watched:
        def __len__(self):
            return COUNT

        def __getitem__(self, i):
            read.append(i)
            return f"text {i}", i % 2

    table = explanation.to_pandas(Watched(), k=3)
    assert sorted(read) == sorted(table["id"])


def test_another_data_set_is_refused(explanation):
    for call, name in ((explanation.to_pandas, "to_pandas"), (explanation.to_dataset, "to_dataset")):
        match = rf"^Explanation\.{name}\(dataset\): the data set is not the one .* Got 3 examples; expected 60"
        with pytest.raises(ConfigurationError, match=match):
            call(["a", "b", "c"])
        with pytest.raises(ConfigurationError, match="readable by row number"):
            call(x for x in "ab")


def test_a_data_set_keeps_its_columns_and_gets_ours(explanation):
    pictures = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(COUNT)]
    data = hugging(image=pictures, contribution=list(range(COUNT)))
    found = explanation.to_dataset(data, k=6)
    assert isinstance(found, datasets.Dataset)
    assert set(found.column_names) == {
        "text", "label", "image", "data_contribution", "id", "contribution", "weight", "kernel",
    }  # fmt: skip
    assert found.features["label"].names == ["ham", "spam"]
    table = explanation.to_pandas(k=6)
    assert found["id"][:] == table["id"].tolist()
    np.testing.assert_array_equal(found["contribution"][:], table["contribution"])
    np.testing.assert_array_equal(found["weight"][:], table["weight"])
    for row in found:
        assert row["text"] == f"text {row['id']}"
        assert row["data_contribution"] == row["id"]
        assert np.asarray(row["image"]).max() == row["id"]
    assert len(explanation.to_dataset(data)) == COUNT
    assert "contribution" in data.column_names
    assert len(data.column_names) == 4  # the user's own is not changed


def test_a_torch_data_set_becomes_columns(explanation):
    x, y = torch.rand(COUNT, 1, 4, 4), torch.arange(COUNT) % 3
    found = explanation.to_dataset(TensorDataset(x, y), k=5)
    assert found.column_names == ["x", "label", "id", "contribution", "weight", "kernel"]
    for row in found:
        np.testing.assert_allclose(np.asarray(row["x"]), x[row["id"]].numpy())
        assert row["label"] == int(y[row["id"]])
    texts = explanation.to_dataset([(f"text {i}", i % 2) for i in range(COUNT)])
    assert texts.column_names == ["text", "label", "id", "contribution", "weight", "kernel"]
    assert texts["text"][:3] == ["text 0", "text 1", "text 2"]


def test_a_table_of_several_explanations(explanation):
    other = make_explanation(num_examples=COUNT, seed=1, output="logit[5]")
    table = pk.Explanations([explanation, other]).to_pandas([f"text {i}" for i in range(COUNT)], k=2)
    assert list(table.columns) == ["query", "output", "id", "contribution", "weight", "kernel", "text"]
    assert table["query"].tolist() == [0, 0, 1, 1]
    assert table["output"].tolist() == ["logit[3]"] * 2 + ["logit[5]"] * 2
    pd.testing.assert_series_equal(table["id"][2:].reset_index(drop=True), other.to_pandas(k=2)["id"])
    assert list(pk.Explanations().to_pandas().columns) == ["query", "output", "id", "contribution", "weight", "kernel"]
    assert len(pk.Explanations().to_pandas()) == 0

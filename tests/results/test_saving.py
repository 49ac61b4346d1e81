"""A saved explanation: what comes back is what was saved, and nothing else is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ExplanationFileError
from pkexplain.results import saving
from pkexplain.results.report import write_report
from tests.explanations import make_explanation

NOTES = ("The run was interrupted by KeyboardInterrupt; the model is explained as it was after step 60.",)


@pytest.fixture
def explanation():
    return dataclasses.replace(make_explanation(k=3), notes=NOTES, run_segments=9)


def same(one, other):
    """Compare everything, also what ``==`` leaves out; nan equals nan."""
    for field in dataclasses.fields(pk.Explanation):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "query":
            same_data(mine, theirs)
        elif field.name == "all_contributions":
            np.testing.assert_array_equal(mine, np.asarray(theirs), strict=True)
        else:
            assert repr(mine) == repr(theirs), field.name


def same_data(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        for mine, theirs in zip(one, other, strict=True):
            same_data(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    else:
        np.testing.assert_array_equal(one, other)


def rewrite(path, change):
    """Change a file's metadata and tensors, and give it the checksum that belongs to them."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    change(metadata, content, tensors)
    metadata["content"] = json.dumps(content)
    metadata["sha256"] = saving._digest(metadata["content"], tensors)
    save_file(tensors, path, metadata)


def test_what_comes_back_is_what_was_saved(explanation, tmp_path):
    path = explanation.save(tmp_path / "new" / "why.pkx")
    assert path == tmp_path / "new" / "why.pkx"
    again = pk.Explanation.load(path)
    assert again == explanation
    same(again, explanation)
    assert str(again) == str(explanation)
    assert again._repr_html_() == explanation._repr_html_()
    one, other = (write_report(e, tmp_path / f"{i}.html") for i, e in enumerate((explanation, again)))
    assert one.read_bytes() == other.read_bytes()


def test_numbers_that_json_does_not_know_come_back(explanation, tmp_path):
    odd = dataclasses.replace(explanation.proponents[0], weight=math.nan, kernel=-math.inf, segments=(5e-324, -0.0) * 3)
    checks = (dataclasses.replace(explanation.checks[0], value=math.nan),)
    changed = dataclasses.replace(explanation, proponents=(odd,), checks=checks)
    same(pk.Explanation.load(changed.save(tmp_path / "e")), changed)


@pytest.mark.parametrize(
    "query",
    [
        None,
        "a text",
        torch.arange(6).reshape(2, 3),
        torch.rand(4, 4)[:, ::2],
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16).float(),
        np.arange(6.0).reshape(2, 3)[:, ::-1],
        (torch.zeros(2), {"ids": torch.arange(3), "text": "so"}, [1, 2.5, True, None]),
        {"input_ids": torch.arange(3), "attention_mask": torch.ones(3, dtype=torch.bool)},
    ],
    ids=["none", "text", "tensor", "view", "nan", "array", "nested", "mapping"],
)
def test_queries_of_every_kind_come_back(explanation, query, tmp_path):
    asked = dataclasses.replace(explanation, query=query)
    same(pk.Explanation.load(asked.save(tmp_path / "e")), asked)


def test_a_query_that_is_no_data_is_refused_and_nothing_is_written(explanation, tmp_path):
    match = r"^Explanation\.save: its query cannot be saved\. Got object; .*dataclasses\.replace"
    with pytest.raises(ConfigurationError, match=match):
        dataclasses.replace(explanation, query=object()).save(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_real_explanation_comes_back_without_its_run(run, tmp_path):
    explainer = pk.Explainer(run.store, run.model)
    explanations = explainer.explain(run.queries[:3], k=4)
    again = pk.Explanations.load(explanations.save(tmp_path / "three"))
    assert isinstance(again, pk.Explanations)
    assert again == explanations
    for one, other in zip(again, explanations, strict=True):
        same(one, other)
        np.testing.assert_array_equal(one.contributions, other.contributions)
    data = [(x.numpy(), int(y)) for x, y in zip(run.inputs[:240], run.targets[:240], strict=True)]
    pages = [write_report(e, tmp_path / f"{i}.html", dataset=data) for i, e in enumerate((explanations, again))]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    alone = explanations[1].save(tmp_path / "one")
    assert pk.Explanations.load(alone) == explanations[1:2]
    with pytest.raises(ExplanationFileError, match=r"Got 3 explanations; expected 1 .*pkexplain\.Explanations\.load"):
        pk.Explanation.load(tmp_path / "three")
    assert pk.Explanations.load(pk.Explanations().save(tmp_path / "none")) == []


def test_explanations_and_lists_of_them_can_be_pickled(explanation):
    everyone = pk.Explanations([explanation, explanation])
    again = pickle.loads(pickle.dumps(everyone))
    assert type(again) is pk.Explanations
    assert again == everyone
    same(again[1], explanation)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_file_has_the_permissions_of_the_run(explanation, tmp_path):
    path = dataclasses.replace(explanation, mode=0o600).save(tmp_path / "e")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert pk.Explanation.load(path).mode == 0o600
    modes = pk.Explanations([dataclasses.replace(explanation, mode=m) for m in (0o640, 0o604)])
    assert stat.S_IMODE(modes.save(tmp_path / "both").stat().st_mode) == 0o600


def test_other_files_are_refused_by_name(explanation, tmp_path):
    path = tmp_path / "e"
    for content in (b"", b"{}", b"\x80\x04K*.", pickle.dumps(explanation)):
        path.write_bytes(content)
        with pytest.raises(
            ExplanationFileError, match=r"loading .*e: it is not a saved explanation\. Got .*save wrote\.$"
        ):
            pk.Explanation.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"0.contributions": torch.zeros(3)}, path, metadata)
        with pytest.raises(ExplanationFileError, match="Got another safetensors file"):
            pk.Explanation.load(path)
    with pytest.raises(FileNotFoundError):
        pk.Explanation.load(tmp_path / "nowhere")


def test_another_version_is_refused_by_name(explanation, tmp_path):
    path = explanation.save(tmp_path / "e")
    rewrite(path, lambda metadata, *_: metadata.update(version="2"))
    match = r"it is of another version\. Got version 2; expected version 1 .* Load it with the pkexplain that saved it"
    with pytest.raises(ExplanationFileError, match=match):
        pk.Explanation.load(path)


def test_every_altered_byte_is_found(explanation, tmp_path):
    path = explanation.save(tmp_path / "e")
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        altered = bytearray(whole)
        altered[place] ^= 0x11
        path.write_bytes(altered)
        with pytest.raises(ExplanationFileError):
            pk.Explanation.load(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(ExplanationFileError):
        pk.Explanation.load(path)


def _no_contributions(metadata, content, tensors):
    del tensors["0.contributions"]


CHANGES = {
    "type": lambda metadata, content, tensors: content[0]["ledger"].update(initial="much"),
    "unknown": lambda metadata, content, tensors: content[0].update(extra=1),
    "missing": lambda metadata, content, tensors: content[0].pop("checks"),
    "id": lambda metadata, content, tensors: content[0]["proponents"][0].update(id=200),
    "segments": lambda metadata, content, tensors: content[0]["boundaries"].pop(),
    "query": lambda metadata, content, tensors: content[0].update(query=["pickle", "x"]),
    "tensor": lambda metadata, content, tensors: content[0].update(query=["tensor", "nowhere"]),
    "plain": lambda metadata, content, tensors: content[0].update(query=["plain", {}]),
    "shape": lambda metadata, content, tensors: tensors.update({"0.contributions": torch.zeros(20, 10)}),
    "dtype": lambda metadata, content, tensors: tensors.update({"0.contributions": torch.zeros(200, dtype=torch.int8)}),
    "contributions": _no_contributions,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_whose_parts_do_not_agree_is_refused(explanation, change, tmp_path):
    path = explanation.save(tmp_path / "e")
    rewrite(path, change)
    with pytest.raises(ExplanationFileError, match="it does not hold explanations"):
        pk.Explanation.load(path)


def test_a_failed_save_leaves_the_old_file(explanation, tmp_path, monkeypatch):
    path = explanation.save(tmp_path / "e")
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(explanation, output="another").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

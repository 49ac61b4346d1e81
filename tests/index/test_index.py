"""Search over the rows of real runs, against a plain sort of the full matrix; indices that are kept; the command."""

from __future__ import annotations

import ctypes
import json
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pkexplain as pk
from pkexplain.cli import app
from pkexplain.errors import ConfigurationError, MissingDependencyError
from pkexplain.index import exact as search
from pkexplain.index import faiss_index as compressed
from pkexplain.index.benchmark import combine_rows, compare_indices
from pkexplain.index.exact import ExactSearch, RunRows
from pkexplain.index.row_index import RowIndex, choose_factory
from pkexplain.store.directory import DirectoryStore
from tests.conftest import user_run
from tests.trainings import killed_at_random

FACTORIES = [
    "SQ8",
    "SQfp16",
    "PCA64,SQ8",
    "PCA64,PQ32",
    "PCA64,OPQ16,PQ32",
    "IVF16,Flat",
    "IVF16,SQ8",
    "PCA64,IVF16,SQ8",
    "PCA64,IVF16,PQ32x8",
    "HNSW32",
    "PCA64,HNSW32",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory of the user's key, for one test."""
    monkeypatch.setenv("PKEXPLAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def large():
    return user_run(pk.MemoryStore(), epochs=2, examples=1700).store.trajectory()


def matrix(trajectory) -> np.ndarray:
    """All rows in float64, by plain reading."""
    everyone = torch.arange(trajectory.num_examples)
    parts = [trajectory.segment(t).read_rows(everyone, torch.float64) for t in range(len(trajectory))]
    return torch.cat(parts, dim=1).numpy()


def queries_of(rows: np.ndarray, count: int = 30, seed: int = 0) -> np.ndarray:
    """Random sums of rows of length one, as a covector points where gradients do."""
    weights = np.random.default_rng(seed).standard_normal((count, len(rows)))
    return (weights @ (rows / np.linalg.norm(rows, axis=1, keepdims=True))).astype(np.float32)


def sort_all(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ rows.T), axis=1)[:, :k]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.isin(true, ids).mean() for true, ids in zip(truth, found, strict=True)]))


# ------------------------------------------------------------------------------------------------------ exact search


@pytest.mark.parametrize("budget", [1 << 30, 1 << 20, 1 << 16, 1])
def test_exact_search_is_the_sort_of_the_full_matrix_however_small_the_blocks(large, monkeypatch, budget):
    monkeypatch.setattr(search, "MEMORY_BUDGET", budget if budget > 1 else 200_000)
    rows = matrix(large)
    queries = queries_of(rows)
    found = ExactSearch(RunRows(large)).search(queries, 20)
    assert (found == sort_all(rows, queries, 20)).all()


def test_exact_search_finds_what_faiss_finds_in_a_copy_of_the_rows(large):
    import faiss

    rows = matrix(large)
    queries = queries_of(rows, seed=1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.astype(np.float32))
    assert (ExactSearch(RunRows(large)).search(queries, 20) == index.search(queries, 20)[1]).all()


def test_blocks_cover_every_row_once_and_fit_the_budget(large, monkeypatch):
    rows = RunRows(large)
    monkeypatch.setattr(search, "MEMORY_BUDGET", 1 << 20)
    blocks = list(rows.blocks(numbers_per_row=60))
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(1700))
    assert len(blocks) > 1
    assert all(4 * (block.stop - block.start) * (rows.dimension + 60) <= 1 << 20 for block in blocks)


def test_more_rows_are_asked_for_than_there_are(run):
    trajectory = run.store.trajectory()
    rows = matrix(trajectory)
    queries = queries_of(rows, 3)
    for factory in ("Flat", "SQ8"):
        index = RowIndex(trajectory, factory)
        assert {tuple(sorted(ids)) for ids in index.search(queries, 500).tolist()} == {tuple(range(240))}
        ids, scores = index.rows.rank(queries, index.propose(queries, 200), 300)
        assert (ids[:, :240] == sort_all(rows, queries, 240)).all()
        assert (ids[:, 240:] == -1).all()
        assert np.isneginf(scores[:, 240:]).all()


@pytest.mark.gpu
def test_exact_search_on_a_gpu_finds_the_same(large):
    rows = matrix(large)
    queries = queries_of(rows)
    assert (ExactSearch(RunRows(large), "cuda").search(queries, 20) == sort_all(rows, queries, 20)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["PCA64,IVF16,SQ8", "SQ8", "HNSW32"])
def test_a_compressed_index_on_a_gpu_finds_what_it_finds_on_the_cpu(large, factory):
    rows = matrix(large)
    queries = queries_of(rows)
    found = [RowIndex(large, factory, device=device).search(queries, 50) for device in ("cpu", "cuda")]
    assert recall(found[1], found[0]) > 0.99


def test_without_faiss_search_is_exact(large, monkeypatch):
    rows = matrix(large)
    queries = queries_of(rows)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for factory in ("Flat", "auto"):
        assert (RowIndex(large, factory).search(queries, 10) == sort_all(rows, queries, 10)).all()
    with pytest.raises(MissingDependencyError, match=r"faiss does not load .*pip install 'pkexplain\[cpu\]'.*\"Flat\""):
        RowIndex(large, "SQ8")


# ------------------------------------------------------------------------------------------------- compressed search


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_a_compressed_index_proposes_holds_both_ends_of_the_ranking(large, factory):
    rows = matrix(large)
    queries = queries_of(rows)
    index = RowIndex(large, factory)
    proposed = index.propose(queries, 10)
    for sign in (1, -1):
        found, scores = index.rows.rank(sign * queries, proposed, 10)
        truth = sort_all(rows, sign * queries, 10)
        assert recall(found, truth) >= 0.95
        expected = np.take_along_axis(sign * queries @ rows.T, found, axis=1)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("factory", ["SQ8", "PCA64,IVF16,SQ8", "IVF16,PQ8"])
def test_what_an_index_finds_does_not_depend_on_the_size_of_the_blocks(large, factory, monkeypatch):
    """Its proposals may: directions and cells are trained with sums that round by block size and by processor.

    What is promised is what is shown: proposals are ranked by the stored rows, and the best are among them.
    """
    rows = matrix(large)
    queries, told = queries_of(rows), []
    truth = sort_all(rows, queries, 10)
    whole = RowIndex(large, factory)
    assert recall(whole.rows.rank(queries, whole.propose(queries, 10), 10)[0], truth) >= 0.98
    monkeypatch.setattr(search, "MEMORY_BUDGET", 4 << 20)
    index = RowIndex(large, factory)
    index.prepare(lambda what, done, total: told.append((done, total)))
    assert len(told) > 3
    assert told[-1] == (1700, 1700)
    assert recall(index.rows.rank(queries, index.propose(queries, 10), 10)[0], truth) >= 0.98
    if factory == "SQ8":  # nothing is trained
        assert (index.search(queries, 10) == whole.search(queries, 10)).all()


def test_a_small_budget_trains_on_fewer_rows_and_still_finds(large, monkeypatch):
    rows = matrix(large)
    queries = queries_of(rows)
    monkeypatch.setattr(compressed, "MEMORY_BUDGET", 16 * rows.shape[1] * 400)
    index = RowIndex(large, "PCA64,IVF16,SQ8")
    assert recall(index.rows.rank(queries, index.propose(queries, 10), 10)[0], sort_all(rows, queries, 10)) >= 0.95


def test_principal_directions_are_of_the_second_moment(large):
    rows = matrix(large)
    _, _, directions = np.linalg.svd(rows, full_matrices=False)
    expected = rows @ directions[:32].T @ directions[:32]
    found = RowIndex(large, "PCA32,Flat").reconstruct(np.arange(1700))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(rows)
    lost = np.linalg.norm(found - rows), np.linalg.norm(expected - rows)
    assert lost[0] == pytest.approx(lost[1], rel=1e-3)


@pytest.mark.parametrize(("factory", "most"), [("Flat", 1e-6), ("SQ8", 0.02), ("IVF16,SQ8", 0.02), ("HNSW16", 1e-6)])
def test_rows_come_back_from_an_index_in_the_units_they_are_stored_in(large, factory, most):
    rows = matrix(large)
    queries = queries_of(rows)
    index, errors = RowIndex(large, factory), []
    for query, ids in zip(queries, sort_all(rows, queries, 10), strict=True):
        exact = rows[ids] @ query
        errors += list(np.abs(index.reconstruct(ids) @ query - exact) / np.abs(exact))
    assert np.median(errors) < most


@pytest.mark.parametrize("factory", ["Nonsense", "", "IVF,Flat"])
def test_a_factory_string_that_faiss_refuses(run, factory):
    with pytest.raises(ConfigurationError, match=r"faiss refuses this factory string\. .* Use index=\"Flat\""):
        RowIndex(run.store.trajectory(), factory)


def test_the_choice_grows_with_the_run():
    assert choose_factory(4_500, 24_576) == "Flat"
    assert choose_factory(60_000, 2_048) == "Flat"
    assert choose_factory(100_000, 2_048) == "PCA256,IVF256,SQ8"
    assert choose_factory(1_000_000, 2_048) == "PCA256,IVF1024,SQ8"
    assert choose_factory(1_000_000, 200) == "IVF1024,SQ8"
    assert choose_factory(10**9, 2_048) == "PCA256,IVF4096,SQ8"
    assert choose_factory(1_000, 200_000) == "PCA256,SQ8"  # too few rows for cells


# ------------------------------------------------------------------------------------------------------ kept indices


def kept(run) -> tuple[Path, Path]:
    (file,) = (run.store / "index").glob("*.faiss")
    return file, file.with_suffix(".json")


def prepare(run, factory="IVF4,SQ8") -> RowIndex:
    store = DirectoryStore(run.store)
    index = RowIndex(store.trajectory(), factory, store.path / "index", store=store)
    index.prepare()
    return index


def built_again(run, index_file: Path) -> bool:
    """Whether preparing the index writes it once more."""
    before = index_file.stat().st_ino
    prepare(run)
    return index_file.stat().st_ino != before


def test_an_index_is_read_again_by_the_user_who_made_it(disk_run, cache):
    queries = queries_of(matrix(DirectoryStore(disk_run.store).trajectory()))
    found = prepare(disk_run).search(queries, 10)
    assert sorted(json.loads(kept(disk_run)[1].read_text())) == [
        "bytes",
        "factory",
        "hmac",
        "radii",
        "sha256",
        "state",
    ]
    assert not built_again(disk_run, kept(disk_run)[0])
    assert (prepare(disk_run).search(queries, 10) == found).all()
    key = cache / "index.key"
    assert len(key.read_bytes()) == 32
    if os.name == "posix":
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not list(cache.glob("*.tmp"))


def test_an_index_that_another_user_made_is_built_again(disk_run, monkeypatch, tmp_path):
    prepare(disk_run)
    monkeypatch.setenv("PKEXPLAIN_CACHE", str(tmp_path / "another"))
    assert built_again(disk_run, kept(disk_run)[0])
    assert not built_again(disk_run, kept(disk_run)[0])


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("damage", ["readable by others", "short", "missing"])
def test_a_key_that_is_not_secret_or_whole_signs_nothing(disk_run, cache, damage):
    prepare(disk_run)
    key = cache / "index.key"
    old = key.read_bytes()
    if damage == "readable by others":
        key.chmod(0o644)
    if damage == "short":
        key.write_bytes(old[:7])
    if damage == "missing":
        key.unlink()
    assert built_again(disk_run, kept(disk_run)[0])
    assert key.read_bytes() != old
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["index", "radii", "factory", "signature", "no signature", "not JSON", "list"])
def test_whatever_the_key_did_not_sign_is_built_again(disk_run, damage):
    prepare(disk_run)
    file, description = kept(disk_run)
    content, told = file.read_bytes(), json.loads(description.read_text())
    if damage == "index":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    if damage == "radii":
        told["radii"][0] += 1.0
    if damage == "factory":
        told["factory"] = "SQ8"
    if damage == "signature":
        told["hmac"] = "0" * 64
    if damage == "no signature":
        del told["hmac"]
    written = {"not JSON": "{", "list": "[]"}.get(damage, json.dumps(told))
    description.write_text(written)
    assert built_again(disk_run, file)
    assert file.read_bytes() == content
    assert not built_again(disk_run, file)


def test_what_a_killed_build_left_is_removed_at_the_next(disk_run):
    directory = disk_run.store / "index"
    directory.mkdir()
    half = "0123456789abcdef-0123456789abcdef.faiss"
    left = [directory / f"{half}.{'7' * 32}.tmp", directory / half]
    for file in left:
        file.write_bytes(b"half an index")
    prepare(disk_run)
    assert {file.name for file in directory.iterdir()} == {file.name for file in kept(disk_run)}


def test_a_directory_that_cannot_be_written_to_leaves_the_index_in_memory(disk_run):
    (disk_run.store / "index").write_text("in the way")
    index = prepare(disk_run)
    assert index.kept_bytes == 0
    assert index.search(queries_of(matrix(DirectoryStore(disk_run.store).trajectory())), 5).shape == (30, 5)


def test_no_place_for_a_key_leaves_the_index_in_memory(disk_run, cache):
    cache.write_text("in the way")
    assert prepare(disk_run).kept_bytes == 0
    assert not list((disk_run.store / "index").glob("*"))


BUILD_FOR_EVER = """
import shutil, sys
from pkexplain.index.row_index import RowIndex
from pkexplain.store.directory import DirectoryStore

store = DirectoryStore(sys.argv[1])
print("ready", flush=True)
while True:
    RowIndex(store.trajectory(), "IVF4,SQ8", store.path / "index", store=store).prepare()
    for file in (store.path / "index").glob("*.json"):
        file.unlink()
"""


def test_a_build_that_is_killed_leaves_a_usable_run(disk_run):
    rows = matrix(DirectoryStore(disk_run.store).trajectory())
    queries = queries_of(rows)
    for delay in (0.01, 0.05, 0.13):
        child = subprocess.Popen(
            [sys.executable, "-c", BUILD_FOR_EVER, str(disk_run.store)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.kill()
        child.communicate()
        index = prepare(disk_run)
        assert (index.rows.rank(queries, index.propose(queries, 5), 5)[0] == sort_all(rows, queries, 5)).all()
        prepare(disk_run, "SQ8")
        assert not list((disk_run.store / "index").glob("*.tmp"))


@pytest.mark.stress
def test_an_index_whose_build_is_killed_a_hundred_times_is_always_usable(disk_run):
    rows = matrix(DirectoryStore(disk_run.store).trajectory())
    queries, chance, kills = queries_of(rows), random.Random(0), 0

    def build():
        for file in (disk_run.store / "index").glob("*"):
            file.unlink()
        prepare(disk_run, "SQ8")

    while kills < 100:
        kills += not killed_at_random(build, chance, longest=0.05)
        index = prepare(disk_run, "SQ8")
        assert (index.rows.rank(queries, index.propose(queries, 5), 5)[0] == sort_all(rows, queries, 5)).all()
    store = DirectoryStore(disk_run.store)
    with store.lock():
        store.sweep()
    assert not list((disk_run.store / "index").glob("*.tmp"))


# ---------------------------------------------------------------------------------------- comparison and the command


def test_compared_figures_are_those_of_a_plain_sort(large):
    queries = combine_rows(large, 20, seed=3)
    rows = matrix(large)
    flat, pq, refused = compare_indices(large, queries, ["Flat", "PCA16,PQ4x4", "IVF2000,Flat"])
    assert not isinstance(flat, tuple)
    assert (flat.recall, flat.bytes_per_row) == (1.0, 0)
    assert flat.captured_mass == pytest.approx(1.0, rel=1e-5)
    assert flat.rounding < 1e-5
    assert not isinstance(pq, tuple)
    index = RowIndex(large, "PCA16,PQ4x4")
    found = index.rows.rank(queries, index.propose(queries, 10), 10)[0]
    assert pq.recall == pytest.approx(recall(found, sort_all(rows, queries, 10)))
    assert pq.recall < 1
    held = index.propose(queries, 100)
    masses = []
    for query, ids in zip(queries.astype(np.float64), held, strict=True):
        scores = rows @ query
        masses.append(np.sort(scores[np.unique(ids)])[-100:].sum() / np.sort(scores)[-100:].sum())
    assert pq.captured_mass == pytest.approx(np.mean(masses), rel=1e-4)
    assert pq.rounding > 0.01
    assert isinstance(refused, tuple)
    assert refused[0] == "IVF2000,Flat"
    assert "faiss cannot train this index on so few rows" in refused[1]


def test_made_queries_are_seeded_sums_of_rows(large):
    made = combine_rows(large, 5, seed=4)
    assert (made == combine_rows(large, 5, seed=4)).all()
    assert (made != combine_rows(large, 5, seed=5)).any()
    rows = matrix(large)
    left = made - made @ np.linalg.pinv(rows) @ rows
    assert np.abs(left).max() < 1e-4 * np.abs(made).max()


def call(*words):
    return CliRunner().invoke(app, ["index", *(str(word) for word in words)])


def test_the_command_builds_an_index_and_keeps_it(disk_run):
    shown = call(disk_run.store, "--factory", "SQ8")
    assert shown.exit_code == 0
    assert shown.output.startswith("SQ8: 96 rows of ")
    assert kept(disk_run)[0].stat().st_size == prepare(disk_run, "SQ8").kept_bytes


def test_the_command_says_that_a_small_run_needs_no_index(disk_run):
    assert "nothing to build" in call(disk_run.store).output
    assert not (disk_run.store / "index").exists()


def test_the_command_compares_indices(disk_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shown = call(disk_run.store, "--benchmark", "--queries", 8, "--factory", "PCA16,SQ4").output
    for word in ("recall@10", "captured mass", "bytes a row", "Flat", "PCA16,SQ4", "random rows of this run"):
        assert word in shown
    assert not (disk_run.store / "index").exists()


@pytest.mark.parametrize("factory", ["PCA16,PQ8", "IVF256,SQ8", "PCA16,IVF256,PQ8"])
def test_a_few_rows_are_trained_on_without_a_word(large, factory, capfd):
    """faiss would print a line for every clustering of few points, hundreds of them with product quantizers."""
    RowIndex(large, factory).propose(queries_of(matrix(large), 1), 1)
    ctypes.CDLL(None).fflush(None)  # faiss prints through C's own buffer
    assert "WARNING" not in "".join(capfd.readouterr())

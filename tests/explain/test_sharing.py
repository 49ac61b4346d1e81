"""One explainer for a whole service: threads that share it, runs that change under it, questions without end."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import ConfigurationError, RunDamagedError, RunNotFoundError
from pkexplain.explain.dense import path_kernel
from tests.conftest import RecordedTraining
from tests.faults import say
from tests.trainings import EXAMPLES, Training

GONE = [3, 17, 30]


# -------------------------------------------------------------------------------------------------------------- threads


def recorded(seed, middle, optimizer):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 10), middle, nn.GELU(), nn.Linear(10, 10)).double()
    options = {"projection": pk.Kronecker(64, warm_up_examples=20), "segments": 4}
    training = RecordedTraining(net, lambda p: optimizer(p, lr=0.05), examples=40, queries=12, **options)
    return training.train()


@pytest.fixture(scope="module")
def two_runs():
    return [
        recorded(0, nn.BatchNorm1d(10), torch.optim.SGD),
        recorded(1, nn.LayerNorm(10), torch.optim.AdamW),
    ]


def questions(training):
    """Every kind of question, each with its own query."""
    x = training.queries
    for q in itertools.count():
        query, reading = x[q % len(x)], ("path", "removal")[q // 3 % 2]
        if q % 3 == 0:
            yield lambda e, query=query, reading=reading: plain(e.explain(query, reading=reading))
        elif q % 3 == 1:
            yield lambda e, query=query, reading=reading: e.contributions(query, output=pk.Logit(3), reading=reading)
        else:
            yield lambda e, q=q: e.self_contributions(x[:3], [q % 30, 33, 37], output=pk.Logit(1))


def plain(explanation):
    return (
        explanation.ledger,
        explanation.proponents,
        explanation.opponents,
        [(check.name, check.value) for check in explanation.checks],
        explanation.contributions.tolist(),
    )


def same(one, other):
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def ask_from_threads(training, threads, calls, index):
    """Ask from several threads at once; count the answers that differ from those asked in sequence, and the errors."""
    asked = list(itertools.islice(questions(training), 12))
    alone = pk.Explainer(training.store, training.model, index=index)
    expected = [question(alone) for question in asked]
    shared = pk.Explainer(training.store, training.model, index=index)  # nothing is prepared: they do that at once, too
    gate, wrong, errors = threading.Barrier(threads), [], []

    def ask(thread):
        gate.wait()
        for call in range(calls):
            at = (call * 5 + thread * 3) % len(asked)
            try:
                if not same(asked[at](shared), expected[at]):
                    wrong.append(at)
            except Exception as error:
                errors.append(repr(error))

    workers = [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong, errors


@pytest.mark.parametrize("index", ["Flat", "SQ8"])
@pytest.mark.parametrize("which", [0, 1])
def test_threads_that_share_an_explainer_get_the_answers_of_one(two_runs, which, index):
    assert ask_from_threads(two_runs[which], threads=4, calls=15, index=index) == ([], [])


@pytest.mark.stress
def test_four_threads_of_five_hundred_calls_each(two_runs):
    for training, index in itertools.product(two_runs, ("Flat", "SQ8")):
        wrong, errors = ask_from_threads(training, threads=4, calls=500, index=index)
        say(f"threads: 4 × 500 calls, {index}: {len(errors)} errors, {len(wrong)} differences")
        assert (wrong, errors) == ([], [])


def test_explanations_of_one_index_are_read_by_threads_at_once(two_runs):
    training = two_runs[0]
    explainer = pk.Explainer(training.store, training.model, index="SQ8")
    expected = [each.contributions.tolist() for each in explainer.explain(training.queries)]
    later, found = explainer.explain(training.queries), {}

    def read(q):
        found[q] = later[q].contributions.tolist()

    workers = [threading.Thread(target=read, args=(q,)) for q in range(len(later))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[q] for q in range(len(later))] == expected


def test_the_dense_check_does_not_move_the_model_that_it_is_given():
    training = RecordedTraining(nn.Linear(64, 10).double(), lambda p: torch.optim.SGD(p, lr=0.1), examples=8, queries=2)
    training.train()
    before, seen = [p.clone() for p in training.model.parameters()], []

    def output(prediction):
        seen.append(all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True)))
        return prediction[:, 0]

    training.model.train()
    path_kernel(training.store, training.model, training.queries[:1], output=output)
    assert len(seen) > 10
    assert all(seen)
    assert training.model.training


@pytest.mark.parametrize("ask", ["output", "progress"])
def test_a_question_from_inside_an_answer_is_refused(two_runs, ask):
    training = two_runs[0]

    def again(*_):
        explainer.contributions(training.queries[:1], output=pk.Logit(1))

    def output(prediction):
        again()
        return prediction[:, 0]

    explainer = pk.Explainer(training.store, training.model, progress=again if ask == "progress" else None)
    with pytest.raises(ConfigurationError, match="it is answering a question in this thread already"):
        explainer.explain(training.queries[0], output=output if ask == "output" else None)
    plainly = pk.Explainer(training.store, training.model)
    assert plain(plainly.explain(training.queries[0])) == plain(plainly.explain(training.queries[0]))


def test_a_fork_may_ask_while_another_thread_was_asking(two_runs):
    training = two_runs[0]
    explainer, inside, go_on = pk.Explainer(training.store, training.model), threading.Event(), threading.Event()
    expected = explainer.explain(training.queries[0], output=pk.Logit(1)).final

    def output(prediction):
        inside.set()
        go_on.wait()
        return prediction[:, 0]

    thread = threading.Thread(target=lambda: explainer.explain(training.queries[0], output=output))
    thread.start()
    inside.wait()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, repr(explainer.explain(training.queries[0], output=pk.Logit(1)).final).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 100)
    os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert float(told) == expected


def test_two_explainers_and_a_training_in_threads_of_their_own(two_runs):
    """All of them listen to torch's one backward()."""
    expected = [plain(pk.Explainer(t.store, t.model).explain(t.queries[0])) for t in two_runs]
    wrong, trained = [], []

    def explain(training, truth):
        explainer = pk.Explainer(training.store, training.model)
        wrong.extend(1 for _ in range(25) if plain(explainer.explain(training.queries[0])) != truth)

    def train():
        for _ in range(3):
            trained.append(recorded(0, nn.BatchNorm1d(10), torch.optim.SGD))

    threads = [threading.Thread(target=explain, args=pair) for pair in zip(two_runs, expected, strict=True)]
    threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(trained) == 3
    for training in trained:
        assert all(e.summary.displacement_gap < 1e-9 for e in training.store.manifest().segments)


@pytest.mark.parametrize("when", ["before the forward pass", "before the backward pass", "after it"])
def test_an_explanation_inside_a_recorded_step_changes_neither(two_runs, when):
    explained = two_runs[0]
    explainer = pk.Explainer(explained.store, explained.model)
    expected = plain(explainer.explain(explained.queries[0]))

    def trained(ask):
        training = recorded_with(ask)
        return [p.tolist() for p in training.model.parameters()], training.store.trajectory()

    def ask(at):
        if at == when:
            assert plain(explainer.explain(explained.queries[0])) == expected

    (here, run), (there, other) = trained(ask), trained(lambda at: None)
    assert here == there
    for t in range(len(run)):
        assert torch.equal(run.segment(t).row_sum, other.segment(t).row_sum)
        assert run.summaries[t].capture_gap < 1e-9


def recorded_with(ask):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 10), nn.GELU(), nn.Linear(10, 10)).double()
    training = RecordedTraining(net, lambda p: torch.optim.SGD(p, lr=0.05), examples=24)
    with training:
        for ids in torch.arange(24).split(8):
            with training.recorder.step(ids):
                training.optimizer.zero_grad()
                ask("before the forward pass")
                loss = nn.functional.cross_entropy(net(training.inputs[ids]), training.targets[ids])
                ask("before the backward pass")
                loss.backward()
                ask("after it")
                training.optimizer.step()
    return training


def test_queries_that_ask_for_gradients_are_explained(two_runs):
    training = two_runs[0]
    explainer = pk.Explainer(training.store, training.model)
    for query in (training.queries[0].clone().requires_grad_(), training.queries[0].clone().requires_grad_() * 1):
        assert plain(explainer.explain(query)) == plain(explainer.explain(training.queries[0]))


# ------------------------------------------------------------------------------------------- runs that change meanwhile


@pytest.fixture
def training(tmp_path):
    made = Training(tmp_path, "sgd")
    made.go(epochs=2)
    return made


def ask(explainer, training):
    return explainer.explain(training.queries[0], output=pk.Logit(3), k=EXAMPLES)


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat"])
def test_an_open_explainer_follows_a_withdrawal(training, index):
    explainer = pk.Explainer(training.run, training.model, index=index)  # its index is not built yet
    before = pk.Explainer(training.run, training.model).explain(training.queries[0], output=pk.Logit(3), k=EXAMPLES)
    pk.withdraw(training.run, GONE)
    after = ask(explainer, training)
    assert after.ledger == ask(pk.Explainer(training.run, training.model), training).ledger
    assert after.num_examples == EXAMPLES - len(GONE)
    assert not np.asarray(after.contributions)[GONE].any()
    assert before.contributions[GONE].all()
    assert "withdrawn" in after.ledger.remainders


def test_no_index_of_withdrawn_rows_is_kept(training):
    """The race: an explainer reads the rows, somebody withdraws, then the explainer keeps its index."""
    from pkexplain.index.row_index import RowIndex

    store = pk.DirectoryStore(training.run)
    trajectory = store.trajectory()
    rows = [trajectory.segment(t).read_rows(slice(None)) for t in range(len(trajectory))]
    index = RowIndex(trajectory, "IVF4,Flat", training.run / "index", store=store)
    pk.withdraw(training.run, GONE)
    index.prepare()
    assert index.ready
    assert not list((training.run / "index").glob("*"))
    for file in (f for f in training.run.rglob("*") if f.is_file()):
        content = file.read_bytes()
        for i in GONE:
            whole = torch.cat([part[i] for part in rows]).numpy().tobytes()
            assert whole not in content, file


@pytest.mark.parametrize("sweeper", ["withdraw", "merge", "verify", "open"])
def test_indices_of_other_rows_are_swept(training, sweeper):
    from typer.testing import CliRunner

    from pkexplain.cli import app

    pk.Explainer(training.run, training.model, index="IVF4,Flat").prepare()
    (old,) = (training.run / "index").glob("*.faiss")
    other = old.with_name("0" * 16 + old.name[16:])  # as an index of the rows before a withdrawal is named
    other.write_bytes(old.read_bytes())
    mine = training.run / "index" / "notes.txt"
    mine.write_text("somebody else's")
    if sweeper == "withdraw":
        pk.withdraw(training.run, GONE)
    elif sweeper == "merge":
        pk.merge(training.run, shards=2)
    elif sweeper == "verify":
        shown = CliRunner().invoke(app, ["verify", str(training.run)])
        assert "1 leftover file(s)" in shown.output
    else:
        pk.Explainer(training.run, training.model)
    assert not other.exists()
    assert mine.exists()
    assert old.exists() == (sweeper in ("verify", "open"))  # the others have replaced the rows


def test_an_open_explainer_follows_a_merge(training):
    explainer = pk.Explainer(training.run, training.model)
    before = ask(explainer, training)
    pk.merge(training.run, shards=3)
    after = ask(explainer, training)
    assert after == before
    assert after.contributions.tolist() == before.contributions.tolist()


def test_an_open_explainer_does_not_follow_growth(training):
    explainer = pk.Explainer(training.run, training.model)
    before, trained = ask(explainer, training), Training(training.run.parent, "sgd")
    trained.go(epochs=3)
    assert ask(explainer, training) == before
    assert ask(pk.Explainer(training.run, training.model), training) != before


def test_an_open_explainer_of_a_run_that_was_replaced_refuses(training, tmp_path):
    import shutil

    explainer = pk.Explainer(training.run, training.model)
    (tmp_path / "other").mkdir()
    other = Training(tmp_path / "other", "adamw")
    other.go(epochs=1)
    shutil.rmtree(training.run)
    with pytest.raises(RunNotFoundError, match="there is no run"):
        ask(explainer, training)
    other.run.rename(training.run)
    with pytest.raises(RunNotFoundError, match=r"replaced by another run since .* Make a new Explainer"):
        ask(explainer, training)


def test_an_open_explainer_follows_another_copy_of_the_run(training, tmp_path):
    """A service whose run is replaced by copies, each with more examples withdrawn: all of them have revision 1."""
    import shutil

    for name, gone in (("first", [3]), ("second", [3, 17])):
        shutil.copytree(training.run, tmp_path / name)
        pk.withdraw(tmp_path / name, gone)
    shutil.rmtree(training.run)
    (tmp_path / "first").rename(training.run)
    explainer = pk.Explainer(training.run, training.model)
    assert ask(explainer, training).contributions[17]
    training.run.rename(tmp_path / "old")
    (tmp_path / "second").rename(training.run)
    assert not ask(explainer, training).contributions[[3, 17]].any()


def test_averaged_runs_follow_a_withdrawal_together(tmp_path):
    made = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        made.append(Training(tmp_path / str(seed), "sgd", projection=pk.Kronecker(64, warm_up_examples=20, seed=seed)))
        made[-1].go(epochs=1)
    runs = [training.run for training in made]
    explainer = pk.Explainer(runs, made[0].model)
    pk.withdraw(runs[0], GONE)
    with pytest.raises(ConfigurationError, match="different examples were withdrawn from them"):
        ask(explainer, made[0])
    pk.withdraw(runs[1], GONE)
    assert not ask(explainer, made[0]).contributions[GONE].any()


# ------------------------------------------------------------------------------------------ the first segments of a run


def test_the_first_segments_are_a_run_of_their_own(training):
    whole = pk.DirectoryStore(training.run).trajectory()
    explainer = pk.Explainer(training.run, training.model, segments=2)
    explanation = ask(explainer, training)
    assert explanation.boundaries == whole.boundaries[:3]
    assert f"after step {whole.boundaries[2]} (2 of 4 segments)" in str(explanation)
    report = pk.write_report(explanation, training.run.with_name("report.html")).read_text()
    assert report.count(f"fter step {whole.boundaries[2]} (2 of 4 segments)") > 1
    assert "fter training" not in report
    net = explainer.copy_model()
    at = whole.checkpoint(2).parameters
    torch.nn.utils.vector_to_parameters(at, net.parameters())
    assert explanation.final == pytest.approx(float(net(training.queries[:1])[0, 3].detach()), rel=1e-12)
    assert abs(explanation.gap) < 1e-9 * abs(explanation.final - explanation.initial)


def test_a_run_whose_last_segment_is_damaged_is_read_up_to_it(training):
    files = pk.DirectoryStore(training.run).manifest().segments[-1].files
    (training.run / files.rows[0]).unlink()
    with pytest.raises(RunDamagedError, match="it is missing"):
        pk.Explainer(training.run, training.model)
    last = len(pk.DirectoryStore(training.run).manifest().segments)
    assert len(ask(pk.Explainer(training.run, training.model, segments=last - 1), training).boundaries) == last


@pytest.mark.parametrize("segments", [0, -1, 99, 1.0, True, "2"])
def test_a_number_of_segments_that_the_run_does_not_have(training, segments):
    with pytest.raises(ConfigurationError, match=r"it does not have so many\. Got .*; expected 1 to 4"):
        pk.Explainer(training.run, training.model, segments=segments)


# ------------------------------------------------------------------------------------------------------- checks, memory


def test_contributions_name_the_checks_that_fail(training):
    explainer = pk.Explainer(training.run, training.model, tolerance=1e-9)
    explanations = explainer.explain(training.queries, output=pk.Logit(3))
    failing = [e for e in explanations if not e.passed]
    assert failing
    failed = {check.name for e in failing for check in e.checks if not check.passed}
    for ask_for in (
        lambda: explainer.contributions(training.queries, output=pk.Logit(3)),
        lambda: explainer.self_contributions(training.queries, range(8), output=pk.Logit(3), reading="path"),
    ):
        with pytest.warns(UserWarning, match=f"checks failed for {len(failing)} of 8 queries, at worst") as told:
            ask_for()
        assert all(name in str(told[0].message) for name in failed)
        assert told[0].filename == __file__


def test_contributions_that_would_take_too_much_memory_are_computed_when_they_are_read(two_runs, monkeypatch):
    from pkexplain.explain import explainer as module

    training = two_runs[0]
    explainer = pk.Explainer(training.store, training.model)
    kept = explainer.explain(training.queries)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 40 * 11)
    deferred = explainer.explain(training.queries)
    for one, other in zip(kept, deferred, strict=True):
        assert isinstance(one.all_contributions, np.ndarray)
        assert not isinstance(other.all_contributions, np.ndarray)
        np.testing.assert_allclose(other.contributions, one.contributions, rtol=1e-12, atol=1e-15)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.stress
def test_two_thousand_queries_in_one_process(two_runs):
    for training in two_runs:
        explainer = pk.Explainer(training.store, training.model)
        asked = questions(training)
        for question in itertools.islice(asked, 200):
            question(explainer)
        gc.collect()
        before = resident()
        for question in itertools.islice(asked, 2000):
            question(explainer)
        gc.collect()
        grown = resident() - before
        say(f"2,000 queries: {before / 2**20:.1f} MiB before, {grown / 2**20:+.1f} MiB after")
        assert grown < 8 << 20

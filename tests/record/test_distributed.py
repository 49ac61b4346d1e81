"""Two processes that train together record the run that one process would."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

import pkexplain as pk
from pkexplain.distributed import ProcessGroup, TorchProcessGroup
from pkexplain.errors import ConfigurationError, PkexplainError
from tests.conftest import batches, digits

EXAMPLES, PROCESSES = 43, 2
PROJECTIONS = {
    "identity": pk.Identity(),
    "sparse": pk.SparseSign(256),
    "kronecker": pk.Kronecker(128, warm_up_examples=24),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
WAYS = ("plain", "accumulated", "penalty", "float32")
CASES = [(o, p, "plain") for o in OPTIMIZERS for p in PROJECTIONS] + [
    (o, "kronecker", w) for o in OPTIMIZERS for w in WAYS[1:]
]


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10)).to(dtype)


def share(ids, rank, world):
    """Deal a batch out as a DistributedSampler does; the parts must not be equally long."""
    return ids[rank::world]


def train(run, case, rank=0, world=1, *, resumed=False, epochs=(0, 1, 2)):
    kind, projection, way = case
    dtype = torch.float32 if way == "float32" else torch.float64
    net = model(dtype)
    optimizer, checkpoint = OPTIMIZERS[kind](net.parameters()), Path(f"{run}.pt")
    if resumed:
        kept = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    whole = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    inputs, targets = digits(EXAMPLES, dtype)
    if resumed:
        recorder = pk.Recorder.resume(run, whole, optimizer)
    else:
        recorder = pk.Recorder(
            run, whole, optimizer, num_examples=EXAMPLES, projection=PROJECTIONS[projection], dtype=dtype
        )
    with recorder:
        for epoch in epochs:
            for place, ids in enumerate(batches(EXAMPLES, 8, 1, seed=epoch)):
                mine = share(ids, rank, world)
                weight = world * len(mine) / len(ids)  # DistributedDataParallel takes the mean over the processes
                waits = way == "accumulated" and place % 2 == 0
                with recorder.step(mine, accumulate=waits):
                    if place % 2 == 0 or way != "accumulated":
                        optimizer.zero_grad()
                    loss = weight * F.cross_entropy(whole(inputs[mine]), targets[mine])
                    if way == "penalty":
                        loss = loss + 0.01 * sum(p.square().sum() for p in net.parameters())
                    loss.backward()
                    if not waits:
                        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                        optimizer.step()
            recorder.save()
            if rank == 0:
                torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return net


def sampled(run, rank, world, epochs=3):
    """Train with torch's own sampler, which repeats an example where there is one too few."""
    net = model()
    whole, optimizer = nn.parallel.DistributedDataParallel(net), OPTIMIZERS["sgd"](net.parameters())
    inputs, targets = digits(EXAMPLES)
    sampler = DistributedSampler(range(EXAMPLES), world, rank, seed=3)
    with pk.Recorder(run, whole, optimizer, num_examples=EXAMPLES, dtype=torch.float64) as recorder:
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for ids in torch.tensor(list(sampler)).split(5):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(whole(inputs[ids]), targets[ids]).backward()
                    optimizer.step()


def refused_everywhere(rank, world):
    """One process gives ids that are not there: both must hear of it, and at once."""
    net = nn.parallel.DistributedDataParallel(model())
    recorder = pk.Recorder(
        pk.MemoryStore(), net, OPTIMIZERS["sgd"](net.parameters()), num_examples=4, dtype=torch.float64
    )
    try:
        with recorder, recorder.step([0, 1] if rank == 0 else [2, 99]):
            return "nothing"
    except PkexplainError as error:
        return str(error)


UNEQUAL = ["fewer batches", "fewer at once", "only one saves", "only one accumulates", "join", "an error between steps"]


def unequal(run, rank, world, case):
    """Let the processes do different things; return the error of this one."""
    net, (inputs, targets) = nn.parallel.DistributedDataParallel(model()), digits(EXAMPLES)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    options = {"num_examples": EXAMPLES, "projection": pk.Identity(), "dtype": torch.float64, "segments": 2}
    here = net.join() if case == "join" else contextlib.nullcontext()
    try:
        with here, pk.Recorder(run, net, optimizer, **options) as recorder:
            for s in range({"fewer batches": 3, "fewer at once": 0}.get(case, 5) if rank == 0 else 5):
                if s == 3 and rank == 0 and case == "an error between steps":
                    raise ValueError("no data")
                if s == 3 and rank == 1 and case == "only one saves":
                    recorder.save()
                ids = share(torch.arange(8 * s, 8 * s + 8) % EXAMPLES, rank, world)
                accumulates = case == "only one accumulates" and rank == 1 and s == 3
                with (
                    recorder.step(ids, accumulate=accumulates),
                    net.no_sync() if accumulates else contextlib.nullcontext(),
                ):
                    optimizer.zero_grad()
                    F.cross_entropy(net(inputs[ids]), targets[ids]).backward()
                    if not accumulates:
                        optimizer.step()
    except (PkexplainError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def reductions(run, rank, world, recorded):
    """Count the gradient buckets that the processes exchange in 4 steps, each of which checks its split if recorded."""
    net, exchanged = nn.parallel.DistributedDataParallel(model()), []

    def counting(group, bucket):
        exchanged.append(bucket.index())
        return default_hooks.allreduce_hook(group, bucket)

    net.register_comm_hook(None, counting)
    optimizer, (inputs, targets) = OPTIMIZERS["sgd"](net.parameters()), digits(EXAMPLES)
    options = {"num_examples": EXAMPLES, "projection": pk.Identity(), "dtype": torch.float64, "segments": 1}
    recorder = pk.Recorder(run, net, optimizer, **options) if recorded else None
    with recorder or contextlib.nullcontext():
        for ids in (share(torch.arange(8 * s, 8 * s + 8), rank, world) for s in range(4)):
            with recorder.step(ids) if recorder else contextlib.nullcontext():
                optimizer.zero_grad()
                F.cross_entropy(net(inputs[ids]), targets[ids]).backward()
                optimizer.step()
    return exchanged, [p.detach().numpy() for p in net.parameters()]


def work(rank, world, directory, port, queue):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for case in CASES:
            if case[2] != "penalty":
                train(f"{directory}/{'-'.join(case)}", case, rank, world)
            else:
                with pytest.warns(UserWarning, match="do not sum to the gradient"):
                    train(f"{directory}/{'-'.join(case)}", case, rank, world)
        for kind in OPTIMIZERS:
            case = (kind, "kronecker", "plain")
            train(f"{directory}/resumed-{kind}", case, rank, world, epochs=(0, 1))
            train(f"{directory}/resumed-{kind}", case, rank, world, resumed=True, epochs=(2,))
        sampled(f"{directory}/sampled", rank, world)
        answer = explained(directory) | {
            "exchanged": [reductions(f"{directory}/exchanged", rank, world, recorded) for recorded in (False, True)]
        }
        different = {case: unequal(f"{directory}/unequal-{case}", rank, world, case) for case in UNEQUAL}
        queue.put((rank, {"refused": refused_everywhere(rank, world), "unequal": different, **answer}))
        dist.barrier()
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    queue.close()
    queue.join_thread()
    os._exit(0)  # torch's gloo threads now and then abort a process that ends by itself


def explained(directory):
    """Explain with the rows shared out over the processes, from the checkpoint that both can read."""
    path, net = f"{directory}/sgd-sparse-plain", model()
    net.load_state_dict(torch.load(f"{path}.pt", weights_only=True)["model"])
    answers = {}
    for index in ("Flat", "SQ8"):
        explainer = pk.Explainer(path, net, index=index, group=dist.group.WORLD)
        (first, *_) = explainer.explain(queries()[:2], output=pk.Logit(0), k=4)
        answers[index] = {
            "shown": [(c.id, c.contribution, c.segments) for c in (*first.proponents, *first.opponents)],
            "remainder": first.remainder,
            "all": explainer.contributions(queries(), output=pk.Logit(0)),
            "rows": explainer.index.rows.num_examples,
        }
    return {"explained": answers}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Everything that two processes do, in one start of them."""
    directory = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=work, args=(r, PROCESSES, str(directory), port, queue)) for r in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    for answer in answers.values():
        assert isinstance(answer, dict), answer
    return directory, answers


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    made = {}

    def get(case):
        if case not in made:
            made[case] = train(f"{directory}/{'-'.join(case)}", case)
        return f"{directory}/{'-'.join(case)}", made[case]

    return get


def queries(dtype=torch.float64):
    return digits(EXAMPLES + 6, dtype)[0][EXAMPLES:]


def contributions(path, net, dtype=torch.float64):
    return pk.Explainer(path, net, tolerance=1e-4).contributions(queries(dtype), output=pk.Logit(0))


def test_coded_passes_exchange_nothing(together):
    _, answers = together
    for answer in answers.values():
        (plain, without), (recorded, with_recorder) = answer["exchanged"]
        assert len(plain) == 4  # one bucket a step
        assert recorded == plain
        assert all((a == b).all() for a, b in zip(without, with_recorder, strict=True))


@pytest.mark.filterwarnings("ignore:pkexplain. the examples' gradients do not sum")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_contributions_are_those_of_one_process(together, alone, case):
    directory, _ = together
    path, net = alone(case)
    dtype, tolerance = (torch.float32, 1e-3) if case[2] == "float32" else (torch.float64, 1e-9)
    one, two = contributions(path, net, dtype), contributions(f"{directory}/{'-'.join(case)}", net, dtype)
    np.testing.assert_allclose(two, one, rtol=0, atol=tolerance * np.abs(one).max())
    first, second = (pk.DirectoryStore(p).trajectory() for p in (path, f"{directory}/{'-'.join(case)}"))
    for a, b in zip(first.summaries, second.summaries, strict=True):
        assert (a.last_step, a.visits, a.learning_rate_sum) == (b.last_step, b.visits, b.learning_rate_sum)
        assert b.rescaled == pytest.approx(a.rescaled, rel=1e-6 if dtype == torch.float64 else 1e-4)
        assert b.displacement_gap < (1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_of_two_processes_is_that_of_one(together, alone, kind):
    path, net = alone((kind, "kronecker", "plain"))
    one, two = contributions(path, net), contributions(f"{together[0]}/resumed-{kind}", net)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-9 * np.abs(one).max())


def test_each_process_writes_the_rows_of_its_own_examples(together):
    run = together[0] / "sgd-kronecker-plain"
    entries = json.loads((run / "manifest.json").read_text())["segments"]
    assert [entry["files"]["counts"] for entry in entries] == [[21, 22]] * len(entries)
    assert sorted(file.name for file in (run / "rows").iterdir())[:2] == [
        "00000.000.safetensors",
        "00000.001.safetensors",
    ]
    whole = pk.DirectoryStore(run).trajectory().segment(0)
    parts = torch.cat([whole.read_rows(torch.arange(21)), whole.read_rows(torch.arange(21, EXAMPLES))])
    assert torch.equal(parts, whole.read_rows(slice(None)))
    assert torch.equal(whole.read_rows(torch.tensor([41, 0, 21])), parts[[41, 0, 21]])


def test_an_epoch_of_torchs_sampler_is_a_segment(together):
    trajectory = pk.DirectoryStore(together[0] / "sampled").trajectory()
    assert [summary.visits for summary in trajectory.summaries] == [EXAMPLES + 1] * 3
    assert max(summary.displacement_gap for summary in trajectory.summaries) < 1e-9
    assert max(summary.optimizer_share for summary in trajectory.summaries) < 1e-9


def test_what_one_process_refuses_stops_the_other(together):
    first, second = (together[1][rank]["refused"] for rank in range(PROCESSES))
    assert "another process refused its batch" in first
    assert "ids are out of range. Got [99]" in second


DIFFERENT = "RecordingError: recorder.step(ids): the processes do different things. Got process {} {}, process {} {}; "


@pytest.mark.parametrize(
    ("case", "doing", "segments", "fix"),
    [
        ("fewer batches", ("has left the recorder", "steps"), 2, "the same number of batches"),
        ("fewer at once", ("has left the recorder", "steps"), 0, "the same number of batches"),
        ("only one saves", ("steps", "saves"), 2, "Call recorder.save() in every process"),
        ("only one accumulates", ("steps", "accumulates a gradient"), 2, "the same number of batches in every process"),
    ],
)
def test_processes_that_do_different_things_are_told_at_once(together, case, doing, segments, fix):
    directory, answers = together
    for rank in range(PROCESSES):
        other = 1 - rank
        told = answers[rank]["unequal"][case]
        assert told.startswith(DIFFERENT.format(rank, doing[rank], other, doing[other])), told
        assert fix in told
    store = pk.DirectoryStore(directory / f"unequal-{case}")
    assert len(store.manifest().segments) == segments  # what was finished, and what was in progress
    assert store.manifest().ended == "interrupted by RecordingError"
    assert all(entry.summary.displacement_gap < 1e-9 for entry in store.manifest().segments)


def test_uneven_inputs_that_torch_would_join_are_refused(together):
    for rank in range(PROCESSES):
        assert "DistributedDataParallel.join() is active" in together[1][rank]["unequal"]["join"]


def test_a_process_that_stops_says_so_to_the_others(together):
    first, second = (together[1][rank]["unequal"]["an error between steps"] for rank in range(PROCESSES))
    assert first == "ValueError: no data"
    assert "another process has stopped. Got a closed connection" in second


@pytest.mark.parametrize("index", ["Flat", "SQ8"])
def test_processes_that_share_the_rows_out_answer_as_one(together, index):
    directory, answers = together
    path, net = directory / "sgd-sparse-plain", model()
    net.load_state_dict(torch.load(f"{path}.pt", weights_only=True)["model"])
    explainer = pk.Explainer(path, net, index="Flat")
    alone = explainer.explain(queries()[0], output=pk.Logit(0), k=4)
    everything = explainer.contributions(queries(), output=pk.Logit(0))
    assert sum(answers[rank]["explained"][index]["rows"] for rank in range(PROCESSES)) == EXAMPLES
    for rank in range(PROCESSES):
        answer = answers[rank]["explained"][index]
        both = (*alone.proponents, *alone.opponents)
        assert [i for i, _, _ in answer["shown"]] == [c.id for c in both]
        np.testing.assert_allclose([c for _, c, _ in answer["shown"]], [c.contribution for c in both], rtol=1e-9)
        np.testing.assert_allclose([s for *_, s in answer["shown"]], [c.segments for c in both], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(answer["all"], everything, rtol=1e-9, atol=1e-12)
        shown = [i for i, _, _ in answer["shown"]]
        left = np.abs(np.delete(everything[0], shown))
        assert answer["remainder"].num_rest == len(left)
        assert answer["remainder"].rest == pytest.approx(np.delete(everything[0], shown).sum(), rel=1e-9)
        assert answer["remainder"].bound >= left.max() * (1 - 1e-12)


def test_one_process_alone_is_no_group():
    group = ProcessGroup()
    assert (group.rank, group.world_size, group.shard(7), group.all_gather("x")) == (0, 1, slice(0, 7), ["x"])
    assert issubclass(TorchProcessGroup, ProcessGroup)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    if dist.is_initialized():
        pytest.skip("another test has a group")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        net = distribute_module(model(), init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ConfigurationError, match=r"sharded over processes \(FSDP2.*Train with DistributedDataParallel"
        ):
            pk.Recorder(tmp_path, net, OPTIMIZERS["sgd"](net.parameters()), num_examples=4)
    finally:
        dist.destroy_process_group()


def test_batch_norm_over_processes_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3))
    with pytest.raises(ConfigurationError, match=r"SyncBatchNorm mixes the examples of several processes.*'1'"):
        pk.Recorder(tmp_path, net, OPTIMIZERS["sgd"](net.parameters()), num_examples=4)

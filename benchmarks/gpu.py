"""Recording, indexing and searching on a GPU, beside the card's copy bandwidth. Needs CUDA; about five minutes.

Every row is written when it is measured. A step's time is taken from events on the card, so that nothing waits for it;
what is longer than the median step is the choice of directions and the ends of segments.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _figures import table, write
from _made_rows import COLUMNS, MadeRun, Spectrum, make_rows, record
from _models import GPT, ResNet, VisionTransformer, seeded, token_loss
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits
from pkexplain.index.row_index import RowIndex

ROWS, QUERIES = 1_000_000, 100


@dataclass(frozen=True)
class Training:
    """A training to be recorded.

    Attributes:
        name: Its name.
        build: Makes the model.
        data: Makes inputs and labels, on the card.
        optimizer: Makes the optimizer.
        batch: Examples in a batch.
        epochs: Passes over the data.
        pairs: How often it is timed, alone and recorded.
        loss: The loss.
        half: Whether it runs under autocast to bfloat16.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch: int
    epochs: int
    pairs: int = 3
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    half: bool = False


@dataclass(frozen=True)
class Timing:
    """How long a training took, in seconds: a median step, and all of it; and the most memory, in bytes."""

    step: float
    whole: float
    memory: int


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits()[0].tensors
    return images.cuda(), labels.cuda()


def bytes_of(count: int, length: int) -> tuple[Tensor, Tensor]:
    made = torch.randint(256, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return made[:, :-1].cuda(), made[:, 1:].cuda()


adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
small = partial(GPT, width=512, depth=8, heads=8, length=256)
large = partial(GPT, width=768, depth=12, heads=12, length=512)
pieces, more = partial(bytes_of, 2048, 256), partial(bytes_of, 1024, 512)
TRAININGS = [
    Training("CNN, SGD", build_cnn, digits, sgd, 500, 6),
    Training("CNN, AdamW", build_cnn, digits, adamw, 500, 6),
    Training("ResNet with BatchNorm, SGD", ResNet, digits, sgd, 500, 6),
    Training("vision transformer, AdamW", VisionTransformer, digits, adamw, 500, 6),
    Training("GPT of 25 million, bfloat16, AdamW", small, pieces, adamw, 64, 2, 1, token_loss, half=True),
    Training("GPT of 86 million, bfloat16, AdamW", large, more, adamw, 32, 2, 1, token_loss, half=True),
]


def train(job: Training, run: Path | None) -> Timing:
    torch.manual_seed(0)
    model = seeded(job.build).cuda()
    inputs, labels = job.data()
    optimizer = job.optimizer(model.parameters())
    recorder = None if run is None else pk.Recorder(run, model, optimizer, num_examples=len(inputs))
    marks = [torch.cuda.Event(enable_timing=True)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    marks[0].record()
    with recorder or nullcontext():
        for _ in range(job.epochs):
            for ids in torch.randperm(len(inputs)).split(job.batch):
                some = ids.pin_memory().to("cuda", non_blocking=True)
                with recorder.step(ids) if recorder else nullcontext():
                    optimizer.zero_grad()
                    with torch.autocast("cuda", torch.bfloat16, enabled=job.half):
                        loss = job.loss(model(inputs[some]).float(), labels[some])
                    loss.backward()
                    optimizer.step()
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    steps = [one.elapsed_time(other) / 1e3 for one, other in itertools.pairwise(marks)]
    return Timing(float(np.median(steps)), whole, torch.cuda.max_memory_allocated())


def recording(job: Training) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        train(job, Path(folder) / "warm" if job.pairs > 1 else None)
        pairs = [(train(job, None), train(job, Path(folder) / str(pair))) for pair in range(job.pairs)]
    alone, taken = pairs[len(pairs) // 2]
    steps = len(job.data()[0]) // job.batch * job.epochs
    ratios = np.array([there.whole / here.whole for here, there in pairs])
    within = np.array([there.step / here.step for here, there in pairs])
    return [
        job.name,
        f"{alone.step * 1e3:.1f} ms",
        f"{taken.step * 1e3:.1f} ms",
        f"{np.median(within):.2f}",
        f"{taken.whole - steps * taken.step:.2f} s in {taken.whole:.2f} s",
        f"{np.median(ratios):.2f}",
        f"{alone.memory / 1e9:.1f} / {taken.memory / 1e9:.1f} GB",
    ]


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """Bytes a second that the card reads and writes when it copies 2 GiB, the best of five."""
    one = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    return 2 * one.nbytes / min(seconds(lambda: other.copy_(one)) for _ in range(5))


class Page:
    """The tables so far, written anew with every row."""

    def __init__(self) -> None:
        self._bandwidth = copy_bandwidth()
        self.recorded: list[list[str]] = []
        self.searched: list[list[str]] = []

    def write(self) -> None:
        head = [
            "recording",
            "a step, alone",
            "recorded",
            "ratio",
            "directions, ends of segments",
            "ratio of all",
            "memory",
        ]
        search = ["search", "on", "rows a second, built", "a query", "share of the copy bandwidth"]
        write(
            "gpu",
            f"{torch.cuda.get_device_name()}, copy bandwidth {self._bandwidth / 1e12:.2f} TB/s; torch "
            f"{torch.__version__}; recorded to disk. {ROWS:,} made rows of {COLUMNS:,} numbers, {QUERIES} queries in a "
            "batch.\n\n" + table(head, self.recorded) + "\n\n" + table(search, self.searched),
        )

    def share(self, spent: float) -> str:
        return f"{ROWS * COLUMNS * 4 / spent / self._bandwidth:.1%}"


def searching(page: Page) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, _, covectors = record(seed=0, device="cuda")
        trajectory = run.trajectory()
        whole = torch.cat([trajectory.segment(t).read_rows(slice(None)) for t in range(len(trajectory))], dim=1)
        spectrum = Spectrum.of(whole, torch.from_numpy(covectors))
        queries = make_rows(spectrum, ROWS, 0, Path(folder) / "rows", "cuda")[:QUERIES]
        made = MadeRun(Path(folder) / "rows", ROWS)
        for factory in ("Flat", "PCA256,IVF1024,SQ8", "PCA256,SQ8"):
            index = RowIndex(made, factory, None, "cuda")
            built = seconds(index.prepare)
            index.propose(queries, 10)
            spent = min(seconds(lambda index=index: index.propose(queries, 10)) for _ in range(3))
            exact = factory == "Flat"
            rate = "–" if exact else f"{ROWS / built:,.0f}"
            share = page.share(spent) if exact else "–"
            page.searched.append([factory, index.searches_on, rate, f"{spent / QUERIES * 1e3:.2f} ms", share])
            page.write()


def main() -> None:
    page = Page()
    *most, largest = TRAININGS
    for job in most:
        page.recorded.append(recording(job))
        page.write()
    searching(page)
    page.recorded.append(recording(largest))
    page.write()


if __name__ == "__main__":
    if torch.cuda.is_available():
        main()
    else:
        print("There is no CUDA device here: nothing was measured, and the table stays as it is.")

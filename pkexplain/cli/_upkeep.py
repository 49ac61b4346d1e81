"""The commands that look after a run: what it holds, whether it is whole, copies, withdrawals."""

from __future__ import annotations

from typing import Annotated

import typer

from pkexplain.cli._app import RunArgument, app, complain, console
from pkexplain.cli._arguments import call_function, parse_numbers
from pkexplain.cli._splits import show_split
from pkexplain.errors import RunBusyError, RunError
from pkexplain.store.base import Store


@app.command()
def inspect(run: RunArgument) -> None:
    """Show the contents of a run in a table."""
    from rich.table import Table
    from rich.text import Text

    from pkexplain.store.directory import open_store

    store = open_store(run)
    manifest = store.manifest()
    size = sum(file.bytes for file in manifest.files.values())
    parameters = sum(block.numel for block in manifest.model.blocks)
    about, gone = Table.grid(padding=(0, 2)), len(manifest.withdrawn)
    projection = ", ".join(f"{name} {value}" for name, value in manifest.projection.items() if name != "kind")
    rows = [
        ("run", str(run)),
        ("id", manifest.run_id),
        ("training", manifest.ended),
        ("made with", f"pkexplain {manifest.pkexplain}, torch {manifest.torch}"),
        ("optimizer", f"{manifest.optimizer.kind}, {len(manifest.optimizer.groups)} parameter group(s)"),
        ("training examples", f"{manifest.num_examples:,}" + (f", {gone} of them withdrawn" if gone else "")),
        ("parameters", f"{parameters:,} recorded, {len(manifest.model.frozen)} tensors frozen"),
        ("projection", f"{manifest.projection['kind']} ({projection}), {manifest.columns} numbers a row"),
        ("on disk", f"{size / 2**20:,.1f} MiB in {len(manifest.files)} files"),
    ]
    for name, value in rows:
        about.add_row(name, Text(value))  # a path may contain brackets
    screen = console()
    screen.print(about)
    table = Table(title="Segments", title_justify="left")
    columns = (
        "segment",
        "last step",
        "visits",
        "Σ learning rate",
        "displacement gap",
        "optimizer ‖share‖",
        "split gap",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for t, segment in enumerate(entry.summary for entry in manifest.segments):
        rate = ", ".join(f"{value:.4g}" for value in segment.learning_rate_sum)
        gaps = (f"{segment.displacement_gap:.1e}", f"{segment.optimizer_share:.1e}", f"{segment.split.gap:.1e}")
        table.add_row(str(t), f"{segment.last_step:,}", f"{segment.visits:,}", rate, *gaps)
    screen.print(table)
    show_split([entry.summary.split for entry in manifest.segments], screen)


@app.command()
def verify(
    run: RunArgument,
    tolerance: Annotated[float, typer.Option(help="Largest displacement gap that passes.")] = 0.01,
) -> None:
    """Check every file's checksum and contents and every segment's displacement gap; exit status 1 on damage."""
    from pkexplain.progress import ProgressBar
    from pkexplain.store.directory import open_store
    from pkexplain.store.upkeep import find_damage

    store, wrong = open_store(run), 0
    manifest, damaged = find_damage(store, progress=ProgressBar())
    for error in damaged.values():
        complain("damaged", str(error))
    for t, segment in enumerate(entry.summary for entry in manifest.segments):
        if not segment.displacement_gap <= tolerance:
            wrong += 1
            complain("gap", f"segment {t}: {segment.displacement_gap:.2g} is above {tolerance:g}")
        if not segment.split.gap <= segment.split.tolerance:
            wrong += 1
            layer = next(iter(segment.split.worst), "?")
            gap = f"{segment.split.gap:.2g} is above {segment.split.tolerance:g}, in layer {layer!r}"
            complain("split gap", f"segment {t}: {gap}")
    swept = _sweep(store)
    if swept:
        console().print(f"{swept} leftover file(s) of killed writers, and indices of other rows, deleted.")
    files, segments, wrong = len(manifest.files), len(manifest.segments), wrong + len(damaged)
    if wrong:
        console().print(f"{wrong} problem(s) in {files} files and {segments} segments.")
        raise typer.Exit(1)
    largest = max((entry.summary.displacement_gap for entry in manifest.segments), default=0.0)
    console().print(f"{files} files whole, {segments} segments; largest displacement gap {largest:.1e}.")


def _sweep(store: Store) -> int:
    """Delete what a run does not consist of; whoever writes to it now does so anyway, and a reader may not."""
    try:
        with store.lock():
            return len(store.sweep())
    except RunBusyError:
        return 0
    except RunError as error:
        if "deleting" in error.asked:
            complain("left", str(error))
        return 0


@app.command()
def copy(
    run: RunArgument, to: Annotated[str, typer.Argument(metavar="TO", help="The directory of the copy, or its URL.")]
) -> None:
    """Copy a run, also while it is being written to: whole segments, every file checked."""
    from pkexplain.progress import ProgressBar
    from pkexplain.store.upkeep import copy_run

    manifest = copy_run(run, to, progress=ProgressBar())
    steps = manifest.segments[-1].summary.last_step if manifest.segments else 0
    console().print(f"{len(manifest.files)} files, {len(manifest.segments)} segments, up to step {steps:,}.")


@app.command()
def salvage(run: RunArgument) -> None:
    """Reduce a damaged run to the whole segments before the first damaged one; what follows is deleted."""
    from pkexplain.progress import ProgressBar
    from pkexplain.store.upkeep import salvage as save_whole_part

    found = save_whole_part(run, progress=ProgressBar())
    for name in found.damaged:
        complain("damaged", name)
    if not found.damaged:
        console().print(f"Nothing is damaged: {found.segments} segments, up to step {found.last_step:,}.")
        return
    left = f"{found.segments} of {found.before} segments are left, up to step {found.last_step:,}"
    console().print(f"{left}; explanations are now of the model as it was then.")


@app.command("verify-recording")
def verify_recording(
    build: Annotated[
        str, typer.Argument(help="package.module:build, a function that returns model, batch, loss[, optimizer].")
    ],
) -> None:
    """Try one batch with and without recording: what changes, how each layer is split, what it costs; exit status 1."""
    from pkexplain.record.verification import verify_recording as compare

    model, batch, loss, *optimizer = call_function(build, "BUILD")
    found = compare(model, batch, loss, optimizer=next(iter(optimizer), None))
    typer.echo(str(found))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def merge(
    run: RunArgument, shards: Annotated[int, typer.Option(min=1, help="Files of rows for each segment.")] = 1
) -> None:
    """Store the rows of a run in a different number of files; no number changes."""
    from pkexplain.progress import ProgressBar
    from pkexplain.store.editing import merge as lay_out

    lay_out(run, shards=shards, progress=ProgressBar())
    console().print(f"Each segment's rows are now in {shards} file(s).")


@app.command()
def withdraw(
    run: RunArgument, ids: Annotated[str, typer.Option(help="Row numbers of the examples, for example 3,17,1204.")]
) -> None:
    """Delete the rows of examples from a run for good; their sum stays on the ledger."""
    from pkexplain.progress import ProgressBar
    from pkexplain.store.editing import withdraw as take_out

    numbers = parse_numbers(ids, "--ids")
    take_out(run, numbers, progress=ProgressBar())
    console().print(f"{len(numbers)} example(s) withdrawn; the ledger of an explanation keeps their sum.")

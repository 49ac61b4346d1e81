"""The commands: each a thin layer over the Python interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pkexplain.cli._app import RunArgument, app, complain, console
from pkexplain.cli._arguments import call_function, parse_numbers, parse_output, read_query


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run and the report go.")] = Path("pkexplain-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 4,500 training digits.")] = 12,
) -> None:
    """Train on real MNIST digits, record, index, explain, and write the report."""
    from pkexplain.demo import run_demo
    from pkexplain.progress import ProgressBar

    screen = console()
    screen.print(f"Training a small CNN on 4,500 MNIST digits for {epochs} epochs, recording every step …")
    result = run_demo(out, epochs=epochs, progress=ProgressBar())
    screen.print(f"Test accuracy {result.accuracy:.1%} on 500 digits.")
    for question, explanation in zip(result.questions, result.explanations, strict=True):
        screen.print(f"\n[bold]{question}[/bold]\n", soft_wrap=True)
        screen.out(str(explanation))
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    screen.out(f"Time: {spent}")
    screen.out(f"The run:    {result.run}")
    screen.out(f"The report: {result.report.resolve().as_uri()}")


@app.command()
def explain(
    run: RunArgument,
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the model.")],
    query: Annotated[Path, typer.Option(help="A query or a batch: a .npy or .safetensors file; .json lists or rows.")],
    output: Annotated[
        str | None,
        typer.Option(
            help="logit:3, log-probability:3, margin:3, loss:3 or value:0; without a number, for the predicted class. "
            "tokens:17,42 for the log-probability of the last tokens of a sequence. "
            "By default the logit, or the model's output if it is one number."
        ),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Number of proponents, and of opponents.")] = 10,
    reading: Annotated[
        str, typer.Option(help="path: contributions add up; removal: they predict how much the output would lose.")
    ] = "path",
    index: Annotated[str, typer.Option(help="auto, Flat for exact search, or any faiss factory string.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="package.module:load, a function that returns the training set, for the report.")
    ] = None,
) -> None:
    """Explain a prediction: the ledger, the checks and the top training examples."""
    from pkexplain.explain.explainer import Explainer
    from pkexplain.progress import ProgressBar
    from pkexplain.store.directory import open_store

    inputs = open_store(run).manifest().inputs
    asked, wanted = read_query(query, inputs), None if output is None else parse_output(output)
    explainer = Explainer(run, call_function(model, "--model"), index=index, progress=ProgressBar())
    found = explainer.explain(asked, output=wanted, k=k, reading=reading)
    explanations = found if isinstance(found, list) else [found]
    for explanation in explanations:
        typer.echo(str(explanation))
    if report is not None:
        from pkexplain.results.report import write_report

        training_set = call_function(dataset, "--dataset") if dataset else None
        typer.echo(f"The report: {write_report(explanations, report, dataset=training_set).resolve().as_uri()}")


@app.command()
def compare(
    run: RunArgument,
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the model.")],
    data: Annotated[str, typer.Option(help="package.module:load, a function that returns the training set.")],
    query: Annotated[Path, typer.Option(help="One query or a batch: a .npy or .safetensors file, or .json.")],
    target: Annotated[str, typer.Option(help="The class of the query, or of each: 3,5,8.")],
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods, by name: TracInCP,TracInCPFast,random. By default all.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Number of top examples that are compared.")] = 10,
    report: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
) -> None:
    """Compare the path reading with Captum's and cheap methods, on the same run."""
    from pkexplain.baselines.compare import choose_baselines
    from pkexplain.baselines.compare import compare as compare_methods
    from pkexplain.explain.explainer import Explainer
    from pkexplain.explain.outputs import LogProbability
    from pkexplain.progress import ProgressBar
    from pkexplain.store.directory import open_store

    asked, classes = read_query(query, open_store(run).manifest().inputs), parse_numbers(target, "--target")
    chosen, training_set = choose_baselines(methods), call_function(data, "--data")
    explainer = Explainer(run, call_function(model, "--model"), progress=ProgressBar())
    comparison = compare_methods(explainer, asked, classes, dataset=training_set, baselines=chosen, k=k)
    typer.echo(str(comparison))
    if report is not None:
        from pkexplain.results.report import write_report

        output = LogProbability(classes[0] if len(classes) == 1 else classes)
        explanations = explainer.explain(asked, output=output, k=k)
        written = write_report(explanations, report, dataset=training_set, comparison=comparison)
        typer.echo(f"The report: {written.resolve().as_uri()}")


@app.command()
def index(
    run: RunArgument,
    factory: Annotated[
        str, typer.Option(help="A faiss factory string; auto chooses one by the run's size, Flat searches exactly.")
    ] = "auto",
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Compare indices of this run: what they find, their size and speed.")
    ] = False,
    queries: Annotated[int, typer.Option(min=1, help="Number of queries for --benchmark.")] = 100,
) -> None:
    """Build the index of a run and keep it with the run, or compare several."""
    from pkexplain.files import local_path
    from pkexplain.index.row_index import RowIndex
    from pkexplain.progress import ProgressBar
    from pkexplain.store.directory import open_store
    from pkexplain.store.index_files import INDEX_FOLDER

    store = open_store(run, "" if benchmark else "indexing")
    trajectory = store.trajectory()
    if benchmark:
        _compare(trajectory, queries, factory)
        return
    directory = local_path(run, "RUN").absolute() / INDEX_FOLDER
    built = RowIndex(trajectory, factory, directory, store=store)
    built.prepare(ProgressBar())
    size = f"{trajectory.num_examples:,} rows of {built.rows.dimension:,} numbers"
    if built.exact:
        typer.echo(f"Flat: the {size} are searched where they are stored; there is nothing to build.")
    elif built.kept_bytes:
        per_row = built.kept_bytes / trajectory.num_examples
        typer.echo(f"{built.factory}: {size}, {built.kept_bytes:,} bytes, {per_row:,.0f} a row, in {directory}")
    else:
        typer.echo(f"{built.factory}: {size}; it could not be written to {directory} and will be built each time.")


def _compare(trajectory: Any, count: int, factory: str) -> None:
    """Print what indices of a run find, their size and their speed."""
    from rich.table import Table

    from pkexplain.index.benchmark import FACTORIES, combine_rows, compare_indices

    wanted = FACTORIES if factory in ("auto", *FACTORIES) else (*FACTORIES, factory)
    table = Table(title=f"Indices, {count} queries in one batch", title_justify="left")
    table.add_column("factory")
    for column in ("recall@10", "captured mass", "bytes a row", "build", "a query", "rounding"):
        table.add_column(column, justify="right")
    refused = []
    for found in compare_indices(trajectory, combine_rows(trajectory, count), wanted):
        if isinstance(found, tuple):
            refused.append(found[1])
            continue
        shares = f"{found.recall:.3f}", f"{found.captured_mass:.4f}"
        times = f"{found.build_seconds:.2f} s", f"{found.query_seconds * 1e3:.2f} ms"
        table.add_row(found.factory, *shares, f"{found.bytes_per_row:,.0f}", *times, f"{found.rounding:.2%}")
    screen = console()
    screen.print(table)
    screen.print(
        "Queries: sums of 16 random rows of this run, each scaled to length one, with Gaussian weights (seed 0); real "
        "queries are covectors of a model. Candidates are ranked by the stored rows. Captured mass: sum of the "
        "best 100 found over the sum of the true 100 largest. Rounding: relative error of the ten largest inner "
        "products when computed from the index's own rows, median."
    )
    for text in refused:
        complain("left out:", text)

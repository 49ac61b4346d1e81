"""Which models and optimizers can be recorded, and is every number right? Each case in a process of its own.

    python benchmarks/coverage.py                    all families, and the table in docs/figures.md
    python benchmarks/coverage.py hugging_face bert  the cases of a family whose names contain a word
    python benchmarks/coverage.py report FILE …      the table, from what earlier calls printed

A case trains a few steps in float64 twice, without and with a recorder, and compares losses, parameters, buffers and
random state bit for bit. Each example's gradient of the first step is compared with a backward pass of its own loss
through the same graph. Then a query is explained. A first step with 12 examples in float32, and one under autocast
in bfloat16, show how much of the gradient norm is unsplit where gradients are rounded. Cases that do not name an
optimizer train with SGD at a rate that keeps them stable: a network that diverges in 4 steps is not one that people
explain.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _figures import machine, table, write
from cases import EXAMPLES, Case

import pkexplain as pk
from pkexplain.errors import PkexplainError
from pkexplain.record import verification

FAMILIES = ("hugging_face", "timm_models", "torchvision_models", "by_hand", "optimizers")
LIMIT = 300
MORE = 12  # examples in float32 and under autocast
STEPS, BATCHES = 4, 2
NOT_JUDGED = ("projection gap", "audit error")  # of compressed rows
ROWS_WRONG = 1e-6
LARGEST = 30_000_000  # parameters, above which rows are not compared: there is no memory for them


def run(case: Case, batch: Any, model: Any) -> torch.Tensor:
    args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), batch)
    output = model(*args, **kwargs)
    return output.loss[None] if case.losses is None else case.losses(output, batch)


def stable_rate(case: Case) -> float:
    """A learning rate at which a step lowers the loss of its batch by a tenth, to first order; at most 10⁻³."""
    torch.manual_seed(0)
    model = case.build().double().train()
    loss = run(case, case.batch(EXAMPLES), model).mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    size = sum(float(p.grad.to_dense().square().sum()) for p in parameters if p.grad is not None)
    return min(1e-3, 0.1 * abs(float(loss)) / size) if 0 < size < float("inf") else 1e-3


def train(case: Case, recorded: bool) -> dict[str, Any]:
    rate = stable_rate(case) if case.optimizer is None else 0.0
    torch.manual_seed(0)
    model = case.build().double().train()
    batches = [case.batch(EXAMPLES) for _ in range(BATCHES)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate) if case.optimizer is None else case.optimizer(parameters)
    store, losses, start = pk.MemoryStore(), [], time.perf_counter()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    projection = pk.Identity() if size < 300_000 else pk.Kronecker(2048)
    options = {"num_examples": BATCHES * EXAMPLES, "projection": projection, "dtype": torch.float64}
    recorder = pk.Recorder(store, model, optimizer, **options) if recorded else None
    with recorder or contextlib.nullcontext():
        for step in range(STEPS):
            ids = range(step % BATCHES * EXAMPLES, (step % BATCHES + 1) * EXAMPLES)
            with recorder.step(ids) if recorder else contextlib.nullcontext():
                optimizer.zero_grad()
                loss = run(case, batches[step % BATCHES], model).mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
    state = [*losses, *model.state_dict().values(), torch.get_rng_state()]
    return {"model": model, "store": store, "state": state, "batches": batches, "seconds": time.perf_counter() - start}


def rows_wrong(case: Case) -> float | None:
    """The largest relative error of an example's gradient, against a backward pass of its own loss."""
    from pkexplain.gradients.watch import Watch

    torch.manual_seed(0)
    model = case.build().double().train()
    batch = case.batch(EXAMPLES)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return None
    tried = verification._Recorded(model, EXAMPLES)
    found = torch.zeros(EXAMPLES, sum(block.numel for block in tried.blocks), dtype=torch.float64)

    def add(position: int, gradients: Any) -> None:
        found[:, tried.blocks[position].span] += gradients.dense()

    names = [name for block in tried.blocks for name in block.parameters]
    parameters = [dict(model.named_parameters())[name] for name in names]
    watch = Watch(verify=False, axes=tried._inputs.axes)
    with tried._inputs.noting(EXAMPLES), tried.capture.during_backward(EXAMPLES, add, watch):
        each = run(case, batch, model)
        if case.losses is None:
            each.mean().backward()
            return None
        try:
            one_by_one = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in each]
        except RuntimeError:  # a checkpoint of the old kind knows backward() only
            return None
        each.mean().backward()
    if tried.capture.interacting:
        return None  # an example's share is defined otherwise
    true = (
        torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(parameters, grads, strict=True)
                    ]
                )
                for grads in one_by_one
            ]
        )
        / EXAMPLES
    )
    unsplit = set(tried.capture.unsplit)
    start = 0
    for name, parameter in zip(names, parameters, strict=True):
        if name in unsplit:
            true[:, start : start + parameter.numel()] = found[:, start : start + parameter.numel()] = 0
        start += parameter.numel()
    return float(((found - true).norm(dim=1) / true.norm(dim=1).clamp_min(1e-30)).max())


def unsplit_share(case: Case, autocast: bool) -> float | None:
    """The unsplit share of the gradient norm in float32, or under autocast in bfloat16; None if it does not run."""
    from pkexplain.gradients.watch import Watch

    def single(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    try:
        torch.manual_seed(0)
        model, batch = case.build().float().train(), case.batch(MORE)
        several = isinstance(batch, tuple)
        batch = tuple(map(single, batch)) if several else {n: single(v) for n, v in batch.items()}
        tried = verification._Recorded(model, MORE)
        watch = Watch(verify=False, axes=tried._inputs.axes)
        noting = tried._inputs.noting(MORE)
        with noting, tried.capture.during_backward(MORE, lambda *_: None, watch):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = run(case, batch, model).float().mean()
            loss.backward()
    except (PkexplainError, RuntimeError, TypeError):  # some models do not run under autocast
        return None
    sizes = {n: float(p.grad.to_dense().norm()) for n, p in model.named_parameters() if p.grad is not None}
    unsplit = np.linalg.norm([size for name, size in sizes.items() if name in tried.capture.unsplit])
    return float(unsplit / np.linalg.norm(list(sizes.values())))


def judge(case: Case) -> dict[str, Any]:
    try:
        plain = train(case, False)
        again = train(case, False)
    except Exception as error:
        return {"status": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    if not same(plain["state"], again["state"]):
        return {"status": "not built", "why": "its training differs from run to run"}
    found: dict[str, Any] = {"status": "crash"}
    try:
        recorded = train(case, True)
        found["changed"] = not same(plain["state"], recorded["state"])
        summaries = recorded["store"].trajectory().summaries
        splits = [summary.split for summary in summaries]
        shares = {n: max(s.unsplit.get(n, 0.0) for s in splits) for s in splits for n in s.unsplit}
        found |= {"unsplit": float(np.sqrt(sum(v * v for v in shares.values()))), "names": sorted(shares)[:4]}
        found |= {"gap": max(s.gap for s in splits), "interacting": any(s.interacting for s in splits)}
        found["why"] = "; ".join(f"{n}: {w}" for s in splits[:1] for n, w in list(s.reasons.items())[:2])
        found["rows"] = rows_wrong(case)
        found["float32"], found["autocast"] = unsplit_share(case, False), unsplit_share(case, True)
        query = recorded["batches"][0]
        query = tuple(v[:2] for v in query) if isinstance(query, tuple) else {n: v[:2] for n, v in query.items()}
        if isinstance(query, dict):
            query.pop("labels", None)
        output = pk.Custom(weighted_mean)
        explained = pk.Explainer(recorded["store"], recorded["model"]).explain(query, output=output)[0]
        failed = {c.name: c.value for c in explained.checks if not c.passed and c.name not in NOT_JUDGED}
        found["failed"] = failed
        wrong = found["rows"] is not None and not found["rows"] <= ROWS_WRONG
        found["status"] = (
            "changed"
            if found["changed"]
            else "wrong"
            if wrong and "split gap" not in failed
            else "check failed"
            if failed
            else "unsplit"
            if shares
            else "green"
        )
    except PkexplainError as error:
        found |= {"status": "refused", "why": f"{type(error).__name__}: {error}"[:300]}
    except Exception as error:
        where = traceback.format_exc().strip().splitlines()[-3:]
        found |= {"status": "crash", "why": f"{type(error).__name__}: {error} | {' '.join(where)}"[:500]}
    return found


def weighted_mean(prediction: torch.Tensor) -> torch.Tensor:
    """One smooth number of any output, on which every part of it has a say."""
    y = prediction.flatten(1)
    return (y * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)).mean(1)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.shape == y.shape and bool(((x == y) | (x != x) & (y != y)).all()) for x, y in zip(a, b, strict=True))


def child(family: str, name: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = judge(importlib.import_module(f"cases.{family}").CASES[name])
    pipe.send(result)


def measure(family: str, name: str) -> dict[str, Any]:
    here, there = multiprocessing.Pipe()
    start = time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=child, args=(family, name, there))
    process.start()
    there.close()
    result: dict[str, Any] = {"status": "time out"}
    try:
        if here.poll(LIMIT):
            result = here.recv()
    except EOFError:
        result = {"status": "crash", "why": "the process died"}
    process.kill()
    process.join()
    return {"family": family, "name": name, "seconds": time.perf_counter() - start, **result}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["report"]:
        lines = [line for file in arguments[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
        return report([json.loads(line) for line in lines if line.startswith("{")])
    families = [family for family in FAMILIES if not arguments or family in arguments]
    words = [word for word in arguments if word not in FAMILIES]
    results = []
    for family in families:
        cases = importlib.import_module(f"cases.{family}").CASES
        for name in cases:
            if not words or any(word in name for word in words):
                results.append(measure(family, name))
                print(json.dumps(results[-1]), flush=True)
    if not words and len(families) == len(FAMILIES):
        report(results)


def report(results: list[dict[str, Any]]) -> None:
    kinds = ("green", "unsplit", "refused", "check failed", "wrong", "changed", "crash", "time out")
    rows = []
    for family in FAMILIES:
        mine = [r for r in results if r["family"] == family and r["status"] != "not built"]
        rows.append(
            [family.replace("_", " "), str(len(mine)), *(str(sum(r["status"] == k for r in mine)) for k in kinds)]
        )
    tried = [r for r in results if r["status"] != "not built"]
    rows.append(["**all**", str(len(tried)), *(str(sum(r["status"] == k for r in tried)) for k in kinds)])
    shares = sorted(((r.get("unsplit", 0.0), r["name"], r.get("names", [])) for r in tried), reverse=True)
    models = [r.get("unsplit", 0.0) for r in tried if r["family"] in ("hugging_face", "timm_models")]
    largest = [f"{name} {share:.1%} ({', '.join(names)})" for share, name, names in shares[:10] if share > 0]
    refused = [f"{r['name']}: {r.get('why', '')}" for r in tried if r["status"] not in ("green", "unsplit")]
    good = sum(r["status"] in ("green", "unsplit") for r in tried) / max(len(tried), 1)
    text = [table(["family", "cases", *kinds], rows), ""]
    text.append(
        f"Green, or green with a named `unsplit` line: {good:.1%}. Share of the gradient norm that is unsplit, "
    )
    text.append(f"median over the Hugging Face and timm models: {np.median(models):.2%}; the largest: ")
    text.append(("; ".join(largest) or "none") + ".")
    for name, title in (("float32", "float32"), ("autocast", "autocast in bfloat16")):
        some = sorted(((r[name], r["name"]) for r in tried if r.get(name) is not None), reverse=True)
        worst = "; ".join(f"{case} {share:.1%}" for share, case in some[:10] if share > 0) or "none"
        text += [
            "",
            f"In {title}, {sum(share == 0 for share, _ in some)} of {len(some)} cases have a first step without ",
        ]
        text.append(f"an unsplit parameter, {sum(share <= 0.01 for share, _ in some)} at most 1% of the norm; {worst}.")
    text += ["", "Not green:", "", *(f"- {line}" for line in refused), "", f"{machine()}."]
    write("coverage", "\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])

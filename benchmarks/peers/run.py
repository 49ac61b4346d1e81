"""Run dattri, TRAK and kronfluence on the digits, models and subsets of this benchmark. 40 minutes, on one core.

Each peer gets a virtual environment of its own under build/peers. What was measured is kept there, and not measured
again until it is deleted; the table is printed, and the figures are written to RESULTS.json beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _lds import load_truth, measure

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "peers"
LIMIT_S = 600

REQUIREMENTS = {
    "dattri": ["dattri==0.3.0"],
    "trak": ["traker==0.3.2"],
    "kronfluence": ["kronfluence==1.0.1"],
}


@dataclass(frozen=True)
class Job:
    """A method of a peer on one model.

    Attributes:
        peer: A key of `REQUIREMENTS`.
        method: As the peer's script names it.
        title: What the table says.
        name: LR or MLP.
        models: Trained states that it reads.
        queries: Test digits that it scores, the first ones.
    """

    peer: str
    method: str
    title: str
    name: str
    models: int = 1
    queries: int = 500

    @property
    def stem(self) -> str:
        return f"{self.peer}-{self.method}-{self.name}"


def _jobs(name: str) -> list[Job]:
    cg_queries = 500 if name == "LR" else 50
    explicit = [
        Job("dattri", "if-explicit-0", "IF, explicit Hessian, no damping (default)", name),
        Job("dattri", "if-explicit-0.1", "IF, explicit Hessian, damping 0.1", name),
    ]
    return [
        *(explicit if name == "LR" else []),  # the Hessian of the MLP would take 48 GB
        Job("dattri", "if-cg-0", "IF, 10 steps of CG, no damping (default)", name, queries=cg_queries),
        Job("dattri", "if-cg-0.01", "IF, 10 steps of CG, damping 0.01", name, queries=cg_queries),
        Job("dattri", "if-cg-0.1", "IF, 10 steps of CG, damping 0.1", name, queries=cg_queries),
        Job("dattri", "ekfac-0", "EK-FAC, no damping (default)", name),
        Job("dattri", "ekfac-0.1", "EK-FAC, damping 0.1", name),
        Job("dattri", "trak-1", "TRAK-1, 512 dimensions (default)", name),
        Job("dattri", "trak-10", "TRAK-10, 512 dimensions (default)", name, models=10),
        Job("dattri", "tracin-10-projected", "TracIn, 10 checkpoints, 512 dimensions (default)", name, models=10),
        Job("dattri", "tracin-10", "TracIn, 10 checkpoints, not projected", name, models=10),
        Job("dattri", "grad-dot", "Grad-Dot, not projected", name),
        Job("dattri", "grad-cos", "Grad-Cos, not projected", name),
        Job("trak", "trak-1", "TRAK-1, 2,048 dimensions (default)", name),
        Job("trak", "trak-1-512", "TRAK-1, 512 dimensions", name),
        Job("trak", "trak-10-512", "TRAK-10, 512 dimensions", name, models=10),
        Job("trak", "trak-10", "TRAK-10, 2,048 dimensions (default)", name, models=10),
        Job("kronfluence", "ekfac", "EK-FAC, damping 1e-8 (default)", name),
        Job("kronfluence", "ekfac-heuristic", "EK-FAC, damping by its heuristic", name),
        Job("kronfluence", "identity", "identity", name),
    ]


def make_environment(peer: str) -> Path:
    """Install a peer where it disturbs nothing else, and return its interpreter."""
    folder = BUILD / "environments" / peer
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.exists():
        venv.create(folder, clear=True, with_pip=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *constraints]
        subprocess.run([*pip, "torch", "numpy", *REQUIREMENTS[peer]], check=True)
        stamp.touch()
    return python


def run(job: Job) -> None:
    """Score the queries in a process of its own, and keep the scores or say why there are none."""
    scores, failure = BUILD / f"{job.stem}.pt", BUILD / f"{job.stem}.failed"
    if scores.exists() or failure.exists():
        return
    print(f"{job.peer}, {job.name}: {job.title}", flush=True)
    script = [str(make_environment(job.peer)), str(HERE / f"run_{job.peer}.py")]
    command = [*script, str(BUILD / f"{job.name}.pt"), job.method, str(scores), "--queries", str(job.queries)]
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        failure.write_text(f"over {LIMIT_S} s", encoding="utf-8")
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()
        failure.write_text(last[-1] if last else f"ended with {done.returncode}", encoding="utf-8")


def figures(job: Job, truth: Path) -> dict:
    scores = BUILD / f"{job.stem}.pt"
    failure = BUILD / f"{job.stem}.failed"
    if not scores.exists():
        return {**asdict(job), "failed": failure.read_text(encoding="utf-8") if failure.exists() else "not measured"}
    kept = torch.load(scores, weights_only=True)
    return {**asdict(job), "lds": asdict(measure(kept["scores"], *load_truth(truth, job.name))), **kept["costs"]}


def row(found: dict) -> list[str]:
    head = [found["peer"], found["title"], found["name"]]
    if "failed" in found:
        return [*head, found["failed"], "", "", "", "", ""]
    score = found["lds"]
    lds = f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    if score["not_finite"]:
        lds += f", {score['not_finite']} not finite"
    seconds = [f"{found['set_up_s']:.1f}", f"{found['queries_s']:.1f}"]
    return [*head, lds, *seconds, f"{found['peak_mb']:,.0f}", str(found["models"]), str(found["queries"])]


def table(everything: list[dict]) -> str:
    head = ["peer", "method", "model", "LDS (95%)", "set-up, s", "queries, s", "peak, MB", "models", "queries"]
    lines = [head, ["---"] * 3 + ["---:"] * 6, *(row(found) for found in everything)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--truth", type=Path, default=ROOT / "build" / "benchmarks", help="folder with the retrainings")
    parser.add_argument("--collect", action="store_true", help="only the table of what is measured already")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if not (BUILD / "MLP.pt").exists():
        subprocess.run([sys.executable, str(HERE / "export.py"), str(BUILD)], check=True)
    jobs = [*_jobs("LR"), *_jobs("MLP")]
    for job in [] if args.collect else sorted(jobs, key=lambda job: job.models):  # the quick ones first
        run(job)
    everything = [figures(job, args.truth) for job in jobs]
    (HERE / "RESULTS.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    sys.path.insert(0, str(HERE.parent))
    from _figures import write

    write("peers", table(everything))


if __name__ == "__main__":
    main()

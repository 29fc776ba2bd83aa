"""Evaluate every protocol on every kind of method in one command, and time it.

    python benchmarks/protocols.py --data DATA --out protocols.json            # one structure of one image per data set
    python benchmarks/protocols.py --data DATA --out protocols.json --quick    # small images of six data sets

Methods: the default checkpoint, SAM-Med3D's architecture with random weights, all baselines and the control without a
prompt. The results folder with its ``report.html`` stays in ``--folder``. A run that was stopped resumes; its times are
then those of the last part alone and are not written.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from collect import ROOT, parser_of

from samed3d.evaluation.results import PromptStrategy, by_model, read_run, untrained
from samed3d.evaluation.statistics import click_curve
from samed3d.output import write_json

MODELS = ("default", "sam_med3d_b", "no_prompt:default", "baselines")
STRATEGIES = ("--protocol", "all", "--policy", "centre", "--prompt", "click", "--prompt", "box", "--clicks", "1,3,5")
LIMITS = ("--limit", "1", "--labels-per-case", "1")


def main() -> None:
    """Run it, time it, write one JSON."""
    parser = parser_of(__doc__, "protocols.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/protocols", help="what samed3d evaluate writes")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    begun = (options.folder / "parts").exists()
    if (options.folder / "results.json").exists():
        parser.error(f"--folder holds finished results, which leave nothing to time: {options.folder}")
    models = [argument for name in MODELS for argument in ("--model", name)]
    limits = ["--quick"] if options.quick else list(LIMITS)
    arguments = ["evaluate", "--data", str(options.data), *models, *STRATEGIES, *limits]
    arguments += ["--processes", str(options.processes)]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "samed3d", *arguments, "-o", str(options.folder), "--quiet"], cwd=ROOT, check=True
    )
    wall, spent = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    body: dict[str, Any] = {"command": " ".join(["samed3d", *arguments]).replace(str(options.data), "DATA") + " -o DIR"}
    if not begun:
        body |= {"wall_s": round(wall, 1), "processor_s": round(spent.ru_utime + spent.ru_stime, 1)}
    body["rows"] = rows_of(options.folder)
    write_json(options.out, body)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One entry per protocol, first prompt and model: Dice after the first and the last prompt."""
    run = read_run(folder)
    return [
        entry_of(strategy, model, rows)
        for strategy in run.strategies
        for model, rows in by_model(untrained(run.of(strategy))).items()
    ]


def entry_of(strategy: PromptStrategy, model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    curve = click_curve(rows)
    entry: dict[str, Any] = {"protocol": strategy.protocol, "prompt": strategy.prompt, "model": model}
    entry["subjects"] = curve[min(curve)].subjects
    entry["structures"] = len({(row["source"], row["case"], row["label"]) for row in rows})
    for name, click in (("first", min(curve)), ("last", max(curve))):
        ends = [round(curve[click].low, 4), round(curve[click].high, 4)]
        entry[name] = {"click": click, "mean": round(curve[click].mean, 4), "interval": ends}
    return entry


if __name__ == "__main__":
    main()

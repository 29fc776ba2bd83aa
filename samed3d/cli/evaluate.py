"""``samed3d evaluate``: its options. The work is in ``evaluation/run.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from samed3d.cli.options import Quiet, check_exists
from samed3d.errors import InputError


def evaluate(
    data: Annotated[list[Path], typer.Argument(help="Folders of labelled volumes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json, cases.csv and the report.")],
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint, .safetensors file or baseline; repeatable.")] = None,
    clicks: Annotated[str, typer.Option(metavar="N,N,...", help="After how many clicks to score.")] = "1,3,5",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with different clicks.")] = 1,
    split: Annotated[str, typer.Option(help="Which subjects: val, train or all.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Cases per data set; all without it.")] = None,
    labels_per_case: Annotated[int | None, typer.Option(min=1, help="Structures per case; all without it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure models with simulated clicks against labels."""
    try:
        counts = tuple(int(c) for c in clicks.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--clicks needs whole numbers from 1 separated by commas, got {clicks!r}")
    for folder in data:
        check_exists(folder, "data folder")
    from samed3d.evaluation.run import evaluate as run

    run(
        data,
        model or ["default"],
        output,
        clicks=counts,
        seeds=seeds,
        split=split,
        limit=limit,
        labels_per_case=labels_per_case,
        progress=not quiet and sys.stderr.isatty(),
    )
    if not quiet:
        typer.echo(f"results in {output}")

"""``samed3d evaluate``: its options. The work is in ``evaluation/run.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from samed3d.cli.options import Device, Quiet, check_exists
from samed3d.errors import InputError

_Several = list[str] | None


def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results.json, cases.csv, prompts.jsonl and the report.")
    ],
    data: Annotated[
        list[Path] | None, typer.Argument(help="Folders of labelled volumes or corpora; the same as --data.")
    ] = None,
    more_data: Annotated[
        list[Path] | None, typer.Option("--data", help="Folder of labelled volumes, or a corpus; repeatable.")
    ] = None,
    model: Annotated[
        _Several,
        typer.Option(
            help="Checkpoint, .safetensors file, architecture (random weights), baseline, baselines, no_prompt:NAME."
        ),
    ] = None,
    external: Annotated[
        _Several, typer.Option(help='Another program: "command {image} {prompts} {out}"; repeatable.')
    ] = None,
    server: Annotated[
        _Several, typer.Option(help="URL of a server that speaks the nnInteractive protocol; repeatable.")
    ] = None,
    protocol: Annotated[_Several, typer.Option(help="samed3d, another by name, or all; repeatable.")] = None,
    policy: Annotated[
        _Several, typer.Option(help="Users of protocol samed3d: uniform, centre, ritm, noisy or all; repeatable.")
    ] = None,
    prompt: Annotated[
        _Several, typer.Option(help="What comes first in protocol samed3d: click, box, scribble or all; repeatable.")
    ] = None,
    clicks: Annotated[str, typer.Option(metavar="N,N,...", help="After how many clicks to score.")] = "1,3,5",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with different clicks.")] = 1,
    split: Annotated[str, typer.Option(help="Which subjects: val, train or all.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Cases per data set; all without it.")] = None,
    labels_per_case: Annotated[int | None, typer.Option(min=1, help="Structures per case; all without it.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Of the surface Dice, mm; protocols with one of their own keep it.")
    ] = 2.0,
    surfaces: Annotated[
        bool, typer.Option("--surfaces/--no-surfaces", help="Measure surface Dice and HD95 too.")
    ] = True,
    processes: Annotated[int, typer.Option(min=1, help="Cases at once.")] = 1,
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Small cases of six data sets, one structure each.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html too.")] = True,
    quiet: Quiet = False,
) -> None:
    """Measure models with simulated clicks, boxes and scribbles against labels."""
    folders = _folders([*(data or []), *(more_data or [])])
    methods = [
        *(model or []),
        *(f"external:{command}" for command in external or []),
        *(f"server:{url}" for url in server or []),
    ]
    if _evaluate_automatic(folders, methods, output, split, limit, tolerance, device, quiet):
        return
    from samed3d.evaluation.report import PACKAGES
    from samed3d.evaluation.run import evaluate as run
    from samed3d.pages import check_installed

    if report:
        check_installed("a report (or give --no-report)", *PACKAGES)
    run(
        folders,
        methods or ["default"],
        output,
        clicks=_counts(clicks),
        seeds=seeds,
        split=split,
        limit=limit,
        labels_per_case=labels_per_case,
        protocols=protocol or ["samed3d"],
        policies=policy or ["centre"],
        prompts=prompt or ["click"],
        processes=processes,
        device=device,
        tolerance_mm=tolerance,
        surfaces=surfaces,
        quick=quick,
        progress=not quiet and sys.stderr.isatty(),
    )
    if report:
        from samed3d.evaluation.report import write_report

        write_report(output)
    if not quiet:
        typer.echo(f"results in {output}")


def _evaluate_automatic(
    folders: list[Path],
    models: list[str],
    output: Path,
    split: str,
    limit: int | None,
    tolerance_mm: float,
    device: str,
    quiet: bool,
) -> bool:
    """Each class of an automatic model, to which what concerns clicks does not apply; False where there is none.

    Raises:
        InputError: if there are other models beside it.
    """
    from samed3d.inference.sliding_window import is_semantic

    if not any(is_semantic(name) for name in models):
        return False
    if len(models) > 1:
        raise InputError(f"an automatic model is measured alone, got {len(models)} models; run evaluate once for each")
    from data_prep.categories import categorise
    from samed3d.evaluation.semantic import evaluate_automatic
    from samed3d.inference.predictor import pick_device

    def category_of(name: str, source: str) -> str:
        return categorise(name, source).name

    options = {"split": split, "limit": limit, "tolerance_mm": tolerance_mm, "device": pick_device(device)}
    evaluate_automatic(folders, models[0], output, category_of=category_of, **options)  # type: ignore[arg-type]
    if not quiet:
        typer.echo(f"results in {output}")
    return True


def _folders(given: list[Path]) -> list[Path]:
    if not given:
        raise InputError(
            "evaluate needs data: name a folder of labelled volumes, as in samed3d evaluate --data DATA --model default -o out"
        )
    for folder in given:
        check_exists(folder, "data folder")
    return given


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(c) for c in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--clicks needs whole numbers from 1 separated by commas, got {text!r}")
    return counts

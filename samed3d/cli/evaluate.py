"""``samed3d evaluate``: options of the evaluation in ``evaluation/run.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import Device, Paths, Quiet, Texts
from samed3d.errors import InputError
from samed3d.output import check_input

_Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for results.json, cases.csv, prompts.jsonl and the report.")
]
_Model = Annotated[
    Texts,
    typer.Option(
        help="Checkpoint, .safetensors file, architecture (random weights), baseline, baselines, no_prompt:NAME."
    ),
]
_Clicks = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="After how many clicks to score.", show_default="1,3,5")
]
_Seeds = Annotated[int | None, typer.Option(min=1, help="Repetitions with different clicks.", show_default="1")]
_Tolerance = Annotated[
    float, typer.Option(min=0.0, help="Tolerance of the surface Dice, mm; protocols with one of their own keep it.")
]
_Surfaces = Annotated[bool, typer.Option("--surfaces/--no-surfaces", help="Measure surface Dice and HD95 too.")]


def _several(help: str, *names: str) -> Any:
    return typer.Option(*names, help=f"{help}; repeatable.")


def evaluate(
    output: _Output,
    data: Annotated[Paths, typer.Argument(help="Folders of labelled volumes or corpora; the same as --data.")] = None,
    more_data: Annotated[Paths, _several("Folder of labelled volumes, or a corpus", "--data")] = None,
    model: _Model = None,
    external: Annotated[Texts, _several('Another program: "command {image} {prompts} {out}"')] = None,
    server: Annotated[Texts, _several("URL of a server that speaks the nnInteractive protocol")] = None,
    protocol: Annotated[Texts, _several("samed3d, another by name, or all")] = None,
    policy: Annotated[Texts, _several("Click policy of protocol samed3d: uniform, centre, ritm, noisy or all")] = None,
    prompt: Annotated[Texts, _several("First prompt of protocol samed3d: click, box, scribble or all")] = None,
    clicks: _Clicks = None,
    seeds: _Seeds = None,
    split: Annotated[str, typer.Option(help="Which subjects: val, train or all.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Cases per data set; all without it.")] = None,
    labels_per_case: Annotated[int | None, typer.Option(min=1, help="Structures per case; all without it.")] = None,
    tolerance: _Tolerance = 2.0,
    surfaces: _Surfaces = True,
    processes: Annotated[int, typer.Option(min=1, help="Cases at once.")] = 1,
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Small cases of six data sets, one structure each.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html too.")] = True,
    quiet: Quiet = False,
) -> None:
    """Evaluate models on labelled volumes with simulated prompts; semantic segmentation models without prompts."""
    models = [*(model or []), *(f"external:{c}" for c in external or []), *(f"server:{url}" for url in server or [])]
    from data_prep.categories import categorise
    from samed3d.evaluation.report import PACKAGES, summary_text, write_report
    from samed3d.evaluation.results import read_run
    from samed3d.evaluation.run import evaluate as run
    from samed3d.pages import check_installed

    if report:
        check_installed("a report (or give --no-report)", *PACKAGES)
    run(
        _folders([*(data or []), *(more_data or [])], processes),
        models or ["default"],
        output,
        clicks=_counts(clicks) if clicks is not None else None,
        seeds=seeds,
        split=split,
        limit=limit,
        labels_per_case=labels_per_case,
        protocols=protocol,
        policies=policy,
        prompts=prompt,
        processes=processes,
        device=device,
        tolerance_mm=tolerance,
        surfaces=surfaces,
        quick=quick,
        progress=not quiet and sys.stderr.isatty(),
        category_of=lambda name, source: categorise(name, source).name,
    )
    if report:
        write_report(output)
    if not quiet:
        typer.echo(summary_text(read_run(output)))
        typer.echo(f"results in {output}")


def _folders(given: list[Path], processes: int) -> list[Path]:
    """The data; for a folder in a layout that evaluation does not read itself, a corpus of it in the cache."""
    if not given:
        raise InputError(
            "evaluate needs data: name a folder of labelled volumes, as in "
            "samed3d evaluate --data DATA --model default -o out"
        )
    from data_prep.pipeline import cached_corpus
    from samed3d.evaluation.cases import kind_of

    found = []
    for folder in given:
        check_input(folder, "data folder")
        known = kind_of(folder) or (folder.is_dir() and any(kind_of(sub) for sub in folder.iterdir()))
        found.append(folder if known else cached_corpus(folder, jobs=processes))
    return found


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(c) for c in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--clicks needs whole numbers from 1 separated by commas, got {text!r}")
    return counts

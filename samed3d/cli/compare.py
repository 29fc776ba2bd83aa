"""``samed3d evaluate compare`` and ``samed3d evaluate report``: tables and pages of saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samed3d.cli.options import Quiet
from samed3d.output import check_input


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Results folders of samed3d evaluate, two or more; later ones minus earlier ones."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write the comparison as a page, for example compare.html."),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Show runs side by side that were not measured alike.")
    ] = False,
) -> None:
    """Put saved runs side by side, with a paired test where they hold the same structures."""
    for folder in runs:
        check_input(folder, "results folder")
    from samed3d.evaluation.compare import COMPARE_HTML, compare_runs, comparison_text, write_comparison

    comparison = compare_runs(runs, anyway=anyway)
    typer.echo(comparison_text(comparison))
    if output is not None:
        path = output / COMPARE_HTML if output.is_dir() or not output.suffix else output
        typer.echo(f"\npage in {write_comparison(comparison, path)}")


def report(
    run: Annotated[Path, typer.Argument(help="Results folder of samed3d evaluate.")],
    picture_seconds: Annotated[
        float, typer.Option(min=0, help="How long pictures of cases may take to be made; 0 makes none.")
    ] = 120.0,
    quiet: Quiet = False,
) -> None:
    """Make the report of a saved run anew."""
    check_input(run, "results folder")
    from samed3d.evaluation.report import write_report

    path = write_report(run, picture_seconds=picture_seconds)
    if not quiet:
        typer.echo(f"report in {path}")

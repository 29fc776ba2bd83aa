"""``samed3d segment --batch``: progress, what is printed, and the exit code. The work is in ``inference/batch.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from samed3d.errors import InputError


def segment_list(
    path: Path, folder: Path, model: str, device: str, format: str | None, space: str, *, quiet: bool
) -> None:
    """Segment every image of a list into a folder.

    Raises:
        InputError: if the list cannot be used, or an image of it failed; the others are done all the same.
    """
    from samed3d.devices import pick_device
    from samed3d.inference.batch import REPORT, read_jobs, run_jobs
    from samed3d.inference.mask_files import FORMATS
    from samed3d.models import load_promptable

    if format is not None and format not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    jobs = read_jobs(path, folder, format, space)
    pick_device(device)
    network = load_promptable(model)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = not quiet and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("segmenting", total=len(jobs))

        def told(job: Any, row: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=job.image.name)

        report = run_jobs(jobs, folder, network, model, device, format, told)
    if not quiet:
        kept = f", {report['kept']} kept from before" if report["kept"] else ""
        typer.echo(f"{report['done']} segmented{kept}, {report['failed']} failed; {folder / REPORT}")
    if report["failed"]:
        first = next(row for row in report["images"] if row["status"] == "failed")
        count = f"{report['failed']} of {len(jobs)} images"
        raise InputError(
            f"{count} failed, line {first['line']} first: {first['error']}; mend them and run the same command again"
        )

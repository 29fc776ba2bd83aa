"""``samed3d segment`` and ``samed3d demo``: their options and what they print. The work is in ``inference/session.py``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import Device, Model, Quiet, check_distinct, write_json
from samed3d.errors import InputError
from samed3d.prompts import Box, ObjectPrompts, Point, load_prompts, parse_numbers


def segment(
    image: Annotated[Path, typer.Argument(help="Volume: .nii .nii.gz .nrrd .mha .mhd, or a folder of DICOM files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask to write, in the image's own grid (same suffixes).")],
    point: Annotated[list[str] | None, typer.Option(metavar="I,J,K", help="A click on the object; repeatable.")] = None,
    negative_point: Annotated[list[str] | None, typer.Option(metavar="I,J,K", help="A click off the object; repeatable.")] = None,
    box: Annotated[list[str] | None, typer.Option(metavar="I0,J0,K0,I1,J1,K1", help="Lowest and highest corner, both inside.")] = None,
    space: Annotated[str, typer.Option(help="What the numbers are: ijk (voxels, x first, from 0) or ras (mm).")] = "ijk",
    prompts: Annotated[Path | None, typer.Option(help="Prompt file (JSON) instead of the options above; several objects.")] = None,
    model: Model = "default",
    probability: Annotated[Path | None, typer.Option(help="Also write the probability, float32.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a PNG: three slices with contour and prompts.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a JSON: versions, prompts, timings, volume.")] = None,
    device: Device = "auto",
    channel: Annotated[int | None, typer.Option(help="Which channel or frame of a 4D or RGB image, from 0.")] = None,
    series: Annotated[str | None, typer.Option(help="Which DICOM series of the folder (its UID or number).")] = None,
    quiet: Quiet = False,
) -> None:
    """A mask from clicks and boxes on one image.

    Boxes come first, then positive points, then negative points, each in the order given; a prompt file keeps its own order.
    """
    objects = _gather_prompts(point or [], negative_point or [], box or [], space, prompts)
    check_distinct({"the image": image, "--output": output, "--probability": probability, "--preview": preview, "--report": report})
    from samed3d.volume import SUFFIXES, check_output

    for path, suffixes in ((output, SUFFIXES), (probability, SUFFIXES), (preview, (".png",)), (report, (".json",))):
        if path is not None:
            check_output(path, suffixes=suffixes)
    from samed3d.inference.session import Session

    started = time.perf_counter()
    session = Session.open(image, model=model, device=device, channel=channel, series=series)
    session.add_all(objects)
    summary = {**session.report(), "seconds": round(time.perf_counter() - started, 3)}

    session.save(output)
    if probability is not None:
        session.save_probability(probability)
    if preview is not None:
        from samed3d.inference.preview import write_preview

        write_preview(preview, session.volume, session.labels, session.objects(), title=image.name)
    if report is not None:
        write_json(report, summary)
    if not quiet:
        _print_segment_summary(summary, output)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the volume, the masks and the picture.")] = Path("out/demo"),
    model: Model = "default",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated body.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Generate a body, click its organs, show Dice per click."""
    from samed3d.apps.demo import run_demo

    run_demo(output, model=model, seed=seed, device=device, quiet=quiet)


def _gather_prompts(points: list[str], negatives: list[str], boxes: list[str], space: str, file: Path | None) -> list[ObjectPrompts]:
    """The objects to segment, each with something positive.

    Raises:
        InputError: for no prompt, none positive, numbers that do not parse, or a file beside the options.
    """
    if file is not None:
        if points or negatives or boxes:
            raise InputError("--prompts cannot be combined with --point, --negative-point or --box; put them all in the file")
        objects = load_prompts(file)
    else:
        one = ObjectPrompts()
        for text in boxes:
            numbers = parse_numbers(text, 6, "--box")
            one.prompts.append(Box(numbers[:3], numbers[3:], space))  # type: ignore[arg-type]
        for texts, positive, flag in ((points, True, "--point"), (negatives, False, "--negative-point")):
            one.prompts.extend(Point(parse_numbers(t, 3, flag), positive, space) for t in texts)  # type: ignore[arg-type]
        if not one.prompts:
            raise InputError("segment needs at least one prompt; give --point I,J,K, --box I0,J0,K0,I1,J1,K1 or --prompts FILE")
        objects = [one]
    for entry in objects:
        if not entry.has_positive:
            count = len(entry.prompts)
            where = f"object {entry.id} ({entry.name}) of {file}" if file else "the object"
            raise InputError(f"{where} needs a positive point or a box, got {count} negative only; add --point I,J,K on the object")
    return objects


def _print_segment_summary(summary: dict[str, Any], output: Path) -> None:
    for entry in summary["objects"]:
        said = f"{entry['voxels']:,} voxels, {entry['mm3'] / 1000.0:,.1f} mL" if entry["voxels"] else "nothing found; add a prompt"
        typer.echo(f"{entry['name']}: {said}")
    typer.echo(f"mask in {output} ({summary['seconds']:.1f} s on {summary['device']})")

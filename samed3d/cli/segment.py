"""``samed3d segment`` and ``samed3d demo``: options and printed text. Read ``inference/session.py`` next."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import (
    Codes,
    Device,
    FillHoles,
    GrowMm,
    KeepLargest,
    MaskFormat,
    MinIslandMm3,
    Modality,
    Model,
    Quiet,
    SmoothMm,
    Texts,
    Untilt,
)
from samed3d.errors import InputError
from samed3d.masks import Cleaning
from samed3d.output import check_distinct, check_input, check_output, write_json
from samed3d.prompts import Mask, ObjectPrompts, checked_code, load_prompts, parse_prompts

Options = dict[str, Any]
"""How to open the image, as ``Session.open`` takes it."""
Outputs = dict[str, Path | None]
"""What else to write, by option."""
DEMO = Path("out/demo")
SUMMARY_OUTPUTS = {"--preview": (".png",), "--report": (".json",), "--session": (".json",)}


def segment(
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file to write; with --batch, a folder.")],
    image: Annotated[Path | None, typer.Argument(help="NIfTI, NRRD or MetaImage file, or DICOM folder.")] = None,
    point: Annotated[Texts, typer.Option(metavar="I,J,K", help="A click on the object; repeatable.")] = None,
    negative_point: Annotated[Texts, typer.Option(metavar="I,J,K", help="A click on the background.")] = None,
    box: Annotated[Texts, typer.Option(metavar="I0,J0,K0,I1,J1,K1", help="Both corners are inside the box.")] = None,
    scribble: Annotated[Texts, typer.Option(metavar="I,J,K;I,J,K;...", help="A stroke on the object.")] = None,
    negative_scribble: Annotated[Texts, typer.Option(metavar="I,J,K;...", help="A stroke on the background.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A mask to start from; the other prompts correct it.")] = None,
    space: Annotated[str, typer.Option(help="Positions are ijk (voxels, x first, from 0) or ras (mm).")] = "ijk",
    prompts: Annotated[Path | None, typer.Option(help="Prompt file (JSON) of one or more objects instead.")] = None,
    batch: Annotated[Path | None, typer.Option(help="Instead of IMAGE, a CSV with one line per image.")] = None,
    format: MaskFormat = None,
    model: Model = "default",
    probability: Annotated[Path | None, typer.Option(help="Also write the probability, float32.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a PNG: three slices, outlines, prompts.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a JSON: versions, prompts, timings, volume.")] = None,
    session: Annotated[Path | None, typer.Option(help="Also write the session (JSON), to be resumed later.")] = None,
    device: Device = "auto",
    channel: Annotated[int | None, typer.Option(help="Channel or frame of a 4D or RGB image, from 0.")] = None,
    series: Annotated[str | None, typer.Option(help="DICOM series of the folder (its UID or number).")] = None,
    modality: Modality = None,
    untilt: Untilt = False,
    min_island_mm3: MinIslandMm3 = 0.0,
    keep_largest: KeepLargest = False,
    fill_holes: FillHoles = False,
    smooth_mm: SmoothMm = 0.0,
    grow_mm: GrowMm = 0.0,
    code: Codes = None,
    quiet: Quiet = False,
) -> None:
    """Segment one image from clicks, boxes and strokes, or every image of a list.

    A mask to start from comes first, then boxes, then positive points and strokes, then negative ones, each in the
    order given; a prompt file keeps its own order.
    """
    cleaning = Cleaning(min_island_mm3, keep_largest, fill_holes, smooth_mm, grow_mm)
    typed = {"point": point, "negative_point": negative_point, "box": box}
    typed |= {"scribble": scribble, "negative_scribble": negative_scribble}
    prompted = any((*typed.values(), mask, prompts, code))
    also = {"--probability": probability, "--preview": preview, "--report": report, "--session": session}
    if batch is not None:
        changed = (channel is not None, series, modality, untilt, cleaning != Cleaning())
        if any((image, prompted, *also.values(), *changed)):
            allowed = "--output, --format, --space, --model, --device"
            raise InputError(f"--batch takes images and prompts from its list; give only {allowed} beside it")
        _segment_list(batch, output, model, device, format, space, quiet)
        return
    from samed3d.inference.sliding_window import is_semantic

    options: Options = {"model": model, "device": device, "channel": channel, "series": series, "untilt": untilt}
    if image is not None and is_semantic(model):
        summary = _segment_semantic(image, output, format, options, also, prompted, cleaning)
    else:
        objects = _gather_prompts(typed, mask, space, prompts)
        _code_objects(objects, code or [])
        options["modality"] = modality
        summary = _segment_objects(image, objects, output, format, options, also, cleaning)
    if not quiet:
        _print_summary(summary, output)


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    for entry in summary["objects"]:
        mm3 = entry["mm3"]
        size = f"{entry['voxels']:,} voxels, {f'{mm3 / 1000:,.1f} mL' if mm3 >= 100 else f'{mm3:.3g} mm³'}"
        typer.echo(f"{entry['name']}: {size if entry['voxels'] else 'nothing found; add a prompt'}")
    for note in summary["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"mask in {output} ({summary['seconds']:.1f} s on {summary['device']})")


def _segment_objects(
    image: Path | None,
    objects: list[ObjectPrompts],
    output: Path,
    format: str | None,
    options: Options,
    also: Outputs,
    cleaning: Cleaning,
) -> dict[str, Any]:
    """Segment prompted objects and write every file that was asked for; the session's report."""
    from samed3d.inference.mask_files import checked_format
    from samed3d.volume import SUFFIXES

    if image is None:
        raise InputError("segment needs an image: samed3d segment IMAGE --point I,J,K -o MASK")
    check_distinct({"the image": image, "--output": output, **also})
    checked_format(output, format)
    for name, path in also.items():
        if path is not None:
            check_output(path, suffixes=SUMMARY_OUTPUTS.get(name, SUFFIXES))
    from samed3d.inference.session import Session

    started = time.perf_counter()
    opened = Session.open(image, **options)
    opened.add_all(objects)
    if cleaning != Cleaning():
        for entry in opened.objects():
            if entry.voxels:
                opened.clean(cleaning, entry.id)
    summary = {**opened.report(), "seconds": round(time.perf_counter() - started, 3)}
    opened.export(output, format)
    if probability := also["--probability"]:
        opened.save_probability(probability)
    if preview := also["--preview"]:
        from samed3d.drawing import write_preview

        write_preview(preview, opened.volume, opened.labels, opened.objects(), title=image.name)
    if report := also["--report"]:
        write_json(report, summary)
    if session := also["--session"]:
        opened.save(session)
    return summary


def _segment_semantic(
    image: Path,
    output: Path,
    format: str | None,
    options: Options,
    also: Outputs,
    prompted: bool,
    cleaning: Cleaning,
) -> dict[str, Any]:
    """All classes of an image by a semantic segmentation model.

    Raises:
        InputError: for prompts, outputs that need prompts, or cleaning.
    """
    from samed3d.inference.sliding_window import segment_file

    model = f"model {options['model']!r} is automatic"
    if cleaning != Cleaning():
        raise InputError(f"{model}: clean its label map afterwards with samed3d clean")
    if unfit := ["a prompt"] * prompted + [name for name, path in also.items() if path and name != "--report"]:
        raise InputError(f"{model} and takes no prompts, got {', '.join(unfit)}; leave out what is for prompts")
    check_distinct({"the image": image, "--output": output, "--report": also["--report"]})
    summary = segment_file(image, output=output, format=format, **options)
    if also["--report"]:
        write_json(also["--report"], summary)
    return summary


def _segment_list(
    path: Path, folder: Path, model: str, device: str, format: str | None, space: str, quiet: bool
) -> None:
    """Segment every image of a list into a folder.

    Raises:
        InputError: if the list cannot be used, or an image of it failed; all others are segmented nevertheless.
    """
    if folder.is_file():
        raise InputError(f"--output must be a folder with --batch, got a file: {folder}")
    check_input(path, "batch list")
    from samed3d.devices import pick_device
    from samed3d.inference.batch import REPORT, read_jobs, run_jobs
    from samed3d.models import load_promptable
    from samed3d.volume.writing import MASK_FORMATS

    if format is not None and format not in MASK_FORMATS:
        raise InputError(f"--format must be one of {', '.join(MASK_FORMATS)}, got {format!r}")
    jobs = read_jobs(path, folder, format, space)
    pick_device(device)
    network = load_promptable(model)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = not quiet and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        bar = progress.add_task("segmenting", total=len(jobs))

        def advance(job: Any, row: dict[str, Any]) -> None:
            progress.update(bar, advance=1, description=job.image.name)

        report = run_jobs(jobs, folder, network, model, device, format, advance)
    if not quiet:
        kept = f", {report['kept']} kept from before" if report["kept"] else ""
        typer.echo(f"{report['done']} segmented{kept}, {report['failed']} failed; {folder / REPORT}")
    if report["failed"]:
        first = next(row for row in report["images"] if row["status"] == "failed")
        failed = f"{report['failed']} of {len(jobs)} images failed, line {first['line']} first: {first['error']}"
        raise InputError(f"{failed}; correct them and run the same command again")


def _gather_prompts(
    typed: dict[str, Texts], mask: Path | None = None, space: str = "ijk", file: Path | None = None
) -> list[ObjectPrompts]:
    """The objects to segment, each with a positive prompt, from options or from a prompt file.

    Raises:
        InputError: for no prompt, none positive, numbers that do not parse, or a file beside the options.
    """
    given = {key: found for key, found in typed.items() if found}
    if file is not None:
        if given or mask:
            options = "--point, --negative-point, --box, --scribble or --mask"
            raise InputError(f"--prompts cannot be combined with {options}; put all prompts in the file")
        objects = load_prompts(file)
    else:
        prompts = [*([Mask(mask)] if mask is not None else []), *parse_prompts(given, space, "--")]
        if not prompts:
            options = "--point I,J,K, --box I0,J0,K0,I1,J1,K1 or --prompts FILE"
            raise InputError(f"segment needs at least one prompt; give {options}")
        objects = [ObjectPrompts(prompts=prompts)]
    for entry in objects:
        entry.check_positive(f" of {file}" if file else "")
    return objects


def _code_objects(objects: list[ObjectPrompts], codes: list[str]) -> None:
    """Give objects the codes of ``--code``, by name or id.

    Raises:
        InputError: if a text is no code, or names no object.
    """
    for text in codes:
        who, _, code = text.partition("=")
        named = [o for o in objects if o.name == who] or [o for o in objects if str(o.id) == who]
        if not code or not named:
            known = ", ".join(f"{o.id} ({o.name})" for o in objects)
            raise InputError(f"--code must be OBJECT=SCHEME:VALUE:MEANING of one of {known}, got {text!r}")
        for entry in named:
            entry.code = checked_code(code, "--code")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for volume, masks, picture.")] = DEMO,
    model: Model = "default",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated body.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Generate a body, click its organs, show Dice per click."""
    from samed3d.apps.demo import run_demo

    run_demo(output, model=model, seed=seed, device=device, quiet=quiet)

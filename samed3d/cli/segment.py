"""``samed3d segment`` and ``samed3d demo``: their options and what they print. The work is in
``inference/session.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samed3d.cli.batch import segment_list
from samed3d.cli.options import Device, Model, Quiet, check_distinct, check_exists, write_json
from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple
from samed3d.prompts import Box, Mask, ObjectPrompts, Point, Scribble, load_prompts, parse_numbers

if TYPE_CHECKING:
    from samed3d.inference.session import Session


def segment(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Mask to write, in the image's own grid (same suffixes, .seg.nrrd, .dcm); batch: a folder.",
        ),
    ],
    image: Annotated[
        Path | None, typer.Argument(help="Volume: .nii .nii.gz .nrrd .mha .mhd, or a folder of DICOM files.")
    ] = None,
    point: Annotated[list[str] | None, typer.Option(metavar="I,J,K", help="A click on the object; repeatable.")] = None,
    negative_point: Annotated[
        list[str] | None, typer.Option(metavar="I,J,K", help="A click off the object; repeatable.")
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="I0,J0,K0,I1,J1,K1", help="Lowest and highest corner, both inside.")
    ] = None,
    scribble: Annotated[
        list[str] | None, typer.Option(metavar="I,J,K;I,J,K;...", help="A stroke on the object; repeatable.")
    ] = None,
    negative_scribble: Annotated[
        list[str] | None, typer.Option(metavar="I,J,K;...", help="A stroke off the object; repeatable.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A mask to start from, which the other prompts correct.")] = None,
    space: Annotated[
        str, typer.Option(help="What the numbers are: ijk (voxels, x first, from 0) or ras (mm).")
    ] = "ijk",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompt file (JSON) instead of the options above; several objects.")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="Instead of IMAGE, a CSV with a line per image; -o is then a folder.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="nifti, nrrd, mha, seg.nrrd, dicom-seg or rtstruct; by default the suffix says.")
    ] = None,
    model: Model = "default",
    probability: Annotated[Path | None, typer.Option(help="Also write the probability, float32.")] = None,
    preview: Annotated[
        Path | None, typer.Option(help="Also write a PNG: three slices with contour and prompts.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a JSON: versions, prompts, timings, volume.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="Also write the session (JSON), which Session.load and the app go on with.")
    ] = None,
    device: Device = "auto",
    channel: Annotated[int | None, typer.Option(help="Which channel or frame of a 4D or RGB image, from 0.")] = None,
    series: Annotated[str | None, typer.Option(help="Which DICOM series of the folder (its UID or number).")] = None,
    quiet: Quiet = False,
) -> None:
    """A mask from clicks, boxes and strokes on one image, or on every image of a list.

    A mask to start from comes first, then boxes, then positive points and strokes, then negative ones, each in the
    order given; a prompt file keeps its own order.
    """
    given = (point or [], negative_point or [], box or [])
    strokes = (scribble or [], negative_scribble or [], mask)
    if batch is not None:
        _segment_batch(
            batch,
            output,
            image,
            any((*given, *strokes, prompts, probability, preview, report, session, channel, series)),
        )
        segment_list(batch, output, model, device, format, space, quiet=quiet)
        return
    also = {"--probability": probability, "--preview": preview, "--report": report, "--session": session}
    if _segment_automatic(
        image, output, model, format, device, channel, series, also, any((*given, *strokes, prompts)), quiet
    ):
        return
    objects = _gather_prompts(*given, space, prompts, *strokes)
    if image is None:
        raise InputError("segment needs an image: samed3d segment IMAGE --point I,J,K -o MASK")
    _check_outputs(image, output, format, also)
    from samed3d.inference.session import Session

    started = time.perf_counter()
    opened = Session.open(image, model=model, device=device, channel=channel, series=series)
    opened.add_all(objects)
    summary = {**opened.report(), "seconds": round(time.perf_counter() - started, 3)}

    opened.export(output, format)
    _write_more(opened, image.name, summary, probability, preview, report, session)
    if not quiet:
        _print_segment_summary(summary, output)


def _segment_automatic(
    image: Path | None,
    output: Path,
    model: str,
    format: str | None,
    device: str,
    channel: int | None,
    series: str | None,
    also: dict[str, Path | None],
    prompted: bool,
    quiet: bool,
) -> bool:
    """All classes of an image where the model needs no prompt; False where it does.

    Raises:
        InputError: for prompts, or outputs that only prompts lead to.
    """
    from samed3d.inference.sliding_window import is_semantic, segment_file

    if image is None or not is_semantic(model):
        return False
    unfit = ["a prompt"] * prompted + [name for name, path in also.items() if path and name != "--report"]
    if unfit:
        raise InputError(
            f"model {model!r} is automatic and takes no prompts, got {', '.join(unfit)}; leave out what is for prompts"
        )
    report = also["--report"]
    check_distinct({"the image": image, "--output": output, "--report": report})
    summary = segment_file(image, model, output, format=format, device=device, channel=channel, series=series)
    if report is not None:
        write_json(report, summary)
    if not quiet:
        _print_segment_summary(summary, output)
    return True


def _check_outputs(image: Path, output: Path, format: str | None, also: dict[str, Path | None]) -> None:
    """Refuse what could not be written before anything is computed."""
    from samed3d.inference.mask_files import checked_format
    from samed3d.output import check_output
    from samed3d.volume import SUFFIXES

    check_distinct({"the image": image, "--output": output, **also})
    checked_format(output, format)
    suffixes = {"--probability": SUFFIXES, "--preview": (".png",), "--report": (".json",), "--session": (".json",)}
    for name, path in also.items():
        if path is not None:
            check_output(path, suffixes=suffixes[name])


def _write_more(
    opened: Session,
    title: str,
    summary: dict[str, Any],
    probability: Path | None,
    preview: Path | None,
    report: Path | None,
    session: Path | None,
) -> None:
    """The files beside the mask that were asked for."""
    if probability is not None:
        opened.save_probability(probability)
    if preview is not None:
        from samed3d.drawing import write_preview

        write_preview(preview, opened.volume, opened.labels, opened.objects(), title=title)
    if report is not None:
        write_json(report, summary)
    if session is not None:
        opened.save(session)


def _segment_batch(batch: Path, output: Path, image: Path | None, others: bool) -> None:
    """Refuse what has no meaning for a list.

    Raises:
        InputError: for an image or options of one image beside the list, or an output that is a file.
    """
    if image is not None or others:
        raise InputError(
            "--batch takes images and prompts from its list; give only --output, --format, --space, --model, --device beside it"
        )
    if output.is_file():
        raise InputError(f"--output must be a folder with --batch, got a file: {output}")
    check_exists(batch, "batch list")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the volume, the masks and the picture.")
    ] = Path("out/demo"),
    model: Model = "default",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated body.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Generate a body, click its organs, show Dice per click."""
    from samed3d.apps.demo import run_demo

    run_demo(output, model=model, seed=seed, device=device, quiet=quiet)


def _gather_prompts(
    points: list[str],
    negatives: list[str],
    boxes: list[str],
    space: str,
    file: Path | None,
    scribbles: Sequence[str] = (),
    negative_scribbles: Sequence[str] = (),
    mask: Path | None = None,
) -> list[ObjectPrompts]:
    """The objects to segment, each with something positive.

    Raises:
        InputError: for no prompt, none positive, numbers that do not parse, or a file beside the options.
    """
    if file is not None:
        if points or negatives or boxes or scribbles or negative_scribbles or mask:
            raise InputError(
                "--prompts cannot be combined with --point, --negative-point, --box, --scribble or --mask; put all in the file"
            )
        objects = load_prompts(file)
    else:
        one = ObjectPrompts(prompts=[] if mask is None else [Mask(mask)])
        for text in boxes:
            numbers = parse_numbers(text, 6, "--box")
            one.prompts.append(Box(numbers[:3], numbers[3:], space))  # type: ignore[arg-type]
        for texts, strokes, positive, flag in (
            (points, scribbles, True, ("--point", "--scribble")),
            (negatives, negative_scribbles, False, ("--negative-point", "--negative-scribble")),
        ):
            one.prompts.extend(Point(parse_numbers(t, 3, flag[0]), positive, space) for t in texts)  # type: ignore[arg-type]
            one.prompts.extend(Scribble(_path(t, flag[1]), positive, space=space) for t in strokes)
        if not one.prompts:
            raise InputError(
                "segment needs at least one prompt; give --point I,J,K, --box I0,J0,K0,I1,J1,K1 or --prompts FILE"
            )
        objects = [one]
    for entry in objects:
        if not entry.has_positive:
            count = len(entry.prompts)
            where = f"object {entry.id} ({entry.name}) of {file}" if file else "the object"
            raise InputError(
                f"{where} needs a positive point or a box, got {count} negative only; add --point I,J,K on the object"
            )
    return objects


def _path(text: str, flag: str) -> tuple[Triple, ...]:
    """``"1,2,3;4,5,6"`` as positions."""
    return tuple(as_triple(parse_numbers(part, 3, flag)) for part in text.split(";") if part)


def _print_segment_summary(summary: dict[str, Any], output: Path) -> None:
    for entry in summary["objects"]:
        said = (
            f"{entry['voxels']:,} voxels, {entry['mm3'] / 1000.0:,.1f} mL"
            if entry["voxels"]
            else "nothing found; add a prompt"
        )
        typer.echo(f"{entry['name']}: {said}")
    typer.echo(f"mask in {output} ({summary['seconds']:.1f} s on {summary['device']})")

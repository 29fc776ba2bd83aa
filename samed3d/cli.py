"""The command line: every command of ``samed3d``, ``python -m samed3d``, ``infer.py`` and ``train.py``.

Here are the options and what is printed; the work is elsewhere, and imported inside the commands, so that ``--help`` answers at once.
Exit codes: 0 done, 2 the user's input (one line on stderr), 1 our fault (one line, or the traceback with ``--debug``), 130 interrupted.
Read ``inference/session.py`` next for what ``segment`` does, ``training/loop.py`` for ``train``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.errors import InputError
from samed3d.prompts import Box, ObjectPrompts, Point, load_prompts, parse_numbers

app = typer.Typer(
    name="samed3d",
    help="Fully-3D promptable segmentation. Every command also takes --debug, which shows the traceback of an internal error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# A file system that refuses is the user's to mend, whatever was being written.
_USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_INTERRUPTED = 130

# Commands of two words. Their first is a command as well, which takes any number of folders, so that no group can hold them.
_TWO_WORDS = ("prepare info",)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda.")]
Model = Annotated[str, typer.Option(help="Shipped checkpoint, or a .safetensors file.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if " ".join(arguments[:2]) in _TWO_WORDS:
        arguments[:2] = [" ".join(arguments[:2])]
    _set_up_logging(arguments)
    try:
        result = app(arguments, prog_name="samed3d", standalone_mode=False)
        if result == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            return _fail("interrupted", _INTERRUPTED)
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if message := getattr(error, "format_message", None):  # typer's own errors: unknown option, missing argument
            return _fail(f"{message()} (see samed3d --help)", 2) if message() else 2  # empty: the help was asked for and is printed
        if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
            return _fail(f"{error.strerror}: {error.filename or 'a file that was being written'}", 2)
        if debug:
            raise
        return _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1)


@app.command()
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
    _check_distinct({"the image": image, "--output": output, "--probability": probability, "--preview": preview, "--report": report})
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

        write_preview(preview, session.volume, session.labels, session.objects, title=image.name)
    if report is not None:
        _write_json(report, summary)
    if not quiet:
        _print_segment_summary(summary, output)


@app.command()
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file; without it, the defaults of samed3d/config.py.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. optim.lr=1e-4.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of run.folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a promptable model with simulated clicks."""
    from samed3d.config import TrainConfig, load_config

    settings = load_config(TrainConfig, config, set_ or [])
    from samed3d.training.loop import train as run

    folder = run(settings, resume=resume, quiet=quiet)
    if not quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(f"run in {folder}")


@app.command()
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
        _check_exists(folder, "data folder")
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


@app.command()
def models() -> None:
    """List the architectures and the shipped checkpoints."""
    from rich.console import Console
    from rich.table import Table

    from samed3d.models import list_models
    from samed3d.models.weights import list_checkpoints

    table = Table("architecture", "parameters", "crop (zyx)", "spacing", "prompts", "clicks kept", box=None)
    for name in list_models():
        parameters, spec = _measure_model(name)
        spacing = "any" if spec.spacing_mm is None else f"{spec.spacing_mm:g} mm"
        crop = "x".join(str(n) for n in spec.input_shape_zyx)
        table.add_row(name, f"{parameters / 1e6:,.1f} M", crop, spacing, ", ".join(sorted(spec.prompts)), spec.click_memory)
    Console().print(table)
    typer.echo(f"checkpoints: {', '.join(list_checkpoints()) or 'none shipped'}")


@app.command("import-weights")
def import_weights(
    source: Annotated[Path, typer.Argument(help="Upstream checkpoint (.pth). Nothing in it is executed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    model: Annotated[str, typer.Option(help="The architecture it belongs to.")] = "sam_med3d_b",
    quiet: Quiet = False,
) -> None:
    """Convert a SAM-Med3D training checkpoint to our format."""
    from samed3d.models import create_model
    from samed3d.models.weights import import_upstream, load_state_strict, save_weights
    from samed3d.volume import check_output

    check_output(output, suffixes=(".safetensors",))
    state = import_upstream(source)
    network = create_model(model)
    load_state_strict(network, state)
    save_weights(network, output, {"imported_from": source.name})
    if not quiet:
        typer.echo(f"{len(state)} tensors of {model} written to {output}")


@app.command()
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


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="Folders of labelled volumes, or of such folders; or the word synthetic.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corpus; an unfinished or earlier one is gone on with.")],
    format_: Annotated[str | None, typer.Option("--format", help="Layout of the sources; recognised without it.")] = None,
    image_pattern: Annotated[str | None, typer.Option(help="Where images are in plain folders, e.g. 'images/{case}.nii.gz'.")] = None,
    label_pattern: Annotated[str | None, typer.Option(help="Where labels are, e.g. 'labels/{case}.nii.gz'.")] = None,
    rules: Annotated[str | None, typer.Option(help="Masks to keep: published (default) or lenient (default for synthetic).")] = None,
    rule: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change one rule, e.g. min_side_mm=5; repeatable.")] = None,
    licensed_only: Annotated[bool, typer.Option("--licensed-only", help="Leave out sources without a clear licence.")] = False,
    spacing: Annotated[
        float | None, typer.Option(min=0.001, help="Resample to cubic voxels of this edge in mm; native without it.")
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=16, help="Coarsen volumes whose longest side has more voxels.")] = None,
    storage: Annotated[str, typer.Option(help="b2nd (chunked, read by crops) or npz (read whole; needs numpy only).")] = "b2nd",
    repair_geometry: Annotated[bool, typer.Option("--repair-geometry", help="Mend images and labels whose grids disagree.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 takes one per processor.")] = 0,
    cluster: Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler that does the work instead.")] = None,
    kind: Annotated[str, typer.Option(help="synthetic: phantom, shapes, cells, blobs, nested, tubes, mixture, labelmaps.")] = "shapes",
    count: Annotated[int, typer.Option(min=1, help="synthetic: number of cases.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="synthetic: seed.")] = 0,
    size: Annotated[int, typer.Option(min=16, help="synthetic: voxels of the longest side.")] = 128,
    label_maps: Annotated[list[Path] | None, typer.Option(help="synthetic: sources whose label maps are painted; repeatable.")] = None,
    quiet: Quiet = False,
) -> int:
    """Build a training corpus from labelled volumes; samed3d prepare info CORPUS shows one.

    Exits with 2 if an input could not be used; the rest is done. An interrupted run goes on when it is started again.
    """
    from data_prep.clean import rules_from
    from data_prep.convert import Settings
    from data_prep.pipeline import prepare as run

    generated, folders = None, [folder for folder in sources if folder != Path("synthetic")]
    for folder in folders:
        _check_exists(folder, "data set")
    if len(folders) < len(sources):
        from data_prep.synthetic import SyntheticReader

        generated = SyntheticReader(kind, count, seed, size, label_maps or [])
    chosen = rules_from(rules or ("published" if folders else "lenient"), rule or [])
    settings = Settings(chosen, spacing, max_side, storage, repair_geometry)
    options: dict[str, Any] = {
        "source_format": format_,
        "patterns": (image_pattern, label_pattern),
        "generated": generated,
        "licensed_only": licensed_only,
    }
    shown = not quiet and sys.stderr.isatty()
    result = run(folders, output, settings, **options, jobs=jobs or os.cpu_count() or 1, cluster=cluster, progress=shown)
    for problem in result.failed:
        typer.echo(f"samed3d: refused {problem.path}: {' '.join(problem.reason.split())}", err=True)
    if not quiet:
        typer.echo(result.summary())
    return 2 if result.failed else 0


@app.command("prepare info", hidden=True)
def prepare_info(
    corpus: Annotated[Path, typer.Argument(help="Folder of a corpus.")],
    examples: Annotated[int, typer.Option(min=0, help="Pictures per category on the page; 0 writes no page.")] = 2,
    quiet: Quiet = False,
) -> None:
    """What is in a corpus: the tables, and CORPUS/overview.html with pictures."""
    from data_prep.overview import show

    show(corpus, examples, quiet=quiet)


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


def _check_exists(path: Path, what: str) -> None:
    if not path.exists():
        raise InputError(f"{what} does not exist: {path}")


def _check_distinct(paths: dict[str, Path | None]) -> None:
    """That no output overwrites the image or another output."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        other = seen.setdefault(path.resolve(), name) if path is not None else name
        if other != name:
            raise InputError(f"{other} and {name} must be different files, got {path} for both")


def _write_json(path: Path, body: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"--report cannot be written to {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _measure_model(name: str) -> tuple[int, Any]:
    """Parameter count and spec, without the memory of the weights."""
    import torch

    from samed3d.models import create_model

    with torch.device("meta"):
        network = create_model(name)
    return sum(p.numel() for p in network.parameters()), network.spec


def _print_segment_summary(summary: dict[str, Any], output: Path) -> None:
    for entry in summary["objects"]:
        said = f"{entry['voxels']:,} voxels, {entry['mm3'] / 1000.0:,.1f} mL" if entry["voxels"] else "nothing found; add a prompt"
        typer.echo(f"{entry['name']}: {said}")
    typer.echo(f"mask in {output} ({summary['seconds']:.1f} s on {summary['device']})")


def _set_up_logging(arguments: list[str]) -> None:
    """Long jobs say what they do wherever they write to; the others only to a terminal, so that an error stays one line."""
    long_job = arguments[:1] and arguments[0] in ("train", "evaluate", "prepare")
    quiet = "--quiet" in arguments or "-q" in arguments
    logger = logging.getLogger("samed3d")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("samed3d: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if not quiet and (long_job or sys.stderr.isatty()) else logging.ERROR if quiet else logging.WARNING)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(f"samed3d: {line}" if code == 1 else f"samed3d: error: {line}", err=True)
    return code

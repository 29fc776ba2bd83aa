"""``samed3d prepare`` and ``samed3d prepare info``: their options. The work is in ``data_prep/pipeline.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import Paths, Quiet, Texts, Untilt
from samed3d.output import check_input


def prepare(
    sources: Annotated[list[Path], typer.Argument(help="Folders of labelled volumes; or the word synthetic.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corpus; an earlier one is resumed.")],
    format_: Annotated[str | None, typer.Option("--format", help="Layout of the sources. [default: found]")] = None,
    image_pattern: Annotated[str | None, typer.Option(help="Images, e.g. 'images/{case}.nii.gz'.")] = None,
    label_pattern: Annotated[str | None, typer.Option(help="Labels, e.g. 'labels/{case}.nii.gz'.")] = None,
    rules: Annotated[
        str | None, typer.Option(help="Masks to keep: published (default) or lenient (default for synthetic).")
    ] = None,
    rule: Annotated[Texts, typer.Option(metavar="NAME=VALUE", help="Change one rule, e.g. min_side_mm=5.")] = None,
    licensed_only: Annotated[
        bool, typer.Option("--licensed-only", help="Leave out sources without a clear licence.")
    ] = False,
    spacing: Annotated[
        float | None, typer.Option(min=0.001, help="Resample to cubic voxels of this edge in mm. [default: native]")
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=16, help="Coarsen volumes with longer sides, in voxels.")] = None,
    storage: Annotated[str, typer.Option(help="b2nd (chunked, read by crops) or npz (read whole).")] = "b2nd",
    repair_geometry: Annotated[
        bool, typer.Option("--repair-geometry", help="Repair images and labels whose grids disagree.")
    ] = False,
    untilt: Untilt = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 takes one per processor.")] = 0,
    cluster: Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler to use.")] = None,
    kind: Annotated[
        str, typer.Option(help="synthetic: phantom, shapes, cells, blobs, nested, tubes, mixture, labelmaps.")
    ] = "shapes",
    count: Annotated[int, typer.Option(min=1, help="synthetic: number of cases.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="synthetic: seed.")] = 0,
    size: Annotated[int, typer.Option(min=16, help="synthetic: voxels of the longest side.")] = 128,
    label_maps: Annotated[Paths, typer.Option(help="synthetic: sources whose label maps are painted.")] = None,
    quiet: Quiet = False,
) -> int:
    """Build a training corpus from labelled volumes; samed3d prepare info CORPUS shows one.

    Exits with 2 if an input could not be used; the rest is done. An interrupted run is resumed by the same command.
    """
    from data_prep.clean import rules_from
    from data_prep.convert import Settings
    from data_prep.pipeline import prepare as run

    generated, folders = None, [folder for folder in sources if folder != Path("synthetic")]
    for folder in folders:
        check_input(folder, "data set")
    if len(folders) < len(sources):
        from data_prep.synthetic import SyntheticReader

        generated = SyntheticReader(kind, count, seed, size, label_maps or [])
    chosen = rules_from(rules or ("published" if folders else "lenient"), rule or [])
    settings = Settings(chosen, spacing, max_side, storage, repair_geometry)
    options: dict[str, Any] = dict(source_format=format_, patterns=(image_pattern, label_pattern), generated=generated)
    options |= dict(licensed_only=licensed_only, untilt=untilt, jobs=jobs or os.cpu_count() or 1, cluster=cluster)
    result = run(folders, output, settings, **options, progress=not quiet and sys.stderr.isatty())
    for problem in result.failed:
        typer.echo(f"samed3d: refused {problem.path}: {' '.join(problem.reason.split())}", err=True)
    if not quiet:
        typer.echo(result.summary())
    return 2 if result.failed else 0


def prepare_info(
    corpus: Annotated[Path, typer.Argument(help="Folder of a corpus.")],
    examples: Annotated[int, typer.Option(min=0, help="Pictures per category on the page; 0 writes no page.")] = 2,
    quiet: Quiet = False,
) -> None:
    """What is in a corpus: the tables, and CORPUS/overview.html with pictures."""
    from data_prep.overview import show

    show(corpus, examples, quiet=quiet)

"""``samed3d clean`` and ``samed3d measure``: finished masks and label maps."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import FillHoles, GrowMm, KeepLargest, MinIslandMm3, Quiet, SmoothMm
from samed3d.errors import InputError
from samed3d.output import check_output, check_spares, write_json, write_text


def clean(
    mask: Annotated[Path, typer.Argument(help="Mask or label map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    min_island_mm3: MinIslandMm3 = 0.0,
    keep_largest: KeepLargest = False,
    fill_holes: FillHoles = False,
    smooth_mm: SmoothMm = 0.0,
    grow_mm: GrowMm = 0.0,
    quiet: Quiet = False,
) -> None:
    """Clean every structure of a label map, in the order of the options above; one that grows takes background only."""
    import numpy as np

    from samed3d.masks import Cleaning, clean_labels
    from samed3d.volume import SUFFIXES, write_mask
    from samed3d.volume.label_maps import read_label_map

    cleaning = Cleaning(min_island_mm3, keep_largest, fill_holes, smooth_mm, grow_mm)
    if cleaning == Cleaning():
        raise InputError("clean needs something to do: --keep-largest, --fill-holes, --min-island-mm3, --smooth-mm ...")
    check_output(output, suffixes=SUFFIXES)
    check_spares(output, mask)
    labels, grid = read_label_map(mask)
    cleaned = clean_labels(labels, grid.spacing_zyx_mm, cleaning)
    if not cleaned.any():
        raise InputError(f"cleaning would leave nothing of {mask}; use smaller values")
    write_mask(output, cleaned, grid)
    if not quiet:
        for value in np.unique(labels[labels > 0]):
            before, after = (int(np.count_nonzero(array == value)) for array in (labels, cleaned))
            typer.echo(f"label {value}: {before:,} voxels before, {after:,} after")
        typer.echo(f"cleaned mask in {output}")


def measure(
    image: Annotated[Path, typer.Argument(help="The image, for intensities.")],
    mask: Annotated[Path, typer.Argument(help="Mask or label map on its grid.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write them to a .csv or .json.")] = None,
    series: Annotated[str | None, typer.Option(help="DICOM series of the folder (its UID or number).")] = None,
    quiet: Quiet = False,
) -> None:
    """Volume, axial diameters and intensities of every structure of a label map."""
    from rich.console import Console
    from rich.table import Table
    from scipy.ndimage import find_objects

    from samed3d.masks import measure_mask
    from samed3d.volume import read_volume
    from samed3d.volume.label_maps import read_label_on

    if output is not None:
        check_output(output, suffixes=(".csv", ".json"))
        check_spares(output, image)
        check_spares(output, mask)
    volume = read_volume(image, series=series)
    labels = read_label_on(mask, volume.grid, volume.source)
    rows: list[dict[str, Any]] = [
        {"label": value, **measure_mask(labels == value, volume.grid, volume.array)}
        for value, box in enumerate(find_objects(labels), start=1)
        if box is not None
    ]
    if not quiet:
        table = Table(*rows[0], box=None)
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in row.values()))
        Console(width=140).print(table)
    if output is not None and output.suffix.lower() == ".json":
        write_json(output, {"image": str(image), "mask": str(mask), "structures": rows})
    elif output is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(output, text.getvalue())

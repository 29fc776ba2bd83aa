"""Reading label maps: whole numbers, on the grid of their image or brought onto it."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import GRID_TOLERANCE, Grid, corners_apart_mm
from samed3d.output import check_input
from samed3d.volume.files import count_volumes, read_file
from samed3d.volume.itk import open_header

logger = logging.getLogger(__name__)


class EmptyLabelError(InputError):
    """A label map without a labelled voxel: bad for a whole case, normal for one structure of many."""


def segment_names(path: str | Path) -> list[dict[int, str]]:
    """For each layer of a 3D Slicer segmentation (``.seg.nrrd``) the names of its values; none for other files."""
    if not str(path).lower().endswith(".seg.nrrd") or not Path(path).is_file():
        return []
    reader = open_header(Path(path))
    layers: list[dict[int, str]] = [{} for _ in range(reader.GetNumberOfComponents())]
    number = 0
    while reader.HasMetaDataKey(f"Segment{number}_LabelValue"):
        keys = [f"Segment{number}_{key}" for key in ("LabelValue", "Layer", "Name")]
        given = [reader.GetMetaData(key) if reader.HasMetaDataKey(key) else "" for key in keys]
        value, layer, name = given[0], given[1] or "0", given[2] or f"segment {number + 1}"
        if not (value.isdigit() and layer.isdigit() and int(layer) < len(layers)):
            raise InputError(f"{keys[0]} and {keys[1]} must be a value and a layer, got {value}, {layer}: {path}")
        layers[int(layer)][int(value)] = name
        number += 1
    return layers if any(layers) else []


def merged_values(layers: list[dict[int, str]]) -> dict[tuple[int, int], int]:
    """The value of each (layer, value) in one label map: its own, or a running number where two layers share one."""
    keys = [(layer, value) for layer, names in enumerate(layers) for value in names]
    distinct = len({value for _, value in keys}) == len(keys)
    return {key: key[1] if distinct else number for number, key in enumerate(keys, start=1)}


def read_label_map(path: str | Path, layer: int | None = None, *, overlaps: bool = False) -> tuple[NDArray, Grid]:
    """Read a label map.

    Args:
        path: The file.
        layer: Which layer of a ``.seg.nrrd``; None makes one map of all (``merged_values``).
        overlaps: Whether its segments may overlap in that map: the last one counts.

    Returns:
        (D, H, W) labels in the smallest of uint8, uint16 and uint32, and their grid. Whole numbers that are stored as
        floating point are accepted with a warning.

    Raises:
        InputError: if the file is missing, damaged, not 3D, empty (all zero), negative, or holds fractions; or if
            segments overlap and may not.
    """
    path = Path(path)
    check_input(path, "label", folder=False)
    volumes = count_volumes(path)
    if volumes > 1:
        raise InputError(f"label must be 3D, got 4D with {volumes} volumes: {path}; save each volume as its own label")
    names = segment_names(path)
    if layer is None and len(names) > 1:
        array, grid, notes = _merged(path, names, overlaps)
    else:
        array, grid, notes = read_file(path, layer)
    for note in notes:
        logger.warning("%s: %s", path, note)
    return whole_numbers(array, str(path)), grid


def _merged(path: Path, names: list[dict[int, str]], overlaps: bool) -> tuple[NDArray, Grid, tuple[str, ...]]:
    numbers = merged_values(names)
    array, grid, notes = read_file(path, 0)
    merged = np.zeros(array.shape, np.uint16)
    for layer in range(len(names)):
        array = read_file(path, layer)[0] if layer else array
        if not overlaps and (merged[array > 0] > 0).any():
            raise InputError(
                f"structures must not overlap in one label map, got segments that do: {path}; samed3d prepare keeps "
                "them apart"
            )
        for value in names[layer]:
            merged[array == value] = numbers[layer, value]
    return merged, grid, notes


def whole_numbers(array: NDArray, name: str) -> NDArray:
    """A label array as the smallest unsigned type that holds it.

    Args:
        array: (D, H, W) of any type.
        name: What to call it in messages.

    Raises:
        InputError: if it is empty, negative, not finite, or holds fractions.
    """
    if array.dtype.kind not in "biuf":
        raise InputError(f"label must hold whole numbers, got {array.dtype}: {name}")
    if array.dtype.kind == "f":
        for plane in array:  # by slices, to keep the temporaries small
            wrong = plane[(plane != np.rint(plane)) | ~np.isfinite(plane)]
            if wrong.size:
                raise InputError(
                    f"label must hold whole numbers, got {float(wrong[0]):g}: {name}; threshold or round it first"
                )
        logger.warning(
            "label is stored as floating point; its values are whole numbers and are taken as such: %s", name
        )
    low, high = int(array.min()), int(array.max())
    if low < 0:
        raise InputError(f"label must not be negative, got {low}: {name}; map its values to 0 (background) and above")
    if high == 0:
        raise EmptyLabelError(f"label is empty, every voxel is 0: {name}; leave the case out")
    if high > np.iinfo(np.uint32).max:
        raise InputError(f"label values must be below 2^32, got {high}: {name}; renumber them")
    small = np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.uint32
    return array.astype(small, copy=False)


def read_label_on(
    path: str | Path,
    grid: Grid,
    image: str,
    *,
    mismatch: Literal["refuse", "repair", "resample"] = "refuse",
    layer: int | None = None,
    overlaps: bool = False,
) -> NDArray:
    """A label map on the grid of its image.

    A label whose voxels are the image's own, in another storage order (flipped or permuted axes, as its header states),
    is put into the image's order.

    Args:
        path: The label map.
        grid: The image's grid.
        image: The image, for messages.
        mismatch: What to do with a label on other voxels. ``"repair"``: a label of the image's size and axes takes the
            image's grid voxel for voxel (its header is held to be wrong), any other is resampled by position, nearest
            voxel. ``"resample"``: always by position.
        layer: As ``read_label_map``, like ``overlaps``.
        overlaps: See there.

    Returns:
        (D, H, W) unsigned integers.

    Raises:
        InputError: if the label cannot be read, is on other voxels and may not be, or lies outside the image.
    """
    array, own = read_label_map(path, layer, overlaps=overlaps)
    difference = grid_difference(grid, own)
    if not difference:
        return array
    to_image = np.linalg.inv(grid.affine_lps) @ own.affine_lps  # from the label's ijk to the image's
    if _same_voxels(to_image, own, grid):
        logger.info("label is put into the storage order of its image: %s", path)
        return resample_labels(array, own, grid)
    if mismatch == "refuse":
        raise InputError(
            f"image and label must share one grid: {difference}: {image} and {path}; correct them, or give "
            "--repair-geometry to samed3d prepare"
        )
    if mismatch == "repair" and grid.shape_zyx == own.shape_zyx and same_axes(grid, own):
        logger.warning("label takes the grid of its image (%s): %s", difference, path)
        return array
    placed = resample_labels(array, own, grid)
    if not placed.any():
        raise InputError(
            f"label lies outside its image ({difference}): {image} and {path}; it was drawn on another one"
        )
    logger.warning("label is resampled onto its image (%s): %s", difference, path)
    return placed


def same_axes(one: Grid, other: Grid) -> bool:
    """Whether i, j and k of both grids run the same way (within 45 degrees): neither is flipped or permuted."""
    cosines = np.reshape(one.direction_lps, (3, 3)).T @ np.reshape(other.direction_lps, (3, 3))
    return bool((np.diag(cosines) > np.sqrt(0.5)).all())


def _same_voxels(to_image: NDArray[np.float64], own: Grid, grid: Grid) -> bool:
    """Whether a label's corners are the image's corners, in another order."""
    ends = [np.array(list(itertools.product(*((0, n - 1) for n in g.size_ijk)))) for g in (own, grid)]
    placed = ends[0] @ to_image[:3, :3].T + to_image[:3, 3]
    off_mm = np.abs(placed - np.rint(placed)) * grid.spacing_xyz_mm
    same = {tuple(corner) for corner in np.rint(placed).astype(int).tolist()} == set(map(tuple, ends[1].tolist()))
    return same and float(off_mm.max()) <= GRID_TOLERANCE * min(grid.spacing_xyz_mm)


def grid_difference(one: Grid, other: Grid) -> str:
    """What keeps two grids from being the same, in words; empty where they agree (see ``GRID_TOLERANCE``)."""
    if one.shape_zyx != other.shape_zyx:
        sizes = (" x ".join(map(str, grid.size_ijk)) for grid in (one, other))
        return f"sizes (i, j, k) are {' and '.join(sizes)}"
    apart = corners_apart_mm(one.affine_ras, other.affine_ras, one.size_ijk)
    if apart <= GRID_TOLERANCE * min(one.spacing_xyz_mm):
        return ""
    return f"same size, but positions differ by up to {apart:.3g} mm"


def resample_labels(array: NDArray, grid: Grid, onto: Grid) -> NDArray:
    """A label map on another grid by physical position, nearest voxel; 0 outside. Exact where the two lattices
    coincide.

    Args:
        array: (D, H, W) integer labels on ``grid``.
        grid: Where they are.
        onto: Where they are wanted.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing_xyz_mm)
    image.SetOrigin(grid.origin_lps_mm)
    image.SetDirection(grid.direction_lps)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(onto.size_ijk)
    resampler.SetOutputSpacing(onto.spacing_xyz_mm)
    resampler.SetOutputOrigin(onto.origin_lps_mm)
    resampler.SetOutputDirection(onto.direction_lps)
    resampler.SetInterpolator(sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(resampler.Execute(image))

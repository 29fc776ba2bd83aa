"""One case from its files: images on one grid, labels brought onto it or refused, structures packed into layers that do
not overlap.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import LabelLayer
from samed3d.errors import InputError
from samed3d.geometry import Grid, bounding_region
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import EmptyLabelError, count_volumes, grid_difference, read_label_map, resample_labels

logger = logging.getLogger(__name__)


def read_image(path: str | Path) -> Volume:
    """A 3D image of one channel.

    Raises:
        InputError: as ``read_volume``; a 4D file is refused in words that fit a dataset.
    """
    if not Path(path).is_file():
        raise InputError(f"image does not exist: {path}")
    if (volumes := count_volumes(path)) > 1:
        raise InputError(
            f"image must be 3D, got 4D with {volumes} volumes: {path}; save each as its own file (CASE_0000, CASE_0001, ...), "
            "or use --format msd where dataset.json lists the file itself"
        )
    return read_volume(path)


def read_images(named: list[tuple[str, str]], *, repair_geometry: bool = False) -> list[tuple[str, Volume]]:
    """The channels of one case.

    Args:
        named: (channel name, path) of each.
        repair_geometry: Put a channel of the same size on the first one's grid where their headers differ.

    Raises:
        InputError: if a channel cannot be read, or its grid is not the first one's.
    """
    images = [(name, read_image(path)) for name, path in named]
    first = images[0][1] if images else None
    for position, (name, volume) in enumerate(images[1:], start=1):
        assert first is not None
        if difference := grid_difference(first.grid, volume.grid):
            if not repair_geometry or first.grid.shape_zyx != volume.grid.shape_zyx:
                remedy = (
                    "resample it"
                    if first.grid.shape_zyx != volume.grid.shape_zyx
                    else "resample it, or give --repair-geometry"
                )
                raise InputError(
                    f"channels must share one grid: {difference}: {first.source} and {volume.source}; {remedy}"
                )
            logger.warning("%s takes the grid of %s", volume.source, first.source)
            images[position] = (name, replace(volume, grid=first.grid))
    return images


def read_label_on(grid: Grid, path: str | Path, image: str, *, repair_geometry: bool = False) -> NDArray:
    """A label map on the grid of its image.

    Args:
        grid: The image's grid.
        path: The label map.
        image: The image, for messages.
        repair_geometry: Mend a mismatch instead of refusing it: a label of the image's size takes the image's grid
            voxel for voxel (its header is held to be wrong), one of another size is resampled by position, nearest
            voxel.

    Returns:
        (D, H, W) unsigned integers.

    Raises:
        InputError: if the label cannot be read, or is on another grid; with ``repair_geometry``, if nothing of it lies
            in the image.
    """
    array, own = read_label_map(path)
    return put_on(grid, array, own, str(path), image, repair_geometry=repair_geometry)


def put_on(grid: Grid, array: NDArray, own: Grid, label: str, image: str, *, repair_geometry: bool = False) -> NDArray:
    """A label array from its own grid to the image's; see ``read_label_on``."""
    difference = grid_difference(grid, own)
    if not difference:
        return array
    if not repair_geometry:
        raise InputError(
            f"image and label must share one grid: {difference}: {image} and {label}; correct them, or give --repair-geometry"
        )
    if grid.shape_zyx == own.shape_zyx:
        logger.warning("label takes the grid of its image (%s): %s", difference, label)
        return array
    mended = resample_labels(array, own, grid)
    if not mended.any():
        raise InputError(f"label lies outside its image ({difference}): {image} and {label}; it cannot be repaired")
    logger.warning("label is resampled onto its image (%s): %s", difference, label)
    return mended


def single_structure(array: NDArray, label: str) -> NDArray[np.bool_]:
    """A label map that must hold one structure as a mask.

    Raises:
        InputError: if it holds several values beside 0.
    """
    values = present_values(array)
    if len(values) > 1:
        raise InputError(f"label of one structure must hold one value beside 0, got {_listed(values)}: {label}")
    return array != 0


def pack_layers(masks: Iterable[tuple[str, NDArray[np.bool_]]], shape_zyx: tuple[int, int, int]) -> list[LabelLayer]:
    """Masks as label layers: each goes into the first layer where it overlaps nothing. Holds one mask at a time beside
    the layers.

    Args:
        masks: (name, (D, H, W) mask); a name that comes twice is one structure.
        shape_zyx: Shape of every mask.

    Raises:
        InputError: if there is no voxel in any of them.
    """
    layers: list[LabelLayer] = []
    value_of: dict[str, int] = {}
    for name, mask in masks:
        box = bounding_region(mask).slices
        voxels = mask[box]
        if not voxels.size:
            continue
        value = value_of.setdefault(name, len(value_of) + 1)
        layer = next((known for known in layers if _free(known.array[box], voxels, value)), None)
        if layer is None:
            layer = LabelLayer(np.zeros(shape_zyx, np.uint8), {})
            layers.append(layer)
        if value > np.iinfo(layer.array.dtype).max:
            layer.array = layer.array.astype(np.uint16)
        np.copyto(layer.array[box], value, where=voxels, casting="unsafe")
        layer.names[value] = name
    if not layers:
        raise EmptyLabelError("label is empty, no structure has a voxel; leave the case out")
    return layers


def _free(held: NDArray, voxels: NDArray[np.bool_], value: int) -> bool:
    """Whether the voxels hold nothing but, at most, ``value`` itself."""
    return not ((held != 0) & (held != value) & voxels).any()


def present_values(array: NDArray) -> list[int]:
    """The values in an integer label map, ascending, without 0; slice by slice, so that no large temporary is made."""
    found: set[int] = set()
    for plane in array:
        if array.dtype.itemsize <= 2:
            found.update(np.flatnonzero(np.bincount(plane.reshape(-1))).tolist())
        else:
            found.update(np.unique(plane).tolist())
    return sorted(found - {0})


def check_named(values: list[int], names: Iterable[int], label: str, where: str) -> None:
    """That every value in a label map has a name.

    Raises:
        InputError: otherwise.
    """
    if unnamed := sorted(set(values) - set(names)):
        raise InputError(
            f"label holds values that {where} does not name: {_listed(unnamed)}: {label}; add them to its labels"
        )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")

"""Another voxel grid over the same box: images by a triangle filter as wide as the step, labels by the nearest voxel. Numpy and scipy only.

The same weights as a training crop's (``samed3d/crops.py``), one axis after the other, so that no large temporary arises beside the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import IntTriple, Triple


def target_shape(shape_zyx: IntTriple, spacing_zyx_mm: Triple, spacing_mm: float | None, max_side: int | None) -> IntTriple:
    """Voxels along each axis on cubic voxels of ``spacing_mm``, with axes of more than ``max_side`` voxels coarsened after that."""
    wanted = [max(1, round(n * s / spacing_mm)) if spacing_mm else n for n, s in zip(shape_zyx, spacing_zyx_mm, strict=True)]
    if max_side:
        wanted = [-(-n // -(-n // max_side)) for n in wanted]
    return (wanted[0], wanted[1], wanted[2])


def resample_image(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) image on ``shape_zyx`` voxels; its own type, rounded where that is an integer."""
    result = array
    for axis in range(3):
        result = _along(result, axis, shape_zyx[axis])
    if result is array or array.dtype.kind == "f":
        return result
    limits = np.iinfo(array.dtype)
    return np.clip(np.round(result, out=result), limits.min, limits.max, out=result).astype(array.dtype)


def resample_labels(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) label map on ``shape_zyx`` voxels; no value is mixed with another."""
    if array.shape == shape_zyx:
        return array
    index = [np.clip(np.round(_centres(n, m)).astype(int), 0, n - 1) for n, m in zip(array.shape, shape_zyx, strict=True)]
    return array[np.ix_(*index)]


def _centres(size: int, count: int) -> NDArray[np.floating]:
    """Where the centres of ``count`` new voxels lie on an axis of ``size`` voxels."""
    return (np.arange(count) + 0.5) * (size / count) - 0.5


def _along(array: NDArray, axis: int, count: int) -> NDArray:
    size = array.shape[axis]
    if count == size:
        return array
    weights = _weights(size, count)
    moved = np.moveaxis(array, axis, 0)
    result = np.empty((count, *moved.shape[1:]), np.float32)
    for plane in range(moved.shape[1]):  # float32 copies of one plane at a time
        result[:, plane] = weights @ np.ascontiguousarray(moved[:, plane], dtype=np.float32)
    return np.moveaxis(result, 0, axis)


def _weights(size: int, count: int):  # type: ignore[no-untyped-def]
    """Sparse (count, size) matrix of the triangle filter."""
    from scipy.sparse import csr_matrix

    width = max(1.0, size / count)
    centres = np.clip(_centres(size, count), 0, size - 1)
    reach = int(np.ceil(width))
    columns = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 2)
    values = np.clip(1.0 - np.abs(columns - centres[:, None]) / width, 0.0, None) * ((columns >= 0) & (columns < size))
    values /= values.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(count), columns.shape[1])
    return csr_matrix((values.ravel().astype(np.float32), (rows, np.clip(columns, 0, size - 1).ravel())), shape=(count, size))

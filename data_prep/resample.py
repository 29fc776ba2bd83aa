"""Another voxel grid over the same box: images by a triangle filter as wide as the step, labels by the nearest voxel.
Numpy and scipy only.

The same weights as a training crop's (``samed3d/crops.py``), plane by plane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import IntTriple, Triple


def target_shape(
    shape_zyx: IntTriple, spacing_zyx_mm: Triple, spacing_mm: float | None, max_side: int | None
) -> IntTriple:
    """Voxels along each axis on cubic voxels of ``spacing_mm``, with axes of more than ``max_side`` voxels coarsened
    after that.
    """
    wanted = [
        max(1, round(n * s / spacing_mm)) if spacing_mm else n for n, s in zip(shape_zyx, spacing_zyx_mm, strict=True)
    ]
    if max_side:
        wanted = [-(-n // -(-n // max_side)) for n in wanted]
    return (wanted[0], wanted[1], wanted[2])


def resample_image(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) image on ``shape_zyx`` voxels; its own type, rounded where that is an integer.

    Works plane by plane, in the order that handles fewer planes: neither a float copy of the volume nor a large
    temporary is made.
    """
    if array.shape == shape_zyx:
        return array
    across, down = (_weights(array.shape[axis], shape_zyx[axis]) for axis in (2, 1))
    across_dense = np.ascontiguousarray(across.toarray().T)

    def in_plane(plane: NDArray) -> NDArray:
        if plane.shape[0] != shape_zyx[1]:
            plane = down @ plane
        return plane @ across_dense if plane.shape[1] != shape_zyx[2] else plane

    mix_first = shape_zyx[0] < array.shape[0]
    held: dict[int, NDArray] = {}
    along = _weights(array.shape[0], shape_zyx[0])
    result = np.empty(shape_zyx, array.dtype)
    for z in range(shape_zyx[0]):
        sources = along.indices[along.indptr[z] : along.indptr[z + 1]].tolist()
        shares = along.data[along.indptr[z] : along.indptr[z + 1]]
        held = {i: held[i] if i in held else _plane(array, i, None if mix_first else in_plane) for i in sources}
        mixed = held[sources[0]] * shares[0]
        for i, share in zip(sources[1:], shares[1:], strict=True):
            mixed += held[i] * share
        if mix_first:
            mixed = in_plane(mixed)
        if array.dtype.kind != "f":  # a mean never leaves the range of its parts: no clipping
            np.rint(mixed, out=mixed)
        result[z] = mixed
    return result


def resample_labels(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) label map on ``shape_zyx`` voxels; no value is mixed with another."""
    if array.shape == shape_zyx:
        return array
    z, y, x = (
        np.clip(np.round(_centres(n, m)).astype(int), 0, n - 1) for n, m in zip(array.shape, shape_zyx, strict=True)
    )
    result = np.empty(shape_zyx, array.dtype)
    for target, source in enumerate(z.tolist()):
        same = target > 0 and source == z[target - 1]
        result[target] = result[target - 1] if same else np.take(np.take(array[source], y, axis=0), x, axis=1)
    return result


def _plane(array: NDArray, z: int, change: Callable[[NDArray], NDArray] | None) -> NDArray:
    plane = np.ascontiguousarray(array[z], dtype=np.float32)
    return plane if change is None else change(plane)


def _centres(size: int, count: int) -> NDArray[np.floating]:
    """Where the centres of ``count`` new voxels lie on an axis of ``size`` voxels."""
    return (np.arange(count) + 0.5) * (size / count) - 0.5


def _weights(size: int, count: int) -> Any:
    """Sparse (count, size) matrix of the triangle filter, float32, without stored zeros."""
    from scipy.sparse import csr_matrix

    width = max(1.0, size / count)
    centres = np.clip(_centres(size, count), 0, size - 1)
    reach = int(np.ceil(width))
    columns = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 2)
    values = np.clip(1.0 - np.abs(columns - centres[:, None]) / width, 0.0, None) * ((columns >= 0) & (columns < size))
    values /= values.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(count), columns.shape[1])
    matrix = csr_matrix(
        (values.ravel().astype(np.float32), (rows, np.clip(columns, 0, size - 1).ravel())), shape=(count, size)
    )
    matrix.eliminate_zeros()
    return matrix

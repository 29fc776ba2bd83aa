"""Resampling along the axes: triangle-filter weights, nearest-voxel crops, and whole volumes at another size.

Numpy only; ``resize_image`` needs scipy. A training or inference crop (``crops.py``) applies the same weights with
torch to the part of a volume under the crop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import CropFrame, IntTriple, Triple, as_triple


def axis_weights(positions: NDArray[np.floating], size: int, step: float) -> NDArray[np.floating]:
    """(N, size) weights that sample a line of ``size`` voxels at (N,) positions, ``step`` voxels apart; rows sum to 1.

    They interpolate linearly, or are a triangle filter as wide as the step (no aliasing). Beyond the ends of the line
    its last voxel counts.
    """
    inside = positions.clip(0, size - 1)
    voxels = np.arange(size, dtype=positions.dtype)
    weights = (1.0 - np.abs(voxels - inside[:, None]) / max(1.0, step)).clip(min=0)
    return weights / weights.sum(axis=1, keepdims=True)


def nearest_crop(array: NDArray, frame: CropFrame) -> NDArray:
    """The (D, H, W) label map or mask on a frame, nearest voxel; 0 outside. Reads only what lies under the frame.

    A centre exactly between two voxels takes the higher one, as in ITK.
    """
    index, inside, part = [], [], []
    for axis, size in enumerate(array.shape):
        at = frame.origin_zyx_vox[axis] + (np.arange(frame.shape_zyx[axis]) + 0.5) * frame.step_zyx_vox[axis] - 0.5
        voxel = np.clip(np.floor(at + 0.5).astype(int), 0, size - 1)
        part.append(slice(int(voxel[0]), int(voxel[-1]) + 1))
        index.append(voxel - voxel[0])
        inside.append((at >= -0.5) & (at < size - 0.5))
    crop: NDArray = array[tuple(part)][np.ix_(*index)]
    for axis, flags in enumerate(inside):
        if not flags.all():
            np.moveaxis(crop, axis, 0)[~flags] = 0
    return crop


def target_shape(
    shape_zyx: IntTriple, spacing_zyx_mm: Triple, spacing_mm: float | None, max_side: int | None
) -> IntTriple:
    """Voxels along each axis on cubic voxels of ``spacing_mm`` (None keeps them), then with axes of more than
    ``max_side`` voxels coarsened.
    """
    wanted = [
        max(1, round(n * s / spacing_mm)) if spacing_mm else n for n, s in zip(shape_zyx, spacing_zyx_mm, strict=True)
    ]
    if max_side:
        wanted = [-(-n // -(-n // max_side)) for n in wanted]
    return (wanted[0], wanted[1], wanted[2])


def resize_labels(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) label map on ``shape_zyx`` voxels of the same box; no value is mixed with another."""
    if array.shape == shape_zyx:
        return array
    steps = as_triple([n / m for n, m in zip(array.shape, shape_zyx, strict=True)])
    return nearest_crop(array, CropFrame((0.0, 0.0, 0.0), steps, shape_zyx))


def resize_image(array: NDArray, shape_zyx: IntTriple) -> NDArray:
    """A (D, H, W) image on ``shape_zyx`` voxels of the same box; its own type, rounded where that is an integer.

    Works plane by plane, in the order that handles fewer planes: neither a float copy of the volume nor a large
    temporary is made.
    """
    if array.shape == shape_zyx:
        return array
    along, down, across = (_sparse_weights(n, m) for n, m in zip(array.shape, shape_zyx, strict=True))
    across_dense = np.ascontiguousarray(across.toarray().T)

    def in_plane(plane: NDArray) -> NDArray:
        if plane.shape[0] != shape_zyx[1]:
            plane = down @ plane
        return plane @ across_dense if plane.shape[1] != shape_zyx[2] else plane

    mix_first = shape_zyx[0] < array.shape[0]
    held: dict[int, NDArray] = {}
    result = np.empty(shape_zyx, array.dtype)
    for z in range(shape_zyx[0]):
        sources = along.indices[along.indptr[z] : along.indptr[z + 1]].tolist()
        shares = along.data[along.indptr[z] : along.indptr[z + 1]]
        planes = {i: np.ascontiguousarray(array[i], dtype=np.float32) for i in sources if i not in held}
        held = {i: held[i] if i in held else planes[i] if mix_first else in_plane(planes[i]) for i in sources}
        mixed = held[sources[0]] * shares[0]
        for i, share in zip(sources[1:], shares[1:], strict=True):
            mixed += held[i] * share
        if mix_first:
            mixed = in_plane(mixed)
        if array.dtype.kind != "f":  # a mean never leaves the range of its parts: no clipping
            np.rint(mixed, out=mixed)
        result[z] = mixed
    return result


def _sparse_weights(size: int, count: int) -> Any:
    """``axis_weights`` from ``size`` voxels to ``count`` on the same line, as a sparse float32 matrix."""
    from scipy.sparse import csr_matrix

    positions = (np.arange(count) + 0.5) * (size / count) - 0.5
    return csr_matrix(axis_weights(positions, size, size / count).astype(np.float32))

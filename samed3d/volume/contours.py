"""Planar contours to voxels: a voxel belongs to the structure if its centre lies inside by the even-odd rule. Numpy only.

The rule is the one of radiotherapy contours: a contour inside another cuts a hole, one inside that an island, and the two sides of a
"keyhole" channel cancel. A polygon may be given in any direction. Used by ``volume/dicom_labels.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid

# A contour must lie in one slice: its points may leave the slice's plane by this share of the distance between slices.
_PLANE_TOLERANCE = 0.25


def fill_contours(contours_lps_mm: Iterable[NDArray], grid: Grid, name: str) -> NDArray[np.bool_]:
    """The voxels of an image inside closed planar contours.

    Args:
        contours_lps_mm: (N, 3) polygons in DICOM patient coordinates (LPS, mm), each in the plane of one slice of the image.
        grid: The image's grid.
        name: The structure, for messages.

    Returns:
        (D, H, W) mask. Parts of a contour outside the image are cut off.

    Raises:
        InputError: if a contour is not parallel to the slices, lies between two of them, or none of them touches the image.
    """
    to_ijk = np.linalg.inv(grid.affine_ras) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    depth, height, width = grid.shape_zyx
    toggles: dict[int, NDArray[np.bool_]] = {}
    outside = 0
    for points in contours_lps_mm:
        ijk = points @ to_ijk[:3, :3].T + to_ijk[:3, 3]
        middle = round(float(ijk[:, 2].mean()))
        off = float(np.abs(ijk[:, 2] - middle).max())
        if off > _PLANE_TOLERANCE:
            raise InputError(
                f"contours of {name!r} must lie in the slices of the image, one is {off:.2f} slices away; "
                "they were drawn on another series, or need to be resampled"
            )
        if not 0 <= middle < depth:
            outside += 1
            continue
        plane = toggles.setdefault(middle, np.zeros((height, width + 1), dtype=bool))
        toggle_polygon(plane, ijk[:, :2])
    if outside and not toggles:
        raise InputError(f"contours of {name!r} lie outside the image; they were drawn on another series")
    mask = np.zeros(grid.shape_zyx, dtype=bool)
    for k, plane in toggles.items():
        mask[k] = np.logical_xor.accumulate(plane, axis=1)[:, :width]
    return mask


def toggle_polygon(plane: NDArray[np.bool_], points_ij: NDArray) -> None:
    """Mark where a polygon's edges cross the rows of voxel centres; the running exclusive-or along each row is the filled polygon.

    Args:
        plane: (H, W + 1) marks, changed in place. Several polygons in one plane combine by the even-odd rule.
        points_ij: (N, 2) corners in voxel indices.
    """
    height, last = plane.shape[0], plane.shape[1] - 1
    following = np.roll(points_ij, -1, axis=0)
    for (i0, j0), (i1, j1) in zip(points_ij.tolist(), following.tolist(), strict=True):
        if j0 > j1:
            i0, j0, i1, j1 = i1, j1, i0, j0
        # Half-open in j, so that a corner on a row counts once and a horizontal edge never.
        rows = np.arange(max(0, math.ceil(j0)), min(height, math.ceil(j1)))
        if rows.size:
            crossing = i0 + (rows - j0) * ((i1 - i0) / (j1 - j0))
            plane[rows, np.clip(np.ceil(crossing), 0, last).astype(np.intp)] ^= True

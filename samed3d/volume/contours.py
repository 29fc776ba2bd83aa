"""Planar contours to voxels and back: a voxel belongs to a structure if its centre lies inside by the even-odd rule,
as radiotherapy contours have it: a contour inside another cuts a hole, one inside that fills it again.
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
        contours_lps_mm: (N, 3) polygons in DICOM patient coordinates (LPS, mm), each in the plane of one slice of the
            image.
        grid: The image's grid.
        name: The structure, for messages.

    Returns:
        (D, H, W) mask. Parts of a contour outside the image are cut off.

    Raises:
        InputError: if a contour is not parallel to the slices, lies between two of them, or none of them touches the
            image.
    """
    to_ijk = np.linalg.inv(grid.affine_lps)
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
    """Mark where a polygon's edges cross the rows of voxel centres; the cumulative exclusive-or along each row is the
    filled polygon.

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


# Directions of travel in (row, column) along the cracks between pixels, with the inside on the right hand (rows run
# down), clockwise.
_TURNS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def trace_contours(plane: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed outlines of a mask, half-way between the pixels inside and those outside; filling them gives exactly the
    mask back.

    Args:
        plane: (H, W) mask.

    Returns:
        (N, 2) corners in voxel indices (column i, row j) per outline, holes included; pixels that touch at a corner
        only are apart.
    """
    padded = np.pad(plane, 1).astype(np.int8)
    down, right = np.diff(padded, axis=0), np.diff(padded, axis=1)
    # Each crack as (corner row, corner column, direction): corner (r, c) is the upper left corner of padded pixel (r,
    # c).
    cracks: set[tuple[int, int, int]] = set()
    for where, steps in ((np.argwhere(down > 0) + [1, 0], 0), (np.argwhere(right < 0) + [0, 1], 1)):
        cracks |= {(int(r), int(c), steps) for r, c in where}
    for where, steps in ((np.argwhere(down < 0) + [1, 1], 2), (np.argwhere(right > 0) + [1, 1], 3)):
        cracks |= {(int(r), int(c), steps) for r, c in where}
    outlines = []
    while cracks:
        row, column, way = next(iter(cracks))
        corners = []
        while (row, column, way) in cracks:
            cracks.remove((row, column, way))
            step = _TURNS[way]
            corners.append(
                (column + step[1] / 2 - 1.5, row + step[0] / 2 - 1.5)
            )  # the middle of the crack, in unpadded pixel centres
            row, column = row + step[0], column + step[1]
            # Turning towards the inside first keeps pixels that touch at a corner apart.
            way = next((w % 4 for w in (way + 1, way, way + 3) if (row, column, w % 4) in cracks), way)
        outline = np.array(corners)
        before, after = outline - np.roll(outline, 1, axis=0), np.roll(outline, -1, axis=0) - outline
        turns = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
        outlines.append(outline[turns])  # without the corners at which it does not turn
    return outlines

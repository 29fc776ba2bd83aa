"""Planar contours to voxels and back: a voxel belongs to a structure if its centre lies inside.

The contours of a structure in one slice are combined as the standard and planning systems have it: a contour nested
inside another cuts a hole, one nested inside that fills it again, contours that overlap are united, and a contour that
is stored twice counts once. Contours of type ``CLOSEDPLANAR_XOR`` are combined by exclusive or. A single contour is
filled by the even-odd rule, so that a keyhole (a hole joined to the outline by a channel without width) stays a hole.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid

logger = logging.getLogger(__name__)

# A contour must lie in one slice: its points may leave the slice's plane by this share of the distance between slices.
PLANE_TOLERANCE = 0.25
# Contours whose corners differ by less than this share of a voxel are one contour stored twice.
_SAME_CORNER = 0.01


def fill_contours(
    contours_lps_mm: Iterable[NDArray],
    grid: Grid,
    name: str,
    *,
    exclusive_or: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> NDArray[np.bool_]:
    """The voxels of an image inside closed planar contours; one warning lists the contours that are left out.

    Args:
        contours_lps_mm: (N, 3) polygons in DICOM patient coordinates (LPS, mm), each in the plane of one slice of the
            image; others are left out.
        grid: The image's grid.
        name: The structure, for messages.
        exclusive_or: Combine the contours of a slice by exclusive or, else by the rule of the module.
        left_out: How many contours of the structure the caller has left out already, by reason.

    Returns:
        (D, H, W) mask. Parts of a contour outside the image are cut off.

    Raises:
        InputError: if no contour is parallel to the slices and in one of them, or none of them touches the image.
    """
    mask = np.zeros(grid.shape_zyx, dtype=bool)
    for k, polygons in _in_slices(contours_lps_mm, grid, name, Counter(left_out or {})).items():
        ordered = sorted(polygons, key=_area, reverse=True)
        for number, polygon in enumerate(ordered):
            plane = np.zeros((mask.shape[1], mask.shape[2] + 1), dtype=bool)
            toggle_polygon(plane, polygon)
            filled = np.logical_xor.accumulate(plane, axis=1)[:, :-1]
            if exclusive_or:
                mask[k] ^= filled
            elif sum(_is_nested(polygon, larger) for larger in ordered[:number]) % 2:
                mask[k] &= ~filled
            else:
                mask[k] |= filled
    return mask


def _in_slices(
    contours_lps_mm: Iterable[NDArray], grid: Grid, name: str, left_out: Counter[str]
) -> dict[int, list[NDArray]]:
    """The distinct contours of each slice, (N, 2) in voxel indices; see ``fill_contours``."""
    to_ijk = np.linalg.inv(grid.affine_lps)
    off = 0.0
    by_slice: dict[int, list[NDArray]] = defaultdict(list)
    for points in contours_lps_mm:
        if len(points) < 3:
            left_out["of fewer than three points"] += 1
            continue
        ijk = points @ to_ijk[:3, :3].T + to_ijk[:3, 3]
        middle = round(float(ijk[:, 2].mean()))
        away = float(np.abs(ijk[:, 2] - middle).max())
        if away > PLANE_TOLERANCE:
            off = max(off, away)
            left_out["not in a slice"] += 1
        elif not 0 <= middle < grid.shape_zyx[0]:
            left_out["outside the image"] += 1
        elif any(_is_same(ijk[:, :2], other) for other in by_slice[middle]):
            left_out["stored twice"] += 1
        else:
            by_slice[middle].append(ijk[:, :2])
    if off and not by_slice:
        raise InputError(
            f"contours of {name!r} must lie in the slices of the image, one is {off:.2f} slices away; "
            "they were drawn on another series, or need to be resampled"
        )
    if left_out["outside the image"] and not by_slice:
        raise InputError(f"contours of {name!r} lie outside the image; they were drawn on another series")
    if left_out:
        listed = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        logger.warning("contours of %r are left out: %s", name, listed)
    return by_slice


def _area(polygon: NDArray) -> float:
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _is_same(polygon: NDArray, other: NDArray) -> bool:
    """Whether each corner of either (N, 2) polygon is a corner of the other."""
    ends = np.abs([polygon.min(0) - other.min(0), polygon.max(0) - other.max(0)])
    if ends.max() > _SAME_CORNER:
        return False
    apart = np.abs(polygon[:, None] - other).max(axis=2)
    return bool(max(apart.min(0).max(), apart.min(1).max()) <= _SAME_CORNER)


def _is_nested(inner: NDArray, outer: NDArray) -> bool:
    """Whether an (N, 2) polygon lies inside another; corners may touch."""
    if (inner.min(0) < outer.min(0)).any() or (inner.max(0) > outer.max(0)).any():
        return False
    ends, outer_ends = np.roll(inner, -1, axis=0), np.roll(outer, -1, axis=0)
    x, y = ((inner + ends) / 2).T[..., None]
    (x0, y0), (x1, y1) = outer.T, outer_ends.T
    spans = (y0 <= y) != (y1 <= y)
    crossing_x = x0 + (y - y0) * ((x1 - x0) / np.where(y1 == y0, 1, y1 - y0))
    if not ((spans & (crossing_x <= x)).sum(axis=1) % 2).all():
        return False
    beyond = _side(outer, outer_ends, inner[:, None]) * _side(outer, outer_ends, ends[:, None]) < 0
    between = _side(inner[:, None], ends[:, None], outer) * _side(inner[:, None], ends[:, None], outer_ends) < 0
    return not (beyond & between).any()


def _side(start: NDArray, end: NDArray, point: NDArray) -> NDArray:
    """On which side of the line from ``start`` to ``end`` a point lies, by its sign."""
    along, to = end - start, point - start
    return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]


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

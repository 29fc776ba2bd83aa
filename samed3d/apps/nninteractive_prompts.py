"""What nnInteractive's interactions mean here: coordinates of an (X, Y, Z) array to prompts in ijk, drawn masks to
scribbles and lassos.

The client's array axes are taken as they come as our z, y, x: a client that sends (X, Y, Z) and one that sends (Z, Y,
X) both get their own axes back. Not here: HTTP and leases (``nninteractive.py``), bytes (``nninteractive_wire.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, IntTriple, Region, Triple, as_triple, bounding_region
from samed3d.prompts import Box, Lasso, Mask, PackedMask, Point, Prompt, Scribble

_LONGEST_PATH = 10_000
_MOST_STROKES = 16
_RAS_DIRECTION = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


def grid_of(shape: IntTriple, properties: Any) -> Grid:
    """The grid of an image that came as an array; ``spacing``, where the client gives one, is in the order of the
    array's axes.
    """
    given = properties.get("spacing") if isinstance(properties, dict) else None
    spacing: Triple = (1.0, 1.0, 1.0)
    if given is not None:
        numbers = (
            isinstance(given, list)
            and len(given) == 3
            and all(isinstance(v, int | float) and 0 < v < math.inf for v in given)
        )
        if not numbers:
            raise InputError(f"spacing must be three numbers > 0 in mm, got {str(given)[:80]}")
        spacing = as_triple(given[::-1])
    return Grid(shape, spacing, direction_lps=_RAS_DIRECTION)


def point_prompt(coordinates: Any, include: bool) -> Prompt:
    """A click at an array position."""
    if (
        not isinstance(coordinates, list)
        or len(coordinates) != 3
        or not all(type(v) in (int, float) for v in coordinates)
    ):
        raise InputError(f"coordinates must be three numbers, got {str(coordinates)[:80]}")
    return Point(as_triple(coordinates[::-1]), include)


def box_prompt(bbox: Any, include: bool, shape: IntTriple) -> Prompt:
    """A half-open box of the array, clipped to it. A negative one must lie in one slice: nothing in it belongs to the
    object.
    """
    region = _clipped(bbox, shape, "bbox_coords")
    low, high = _corners(region)
    if include:
        return Box(low, high)
    flat = [axis for axis in range(3) if low[axis] == high[axis]]
    if len(flat) != 1:
        raise InputError(
            "a negative box must be one voxel thick along exactly one axis, got a 3D one; use negative points or scribbles"
        )
    a, b = (axis for axis in range(3) if axis != flat[0])
    corners = (
        (low[a] - 0.5, low[b] - 0.5),
        (high[a] + 0.5, low[b] - 0.5),
        (high[a] + 0.5, high[b] + 0.5),
        (low[a] - 0.5, high[b] + 0.5),
    )
    outline = []
    for u, v in corners:
        at = [0.0, 0.0, 0.0]
        at[flat[0]], at[a], at[b] = low[flat[0]], u, v
        outline.append(as_triple(at))
    return Lasso(tuple(outline), False)


def mask_prior(mask: NDArray, shape: IntTriple) -> Prompt:
    """A whole segmentation to start from."""
    if mask.shape != shape:
        raise InputError(f"the initial segmentation must have the image's shape {shape}, got {mask.shape}")
    return Mask(PackedMask.of(mask))


def drawn_region(mask: NDArray, bbox: Any, shape: IntTriple) -> tuple[NDArray[np.bool_], IntTriple]:
    """What was drawn, cut to its own box, and where that box begins.

    Args:
        mask: Of the whole image, or of ``bbox``.
        bbox: Half-open box, or None.
        shape: Of the image.
    """
    start: IntTriple = (0, 0, 0)
    if bbox is not None:
        region = _clipped(bbox, shape, "interaction_bbox")
        if mask.shape != region.shape_zyx:
            raise InputError(
                f"the drawn mask must have the shape of interaction_bbox {region.shape_zyx}, got {mask.shape}"
            )
        start = region.start_zyx
    elif mask.shape != shape:
        raise InputError(f"the drawn mask must have the image's shape {shape}, got {mask.shape}")
    drawn = mask != 0
    tight = bounding_region(drawn)
    if tight.is_empty:
        raise InputError("nothing is drawn: every voxel of the mask is zero")
    d, h, w = (a + b for a, b in zip(start, tight.start_zyx, strict=True))
    return drawn[tight.slices], (d, h, w)


def scribble_prompts(drawn: NDArray[np.bool_], start: IntTriple, include: bool) -> list[Prompt]:
    """Strokes that mark exactly the drawn voxels: each piece is walked from neighbour to neighbour."""
    pieces = np.asarray(cc3d.connected_components(drawn, connectivity=26))
    prompts: list[Prompt] = []
    for label in range(1, int(pieces.max()) + 1):
        path = _exact(_walk(pieces == label))
        for first in range(0, len(path), _LONGEST_PATH):
            part = path[first : first + _LONGEST_PATH]
            prompts.append(Scribble(tuple(_ijk(zyx, start) for zyx in part), include, radius_vox=0.0))
    if len(prompts) > _MOST_STROKES:
        raise InputError(
            f"a scribble must be at most {_MOST_STROKES} strokes of {_LONGEST_PATH} voxels, got {len(prompts)}; draw less at once"
        )
    return prompts


def lasso_prompts(drawn: NDArray[np.bool_], start: IntTriple, include: bool) -> list[Prompt]:
    """The outline of every filled piece of one slice."""
    flat = [axis for axis in range(3) if drawn.shape[axis] == 1]
    if not flat:
        raise InputError(
            f"a lasso must lie in one slice of one of the axes, got a box of {drawn.shape}; draw it in one slice"
        )
    axis = flat[0]
    plane = drawn.any(axis=axis)
    pieces = np.asarray(cc3d.connected_components(np.asarray(plane)[None], connectivity=6))[0]
    prompts: list[Prompt] = []
    for label in range(1, int(pieces.max()) + 1):
        corners = np.array(_outline(pieces == label)) - 0.5
        outline = np.insert(corners, axis, 0.0, axis=1)
        if len(outline) > _LONGEST_PATH:
            raise InputError(
                f"the outline of a lasso must have at most {_LONGEST_PATH} corners, got {len(outline)}; draw it smoother"
            )
        prompts.append(Lasso(tuple(_ijk(zyx, start) for zyx in outline), include))
    if len(prompts) > _MOST_STROKES:
        raise InputError(f"a lasso must be at most {_MOST_STROKES} pieces, got {len(prompts)}; draw fewer at once")
    return prompts


def _clipped(bbox: Any, shape: IntTriple, what: str) -> Region:
    three = (
        isinstance(bbox, list) and len(bbox) == 3 and all(isinstance(pair, list) and len(pair) == 2 for pair in bbox)
    )
    pairs = three and all(type(v) is int for pair in bbox for v in pair)
    if not pairs:
        raise InputError(f"{what} must be three pairs of whole numbers, got {str(bbox)[:80]}")
    region = Region((bbox[0][0], bbox[1][0], bbox[2][0]), (bbox[0][1], bbox[1][1], bbox[2][1])).clip(shape)
    if any(low >= high for low, high in bbox) or region.is_empty:
        raise InputError(f"{what} must hold at least one voxel of the image {shape}, got {bbox}")
    return region


def _corners(region: Region) -> tuple[Triple, Triple]:
    """Lowest and highest voxel, both inside, as ijk."""
    return as_triple(list(region.start_zyx[::-1])), as_triple([b - 1 for b in region.stop_zyx[::-1]])


def _ijk(zyx: Sequence[float] | NDArray, start: IntTriple) -> Triple:
    z, y, x = (float(v) + s for v, s in zip(zyx, start, strict=True))
    return (x, y, z)


def _walk(piece: NDArray[np.bool_]) -> list[IntTriple]:
    """Every voxel of a connected piece, in an order in which consecutive ones are neighbours (some are passed
    twice).
    """
    left = {(int(z), int(y), int(x)) for z, y, x in np.argwhere(piece)}
    at = min(left)
    left.discard(at)
    path, back = [at], [at]
    while left:
        step = next((n for n in _neighbours(at) if n in left), None)
        if step is not None:
            left.discard(step)
            back.append(step)
        else:
            back.pop()
            step = back[-1]
        path.append(step)
        at = step
    return path


def _neighbours(at: IntTriple) -> list[IntTriple]:
    z, y, x = at
    return [(z + a, y + b, x + c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) if (a, b, c) != (0, 0, 0)]


def _exact(path: list[IntTriple]) -> list[Sequence[float]]:
    """A corner short of the middle of every diagonal step, so that the line between two voxels touches no third one."""
    exact: list[Sequence[float]] = [path[0]]
    for before, after in itertools.pairwise(path):
        if sum(a != b for a, b in zip(before, after, strict=True)) > 1:
            exact.append([a + 0.49 * (b - a) for a, b in zip(before, after, strict=True)])
        exact.append(after)
    return exact


def _outline(piece: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The corners of a filled piece's outer border, in order; a corner (r, c) is the low corner of pixel (r, c)."""
    padded = np.pad(piece, 1)
    row, column = (int(v) for v in np.argwhere(padded)[0])
    heading = (0, 1)  # along the top of the first pixel, the piece on the right hand
    at, first = (row, column), (row, column)
    corners: list[tuple[int, int]] = []
    while True:
        at = (at[0] + heading[0], at[1] + heading[1])
        turned = _turned(padded, at, heading)
        if turned != heading:
            corners.append((at[0] - 1, at[1] - 1))
        heading = turned
        if at == first and heading == (0, 1):
            return corners


def _turned(padded: NDArray[np.bool_], at: tuple[int, int], heading: tuple[int, int]) -> tuple[int, int]:
    """Where the border goes on from a corner: right if the piece ends there, left if it bends outward, else straight
    on.
    """
    dr, dc = heading
    if not _pixel(padded, at, heading, (dc, -dr)):
        return (dc, -dr)
    return (-dc, dr) if _pixel(padded, at, heading, (-dc, dr)) else heading


def _pixel(padded: NDArray[np.bool_], at: tuple[int, int], heading: tuple[int, int], side: tuple[int, int]) -> bool:
    """The pixel diagonally ahead of a corner, on one side of the way."""
    r, c = (math.floor(p + 0.5 * h + 0.5 * s) for p, h, s in zip(at, heading, side, strict=True))
    return bool(padded[r, c])

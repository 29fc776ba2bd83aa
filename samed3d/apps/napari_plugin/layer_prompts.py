"""What is drawn on a napari layer as prompts, and prompts as what is drawn. Positions are voxels of the image, z, y, x;
pure numpy.

A rectangle is a box: flat in its slice, or as deep as asked. A polygon or an ellipse is a lasso, a path or a line is a
scribble. A 3D box is shown as a rectangle in its middle slice. Not here: layers and their events (``layers.py``). Read
``controller.py`` next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple
from samed3d.prompts import Box, Lasso, Point, Prompt, Scribble

_ELLIPSE_VERTICES = 48
_SAME_VOX = 2e-3  # shapes are kept in single precision


@dataclass(frozen=True)
class Drawn:
    """A shape: napari's name of its kind, its (N, 3) vertices."""

    kind: str
    vertices_zyx: NDArray


def point_at(zyx: NDArray, positive: bool) -> Point:
    """A click at a voxel position."""
    return Point(_ijk(zyx), positive)


def shape_to_prompt(shape: Drawn, positive: bool, depth: int = 1, radius_vox: float = 1.0) -> Prompt:
    """The prompt that a shape means.

    Args:
        shape: What was drawn.
        positive: For lassos and scribbles.
        depth: Slices of a box; 1 bounds the object in its slice only.
        radius_vox: Of a scribble's brush.

    Raises:
        InputError: for a negative box, or a shape without extent.
    """
    vertices = np.asarray(shape.vertices_zyx, dtype=np.float64)
    if shape.kind == "rectangle":
        if not positive:
            raise InputError(
                "a box says where the object is and cannot be negative; draw a lasso around what does not belong to it"
            )
        return _box(vertices, depth)
    if shape.kind in ("path", "line"):
        return Scribble(tuple(_ijk(at) for at in vertices), positive, radius_vox)
    if shape.kind == "ellipse":
        vertices = _on_ellipse(vertices)
    elif shape.kind != "polygon":
        raise InputError(f"shape must be a rectangle, ellipse, polygon, path or line, got {shape.kind!r}")
    return Lasso(tuple(_ijk(at) for at in vertices), positive)


def _box(corners: NDArray, depth: int) -> Box:
    """The voxels whose centres lie in a rectangle; at least one along each axis."""
    low, high = corners.min(0), corners.max(0)
    first, last = np.ceil(low - _SAME_VOX), np.floor(high + _SAME_VOX)
    middle = np.floor((low + high) / 2 + 0.5)
    first, last = np.where(first > last, middle, first), np.where(first > last, middle, last)
    flat = np.flatnonzero(first == last)
    if depth > 1 and len(flat) == 1:
        first[flat] -= (depth - 1) // 2
        last[flat] = first[flat] + depth - 1
        first = np.maximum(first, 0)
    return Box(_ijk(first), _ijk(last))


def _on_ellipse(corners: NDArray) -> NDArray:
    """Positions on the ellipse inside a (turned) rectangle given by its four corners in order."""
    middle, a, b = corners.mean(0), (corners[1] - corners[0]) / 2, (corners[3] - corners[0]) / 2
    turn = np.linspace(0, 2 * np.pi, _ELLIPSE_VERTICES, endpoint=False)[:, None]
    return middle + np.cos(turn) * a + np.sin(turn) * b


def prompt_to_shape(prompt: Prompt, across: int = 0) -> Drawn | None:
    """How a prompt in voxels is drawn on a Shapes layer; None for points and masks, which are not.

    Args:
        prompt: With positions in ijk.
        across: The axis (zyx) that a 3D box is cut along, in its middle; a flat one lies where it is flat.
    """
    if isinstance(prompt, Box):
        low, high = np.array(prompt.min[::-1]), np.array(prompt.max[::-1])
        across = int(np.argmin(high - low)) if (high == low).any() else across
        rows, columns = (axis for axis in range(3) if axis != across)
        corners = np.tile(np.ceil((low + high) / 2 - 0.5), (4, 1))
        corners[:, rows] = [low[rows] - 0.5, low[rows] - 0.5, high[rows] + 0.5, high[rows] + 0.5]
        corners[:, columns] = [low[columns] - 0.5, high[columns] + 0.5, high[columns] + 0.5, low[columns] - 0.5]
        return Drawn("rectangle", corners)
    if isinstance(prompt, Scribble):
        path = np.array([at[::-1] for at in prompt.path])
        return Drawn("path", path if len(path) > 1 else np.repeat(path, 2, axis=0))
    if isinstance(prompt, Lasso):
        return Drawn("polygon", np.array([at[::-1] for at in prompt.outline]))
    return None


def moved_shape(before: Prompt, shape: Drawn, depth: int) -> Prompt:
    """What a shape that was dragged or reshaped means now; sign, depth and radius stay."""
    positive = True if isinstance(before, Box) else bool(getattr(before, "positive", True))
    return shape_to_prompt(shape, positive, depth, getattr(before, "radius_vox", 1.0))


def depth_of(prompt: Prompt, across: int = 0) -> int:
    """Slices of a box along the axis (zyx) that it is drawn across; 1 for others."""
    if not isinstance(prompt, Box):
        return 1
    low, high = np.array(prompt.min[::-1]), np.array(prompt.max[::-1])
    return 1 if (low == high).any() else int(high[across] - low[across]) + 1


def flat_axis(vertices_zyx: NDArray) -> int:
    """The axis (zyx) that a shape is drawn across."""
    return int(np.argmin(np.ptp(np.asarray(vertices_zyx), axis=0)))


def differs(drawn: NDArray, known: NDArray) -> bool:
    """Whether vertices were moved, beyond the rounding of a layer."""
    return drawn.shape != known.shape or bool(
        np.abs(np.asarray(drawn, dtype=np.float64) - known).max(initial=0.0) > _SAME_VOX
    )


def compared(known: Iterable[int], rows: Iterable[int]) -> tuple[list[int], list[int], list[int]]:
    """Which rows of a layer are new, which show a known prompt, and which prompts are gone.

    A number that comes twice (a copy that was pasted) counts once; what comes later is new. Numbers below zero are on
    their way.

    Args:
        known: Numbers of the prompts that the layer showed.
        rows: Prompt number of each row of the layer now; 0 for one that was just drawn.

    Returns:
        Indices of new rows, indices of rows that show a known prompt, numbers of the prompts that are gone.
    """
    before, seen = list(known), set[int]()
    new: list[int] = []
    kept: list[int] = []
    for index, number in enumerate(rows):
        if number == 0 or number in seen or (number > 0 and number not in before):
            new.append(index)
        elif number > 0:
            kept.append(index)
        seen.add(number)
    return new, kept, [number for number in before if number not in seen]


def _ijk(zyx: NDArray) -> Triple:
    return as_triple([float(v) for v in zyx[::-1]])

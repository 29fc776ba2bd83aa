"""Where a napari layer's voxels are, and shapes drawn on a layer as prompts. Needs neither napari nor Qt.

A napari layer maps its data coordinates (z, y, x; voxel centres at integers) to the viewer's world. World axes are
z, y, x as well and name no frame of the body; here they are LPS millimetres in reverse order, which shows an axial CT
as radiologists expect it. A rectangle is a box, flat in its slice or as deep as requested; a polygon or an ellipse is a
lasso; a path or a line is a scribble.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, Triple, as_triple
from samed3d.prompts import Box, Lasso, Point, Prompt, Scribble
from samed3d.volume import SUFFIXES, Volume, read_volume

_SKEW_TOLERANCE = 0.01  # cosine between two axes up to which a shear counts as rounding; as for files
_SAME_SPACING = 1e-3
_ELLIPSE_VERTICES = 48
_SAME_VOX = 2e-3  # napari keeps shapes in single precision


# Layers


@dataclass(frozen=True, eq=False)
class Frame:
    """Where a 3D layer's voxels are.

    Attributes:
        matrix: 4x4, from data (z, y, x) to world (z, y, x) in mm.
    """

    matrix: NDArray[np.float64]

    @classmethod
    def of(cls, layer: Any) -> Frame:
        """The frame of a layer as the viewer shows it.

        Raises:
            InputError: if the layer is not 3D.
        """
        if layer.ndim != 3:
            raise InputError(f"layer {layer.name!r} must be 3D, got {layer.ndim}D; split or project it first")
        corners = np.array([layer.data_to_world(at) for at in np.vstack([np.zeros(3), np.eye(3)])], dtype=np.float64)
        matrix = np.eye(4)
        matrix[:3, :3] = (corners[1:] - corners[0]).T
        matrix[:3, 3] = corners[0]
        matrix[:3] *= np.array([_millimetres(unit) for unit in getattr(layer, "units", None) or (None,) * 3])[:, None]
        return cls(matrix)

    def to(self, other: Frame, positions_zyx: NDArray) -> NDArray[np.float64]:
        """(N, 3) data positions of this layer as data positions of another one."""
        positions = np.asarray(positions_zyx, dtype=np.float64).reshape(-1, 3)
        world = positions @ self.matrix[:3, :3].T + self.matrix[:3, 3]
        return np.asarray(np.linalg.solve(other.matrix[:3, :3], (world - other.matrix[:3, 3]).T).T, dtype=np.float64)

    def grid(self, shape_zyx: tuple[int, int, int]) -> Grid:
        """The same as a grid, for sessions and files.

        Raises:
            InputError: if the axes are sheared, or an axis has no length.
        """
        lps = self.matrix[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        if not (np.isfinite(lps).all() and (spacing > 0).all()):
            raise InputError("the layer's scale must not be 0 on any axis; set it to the size of a voxel")
        direction = lps[:3, :3] / spacing
        if np.abs(direction.T @ direction - np.eye(3)).max() > _SKEW_TOLERANCE:
            raise InputError("the layer's axes must be perpendicular, got a shear; resample the image first")
        u, _, v = np.linalg.svd(direction)
        exact = np.round(direction) if np.allclose(direction, np.round(direction), atol=1e-12) else u @ v
        return Grid(shape_zyx, as_triple(spacing), as_triple(lps[:3, 3]), tuple(exact.ravel().tolist()))


def affine_for(grid: Grid) -> NDArray[np.float64]:
    """The affine under which an image of this grid is shown: 4x4, data (z, y, x) to world (z, y, x) in mm.

    Napari slices along world axes only. An image whose axes are parallel to those of LPS is shown at its position; any
    other is shown in its own planes, by its spacing alone.
    """
    direction = np.array(grid.direction_lps).reshape(3, 3)
    matrix = np.diag([*grid.spacing_zyx_mm, 1.0])
    if np.allclose(np.abs(direction), np.eye(3), atol=1e-6):
        matrix[:3, :3] *= np.round(np.diag(direction))[::-1]
        matrix[:3, 3] = grid.origin_lps_mm[::-1]
    return matrix


def volume_of(layer: Any) -> Volume:
    """The image of a layer.

    A layer that was read from a file with the same voxels takes the file's grid, orientation included, unless the
    layer's scale contradicts the file's spacing.

    Raises:
        InputError: if the layer is not a 3D image of one channel, holds NaN or infinite voxels, or is constant.
    """
    if getattr(layer, "rgb", False):
        raise InputError(f"layer {layer.name!r} must have one channel, got colours; split them first")
    frame = Frame.of(layer)
    array = np.asarray(layer.data[0] if getattr(layer, "multiscale", False) else layer.data)
    if array.ndim != 3 or min(array.shape) < 2:
        raise InputError(f"layer {layer.name!r} must be a stack of slices, got shape {array.shape}")
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = array.astype(np.float32)
    volume = Volume.from_array(array, source=layer.name)
    path = getattr(getattr(layer, "source", None), "path", None)
    if path and Path(path).is_file() and str(path).lower().endswith(tuple(SUFFIXES)):
        with suppress(InputError):
            read = read_volume(path)
            spacing = np.linalg.norm(frame.matrix[:3, :3], axis=0)
            is_plain = np.array_equal(frame.matrix, np.eye(4))  # the layer states no spacing, position or rotation
            same_spacing = is_plain or np.allclose(spacing, read.grid.spacing_zyx_mm, rtol=_SAME_SPACING)
            if same_spacing and np.array_equal(read.array, volume.array):
                return read
    return replace(volume, grid=frame.grid(volume.grid.shape_zyx))


def _millimetres(unit: Any) -> float:
    """Millimetres per unit of length; 1 for pixels and where no unit is named."""
    try:
        return float((1 * unit).to("millimeter").magnitude)
    except (AttributeError, TypeError, ValueError):  # not a unit, or not one of length
        return 1.0


# Shapes


@dataclass(frozen=True)
class Drawn:
    """A shape: napari's name of its kind, its (N, 3) vertices in voxels of the image."""

    kind: str
    vertices_zyx: NDArray


def point_at(zyx: NDArray, positive: bool) -> Point:
    """A click at a voxel position."""
    return Point(_ijk(zyx), positive)


def shape_to_prompt(shape: Drawn, positive: bool, depth: int = 1, radius_vox: float = 1.0) -> Prompt:
    """The prompt of a shape.

    Args:
        shape: The shape.
        positive: Sign of lassos and scribbles.
        depth: Slices of a box; 1 bounds the object in its slice only.
        radius_vox: Radius of a scribble's brush.

    Raises:
        InputError: for a negative box, or a shape without extent.
    """
    vertices = np.asarray(shape.vertices_zyx, dtype=np.float64)
    if shape.kind == "rectangle":
        if not positive:
            raise InputError("a box cannot be negative; draw a lasso around what does not belong to the object")
        return _box(vertices, depth)
    if shape.kind in ("path", "line"):
        return Scribble(tuple(_ijk(at) for at in vertices), positive, radius_vox)
    if shape.kind == "ellipse":  # inside a (rotated) rectangle, given by its four corners in order
        middle, a, b = vertices.mean(0), (vertices[1] - vertices[0]) / 2, (vertices[3] - vertices[0]) / 2
        angle = np.linspace(0, 2 * np.pi, _ELLIPSE_VERTICES, endpoint=False)[:, None]
        vertices = middle + np.cos(angle) * a + np.sin(angle) * b
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


def prompt_to_shape(prompt: Prompt, across: int = 0) -> Drawn | None:
    """The shape of a prompt in voxels; None for points and masks, which are not drawn on a Shapes layer.

    Args:
        prompt: With positions in ijk.
        across: The axis (zyx) across which a 3D box is cut in its middle; a flat box lies where it is flat.
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


def moved_shape(before: Prompt, shape: Drawn, across: int) -> Prompt:
    """The prompt of a shape that was moved or reshaped; its sign, radius and depth across its axis stay."""
    depth = 1
    if isinstance(before, Box) and all(low < high for low, high in zip(before.min, before.max, strict=True)):
        depth = int(before.max[2 - across] - before.min[2 - across]) + 1
    return shape_to_prompt(shape, getattr(before, "positive", True), depth, getattr(before, "radius_vox", 1.0))


def flat_axis(vertices_zyx: NDArray) -> int:
    """The axis (zyx) across which a shape is drawn."""
    return int(np.argmin(np.ptp(np.asarray(vertices_zyx), axis=0)))


def differs(drawn: NDArray, known: NDArray) -> bool:
    """Whether vertices were moved by more than a layer's rounding."""
    moved = drawn.shape != known.shape
    return moved or bool(np.abs(np.asarray(drawn, dtype=np.float64) - known).max(initial=0.0) > _SAME_VOX)


def compared(known: Iterable[int], rows: Iterable[int]) -> tuple[list[int], list[int], list[int]]:
    """Which rows of a layer are new, which show a known prompt, and which prompts are gone.

    A number that comes twice (a pasted copy) counts once; the later row is new. Numbers below zero stand for prompts
    that were sent and not yet answered.

    Args:
        known: Numbers of the prompts that the layer showed.
        rows: Prompt number of each row of the layer now; 0 for a row that was just drawn.

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

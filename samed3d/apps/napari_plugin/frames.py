"""Where the voxels of a napari layer are, and the same as a grid of ours. Needs neither napari nor Qt: layers are only
asked.

A napari layer maps its data coordinates (z, y, x, voxel centres at whole numbers) to the viewer's world by scale,
rotation, shear, translation and an affine, one after the other. World axes are z, y, x too, and no frame of the body is
named; here they are taken as LPS millimetres in reverse order, which shows an axial CT as radiologists expect it. Read
``layer_prompts.py`` next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, as_triple
from samed3d.volume import SUFFIXES, Volume, read_volume

# Cosine between two axes up to which a shear counts as rounding; as for files.
_SKEW_TOLERANCE = 0.01
_SAME_SPACING = 1e-3


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
        corners = np.array(
            [layer.data_to_world(at) for at in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))], dtype=np.float64
        )
        matrix = np.eye(4)
        matrix[:3, :3] = (corners[1:] - corners[0]).T
        matrix[:3, 3] = corners[0]
        matrix[:3] *= np.array([_mm(unit) for unit in getattr(layer, "units", None) or (None,) * 3])[:, None]
        return cls(matrix)

    def to(self, other: Frame, positions_zyx: NDArray) -> NDArray[np.float64]:
        """Data positions of this layer as data positions of another one.

        Args:
            other: Frame of the other layer.
            positions_zyx: (N, 3).

        Returns:
            (N, 3).
        """
        positions = np.asarray(positions_zyx, dtype=np.float64).reshape(-1, 3)
        world = positions @ self.matrix[:3, :3].T + self.matrix[:3, 3]
        return np.asarray(np.linalg.solve(other.matrix[:3, :3], (world - other.matrix[:3, 3]).T).T, dtype=np.float64)

    @property
    def is_plain(self) -> bool:
        """Whether the layer says nothing of where it is: one world unit per voxel, no shift, no turn."""
        return bool(np.array_equal(self.matrix, np.eye(4)))

    def grid(self, shape_zyx: tuple[int, int, int]) -> Grid:
        """The same as a grid, for sessions and files.

        Raises:
            InputError: if the axes are sheared, or an axis has no length.
        """
        reverse = np.eye(4)[[2, 1, 0, 3]]
        lps = reverse @ self.matrix @ reverse
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        if not (np.isfinite(lps).all() and (spacing > 0).all()):
            raise InputError("the layer's scale must not be 0 on any axis; set it to the size of a voxel")
        direction = lps[:3, :3] / spacing
        if np.abs(direction.T @ direction - np.eye(3)).max() > _SKEW_TOLERANCE:
            raise InputError("the layer's axes must be perpendicular, got a shear; resample the image first")
        u, _, v = np.linalg.svd(direction)
        exact = u @ v if not np.allclose(direction, np.round(direction), atol=1e-12) else np.round(direction)
        return Grid(
            shape_zyx, as_triple(spacing), as_triple(lps[:3, 3]), tuple(float(value) for value in exact.ravel())
        )


def affine_for(grid: Grid) -> NDArray[np.float64]:
    """The affine under which an image of this grid is shown.

    Napari slices along world axes only. An image whose axes are those of LPS, or run against them, is shown where it
    is; any other is shown in its own planes, by its spacing alone.

    Returns:
        4x4, data (z, y, x) to world (z, y, x) in mm.
    """
    direction = np.array(grid.direction_lps).reshape(3, 3)
    matrix = np.eye(4)
    if np.allclose(np.abs(direction), np.eye(3), atol=1e-6):
        matrix[:3, :3] = np.diag((np.round(np.diag(direction)) * grid.spacing_xyz_mm)[::-1])
        matrix[:3, 3] = grid.origin_lps_mm[::-1]
    else:
        matrix[:3, :3] = np.diag(grid.spacing_zyx_mm)
    return matrix


def volume_of(layer: Any) -> Volume:
    """The image of a layer.

    A layer that was read from a file which holds the same voxels takes the file's grid, orientation included, unless
    its own scale says otherwise: then the layer is believed.

    Raises:
        InputError: if the layer is not a 3D image of one channel, holds NaN or infinite voxels, or is constant.
    """
    if getattr(layer, "rgb", False):
        raise InputError(f"layer {layer.name!r} must have one channel, got colours; split them first")
    frame = Frame.of(layer)
    array = _checked(np.asarray(layer.data[0] if getattr(layer, "multiscale", False) else layer.data), layer.name)
    return _from_file(layer, frame, array) or Volume(
        array, frame.grid((array.shape[0], array.shape[1], array.shape[2])), layer.name
    )


def _checked(array: NDArray, name: str) -> NDArray:
    if array.dtype.kind not in "biuf":
        raise InputError(f"layer {name!r} must hold numbers, got {array.dtype}")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    elif array.dtype.kind == "f" or array.dtype.itemsize == 8:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
    if array.ndim != 3 or min(array.shape) < 2:
        raise InputError(f"layer {name!r} must be a stack of slices, got shape {array.shape}")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"layer {name!r} holds NaN or infinite voxels; replace them with the background value")
    if low == high:
        raise InputError(f"layer {name!r} is constant, every voxel is {low:g}; there is nothing to segment")
    return array


def _from_file(layer: Any, frame: Frame, array: NDArray) -> Volume | None:
    """The file that the layer was read from, where it holds the same voxels and the layer does not contradict its
    spacing.
    """
    path = getattr(getattr(layer, "source", None), "path", None)
    if not path or not Path(path).is_file() or not str(path).lower().endswith(tuple(SUFFIXES)):
        return None
    try:
        volume = read_volume(path)
    except InputError:
        return None
    spacing = np.linalg.norm(frame.matrix[:3, :3], axis=0)
    agrees = frame.is_plain or np.allclose(spacing, volume.grid.spacing_zyx_mm, rtol=_SAME_SPACING)
    return volume if agrees and np.array_equal(volume.array, array) else None


def _mm(unit: Any) -> float:
    """Millimetres per unit of length; 1 for pixels and where no unit is named."""
    try:
        return float((1 * unit).to("millimeter").magnitude)
    except (AttributeError, TypeError, ValueError):  # not a unit, or not of length
        return 1.0

"""Where voxels are: image grids, positions, boxes and model crops. Pure numpy.

Conventions of the whole package: arrays are (D, H, W) = z, y, x. Positions from outside are ``ijk`` (x first, 0-based,
as ITK-SNAP, Slicer and NIfTI show them) or ``ras`` in millimetres. Only this file and ``volume/`` convert between them.

Not here: reading files (``volume/``), sampling a crop's intensities (``crops.py``).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samed3d.errors import InputError

T = TypeVar("T", bound=np.generic)
Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]

# ITK and DICOM give physical positions in LPS, users and NIfTI in RAS. The first two axes change sign.
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
RAS_DIRECTION = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
"""``Grid.direction_lps`` of a canonical volume, whose i, j, k axes run to the right, anterior and superior."""
SHEAR_TOLERANCE_DEGREES = 0.573
"""Voxel axes this close to perpendicular count as perpendicular (a cosine of 0.01)."""
GRID_TOLERANCE = 0.25
"""Two grids are one if every corner is at the same place to within this share of the shortest voxel edge. Headers that
were rounded in single precision stay far below it, a shift by one voxel far above."""

SLAB_VOXELS = 2**22
"""Voxels of a large region that are converted or computed at once."""


@dataclass(frozen=True)
class Grid:
    """The sampling grid of a volume, exactly as its file states it (values are kept bit for bit).

    Attributes:
        shape_zyx: Voxels along z, y, x.
        spacing_xyz_mm: Voxel edge along i, j, k in mm, all > 0.
        origin_lps_mm: Physical position of voxel (0, 0, 0) in ITK's LPS frame, mm.
        direction_lps: 3x3 direction cosines, row-major, columns are the i, j, k axes in LPS.
        nifti_header: Header of the NIfTI file that states this grid, which a mask on it repeats; else empty.
    """

    shape_zyx: IntTriple
    spacing_xyz_mm: Triple = (1.0, 1.0, 1.0)
    origin_lps_mm: Triple = (0.0, 0.0, 0.0)
    direction_lps: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    nifti_header: bytes = field(default=b"", compare=False, repr=False)

    @property
    def spacing_zyx_mm(self) -> Triple:
        """Voxel edge along z, y, x in mm."""
        x, y, z = self.spacing_xyz_mm
        return (z, y, x)

    @property
    def size_ijk(self) -> IntTriple:
        """Voxels along i, j, k."""
        d, h, w = self.shape_zyx
        return (w, h, d)

    @property
    def affine_ras(self) -> NDArray[np.float64]:
        """4x4 matrix from ijk to RAS millimetres (what NIfTI calls the affine)."""
        return _LPS_FROM_RAS @ self.affine_lps

    @property
    def affine_lps(self) -> NDArray[np.float64]:
        """4x4 matrix from ijk to LPS millimetres, in which ITK and DICOM give positions."""
        matrix = np.eye(4)
        direction = np.asarray(self.direction_lps, dtype=np.float64).reshape(3, 3)
        matrix[:3, :3] = direction @ np.diag(self.spacing_xyz_mm)
        matrix[:3, 3] = self.origin_lps_mm
        return matrix

    @classmethod
    def from_affine_ras(cls, shape_zyx: IntTriple, affine_ras: ArrayLike, name: str = "affine_ras") -> Grid:
        """The grid of a 4x4 matrix from ijk to RAS millimetres, which messages call ``name``.

        Raises:
            InputError: if the matrix is not 4x4 and finite, or its axes have no length or are not perpendicular (see
                ``SHEAR_TOLERANCE_DEGREES``).
        """
        try:
            given = np.asarray(affine_ras, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be a 4x4 matrix of numbers, got {affine_ras!r:.80}") from error
        spacing = np.linalg.norm(given[:3, :3], axis=0) if given.shape == (4, 4) else np.zeros(3)
        if not np.isfinite(given).all() or not (spacing > 0).all() or given[3].tolist() != [0, 0, 0, 1]:
            raise InputError(f"{name} must be a finite 4x4 matrix with axes of some length, got {given.tolist()}")
        if is_sheared(given):
            raise InputError(
                f"voxel axes must be perpendicular, got {shear_degrees(given):.1f} degrees of shear: {name}; resample "
                "to an orthogonal grid"
            )
        matrix = _LPS_FROM_RAS @ given
        direction = matrix[:3, :3] / spacing
        return cls(shape_zyx, as_triple(spacing), as_triple(matrix[:3, 3]), tuple(direction.ravel().tolist()))

    def ijk_to_ras_mm(self, ijk: Triple) -> Triple:
        """Physical position in RAS mm of a (fractional) voxel index."""
        return as_triple((self.affine_ras @ np.array([*ijk, 1.0]))[:3])

    def ras_mm_to_ijk(self, ras_mm: Triple) -> Triple:
        """Fractional voxel index of a physical position in RAS mm."""
        return as_triple(np.linalg.solve(self.affine_ras, np.array([*ras_mm, 1.0]))[:3])

    def contains_ijk(self, ijk: Triple) -> bool:
        """Whether the position falls in a voxel of the grid (voxel centres are integers, so -0.5 <= i < size - 0.5)."""
        return all(-0.5 <= v < n - 0.5 for v, n in zip(ijk, self.size_ijk, strict=True))

    def part(self, region: Region) -> Grid:
        """The grid of a region of the volume, which may reach beyond its ends."""
        offset = np.reshape(self.direction_lps, (3, 3)) @ np.multiply(self.spacing_xyz_mm, region.start_zyx[::-1])
        origin = as_triple(self.origin_lps_mm + offset)
        return replace(self, shape_zyx=region.shape_zyx, origin_lps_mm=origin, nifti_header=b"")


def shear_degrees(affine: NDArray[np.float64]) -> float:
    """How far the two voxel axes of a matrix from ijk that are furthest from perpendicular are from it."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return math.degrees(math.asin(min(1.0, float(np.abs(axes.T @ axes - np.eye(3)).max()))))


def is_sheared(affine: NDArray[np.float64]) -> bool:
    """Whether the voxel axes of a matrix are not perpendicular, by more than rounding may have caused."""
    return shear_degrees(affine) > SHEAR_TOLERANCE_DEGREES


def corners_apart_mm(one: NDArray[np.float64], other: NDArray[np.float64], size_ijk: Sequence[int]) -> float:
    """The longest way between where two matrices from ijk put a corner voxel of a volume, in their unit."""
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, n - 1) for n in size_ijk))])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def as_triple(values: Iterable[float]) -> Triple:
    """Three Python floats from any three numbers."""
    a, b, c = (float(v) for v in values)
    return (a, b, c)


def ijk_to_zyx(ijk: Triple) -> Triple:
    """Reverse the axis order: outside (x first) to array (z first)."""
    return (ijk[2], ijk[1], ijk[0])


def zyx_to_ijk(zyx: Triple) -> Triple:
    """Reverse the axis order: array (z first) to outside (x first)."""
    return (zyx[2], zyx[1], zyx[0])


@dataclass(frozen=True)
class CanonicalView:
    """How to see an array in the axis order superior, anterior, right (z, y, x of RAS+) by transposing and flipping
    only.

    A volume stored in any axis order or handedness gives the same canonical array, so a result does not depend on how a
    file was stored; oblique volumes are seen along their nearest axes. No voxel value is interpolated and nothing is
    copied.

    Attributes:
        axes: For each canonical axis (z, y, x), the stored zyx axis it comes from.
        flips: For each canonical axis, whether it runs against the stored axis.
        shape_zyx: Of the canonical array, as is the spacing.
    """

    axes: IntTriple
    flips: tuple[bool, bool, bool]
    shape_zyx: IntTriple
    spacing_zyx_mm: Triple

    @classmethod
    def of(cls, grid: Grid) -> CanonicalView:
        """The canonical view of a grid: each RAS axis is given to the most nearly parallel free voxel axis."""
        matrix = grid.affine_ras[:3, :3] / np.asarray(grid.spacing_xyz_mm)  # rows: r, a, s; columns: i, j, k
        closeness = np.abs(matrix)
        world_of_voxel = [-1, -1, -1]
        for _ in range(3):
            world, voxel = divmod(int(np.argmax(closeness)), 3)
            world_of_voxel[voxel] = world
            closeness[world, :] = -1.0
            closeness[:, voxel] = -1.0
        axes, flips = [0, 0, 0], [False, False, False]
        for voxel, world in enumerate(world_of_voxel):
            axes[2 - world] = 2 - voxel
            flips[2 - world] = bool(matrix[world, voxel] < 0)
        shape, spacing = grid.shape_zyx, grid.spacing_zyx_mm
        return cls(
            axes=(axes[0], axes[1], axes[2]),
            flips=(flips[0], flips[1], flips[2]),
            shape_zyx=(shape[axes[0]], shape[axes[1]], shape[axes[2]]),
            spacing_zyx_mm=(spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]),
        )

    @property
    def whole(self) -> Region:
        """All of the canonical array."""
        return Region((0, 0, 0), self.shape_zyx)

    def to_canonical(self, array: NDArray) -> NDArray:
        """A view of a stored (D, H, W) array in canonical order."""
        return np.transpose(array, self.axes)[tuple(slice(None, None, -1 if f else 1) for f in self.flips)]

    def to_stored(self, array: NDArray) -> NDArray:
        """A view of a canonical array in the stored (D, H, W) order; inverse of ``to_canonical``."""
        flipped = array[tuple(slice(None, None, -1 if f else 1) for f in self.flips)]
        return np.transpose(flipped, np.argsort(self.axes))

    def position_to_canonical(self, zyx: Triple) -> Triple:
        """A stored zyx voxel position as a canonical zyx voxel position."""
        picked = [zyx[a] for a in self.axes]
        return as_triple([n - 1 - v if f else v for v, f, n in zip(picked, self.flips, self.shape_zyx, strict=True)])

    def position_to_stored(self, zyx: Triple) -> Triple:
        """A canonical zyx voxel position as a stored zyx voxel position."""
        straight = [n - 1 - v if f else v for v, f, n in zip(zyx, self.flips, self.shape_zyx, strict=True)]
        return as_triple([straight[i] for i in np.argsort(self.axes)])

    def region_to_stored(self, region: Region) -> Region:
        """A canonical half-open region as a stored one."""
        ends = [
            (n - b, n - a) if f else (a, b)
            for a, b, f, n in zip(region.start_zyx, region.stop_zyx, self.flips, self.shape_zyx, strict=True)
        ]
        ordered = [ends[i] for i in np.argsort(self.axes)]
        return Region(tuple(a for a, _ in ordered), tuple(b for _, b in ordered))


@dataclass(frozen=True)
class Region:
    """A half-open box of whole voxels, zyx; may reach outside the array it refers to."""

    start_zyx: IntTriple
    stop_zyx: IntTriple

    @property
    def shape_zyx(self) -> IntTriple:
        """Voxels along each axis (zero where empty)."""
        d, h, w = (max(0, b - a) for a, b in zip(self.start_zyx, self.stop_zyx, strict=True))
        return (d, h, w)

    @property
    def is_empty(self) -> bool:
        """Whether the region holds no voxel."""
        return 0 in self.shape_zyx

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index for an array; only meaningful for a region inside it (``clip`` first)."""
        (a, b, c), (d, e, f) = self.start_zyx, self.stop_zyx
        return (slice(a, d), slice(b, e), slice(c, f))

    def slices_in(self, whole: Region) -> tuple[slice, slice, slice]:
        """Index of this region in an array that covers ``whole``, which must hold it."""
        a, b, c = whole.start_zyx
        return self.shifted((-a, -b, -c)).slices

    def placed(self, part: NDArray[T], shape_zyx: IntTriple) -> NDArray[T]:
        """An array of a shape that holds a part in this region and 0 elsewhere."""
        whole = np.zeros(shape_zyx, part.dtype)
        whole[self.slices] = part
        return whole

    def clip(self, shape_zyx: IntTriple) -> Region:
        """The part inside an array of that shape."""
        start, stop = (_each(min, _each(max, end, (0, 0, 0)), shape_zyx) for end in (self.start_zyx, self.stop_zyx))
        return Region(start, stop)

    def expand(self, margin: int) -> Region:
        """Grown by ``margin`` voxels on every side."""
        by = (margin, margin, margin)
        return Region(_each(operator.sub, self.start_zyx, by), _each(operator.add, self.stop_zyx, by))

    def shifted(self, offset_zyx: IntTriple) -> Region:
        """Moved by whole voxels."""
        return Region(_each(operator.add, self.start_zyx, offset_zyx), _each(operator.add, self.stop_zyx, offset_zyx))

    def intersection(self, other: Region) -> Region:
        """The part that lies in both; empty where they do not meet."""
        return Region(_each(max, self.start_zyx, other.start_zyx), _each(min, self.stop_zyx, other.stop_zyx))

    def slabs(self) -> Iterator[Region]:
        """The region in pieces of whole slices, of about ``SLAB_VOXELS``, so that work on it needs little memory."""
        (start, *low), (stop, *high) = self.start_zyx, self.stop_zyx
        planes = max(1, SLAB_VOXELS // max(1, math.prod(self.shape_zyx[1:])))
        for first in range(start, start if self.is_empty else stop, planes):
            yield Region((first, low[0], low[1]), (min(first + planes, stop), high[0], high[1]))

    def union(self, other: Region) -> Region:
        """The smallest region that holds both; an empty one adds nothing."""
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        return Region(_each(min, self.start_zyx, other.start_zyx), _each(max, self.stop_zyx, other.stop_zyx))


def _each(function: Callable[[int, int], int], a: IntTriple, b: IntTriple) -> IntTriple:
    return (function(a[0], b[0]), function(a[1], b[1]), function(a[2], b[2]))


EMPTY_REGION = Region((0, 0, 0), (0, 0, 0))


def bounding_region(mask: NDArray) -> Region:
    """The tight half-open region around the True voxels of a (D, H, W) mask; (0,0,0)-(0,0,0) for an empty mask."""
    ends = []
    for axis in range(3):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        ends.append((int(line[0]), int(line[-1]) + 1) if line.size else (0, 0))
    return Region(tuple(a for a, _ in ends), tuple(b for _, b in ends))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CropFrame:
    """A model's window on a canonical volume: an axis-aligned box of any real position and size, sampled on a fixed
    grid.

    Crop voxel centre ``c`` lies at volume position ``origin + (c + 0.5) * step - 0.5`` along each axis, in volume
    voxels.

    Attributes:
        origin_zyx_vox: Low corner (voxel edge, so 0 is the edge of the first voxel) in volume voxels; may be negative.
        step_zyx_vox: Volume voxels per crop voxel along each axis.
        shape_zyx: Crop voxels along each axis.
    """

    origin_zyx_vox: Triple
    step_zyx_vox: Triple
    shape_zyx: IntTriple

    @classmethod
    def centred(cls, centre_zyx: Triple, step_zyx_vox: Triple, shape_zyx: IntTriple) -> CropFrame:
        """The frame whose middle is the centre of the volume voxel position ``centre_zyx``."""
        origin = [c + 0.5 - n * s / 2 for c, s, n in zip(centre_zyx, step_zyx_vox, shape_zyx, strict=True)]
        return cls(as_triple(origin), as_triple(list(step_zyx_vox)), shape_zyx)

    @property
    def extent_zyx_vox(self) -> Triple:
        """Edge lengths in volume voxels."""
        return as_triple([n * s for n, s in zip(self.shape_zyx, self.step_zyx_vox, strict=True)])

    def to_crop(self, zyx: Triple) -> Triple:
        """A volume voxel position as a crop voxel position."""
        return as_triple(
            [(v + 0.5 - o) / s - 0.5 for v, o, s in zip(zyx, self.origin_zyx_vox, self.step_zyx_vox, strict=True)]
        )

    def to_volume(self, zyx: Triple) -> Triple:
        """A crop voxel position as a volume voxel position."""
        return as_triple(
            [o + (v + 0.5) * s - 0.5 for v, o, s in zip(zyx, self.origin_zyx_vox, self.step_zyx_vox, strict=True)]
        )

    def contains(self, zyx: Triple, margin_vox: float = 0.0) -> bool:
        """Whether a volume position lies inside, at least ``margin_vox`` crop voxels from every face."""
        crop = self.to_crop(zyx)
        return all(-0.5 + margin_vox <= v < n - 0.5 - margin_vox for v, n in zip(crop, self.shape_zyx, strict=True))

    def zoomed(self, factor: float) -> CropFrame:
        """The same centre and shape with ``factor`` times the extent."""
        middle = [o + e / 2 - 0.5 for o, e in zip(self.origin_zyx_vox, self.extent_zyx_vox, strict=True)]
        return CropFrame.centred(as_triple(middle), as_triple([s * factor for s in self.step_zyx_vox]), self.shape_zyx)

    def shifted(self, offset_zyx_vox: Triple) -> CropFrame:
        """Moved by an offset in volume voxels."""
        return replace(
            self, origin_zyx_vox=as_triple([o + d for o, d in zip(self.origin_zyx_vox, offset_zyx_vox, strict=True)])
        )

    def part(self, region: Region) -> CropFrame:
        """The frame of a region of its voxels."""
        offset = [n * s for n, s in zip(region.start_zyx, self.step_zyx_vox, strict=True)]
        return replace(self.shifted(as_triple(offset)), shape_zyx=region.shape_zyx)

    def in_crop(self, crop: CropFrame) -> CropFrame:
        """The same box on the voxels of another crop."""
        origin = np.subtract(self.origin_zyx_vox, crop.origin_zyx_vox) / crop.step_zyx_vox
        return CropFrame(as_triple(origin), as_triple(np.divide(self.step_zyx_vox, crop.step_zyx_vox)), self.shape_zyx)

    def snapped(self) -> CropFrame:
        """Moved by at most half a volume voxel so that its first voxel centre is a volume voxel's: at step 1 nothing is
        interpolated.
        """
        first = [o + 0.5 * s - 0.5 for o, s in zip(self.origin_zyx_vox, self.step_zyx_vox, strict=True)]
        return self.shifted(as_triple([float(np.floor(f + 0.5)) - f for f in first]))

    def region(self) -> Region:
        """The whole volume voxels whose centres lie inside the frame (half-open, not clipped)."""
        low = [int(np.ceil(o - 0.5)) for o in self.origin_zyx_vox]
        high = [int(np.ceil(o + e - 0.5)) for o, e in zip(self.origin_zyx_vox, self.extent_zyx_vox, strict=True)]
        return Region((low[0], low[1], low[2]), (high[0], high[1], high[2]))

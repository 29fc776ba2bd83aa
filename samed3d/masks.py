"""Cleaning and measuring finished masks, in millimetres. Pure numpy, scipy, edt and cc3d."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, Grid, Region, Triple, bounding_region

_DEVIATIONS = 4  # of the Gaussian, as scipy cuts it


@dataclass(frozen=True)
class Cleaning:
    """What to do with a mask, in the order of the fields; the defaults leave it as it is.

    Attributes:
        min_island_mm3: Remove connected pieces (26 neighbours) below this volume.
        keep_largest: Keep the largest piece only.
        fill_holes: Fill background that the mask encloses in 3D.
        smooth_mm: Round the surface by a Gaussian of this deviation; what is thinner disappears.
        grow_mm: Move the surface outwards by this distance; a negative one inwards.
    """

    min_island_mm3: float = 0.0
    keep_largest: bool = False
    fill_holes: bool = False
    smooth_mm: float = 0.0
    grow_mm: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or (value < 0 and field.name != "grow_mm"):
                raise InputError(f"{field.name} must be a number of 0 or more, got {value}")

    def margin(self, spacing_zyx_mm: Triple) -> int:
        """Voxels beyond the mask's box that can change."""
        return 1 + math.ceil((_DEVIATIONS * self.smooth_mm + max(self.grow_mm, 0.0)) / min(spacing_zyx_mm))

    def apply(self, mask: NDArray[np.bool_], spacing_zyx_mm: Triple) -> NDArray[np.bool_]:
        """The cleaned mask.

        Args:
            mask: (D, H, W), with ``margin`` voxels of background around the structure unless the image ends there.
            spacing_zyx_mm: Voxel edges along z, y, x.
        """
        import edt
        from scipy.ndimage import binary_fill_holes, gaussian_filter

        voxel_mm3 = math.prod(spacing_zyx_mm)
        if self.min_island_mm3 or self.keep_largest:
            mask = self._without_islands(mask, voxel_mm3)
        if self.fill_holes:
            mask = binary_fill_holes(mask)
        if self.smooth_mm:
            deviations = [self.smooth_mm / spacing for spacing in spacing_zyx_mm]
            mask = gaussian_filter(mask.astype(np.float32), deviations, truncate=_DEVIATIONS) > 0.5
        if self.grow_mm > 0 and mask.any():
            mask = edt.edt(~mask, anisotropy=spacing_zyx_mm) <= self.grow_mm
        elif self.grow_mm < 0:
            mask = edt.edt(mask, anisotropy=spacing_zyx_mm) > -self.grow_mm
        return mask

    def _without_islands(self, mask: NDArray[np.bool_], voxel_mm3: float) -> NDArray[np.bool_]:
        import cc3d

        pieces = cc3d.connected_components(mask, connectivity=26)
        voxels = cc3d.statistics(pieces)["voxel_counts"]
        voxels[0] = 0
        kept = voxels * voxel_mm3 >= max(self.min_island_mm3, voxel_mm3)
        if self.keep_largest and kept.any():
            kept &= np.arange(len(kept)) == voxels.argmax()
        return kept[pieces]


def clean_labels(labels: NDArray[np.unsignedinteger], spacing_zyx_mm: Triple, cleaning: Cleaning) -> NDArray:
    """Every structure of a (D, H, W) label map cleaned; one that grows takes background only."""
    from scipy.ndimage import find_objects

    cleaned = labels.copy()
    margin = cleaning.margin(spacing_zyx_mm)
    for value, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        region = Region(tuple(s.start for s in box), tuple(s.stop for s in box)).expand(margin).clip(labels.shape)
        before, part = labels[region.slices] == value, cleaned[region.slices]
        after = cleaning.apply(before, spacing_zyx_mm)
        part[before & ~after] = 0
        part[after & (part == 0)] = value
    return cleaned


def measure_mask(mask: NDArray[np.bool_], grid: Grid, image: NDArray | None = None) -> dict[str, Any]:
    """Size of a structure, its axial diameters and its intensities.

    Args:
        mask: (D, H, W), in the stored order of ``grid``.
        grid: Where it lies.
        image: (D, H, W) intensities, for mean, standard deviation, minimum and maximum.

    Returns:
        ``voxels``, ``ml``, ``pieces``, ``longest_axial_mm`` (the longest diameter within an axial slice, between outer
        voxel corners), ``perpendicular_mm`` (the longest chord at a right angle to it in that slice), and ``mean sd min
        max`` if there is an image. Axial is the nearest axis of an oblique image.
    """
    import cc3d

    view = CanonicalView.of(grid)
    region = bounding_region(mask)
    found: dict[str, Any] = {"voxels": int(np.count_nonzero(mask[region.slices]))}
    found["ml"] = found["voxels"] * math.prod(grid.spacing_xyz_mm) / 1000
    found["pieces"] = int(cc3d.connected_components(mask[region.slices], connectivity=26).max(initial=0))
    longest, chord = _axial_diameters(view.to_canonical(mask[region.slices]), view.spacing_zyx_mm)
    found |= {"longest_axial_mm": longest, "perpendicular_mm": chord}
    if image is not None and found["voxels"]:
        values = image[region.slices][mask[region.slices]].astype(np.float64)
        statistics = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
        found |= {name: float(value) for name, value in statistics.items()}
    return found


def _axial_diameters(mask: NDArray[np.bool_], spacing_zyx_mm: Triple) -> tuple[float, float]:
    """The longest axial diameter of a canonical mask, between voxel corners, and the chord across it."""
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist, squareform

    edges = np.array(spacing_zyx_mm[1:])
    longest, along, chosen = 0.0, np.zeros(2), 0
    for z in np.flatnonzero(mask.any(axis=(1, 2))):
        voxels = np.argwhere(mask[z])
        if np.linalg.norm((np.ptp(voxels, axis=0) + 1) * edges) <= longest:
            continue
        corners = np.concatenate([voxels + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))]) * edges
        hull = corners[ConvexHull(corners).vertices]
        distances = squareform(pdist(hull))
        first, second = np.unravel_index(distances.argmax(), distances.shape)
        if distances[first, second] > longest:
            longest, chosen = float(distances[first, second]), int(z)
            along = (hull[second] - hull[first]) / longest
    if not longest:
        return 0.0, 0.0
    across = np.array([-along[1], along[0]])
    points = np.argwhere(mask[chosen]) * edges
    rows = np.floor(points @ along / edges.min()).astype(int)
    offsets = points @ across
    order = np.lexsort((offsets, rows))
    ends = np.split(offsets[order], np.flatnonzero(np.diff(rows[order])) + 1)
    return longest, max(float(end[-1] - end[0]) for end in ends) + float(np.abs(across) @ edges)

"""SimpleITK's region methods from clicks: confidence-connected growing, and fast marching as a geodesic distance.

Their constants were chosen on training subjects (docs/measure.md, ``benchmarks/tune_baselines.py``) and are the same
for every image. Read
``random_walker.py`` next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from samed3d.evaluation.baselines.base import ClassicalMethod, Said, longest_edge_mm, region_around
from samed3d.geometry import IntTriple
from samed3d.volume import Volume, grow_region
from samed3d.volume.regions import smoothed_gradient, travel_time

MULTIPLIER = 0.75
"""Width of the accepted intensities in standard deviations."""
REACH, SHARPNESS = 0.3, 0.5
"""How far a front runs in flat regions, as a share of the image's longest edge; how much an edge of the image slows
it."""


class RegionGrowing(ClassicalMethod):
    """SimpleITK's confidence-connected region growing from all positive clicks; negative clicks have no meaning for it
    and are ignored.
    """

    name = "region_growing"

    def __init__(self, volume: Volume, truth: NDArray[np.bool_] | None = None, multiplier: float = MULTIPLIER) -> None:
        super().__init__(volume, truth)
        self.multiplier = multiplier

    def segment(self, said: Said) -> NDArray[np.uint8]:
        """Grow from every positive voxel."""
        return grow_region(self.volume.array, said.inside, self.multiplier)


class FastMarching(ClassicalMethod):
    """SimpleITK's fast marching as a geodesic distance: a voxel belongs to whichever click reaches it first, and to
    none beyond a limit.

    The front goes 1 mm per unit of time in a flat region and slower the steeper the image is there, measured by its
    median steepness. Only voxels that it can reach within the limit are looked at.
    """

    name = "fast_marching"
    smoothing = 1.0
    """Standard deviation of the Gaussian before the gradient, in voxels of the finest axis."""

    def __init__(
        self, volume: Volume, truth: NDArray[np.bool_] | None = None, reach: float = REACH, sharpness: float = SHARPNESS
    ) -> None:
        super().__init__(volume, truth)
        self.limit_mm, self.sharpness = reach * longest_edge_mm(volume), sharpness

    def segment(self, said: Said) -> NDArray[np.bool_]:
        """Race the fronts of the positive and the negative voxels."""
        spacing, shape = self.volume.grid.spacing_zyx_mm, self.volume.grid.shape_zyx
        region = region_around(said.inside, self.limit_mm, spacing, shape)
        block = np.ascontiguousarray(self.volume.array[region.slices])
        gradient = smoothed_gradient(block, spacing, self.smoothing * min(spacing))
        scale = max(float(np.median(gradient[gradient > 0])) if (gradient > 0).any() else 1.0, 1e-6)
        speed = 1.0 / (1.0 + self.sharpness * gradient / scale) + 1e-3
        arrival = travel_time(speed, spacing, _inside_of(said.inside, region.start_zyx), self.limit_mm)
        found = arrival < self.limit_mm
        if said.outside and (rivals := _within(said.outside, region.start_zyx, block.shape)):
            found &= arrival <= travel_time(speed, spacing, rivals, self.limit_mm)
        mask = np.zeros(shape, bool)
        mask[region.slices] = found
        return mask


def _inside_of(voxels: list[IntTriple], start: IntTriple) -> list[IntTriple]:
    return [(z - start[0], y - start[1], x - start[2]) for z, y, x in voxels]


def _within(voxels: list[IntTriple], start: IntTriple, shape: tuple[int, ...]) -> list[IntTriple]:
    return [v for v in _inside_of(voxels, start) if all(0 <= i < n for i, n in zip(v, shape, strict=True))]

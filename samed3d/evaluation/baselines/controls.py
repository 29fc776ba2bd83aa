"""Controls that hardly look at the image, and a bound that knows the truth. A model that does not beat the first has
learnt nothing.

Not here: the control that takes the click away from a model (``contenders.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.crops import paste_crop, sample_crop
from samed3d.errors import InputError
from samed3d.evaluation.baselines.base import ClassicalMethod, Said, region_around
from samed3d.geometry import CropFrame, Triple, as_triple, bounding_region
from samed3d.volume import Volume


class DilatedBall(ClassicalMethod):
    """A ball of fixed radius around every positive click; where a negative click is nearer there is none."""

    name = "dilated_ball"
    radius_mm = 10.0

    def segment(self, said: Said) -> NDArray[np.bool_]:
        """Distances to the clicks, the image is not looked at."""
        spacing, shape = self.volume.grid.spacing_zyx_mm, self.volume.grid.shape_zyx
        region = region_around(said.inside, self.radius_mm, spacing, shape)
        grid = [np.arange(a, b) for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)]

        def nearest(voxels: list[tuple[int, int, int]]) -> NDArray[np.float64]:
            squares = np.full(region.shape_zyx, np.inf)
            for voxel in voxels:
                z, y, x = ((g - v) ** 2 * s**2 for g, v, s in zip(grid, voxel, spacing, strict=True))
                squares = np.minimum(squares, z[:, None, None] + y[:, None] + x)
            return squares

        own = nearest(said.inside)
        mask = np.zeros(shape, bool)
        mask[region.slices] = (own <= self.radius_mm**2) & (own <= nearest(said.outside))
        return mask


class ThresholdInBox(ClassicalMethod):
    """Otsu's threshold inside the box: the side that the box's middle half belongs to. Clicks after the box are
    ignored.
    """

    name = "threshold_in_box"
    takes = frozenset({"box"})

    def segment(self, said: Said) -> NDArray[np.bool_]:
        """Only the voxels of the box are looked at."""
        assert said.box is not None
        block = self.volume.array[said.box.slices].astype(np.float32)
        bright = block > _otsu(block)
        middle = tuple(slice(n // 4, n - n // 4) for n in block.shape)
        mask = np.zeros(self.volume.grid.shape_zyx, bool)
        mask[said.box.slices] = bright if bright[middle].mean() >= 0.5 else ~bright
        return mask


def _otsu(values: NDArray[np.float32], bins: int = 256) -> float:
    """The threshold that parts the values into two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_below = sums / below
        mean_above = (sums[-1] - sums + counts * centres) / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(edges[1:-1][int(np.nanargmax(between))]) if bins > 1 else float(centres[0])


class OracleBound(ClassicalMethod):
    """The truth itself, seen through an output grid of ``lattice_mm``: the best that a model with such an output could
    do.

    6 mm is what SAM-Med3D decodes to (32 voxels for 192 mm) before it interpolates.
    """

    name = "oracle_bound"
    takes = frozenset({"point", "box", "scribble"})
    knows_truth = True

    def __init__(self, volume: Volume, truth: NDArray[np.bool_] | None = None, lattice_mm: float = 6.0) -> None:
        """On a volume whose truth is known.

        Raises:
            InputError: without it.
        """
        super().__init__(volume, truth)
        if truth is None:
            raise InputError(
                "oracle_bound is made from the truth, got none; it measures what an output grid loses, not a method"
            )
        self.lattice_mm = lattice_mm

    def segment(self, said: Said) -> NDArray[np.bool_]:
        """Average the truth on the lattice, interpolate back, cut at one half; prompts change nothing."""
        assert self.truth is not None
        spacing, shape = self.volume.grid.spacing_zyx_mm, self.volume.grid.shape_zyx
        mask = np.zeros(shape, bool)
        region = bounding_region(self.truth)
        if region.is_empty:
            return mask
        steps = as_triple([self.lattice_mm / s for s in spacing])
        middle = as_triple([(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)])
        frame = CropFrame.centred(middle, steps, _cells(region.shape_zyx, steps))
        block = np.pad(
            self.truth[region.slices].astype(np.float32), 1
        )  # whatever lies beyond the block repeats its border of zeros
        coarse, _ = sample_crop(block, frame.shifted(as_triple([1.0 - a for a in region.start_zyx])))
        pasted_region, pasted = paste_crop(coarse, frame, shape)
        mask[pasted_region.slices] = torch.gt(pasted, 0.5).numpy()
        return mask


def _cells(extent_vox: tuple[int, int, int], steps: Triple) -> tuple[int, int, int]:
    """Lattice cells that hold an extent with a cell of room on either side."""
    d, h, w = (int(np.ceil(n / s)) + 3 for n, s in zip(extent_vox, steps, strict=True))
    return (d, h, w)

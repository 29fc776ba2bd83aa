"""Segmentation methods without training, which every model must beat, and an upper bound.

``region_growing``, ``fast_marching`` and ``random_walker`` are the classical interactive methods; their constants were
chosen on training subjects (``docs/measure.md``) and are the same for every image.
``dilated_ball`` and ``threshold_in_box`` are controls that use little or nothing of the image. ``oracle_bound`` is made
from the reference mask and loses only what a coarse output grid loses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.crops import paste_crop, sample_crop
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, IntTriple, Region, Triple, as_triple, bounding_region, ijk_to_zyx
from samed3d.prompts import Box, Point, Prompt, Scribble, box_in_grid, point_in_grid
from samed3d.volume import Volume
from samed3d.volume.regions import grow_region, smoothed_gradient, travel_time


@dataclass
class PromptVoxels:
    """All prompts of one object in stored zyx voxels: positive and negative voxels, and a box or None."""

    inside: list[IntTriple] = field(default_factory=list)
    outside: list[IntTriple] = field(default_factory=list)
    box: Region | None = None


@dataclass(frozen=True)
class Baseline:
    """A method without training; ``takes`` and ``knows_truth`` as in ``Method``, and clicks may always follow.

    ``segment`` makes the mask (D, H, W) from the volume, all prompts of an object (at least one positive voxel or a
    box) and the method's constants; that of a bound from the reference mask too, as ``truth``.
    """

    segment: Callable[..., NDArray]
    takes: frozenset[str] = frozenset({"point", "scribble"})
    knows_truth: bool = False


class BaselineSession:
    """A baseline on one volume; every prompt makes the object's mask anew from all prompts so far."""

    def __init__(self, name: str, volume: Volume, truth: NDArray[np.bool_] | None = None, **constants: float) -> None:
        """One of ``BASELINES`` on a volume, with constants other than its own; only bounds use ``truth``, (D, H, W).

        Raises:
            InputError: for a bound without it.
        """
        self.name, self.volume, self.kind = name, volume, BASELINES[name]
        self._constants: dict[str, Any] = dict(constants)
        if self.kind.knows_truth:
            if truth is None:
                raise InputError(
                    f"{name} is made from the truth, got none; it measures what an output grid loses, not a method"
                )
            self._constants["truth"] = truth
        self._prompts: dict[int, PromptVoxels] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Take a prompt and make the mask anew.

        Raises:
            InputError: for a prompt that the method does not take, one outside the volume, or a negative click before
                anything else.
        """
        before, takes = self._prompts.get(object_id), self.kind.takes
        kind = type(prompt).__name__.lower()
        follows = before is not None and isinstance(prompt, Point)
        if not isinstance(prompt, Point | Scribble | Box) or (kind not in takes and not follows):
            if "box" not in takes:
                taken = "points only"
            else:
                taken = "points, boxes and scribbles" if "point" in takes else "a box first"
            raise InputError(f"{self.name} takes {taken}, got a {kind}")
        said = PromptVoxels(list(before.inside), list(before.outside), before.box) if before else PromptVoxels()
        self._record(said, prompt)
        if not said.inside and said.box is None:
            raise InputError(f"{self.name} needs a positive prompt before a negative one")
        self._masks[object_id] = self.kind.segment(self.volume, said, **self._constants).astype(np.uint8)
        self._prompts[object_id] = said

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The object's mask, uint8 0 or 1, (D, H, W)."""
        return self._masks[object_id]

    def _record(self, said: PromptVoxels, prompt: Point | Scribble | Box) -> None:
        grid = self.volume.grid
        if isinstance(prompt, Box):
            low, high = (nearest_voxel(corner) for corner in box_in_grid(prompt, grid))
            said.box = Region(low, (high[0] + 1, high[1] + 1, high[2] + 1))
            return
        places = [prompt.at] if isinstance(prompt, Point) else prompt.path
        points = [Point(at, prompt.positive, prompt.space) for at in places]
        side = said.inside if prompt.positive else said.outside
        side.extend(nearest_voxel(point_in_grid(point, grid)) for point in points)


def region_growing(volume: Volume, said: PromptVoxels, multiplier: float = 0.75) -> NDArray[np.uint8]:
    """SimpleITK's confidence-connected region growing from all positive clicks; negative clicks are ignored.

    ``multiplier`` is the width of the accepted intensities in standard deviations.
    """
    return grow_region(volume.array, said.inside, multiplier)


SMOOTHING = 1.0
"""Standard deviation of the Gaussian before the gradient, in voxels of the finest axis."""


def fast_marching(volume: Volume, said: PromptVoxels, reach: float = 0.3, sharpness: float = 0.5) -> NDArray[np.bool_]:
    """SimpleITK's fast marching as a geodesic distance: a voxel belongs to the nearest click within a limit.

    The front moves 1 mm per unit of time in a flat region and slower where the image gradient is large compared with
    its median: by ``sharpness``. The limit is the share ``reach`` of the image's longest edge; only voxels that the
    front can reach within it are computed.
    """
    limit_mm = reach * longest_edge_mm(volume)
    spacing, shape = volume.grid.spacing_zyx_mm, volume.grid.shape_zyx
    region = _region_around(said.inside, limit_mm, volume)
    block = np.ascontiguousarray(volume.array[region.slices])
    gradient = smoothed_gradient(block, spacing, SMOOTHING * min(spacing))
    scale = float(np.median(gradient[gradient > 0])) if (gradient > 0).any() else 1.0
    speed = 1.0 / (1.0 + sharpness * gradient / scale) + 1e-3
    own, rivals = (_within(voxels, region.start_zyx, block.shape) for voxels in (said.inside, said.outside))
    arrival = travel_time(speed, spacing, own, limit_mm)
    found = arrival < limit_mm
    if rivals:
        found &= arrival <= travel_time(speed, spacing, rivals, limit_mm)
    mask = np.zeros(shape, bool)
    mask[region.slices] = found
    return mask


def _within(voxels: list[IntTriple], start: IntTriple, shape: tuple[int, ...]) -> list[IntTriple]:
    """Those of the voxels that lie in a block, by their place in it."""
    moved = [(z - start[0], y - start[1], x - start[2]) for z, y, x in voxels]
    return [v for v in moved if all(0 <= i < n for i, n in zip(v, shape, strict=True))]


CELLS = 28
"""Most voxels of the random walker's crop along an axis."""
BRUSH = 1


def random_walker(volume: Volume, said: PromptVoxels, reach: float = 0.3, beta: float = 30.0) -> NDArray[np.bool_]:
    """scikit-image's random walker on a bounded, coarse crop, which takes about a second.

    The crop reaches a share ``reach`` of the image's longest edge beyond the positive clicks and is sampled with at
    most ``CELLS`` voxels along each axis. Its border counts as negative clicks, or a first click would take everything.
    A click paints a cube of ``2 * BRUSH + 1`` cells, because a single cell has hardly any influence. ``beta`` is how
    strongly a difference of intensity hinders the walk.

    Source:
        Grady, Random walks for image segmentation, PAMI 2006; scikit-image's implementation.
    """
    try:
        from skimage.segmentation import random_walker as walk
    except ImportError as error:
        raise InputError("random_walker needs scikit-image: pip install scikit-image") from error
    spacing, shape = volume.grid.spacing_zyx_mm, volume.grid.shape_zyx
    frame = _walked_frame(volume, said, reach * longest_edge_mm(volume))
    crop, inside = sample_crop(volume.array, frame)
    labels = np.full(frame.shape_zyx, 0, np.int32)
    for axis in range(3):
        if frame.shape_zyx[axis] > 2:
            index: list[slice | list[int]] = [slice(None)] * 3
            index[axis] = [0, -1]
            labels[tuple(index)] = 2
    labels[~inside.numpy()] = -1
    for voxels, value in ((said.outside, 2), (said.inside, 1)):
        for voxel in voxels:
            at = tuple(int(np.floor(v + 0.5)) for v in frame.to_crop(as_triple(list(voxel))))
            if all(0 <= v < n for v, n in zip(at, frame.shape_zyx, strict=True)):
                brush = labels[tuple(slice(max(v - BRUSH, 0), v + BRUSH + 1) for v in at)]
                brush[brush != -1] = value
    if not (labels == 2).any():
        return np.ones(shape, bool)
    step_mm = [s * t for s, t in zip(spacing, frame.step_zyx_vox, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises other solvers
        walked = walk(crop.numpy(), labels, beta=beta, mode="cg_j", tol=1e-3, return_full_prob=True, spacing=step_mm)
    probability = torch.from_numpy(np.nan_to_num(walked[0]).astype(np.float32))
    region, pasted = paste_crop(probability, frame, shape)
    mask = np.zeros(shape, bool)
    mask[region.slices] = pasted.numpy() > 0.5
    return mask


def _walked_frame(volume: Volume, said: PromptVoxels, reach_mm: float) -> CropFrame:
    """A box around the positive clicks with nearly cubic cells, never finer than the image."""
    spacing = volume.grid.spacing_zyx_mm
    low = [min(v[a] for v in said.inside) * s - reach_mm for a, s in enumerate(spacing)]
    high = [max(v[a] for v in said.inside) * s + reach_mm for a, s in enumerate(spacing)]
    low = [max(v, -0.5 * s) for v, s in zip(low, spacing, strict=True)]
    high = [min(v, (n - 0.5) * s) for v, n, s in zip(high, volume.grid.shape_zyx, spacing, strict=True)]
    cell = max(b - a for a, b in zip(low, high, strict=True)) / CELLS
    steps = as_triple([max(1.0, cell / s) for s in spacing])
    d, h, w = (max(1, int(np.ceil((b - a) / s / t))) for a, b, s, t in zip(low, high, spacing, steps, strict=True))
    middle = as_triple([(a + b) / 2 / s for a, b, s in zip(low, high, spacing, strict=True)])
    return CropFrame.centred(middle, steps, (d, h, w))


RADIUS_MM = 10.0


def dilated_ball(volume: Volume, said: PromptVoxels) -> NDArray[np.bool_]:
    """A ball of fixed radius around every positive click, without the voxels that are nearer to a negative click."""
    spacing, shape = volume.grid.spacing_zyx_mm, volume.grid.shape_zyx
    region = _region_around(said.inside, RADIUS_MM, volume)
    grid = [np.arange(a, b) for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)]

    def nearest(voxels: list[tuple[int, int, int]]) -> NDArray[np.float64]:
        squares = np.full(region.shape_zyx, np.inf)
        for voxel in voxels:
            z, y, x = ((g - v) ** 2 * s**2 for g, v, s in zip(grid, voxel, spacing, strict=True))
            squares = np.minimum(squares, z[:, None, None] + y[:, None] + x)
        return squares

    own = nearest(said.inside)
    mask = np.zeros(shape, bool)
    mask[region.slices] = (own <= RADIUS_MM**2) & (own <= nearest(said.outside))
    return mask


def threshold_in_box(volume: Volume, said: PromptVoxels) -> NDArray[np.bool_]:
    """Otsu's threshold inside the box: the side that most of the box's middle belongs to. Later clicks are ignored."""
    assert said.box is not None
    block = volume.array[said.box.slices].astype(np.float32)
    bright = block > _otsu(block)
    middle = tuple(slice(n // 4, n - n // 4) for n in block.shape)
    mask = np.zeros(volume.grid.shape_zyx, bool)
    mask[said.box.slices] = bright if bright[middle].mean() >= 0.5 else ~bright
    return mask


def _otsu(values: NDArray[np.float32], bins: int = 256) -> float:
    """The threshold that separates the values into two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_below = sums / below
        mean_above = (sums[-1] - sums + counts * centres) / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(edges[1:-1][int(np.nanargmax(between))])


def oracle_bound(
    volume: Volume, said: PromptVoxels, truth: NDArray[np.bool_], lattice_mm: float = 6.0
) -> NDArray[np.bool_]:
    """The reference mask on an output grid of ``lattice_mm``: the upper bound of a model with such an output.

    The truth is averaged on the lattice, interpolated back and cut at one half; prompts change nothing. 6 mm is the
    grid that SAM-Med3D decodes to (32 voxels for 192 mm) before it interpolates.
    """
    spacing, shape = volume.grid.spacing_zyx_mm, volume.grid.shape_zyx
    mask = np.zeros(shape, bool)
    region = bounding_region(truth)
    if region.is_empty:
        return mask
    steps = as_triple([lattice_mm / s for s in spacing])
    middle = as_triple([(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)])
    # lattice cells that hold the structure with a cell of room on either side
    d, h, w = (int(np.ceil(n / s)) + 3 for n, s in zip(region.shape_zyx, steps, strict=True))
    frame = CropFrame.centred(middle, steps, (d, h, w))
    # Sampling repeats the block's border beyond it: a border of zeros.
    block = np.pad(truth[region.slices].astype(np.float32), 1)
    coarse, _ = sample_crop(block, frame.shifted(as_triple([1.0 - a for a in region.start_zyx])))
    pasted_region, pasted = paste_crop(coarse, frame, shape)
    mask[pasted_region.slices] = torch.gt(pasted, 0.5).numpy()
    return mask


def longest_edge_mm(volume: Volume) -> float:
    """The image's longest edge: the length scale where nothing is known of the structure, as for our own first crop."""
    return max(n * s for n, s in zip(volume.grid.shape_zyx, volume.grid.spacing_zyx_mm, strict=True))


def _region_around(voxels: list[IntTriple], reach_mm: float, volume: Volume) -> Region:
    """The part of a volume within ``reach_mm`` of some voxels along each axis."""
    reach = [int(np.ceil(reach_mm / s)) for s in volume.grid.spacing_zyx_mm]
    low = tuple(min(v[a] for v in voxels) - reach[a] for a in range(3))
    high = tuple(max(v[a] for v in voxels) + reach[a] + 1 for a in range(3))
    return Region(low, high).clip(volume.grid.shape_zyx)  # type: ignore[arg-type]


def nearest_voxel(ijk: Triple) -> IntTriple:
    """The zyx voxel of an ijk position."""
    z, y, x = (int(np.floor(v + 0.5)) for v in ijk_to_zyx(ijk))
    return (z, y, x)


BASELINES = {
    "region_growing": Baseline(region_growing),
    "fast_marching": Baseline(fast_marching),
    "random_walker": Baseline(random_walker),
    "dilated_ball": Baseline(dilated_ball),
    "threshold_in_box": Baseline(threshold_in_box, frozenset({"box"})),
    "oracle_bound": Baseline(oracle_bound, frozenset({"point", "box", "scribble"}), knows_truth=True),
}

"""A model's window on a volume: sample it, normalise it, paste the answer back. Torch only, no file access.

A crop is axis-aligned, so resampling is three small matrix products, one per axis: linear interpolation when zooming
in, a triangle filter as wide as the step when zooming out (no aliasing). Only the part of the volume under the crop is
ever touched.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samed3d.geometry import EMPTY_REGION, CropFrame, IntTriple, Region
from samed3d.resample import axis_weights

CLAMP_SIGMA = 4.0
"""Normalised intensities are cut at this many standard deviations: metal and bright vessels must not set the scale."""
LEAST_DEVIATION = 1e-6
"""The smallest deviation that counts, as a share of the largest intensity: a few steps of single precision."""
RANK_BINS = 2048
CT_LOWEST_HU = -500.0
"""An image without a stated modality counts as CT if its lowest value is this low: only CT shows air so far below 0."""
BACKGROUND_LOGIT = -8.0
"""Logit of voxels that no crop has seen."""


class Voxels(Protocol):
    """A (D, H, W) array, or what reads or computes parts of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __getitem__(self, index: Any, /) -> Any: ...


def _axis_matrix(position: NDArray, size: int, step: float) -> Tensor:
    return torch.from_numpy(axis_weights(position.astype(np.float32, copy=False), size, step))


def _resample(block: Tensor, matrices: list[Tensor]) -> Tensor:
    """Apply one matrix per axis to (..., D, H, W)."""
    z, y, x = matrices
    block = torch.matmul(block, x.T)
    block = torch.matmul(y, block)
    return torch.matmul(z, block.flatten(-2)).unflatten(-1, (y.shape[0], x.shape[0]))


def sample_crop(array: Voxels, frame: CropFrame) -> tuple[Tensor, Tensor]:
    """Sample a canonical (D, H, W) array on a frame.

    Returns:
        The crop (frame shape) float32, where voxels outside the volume repeat its border, and ``inside``, a bool mask
        of the same shape that is True where the crop voxel's centre lies in the volume.
    """
    matrices, flags = [], []
    slices: list[slice] = []
    for axis in range(3):
        step, count, size = frame.step_zyx_vox[axis], frame.shape_zyx[axis], array.shape[axis]
        position = frame.origin_zyx_vox[axis] + (np.arange(count, dtype=np.float32) + 0.5) * step - 0.5
        reach = int(np.ceil(max(1.0, step))) + 1
        low = min(max(0, int(np.floor(float(position[0]))) - reach), size - 1)
        high = max(min(size, int(np.ceil(float(position[-1]))) + reach + 1), low + 1)
        matrices.append(_axis_matrix(position - low, high - low, step))
        slices.append(slice(low, high))
        flags.append(torch.from_numpy((position >= -0.5) & (position < size - 0.5)))
    z, y, x = matrices
    small = torch.empty(z.shape[1], y.shape[0], x.shape[0])
    block = Region(tuple(s.start for s in slices), tuple(s.stop for s in slices))
    for part in block.slabs():
        slab = torch.from_numpy(np.ascontiguousarray(array[part.slices], dtype=np.float32))
        small[part.slices_in(block)[0]] = torch.matmul(y, torch.matmul(slab, x.T))
    inside = flags[0][:, None, None] & flags[1][None, :, None] & flags[2][None, None, :]
    return torch.matmul(z, small.flatten(-2)).unflatten(-1, small.shape[1:]), inside


def paste_crop(
    crop: Tensor, frame: CropFrame, shape_zyx: IntTriple, within: Region | None = None
) -> tuple[Region, Tensor]:
    """Resample crop logits to the volume's own voxels.

    Returns:
        The region of the volume (its part in ``within``, if given) whose voxel centres lie under the crop, and the
        values there.
    """
    region = frame.region().clip(shape_zyx)
    region = region if within is None else region.intersection(within)
    matrices, used = [], []
    for axis in range(3):
        voxels = np.arange(region.start_zyx[axis], region.stop_zyx[axis], dtype=np.float32)
        step = frame.step_zyx_vox[axis]
        position = (voxels + 0.5 - frame.origin_zyx_vox[axis]) / step - 0.5
        matrix = _axis_matrix(position, frame.shape_zyx[axis], 1.0 / step)
        near = torch.nonzero(matrix.any(dim=0))
        used.append(slice(int(near[0]), int(near[-1]) + 1) if len(near) else slice(0))
        matrices.append(matrix[:, used[-1]])
    return region, _resample(crop[(..., *used)].float(), matrices)


class TileSum:
    """Sums of weighted tiles on a region of the volume that grows to hold them.

    Attributes:
        region: Where the sums lie.
        values: (*channels, D, H, W) on the region.
    """

    def __init__(self, channels: tuple[int, ...], region: Region = EMPTY_REGION) -> None:
        self.region, self.values = region, torch.zeros(*channels, *region.shape_zyx)

    def add(self, region: Region, values: Tensor) -> None:
        """Add (*channels, d, h, w) values on a region."""
        self.grow(region)
        self.values[(..., *region.slices_in(self.region))] += values

    def grow(self, region: Region) -> None:
        """Hold another region as well, with zeros where nothing was added."""
        whole = self.region.union(region)
        if whole == self.region:
            return
        values = torch.zeros(*self.values.shape[:-3], *whole.shape_zyx)
        if not self.region.is_empty:
            values[(..., *self.region.slices_in(whole))] = self.values
        self.region, self.values = whole, values


def is_ct(modality: str, array: NDArray) -> bool:
    """Whether intensities are Hounsfield units, which some models clamp; one rule for training and inference.

    Args:
        modality: As DICOM, a data set or a user states it: ``"CT"``, ``"CT (portal)"``, ``"MR"``, ...; empty if nobody
            does. Then the image counts as CT if its lowest value is at most ``CT_LOWEST_HU``.
        array: The whole image, read only if no modality is stated.
    """
    stated = modality.strip().upper()
    return stated.startswith("CT") if stated else float(np.min(array[:])) <= CT_LOWEST_HU


def normalise(crop: Tensor, inside: Tensor, method: str, clamp: tuple[float, float] | None = None) -> Tensor:
    """Intensities as a model's spec asks, per sample.

    Args:
        crop: (D, H, W) raw intensities.
        inside: (D, H, W) bool, which voxels belong to the volume.
        method: ``"zscore"``: mean and deviation of the inside voxels, cut at +-4, outside 0. ``"zscore_rank"``: that,
            and a second channel with each voxel's rank among the inside voxels (0 mean, about unit deviation), which
            shows soft tissue beside air and bone.
            ``"zscore_positive"``: outside counts as 0, mean and deviation of voxels > 0 (SAM-Med3D).
        clamp: Intensity limits applied first, or None.

    Returns:
        (C, D, H, W), C = ``image_channels(method)``.
    """
    if clamp is not None:
        crop = crop.clamp(*clamp)
    crop = _near_one(crop)
    if method == "zscore_positive":
        crop = torch.where(inside, crop, 0.0)
        chosen = crop[crop > 0]
        chosen = chosen if chosen.numel() > 1 else crop.flatten()
        return ((crop - chosen.mean()) / chosen.std().clamp(min=LEAST_DEVIATION))[None]
    channels = image_channels(method)
    everywhere = bool(inside.all())  # most crops: picking voxels would cost more than all else
    chosen = crop.flatten() if everywhere else crop[inside]
    if chosen.numel() == 0:
        return crop.new_zeros(channels, *crop.shape)
    scaled = (crop - chosen.mean()) / chosen.std(correction=0).clamp(min=LEAST_DEVIATION)
    scaled.clamp_(-CLAMP_SIGMA, CLAMP_SIGMA)
    if not everywhere:
        scaled = torch.where(inside, scaled, 0.0)
    return scaled[None] if channels == 1 else torch.stack([scaled, _rank(scaled, None if everywhere else inside)])


def _near_one(crop: Tensor) -> Tensor:
    """Intensities times the power of two that brings the largest to between 0.5 and 1.

    That rounds nothing, so that an image gives the same result in any unit, and no square of it leaves single
    precision.
    """
    largest = max(abs(float(end)) for end in crop.aminmax())
    return crop * 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))


def image_channels(method: str) -> int:
    """Channels that ``normalise`` returns for a method.

    Raises:
        ValueError: for an unknown method.
    """
    channels = {"zscore": 1, "zscore_positive": 1, "zscore_rank": 2}
    if method not in channels:
        raise ValueError(f"normalisation must be one of {', '.join(channels)}, got {method!r}")
    return channels[method]


def _rank(scaled: Tensor, inside: Tensor | None) -> Tensor:
    """Each inside voxel's middle rank by a fine histogram, scaled to the mean 0 and deviation 1 of a uniform spread;
    outside 0.

    Equal voxels share the middle of their ranks: a constant background gets one value that depends only on its share.
    ``inside`` None is everywhere.
    """
    index = ((scaled + CLAMP_SIGMA) * ((RANK_BINS - 1) / (2 * CLAMP_SIGMA))).round_().int()
    counts = torch.bincount(index.flatten() if inside is None else index[inside], minlength=RANK_BINS).to(scaled.dtype)
    below = torch.cumsum(counts, dim=0) - counts
    rank = (
        (((below + 0.5 * counts) / counts.sum() - 0.5) * math.sqrt(12.0))
        .index_select(0, index.flatten())
        .view_as(scaled)
    )
    return rank if inside is None else torch.where(inside, rank, 0.0)

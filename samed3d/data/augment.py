"""Augmentation of a raw crop, cheap enough to never hold up training: axes, contrast, bias, blur, resolution, noise.
Torch only.

Intensities keep their scale: normalising comes after, as the model's spec asks. Scale and place change where the crop
is cut (``data/sampling.py``), at no cost. ``docs/design_notes.md`` compares the speed with torchio's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PERMUTE_PROBABILITY = 0.3
BLUR_SIGMA_VOX = (0.5, 1.5)


def orient(volumes: list[Tensor], rng: np.random.Generator, *, reorder: bool = True) -> list[Tensor]:
    """Mirror each axis with probability one half, with ``reorder`` sometimes exchange those of a cubic crop; all
    tensors alike.
    """
    axes = [axis for axis in range(3) if rng.random() < 0.5]
    cubic = len(set(volumes[0].shape)) == 1
    order = (
        [int(a) for a in rng.permutation(3)] if reorder and cubic and rng.random() < PERMUTE_PROBABILITY else [0, 1, 2]
    )
    return [v.flip(axes).permute(order).contiguous() for v in volumes]


def augment_intensity(image: Tensor, inside: Tensor, generator: Generator, blur_probability: float = 0.0) -> Tensor:
    """Change what a scanner or a contrast agent might change.

    Args:
        image: (D, H, W) raw intensities.
        inside: (D, H, W) bool, the voxels that belong to the volume.
        generator: Source of all randomness.
        blur_probability: Chance of a Gaussian blur; at 0 nothing is drawn for it, so that other draws stay as they are
            without.
    """

    def chance(probability: float) -> bool:
        return bool(torch.rand(1, generator=generator) < probability)

    def between(low: float, high: float) -> float:
        return float(torch.rand(1, generator=generator)) * (high - low) + low

    chosen = image[inside]
    if chosen.numel() < 2 or float(chosen.max()) <= float(chosen.min()):
        return image
    low, high, deviation = float(chosen.min()), float(chosen.max()), float(chosen.std())
    if chance(0.5):
        image = low + (high - low) * ((image - low) / (high - low)).clamp(0, 1) ** math.exp(between(-0.5, 0.5))
    if chance(0.15):
        image = low + high - image
    if chance(0.3):
        coarse = torch.randn(1, 1, 3, 3, 3, generator=generator) * between(0.05, 0.3)
        image = low + (image - low) * (
            1 + F.interpolate(coarse, size=image.shape, mode="trilinear", align_corners=True)[0, 0]
        )
    if blur_probability and chance(blur_probability):
        image = gaussian_blur(image, between(*BLUR_SIGMA_VOX))
    if chance(0.25):
        size = [max(4, int(n / between(1.2, 3.0))) for n in image.shape]
        small = F.interpolate(image[None, None], size=size, mode="trilinear", align_corners=False)
        image = F.interpolate(small, size=image.shape, mode="trilinear", align_corners=False)[0, 0]
    if chance(0.4):
        image = image + torch.randn(image.shape, generator=generator) * (between(0.0, 0.3) * deviation)
    return image


def gaussian_blur(image: Tensor, sigma_vox: float) -> Tensor:
    """(D, H, W) smoothed by a Gaussian that is cut at three deviations; at the border the nearest voxel goes on."""
    radius = max(1, math.ceil(3 * sigma_vox))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma_vox) ** 2)
    weights /= weights.sum()
    for axis in range(3):
        size = image.shape[axis]
        padded = image.index_select(axis, torch.arange(-radius, size + radius).clamp(0, size - 1))
        image = torch.zeros_like(image)
        for offset, weight in enumerate(weights.tolist()):
            image.add_(padded.narrow(axis, offset, size), alpha=weight)
    return image

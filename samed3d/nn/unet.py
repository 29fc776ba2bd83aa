"""Convolution blocks of the U-shaped models, written for channels-last tensors: a block costs its convolutions and
little else.

Norms are over channels at each voxel, so a voxel's value does not depend on what else the crop holds, and any crop
shape works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.nn.norm import LayerNorm3d


class CoarseConv3d(nn.Conv3d):
    """A convolution that may meet the coarsest grids: no bf16 on a CPU where an axis has fewer than three voxels.

    oneDNN's weight gradient of a 3x3x3 bf16 convolution on two voxels reads memory that was never written (seen in
    torch 2.13 on a processor with AVX512-BF16 and without AMX): now and then a loss that is not finite.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As the base class."""
        if input.device.type != "cpu" or min(input.shape[2:]) > 2:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """``convs`` times norm, ReLU, 3x3x3 convolution, plus the input (pre-activation); starts as the identity."""

    def __init__(self, channels: int, convs: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm3d(channels, eps=1e-5) for _ in range(convs))
        self.convs = nn.ModuleList(CoarseConv3d(channels, channels, 3, padding=1, bias=False) for _ in range(convs))
        nn.init.zeros_(self.convs[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y), inplace=True))
        return y.add_(x)  # in place: fresh tensors of this size cost more than the sums


def space_to_depth(x: Tensor, factor: int = 2) -> Tensor:
    """(B, C, D, H, W) to (B, C f^3, D/f, H/f, W/f): neighbours become channels, nothing is lost."""
    return rearrange(x, "b c (d p) (h q) (w r) -> b (c p q r) d h w", p=factor, q=factor, r=factor)


def depth_to_space(x: Tensor, factor: int = 2) -> Tensor:
    """Inverse of ``space_to_depth``."""
    return rearrange(x, "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=factor, q=factor, r=factor)


def upsample(x: Tensor, like: Tensor) -> Tensor:
    """Nearest upsampling to the spatial shape of ``like`` (the blocks after it smooth)."""
    return F.interpolate(x, size=like.shape[2:], mode="nearest")

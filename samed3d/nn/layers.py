"""Layers that several architectures share: normalisation over channels, MLPs, residual convolutions, space to depth."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LayerNorm3d(nn.Module):
    """Normalises the channels of each voxel of a (B, C, ...) tensor to mean 0 and variance 1, scales and shifts them.

    A voxel's value does not depend on what else the crop holds, and any crop shape works, in 2D and in 3D.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        # CUDA's autocast would read and write fp32, three times the traffic; the kernel sums in fp32 in any case.
        keep = x.is_cuda and x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=False) if keep else nullcontext():
            if keep:
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, self.eps).movedim(-1, 1)


class Mlp(nn.Module):
    """Two linear layers with an activation between; state-dict names as in SAM."""

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.lin2(self.act(self.lin1(x)))


def neck(conv: type[nn.Conv2d] | type[nn.Conv3d], dim: int, out_dim: int) -> nn.Sequential:
    """The end of SAM's image encoder, in 2D or 3D: (B, dim, ...) to (B, out_dim, ...) through a 1- and a 3-kernel."""
    return nn.Sequential(
        conv(dim, out_dim, kernel_size=1, bias=False),
        LayerNorm3d(out_dim),
        conv(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm3d(out_dim),
    )


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
    """``convs`` times norm, ReLU, 3x3x3 convolution, plus the input (pre-activation); starts as the identity.

    For channels-last tensors: the block costs its convolutions and little else.
    """

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


def space_to_depth(x: Tensor) -> Tensor:
    """(B, C, D, H, W) to (B, 8 C, D/2, H/2, W/2): each voxel's eight parts become channels, nothing is lost."""
    return rearrange(x, "b c (d p) (h q) (w r) -> b (c p q r) d h w", p=2, q=2, r=2)


def depth_to_space(x: Tensor) -> Tensor:
    """Inverse of ``space_to_depth``."""
    return rearrange(x, "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=2, q=2, r=2)

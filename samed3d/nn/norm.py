"""Layer normalisation over the channels of a channels-first volume."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm3d(nn.Module):
    """Normalises the channels of each voxel of a (B, C, D, H, W) tensor to mean 0 and variance 1, then scales and
    shifts them.
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
        # CUDA's autocast would take and give fp32, three times the traffic; the kernel sums in fp32 whatever it reads
        # and writes.
        keep = x.is_cuda and x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=False) if keep else nullcontext():
            if keep:
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, self.eps).movedim(-1, 1)

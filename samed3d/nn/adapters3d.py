"""Adapters that bring depth into a 2D transformer: layers of their own between its frozen ones.

``DepthAdapter`` is MA-SAM's, ``SpatialAdapter`` that of 3DSAM-adapter. Low-rank changes of frozen layers are in
``adapters.py``. Read
``models/ma_sam.py`` and ``models/sam3d_adapter.py`` next.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DepthAdapter(nn.Module):
    """x + up(GELU(convolution along depth(down(norm(x))))).

    Args:
        dim: Token channels.
        width: Channels between; 384 in MA-SAM whatever the encoder.
        zero: Start ``up`` at zero, so that the adapter changes nothing until it is trained. MA-SAM starts it at random.

    Source: MA-SAM (Chen et al., MedIA 2024), section 3.2; kernel and widths as in the code.
    """

    def __init__(self, dim: int, width: int = 384, zero: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, width, bias=False)
        self.conv = nn.Conv3d(width, width, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.up = nn.Linear(width, dim, bias=False)
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """(B * depth, h, w, C) tokens of stacked slices, depth running fastest; same shape."""
        low = self.down(self.norm(x)).unflatten(0, (-1, depth)).permute(0, 4, 1, 2, 3)
        mixed = F.gelu(self.conv(low)).permute(0, 2, 3, 4, 1).flatten(0, 1)
        return x + self.up(mixed)


class SpatialAdapter(nn.Module):
    """x + ReLU(up(ReLU(depthwise 3x3x3(ReLU(down(x)))))) on a (B, D, H, W, C) grid.

    As released, the last ReLU lets the adapter only add, and it changes the encoder from the start; ``zero`` starts
    ``up`` at zero, with a bias just above it so that the ReLU passes a gradient.

    Args:
        dim: Token channels.
        zero: See above.

    Source: 3DSAM-adapter (Gong et al., MedIA 2024), section 3.1; the place in front of the block's first norm as in the
    code.
    """

    def __init__(self, dim: int, zero: bool = False) -> None:
        super().__init__()
        half = dim // 2
        self.down = nn.Linear(dim, half)
        self.conv = nn.Conv3d(half, half, kernel_size=3, padding=1, groups=half)
        self.up = nn.Linear(half, dim)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.constant_(self.up.bias, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        low = F.relu(self.down(x)).movedim(-1, 1)
        return x + F.relu(self.up(F.relu(self.conv(low)).movedim(1, -1)))

"""SAM's 2D transformer lifted to volumes, as 3DSAM-adapter does: the frozen weights of ``vit2d.py`` in 3D attention.

Each slice of the upsampled crop goes through SAM's patch convolution, a depthwise convolution along depth gathers
slices into tokens, every block attends in 3D windows, every second one shifted by half a window, and a
``SpatialAdapter`` stands in front of each.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.nn.attention import GridAttention
from samed3d.nn.layers import neck
from samed3d.nn.vit import Block, run_block
from samed3d.nn.vit2d import Attention2d, SamEncoder2d, resampled_positions

FAR = -100.0
"""Logit of token pairs that only a shift made neighbours; far enough for softmax, and safe in half precision."""


class SpatialAdapter(nn.Module):
    """x + ReLU(up(ReLU(depthwise 3x3x3(ReLU(down(x)))))) on a (B, D, H, W, C) grid.

    As released, the last ReLU lets the adapter only add, and it changes the encoder from the start. ``zero`` starts
    ``up`` at zero, with a bias just above it so that the ReLU passes a gradient.

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


class DepthPatchEmbed(nn.Module):
    """SAM's frozen patch convolution on slices, then a trained depthwise one along depth.

    The crop is upsampled on the way, a token's thickness of slices at a time; the slices' embeddings are recomputed in
    the backward pass, as all of them together take 1.6 GB for a crop of 512^3.
    """

    def __init__(self, proj: nn.Conv2d, upsample: int) -> None:
        super().__init__()
        self.proj, self.upsample = proj, upsample
        self.patch, dim = int(proj.kernel_size[0]), proj.out_channels
        self.depth = nn.Conv3d(dim, dim, kernel_size=(self.patch, 1, 1), groups=dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to (B, d, h, w, C)."""
        shape = image.shape[2:]
        size = [n * self.upsample for n in shape]
        # Trilinear interpolation is one matrix along depth, then bilinear slices; so no fine volume is ever held.
        unit = torch.eye(shape[0], device=image.device)[None]
        along = F.interpolate(unit, size=size[0], mode="linear", align_corners=False)[0].T
        tokens = []
        for rows in along.split(self.patch):
            tokens.append(run_block(self._layer, image[:, 0], rows.to(image.dtype), size[1:], recompute=True))
        return torch.stack(tokens, 1)

    def _layer(self, image: Tensor, rows: Tensor, size: list[int]) -> Tensor:
        """One token's thickness: (B, D, H, W) and interpolation weights (patch, D) to (B, h, w, C)."""
        slices = rearrange(torch.einsum("sd,bdhw->bshw", rows, image), "b s h w -> (b s) 1 h w")
        fine = F.interpolate(slices, size=size, mode="bilinear", align_corners=False)
        with torch.no_grad():  # three equal channels: the kernel summed over them
            kernel = self.proj.weight.sum(1, keepdim=True).to(fine.dtype)
            embedded = F.conv2d(fine, kernel, self.proj.bias, stride=self.patch)
        weight = rearrange(self.depth.weight, "c 1 s 1 1 -> c s").to(embedded.dtype)
        gathered = torch.einsum("bschw,cs->bhwc", embedded.unflatten(0, (image.shape[0], -1)), weight)
        return gathered if self.depth.bias is None else gathered + self.depth.bias


class WindowAttention3d(GridAttention):
    """SAM's attention weights in shifted 3D windows, with a relative position table for depth beside SAM's two.

    Edges of ``grid`` are multiples of ``window``; ``shift`` is how far the windows are shifted along each axis.
    """

    part: Tensor

    def __init__(self, attention: Attention2d, grid: IntTriple, window: int, shift: int) -> None:
        with torch.device("meta"):
            super().__init__(attention.qkv.in_features, attention.heads, grid, window)
        self.shift = shift
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        self.rel_pos_d = nn.Parameter(0.5 * (self.rel_pos_h.detach() + self.rel_pos_w.detach()))
        self.register_buffer("part", _parts(grid, window, shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to the same shape."""
        if not self.shift:
            return super().forward(x)
        axes = (1, 2, 3)
        return super().forward(x.roll((-self.shift,) * 3, axes)).roll((self.shift,) * 3, axes)

    def _bias(self, q: Tensor, extent: IntTriple) -> Tensor:
        bias = super()._bias(q, extent)
        if not self.shift:
            return bias
        apart = self.part[:, :, None] != self.part[:, None]
        return bias.unflatten(0, (-1, len(apart))).masked_fill(apart[None, :, None], FAR).flatten(0, 1)


def _parts(grid: IntTriple, window: int, shift: int) -> Tensor:
    """(windows, n^3) a number per token of each shifted window: tokens of unequal numbers were no neighbours before."""
    region = torch.zeros(grid, dtype=torch.uint8)
    cuts = [(slice(0, size - window), slice(size - window, size - shift), slice(size - shift, size)) for size in grid]
    for number, (a, b, c) in enumerate(itertools.product(*cuts)):
        region[a, b, c] = number
    return rearrange(region, "(d i) (h j) (w k) -> (d h w) (i j k)", i=window, j=window, k=window)


class LiftedBlock(nn.Module):
    """A frozen block in 3D with an adapter before it; its two norms are trained."""

    def __init__(self, block: Block, dim: int, grid: IntTriple, window: int, shift: int, zero: bool) -> None:
        super().__init__()
        self.adapter = SpatialAdapter(dim, zero)
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = WindowAttention3d(cast(Attention2d, block.attn), grid, window, shift)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to the same shape."""
        x = self.adapter(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LiftedEncoder(nn.Module):
    """3DSAM-adapter's image encoder, on the tensors of SAM's encoder, whose neck is not used.

    ``taps`` are the blocks, counted from 1, after which a map is taken through a neck of its own.

    Raises:
        InputError: if a tap is no block of the encoder.

    Source: section 3.1 of the paper; windows in SAM's global blocks too, the shift in even blocks and the start of the
    depth table (ones) as in the code.
    """

    def __init__(
        self, encoder: SamEncoder2d, grid: IntTriple, upsample: int, window: int, taps: tuple[int, ...], zero: bool
    ) -> None:
        super().__init__()
        dim, self.out_dim, self.taps = encoder.dim, encoder.out_dim, taps
        self.checkpoint_blocks = False  # recompute blocks in the backward pass, for memory
        if not taps or not all(1 <= t <= len(encoder.blocks) for t in taps):
            raise InputError(f"taps must be blocks from 1 to {len(encoder.blocks)}, got {taps}")
        self.patch_embed = DepthPatchEmbed(cast(nn.Conv2d, encoder.get_submodule("patch_embed.proj")), upsample)
        self.pos_embed = nn.Parameter(_pooled(encoder.pos_embed.detach(), grid[1], grid[2]))
        self.depth_embed = nn.Parameter(torch.ones(1, grid[0], dim))
        shifts = [window // 2 if index % 2 == 0 and min(grid) > window else 0 for index in range(len(encoder.blocks))]
        self.blocks = nn.ModuleList(
            LiftedBlock(cast(Block, block), dim, grid, window, shift, zero)
            for block, shift in zip(encoder.blocks, shifts, strict=True)
        )
        self.necks = nn.ModuleList(neck(nn.Conv3d, dim, self.out_dim) for _ in taps)

    def frozen_names(self) -> list[str]:
        """Parameters that are SAM's and stay so."""
        trained = ("adapter.", "norm1.", "norm2.", "rel_pos_d", "depth_embed", "patch_embed.depth.", "necks.")
        return [name for name, _ in self.named_parameters() if not any(part in name for part in trained)]

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) to one (B, out_dim, d, h, w) map per tap."""
        x = self.patch_embed(image)
        x = x + self.pos_embed[:, None] + self.depth_embed[:, :, None, None]
        maps: list[Any] = []
        for number, block in enumerate(self.blocks, start=1):
            x = run_block(block, x, recompute=self.checkpoint_blocks)
            if number in self.taps:
                maps.append(self.necks[self.taps.index(number)](x.movedim(-1, 1).contiguous()))
        return maps


def _pooled(table: Tensor, height: int, width: int) -> Tensor:
    """(1, G, G, C) positions averaged down to (1, height, width, C) where the sizes divide, else resampled."""
    rows, columns = table.shape[1:3]
    if min(height, width) >= 1 and rows % height == 0 and columns % width == 0:
        pooled = F.avg_pool2d(rearrange(table, "1 h w c -> 1 c h w"), (rows // height, columns // width))
        return rearrange(pooled, "1 c h w -> 1 h w c").contiguous()
    return resampled_positions(table, height, width).contiguous()

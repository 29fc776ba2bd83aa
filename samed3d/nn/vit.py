"""The 3D vision transformer that turns a crop into a token grid: patch or convolutional stem, blocks, neck.

Not here: attention itself (``attention.py``). Read ``prompt_encoder.py`` and ``mask_decoder.py`` next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samed3d.geometry import IntTriple
from samed3d.nn.attention import GridAttention
from samed3d.nn.norm import LayerNorm3d


class PatchEmbed(nn.Module):
    """Cuts a (B, 1, D, H, W) crop into cubes of ``patch`` voxels and projects each; returns (B, d, h, w, C)."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to (B, D/patch, H/patch, W/patch, C), the convolution as the matrix product that it is
        (faster on a CPU).
        """
        patches = image[:, 0]
        for axis in (1, 2, 3):
            patches = patches.unfold(axis, self.patch, self.patch)
        return F.linear(patches.flatten(4), self.proj.weight.flatten(1), self.proj.bias)


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


class Block(nn.Module):
    """Pre-norm transformer block on a (B, D, H, W, C) grid; the arguments after ``mlp_ratio`` are those of
    ``GridAttention``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: IntTriple,
        window: int,
        misbroadcast_relpos: bool,
        pad_sink: bool,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GridAttention(dim, heads, grid, window, misbroadcast_relpos, pad_sink)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """Vision transformer over a 3D token grid.

    Args:
        patch_embed: Module from (B, 1, D, H, W) to (B, d, h, w, dim) tokens; None when ``forward`` is given tokens.
        grid: Token grid (d, h, w).
        dim: Token channels.
        depth: Blocks.
        heads: Attention heads.
        window: Window edge of the windowed blocks; 0 makes every block global.
        global_blocks: Indices of the blocks that attend globally.
        out_dim: Channels of the neck's output.
        misbroadcast_relpos: See ``GridAttention``.
        pad_sink: See ``GridAttention``.

    Attributes:
        checkpoint_blocks: Forget each block's activations and compute them again in the backward: less memory, the same
            gradients.

    Source: ViT with windowed and global blocks as in SAM (ViTDet), in 3D as in SAM-Med3D.
    """

    def __init__(
        self,
        patch_embed: nn.Module | None,
        grid: IntTriple,
        dim: int,
        depth: int,
        heads: int,
        window: int,
        global_blocks: tuple[int, ...],
        out_dim: int,
        misbroadcast_relpos: bool,
        pad_sink: bool,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.checkpoint_blocks = False
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, grid, 0 if index in global_blocks else window, misbroadcast_relpos, pad_sink)
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv3d(dim, out_dim, kernel_size=1, bias=False),
            LayerNorm3d(out_dim),
            nn.Conv3d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm3d(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """A (B, 1, D, H, W) crop, or (B, d, h, w, dim) tokens without a ``patch_embed``, to (B, out_dim, d, h, w)."""
        if self.patch_embed is not None:
            x = self.patch_embed(x)
        x = x + self.pos_embed
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = x.movedim(-1, 1)
        for layer in self.neck:
            x = layer(
                x.contiguous()
            )  # a channels-last input would have the convolution reorder its weights at every call
        return x

    def layer_features(self, x: Tensor) -> list[Tensor]:
        """What ``forward`` computes on its way: (B, d, h, w, dim) after each block, then the neck's output as (B, d, h,
        w, out_dim).
        """
        features: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, out: features.append(out)) for block in self.blocks
        ]
        try:
            out = self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [*features, out.movedim(1, -1)]


class ConvStem(nn.Module):
    """Strided convolutions from voxels to tokens, which also yields a finer feature map for the mask decoder.

    Each stage halves the grid: a 3x3x3 convolution with stride 2, normalisation, GELU. Channels double from ``width``;
    the last stage has ``dim``.

    Args:
        patch: Voxels per token edge, a power of two >= 4.
        width: Channels of the first stage.
        dim: Token channels.
    """

    def __init__(self, patch: int, width: int, dim: int) -> None:
        super().__init__()
        count = patch.bit_length() - 1
        channels = [1, *(width * 2**i for i in range(count - 1)), dim]
        self.fine_channels = channels[count - 2]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv3d(before, after, kernel_size=3, stride=2, padding=1), LayerNorm3d(after), nn.GELU())
            for before, after in zip(channels[:-1], channels[1:], strict=True)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) to tokens (B, d, h, w, dim) and fine features (B, fine_channels, 4d, 4h, 4w)."""
        fine = image
        for stage in self.stages[:-2]:
            fine = stage(fine)
        x = self.stages[-1](self.stages[-2](fine))
        return x.movedim(1, -1), fine

"""The 3D vision transformer that turns a crop into a token grid: patches or a convolutional stem, blocks, neck."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.nn.attention import DilatedAttention, GridAttention
from samed3d.nn.layers import LayerNorm3d, Mlp, neck


def token_grid(input_shape: tuple[int, ...], patch: int) -> IntTriple:
    """Tokens along each axis of a crop.

    Raises:
        InputError: if the shape is not three multiples of the patch.
    """
    if len(input_shape) != 3 or any(n <= 0 or n % patch for n in input_shape):
        raise InputError(f"input_shape must be three multiples of the patch ({patch}), got {input_shape}")
    d, h, w = (n // patch for n in input_shape)
    return (d, h, w)


class PatchEmbed(nn.Module):
    """Cuts a crop into cubes of ``patch`` voxels and projects each to ``dim`` channels."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to (B, D/patch, H/patch, W/patch, dim)."""
        p = self.patch  # the convolution as the matrix product that it is: faster on a CPU
        patches = rearrange(image, "b 1 (d p) (h q) (w r) -> b d h w (p q r)", p=p, q=p, r=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """Pre-norm transformer block on channels-last tokens (B, ..., dim).

    Args:
        dim: Channels.
        attention: Self-attention from (B, ..., dim) to the same shape; None for a block that is its MLP alone.
    """

    def __init__(self, dim: int, attention: nn.Module | None) -> None:
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        if self.attn is not None:
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
        plain_blocks: How many of the first blocks have no attention (FastSAM3D).
        patterns: Dilated instead of global attention in all others (see ``DilatedAttention``), or None.

    Attributes:
        checkpoint_blocks: Recompute each block's activations in the backward pass: less memory, the same gradients.

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
        misbroadcast_relpos: bool = False,
        pad_sink: bool = False,
        plain_blocks: int = 0,
        patterns: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.checkpoint_blocks = False
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))

        def attention(index: int) -> nn.Module | None:
            if index < plain_blocks:
                return None
            if patterns is not None:
                return DilatedAttention(dim, heads, grid, patterns)
            edge = 0 if index in global_blocks else window
            return GridAttention(dim, heads, grid, edge, misbroadcast_relpos, pad_sink)

        self.blocks = nn.ModuleList(Block(dim, attention(index)) for index in range(depth))
        self.neck = neck(nn.Conv3d, dim, out_dim)

    def forward(self, x: Tensor, layers: list[Tensor] | None = None) -> Tensor:
        """Encode a crop.

        Args:
            x: (B, 1, D, H, W), or (B, d, h, w, dim) tokens without a ``patch_embed``.
            layers: Receives each block's output, (B, d, h, w, dim).

        Returns:
            (B, out_dim, d, h, w).
        """
        if self.patch_embed is not None:
            x = self.patch_embed(x)
        x = x + self.pos_embed
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if layers is not None:
                layers.append(x)
        x = x.movedim(-1, 1)
        for layer in self.neck:
            x = layer(x.contiguous())  # from channels-last, the convolution would reorder its weights at every call
        return x

    def layer_features(self, x: Tensor) -> list[Tensor]:
        """Each block's output (B, d, h, w, dim), then the neck's as (B, d, h, w, out_dim)."""
        layers: list[Tensor] = []
        out = self(x, layers)
        return [*layers, out.movedim(1, -1)]


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

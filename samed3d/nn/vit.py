"""The 3D vision transformer that turns a crop into a token grid: patches or a convolutional stem, blocks, neck."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
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
    """Pre-norm transformer block on channels-last tokens (B, ..., dim); without ``attention`` it is its MLP alone."""

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
    """Vision transformer over a token grid, in 3D or 2D: patches, positions, blocks, neck.

    Args:
        patch_embed: Module from a crop to (B, ..., dim) tokens; None when ``forward`` is given tokens.
        attentions: Self-attention of each block (see ``Block``); taken one by one, so that a generator may build them.
        grid: Token grid of the positions, (d, h, w) or (h, w).
        dim: Token channels.
        out_dim: Channels of the neck's output.

    Attributes:
        checkpoint_blocks: Recompute each block's activations in the backward pass: less memory, the same gradients.

    Source: ViT with windowed and global blocks as in SAM (ViTDet), in 3D as in SAM-Med3D.
    """

    def __init__(
        self,
        patch_embed: nn.Module | None,
        attentions: Iterable[nn.Module | None],
        grid: tuple[int, ...],
        dim: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.patch_embed = patch_embed
        self.checkpoint_blocks = False
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        self.blocks = nn.ModuleList(Block(dim, attention) for attention in attentions)
        self.neck = neck(nn.Conv3d if len(grid) == 3 else nn.Conv2d, dim, out_dim)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens with their positions (B, ..., dim) of what ``forward`` takes."""
        return (x if self.patch_embed is None else self.patch_embed(x)) + self.pos_embed

    def forward(self, x: Tensor, layers: list[Tensor] | None = None) -> Tensor:
        """Encode a crop, or its tokens without a ``patch_embed``, to (B, out_dim, d, h, w).

        ``layers`` receives each block's output, (B, d, h, w, dim).
        """
        x = self.tokens(x)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.checkpoint_blocks)
            if layers is not None:
                layers.append(x)
        x = x.movedim(-1, 1)
        for layer in self.neck:
            # From channels-last, a 3D convolution would reorder its weights at every call.
            x = layer(x.contiguous() if x.ndim == 5 else x)
        return x

    def layer_features(self, x: Tensor) -> list[Tensor]:
        """Each block's output (B, d, h, w, dim), then the neck's as (B, d, h, w, out_dim)."""
        layers: list[Tensor] = []
        out = self(x, layers)
        return [*layers, out.movedim(1, -1)]


def run_block(block: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """A block's output; with ``recompute`` its activations are computed again in the backward pass, to save memory."""
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
    return block(*inputs)


class ConvStem(nn.Module):
    """Strided convolutions from voxels to tokens, which also yields a finer feature map for the mask decoder.

    Each stage halves the grid: a 3x3x3 convolution with stride 2, normalisation, GELU. Channels double from ``width``
    on; the last stage has ``dim``. ``patch``, the voxels per token edge, is a power of two >= 4.
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

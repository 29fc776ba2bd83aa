"""SAM's mask decoder in 3D and in 2D: prompt tokens and image features attend to each other, then become mask logits.

State-dict names are SAM's, so that the decoder of a SAM checkpoint loads by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.nn.layers import LayerNorm3d, Mlp


class TokenAttention(nn.Module):
    """Multi-head attention between two token sequences, computed in ``dim // downsample`` channels."""

    def __init__(self, dim: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = dim // downsample
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None = None) -> Tensor:
        """(B, Nq, C), (B, Nk, C), (B, Nk, C) to (B, Nq, C); ``key_valid`` (B, Nk) bool leaves keys out."""
        queries, keys, values = (
            rearrange(t, "b n (heads e) -> b heads n e", heads=self.heads)
            for t in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        mask = None if key_valid is None else key_valid[:, None, None]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(rearrange(out, "b heads n e -> b n (heads e)"))


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; each followed by a residual and a norm.

    The ``first`` block has neither positions nor a residual in its self-attention (as in SAM).
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool = False) -> None:
        super().__init__()
        self.self_attn = TokenAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = TokenAttention(dim, heads, downsample=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = TokenAttention(dim, heads, downsample=2)
        self.first = first

    def forward(
        self, tokens: Tensor, image: Tensor, token_pos: Tensor, image_pos: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and image (B, N, C) with their positions; ``valid`` (B, T) bool; returns both, updated."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, valid)
        else:
            q = tokens + token_pos
            tokens = tokens + self.self_attn(q, q, tokens, valid)
        tokens = self.norm1(tokens)
        image_key = image + image_pos
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pos, image_key, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image_key, tokens + token_pos, tokens, valid))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Blocks of ``TwoWayBlock`` and a last attention from tokens to image.

    Source: Segment Anything, appendix A (mask decoder).
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp_dim, first=index == 0) for index in range(depth))
        self.final_attn_token_to_image = TokenAttention(dim, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self, image: Tensor, image_pos: Tensor, tokens: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and image (B, N, C) after all blocks.

        Args:
            image: (B, C, ...) features on a grid of N positions.
            image_pos: (1, C, ...) positions.
            tokens: (B, T, C); they are their own positions.
            valid: (B, T) bool, tokens that others may attend to; None means all.
        """
        image, image_pos = (rearrange(t, "b c ... -> b (...) c") for t in (image, image_pos))
        token_pos = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos, valid)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        return self.norm_final_attn(tokens), image


class DeepMlp(nn.Module):
    """Three linear layers with ReLU between; state-dict names as in SAM."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Two-way transformer, upscaling by transposed convolutions, and one hypernetwork per mask token.

    ``widths`` are the channels after each doubling of the grid, ``(dim / 4, dim / 8)`` by default. The IoU head has no
    activation at its end.

    Source: Segment Anything, appendix A; 384 channels, 8 heads, 4 mask tokens in SAM-Med3D.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        mask_tokens: int,
        iou_outputs: int,
        widths: tuple[int, ...] | None = None,
        conv: type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d] = nn.ConvTranspose3d,
        iou_hidden: int = 256,
    ) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim, 2, heads, mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(mask_tokens, dim)
        channels = (dim, *(widths or (dim // 4, dim // 8)))
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [conv(before, after, kernel_size=2, stride=2), LayerNorm3d(after), nn.GELU()]
        del layers[-2]  # the last doubling has no norm
        self.output_upscaling = nn.Sequential(*layers)
        self.output_hypernetworks_mlps = nn.ModuleList(DeepMlp(dim, dim, channels[-1]) for _ in range(mask_tokens))
        self.iou_prediction_head = DeepMlp(dim, iou_hidden, iou_outputs)

    def forward(
        self,
        image: Tensor,
        image_pos: Tensor,
        sparse: Tensor,
        dense: Tensor,
        maps: int | None = None,
        sparse_valid: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logit maps (B, maps, 4d, 4h, 4w), finer with more ``widths``, and IoU outputs (B, iou_outputs).

        Args:
            image: (B, C, d, h, w) features; (B, C, h, w) in 2D, where all grids lack d.
            image_pos: (1, C, d, h, w) positions.
            sparse: (B, T, C) prompt tokens, T may be 0.
            dense: (B, C, d, h, w) mask prompt features.
            maps: How many of the mask tokens to compute, from the first; None for all.
            sparse_valid: (B, T) bool, which prompt tokens count; None means all.
            skip: (B, C/8, 4d, 4h, 4w) finer image features added before the last activation, or None.
        """
        batch, _, *grid = image.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])[None].expand(batch, -1, -1)
        if sparse_valid is not None:
            sparse_valid = F.pad(sparse_valid, (own.shape[1], 0), value=True)
        tokens, positions = self.transformer(image + dense, image_pos, torch.cat([own, sparse], 1), sparse_valid)
        fine = self.output_upscaling[:-1](positions.transpose(1, 2).unflatten(2, grid))
        fine = self.output_upscaling[-1](fine if skip is None else fine + skip)
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps[:maps])], 1)
        logits = (hyper @ fine.flatten(2)).unflatten(2, fine.shape[2:])
        return logits, self.iou_prediction_head(tokens[:, 0])


class ProgressiveMaskDecoder(MaskDecoder):
    """MA-SAM's mask decoder on slices (2D): four doublings to full size, one map per class, background included.

    Source: MA-SAM, section 3.3; channels as in the code, which also has the IoU head that no loss trains.
    """

    def __init__(self, dim: int, classes: int) -> None:
        widths = tuple(max(4, dim // n) for n in (4, 8, 16, 32))
        super().__init__(dim, 8, 2048, classes, classes, widths, nn.ConvTranspose2d, iou_hidden=dim)

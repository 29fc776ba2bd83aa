"""The two-way transformer of SAM's mask decoder: prompt tokens and image positions attend to each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.nn.vit import Mlp


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
        split = [
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        mask = None if key_valid is None else key_valid[:, None, None]
        out = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; each followed by a residual and a norm.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_dim: Hidden channels.
        first: The first block has neither positions nor a residual in its self-attention (as in SAM).
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool) -> None:
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

    Source: Segment Anything, appendix A (mask decoder); state-dict names as released.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, mlp_dim, first=index == 0) for index in range(depth))
        self.final_attn_token_to_image = TokenAttention(dim, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self, image: Tensor, image_pos: Tensor, tokens: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks.

        Args:
            image: (B, C, d, h, w) features.
            image_pos: (1, C, d, h, w) positions.
            tokens: (B, T, C); they are their own positions.
            valid: (B, T) bool, tokens that others may attend to; None means all.

        Returns:
            Tokens (B, T, C) and image positions (B, d*h*w, C).
        """
        image, image_pos = image.flatten(2).transpose(1, 2), image_pos.flatten(2).transpose(1, 2)
        token_pos = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos, valid)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        return self.norm_final_attn(tokens), image

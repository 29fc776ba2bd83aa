"""Prompt tokens meet a feature map of any resolution: the block that SAMU puts at each level of its decoder.

With one token alone, attention from image to tokens would be the same at every voxel (a softmax over one key), so the
tokens are several, and they look at the image before the image looks at them. Read ``models/samu.py`` next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from samed3d.nn.prompt_encoder import RandomFourierPositions
from samed3d.nn.two_way import TokenAttention
from samed3d.nn.vit import Mlp


class PromptAttention(nn.Module):
    """Tokens attend to each other and to the map, then the map attends to the tokens; a residual onto the map.

    Args:
        channels: Of the map.
        token_dim: Channels of the prompt tokens and of the positions.
    """

    def __init__(self, channels: int, token_dim: int) -> None:
        super().__init__()
        heads = 8 if channels >= 64 else max(1, channels // 8)
        self.token_in = nn.Conv1d(token_dim, channels, kernel_size=1)
        self.position_in = nn.Linear(token_dim, channels, bias=False)
        self.self_attn = TokenAttention(channels, heads)
        self.token_to_image = TokenAttention(channels, heads, downsample=2)
        self.mlp = Mlp(channels, 2 * channels)
        self.image_to_token = TokenAttention(channels, heads, downsample=2)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(4))
        self.norm_image = nn.LayerNorm(channels)
        self.scale = nn.Parameter(torch.ones(()))  # starts open: from scratch there is no earlier state to protect

    def forward(self, image: Tensor, tokens: Tensor, valid: Tensor, positions: RandomFourierPositions) -> Tensor:
        """The map after the prompts.

        Args:
            image: (B, C, d, h, w).
            tokens: (B, T, token_dim).
            valid: (B, T) bool, tokens that may be attended to.
            positions: Of the clicks, so that map and tokens share one frame.

        Returns:
            (B, C, d, h, w).
        """
        x = self.token_in(tokens.transpose(1, 2)).transpose(1, 2)
        at = self.norms[0](x)
        x = x + self.self_attn(at, at, at, valid)
        flat = self.norm_image(image.flatten(2).transpose(1, 2))
        key = flat + projected_positions(
            positions, (image.shape[2], image.shape[3], image.shape[4]), self.position_in.weight
        )
        x = x + self.token_to_image(self.norms[1](x), key, flat)
        x = x + self.mlp(self.norms[2](x))
        at = self.norms[3](x)
        change = self.image_to_token(key, at, at, valid)
        return image + self.scale * change.transpose(1, 2).unflatten(2, image.shape[2:])


def projected_positions(positions: RandomFourierPositions, grid: tuple[int, int, int], weight: Tensor) -> Tensor:
    """``linear(positions.dense(grid), weight)`` as (d*h*w, C), without the dense features: on a 128^3 map they would
    take 2 GiB.

    Sine and cosine of a sum of angles split into those of (z, y) and of x, so that the whole is one matrix product.

    Args:
        positions: Sine and cosine features, no swapped axes.
        grid: (d, h, w).
        weight: (C, dim).
    """
    matrix = positions.positional_encoding_gaussian_matrix
    z, y, x = (
        2 * math.pi * ((2 * (torch.arange(n, device=matrix.device) + 0.5) / n - 1)[:, None] * row)
        for n, row in zip(grid, matrix, strict=True)
    )
    plane = (z[:, None] + y[None]).flatten(0, 1)
    by_sine, by_cosine = weight.chunk(2, dim=1)
    sine, cosine = x.sin()[:, None], x.cos()[:, None]
    line = torch.cat([by_sine * cosine - by_cosine * sine, by_sine * sine + by_cosine * cosine], dim=2)
    out = torch.cat([plane.sin(), plane.cos()], dim=1) @ line.flatten(0, 1).T
    return out.view(-1, weight.shape[0])

"""Points, boxes and an earlier mask as tokens and features, with random Fourier positions (SAM's prompt encoder in
3D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from samed3d.geometry import IntTriple
from samed3d.nn.norm import LayerNorm3d

POSITIVE, NEGATIVE, PADDING = 1, 0, -1


class RandomFourierPositions(nn.Module):
    """Positions in [0, 1]^3 as sines and cosines of fixed random directions.

    Args:
        dim: Channels; a multiple of 3 with ``sin_cos_sin``, else of 2.
        sin_cos_sin: Concatenate sine, cosine and the same sine again (SAM-Med3D, as released) instead of sine and
            cosine.
        swap_axes: Dense positions take axis 0 for axis 1 and the reverse, while points do not (SAM-Med3D, as released).
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int, sin_cos_sin: bool, swap_axes: bool) -> None:
        super().__init__()
        self.sin_cos_sin, self.swap_axes = sin_cos_sin, swap_axes
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, dim // (3 if sin_cos_sin else 2)))

    def forward(self, unit: Tensor) -> Tensor:
        """(..., 3) positions, 0 and 1 at the crop's faces, to (..., dim)."""
        angles = 2 * math.pi * ((2 * unit - 1) @ self.positional_encoding_gaussian_matrix)
        sine, cosine = angles.sin(), angles.cos()
        return torch.cat([sine, cosine, sine] if self.sin_cos_sin else [sine, cosine], -1)

    def dense(self, grid: IntTriple) -> Tensor:
        """(1, dim, d, h, w): the position of every token centre."""
        device = self.positional_encoding_gaussian_matrix.device
        axes = [(torch.arange(n, device=device) + 0.5) / n for n in grid]
        first, second, third = torch.meshgrid(*axes, indexing="ij")
        unit = torch.stack([second, first, third] if self.swap_axes else [first, second, third], -1)
        return self(unit).movedim(-1, 0)[None]


class PromptEncoder(nn.Module):
    """Prompts to sparse tokens and a dense feature grid.

    Args:
        dim: Channels.
        grid: Token grid (d, h, w); mask prompts have four times as many voxels along each axis.
        input_shape: Crop shape in voxels, tensor-axis order.
        boxes: Whether boxes are understood (two more embeddings, for the low and the high corner).
        sin_cos_sin: See ``RandomFourierPositions``.
        swap_pe_axes: See ``RandomFourierPositions``.
        pad_point: Append a padding token to the points, and let padding tokens take part in attention (SAM-Med3D, as
            released: N clicks give N + 1 tokens). False adds none and masks padding out, so that a sample does not
                depend on its batch mates.

    Source: Segment Anything, section 3; switches as in SAM-Med3D's released code.
    """

    def __init__(
        self,
        dim: int,
        grid: IntTriple,
        input_shape: IntTriple,
        boxes: bool,
        sin_cos_sin: bool,
        swap_pe_axes: bool,
        pad_point: bool,
    ) -> None:
        super().__init__()
        self.grid, self.input_shape = grid, input_shape
        self.pe_layer = RandomFourierPositions(dim, sin_cos_sin, swap_pe_axes)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4 if boxes else 2))
        self.not_a_point_embed = nn.Embedding(1, dim) if pad_point else None
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, 4, kernel_size=2, stride=2),
            LayerNorm3d(4),
            nn.GELU(),
            nn.Conv3d(4, 16, kernel_size=2, stride=2),
            LayerNorm3d(16),
            nn.GELU(),
            nn.Conv3d(16, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def embed_points(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Clicks as tokens.

        Args:
            points: (B, N, 3) voxel positions, centres are integers.
            labels: (B, N) 1 object, 0 background, -1 padding.

        Returns:
            Tokens (B, T, C), T being N or N + 1; which of them count (B, T) bool. No points give no tokens.
        """
        if self.not_a_point_embed is not None and points.shape[1]:
            points = torch.cat([points, points.new_zeros(points.shape[0], 1, 3)], 1)
            labels = torch.cat([labels, labels.new_full((labels.shape[0], 1), PADDING)], 1)
        position = self.pe_layer((points + 0.5) / points.new_tensor(self.input_shape))
        kinds = labels[..., None]
        tokens = position + torch.where(kinds == POSITIVE, self._kind(1), self._kind(0))
        if self.not_a_point_embed is None:
            return tokens, labels != PADDING
        return torch.where(kinds == PADDING, self.not_a_point_embed.weight, tokens), torch.ones_like(
            labels, dtype=torch.bool
        )

    def embed_boxes(self, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, 2, 3) low and high corners (half-open, voxel edges) as two tokens (B, 2, C); which count (B, 2) bool."""
        corners = torch.cat([self._kind(2), self._kind(3)])
        tokens = self.pe_layer(boxes / boxes.new_tensor(self.input_shape)) + corners
        if valid is None:
            valid = torch.ones(boxes.shape[0], dtype=torch.bool, device=boxes.device)
        return tokens, valid[:, None].expand(-1, 2)

    def embed_mask(self, mask_logits: Tensor | None, batch: int, valid: Tensor | None = None) -> Tensor:
        """(B, 1, 4d, 4h, 4w) logits, or None for no mask yet, as features (B, C, d, h, w); ``valid`` (B,) bool says
        whose are there.
        """
        none = self.no_mask_embed.weight.reshape(1, -1, 1, 1, 1)
        if mask_logits is None:
            return none.expand(batch, -1, *self.grid)
        features = self.mask_downscaling(mask_logits)
        return features if valid is None else torch.where(valid[:, None, None, None, None], features, none)

    def dense_positions(self) -> Tensor:
        """(1, C, d, h, w) positions of the token grid."""
        return self.pe_layer.dense(self.grid)

    def _kind(self, index: int) -> Tensor:
        """(1, C) embedding: 0 background click, 1 object click, 2 low corner, 3 high corner."""
        return self.point_embeddings.get_submodule(str(index)).get_parameter("weight")

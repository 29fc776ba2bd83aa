"""SAM's prompt encoder in 3D and in 2D: points, boxes and an earlier mask become tokens and a feature grid."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from samed3d.geometry import IntTriple
from samed3d.nn.layers import LayerNorm3d
from samed3d.nn.prompt_batch import PADDING, POSITIVE, PromptBatch

MASK_VOXELS_PER_TOKEN = 4
"""Along each axis."""


class RandomFourierPositions(nn.Module):
    """Positions in [0, 1] along each of 3 or 2 axes as sines and cosines of fixed random directions.

    ``sin_cos_sin`` concatenates sine, cosine and the same sine again (SAM-Med3D, as released). With ``swap_axes`` dense
    positions take axis 0 for axis 1 and the reverse, while points do not (SAM-Med3D, as released; in 2D as SAM, whose
    points are (x, y)).
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int, sin_cos_sin: bool = False, swap_axes: bool = False, axes: int = 3) -> None:
        super().__init__()
        self.sin_cos_sin, self.swap_axes = sin_cos_sin, swap_axes
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(axes, dim // (3 if sin_cos_sin else 2)))

    def forward(self, unit: Tensor) -> Tensor:
        """(..., axes) positions, 0 and 1 at the crop's faces, to (..., dim)."""
        angles = 2 * math.pi * ((2 * unit - 1) @ self.positional_encoding_gaussian_matrix)
        sine, cosine = angles.sin(), angles.cos()
        return torch.cat([sine, cosine, sine] if self.sin_cos_sin else [sine, cosine], -1)

    def dense(self, grid: tuple[int, ...]) -> Tensor:
        """(1, dim, *grid): the position of every token centre."""
        device = self.positional_encoding_gaussian_matrix.device
        axes = list(torch.meshgrid(*((torch.arange(n, device=device) + 0.5) / n for n in grid), indexing="ij"))
        if self.swap_axes:
            axes[0], axes[1] = axes[1], axes[0]
        return self(torch.stack(axes, -1)).movedim(-1, 0)[None]


class PromptLayers(nn.Module):
    """The layers of SAM's prompt encoder, with SAM's state-dict names; the mask's go to a grid a quarter as fine."""

    def __init__(
        self,
        dim: int,
        pe_layer: RandomFourierPositions,
        conv: type[nn.Conv2d] | type[nn.Conv3d],
        boxes: bool = True,
        pad_point: bool = True,
    ) -> None:
        super().__init__()
        self.pe_layer = pe_layer
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4 if boxes else 2))
        self.not_a_point_embed = nn.Embedding(1, dim) if pad_point else None
        self.mask_downscaling = nn.Sequential(
            conv(1, 4, kernel_size=2, stride=2),
            LayerNorm3d(4),
            nn.GELU(),
            conv(4, 16, kernel_size=2, stride=2),
            LayerNorm3d(16),
            nn.GELU(),
            conv(16, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def embedding(self, *indices: int) -> Tensor:
        """(len(indices), C): 0 background click, 1 object click, 2 low corner, 3 high corner."""
        return torch.cat([self.point_embeddings.get_submodule(str(i)).get_parameter("weight") for i in indices])


class PromptEncoder(PromptLayers):
    """Prompts to sparse tokens and a dense feature grid.

    Args:
        dim: Channels.
        grid: Token grid (d, h, w); mask prompts have four times as many voxels along each axis.
        input_shape: Crop shape in voxels, tensor-axis order.
        boxes: Whether boxes are understood (two more embeddings, for the low and the high corner).
        sin_cos_sin: As ``swap_pe_axes``, see ``RandomFourierPositions``.
        pad_point: Append a padding token to the points, and let padding tokens take part in attention (SAM-Med3D, as
            released: N clicks give N + 1 tokens). False adds none and masks padding out, so that a sample does not
            depend on its batch mates.
        zero_first_mask: "No mask yet" is a mask of zero logits (SAM-Med3D, as released) instead of a trained embedding.

    Source: Segment Anything, section 3; switches as in SAM-Med3D's released code.
    """

    def __init__(
        self,
        dim: int,
        grid: IntTriple,
        input_shape: IntTriple,
        boxes: bool = True,
        sin_cos_sin: bool = False,
        swap_pe_axes: bool = False,
        pad_point: bool = False,
        zero_first_mask: bool = False,
    ) -> None:
        super().__init__(dim, RandomFourierPositions(dim, sin_cos_sin, swap_pe_axes), nn.Conv3d, boxes, pad_point)
        self.grid, self.input_shape, self.zero_first_mask = grid, input_shape, zero_first_mask

    def forward(self, prompts: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, C), which of them count (B, T) bool, and mask features (B, C, d, h, w)."""
        tokens, valid = self.embed_points(prompts.points, prompts.point_labels)
        if prompts.boxes is not None:
            tokens = torch.cat([tokens, self.embed_boxes(prompts.boxes)], 1)
            valid = torch.cat([valid, prompts.has_box()[:, None].expand(-1, 2)], 1)
        return tokens, valid, self.embed_mask(prompts.mask_logits, tokens.shape[0], prompts.mask_valid)

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
        tokens = position + torch.where(kinds == POSITIVE, self.embedding(1), self.embedding(0))
        if self.not_a_point_embed is None:
            return tokens, labels != PADDING
        tokens = torch.where(kinds == PADDING, self.not_a_point_embed.weight, tokens)
        return tokens, torch.ones_like(labels, dtype=torch.bool)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """(B, 2, 3) low and high corners (half-open, voxel edges) as two tokens (B, 2, C)."""
        return self.pe_layer(boxes / boxes.new_tensor(self.input_shape)) + self.embedding(2, 3)

    def embed_mask(self, mask_logits: Tensor | None, batch: int, valid: Tensor | None = None) -> Tensor:
        """Features (B, C, d, h, w) of an earlier mask (B, 1, 4d, 4h, 4w), None for no mask yet.

        ``valid`` (B,) bool says which samples have a mask; None means all.
        """
        none = rearrange(self.no_mask_embed.weight, "1 c -> 1 c 1 1 1")
        given = None if valid is None else valid[:, None, None, None, None]
        if self.zero_first_mask:
            if mask_logits is None:
                mask_logits = none.new_zeros(batch, 1, *(MASK_VOXELS_PER_TOKEN * n for n in self.grid))
            elif given is not None:
                mask_logits, given = torch.where(given, mask_logits, 0.0), None
        if mask_logits is None:
            return none.expand(batch, -1, *self.grid)
        features = self.mask_downscaling(mask_logits)
        return features if given is None else torch.where(given, features, none)

    def dense_positions(self) -> Tensor:
        """(1, C, d, h, w) positions of the token grid."""
        return self.pe_layer.dense(self.grid)


class PromptEncoder2d(PromptLayers):
    """SAM's prompt encoder on slices; only boxes and "no mask" are used here."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, RandomFourierPositions(dim, swap_axes=True, axes=2), nn.Conv2d)

    def embed_boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes as two tokens each (B, 2, dim): (B, 2, 2) low and high (y, x) corners, voxel edges, on slices of size
        (H, W).
        """
        centres = boxes + boxes.new_tensor([[0.5], [-0.5]])  # of the box's first and last pixel, as SAM takes its boxes
        unit = centres.flip(-1) / boxes.new_tensor([size[1], size[0]])
        return self.pe_layer(unit) + self.embedding(2, 3)

    def no_mask(self, batch: int, height: int, width: int) -> Tensor:
        """(B, dim, height, width): what stands for no mask prompt."""
        return rearrange(self.no_mask_embed.weight, "1 c -> 1 c 1 1").expand(batch, -1, height, width)

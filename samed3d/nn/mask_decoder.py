"""From features and prompt tokens to mask logits on a grid four times as fine as the tokens (SAM's mask decoder in
3D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.nn.norm import LayerNorm3d
from samed3d.nn.two_way import TwoWayTransformer


class DeepMlp(nn.Module):
    """Linear layers with ReLU between; state-dict names as in SAM."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int = 3) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Two-way transformer, upscaling and one hypernetwork per mask token.

    Args:
        dim: Channels, a multiple of 8 (the upscaled features have ``dim // 8``).
        heads: Attention heads of the two-way transformer.
        mlp_dim: Hidden channels of its MLPs.
        mask_tokens: Mask tokens, each with its hypernetwork.
        iou_outputs: Outputs of the IoU head (no activation).
        depth: Blocks of the two-way transformer.

    Source: Segment Anything, appendix A; 384 channels, 8 heads, 4 mask tokens in SAM-Med3D.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, mask_tokens: int, iou_outputs: int, depth: int = 2) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim, depth, heads, mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(mask_tokens, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm3d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose3d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(DeepMlp(dim, dim, dim // 8) for _ in range(mask_tokens))
        self.iou_prediction_head = DeepMlp(dim, 256, iou_outputs)

    def forward(
        self,
        image: Tensor,
        image_pos: Tensor,
        sparse: Tensor,
        dense: Tensor,
        maps: int,
        sparse_valid: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode one mask per sample.

        Args:
            image: (B, C, d, h, w) features.
            image_pos: (1, C, d, h, w) positions.
            sparse: (B, T, C) prompt tokens, T may be 0.
            dense: (B, C, d, h, w) mask prompt features.
            maps: How many of the mask tokens to compute, from the first.
            sparse_valid: (B, T) bool, which prompt tokens count; None means all.
            skip: (B, C/8, 4d, 4h, 4w) finer image features added before the last activation, or None.

        Returns:
            Logit maps (B, maps, 4d, 4h, 4w) and IoU outputs (B, iou_outputs).
        """
        batch, _, *grid = image.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])[None].expand(batch, -1, -1)
        if sparse_valid is not None:
            sparse_valid = F.pad(sparse_valid, (own.shape[1], 0), value=True)
        tokens, positions = self.transformer(image + dense, image_pos, torch.cat([own, sparse], 1), sparse_valid)
        fine = self.output_upscaling[:4](positions.transpose(1, 2).unflatten(2, grid))
        fine = self.output_upscaling[4](fine if skip is None else fine + skip)
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps[:maps])], 1)
        logits = (hyper @ fine.flatten(2)).unflatten(2, fine.shape[2:])
        return logits, self.iou_prediction_head(tokens[:, 0])

"""Prompts of a batch of crops as tensors: what models read and what training and inference build."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PromptBatch:
    """Prompts of a batch of crops, in voxels of the crop tensor's own three axes.

    Attributes:
        points: (B, N, 3) float, voxel centres are integers; N may be 0.
        point_labels: (B, N) int64: 1 object, 0 background, -1 padding (no point).
        boxes: (B, 2, 3) float, half-open low and high corners (voxel edges: low - 0.5 .. high - 0.5 in centre
            coordinates), or None.
        box_valid: (B,) bool, which boxes are there; None means all of ``boxes``.
        mask_logits: (B, 1, d, h, w) ``MaskOutput.lowres_logits`` of an earlier decode, or None for no mask yet.
        mask_valid: (B,) bool, which of ``mask_logits`` are there; None means all of them.
    """

    points: Tensor
    point_labels: Tensor
    boxes: Tensor | None = None
    box_valid: Tensor | None = None
    mask_logits: Tensor | None = None
    mask_valid: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> PromptBatch:
        """No prompt for any sample."""
        return cls(torch.zeros(batch, 0, 3, device=device), torch.zeros(batch, 0, dtype=torch.int64, device=device))

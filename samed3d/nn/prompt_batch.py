"""``PromptBatch``: the prompts of a batch of crops as tensors, which training and inference build and models read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

POSITIVE, NEGATIVE, PADDING = 1, 0, -1
"""Labels of points: on the object, off the object, no point."""


@dataclass
class PromptBatch:
    """Prompts of a batch of crops, in voxels of the crop tensor's own three axes.

    Attributes:
        points: (B, N, 3) float, voxel centres are integers; N may be 0.
        point_labels: (B, N) int64: 1 object, 0 background, -1 padding (no point).
        boxes: (B, 2, 3) float, half-open low and high corners (voxel edges: low - 0.5 .. high - 0.5 in centre
            coordinates), or None.
        box_valid: (B,) bool, which samples have a box; None means all, if ``boxes`` is given.
        mask_logits: (B, 1, d, h, w) ``MaskOutput.lowres_logits`` of an earlier decode, or None for no mask yet.
        mask_valid: (B,) bool, which samples have a mask; None means all, if ``mask_logits`` is given.
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

    def has_box(self) -> Tensor:
        """(B,) bool: which samples have a box."""
        if self.boxes is not None and self.box_valid is not None:
            return self.box_valid
        batch = self.point_labels.shape[0]
        return torch.full((batch,), self.boxes is not None, device=self.point_labels.device)

    def newest_click(self) -> PromptBatch:
        """The same prompts with each sample's last point that is not padding as its only point."""
        if self.points.shape[1] <= 1:
            return self
        order = torch.arange(1, self.points.shape[1] + 1, device=self.points.device)
        last = (order * (self.point_labels != PADDING)).argmax(1)
        rows = torch.arange(self.points.shape[0], device=self.points.device)
        return replace(
            self, points=self.points[rows, last][:, None], point_labels=self.point_labels[rows, last][:, None]
        )

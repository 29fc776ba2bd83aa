"""A promptable model without training whose every answer depends on every prompt and on the mask before it, also where
it should not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch


class ClickedModel(PromptableModel):
    """Logit = brightness + a bump per click + part of the earlier mask; a click off the object also adds a bump beside
    itself."""

    def __init__(self, shape: tuple[int, int, int] = (16, 16, 16), spacing_mm: float | None = None) -> None:
        super().__init__()
        self.spec = ModelSpec("clicked", shape, spacing_mm)
        self.config = {}
        self.decoded = 0
        self.scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def encode(self, image: Tensor) -> Features:
        return {"image": image}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        self.decoded += 1
        image = features["image"][:, :1]
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in image.shape[2:]), indexing="ij")
        grid = torch.stack(axes, dim=-1)
        logits = self.scale * (image - 1.0)
        for at, label in zip(prompts.points[0], prompts.point_labels[0], strict=True):
            near = torch.exp(-((grid - at) ** 2).sum(-1) / 12)
            beside = torch.exp(-((grid - at - 5) ** 2).sum(-1) / 12)
            logits = logits + (3 * near if int(label) else 4 * beside - 3 * near)
        if prompts.boxes is not None:
            inside = ((grid >= prompts.boxes[0, 0]) & (grid < prompts.boxes[0, 1])).all(-1)
            logits = logits + torch.where(inside, 1.0, -1.0)
        if prompts.mask_logits is not None:
            logits = logits + 0.3 * F.interpolate(prompts.mask_logits, image.shape[2:], mode="trilinear").clamp(-4, 4)
        return MaskOutput(logits, torch.ones(1, 1), F.avg_pool3d(logits, 2))

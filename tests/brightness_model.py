"""A promptable model without weights: the mask is whatever is brighter than the crop's mean. Shows what placement and
sessions do."""

from __future__ import annotations

import torch
from torch import Tensor

from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch


class BrightnessModel(PromptableModel):
    """Logit = 4 x (normalised intensity - 1); counts its calls and keeps the prompts it was given."""

    def __init__(
        self, shape: tuple[int, int, int] = (16, 16, 16), spacing_mm: float | None = None, **spec: object
    ) -> None:
        super().__init__()
        self.spec = ModelSpec("brightness", shape, spacing_mm, **spec)  # type: ignore[arg-type]
        self.config = {}
        self.encoded = 0
        self.seen: list[PromptBatch] = []

    def encode(self, image: Tensor) -> Features:
        self.encoded += 1
        return {"image": image}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        self.seen.append(prompts)
        logits = 4 * (features["image"][:, :1] - 1.0)
        return MaskOutput(logits, torch.ones(logits.shape[0], 1), torch.nn.functional.avg_pool3d(logits, 2))

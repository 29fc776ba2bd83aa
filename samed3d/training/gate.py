"""The training step of a mixture's gate: every decoder answers the same clicks, the gate learns to name the one with
the best mask.

Only the gate has gradients. The model is in ``models/sam_med3d_moe.py``; how checkpoints become a mixture is in
``moe.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d import losses
from samed3d.clicks import sample_clicks
from samed3d.config import ClickConfig
from samed3d.models.base import MaskOutput, PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.training.step import StepOutput, seed_of

SHARPNESS = 0.02
"""Difference in Dice that makes one decoder e times as right a choice as another."""


class GateStep(nn.Module):
    """One training step of the gate, with the same arguments and output as ``InteractiveStep``; only the gate has
    gradients.

    Args:
        model: The mixture.
        clicks: How the simulated user behaves.
    """

    def __init__(self, model: MixtureOfExperts, clicks: ClickConfig) -> None:
        super().__init__()
        self.model, self.clicks = model, clicks
        self.keep_all = (model.spec.click_memory if clicks.memory == "spec" else clicks.memory) == "all"

    def forward(self, image: Tensor, target: Tensor, seed: int, samples: Tensor | None = None) -> StepOutput:
        """Click, have every decoder answer, and compare the gate's probabilities with how well each did.

        Args:
            image: (B, C, D, H, W) normalised crops.
            target: (B, 1, D, H, W) bool.
            seed: Of this step.
            samples: (B,) number of each sample within the run, or None.

        Returns:
            Cross-entropy, and the Dice of the chosen decoder after each click.
        """
        numbers = range(image.shape[0]) if samples is None else samples.tolist()
        generators = [torch.Generator().manual_seed(seed_of(seed, number)) for number in numbers]
        with torch.no_grad():
            features = self.model.encode(image)
        history = PromptBatch.empty(image.shape[0], image.device)
        mask, dices, total = torch.zeros_like(target), [], image.new_zeros(())
        rows = torch.arange(image.shape[0], device=image.device)
        for _ in range(self.clicks.interactions):
            self._click(history, mask, target, generators)
            with torch.no_grad():
                answers = [self.model.decode_by(index, features, history) for index in range(1 + len(self.model.names))]
                quality = torch.stack([losses.hard_overlap(answer.logits, target)[0] for answer in answers], dim=1)
            logits = self.model.gate(features[self.model.feature], history)
            total = total + F.cross_entropy(logits, (quality / SHARPNESS).softmax(dim=1))
            chosen = self.model.select(logits.detach())
            dices.append(quality[rows, chosen])
            mask, history.mask_logits = self._taken(answers, chosen)
        return StepOutput(total / self.clicks.interactions, torch.stack(dices, dim=1))

    def _click(self, history: PromptBatch, mask: Tensor, target: Tensor, generators: list[torch.Generator]) -> None:
        """Add a click per sample to the history, or put it in the place of the last."""
        points, labels = sample_clicks(mask, target, self.clicks.policy, generators)
        if self.keep_all:
            points, labels = (
                torch.cat([history.points, points], dim=1),
                torch.cat([history.point_labels, labels], dim=1),
            )
        history.points, history.point_labels = points, labels

    def _taken(self, answers: list[MaskOutput], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and low-resolution logits of each sample's chosen decoder."""
        rows = torch.arange(chosen.shape[0], device=chosen.device)
        logits = torch.stack([a.logits for a in answers], dim=1)[rows, chosen]
        lowres = torch.stack([a.lowres_logits for a in answers], dim=1)[rows, chosen]
        return logits > self.model.spec.click_logit_threshold, lowres

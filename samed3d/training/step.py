"""One training step as ONE module: encode once, click, decode, correct, sum the losses.

Accelerate wraps this module, not the network inside it, so that a data-parallel run synchronises gradients: everything that needs a
gradient happens inside ``InteractiveStep.forward``. No optimiser, no data, no logging here. Read ``clicks.py`` next, then a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samed3d import losses
from samed3d.clicks import jittered_boxes, policy_clicks
from samed3d.config import ClickConfig, LossConfig
from samed3d.models.base import PromptableModel, PromptBatch

BOX_JITTER = 0.1


@dataclass
class StepOutput:
    """What one forward returns.

    Attributes:
        loss: Scalar, mean over interactions.
        dice: (B, K) hard Dice after each of the K interactions, detached; the last columns are later clicks.
    """

    loss: Tensor
    dice: Tensor


class InteractiveStep(nn.Module):
    """The simulated session of a batch of crops.

    Args:
        model: The network that is trained.
        clicks: How the simulated user behaves.
        weights: Weights of the loss's terms.
    """

    def __init__(self, model: PromptableModel, clicks: ClickConfig, weights: LossConfig) -> None:
        super().__init__()
        self.model, self.clicks, self.weights = model, clicks, weights
        self.keep_all = (model.spec.click_memory if clicks.memory == "spec" else clicks.memory) == "all"

    def forward(self, image: Tensor, target: Tensor, seed: int) -> StepOutput:
        """Run the session.

        Args:
            image: (B, 1, D, H, W) normalised crops.
            target: (B, 1, D, H, W) bool.
            seed: Of this step's clicks; the same seed gives the same clicks on a CPU.
        """
        generator = torch.Generator(device=target.device).manual_seed(seed)
        features = self.model.encode(image)
        history = PromptBatch.empty(image.shape[0], image.device)
        if "box" in self.model.spec.prompts:
            history.boxes, history.box_valid = self._boxes(target, generator)
        mask = torch.zeros_like(target)
        total, dices = image.new_zeros(()), []
        for turn in range(self.clicks.interactions):
            prompts = self._prompts(history, mask, target, turn, generator)
            output = self.model.decode(features, prompts)
            total = total + self._loss(output.logits, output.iou, target)
            mask = output.logits.detach() > self.model.spec.click_logit_threshold
            history.mask_logits = output.lowres_logits.detach() if self.clicks.detach else output.lowres_logits
            dices.append(losses.hard_overlap(output.logits.detach(), target)[0])
        return StepOutput(total / self.clicks.interactions, torch.stack(dices, dim=1))

    def _boxes(self, target: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Boxes for the samples whose user draws one, or None when nobody does."""
        drawn = torch.rand(target.shape[0], generator=generator, device=target.device) < self.clicks.box_probability
        drawn &= target.flatten(1).any(dim=1)
        return (jittered_boxes(target, BOX_JITTER, generator), drawn) if bool(drawn.any()) else (None, None)

    def _prompts(self, history: PromptBatch, mask: Tensor, target: Tensor, turn: int, generator: torch.Generator) -> PromptBatch:
        """Add this turn's click to the history and return what the model is given."""
        alone = torch.rand(1, generator=generator, device=target.device) < self.clicks.mask_only_probability
        if turn > 0 and bool(alone):
            shown = history if self.keep_all else PromptBatch.empty(target.shape[0], target.device)
        else:
            points, labels = policy_clicks(mask, target, self.clicks.policy, generator)
            if turn == 0 and history.box_valid is not None:  # a box is the first prompt: no click beside it
                labels = torch.where(history.box_valid[:, None], torch.full_like(labels, -1), labels)
            history.points = torch.cat([history.points, points], dim=1)
            history.point_labels = torch.cat([history.point_labels, labels], dim=1)
            shown = history if self.keep_all else PromptBatch(points, labels)
        return PromptBatch(shown.points, shown.point_labels, history.boxes, history.box_valid, history.mask_logits)

    def _loss(self, logits: Tensor, iou: Tensor, target: Tensor) -> Tensor:
        terms = self.weights
        loss = terms.dice * losses.dice_loss(logits, target) + terms.ce * losses.cross_entropy(logits, target)
        if terms.iou:
            loss = loss + terms.iou * losses.iou_loss(iou, losses.hard_overlap(logits.detach(), target)[1])
        return loss

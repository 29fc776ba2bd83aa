"""The training step of semantic segmentation, and what such a model takes from the corpus: its classes and spacing.

The counterpart of ``step.py`` for models without prompts: Dice and cross-entropy of all classes on every supervised
output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.config import LossConfig, TrainConfig
from samed3d.data.semantic import SemanticDataset, class_names, median_spacing_mm, target_spacing
from samed3d.errors import InputError
from samed3d.losses import soft_dice_loss
from samed3d.models import create_model
from samed3d.models.base import SemanticModel
from samed3d.training.step import StepOutput


class SemanticStep(nn.Module):
    """Loss and Dice of a batch of crops; of ``weights`` only Dice and cross-entropy apply."""

    def __init__(self, model: SemanticModel, weights: LossConfig) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, image: Tensor, target: Tensor, seed: int, samples: Tensor | None = None) -> StepOutput:
        """Run the model once; ``target`` is (B, 1, D, H, W) class numbers, 0 is background.

        Returns:
            The weighted loss over the supervised outputs, and the hard Dice (B, K - 1) of all classes but background.
        """
        outputs = self.model.forward_supervised(image)
        total, terms = image.new_zeros((), dtype=torch.float32), self.weights
        form = {"squared": terms.dice_form == "squared", "background": terms.dice_background, "batch": terms.dice_batch}
        for weight, logits in outputs:
            numbers = resized_numbers(target, logits)
            overlap = class_dice_loss(logits, numbers, terms.dice_smooth, **form)
            total = total + weight * (terms.dice * overlap + terms.ce * F.cross_entropy(logits.float(), numbers))
        finest = outputs[0][1].detach()
        return StepOutput(total, class_dice(finest.argmax(1), resized_numbers(target, finest), finest.shape[1]))


def resized_numbers(target: Tensor, like: Tensor) -> Tensor:
    """(B, 1, D, H, W) class numbers as (B, d, h, w) int64 on the grid of ``like``, by nearest neighbour."""
    if target.shape[2:] != like.shape[2:]:
        target = F.interpolate(target.float(), size=like.shape[2:], mode="nearest-exact")
    return target[:, 0].long()


def class_dice_loss(
    logits: Tensor,
    numbers: Tensor,
    smooth: float = 1e-5,
    *,
    squared: bool = False,
    background: bool = False,
    batch: bool = False,
) -> Tensor:
    """1 - soft Dice of the softmax, mean over classes and samples; an absent class costs what is predicted of it.

    Logits are (B, K, D, H, W), class numbers (B, D, H, W). ``smooth`` is added to both sides of the fraction, in
    voxels; ``squared`` squares the probabilities in the denominator, ``background`` counts class 0 too, ``batch`` sums
    the voxels over the batch first.

    Source: SAM3D's training code (after nnU-Net): smooth 1e-5 and the rest as preset; MA-SAM's: squared, background and
    batch all on.
    """
    first = 0 if background else 1
    prob = logits.float().softmax(1)[:, first:].flatten(2)
    truth = F.one_hot(numbers, logits.shape[1]).movedim(-1, 1)[:, first:].flatten(2)
    return soft_dice_loss(prob, truth, smooth, squared, (0, 2) if batch else (2,))


def class_dice(predicted: Tensor, numbers: Tensor, classes: int) -> Tensor:
    """Hard Dice (B, classes - 1) of class numbers (B, D, H, W); 1 where a class is in neither."""
    columns = []
    for number in range(1, classes):
        mask, truth = (predicted == number).flatten(1), (numbers == number).flatten(1)
        both, total = (mask & truth).sum(1).float(), mask.sum(1) + truth.sum(1)
        columns.append(torch.where(total == 0, 1.0, 2 * both / total.clamp(min=1)))
    return torch.stack(columns, 1)


def semantic_overrides(config: TrainConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a model's builder: ``overrides``, and the corpus's classes and spacing if they lack them.

    Returns:
        ``overrides`` alone for a promptable model.

    Raises:
        InputError: if there is no corpus.
    """
    with torch.device("meta"):
        probe = create_model(config.model.name, **overrides)
    if not isinstance(probe, SemanticModel):
        return overrides
    if not config.data.corpus or config.data.synthetic_share:
        raise InputError(
            f"{config.model.name} is trained on a corpus alone; name one in data.corpus and set data.synthetic_share=0"
        )
    overrides = dict(overrides)
    if "class_names" not in overrides:
        overrides["class_names"] = class_names(config.data)
    if "spacing_zyx_mm" in probe.config and "spacing_zyx_mm" not in overrides:
        edge = config.data.spacing_mm
        overrides["spacing_zyx_mm"] = (edge, edge, edge) if edge else median_spacing_mm(config.data)
    return overrides


def semantic_data(config: TrainConfig, model: SemanticModel) -> SemanticDataset:
    """The training samples of a semantic segmentation model, of length 0: the loop sets ``start`` and ``length``."""
    names, spec = tuple(model.config["class_names"]), model.spec
    shape, spacing = spec.input_shape_zyx, target_spacing(model)
    return SemanticDataset(config.data, names, shape, spacing, spec.in_channels, config.run.seed)

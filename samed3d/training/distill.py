"""A frozen teacher for the training step: squared distances between the features of two image encoders.

Both models must have ``layer_features(image) -> list[Tensor]``: each block's output (B, d, h, w, C), then the encoder's
output, channels last. The teacher is no part of the step's modules: it is not saved, not averaged, and no process group
sees it.

Source: FastSAM3D, layer-wise distillation with teacher block 2i for student block i; its released code compares the
outputs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samed3d.errors import InputError
from samed3d.models.base import PromptableModel


class Teacher:
    """A frozen model whose features are learned.

    Args:
        model: Put in eval mode, without gradients.
        pairs: (block of the student, block of the teacher), -1 for the encoder's output; empty compares the outputs
            alone.

    Raises:
        InputError: if the model has no ``layer_features``.
    """

    def __init__(self, model: PromptableModel, pairs: Sequence[tuple[int, int]] = ()) -> None:
        check_layers(model, "loss.teacher")
        self.model = model.eval().requires_grad_(False)
        self.pairs = list(pairs) or [(-1, -1)]

    def distance(self, layers: list[Tensor], image: Tensor) -> Tensor:
        """Mean squared distance over the pairs.

        Args:
            layers: The student's ``layer_features`` of the image.
            image: (B, C, D, H, W), as both models take it.

        Raises:
            InputError: if a pair names a block that is not there, or two blocks of different shapes.
        """
        with torch.no_grad():
            taught = self.model.to(image.device).layer_features(image)  # type: ignore[operator]
        total = image.new_zeros(())
        for own, other in self.pairs:
            if not (-1 <= own < len(layers) and -1 <= other < len(taught)):
                limits = f"-1 to {len(layers) - 1} and -1 to {len(taught) - 1}"
                raise InputError(f"loss.distill_layers must be pairs from {limits}, got [{own}, {other}]")
            student, teacher = layers[own], taught[other]
            if student.shape != teacher.shape:
                shapes = f"{tuple(student.shape[1:])} and {tuple(teacher.shape[1:])}"
                raise InputError(
                    f"loss.distill_layers must name blocks of one shape, got {shapes} for [{own}, {other}]"
                )
            total = total + F.mse_loss(student.float(), teacher.float())
        return total / len(self.pairs)


def check_layers(model: PromptableModel, what: str) -> None:
    """Refuse a model without ``layer_features``.

    Raises:
        InputError: that names what the model was to be.
    """
    if not hasattr(model, "layer_features"):
        raise InputError(
            f"{what} must be a model that hands out its layers' features (sam_med3d_*, fast_sam3d), got {model.spec.name!r}"
        )

"""One training step as one module: encode once, then click, decode and correct; the losses are summed.

Accelerate wraps this module, not the network inside it, so that a data-parallel run synchronises gradients: everything
that needs a gradient happens inside ``forward``. Each sample's prompts follow from the step's seed and the sample's
number alone, however a batch is spread over processes. Read ``clicks.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d import losses
from samed3d.clicks import jittered_boxes, sample_clicks, uniform_draws
from samed3d.config import ClickConfig, LossConfig
from samed3d.crops import BACKGROUND_LOGIT
from samed3d.errors import InputError
from samed3d.models.base import Features, PromptableModel, PromptBatch

BOX_JITTER = 0.1
WINDOW_EDGE = (0.5, 0.9)
"""Least and greatest edge of the window outside which a previous mask is hidden, as a share of the crop's edge."""
FIRST_RANDOM_TURN = 2
"""From 0: ``clicks.mask_only_turns: random`` never draws one of the first two turns (SAM-Med3D)."""


@dataclass
class StepOutput:
    """Result of one forward: the scalar loss, and the hard Dice (B, K) after each of K interactions, detached."""

    loss: Tensor
    dice: Tensor


class InteractiveStep(nn.Module):
    """The simulated session of a batch of crops; ``compiled`` has torch.compile compile the encoder.

    Raises:
        InputError: if there is a teacher and the model has no ``layer_features``.
    """

    def __init__(
        self,
        model: PromptableModel,
        clicks: ClickConfig,
        weights: LossConfig,
        teacher: Teacher | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.clicks, self.weights, self.teacher = model, clicks, weights, teacher
        self.keep_all = keeps_all_clicks(model, clicks)
        if teacher is not None:
            check_layer_features(model, "model.name with loss.distill")
        encode = model.encode if teacher is None else self._encode_layers
        self._encode: Callable[[Tensor], tuple[Features, list[Tensor]] | Features] = (
            torch.compile(encode) if compiled else encode
        )

    def forward(self, image: Tensor, target: Tensor, seed: int, samples: Tensor | None = None) -> StepOutput:
        """Run the session.

        Args:
            image: (B, C, D, H, W) normalised crops.
            target: (B, 1, D, H, W) bool.
            seed: Of this step, the same on every process.
            samples: (B,) number of each sample within the run; None counts from 0. Same seed and number, same clicks.
        """
        generators = sample_generators(seed, len(image), samples)
        mask_only = self._mask_only_turns(torch.Generator().manual_seed(seed))
        history, terms = PromptBatch.empty(image.shape[0], image.device), self.weights
        if "box" in self.model.spec.prompts:
            has_box = uniform_draws(generators, 1)[:, 0] < self.clicks.box_probability
            boxes = jittered_boxes(target, BOX_JITTER, generators)
            if bool(has_box.any()):  # on the CPU: a GPU does not wait
                history.boxes, history.box_valid = boxes, has_box.to(target.device) & target.flatten(1).any(dim=1)
        encoded = self._encode(image)
        features, layers = encoded if isinstance(encoded, tuple) else (encoded, [])
        distance = None if self.teacher is None else self.teacher.distance(layers, image)
        mask = torch.zeros_like(target)
        total, dices = image.new_zeros(()), []
        for turn in range(self.clicks.interactions):
            prompts = self._prompts(history, mask, target, turn, turn in mask_only, generators)
            output = self.model.decode(features, prompts)
            soft = losses.dice_loss(output.logits, target, terms.dice_smooth, terms.dice_form != "plain")
            loss = terms.dice * soft + terms.ce * losses.cross_entropy(output.logits, target)
            dice, iou = losses.hard_overlap(output.logits.detach(), target)
            total = total + (loss + terms.iou * losses.iou_loss(output.iou, iou) if terms.iou else loss)
            dices.append(dice)
            mask = output.logits.detach() > self.model.spec.click_logit_threshold
            history.mask_logits = output.lowres_logits.detach() if self.clicks.detach else output.lowres_logits
        if terms.turns == "mean":
            total = total / self.clicks.interactions
        return StepOutput(total if distance is None else total + terms.distill * distance, torch.stack(dices, dim=1))

    def _encode_layers(self, image: Tensor) -> tuple[Features, list[Tensor]]:
        """Features and every layer's output from one run of the encoder."""
        layers: list[Tensor] = self.model.layer_features(image)  # type: ignore[operator]
        return {"image": rearrange(layers[-1], "b d h w c -> b c d h w")}, layers

    def _mask_only_turns(self, generator: torch.Generator) -> set[int]:
        """The turns of this batch, from 0, with the previous mask and no new click."""
        count = self.clicks.interactions
        chance = torch.rand(count, generator=generator) < self.clicks.mask_only_probability
        turns = {turn for turn in range(1, count) if bool(chance[turn])}
        if "random" in self.clicks.mask_only_turns and count > FIRST_RANDOM_TURN:
            end = max(FIRST_RANDOM_TURN + 1, count - 2)
            turns.add(int(torch.randint(FIRST_RANDOM_TURN, end, (1,), generator=generator)))
        if "last" in self.clicks.mask_only_turns and count > 1:
            turns.add(count - 1)
        return turns

    def _prompts(
        self,
        history: PromptBatch,
        mask: Tensor,
        target: Tensor,
        turn: int,
        mask_only: bool,
        generators: list[torch.Generator],
    ) -> PromptBatch:
        """Add this turn's click to the history and return what the model is given."""
        earlier = history.mask_logits
        if mask_only:
            shown = history if self.keep_all else PromptBatch.empty(target.shape[0], target.device)
            if earlier is not None and self.clicks.window_probability:
                first = history.points[:, 0] / (target.shape[-1] / earlier.shape[-1])
                earlier = windowed(earlier, first, self.clicks.window_probability, generators)
        else:
            points, labels = sample_clicks(mask, target, self.clicks.policy, generators)
            if turn == 0 and history.box_valid is not None:  # a box is the first prompt: no click beside it
                labels = torch.where(history.box_valid[:, None], torch.full_like(labels, -1), labels)
            history.points = torch.cat([history.points, points], dim=1)
            history.point_labels = torch.cat([history.point_labels, labels], dim=1)
            shown = history if self.keep_all else PromptBatch(points, labels)
        return PromptBatch(shown.points, shown.point_labels, history.boxes, history.box_valid, earlier)


def windowed(logits: Tensor, points: Tensor, chance: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Previous masks (B, 1, d, h, w), each with ``chance`` hidden outside a random window, as after zooming out.

    The window holds the position of ``points``, (B, 3) in voxels of ``logits``.
    """
    draw = uniform_draws(generators, 5, logits.device)
    shape, at = torch.tensor(logits.shape[2:], device=logits.device), points.long()
    edge = (shape * (WINDOW_EDGE[0] + (WINDOW_EDGE[1] - WINDOW_EDGE[0]) * draw[:, 1:2])).long()
    first = (at - edge + 1).clamp(min=0)
    last = torch.minimum(at.clamp(min=0), shape - edge).maximum(first)
    low = (first + (last - first + 1) * draw[:, 2:]).long().minimum(last)
    visible = rearrange(draw[:, 0] >= chance, "b -> b 1 1 1")
    inside = torch.ones_like(visible)
    for axis, size in enumerate(logits.shape[2:]):
        line = torch.arange(size, device=logits.device)
        within = (line >= low[:, axis : axis + 1]) & (line < low[:, axis : axis + 1] + edge[:, axis : axis + 1])
        inside = inside & within.view(-1, *(size if a == axis else 1 for a in range(3)))
    return torch.where((visible | inside)[:, None], logits, BACKGROUND_LOGIT)


class Teacher:
    """A frozen model whose encoder features are learned: mean squared distance between layers of two encoders.

    Both models must have ``layer_features(image) -> list[Tensor]``: each block's output (B, d, h, w, C), then the
    encoder's output, channels last. The teacher is not a submodule of the step: it is neither saved nor averaged nor
    synchronised.

    ``pairs`` are (block of the student, block of the teacher), -1 for the encoder's output; empty compares the outputs
    alone.

    Raises:
        InputError: if the model has no ``layer_features``.

    Source: FastSAM3D, layer-wise distillation with teacher block 2i for student block i; its released code compares the
        outputs alone.
    """

    def __init__(self, model: PromptableModel, pairs: Sequence[tuple[int, int]] = ()) -> None:
        check_layer_features(model, "loss.teacher")
        self.model = model.eval().requires_grad_(False)
        self.pairs = list(pairs) or [(-1, -1)]

    def distance(self, layers: list[Tensor], image: Tensor) -> Tensor:
        """Mean squared distance over the pairs; ``layers`` are the student's ``layer_features`` of the image.

        Raises:
            InputError: if a pair names a missing block, or two blocks of different shapes.
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


def check_layer_features(model: PromptableModel, key: str) -> None:
    """Refuse a model without ``layer_features``.

    Raises:
        InputError: that names the config key.
    """
    if not hasattr(model, "layer_features"):
        raise InputError(
            f"{key} must be a model that hands out its layers' features (sam_med3d_*, fast_sam3d), "
            f"got {model.spec.name!r}"
        )


def keeps_all_clicks(model: PromptableModel, clicks: ClickConfig) -> bool:
    """Whether the model is given all clicks at each decode, or the newest only."""
    return (model.spec.click_memory if clicks.memory == "spec" else clicks.memory) == "all"


def sample_generators(seed: int, count: int, samples: Tensor | None) -> list[torch.Generator]:
    """A CPU generator for each sample of a step, from the step's seed and the sample's number within the run."""
    numbers = range(count) if samples is None else samples.tolist()
    return [torch.Generator().manual_seed(seed_of(seed, number)) for number in numbers]


def seed_of(*numbers: int) -> int:
    """A seed that no other tuple of numbers shares in practice."""
    return int(np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0] >> 1)

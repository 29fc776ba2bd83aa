"""A mixture of experts: assembled from fine-tuned checkpoints, and the training step of its gate.

The experts come from ``samed3d train --finetune BASE --train decoder``: their image encoder is the base's, bit for bit.
Every decoder answers the same clicks; the gate learns to name the one with the best mask, and no decoder changes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d import losses
from samed3d.clicks import sample_clicks
from samed3d.config import ClickConfig, TrainConfig
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.base import PromptableModel, PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import find_checkpoint, save_weights
from samed3d.training.checkpoints import check_new
from samed3d.training.step import StepOutput, keeps_all_clicks, sample_generators

logger = logging.getLogger(__name__)

ASSEMBLED = "assembled.safetensors"
SHARPNESS = 0.02
"""Difference in Dice that makes one decoder e times as right a choice as another."""


class GateStep(nn.Module):
    """One training step of the gate, with the arguments of ``InteractiveStep``; only the gate has gradients."""

    def __init__(self, model: MixtureOfExperts, clicks: ClickConfig) -> None:
        super().__init__()
        self.model, self.clicks = model, clicks
        self.keep_all = keeps_all_clicks(model, clicks)

    def forward(self, image: Tensor, target: Tensor, seed: int, samples: Tensor | None = None) -> StepOutput:
        """Click, decode with every decoder, and compare the gate's probabilities with each decoder's Dice.

        Returns:
            Cross-entropy, and the Dice of the chosen decoder after each click.
        """
        generators = sample_generators(seed, len(image), samples)
        with torch.no_grad():
            features = self.model.encode(image)
        history = PromptBatch.empty(image.shape[0], image.device)
        mask, dices, total = torch.zeros_like(target), [], image.new_zeros(())
        rows = torch.arange(image.shape[0], device=image.device)
        for _ in range(self.clicks.interactions):
            points, labels = sample_clicks(mask, target, self.clicks.policy, generators)
            if self.keep_all:
                points = torch.cat([history.points, points], dim=1)
                labels = torch.cat([history.point_labels, labels], dim=1)
            history.points, history.point_labels = points, labels
            with torch.no_grad():
                answers = [self.model.decode_by(index, features, history) for index in range(1 + len(self.model.names))]
                quality = torch.stack([losses.hard_overlap(answer.logits, target)[0] for answer in answers], dim=1)
            gate = self.model.gate(features[self.model.feature], history)
            total = total + F.cross_entropy(gate, (quality / SHARPNESS).softmax(dim=1))
            chosen = self.model.select(gate.detach())
            dices.append(quality[rows, chosen])
            logits = torch.stack([answer.logits for answer in answers], dim=1)[rows, chosen]
            mask = logits > self.model.spec.click_logit_threshold
            history.mask_logits = torch.stack([answer.lowres_logits for answer in answers], dim=1)[rows, chosen]
        return StepOutput(total / self.clicks.interactions, torch.stack(dices, dim=1))


def gate_config(
    base: str, experts: list[str], config: TrainConfig, *, threshold: float = 0.5, resume: bool = False
) -> TrainConfig:
    """The config that trains the gate of a mixture; assembles the mixture in the run folder unless ``resume``.

    The arguments are those of ``assemble``; ``config`` is as for any training, its ``model`` is replaced. Its
    ``data.corpus`` should hold what each expert is for, and other structures, from which the gate learns to leave the
    answer to the base.

    Raises:
        InputError: as ``assemble``, or if the folder holds a run.
    """
    folder = Path(config.run.folder)
    if not resume:
        check_new(folder)
        mixture = assemble(base, experts, threshold)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"base": base, "experts": dict(zip(mixture.names, experts, strict=True))}
        save_weights(mixture, folder / ASSEMBLED, facts)
    weights = str(folder / ASSEMBLED)
    model = replace(config.model, name="sam_med3d_moe", overrides={}, weights=weights, train="all", adapter="none")
    return replace(config, model=model)


def assemble(base: str, experts: list[str], threshold: float = 0.5, hidden: int = 64) -> MixtureOfExperts:
    """A mixture with an untrained gate.

    Args:
        base: Checkpoint (name or file) that answers where no expert is sure.
        experts: Checkpoints of its fine-tunes; an expert stores only the tensors that differ from the base's.
        threshold: Least probability of an expert for it to be chosen.
        hidden: Hidden channels of the gate.

    Raises:
        InputError: if an expert is another architecture, has changed the image encoder or is the base itself.
    """
    if not experts:
        raise InputError("--moe needs at least one expert checkpoint, got none")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must be from 0 to 1, got {threshold:g}")
    general = load(base)
    if not isinstance(general, PromptableModel) or isinstance(general, MixtureOfExperts):
        raise InputError(f"the base of a mixture must be a promptable model, got {base!r}")
    states = {name: _own_tensors(general, base, path) for name, path in zip(_names(experts), experts, strict=True)}
    mixture = create_model(
        "sam_med3d_moe",
        base=general.spec.name,
        base_config=general.config,
        experts={name: list(state) for name, state in states.items()},
        threshold=threshold,
        hidden=hidden,
    )
    assert isinstance(mixture, MixtureOfExperts)
    mixture.general.model.load_state_dict(general.state_dict())
    mixture.spec = replace(general.spec, name="sam_med3d_moe", source=mixture.spec.source)
    for holder, state in zip(mixture.experts, states.values(), strict=True):
        holder.load_state_dict({name.replace(".", "/"): tensor for name, tensor in state.items()})
    shares = ", ".join(f"{name} {sum(t.numel() for t in state.values()):,}" for name, state in states.items())
    logger.info("%s and experts of their own tensors: %s", base, shares)
    return mixture.eval()


def _own_tensors(general: PromptableModel, base: str, path: str) -> dict[str, Tensor]:
    """The tensors in which an expert differs from the base."""
    if find_checkpoint(path) is None:
        raise InputError(f"expert must be a checkpoint's name or file, got {path!r}")
    expert = load(path)
    own, theirs = general.state_dict(), expert.state_dict()
    shapes, other = ({name: tensor.shape for name, tensor in state.items()} for state in (own, theirs))
    if expert.spec.name != general.spec.name or shapes != other:
        raise InputError(
            f"expert must be a fine-tune of {base} ({general.spec.name}), got another architecture or size in {path}"
        )
    crop, cut = expert.spec.input_shape_zyx, general.spec.input_shape_zyx
    if crop != cut:
        logger.warning("%s was trained on crops of %s, the mixture cuts those of %s: %s", path, crop, base, cut)
    changed = {name: tensor for name, tensor in theirs.items() if not torch.equal(tensor, own[name])}
    if not changed:
        raise InputError(f"expert must differ from {base}, got the same tensors in {path}")
    encoder = tuple(f"{part}." for part in general.encoder_parts)
    if touched := [name for name in changed if name.startswith(encoder)]:
        remedy = "fine-tune with --train decoder"
        raise InputError(
            f"expert must keep the image encoder of {base}, but {path} changed {len(touched)} tensors of it; {remedy}"
        )
    return changed


def _names(experts: list[str]) -> list[str]:
    """A short distinct name for each expert: the file's, or the run folder's where the file is called model."""
    names: list[str] = []
    for expert in experts:
        path = Path(expert)
        name = path.parent.name if path.stem in ("model", "best") and path.parent.name else path.stem
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names

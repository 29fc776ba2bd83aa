"""A mixture of experts from fine-tuned checkpoints, and the step that teaches its gate which decoder does best.

The experts come from ``samed3d train --finetune BASE --train decoder``: their image encoder is the base's, bit for bit. Every decoder
answers the same clicks; the gate learns to name the one with the best mask, from image and prompts. No decoder changes. The model is in
``models/sam_med3d_moe.py``; the loop around the step is the trainer's own, ``loop.py``.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d import losses
from samed3d.clicks import policy_clicks
from samed3d.config import ClickConfig, TrainConfig
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.base import MaskOutput, PromptableModel, PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import find_checkpoint, save_weights
from samed3d.training.step import StepOutput, seed_of

logger = logging.getLogger(__name__)

SHARPNESS = 0.05
"""Difference in Dice that makes one decoder e times as right a choice as another."""
ASSEMBLED = "assembled.safetensors"


def train_gate(
    base: str, experts: list[str], config: TrainConfig, *, threshold: float = 0.5, resume: bool = False, quiet: bool = False
) -> Path:
    """Make a mixture and train its gate.

    Args:
        base: Checkpoint (name or file) that answers where no expert is sure.
        experts: Checkpoints of its fine-tunes, each with the base's image encoder.
        config: As for any training; ``config.model`` is filled in here. ``data.corpus`` should hold what each expert is for, and other
            structures, from which the gate learns to leave the answer to the base.
        threshold: Least probability of an expert for it to be chosen.
        resume: Go on from the run folder.
        quiet: No progress bar.

    Returns:
        The run folder; its ``model.safetensors`` is the mixture, one file for ``--model``.

    Raises:
        InputError: as ``assemble`` and ``loop.train``.
    """
    from samed3d.training.loop import train  # the loop takes its step from here

    folder = Path(config.run.folder)
    if not resume:
        if (folder / "last.pt").exists() or (folder / "metrics.jsonl").exists():
            raise InputError(f"run.folder already holds a run: {folder}; choose another, or resume it")
        mixture = assemble(base, experts, threshold)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(mixture, folder / ASSEMBLED, {"base": base, "experts": dict(zip(mixture.names, experts, strict=True))})
    model = replace(config.model, name="sam_med3d_moe", overrides={}, weights=str(folder / ASSEMBLED), train="all", adapter="none")
    return train(replace(config, model=model), resume=resume, quiet=quiet)


def assemble(base: str, experts: list[str], threshold: float = 0.5, hidden: int = 64) -> MixtureOfExperts:
    """A mixture with an untrained gate.

    Args:
        base: Checkpoint of the general model.
        experts: Checkpoints of its fine-tunes; an expert keeps only the tensors in which it differs from the base.
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
    if expert.spec.name != general.spec.name or {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in theirs.items()}:
        raise InputError(f"expert must be a fine-tune of {base} ({general.spec.name}), got another architecture or size in {path}")
    changed = {name: tensor for name, tensor in theirs.items() if not torch.equal(tensor, own[name])}
    if not changed:
        raise InputError(f"expert must differ from {base}, got the same tensors in {path}")
    encoder = tuple(f"{part}." for part in general.encoder_parts)
    if touched := [name for name in changed if name.startswith(encoder)]:
        remedy = "fine-tune with --train decoder"
        raise InputError(f"expert must keep the image encoder of {base}, but {path} changed {len(touched)} tensors of it; {remedy}")
    return changed


def _names(experts: list[str]) -> list[str]:
    """A short distinct name for each expert: the file's, or the run folder's where the file is called model."""
    names: list[str] = []
    for expert in experts:
        path = Path(expert)
        name = path.parent.name if path.stem in ("model", "best") and path.parent.name else path.stem
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


class GateStep(nn.Module):
    """One training step of the gate, with the same arguments and output as ``InteractiveStep``; only the gate has gradients.

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
        generators = [torch.Generator(device=target.device).manual_seed(seed_of(seed, number)) for number in numbers]
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
        pairs = [
            policy_clicks(one[None], truth[None], self.clicks.policy, generator)
            for one, truth, generator in zip(mask, target, generators, strict=True)
        ]
        points, labels = torch.cat([p for p, _ in pairs]), torch.cat([label for _, label in pairs])
        if self.keep_all:
            points, labels = torch.cat([history.points, points], dim=1), torch.cat([history.point_labels, labels], dim=1)
        history.points, history.point_labels = points, labels

    def _taken(self, answers: list[MaskOutput], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and low-resolution logits of each sample's chosen decoder."""
        rows = torch.arange(chosen.shape[0], device=chosen.device)
        logits = torch.stack([a.logits for a in answers], dim=1)[rows, chosen]
        lowres = torch.stack([a.lowres_logits for a in answers], dim=1)[rows, chosen]
        return logits > self.model.spec.click_logit_threshold, lowres

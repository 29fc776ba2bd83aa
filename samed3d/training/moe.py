"""A mixture of experts from fine-tuned checkpoints, and the run that teaches its gate which decoder does best.

The experts come from ``samed3d train --finetune BASE --train decoder``: their image encoder is the base's, bit for bit.
Every decoder answers the same clicks; the gate learns to name the one with the best mask, from image and prompts. No
decoder changes. The model is in
``models/sam_med3d_moe.py``; the loop around the step is the trainer's own, ``loop.py``, with the step of ``gate.py``.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from samed3d.config import TrainConfig
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.base import PromptableModel
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import find_checkpoint, save_weights
from samed3d.training.loop import train

logger = logging.getLogger(__name__)

ASSEMBLED = "assembled.safetensors"


def train_gate(
    base: str,
    experts: list[str],
    config: TrainConfig,
    *,
    threshold: float = 0.5,
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Make a mixture and train its gate.

    Args:
        base: Checkpoint (name or file) that answers where no expert is sure.
        experts: Checkpoints of its fine-tunes, each with the base's image encoder.
        config: As for any training; ``config.model`` is filled in here. ``data.corpus`` should hold what each expert is
            for, and other structures, from which the gate learns to leave the answer to the base.
        threshold: Least probability of an expert for it to be chosen.
        resume: Go on from the run folder.
        quiet: No progress bar.

    Returns:
        The run folder; its ``model.safetensors`` is the mixture, one file for ``--model``.

    Raises:
        InputError: as ``assemble`` and ``loop.train``.
    """
    folder = Path(config.run.folder)
    if not resume:
        if (folder / "last.pt").exists() or (folder / "metrics.jsonl").exists():
            raise InputError(f"run.folder already holds a run: {folder}; choose another, or resume it")
        mixture = assemble(base, experts, threshold)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(
            mixture, folder / ASSEMBLED, {"base": base, "experts": dict(zip(mixture.names, experts, strict=True))}
        )
    model = replace(
        config.model, name="sam_med3d_moe", overrides={}, weights=str(folder / ASSEMBLED), train="all", adapter="none"
    )
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
    if expert.spec.name != general.spec.name or {k: v.shape for k, v in own.items()} != {
        k: v.shape for k, v in theirs.items()
    }:
        raise InputError(
            f"expert must be a fine-tune of {base} ({general.spec.name}), got another architecture or size in {path}"
        )
    if (crop := expert.spec.input_shape_zyx) != general.spec.input_shape_zyx:
        logger.warning(
            "%s was trained on crops of %s, the mixture cuts those of %s: %s",
            path,
            crop,
            base,
            general.spec.input_shape_zyx,
        )
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

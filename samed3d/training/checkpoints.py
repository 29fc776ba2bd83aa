"""What a run keeps so that nothing is lost: ``last.pt`` and its elder copies, ``model.safetensors``, and going on from
them.

Everything is written to a temporary name, flushed and renamed. No random state is kept, because there is none: samples,
clicks and dropout follow from (seed, step, rank). Read ``loop.py`` next.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samed3d.config import TrainConfig, config_of, to_dict
from samed3d.errors import InputError
from samed3d.models.weights import load_state_strict, save_weights
from samed3d.training.optimiser import AveragedWeights

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    *("optim.steps", "optim.epochs", "optim.max_minutes", "data.workers"),
    *("run.folder", "run.device", "run.precision", "run.compile", "run.activation_checkpointing"),
    *("run.log_every", "run.save_every", "run.keep", "run.trackers", "validation.every", "validation.images"),
)
"""Config keys that a resumed run may change: its length, the machine it runs on, its folder and what it writes."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        done: Optimiser steps.
        samples: Samples drawn by all processes, which is where the data go on.
        best: Highest validation Dice so far, or None.
        corpora: Manifest hash of each corpus.
    """

    done: int = 0
    samples: int = 0
    best: float | None = None
    corpora: dict[str, str] = field(default_factory=dict)


def check_new(folder: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        InputError: if it does.
    """
    if (folder / "last.pt").exists() or (folder / "metrics.jsonl").exists():
        raise InputError(f"run.folder already holds a run: {folder}; add --resume to go on, or choose another")


def save(
    folder: Path,
    config: TrainConfig,
    model: nn.Module,
    optimiser: Any,
    average: AveragedWeights,
    progress: Progress,
    scaler: Any = None,
) -> None:
    """Write ``last.pt``, its copy ``step_NNNNNN.pt`` where ``run.keep`` asks for it, and ``model.safetensors``."""
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "average": average.shadow,
        "average_count": average.count,
        "scaler": None if scaler is None else scaler.state_dict(),
        "step": progress.done,
        "samples": progress.samples,
        "best": progress.best,
        "corpora": progress.corpora,
        "config": json.dumps(to_dict(config)),
    }
    write_whole(folder / "last.pt", lambda path: torch.save(state, path))
    _keep_copy(folder, progress.done, config.run.keep)
    save_average(folder / "model.safetensors", config, model, average, progress)


def save_average(path: Path, config: TrainConfig, model: Any, average: AveragedWeights, progress: Progress) -> None:
    """Write the running mean of the weights (the weights themselves where there is none) as a checkpoint that every
    command takes.
    """
    facts: dict[str, Any] = {"step": progress.done, "training": to_dict(config)}
    with average.applied(model):
        save_weights(model, path, facts if progress.best is None else facts | {"validation_dice": progress.best})


def restore(
    folder: Path,
    config: TrainConfig,
    model: nn.Module,
    optimiser: Any,
    average: AveragedWeights,
    corpora: dict[str, str],
) -> tuple[Progress, Any]:
    """Put everything back as ``save`` wrote it.

    Args:
        folder: The run folder.
        config: Of the resumed run; only keys of ``MAY_CHANGE`` may differ.
        model: Gets the weights.
        optimiser: Gets its state.
        average: Gets the running mean.
        corpora: Manifest hash of each corpus as it is now.

    Returns:
        How far the run was, and the gradient scaler's state or None.

    Raises:
        InputError: if there is nothing to resume, the file is damaged, or the config or a corpus has changed;
            differences are listed.
    """
    path = folder / "last.pt"
    if not path.exists():
        raise InputError(f"nothing to resume: {path} does not exist")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        elder = ", ".join(p.name for p in sorted(folder.glob("step_*.pt"))) or "none"
        raise InputError(
            f"{path} is damaged ({str(error).splitlines()[0][:80]}); copy an elder one over it: {elder}"
        ) from error
    changed = differences(to_dict(config_of(TrainConfig, json.loads(saved["config"]))), to_dict(config))
    if changed:
        raise InputError(f"a resumed run must keep its config; changed: {'; '.join(changed)}")
    known = saved.get("corpora") or {}
    if other := [name for name, digest in corpora.items() if known.get(name, digest) != digest]:
        raise InputError(
            f"the corpus has changed since the run began: {', '.join(other)}; bring the old one back, or start a new run with "
            f"model.weights={folder / 'model.safetensors'}"
        )
    load_state_strict(model, saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    average.shadow, average.count = saved["average"], saved["average_count"]
    per_step = config.optim.batch * config.optim.accumulate
    samples = saved.get("samples", saved["step"] * per_step)  # runs of older versions had one process
    return Progress(int(saved["step"]), int(samples), saved.get("best"), corpora), saved.get("scaler")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key old -> new`` for every key that must not change and did."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after and name not in MAY_CHANGE:
            found.append(f"{name} {before!r} -> {after!r}")
    return found


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, flush it to the disk and give it its name: a file is whole or not there."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """``write_whole`` for text."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _keep_copy(folder: Path, done: int, keep: int) -> None:
    copies = sorted(folder.glob("step_*.pt"))
    if keep:
        copy = folder / f"step_{done:06d}.pt"
        copy.unlink(missing_ok=True)
        try:
            os.link(folder / "last.pt", copy)  # costs nothing: the next save renames another file to last.pt
        except OSError:
            write_whole(copy, lambda path: shutil.copyfile(folder / "last.pt", path))
        copies = sorted({*copies, copy})
    for old in copies[: max(0, len(copies) - keep)]:
        old.unlink()

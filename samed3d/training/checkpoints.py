"""Checkpoints of a run: ``last.pt``, its earlier copies, ``model.safetensors``, and resuming from them.

No random state is saved, because there is none: samples, clicks and dropout follow from (seed, step, process).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from samed3d.config import TrainConfig, config_of, to_dict
from samed3d.errors import InputError
from samed3d.models.base import AnyModel
from samed3d.models.weights import load_state_strict, read_weights, save_weights, write_tensors
from samed3d.output import check_results_folder, replacing
from samed3d.training.optimiser import EmaWeights

MAY_CHANGE = (
    *("optim.steps", "optim.epochs", "optim.max_minutes", "data.workers"),
    *("run.folder", "run.device", "run.precision", "run.compile", "run.activation_checkpointing"),
    *("run.log_every", "run.save_every", "run.keep", "run.trackers", "validation.every", "validation.images"),
)
"""Config keys that a resumed run may change: its length, the machine it runs on, its folder and what it writes."""


@dataclass
class TrainingState:
    """Everything that a checkpoint saves.

    Attributes:
        corpora: Manifest hash of each corpus.
        done: Optimiser steps so far.
        samples: Samples drawn so far by all processes; a resumed run draws the next ones.
        best: Highest validation Dice so far, or None.
        history: What the model is trained on, for the header of its files (``exposure.history_of_run``).
    """

    model: AnyModel
    optimiser: Any
    ema: EmaWeights
    corpora: dict[str, str] = field(default_factory=dict)
    done: int = 0
    samples: int = 0
    best: float | None = None
    history: dict[str, Any] = field(default_factory=dict)


_WRITTEN = ("model.safetensors", "best.safetensors", "config.json", "environment.json", "skipped.json", "curves.svg")


def check_new(folder: Path) -> None:
    """Refuse a folder that holds a run, or other files under the names that a run writes.

    Raises:
        InputError: if it does.
    """
    if (folder / "last.pt").exists() or (folder / "metrics.jsonl").exists():
        raise InputError(f"run.folder already holds a run: {folder}; add --resume to continue it, or choose another")
    check_results_folder(folder, _WRITTEN, lambda _: False)


def save(folder: Path, config: TrainConfig, state: TrainingState, scaler: Any = None) -> None:
    """Write ``last.pt``, its copy ``step_NNNNNN.pt`` where ``run.keep`` asks for it, and ``model.safetensors``.

    ``scaler`` is the gradient scaler of fp16, or None.
    """
    body = {
        "model": state.model.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "average": state.ema.shadow,
        "average_count": state.ema.count,
        "scaler": None if scaler is None else scaler.state_dict(),
        "step": state.done,
        "samples": state.samples,
        "best": state.best,
        "corpora": state.corpora,
        "config": json.dumps(to_dict(config)),
    }
    with replacing(folder / "last.pt") as partial:
        torch.save(body, partial)
    _keep_copy(folder, state.done, config.run.keep)
    save_ema(folder / "model.safetensors", config, state)


def save_ema(path: Path, config: TrainConfig, state: TrainingState) -> None:
    """Write the EMA of the weights (the weights where there is none) as a checkpoint that every command takes."""
    facts: dict[str, Any] = {"step": state.done, "training": to_dict(config), **state.history}
    with state.ema.applied(state.model):
        save_weights(state.model, path, facts if state.best is None else facts | {"validation_dice": state.best})


def store_like(path: Path, base: Path) -> None:
    """Store a model's tensors in the number type of another file: half precision takes half the room."""
    with safe_open(base, framework="pt", device="cpu") as file:
        kinds = (file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118 (not a mapping)
        dtype = next((kind for kind in kinds if kind.is_floating_point), torch.float32)
    state, header = read_weights(path)
    write_tensors({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path, header)


def restore(folder: Path, config: TrainConfig, state: TrainingState) -> Any:
    """Fill ``state``, whose ``corpora`` are as they are now, with what ``save`` wrote.

    Returns:
        The gradient scaler's state or None.

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
        earlier = ", ".join(p.name for p in sorted(folder.glob("step_*.pt"))) or "none"
        raise InputError(
            f"{path} is damaged ({str(error).splitlines()[0][:80]}); copy an earlier one over it: {earlier}"
        ) from error
    changed = differences(to_dict(config_of(TrainConfig, json.loads(saved["config"]))), to_dict(config))
    if changed:
        raise InputError(f"a resumed run must keep its config; changed: {'; '.join(changed)}")
    known = saved.get("corpora") or {}
    if other := [name for name, digest in state.corpora.items() if known.get(name, digest) != digest]:
        raise InputError(
            f"the corpus has changed since the run began: {', '.join(other)}; bring the old one back, or start a new "
            f"run with model.weights={folder / 'model.safetensors'}"
        )
    load_state_strict(state.model, saved["model"])
    state.optimiser.load_state_dict(saved["optimiser"])
    state.ema.shadow, state.ema.count = saved["average"], saved["average_count"]
    state.done, state.best = int(saved["step"]), saved.get("best")
    per_step = config.optim.batch * config.optim.accumulate
    state.samples = int(saved.get("samples", state.done * per_step))  # runs of older versions had one process
    return saved.get("scaler")


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


def _keep_copy(folder: Path, done: int, keep: int) -> None:
    copies = sorted(folder.glob("step_*.pt"))
    if keep:
        copy = folder / f"step_{done:06d}.pt"
        copy.unlink(missing_ok=True)
        try:
            os.link(folder / "last.pt", copy)  # costs nothing: the next save renames another file to last.pt
        except OSError:
            with replacing(copy) as partial:
                shutil.copyfile(folder / "last.pt", partial)
        copies = sorted({*copies, copy})
    for old in copies[: max(0, len(copies) - keep)]:
        old.unlink()

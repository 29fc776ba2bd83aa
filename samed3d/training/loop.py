"""The training run: data, optimiser, checkpoints and logs around ``InteractiveStep``, through Accelerate.

A run is a number of optimiser steps. All randomness follows from (seed, step, rank), so a resumed run draws the samples and clicks that the
unbroken one would have drawn. The loss lives in ``step.py``; what is drawn, in ``data/sampling.py``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from samed3d.config import OptimConfig, TrainConfig, to_dict
from samed3d.data.sampling import CropDataset
from samed3d.errors import InputError
from samed3d.models import create_model
from samed3d.models.base import PromptableModel
from samed3d.models.weights import find_checkpoint, load_state_strict, read_weights, save_weights
from samed3d.training.progress import RunLog
from samed3d.training.step import InteractiveStep, StepOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    *("optim.steps", "optim.max_minutes", "data.workers"),
    *("run.folder", "run.precision", "run.log_every", "run.save_every", "run.trackers"),
)
"""Config keys that a resumed run may change: its length, the machine it runs on, its folder and how it logs."""


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Run (or go on with) a training.

    Args:
        config: Everything that defines the run.
        resume: Go on from the run folder's ``last.pt``.
        quiet: No progress bar.

    Returns:
        The run folder: ``model.safetensors`` (running mean of the weights where ``run.ema`` is on), ``last.pt``, ``config.json``,
        ``metrics.jsonl``.

    Raises:
        InputError: for an existing run without ``resume``, a changed config on resume, or data that leaves nothing to train on.
        RuntimeError: if the loss is not finite; the message names the cases.
    """
    folder = Path(config.run.folder)
    accelerator = make_accelerator(config)
    torch.manual_seed(config.run.seed)  # the weights' start; samples and clicks have their own generators
    model = start_model(config)
    step = InteractiveStep(model, config.clicks, config.loss)
    optimiser = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=config.optim.betas, foreach=True
    )
    average = AveragedWeights(model, config.run.ema)
    done = _restore(folder, config, model, optimiser, average) if resume else _new_folder(folder, accelerator)
    accelerator.wait_for_everyone()
    per_step = config.optim.batch * config.optim.accumulate * accelerator.num_processes
    dataset = CropDataset(
        config.data, (config.optim.steps - done) * per_step, config.run.seed, done * per_step, normalisation=model.spec.normalisation
    )
    if len(dataset) <= 0:
        raise InputError(f"optim.steps must be above the {done} steps already done, got {config.optim.steps}")
    loader: Any = DataLoader(
        dataset, config.optim.batch, num_workers=config.data.workers, persistent_workers=config.data.workers > 0, worker_init_fn=_one_thread
    )
    step, optimiser, loader = accelerator.prepare(step, optimiser, loader)
    if accelerator.is_main_process:
        _write_atomic(folder / "config.json", json.dumps(to_dict(config), indent=1).encode())
    log = RunLog(folder, config, accelerator, done, quiet)
    try:
        done = _run(config, accelerator, step, optimiser, loader, average, log, done)
    finally:
        log.close()
    if accelerator.is_main_process:
        _save(folder, config, accelerator.unwrap_model(step).model, optimiser, average, done)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _run(
    config: TrainConfig,
    accelerator: Accelerator,
    step: nn.Module,
    optimiser: Any,
    loader: Any,
    average: AveragedWeights,
    log: RunLog,
    done: int,
) -> int:
    """The loop itself; returns the number of optimiser steps done in all."""
    began, batches = time.monotonic(), done * config.optim.accumulate
    step.train()
    for batch in loader:
        with accelerator.accumulate(step):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config.optim, done)
            seed = step_seed(config.run.seed, batches, accelerator.process_index)
            output: StepOutput = step(batch["image"], batch["target"], seed)
            if not bool(torch.isfinite(output.loss)):
                raise RuntimeError(f"loss is {float(output.loss.detach())} at step {done}; cases: {', '.join(batch['case'])}")
            accelerator.backward(output.loss)
            if accelerator.sync_gradients and config.optim.grad_clip:
                accelerator.clip_grad_norm_(step.parameters(), config.optim.grad_clip)
            optimiser.step()
            optimiser.zero_grad()
        batches += 1
        log.add(output, len(batch["case"]))
        if not accelerator.sync_gradients:
            continue
        done += 1
        network = accelerator.unwrap_model(step).model
        average.update(network)
        log.step(done, learning_rate(config.optim, done))
        if config.run.save_every and done % config.run.save_every == 0 and accelerator.is_main_process:
            _save(Path(config.run.folder), config, network, optimiser, average, done)
        if _time_is_over(config.optim.max_minutes, began, accelerator):
            logger.info("stopped at step %d: %g minutes are over", done, config.optim.max_minutes)
            break
    return done


def _time_is_over(max_minutes: float, began: float, accelerator: Accelerator) -> bool:
    """Whether the limit is reached on any process: all must stop at the same step, or the others wait for ever."""
    if not max_minutes:
        return False
    if time.monotonic() - began > 60 * max_minutes:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this machine, with bf16 where ``run.precision`` says so or, on auto, where it is faster."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it outlives a run, and another run of this process may want another precision
    precision = config.run.precision
    if precision == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch only
        fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else capabilities.get("amx_tile", False)
        precision = "bf16" if fast else "fp32"
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=config.optim.accumulate,
        log_with=list(config.run.trackers) or None,
        project_dir=config.run.folder,
        # A batch without boxes leaves the box weights without gradient on that rank.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def start_model(config: TrainConfig) -> PromptableModel:
    """The network at the start of a run: random, or from ``model.weights``."""
    overrides = dict(config.model.overrides)
    if config.model.name.startswith("samed3d_") and "input_shape" not in overrides:
        overrides["input_shape"] = config.data.crop
    model = create_model(config.model.name, **overrides)
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if config.model.weights:
        path = find_checkpoint(config.model.weights)
        if path is None:
            raise InputError(f"model.weights must be a checkpoint's name or file, got {config.model.weights!r}")
        load_state_strict(model, read_weights(path)[0])
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for weight matrices and kernels only; norms, biases, positions, embeddings and learned tokens keep their size."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            learned_input = isinstance(module, nn.Embedding) or name.startswith("rel_pos") or name.endswith(("_embed", "_token"))
            (kept if parameter.ndim < 2 or learned_input else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def learning_rate(optim: OptimConfig, done: int) -> float:
    """The rate of the next optimiser step: linear warm-up, then half a cosine to zero, or flat."""
    if done < optim.warmup_steps:
        return optim.lr * (done + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    share = (done - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A seed that no other (seed, batch, rank) shares in practice."""
    return int(np.random.SeedSequence([seed, batch, rank]).generate_state(1)[0])


class AveragedWeights:
    """Exponential running mean of the weights; with decay 0 it is the weights themselves."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the current weights; the decay starts low so that the random start is soon forgotten."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        state = model.state_dict()
        for key, mean in self.shadow.items():
            if mean.is_floating_point():
                mean.lerp_(state[key].to(mean.device), 1 - decay)

    def state_of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The mean, or the model's own weights where there is none."""
        return self.shadow or model.state_dict()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def _new_folder(folder: Path, accelerator: Accelerator) -> int:
    if (folder / "last.pt").exists() or (folder / "metrics.jsonl").exists():
        raise InputError(f"run.folder already holds a run: {folder}; add --resume to go on, or choose another")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    return 0


def _restore(folder: Path, config: TrainConfig, model: nn.Module, optimiser: Any, average: AveragedWeights) -> int:
    path = folder / "last.pt"
    if not path.exists():
        raise InputError(f"nothing to resume: {path} does not exist")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    changed = _differences(json.loads(saved["config"]), to_dict(config))
    if changed:
        raise InputError(f"a resumed run must keep its config; changed: {'; '.join(changed)}")
    load_state_strict(model, saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    average.shadow, average.count = saved["average"], saved["average_count"]
    return int(saved["step"])


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{name}.")
        elif before != after and name not in MAY_CHANGE:
            found.append(f"{name} {before!r} -> {after!r}")
    return found


def _save(folder: Path, config: TrainConfig, model: PromptableModel, optimiser: Any, average: AveragedWeights, done: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "average": average.shadow,
        "average_count": average.count,
        "step": done,
        "config": json.dumps(to_dict(config)),
    }
    temporary = folder / "last.pt.part"
    torch.save(state, temporary)
    os.replace(temporary, folder / "last.pt")
    live = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(average.state_of(model))
    try:
        save_weights(model, folder / "model.safetensors", {"step": done, "training": to_dict(config)})
    finally:
        model.load_state_dict(live)


def _write_atomic(path: Path, body: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(body)
    os.replace(temporary, path)

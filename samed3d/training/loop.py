"""The training run: steps, checkpoints, validation and logs around a training step, through Accelerate.

A run is a number of optimiser steps. All randomness follows from (seed, step, sample), so a resumed run draws the
samples and clicks that the unbroken one would have drawn. What a run starts with is in ``start.py``, what it keeps in
``checkpoints.py``; the loss lives in
``step.py``; what is drawn, in ``data/sampling.py``.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from samed3d.config import TrainConfig, to_dict
from samed3d.errors import InputError
from samed3d.training import checkpoints, environment
from samed3d.training.checkpoints import Progress
from samed3d.training.curves import write_curves
from samed3d.training.optimiser import AveragedWeights, learning_rate, make_optimiser, set_learning_rate
from samed3d.training.progress import RunLog
from samed3d.training.start import data_of, make_accelerator, start_model, step_of, unwrapped
from samed3d.training.step import StepOutput, seed_of
from samed3d.training.stopping import StopRequest, memory_error, outlive_signals

if TYPE_CHECKING:
    from accelerate import Accelerator

    from samed3d.training.validation import Validation

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Run (or go on with) a training.

    Args:
        config: Everything that defines the run.
        resume: Go on from the run folder's ``last.pt``.
        quiet: No progress bar.

    Returns:
        The run folder: ``model.safetensors`` (running mean of the weights where ``run.ema`` is on),
        ``best.safetensors`` where there was a validation, ``last.pt``, ``config.json``, ``environment.json``,
        ``metrics.jsonl``, ``curves.svg``.

    Raises:
        InputError: for an existing run without ``resume``, a changed config on resume, data that leave nothing to train
            on, a device that is not there, or memory that ran out.
        RuntimeError: if the loss is not finite; the message names the cases.
    """
    folder = Path(config.run.folder)
    if not resume:
        checkpoints.check_new(folder)
    accelerator = make_accelerator(config)
    torch.manual_seed(config.run.seed)  # the weights' start; samples and clicks have their own generators
    run = _prepared(config, folder, accelerator, resume)
    if accelerator.is_main_process:
        checkpoints.write_text(folder / "config.json", json.dumps(to_dict(run.config), indent=1))
        environment.write_environment(folder, run.config, accelerator, run.progress.corpora, run.progress.done)
    run.log = RunLog(folder, run.config, accelerator, run.progress.done, quiet)
    try:
        with StopRequest(config.optim.max_minutes) as stop:
            _run(run, stop)
            if not stop.reason:
                _validate(run, stop)
    except (RuntimeError, MemoryError) as error:
        if known := memory_error(error, config):
            raise known from error
        raise
    finally:
        run.ending.set()
        run.log.close()
    _save(run)
    if accelerator.is_main_process:
        write_curves(folder)
    if stop.reason and not (config.optim.schedule == "cosine_minutes" and stop.over):
        logger.warning(
            "stopped at step %d of %d: %s; go on with --resume", run.progress.done, run.config.optim.steps, stop.reason
        )
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


@dataclass
class _Run:
    """What the parts of a run share; ``config`` has its number of steps worked out."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    step: Any
    optimiser: Any
    loader: Any
    average: AveragedWeights
    progress: Progress
    validation: Validation | None
    ending: Any
    log: Any = None
    validated: int = -1


def _prepared(config: TrainConfig, folder: Path, accelerator: Accelerator, resume: bool) -> _Run:
    """Model, data and state, on every process alike."""
    model = start_model(config)
    step = step_of(config, model)
    dataset = data_of(config, model)
    per_step = config.optim.batch * config.optim.accumulate * accelerator.num_processes
    config = with_steps(config, len(dataset.real), per_step)
    optimiser: Any = make_optimiser(model, config.optim)
    average = AveragedWeights(model, config.run.ema)
    corpora = environment.manifest_hashes(config)
    progress, scaler = Progress(corpora=corpora), None
    if resume:
        progress, scaler = checkpoints.restore(folder, config, model, optimiser, average, corpora)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    left = config.optim.steps - progress.done
    if left <= 0:
        raise InputError(f"optim.steps must be above the {progress.done} steps already done, got {config.optim.steps}")
    dataset.start, dataset.length = progress.samples, left * per_step
    if (
        config.data.corpus
        and config.data.synthetic_share == 0
        and per_step > len(dataset.real)
        and accelerator.is_main_process
    ):
        logger.warning(
            "a step takes %d samples of %d structures: some come twice, in other crops", per_step, len(dataset.real)
        )
    workers, ending = config.data.workers, multiprocessing.Event()
    start = partial(_start_worker, ending)
    loader: Any = DataLoader(
        dataset,
        config.optim.batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start,
        pin_memory=accelerator.device.type == "cuda",
    )
    validation = _validation(config, accelerator, folder)
    step, optimiser, loader = accelerator.prepare(step, optimiser, loader)
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    return _Run(config, folder, accelerator, step, optimiser, loader, average, progress, validation, ending)


def _validation(config: TrainConfig, accelerator: Accelerator, folder: Path) -> Validation | None:
    if not config.validation.every:
        return None
    from samed3d.training.validation import Validation  # needs more than training does on a bare GPU machine

    return Validation(config, accelerator, folder)


def with_steps(config: TrainConfig, structures: int, per_step: int) -> TrainConfig:
    """The config with ``optim.steps`` worked out from ``optim.epochs`` where that is given.

    Raises:
        InputError: if there is no corpus to pass over, or the warm-up is longer than the run.
    """
    if not config.optim.epochs:
        return config
    if not structures:
        raise InputError(
            f"optim.epochs must be 0 without a corpus to pass over, got {config.optim.epochs:g}; set optim.steps instead"
        )
    steps = max(1, math.ceil(config.optim.epochs * structures / per_step))
    if config.optim.warmup_steps > steps:
        raise InputError(
            f"optim.warmup_steps must be at most the {steps} steps of the run, got {config.optim.warmup_steps}"
        )
    return replace(config, optim=replace(config.optim, steps=steps))


def _run(run: _Run, stop: StopRequest) -> None:
    """The loop itself."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    batches = progress.done * config.optim.accumulate
    run.step.train()
    pending = 0
    for batch in _batches(run.loader):
        with accelerator.accumulate(run.step):
            passed = stop.passed(accelerator) if config.optim.schedule == "cosine_minutes" else 0.0
            set_learning_rate(run.optimiser, config.optim, progress.done, passed)
            seed = seed_of(config.run.seed, batches)
            torch.manual_seed(seed_of(seed, accelerator.process_index))  # for dropout and the like
            output: StepOutput = run.step(batch["image"], batch["target"], seed, batch["index"])
            accelerator.backward(output.loss)
            if not bool(torch.isfinite(output.loss)):  # asked after the backward: a GPU has work until then
                _give_up(run, output, batch, seed)
            if accelerator.sync_gradients and config.optim.grad_clip:
                accelerator.clip_grad_norm_(run.step.parameters(), config.optim.grad_clip)
            run.optimiser.step()
            run.optimiser.zero_grad()
        batches += 1
        pending += len(batch["case"]) * accelerator.num_processes
        run.log.add(output, batch)
        if not accelerator.sync_gradients:
            continue
        progress.done, progress.samples, pending = progress.done + 1, progress.samples + pending, 0
        run.average.update(unwrapped(accelerator, run.step))
        run.log.step(progress.done, learning_rate(config.optim, progress.done, passed))
        if config.validation.every and progress.done % config.validation.every == 0:
            _validate(run, stop)
        if stop.on_any(accelerator):
            return
        if config.run.save_every and progress.done % config.run.save_every == 0:
            _save(run)


def _batches(loader: Any) -> Any:
    """The loader's batches; a user's error from a loader process keeps its one line."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error


def _give_up(run: _Run, output: StepOutput, batch: dict[str, Any], seed: int) -> None:
    loss, done = float(output.loss.detach()), run.progress.done
    path = environment.write_nonfinite(run.folder, done, loss, batch, seed, run.config, run.accelerator.process_index)
    raise RuntimeError(
        f"loss is {loss} at step {done}; cases: {', '.join(batch['case'])}; what is needed to draw them again is in {path}"
    )


def _validate(run: _Run, stop: StopRequest) -> None:
    """Click through the validation volumes with the running mean of the weights; keep it if it is the best so far."""
    if run.validation is None or run.validated == run.progress.done:
        return
    network = unwrapped(run.accelerator, run.step)
    with run.average.applied(network):
        found = run.validation.measure(network, run.progress.done, lambda: stop.asked)
    run.step.train()
    if found is None:
        return
    run.validated = run.progress.done
    run.log.validated(run.progress.done, found.dice, found.structures, found.seconds)
    if run.progress.best is None or found.dice[-1] > run.progress.best:
        run.progress.best = found.dice[-1]
        if run.accelerator.is_main_process:
            checkpoints.save_average(run.folder / "best.safetensors", run.config, network, run.average, run.progress)


def _save(run: _Run) -> None:
    if run.accelerator.is_main_process:
        network = unwrapped(run.accelerator, run.step)
        checkpoints.save(
            run.folder, run.config, network, run.optimiser, run.average, run.progress, run.accelerator.scaler
        )
    run.accelerator.wait_for_everyone()


def _start_worker(ending: Any, _worker: int) -> None:
    torch.set_num_threads(1)
    outlive_signals(ending)

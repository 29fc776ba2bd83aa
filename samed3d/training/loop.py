"""The training loop: optimiser steps with logs, validation and checkpoints, through Accelerate.

All randomness follows from (seed, step, sample), so a resumed run draws the samples and clicks that the unbroken one
would have drawn. ``start.py`` sets a run up. Read ``data/sampling.py`` next.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from samed3d.config import TrainConfig, to_dict
from samed3d.data.exposure import history_of_run
from samed3d.errors import InputError
from samed3d.output import write_json
from samed3d.training import checkpoints
from samed3d.training.checkpoints import TrainingState
from samed3d.training.optimiser import EmaWeights, learning_rate, make_optimiser, set_learning_rate
from samed3d.training.progress import RunLog, check_trackers, manifest_hashes, write_curves, write_environment
from samed3d.training.start import data_of, make_accelerator, start_model, step_of
from samed3d.training.step import StepOutput, seed_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from samed3d.training.validation import Validation

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Train a model, or resume a training.

    ``resume`` continues from the run folder's ``last.pt``; ``quiet`` shows no progress line.

    Returns:
        The run folder: ``model.safetensors`` (EMA of the weights where ``run.ema`` is on), ``best.safetensors`` where
        there was a validation, ``last.pt``, ``config.json``, ``environment.json``, ``metrics.jsonl``, ``curves.svg``.

    Raises:
        InputError: for an existing run without ``resume``, a changed config on resume, data that leave nothing to train
            on, a missing device, or memory that ran out.
        RuntimeError: if the loss is not finite; the message names the cases.
    """
    folder = Path(config.run.folder)
    if not resume:
        checkpoints.check_new(folder)
    check_trackers(config.run.trackers)
    accelerator = make_accelerator(config)
    torch.manual_seed(config.run.seed)  # for the initial weights; samples and clicks have their own generators
    run = _prepared(config, folder, accelerator, resume)
    config, state = run.config, run.state
    if accelerator.is_main_process:
        write_json(folder / "config.json", to_dict(config))
        write_environment(folder, config, accelerator, state.corpora, state.done)
    run.log = RunLog(folder, config, accelerator, state.done, quiet)
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
        where = f"step {state.done} of {config.optim.steps}"
        logger.warning("stopped at %s: %s; resume with --resume", where, stop.reason)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


class StopRequest:
    """Whether a run should end early: after SIGTERM, Ctrl-C (a second one interrupts at once) or the time limit.

    A run that stops finishes its step and saves.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        """``max_minutes`` is the wall-clock limit, counted from now; 0 sets none."""
        self.reason, self.max_minutes = "", max_minutes
        self.until = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Listen to signals, which Python gives to the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_error: object) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = f"by {signal.Signals(number).name}"

    @property
    def over(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() > self.until

    @property
    def asked(self) -> bool:
        """Whether this process should stop."""
        if not self.reason and self.over:
            self.reason = f"{self.max_minutes:g} minutes are over"
        return bool(self.reason)

    def passed(self, accelerator: Accelerator) -> float:
        """The share of the time limit that is over, the same on every process; 0 without a limit."""
        share = 1 - (self.until - time.monotonic()) / (60 * self.max_minutes) if self.max_minutes else 0.0
        if accelerator.num_processes > 1:
            share = float(accelerator.reduce(torch.tensor(share, device=accelerator.device), "mean"))
        return share

    def on_any(self, accelerator: Accelerator) -> bool:
        """Whether any process should stop: all must do so at the same step, or the others wait for ever."""
        if accelerator.num_processes == 1:
            return self.asked
        if self.asked:
            accelerator.set_trigger()
        stop = bool(accelerator.check_trigger())
        self.reason = self.reason or ("with another process" if stop else "")
        return stop


def memory_error(error: BaseException, config: TrainConfig) -> InputError | None:
    """What to lower when memory ran out, as an error of one line; None for any other error."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not is_memory and not any(text in str(error) for text in ("allocate memory", "out of memory")):
        return None
    crop = "x".join(map(str, config.data.crop))
    return InputError(
        f"out of memory with optim.batch={config.optim.batch}, data.crop={crop}, "
        f"clicks.interactions={config.clicks.interactions}; lower one of them (optim.batch with a higher "
        "optim.accumulate learns the same), or set clicks.detach=true, run.precision=bf16 or "
        "run.activation_checkpointing=true"
    )


@dataclass
class _Run:
    """Everything that the parts of a run share; ``config`` has its number of steps worked out."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    step: Any
    loader: Any
    state: TrainingState
    validation: Validation | None
    ending: Any
    log: Any = None
    validated: int = -1


def _prepared(config: TrainConfig, folder: Path, accelerator: Accelerator, resume: bool) -> _Run:
    """Model, data and state, alike on every process."""
    model = start_model(config)
    step: Any = step_of(config, model)
    dataset = data_of(config, model)
    per_step = config.optim.batch * config.optim.accumulate * accelerator.num_processes
    config = with_steps(config, len(dataset.real), per_step)
    optimiser = make_optimiser(model, config.optim)
    state = TrainingState(model, optimiser, EmaWeights(model, config.run.ema), manifest_hashes(config))
    scaler = checkpoints.restore(folder, config, state) if resume else None
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        state.history = history_of_run(config)
    left = config.optim.steps - state.done
    if left <= 0:
        raise InputError(f"optim.steps must be above the {state.done} steps already done, got {config.optim.steps}")
    dataset.start, dataset.length = state.samples, left * per_step
    data, count = config.data, len(dataset.real)
    if data.corpus and not data.synthetic_share and per_step > count and accelerator.is_main_process:
        logger.warning("a step takes %d samples of %d structures: some come twice, in other crops", per_step, count)
    ending = multiprocessing.Event()
    loader: Any = DataLoader(
        dataset,
        config.optim.batch,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        worker_init_fn=partial(_start_worker, ending),
        pin_memory=accelerator.device.type == "cuda",
    )
    validation = None
    if config.validation.every:
        from samed3d.training.validation import Validation  # needs more than training does on a bare GPU machine

        validation = Validation(config, accelerator, folder)
    step, state.optimiser, loader = accelerator.prepare(step, optimiser, loader)
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    return _Run(config, folder, accelerator, step, loader, state, validation, ending)


def _start_worker(ending: Any, _worker: int) -> None:
    """Have a loader process ignore signals until the run no longer needs it: the run finishes its step first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0) if ending.is_set() else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def with_steps(config: TrainConfig, structures: int, per_step: int) -> TrainConfig:
    """The config with ``optim.steps`` worked out from ``optim.epochs`` where that is given.

    Raises:
        InputError: if there is no corpus.
    """
    optim = config.optim
    if not optim.epochs:
        return config
    if not structures:
        raise InputError(
            f"optim.epochs must be 0 without a corpus to pass over, got {optim.epochs:g}; set optim.steps instead"
        )
    steps = max(1, math.ceil(optim.epochs * structures / per_step))
    return replace(config, optim=replace(optim, steps=steps))


def _run(run: _Run, stop: StopRequest) -> None:
    config, accelerator, state = run.config, run.accelerator, run.state
    batches = state.done * config.optim.accumulate
    run.step.train()
    pending = 0
    for batch in _batches(run.loader):
        with accelerator.accumulate(run.step):
            passed = stop.passed(accelerator) if config.optim.schedule == "cosine_minutes" else 0.0
            set_learning_rate(state.optimiser, config.optim, state.done, passed)
            seed = seed_of(config.run.seed, batches)
            torch.manual_seed(seed_of(seed, accelerator.process_index))  # for dropout and the like
            output: StepOutput = run.step(batch["image"], batch["target"], seed, batch["index"])
            accelerator.backward(output.loss)
            if not bool(torch.isfinite(output.loss)):  # asked after the backward: a GPU has work until then
                _refuse_nonfinite(run, output, batch, seed)
            if accelerator.sync_gradients and config.optim.grad_clip:
                accelerator.clip_grad_norm_(run.step.parameters(), config.optim.grad_clip)
            state.optimiser.step()
            state.optimiser.zero_grad()
        batches += 1
        pending += len(batch["case"]) * accelerator.num_processes
        run.log.add(output, batch)
        if not accelerator.sync_gradients:
            continue
        state.done, state.samples, pending = state.done + 1, state.samples + pending, 0
        state.ema.update(state.model)
        run.log.step(state.done, learning_rate(config.optim, state.done, passed))
        if config.validation.every and state.done % config.validation.every == 0:
            _validate(run, stop)
        if stop.on_any(accelerator):
            return
        if config.run.save_every and state.done % config.run.save_every == 0:
            _save(run)


def _batches(loader: Any) -> Iterator[dict[str, Any]]:
    """The loader's batches; a user's error from a loader process keeps its one line."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error


def _refuse_nonfinite(run: _Run, output: StepOutput, batch: dict[str, Any], seed: int) -> None:
    """End the run and write what is needed to draw the batch again into ``nonfinite.json``."""
    path, loss, done = run.folder / "nonfinite.json", float(output.loss.detach()), run.state.done
    drawn = {"cases": list(batch["case"]), "samples": batch["index"].tolist(), "seed": run.config.run.seed}
    rank = run.accelerator.process_index
    write_json(path, {"step": done, "loss": str(loss), **drawn, "rank": rank, "click_seed": seed})
    raise RuntimeError(
        f"loss is {loss} at step {done}; cases: {', '.join(batch['case'])}; what is needed to draw them again is in "
        f"{path}"
    )


def _validate(run: _Run, stop: StopRequest) -> None:
    """Measure the EMA of the weights on the validation volumes; save it if it is the best so far."""
    state = run.state
    if run.validation is None or run.validated == state.done:
        return
    with state.ema.applied(state.model):
        found = run.validation.measure(state.model, state.done, lambda: stop.asked)
    run.step.train()
    if found is None:
        return
    run.validated = state.done
    run.log.validated(state.done, found.dice, found.structures, found.seconds)
    if state.best is None or found.dice[-1] > state.best:
        state.best = found.dice[-1]
        if run.accelerator.is_main_process:
            checkpoints.save_ema(run.folder / "best.safetensors", run.config, state)


def _save(run: _Run) -> None:
    if run.accelerator.is_main_process:
        checkpoints.save(run.folder, run.config, run.state, run.accelerator.scaler)
    run.accelerator.wait_for_everyone()

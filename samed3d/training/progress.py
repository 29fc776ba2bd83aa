"""What a run shows of itself: ``metrics.jsonl``, a progress line on a terminal, and the trackers that Accelerate knows."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from samed3d.config import TrainConfig, to_dict
from samed3d.training.step import StepOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class RunLog:
    """Means over ``run.log_every`` optimiser steps, on the main process; one JSON object per line of ``metrics.jsonl``."""

    def __init__(self, folder: Path, config: TrainConfig, accelerator: Accelerator, done: int, quiet: bool) -> None:
        self.config, self.accelerator = config, accelerator
        self.main = accelerator.is_main_process
        self.file = _reopened(folder / "metrics.jsonl", done) if self.main else None
        self.began = self.mark = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.dices: list[torch.Tensor] = []
        self.samples = 0
        if config.run.trackers:
            accelerator.init_trackers("samed3d", config=_flat(to_dict(config)))
        self.bar: Any = None
        if self.main and not quiet and sys.stderr.isatty():
            self.bar = _progress_bar(done, config.optim.steps)

    def add(self, output: StepOutput, samples: int) -> None:
        """Take in one batch."""
        self.losses.append(output.loss.detach())
        self.dices.append(output.dice.detach())
        self.samples += samples

    def step(self, done: int, lr: float) -> None:
        """Called after each optimiser step; writes when a line is due."""
        if self.bar is not None:
            self.bar[0].update(self.bar[1], completed=done)
        if done % self.config.run.log_every and done != self.config.optim.steps:
            return
        now = time.monotonic()
        dice = torch.cat(self.dices).mean(dim=0).float().tolist()
        row = {
            "step": done,
            "loss": round(float(torch.stack(self.losses).mean()), 5),
            "dice": [round(v, 4) for v in dice],
            "lr": lr,
            "samples_per_s": round(self.samples * self.accelerator.num_processes / max(1e-9, now - self.mark), 3),
            "minutes": round((now - self.began) / 60, 3),
        }
        self.losses, self.dices, self.samples, self.mark = [], [], 0, now
        if self.config.run.trackers:
            flat = {k: v for k, v in row.items() if k != "dice"} | {f"dice/turn{i + 1}": v for i, v in enumerate(dice)}
            self.accelerator.log(flat, step=done)
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.bar is not None:
                self.bar[0].update(self.bar[1], description=f"loss {row['loss']:.3f} dice {' '.join(f'{v:.2f}' for v in dice)}")
            else:
                logger.info("step %d of %d, loss %.4f, dice by turn %s", done, self.config.optim.steps, row["loss"], row["dice"])

    def close(self) -> None:
        """End the progress line and the file; safe after an error."""
        if self.bar is not None:
            self.bar[0].stop()
        if self.file is not None:
            self.file.close()


def _reopened(path: Path, done: int) -> TextIO:
    """The log ready to append, without the lines that an interrupted run wrote after its last checkpoint: they will be written again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]  # a killed run may have cut its last line
        temporary = path.with_name(path.name + ".part")
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= done), encoding="utf-8")
        os.replace(temporary, path)
    return path.open("a", encoding="utf-8")


def _progress_bar(done: int, total: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress.start()
    return progress, progress.add_task("training", total=total, completed=done)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Trackers take flat scalars: nested keys joined by dots, everything else as text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return flat

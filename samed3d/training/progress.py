"""What a run shows of itself: ``metrics.jsonl``, a progress line on a terminal, and the trackers that Accelerate knows.

The curves drawn from ``metrics.jsonl`` are in ``curves.py``.
"""

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
from samed3d.errors import InputError
from samed3d.training.checkpoints import write_text
from samed3d.training.step import StepOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class RunLog:
    """Means over ``run.log_every`` optimiser steps and all processes; the main one writes a JSON object per line of
    ``metrics.jsonl``.

    Attributes:
        skipped: Damaged cases that were passed over, with the reason; also in ``skipped.json``.
    """

    def __init__(self, folder: Path, config: TrainConfig, accelerator: Accelerator, done: int, quiet: bool) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.main = accelerator.is_main_process
        if config.run.trackers:
            _start_trackers(
                accelerator, config, folder
            )  # before the first file of the run: what cannot start leaves none
        self.file = _reopened(folder / "metrics.jsonl", done) if self.main else None
        self.began = self.mark = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.dices: list[torch.Tensor] = []
        self.samples = 0
        self.skipped: dict[str, str] = _read_skipped(folder)
        self.unsaid: list[str] = []
        self.bar: Any = None
        if self.main and not quiet and sys.stderr.isatty():
            self.bar = _progress_bar(done, config.optim.steps)

    def add(self, output: StepOutput, batch: dict[str, Any]) -> None:
        """Take in one batch."""
        self.losses.append(output.loss.detach())
        self.dices.append(output.dice.detach())
        self.samples += len(batch["case"])
        self.unsaid += [line for lines in batch.get("skipped", ()) if lines for line in lines.split("\n")]

    def step(self, done: int, lr: float) -> None:
        """Called after each optimiser step, on every process; writes when a line is due."""
        if self.bar is not None:
            self.bar[0].update(self.bar[1], completed=done)
        if done % self.config.run.log_every and done != self.config.optim.steps:
            return
        loss, dice, samples = self._means()
        now = time.monotonic()
        row = {
            "step": done,
            "loss": round(loss, 5),
            "dice": [round(v, 4) for v in dice],
            "lr": lr,
            "samples_per_s": round(samples / max(1e-9, now - self.mark), 3),
            "minutes": round((now - self.began) / 60, 3),
        }
        if self.skipped:
            row["skipped_cases"] = len(self.skipped)
        self.losses, self.dices, self.samples, self.mark = [], [], 0, now
        if self.config.run.trackers:
            flat = {k: v for k, v in row.items() if k != "dice"} | {f"dice/turn{i + 1}": v for i, v in enumerate(dice)}
            self.accelerator.log(flat, step=done)
        self._write(row)
        if self.bar is not None:
            shown = f"loss {loss:.3f} dice {' '.join(f'{v:.2f}' for v in dice)} {row['samples_per_s']:g} samples/s"
            self.bar[0].update(self.bar[1], description=shown)
        elif self.main:
            logger.info("step %d of %d, loss %.4f, dice by turn %s", done, self.config.optim.steps, loss, row["dice"])

    def validated(self, done: int, dice: list[float], structures: int, seconds: float) -> None:
        """Write the mean Dice on whole held-back volumes, by click."""
        row = {
            "step": done,
            "validation_dice": [round(v, 4) for v in dice],
            "structures": structures,
            "seconds": round(seconds, 1),
        }
        if self.config.run.trackers:
            self.accelerator.log({f"validation_dice/click{i + 1}": v for i, v in enumerate(dice)}, step=done)
        self._write(row)
        if self.bar is not None:
            self.bar[0].console.print(f"step {done}: validation Dice by click {' '.join(f'{v:.3f}' for v in dice)}")
        elif self.main:
            logger.info(
                "step %d, validation dice by click %s on %d structures", done, row["validation_dice"], structures
            )
        self.mark += seconds  # a validation is no slow training

    def close(self) -> None:
        """End the progress line and the file; safe after an error."""
        if self.bar is not None:
            self.bar[0].stop()
        if self.file is not None:
            self.file.close()

    def _means(self) -> tuple[float, list[float], int]:
        """Loss, Dice by turn and number of samples since the last line, over all processes; gathers the skipped cases
        too.
        """
        dice = torch.cat(self.dices).mean(dim=0).float()
        values = torch.cat([torch.stack(self.losses).mean().float()[None], dice])
        unsaid = self.unsaid
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            values = self.accelerator.reduce(values, "mean")
            unsaid = gather_object(unsaid)
        known = len(self.skipped)
        self.skipped |= {line.split(" ")[0]: line for line in unsaid}
        if self.main and len(self.skipped) > known:
            write_text(self.folder / "skipped.json", json.dumps(self.skipped, indent=1))
        self.unsaid = []
        loss, *by_turn = values.tolist()
        return loss, by_turn, self.samples * self.accelerator.num_processes

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def _read_skipped(folder: Path) -> dict[str, str]:
    path = folder / "skipped.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _start_trackers(accelerator: Accelerator, config: TrainConfig, folder: Path) -> None:
    try:
        accelerator.init_trackers("samed3d", config=_flat(to_dict(config)), init_kwargs={"wandb": {"dir": str(folder)}})
    except Exception as error:  # wandb's own types cannot be named here: it may not be installed
        if type(error).__module__.startswith("wandb"):
            remedy = "log in with: wandb login, or set WANDB_MODE=offline"
            raise InputError(
                f"run.trackers: wandb cannot start ({' '.join(str(error).split())[:120]}); {remedy}"
            ) from error
        raise


def _reopened(path: Path, done: int) -> TextIO:
    """The log ready to append, without the lines that an interrupted run wrote after its last checkpoint: they will be
    written again.
    """
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

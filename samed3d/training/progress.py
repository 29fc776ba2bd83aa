"""Records of a run: ``metrics.jsonl``, curves, ``environment.json``, the progress line, Accelerate's trackers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from samed3d.config import TrainConfig, to_dict
from samed3d.data.sampling import split_weight
from samed3d.environment import environment
from samed3d.errors import InputError
from samed3d.output import write_json, write_text
from samed3d.pages import SERIES_COLOURS, chart, svg_of
from samed3d.training.step import StepOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MANIFEST = ("corpus.json", "cases.csv", "labels.csv")


class RunLog:
    """Means over ``run.log_every`` optimiser steps and all processes; the main one writes ``metrics.jsonl``.

    ``done`` optimiser steps were taken before.

    Raises:
        InputError: if a tracker cannot start; no file of the run is written then.
    """

    def __init__(self, folder: Path, config: TrainConfig, accelerator: Accelerator, done: int, quiet: bool) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.main = accelerator.is_main_process
        if config.run.trackers:
            try:
                wandb = {"wandb": {"dir": str(folder)}}
                accelerator.init_trackers("samed3d", config=_flat(to_dict(config)), init_kwargs=wandb)
            except Exception as error:  # wandb's own types cannot be named here: it may not be installed
                if not type(error).__module__.startswith("wandb"):
                    raise
                reason = " ".join(str(error).split())[:120]
                remedy = "log in with: wandb login, or set WANDB_MODE=offline"
                raise InputError(f"run.trackers: wandb cannot start ({reason}); {remedy}") from error
        self.file = self._reopened(done) if self.main else None
        self.began = self.mark = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.dices: list[torch.Tensor] = []
        self.samples = 0
        path = folder / "skipped.json"
        self.skipped: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.newly_skipped: list[str] = []
        self.bar: Any = None
        if self.main and not quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            progress = Progress(*columns)
            progress.start()
            self.bar = progress, progress.add_task("training", total=config.optim.steps, completed=done)

    def _reopened(self, done: int) -> TextIO:
        """The log ready to append, without lines after step ``done``, which a resumed run writes again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]  # a killed run may have cut its last line
            write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= done))
        return path.open("a", encoding="utf-8")

    def add(self, output: StepOutput, batch: dict[str, Any]) -> None:
        """Take in one batch."""
        self.losses.append(output.loss.detach())
        self.dices.append(output.dice.detach())
        self.samples += len(batch["case"])
        self.newly_skipped += [line for lines in batch.get("skipped", ()) if lines for line in lines.split("\n")]

    def step(self, done: int, lr: float) -> None:
        """Called after each optimiser step, on every process; writes when a line is due."""
        if self.bar is not None:
            self.bar[0].update(self.bar[1], completed=done)
        if done % self.config.run.log_every and done != self.config.optim.steps:
            return
        loss, *dice = self._means()
        now = time.monotonic()
        samples = self.samples * self.accelerator.num_processes
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
        flat = {k: v for k, v in row.items() if k != "dice"} | {f"dice/turn{i + 1}": v for i, v in enumerate(dice)}
        self._write(row, flat)
        if self.bar is not None:
            shown = f"loss {loss:.3f} dice {' '.join(f'{v:.2f}' for v in dice)} {row['samples_per_s']:g} samples/s"
            self.bar[0].update(self.bar[1], description=shown)
        elif self.main:
            logger.info("step %d of %d, loss %.4f, dice by turn %s", done, self.config.optim.steps, loss, row["dice"])

    def validated(self, done: int, dice: list[float], structures: int, seconds: float) -> None:
        """Write the mean Dice on whole held-out volumes, by click."""
        rounded = [round(v, 4) for v in dice]
        row = {"step": done, "validation_dice": rounded, "structures": structures, "seconds": round(seconds, 1)}
        self._write(row, {f"validation_dice/click{i + 1}": v for i, v in enumerate(dice)})
        if self.bar is not None:
            self.bar[0].console.print(f"step {done}: validation Dice by click {' '.join(f'{v:.3f}' for v in dice)}")
        elif self.main:
            logger.info("step %d, validation dice by click %s on %d structures", done, rounded, structures)
        self.mark += seconds  # samples per second do not count validation

    def close(self) -> None:
        """End the progress line and the file; safe after an error."""
        if self.bar is not None:
            self.bar[0].stop()
        if self.file is not None:
            self.file.close()

    def _means(self) -> list[float]:
        """Loss and Dice by turn since the last line, over all processes; gathers the skipped cases too."""
        dice = torch.cat(self.dices).mean(dim=0).float()
        values = torch.cat([torch.stack(self.losses).mean().float()[None], dice])
        skipped = self.newly_skipped
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            values = self.accelerator.reduce(values, "mean")
            skipped = gather_object(skipped)
        known = len(self.skipped)
        self.skipped |= {line.split(" ")[0]: line for line in skipped}
        self.newly_skipped = []
        if self.main and len(self.skipped) > known:
            write_json(self.folder / "skipped.json", self.skipped)
        return values.tolist()

    def _write(self, row: dict[str, Any], flat: dict[str, Any]) -> None:
        if self.config.run.trackers:
            self.accelerator.log(flat, step=row["step"])
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before any work is done, a tracker that is not installed or that nobody is logged in to.

    Raises:
        InputError: with the remedy.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"run.trackers: {name} is not installed; pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if not wandb.api.api_key:
            raise InputError("run.trackers: nobody is logged in to wandb; run: wandb login, or set WANDB_MODE=offline")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat scalars for trackers: nested keys joined by dots, everything else as JSON text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return flat


def manifest_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 over the manifest files of each corpus: what could be drawn, and from what."""
    found = {}
    for entry in config.data.corpus:
        digest = hashlib.sha256()
        for name in MANIFEST:
            path = Path(split_weight(entry)[0]) / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        found[entry] = digest.hexdigest()
    return found


def write_environment(
    folder: Path, config: TrainConfig, accelerator: Accelerator, corpora: dict[str, str], done: int
) -> None:
    """Add this start of the run to ``environment.json``, a list with one entry per start."""
    path, device = folder / "environment.json", accelerator.device
    starts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    starts.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": done,
            "seed": config.run.seed,
            **environment(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "corpora": corpora,
        }
    )
    write_json(path, starts)


def write_curves(folder: Path) -> Path | None:
    """``curves.svg`` of a run folder: loss, Dice by turn and validation Dice by click over the steps.

    Returns:
        The file, or None where there is nothing to draw or matplotlib is missing.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    trained, validated = ([row for row in rows if key in row] for key in ("loss", "validation_dice"))
    if not trained:
        return None
    panels = [("loss", [{**row, "loss": [row["loss"]]} for row in trained], "loss", "")]
    panels.append(("Dice on training crops", trained, "dice", "turn"))
    if validated:
        panels.append(("Dice on held-out volumes", validated, "validation_dice", "click"))
    try:
        with chart(900, 310 * len(panels), left=70, right=150) as (figure, axes):
            axes.remove()
            figure.subplots_adjust(left=0.08, right=0.84, hspace=0.3)
            for panel, contents in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
                _draw(panel, *contents)
            path = folder / "curves.svg"
            write_text(path, svg_of(figure))
    except InputError as error:
        logger.warning("no curves.svg: %s", error)
        return None
    return path


def _draw(panel: Any, title: str, rows: list[dict[str, Any]], key: str, word: str) -> None:
    """One line for each number that ``key`` holds: of each turn, or of each click."""
    for i in range(max(len(row[key]) for row in rows)):
        points = [(row["step"], row[key][i]) for row in rows if len(row[key]) > i and math.isfinite(row[key][i])]
        colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
        panel.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, label=f"{word} {i + 1}" if word else title
        )
    panel.set(title=title, xlabel="step")
    if word:
        panel.set_ylim(0, 1)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))

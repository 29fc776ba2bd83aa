"""Fine-tuning in one call: hold subjects out, measure with clicks, train with a recipe for small data, measure again.

``configs/finetune.yaml`` is the recipe. ``data_prep/pipeline.py`` prepares the data, ``before_after.py`` measures. The
base stays where the result does not beat it by more than the chance of the clicks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samed3d.config import TrainConfig, load_config
from samed3d.data.corpus import CaseRecord, Corpus
from samed3d.data.exposure import TrainingHistory, known_history, subjects_of
from samed3d.errors import InputError
from samed3d.evaluation.results import csv_text
from samed3d.models import load, load_promptable
from samed3d.models.base import PromptableModel
from samed3d.models.weights import ADAPTER_KEY, amend_header, find_checkpoint, read_header, read_weights, tensors_sha256
from samed3d.output import replacing, write_json, write_text
from samed3d.pages import count
from samed3d.training.before_after import (
    ClickScore,
    DiceChange,
    Split,
    Target,
    choose_targets,
    compare,
    is_better,
    measure,
    split_subjects,
    to_markdown,
)
from samed3d.training.checkpoints import store_like
from samed3d.training.loop import train
from samed3d.training.progress import check_trackers

logger = logging.getLogger(__name__)

RECIPES = [Path(__file__).resolve().parents[n] / "configs" / "finetune.yaml" for n in (1, 2)]
"""In an installed package, and in the source tree."""
LEARNING_RATES = {"all": 2e-4, "decoder": 3e-4, "adapters": 5e-4}
"""Peak learning rate by what is trained: the fewer parameters, the higher."""
WARMUP_SHARE = 0.05
LEAST_STEPS, MOST_STEPS, STEPS_PER_STRUCTURE = 200, 1000, 2
TIMED_STEPS = 2
MEASURED_SHARE = 0.2
"""Share of ``--minutes`` for each of the two measurements."""
BEFORE, TUNED = "before.json", "tuned.safetensors"
"""The first measurement, kept for a run that is stopped and resumed; the tuned model where the base is kept."""
_CHOSEN_KEYS = (
    *("model.", "data.corpus", "data.split_seed", "data.validation_share", "data.hold_out"),
    *("optim.epochs", "run.folder"),
)


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning; ``train``, ``adapter`` and ``rank`` as in ``ModelConfig``.

    Attributes:
        steps: Optimiser steps; 0 takes a number that grows with the data.
        minutes: Instead of steps: how long everything may take, both measurements included, from the call on; 0 is off.
        structures: Structures that are clicked before and after; with ``minutes`` as many as a fifth of them allows.
        seeds: Repetitions of their clicks.
        seed: Of everything else that is drawn.
        changes: ``key=value`` of the training config, after the recipe.
        began: When the minutes began (``time.monotonic``), where something was done before the call.
    """

    train: str = "all"
    adapter: str = "none"
    rank: int = 8
    steps: int = 0
    minutes: float = 0.0
    structures: int = 8
    seeds: int = 3
    seed: int = 0
    changes: tuple[str, ...] = ()
    began: float | None = None

    def __post_init__(self) -> None:
        train, adapter, steps, minutes = self.train, self.adapter, self.steps, self.minutes
        if train not in LEARNING_RATES:
            raise InputError(f"--train must be one of {', '.join(LEARNING_RATES)}, got {train!r}")
        if adapter not in ("none", "lora", "fact"):
            raise InputError(f"--adapter must be lora or fact, got {adapter!r}")
        if (adapter == "none") == (train == "adapters"):
            raise InputError(f"--adapter goes with --train adapters, got --train {train} and --adapter {adapter}")
        if self.rank < 1:
            raise InputError(f"--rank must be 1 or more, got {self.rank}")
        if steps and minutes:
            raise InputError(f"--steps and --minutes exclude each other, got {steps} and {minutes:g}; give one")
        if steps < 0 or not 0 <= minutes < math.inf:
            rule = "must be 0 (a number by the data) or more"
            raise InputError(f"--steps and --minutes {rule}, got {steps} and {minutes:g}")
        if min(self.structures, self.seeds) < 1:
            raise InputError(f"--structures and --seeds must be 1 or more, got {self.structures} and {self.seeds}")
        for change in self.changes:
            if change.strip().startswith(_CHOSEN_KEYS):
                chosen = "is chosen by --finetune, --data, --train, --steps and --output"
                raise InputError(f"--set {change.split('=')[0].strip()} {chosen}, got {change!r}")


@dataclass(frozen=True)
class Finetuned:
    """Run folder with ``model.safetensors``, tables and ``scores.csv``; the table as lines and text; whether the base
    was beaten, or else kept.
    """

    folder: Path
    changes: list[DiceChange]
    table: str
    better: bool = False


def finetune(
    base: str,
    corpora: Sequence[Path],
    out: Path,
    options: FinetuneOptions | None = None,
    *,
    elsewhere: Sequence[Path] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Finetuned:
    """Fine-tune a promptable model.

    ``out`` is a new or empty run folder; with ``resume`` that of a stopped run, whose config and first measurement
    count. ``elsewhere`` are corpora of other structures, measured before and after but not trained on: what was
    forgotten. ``quiet`` shows no progress line.

    Returns:
        The result; without lines and table where a signal stopped the training.

    Raises:
        InputError: as ``load_base``, ``split_subjects`` and ``check_output``.
    """
    options = options or FinetuneOptions()
    limit = 60 * options.minutes or math.inf
    began = time.monotonic() if options.began is None else options.began
    if not resume:
        check_output(out)
    model, path, header = load_base(base)
    base = str(path.resolve()) if Path(base).exists() else base  # an adapter finds its base from anywhere
    split = split_subjects(corpora, options.seed)
    sides = {"here": split.held_out}
    sides["elsewhere"] = [(one, case) for one in map(Corpus, elsewhere) for case in one.cases if case.has_image]
    measured = {k: choose_targets(cases, options.structures, options.seed) for k, cases in sides.items() if cases}
    if resume:
        config, before = _stopped_run(out, base, split)
    else:
        config = recipe(model, base, header, corpora, out, split, options)
        check_trackers(config.run.trackers)
        logger.info("trained on: %s; held out: %s", *map(_subjects, (split.trained, split.held_out)))
        if not options.minutes:
            _estimate(model, config, measured, options.seeds)
        before = _measure_all(model, measured, options.seeds, base, time.monotonic() + MEASURED_SHARE * limit)
        if before:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / BEFORE, {place: [asdict(one) for one in scores] for place, scores in before.items()})
        config = _within(config, began + (1 - MEASURED_SHARE) * limit - time.monotonic()) if options.minutes else config
    if _done(out) < config.optim.steps:
        train(config, resume=resume, quiet=quiet)
    if not before or (_done(out) < config.optim.steps and not config.optim.max_minutes):
        return Finetuned(out, [], "")
    store_like(out / "model.safetensors", path)
    measured = {place: _seen(targets, before[place]) for place, targets in measured.items()}
    tuned = load_promptable(out / "model.safetensors")
    after = _measure_all(tuned, measured, options.seeds, "the result", began + limit)
    return _finished(out, base, path, measured, before, after)


def _seen(targets: Sequence[Target], scores: Sequence[ClickScore]) -> list[Target]:
    """The targets that were measured before the time was up."""
    seen = {(score.case, score.structure) for score in scores}
    return [target for target in targets if (target.case.id, target.name) in seen]


def _subjects(side: Sequence[tuple[Corpus, CaseRecord]]) -> str:
    return count(len({case.subject for _, case in side}), "subject")


def _finished(
    out: Path,
    base: str,
    path: Path,
    measured: Mapping[str, Sequence[Target]],
    before: Mapping[str, list[ClickScore]],
    after: Mapping[str, list[ClickScore]],
) -> Finetuned:
    """Write the tables, ``scores.csv``, and the model's header; put the base in its place where that was not beaten."""
    changes = {place: compare(before[place], after[place]) for place in measured}
    better, history = is_better(before["here"], after["here"]), TrainingHistory.of_header(known_history(path))
    tables = []
    for place, targets in measured.items():
        sides = [(t.case.subject, history.side(t.case.source, subjects_of(t.case), t.case.image_hash)) for t in targets]
        tables.append(to_markdown(changes[place], after[place], base, sides))
    verdict = "The fine-tuned model is better than its base by more than the chance of the clicks and is the result."
    if not better:
        verdict = (
            "The fine-tuned model is not better than its base by more than the chance of the clicks: the base is kept "
            f"as model.safetensors, the fine-tuned model is in {TUNED}."
        )
    table = "\nElsewhere, on structures that were not trained on. ".join(tables) + f"\n{verdict}\n"
    rows = [
        {"model": name, "place": place, **asdict(score)}
        for name, places in (("before", before), ("after", after))
        for place, scores in places.items()
        for score in scores
    ]
    write_text(out / "scores.csv", csv_text(rows))
    derived = ("change", "beyond_noise")
    lines = {k: [asdict(c) | {name: getattr(c, name) for name in derived} for c in v] for k, v in changes.items()}
    write_json(out / "table.json", lines)
    write_text(out / "table.md", table)
    model = out / "model.safetensors"
    hashed = {"name": base, "sha256": tensors_sha256(read_weights(path)[0]), "history": known_history(path)}
    amend_header(model, {"base": hashed, "before_after": [asdict(c) for c in changes["here"]]})
    if not better:
        model.rename(out / TUNED)
        with replacing(model) as partial:
            shutil.copyfile(path, partial)
    for state in [out / "last.pt", *out.glob("step_*.pt"), out / BEFORE]:
        state.unlink(missing_ok=True)
    return Finetuned(out, changes["here"], table, better)


def _measure_all(
    model: PromptableModel, measured: Mapping[str, Sequence[Target]], seeds: int, what: str, until: float
) -> dict[str, list[ClickScore]]:
    """Scores by place, as many as are done before ``until``; empty on all processes but the first."""
    if os.environ.get("RANK", "0") != "0":
        return {}
    logger.info("measuring %s: up to %d structures, %d seeds", what, sum(map(len, measured.values())), seeds)
    share = max(0.0, until - time.monotonic()) / len(measured)
    return {place: measure(model, of, seeds, seconds=share) for place, of in measured.items()}


def check_output(out: Path) -> None:
    """Refuse a run folder that is not new or empty.

    Raises:
        InputError: that names it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--output must be a new or empty folder, got {out}; choose another")


def load_base(base: str) -> tuple[PromptableModel, Path, dict[str, Any]]:
    """The model to start from, its file and its header.

    Raises:
        InputError: if there is none, it is not promptable, or it is an adapter.
    """
    model = load(base)
    path = find_checkpoint(base)
    assert path is not None  # else load had refused
    header = read_header(path)
    if not isinstance(model, PromptableModel):
        raise InputError(f"--finetune needs a model that takes prompts, got {base!r}, a semantic {header['model']!r}")
    if ADAPTER_KEY in header:
        raise InputError(
            f"--finetune needs a whole model, got {base!r}, an adapter of {header[ADAPTER_KEY]['base']!r}; "
            "merge it first"
        )
    return model, path, header


def recipe(
    model: PromptableModel,
    base: str,
    header: Mapping[str, Any],
    corpora: Sequence[Path],
    out: Path,
    split: Split,
    options: FinetuneOptions,
) -> TrainConfig:
    """The training config: the recipe's file, what follows from base and data, then the user's changes.

    Raises:
        InputError: for a change that the config refuses.
    """
    by_data = STEPS_PER_STRUCTURE * sum(len(case.labels) for _, case in split.trained)
    steps = options.steps or min(MOST_STEPS, max(LEAST_STEPS, by_data))
    values: dict[str, Any] = {
        "model.name": header["model"],
        "model.overrides": header["config"],
        "model.weights": base,
        "model.train": options.train,
        "model.adapter": options.adapter,
        "model.rank": options.rank,
        "data.corpus": [str(Path(folder).resolve()) for folder in corpora],
        "data.crop": list(model.spec.input_shape_zyx),
        "data.spacing_mm": model.spec.spacing_mm or 0.0,
        "data.split_seed": split.seed,
        "data.validation_share": split.share,
        "optim.lr": LEARNING_RATES[options.train],
        "optim.steps": steps,
        "optim.warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "run.folder": str(out),
        "run.seed": options.seed,
    }
    file = next(path for path in RECIPES if path.is_file())
    changes = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *options.changes]
    return load_config(TrainConfig, file, changes)


def _within(config: TrainConfig, seconds: float) -> TrainConfig:
    """The config with as many steps as fit into the seconds; the learning rate falls with the time."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"--minutes is for one process, got {os.environ['WORLD_SIZE']}; give --steps")
    minutes = max(seconds, 1.0) / 60
    logger.info("%.1f minutes are left for training", minutes)
    optim = replace(config.optim, schedule="cosine_minutes", max_minutes=minutes, steps=10**6, warmup_steps=10)
    return replace(config, optim=optim, run=replace(config.run, save_every=0, log_every=5))


def _estimate(model: PromptableModel, config: TrainConfig, measured: Mapping[str, list[Target]], seeds: int) -> None:
    """Log how long everything will take, by one measurement and a few steps on this machine."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    began = time.monotonic()
    measure(model, measured["here"][:1], 1)
    measuring = 2 * (time.monotonic() - began) * sum(map(len, measured.values())) * seeds
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, folder=str(Path(folder) / "run"), log_every=1, save_every=0, trackers=[])
        short = replace(config.optim, steps=TIMED_STEPS, warmup_steps=0)
        train(replace(config, run=run, optim=short), quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median_high(row["samples_per_s"] for row in rows if "samples_per_s" in row)
    samples = config.optim.steps * config.optim.batch * config.optim.accumulate
    logger.info(
        "about %.0f minutes: %.0f for %d steps, %.0f for measuring before and after; --minutes M sets a limit",
        (samples / speed + measuring) / 60,
        samples / speed / 60,
        config.optim.steps,
        measuring / 60,
    )


def _stopped_run(out: Path, base: str, split: Split) -> tuple[TrainConfig, dict[str, list[ClickScore]]]:
    """Config and first measurement of a stopped run; refused if it had another base or other data."""
    if not (out / "last.pt").is_file() or not (out / BEFORE).is_file():
        raise InputError(
            f"--resume needs a fine-tuning that was stopped, got none with a checkpoint in {out}; leave --resume out"
        )
    config = load_config(TrainConfig, out / "config.json")
    if (config.model.weights, config.data.split_seed, config.data.validation_share) != (base, split.seed, split.share):
        raise InputError(
            f"--resume must be given the --finetune and --data that {out} was started with ({config.model.weights})"
        )
    before = json.loads((out / BEFORE).read_text(encoding="utf-8"))
    return config, {place: [ClickScore(**score) for score in scores] for place, scores in before.items()}


def _done(out: Path) -> int:
    """Optimiser steps of the run's model; 0 where there is none yet."""
    path = out / "model.safetensors"
    return int(read_header(path).get("step", 0)) if path.is_file() else 0

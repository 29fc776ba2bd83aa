"""Fine-tuning in one call: keep subjects back, measure with clicks, train with a recipe for small data, measure again,
say what changed.

The recipe is ``RECIPE``, a few keys of the training config; ``configs/finetune.yaml`` is the same for a corpus that is
prepared already. Not here: finding and preparing the data (``data_prep/cached.py``), the loop (``loop.py``), what is
frozen (``trainable.py``). Read
``before_after.py`` next.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samed3d.config import TrainConfig, load_config
from samed3d.data.corpus import Corpus
from samed3d.errors import InputError
from samed3d.models import load, load_promptable
from samed3d.models.base import PromptableModel
from samed3d.models.weights import ADAPTER_KEY, amend_header, find_checkpoint, read_header, read_weights, tensors_sha256
from samed3d.output import write_text
from samed3d.training.before_after import Change, Score, Target, choose_targets, compare, measure, to_markdown
from samed3d.training.loop import train
from samed3d.training.subjects import Split, history_of, seen_by, split_subjects

logger = logging.getLogger(__name__)

RECIPE: dict[str, Any] = {
    "data.synthetic_share": 0.0,
    "data.fill": [0.12, 1.8],
    "clicks.interactions": 4,
    "clicks.box_probability": 0.2,
    "clicks.mask_only_probability": 0.1,
    "loss.iou": 1.0,
    "optim.weight_decay": 0.05,
    "optim.batch": 4,
    "run.ema": 0.99,
    "run.log_every": 20,
    "run.save_every": 100,
}
RATES = {"all": 2e-4, "decoder": 3e-4, "adapters": 5e-4}
"""Peak rate by what is trained: the fewer parameters, the more each may move."""
WARMUP_SHARE = 0.05
LEAST_STEPS, MOST_STEPS = 200, 1000
STEPS_PER_STRUCTURE = 2
TIMED_STEPS = 4
BEFORE = "before.json"
"""The first measurement, kept for a run that is stopped and gone on with."""
_OURS = (
    "model.",
    "data.corpus",
    "data.split_seed",
    "data.validation_share",
    "data.hold_out",
    "optim.epochs",
    "run.folder",
)


@dataclass(frozen=True)
class FinetuneOptions:
    """What a user may say about a fine-tuning.

    Attributes:
        train: As ``ModelConfig.train``.
        adapter: As ``ModelConfig.adapter``.
        rank: As ``ModelConfig.rank``.
        steps: Optimiser steps; 0 takes a number that grows with the data.
        minutes: Instead of steps: as many as fit, by a short measurement on this machine; 0 is off.
        structures: Structures that are clicked before and after.
        seeds: Repetitions of their clicks.
        seed: Of everything else that is drawn.
        changes: ``key=value`` of the training config, on top of the recipe.
    """

    train: str = "all"
    adapter: str = "none"
    rank: int = 8
    steps: int = 0
    minutes: float = 0.0
    structures: int = 24
    seeds: int = 3
    seed: int = 0
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train not in RATES:
            raise InputError(f"--train must be one of {', '.join(RATES)}, got {self.train!r}")
        if self.adapter not in ("none", "lora", "fact"):
            raise InputError(f"--adapter must be lora or fact, got {self.adapter!r}")
        if (self.adapter == "none") == (self.train == "adapters"):
            raise InputError(
                f"--adapter goes with --train adapters, got --train {self.train} and --adapter {self.adapter}"
            )
        if self.rank < 1:
            raise InputError(f"--rank must be 1 or more, got {self.rank}")
        if self.steps and self.minutes:
            raise InputError(
                f"--steps and --minutes exclude each other, got {self.steps} and {self.minutes:g}; give one"
            )
        if self.steps < 0 or not 0 <= self.minutes < math.inf:
            raise InputError(
                f"--steps and --minutes must be 0 (a number by the data) or more, got {self.steps} and {self.minutes:g}"
            )
        if min(self.structures, self.seeds) < 1:
            raise InputError(f"--structures and --seeds must be 1 or more, got {self.structures} and {self.seeds}")
        for change in self.changes:
            if change.strip().startswith(_OURS):
                raise InputError(
                    f"--set {change.split('=')[0].strip()} is chosen by --finetune, --data, --train, --steps and --output, got {change!r}"
                )


@dataclass(frozen=True)
class Finetuned:
    """What came out: the run folder (``model.safetensors``, ``table.md``, ``table.json``, ``scores.csv``), the lines,
    and the table.
    """

    folder: Path
    changes: list[Change]
    table: str


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

    Args:
        base: Checkpoint name or file.
        corpora: Prepared corpora.
        out: Run folder, new or empty; with ``resume`` that of the stopped run.
        options: See ``FinetuneOptions``.
        elsewhere: Corpora of other structures, measured before and after but not trained on: what was forgotten.
        resume: Go on with a run that was stopped, with the config and the first measurement that it saved.
        quiet: No progress bar.

    Returns:
        The result; without lines and table where the training was stopped by a signal, which is said how to go on.

    Raises:
        InputError: for a base that is not promptable or is an adapter, data of fewer than two subjects, a folder that
            is not empty.
    """
    options = options or FinetuneOptions()
    if not resume:
        check_output(out)
    model, path, header = load_base(base)
    base = str(path.resolve()) if Path(base).is_file() else base  # an adapter finds its base from anywhere
    split = split_subjects(corpora, options.seed)
    measured = {"here": choose_targets(split.kept, options.structures, options.seed)}
    others = [(corpus, case) for corpus in map(Corpus, elsewhere) for case in corpus.cases if case.has_image]
    if others:
        measured["elsewhere"] = choose_targets(others, options.structures, options.seed)
    if resume:
        config, before = _stopped_run(out, base, split)
    else:
        config = recipe(model, base, header, corpora, out, split, options)
        config = _fitted_to(config, options.minutes) if options.minutes else config
        sides = [len({case.subject for _, case in side}) for side in (split.trained, split.kept)]
        logger.info("%d subjects learn, %d are kept back; %s", *sides, _length(config))
        before = _measure_all(model, measured, options.seeds, f"measuring {base}")
        _write_before(out, before)
    if _done(out) < config.optim.steps:
        train(config, resume=resume, quiet=quiet)
    if not before or (_done(out) < config.optim.steps and not config.optim.max_minutes):
        return Finetuned(out, [], "")
    after = _measure_all(load_promptable(out / "model.safetensors"), measured, options.seeds, "measuring the result")
    return _finished(out, base, path, header, split, measured, before, after)


def _finished(
    out: Path,
    base: str,
    path: Path,
    header: dict[str, Any],
    split: Split,
    measured: Mapping[str, Sequence[Target]],
    before: Mapping[str, list[Score]],
    after: Mapping[str, list[Score]],
) -> Finetuned:
    """Write the table, and into the model's header where it comes from and whom it knows."""
    changes = {place: compare(before[place], after[place]) for place in measured}
    tables = [
        to_markdown(
            changes[place],
            before[place],
            base,
            [(t.case.subject, seen_by(header, t.case.source, t.case.subject)) for t in targets],
        )
        for place, targets in measured.items()
    ]
    table = "\nElsewhere, on structures that were not trained on. ".join(tables)
    _write_results(out, changes, table, {"before": before, "after": after})
    trained_on = {
        name: sorted({c.subject for _, c in split.trained if c.source == name})
        for name in {c.source for _, c in split.trained}
    }
    facts = {"base": {"name": base, "sha256": tensors_sha256(read_weights(path)[0]), "history": history_of(header)}}
    amend_header(
        out / "model.safetensors",
        {**facts, "trained_on": trained_on, "before_after": [asdict(c) for c in changes["here"]]},
    )
    return Finetuned(out, changes["here"], table)


def _measure_all(
    model: PromptableModel, measured: Mapping[str, Sequence[Target]], seeds: int, what: str
) -> dict[str, list[Score]]:
    """Scores by place; empty on all processes but the first, which speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        return {}
    logger.info("%s: %d structures, %d seeds of the clicks", what, sum(map(len, measured.values())), seeds)
    return {place: measure(model, targets, seeds) for place, targets in measured.items()}


def check_output(out: Path) -> None:
    """That the run folder is new or empty.

    Raises:
        InputError: if it is not.
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
        raise InputError(
            f"--finetune needs a model that takes prompts, got {base!r}, a {header['model']!r}, which is automatic"
        )
    if ADAPTER_KEY in header:
        raise InputError(
            f"--finetune needs a whole model, got {base!r}, an adapter of {header[ADAPTER_KEY]['base']!r}; merge it first"
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
    """The training config: ``RECIPE``, what follows from base and data, then the user's changes.

    Raises:
        InputError: for a change that the config refuses.
    """
    spec = model.spec
    structures = sum(len(case.labels) for _, case in split.trained)
    steps = options.steps or min(MOST_STEPS, max(LEAST_STEPS, STEPS_PER_STRUCTURE * structures))
    values: dict[str, Any] = {
        **RECIPE,
        "model.name": header["model"],
        "model.overrides": header["config"],
        "model.weights": base,
        "model.train": options.train,
        "model.adapter": options.adapter,
        "model.rank": options.rank,
        "data.corpus": [str(Path(folder).resolve()) for folder in corpora],
        "data.crop": list(spec.input_shape_zyx),
        "data.spacing_mm": spec.spacing_mm or 0.0,
        "data.split_seed": split.seed,
        "data.validation_share": split.share,
        "optim.lr": RATES[options.train],
        "optim.steps": steps,
        "optim.warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "run.folder": str(out),
        "run.seed": options.seed,
    }
    return load_config(
        TrainConfig, None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *options.changes]
    )


def _fitted_to(config: TrainConfig, minutes: float) -> TrainConfig:
    """The config with as many steps as fit into the minutes, by the rate of a few steps."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"--minutes is for one process, got {os.environ['WORLD_SIZE']}; give --steps")
    logger.info("timing %d steps", TIMED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, folder=str(Path(folder) / "run"), log_every=1, save_every=0, trackers=[])
        train(replace(config, run=run, optim=replace(config.optim, steps=TIMED_STEPS, warmup_steps=0)), quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["samples_per_s"] for row in rows if "samples_per_s" in row)
    steps = max(1, int(60 * minutes * rates[len(rates) // 2] / (config.optim.batch * config.optim.accumulate)))
    return replace(config, optim=replace(config.optim, steps=steps, warmup_steps=max(1, round(WARMUP_SHARE * steps))))


def _write_before(out: Path, before: Mapping[str, list[Score]]) -> None:
    """Keep the first measurement for ``_stopped_run``."""
    if before:
        out.mkdir(parents=True, exist_ok=True)
        write_text(
            out / BEFORE, json.dumps({place: [asdict(score) for score in scores] for place, scores in before.items()})
        )


def _stopped_run(out: Path, base: str, split: Split) -> tuple[TrainConfig, dict[str, list[Score]]]:
    """Config and first measurement of a run that is gone on with.

    Raises:
        InputError: if there is none, or it was started from another base or other data.
    """
    if not (out / "last.pt").is_file() or not (out / BEFORE).is_file():
        raise InputError(
            f"--resume needs a fine-tuning that was stopped, got none with a checkpoint in {out}; leave --resume out"
        )
    config = load_config(TrainConfig, out / "config.json")
    same = (config.model.weights, config.data.split_seed, config.data.validation_share) == (
        base,
        split.seed,
        split.share,
    )
    if not same:
        raise InputError(
            f"--resume must be given the --finetune and --data that {out} was started with ({config.model.weights})"
        )
    before = json.loads((out / BEFORE).read_text(encoding="utf-8"))
    return config, {place: [Score(**score) for score in scores] for place, scores in before.items()}


def _done(out: Path) -> int:
    """Optimiser steps that are in the run's model; 0 where there is none yet."""
    path = out / "model.safetensors"
    return int(read_header(path).get("step", 0)) if path.is_file() else 0


def _write_results(
    out: Path, changes: Mapping[str, list[Change]], table: str, scores: Mapping[str, Mapping[str, list[Score]]]
) -> None:
    """``table.md``, ``table.json`` and ``scores.csv``, each whole or not at all."""
    rows = [
        {"model": name, "place": place, **asdict(score)}
        for name, places in scores.items()
        for place, some in places.items()
        for score in some
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    body = {
        place: [{**asdict(c), "change": c.change, "beyond_noise": c.beyond_noise} for c in lines]
        for place, lines in changes.items()
    }
    for name, content in {
        "scores.csv": text.getvalue(),
        "table.json": json.dumps(body, indent=1) + "\n",
        "table.md": table,
    }.items():
        write_text(out / name, content)


def _length(config: TrainConfig) -> str:
    samples = config.optim.steps * config.optim.batch * config.optim.accumulate
    return f"{config.optim.steps} steps of {config.optim.batch}, {samples:,} samples"

"""Fine-tuning in one call: hold subjects out, measure with clicks, train with a recipe for small data, measure again.

``configs/finetune.yaml`` is the same recipe for a prepared corpus. ``data_prep/pipeline.py`` prepares the data,
``before_after.py`` measures.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samed3d.config import TrainConfig, load_config
from samed3d.data.corpus import GROUP_SEPARATOR, CaseRecord, Corpus, in_validation
from samed3d.errors import InputError
from samed3d.models import load, load_promptable
from samed3d.models.base import PromptableModel
from samed3d.models.weights import ADAPTER_KEY, amend_header, find_checkpoint, read_header, read_weights, tensors_sha256
from samed3d.output import replacing, write_json, write_text
from samed3d.training.before_after import ClickScore, DiceChange, Target, choose_targets, compare, measure, to_markdown
from samed3d.training.loop import train

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
LEARNING_RATES = {"all": 2e-4, "decoder": 3e-4, "adapters": 5e-4}
"""Peak learning rate by what is trained: the fewer parameters, the higher."""
WARMUP_SHARE = 0.05
LEAST_STEPS, MOST_STEPS, STEPS_PER_STRUCTURE = 200, 1000, 2
TIMED_STEPS = 4
BEFORE = "before.json"
"""The first measurement, kept for a run that is stopped and resumed."""
HELD_OUT = 0.2
"""Share of subjects that are measured and never trained on; at least one."""
EXPOSURE = ("trained on", "unknown", "held out", "never")
"""How a model's training may have used a subject, worst first."""
_SPLIT_SEEDS = 20_000
_CHOSEN_KEYS = (
    *("model.", "data.corpus", "data.split_seed", "data.validation_share", "data.hold_out"),
    *("optim.epochs", "run.folder"),
)


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning; ``train``, ``adapter`` and ``rank`` as in ``ModelConfig``.

    Attributes:
        steps: Optimiser steps; 0 takes a number that grows with the data.
        minutes: Instead of steps: as many as fit, by timing a few steps on this machine; 0 is off.
        structures: Structures that are clicked before and after.
        seeds: Repetitions of their clicks.
        seed: Of everything else that is drawn.
        changes: ``key=value`` of the training config, after the recipe.
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
    """Run folder with ``model.safetensors``, tables and ``scores.csv``; the table as lines and text."""

    folder: Path
    changes: list[DiceChange]
    table: str


@dataclass(frozen=True)
class Split:
    """Held-out cases, whose subjects ``in_validation`` picks with this share and seed, and trained ones."""

    share: float
    seed: int
    held_out: list[tuple[Corpus, CaseRecord]]
    trained: list[tuple[Corpus, CaseRecord]]


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
        resume: Resume a stopped run with the config and the first measurement that it saved.
        quiet: Show no progress line.

    Returns:
        The result; without lines and table where a signal stopped the training.

    Raises:
        InputError: as ``load_base``, ``split_subjects`` and ``check_output``.
    """
    options = options or FinetuneOptions()
    if not resume:
        check_output(out)
    model, path, header = load_base(base)
    base = str(path.resolve()) if Path(base).is_file() else base  # an adapter finds its base from anywhere
    split = split_subjects(corpora, options.seed)
    measured = {"here": choose_targets(split.held_out, options.structures, options.seed)}
    others = [(corpus, case) for corpus in map(Corpus, elsewhere) for case in corpus.cases if case.has_image]
    measured |= {"elsewhere": choose_targets(others, options.structures, options.seed)} if others else {}
    if resume:
        config, before = _stopped_run(out, base, split)
    else:
        config = recipe(model, base, header, corpora, out, split, options)
        config = _fitted_to(config, options.minutes) if options.minutes else config
        sides = [len({case.subject for _, case in side}) for side in (split.trained, split.held_out)]
        length = f"{config.optim.steps} steps of {config.optim.batch * config.optim.accumulate} samples"
        logger.info("%d subjects are trained on, %d are held out; %s", *sides, length)
        before = _measure_all(model, measured, options.seeds, f"measuring {base}")
        if before:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / BEFORE, {place: [asdict(one) for one in scores] for place, scores in before.items()})
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
    before: Mapping[str, list[ClickScore]],
    after: Mapping[str, list[ClickScore]],
) -> Finetuned:
    """Write the tables, ``scores.csv``, and the model's header: its base and its training subjects."""
    changes = {place: compare(before[place], after[place]) for place in measured}
    tables = []
    for place, targets in measured.items():
        exposure = [(t.case.subject, exposure_of(header, t.case.source, t.case.subject)) for t in targets]
        tables.append(to_markdown(changes[place], before[place], base, exposure))
    table = "\nElsewhere, on structures that were not trained on. ".join(tables)
    rows = [
        {"model": name, "place": place, **asdict(score)}
        for name, places in (("before", before), ("after", after))
        for place, scores in places.items()
        for score in scores
    ]
    with replacing(out / "scores.csv") as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    derived = ("change", "beyond_noise")
    lines = {k: [asdict(c) | {name: getattr(c, name) for name in derived} for c in v] for k, v in changes.items()}
    write_json(out / "table.json", lines)
    write_text(out / "table.md", table)
    sources = {case.source for _, case in split.trained}
    trained_on = {name: sorted({c.subject for _, c in split.trained if c.source == name}) for name in sources}
    history = {key: header[key] for key in ("training", "trained_on", "sources", "base") if key in header}
    facts = {
        "base": {"name": base, "sha256": tensors_sha256(read_weights(path)[0]), "history": history},
        "trained_on": trained_on,
        "before_after": [asdict(c) for c in changes["here"]],
    }
    amend_header(out / "model.safetensors", facts)
    return Finetuned(out, changes["here"], table)


def _measure_all(
    model: PromptableModel, measured: Mapping[str, Sequence[Target]], seeds: int, what: str
) -> dict[str, list[ClickScore]]:
    """Scores by place; empty on all processes but the first."""
    if os.environ.get("RANK", "0") != "0":
        return {}
    logger.info("%s: %d structures, %d seeds of the clicks", what, sum(map(len, measured.values())), seeds)
    return {place: measure(model, targets, seeds) for place, targets in measured.items()}


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
    """The training config: ``RECIPE``, what follows from base and data, then the user's changes.

    Raises:
        InputError: for a change that the config refuses.
    """
    by_data = STEPS_PER_STRUCTURE * sum(len(case.labels) for _, case in split.trained)
    steps = options.steps or min(MOST_STEPS, max(LEAST_STEPS, by_data))
    values: dict[str, Any] = {
        **RECIPE,
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
    return load_config(
        TrainConfig, None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *options.changes]
    )


def _fitted_to(config: TrainConfig, minutes: float) -> TrainConfig:
    """The config with as many steps as fit into the minutes, by timing a few steps."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"--minutes is for one process, got {os.environ['WORLD_SIZE']}; give --steps")
    logger.info("timing %d steps", TIMED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, folder=str(Path(folder) / "run"), log_every=1, save_every=0, trackers=[])
        train(replace(config, run=run, optim=replace(config.optim, steps=TIMED_STEPS, warmup_steps=0)), quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median_high(row["samples_per_s"] for row in rows if "samples_per_s" in row)
    steps = max(1, int(60 * minutes * speed / (config.optim.batch * config.optim.accumulate)))
    return replace(config, optim=replace(config.optim, steps=steps, warmup_steps=max(1, round(WARMUP_SHARE * steps))))


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


def split_subjects(corpora: Sequence[Path], seed: int) -> Split:
    """Hold a fifth of the subjects out, at least one: by the first seed of ``in_validation`` that gives that number.

    The model's header names share and seed, so that ``samed3d evaluate`` holds the same subjects out.

    Raises:
        InputError: if fewer than two subjects have a labelled image.
    """
    cases = [
        (corpus, case)
        for corpus in map(Corpus, corpora)
        for case in corpus.cases
        if case.has_image and case.labels and case.split != "test"
    ]
    groups = {case.split_group or case.subject for _, case in cases}
    if len(groups) < 2:
        where = ", ".join(map(str, corpora))
        raise InputError(
            "data must have labelled images of at least 2 subjects, one to learn from, one to measure on, "
            f"got {len(groups)}: {where}"
        )
    wanted = max(1, round(HELD_OUT * len(groups)))
    share = wanted / len(groups)
    offset = seed * _SPLIT_SEEDS
    for candidate in range(offset, offset + _SPLIT_SEEDS):
        # any member keeps the whole group back, as in data/sampling.py
        kept = {g for g in groups if any(in_validation(name, share, candidate) for name in g.split(GROUP_SEPARATOR))}
        if abs(len(kept) - wanted) <= wanted // 10:
            sides: tuple[list, list] = ([], [])
            for corpus, case in cases:
                sides[(case.split_group or case.subject) not in kept].append((corpus, case))
            return Split(share, candidate, *sides)
    raise InputError(f"no split of {len(groups)} groups of subjects holds {wanted} out; join fewer images by subject")


def exposure_of(header: Mapping[str, Any], source: str, subject: str) -> str:
    """Whether a model was trained on a subject: one of ``EXPOSURE``, the worst of the model and its bases.

    A header names the sources that were held out and how subjects were split. Where it names neither its subjects
    (``trained_on``, of a fine-tuned model) nor its ``sources``, a subject on the training side is ``"unknown"``.
    """
    data, sources = header.get("training", {}).get("data"), header.get("sources")
    if subject in header.get("trained_on", {}).get(source, ()):
        known = "trained on"
    elif not data:
        known = "unknown"
    elif (
        source in data.get("hold_out", ()) or "trained_on" in header or (sources is not None and source not in sources)
    ):
        known = "never"
    elif in_validation(subject, data["validation_share"], data["split_seed"]):
        known = "held out"
    else:
        known = "unknown" if sources is None else "trained on"
    earlier = header.get("base", {}).get("history")
    return known if earlier is None else min(known, exposure_of(earlier, source, subject), key=EXPOSURE.index)

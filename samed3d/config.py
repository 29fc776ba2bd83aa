"""What a training run is told: frozen dataclasses, read from YAML, changed by dotted overrides.

A key that no dataclass has is refused with the nearest name, a value of the wrong type with the key, the rule and the value. Nothing here
knows a model or a tensor. Read ``training/loop.py`` next; ``configs/tiny_cpu.yaml`` is the smallest file that trains.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from samed3d.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "samed3d_unet"
    """Registry name (``samed3d models`` lists them)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model's builder; empty keeps its own numbers."""
    weights: str = ""
    """Checkpoint to start from (name or file); empty starts from random weights."""
    train: Literal["all", "decoder", "adapters"] = "all"
    """Which parameters learn: all, everything but the image encoder, or only adapters put on a frozen image encoder and the decoder."""
    adapter: Literal["none", "lora", "fact"] = "none"
    """Adapter on the image encoder's attention or convolutions; needed for train: adapters."""
    rank: int = 8
    """Rank of the adapter."""


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from and how they are cut."""

    corpus: list[str] = field(default_factory=list)
    """Folders of prepared corpora (``samed3d prepare``); empty trains on generated volumes only."""
    synthetic_share: float = 1.0
    """Share of samples that are generated, 0 to 1; 0 switches generation off, 1 needs no corpus."""
    crop: tuple[int, int, int] = (64, 64, 64)
    """Shape of a sample in voxels, zyx."""
    fill: tuple[float, float] = (0.25, 1.0)
    """Least and greatest extent of the object as a share of the crop's edge."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""
    split_seed: int = 0
    """Seed of the split by subject into training and validation."""
    validation_share: float = 0.1
    """Share of subjects that are never trained on, 0 to below 1; 0 trains on all."""
    hold_out: list[str] = field(default_factory=list)
    """Sources of the corpus that are never trained on; empty holds none out."""

    def __post_init__(self) -> None:
        _check(0 <= self.synthetic_share <= 1, "data.synthetic_share", "must be from 0 to 1", self.synthetic_share)
        _check(min(self.crop) >= 8, "data.crop", "must be at least 8 voxels on each axis", self.crop)
        _check(0 < self.fill[0] <= self.fill[1], "data.fill", "must be two rising numbers above 0", self.fill)
        _check(self.workers >= 0, "data.workers", "must be 0 or more", self.workers)
        _check(0 <= self.validation_share < 1, "data.validation_share", "must be from 0 to below 1", self.validation_share)
        if not self.corpus and self.synthetic_share < 1:
            raise InputError(
                f"data.synthetic_share must be 1 while data.corpus is empty, got {self.synthetic_share:g}; "
                "name a prepared corpus in data.corpus or set data.synthetic_share=1"
            )
        if self.corpus and self.synthetic_share == 1:
            raise InputError(
                f"data.synthetic_share must be below 1 when data.corpus is given ({len(self.corpus)} folders), got 1: "
                "the corpus would never be drawn; set data.synthetic_share=0 or a share"
            )


@dataclass(frozen=True)
class ClickConfig:
    """The simulated user of the training loop."""

    interactions: int = 4
    """Decodes per sample, each after one more prompt."""
    policy: Literal["uniform", "centre", "ritm"] = "uniform"
    """Where the next click falls in the error of the current mask (rules in ``clicks.py``)."""
    box_probability: float = 0.3
    """Chance that a sample's first prompt is a jittered box instead of a click; 0 never gives a box."""
    mask_only_probability: float = 0.1
    """Chance that a later decode gets the previous mask and no new click; 0 always clicks."""
    detach: bool = True
    """Whether the previous mask is cut from the gradient before it is fed back; false keeps one graph over all decodes."""
    memory: Literal["all", "newest", "spec"] = "spec"
    """Clicks given at each decode: all, the newest only, or what the model's spec says."""

    def __post_init__(self) -> None:
        _check(self.interactions >= 1, "clicks.interactions", "must be 1 or more", self.interactions)
        _check(0 <= self.box_probability <= 1, "clicks.box_probability", "must be from 0 to 1", self.box_probability)
        _check(0 <= self.mask_only_probability <= 1, "clicks.mask_only_probability", "must be from 0 to 1", self.mask_only_probability)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay; 0 switches it off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment, each in [0, 1)."""
    warmup_steps: int = 0
    """Optimiser steps over which the rate rises from 0; 0 starts at the peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the rate after the warm-up: down to 0 at the last step, or flat."""
    grad_clip: float = 1.0
    """Greatest gradient norm; 0 does not clip."""
    accumulate: int = 1
    """Batches per optimiser step."""
    batch: int = 2
    """Samples per batch and process."""
    steps: int = 100
    """Optimiser steps of the run."""
    max_minutes: float = 0.0
    """Wall-clock limit in minutes, after which the run saves and ends; 0 sets no limit."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", "must be above 0", self.lr)
        _check(self.weight_decay >= 0, "optim.weight_decay", "must be 0 or more", self.weight_decay)
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas", "must each be from 0 to below 1", self.betas)
        _check(self.grad_clip >= 0, "optim.grad_clip", "must be 0 (off) or more", self.grad_clip)
        _check(self.accumulate >= 1, "optim.accumulate", "must be 1 or more", self.accumulate)
        _check(self.batch >= 1, "optim.batch", "must be 1 or more", self.batch)
        _check(self.steps >= 1, "optim.steps", "must be 1 or more", self.steps)
        _check(self.max_minutes >= 0, "optim.max_minutes", "must be 0 (no limit) or more", self.max_minutes)
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"optim.warmup_steps must be from 0 to optim.steps ({self.steps}), got {self.warmup_steps}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes and how it repeats."""

    folder: str = "runs/tiny"
    """Folder for checkpoints, ``config.json`` and ``metrics.jsonl``."""
    seed: int = 0
    """Seed of weights, samples and clicks; the same seed gives the same run on a CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward; auto takes bf16 on a GPU that has it and on a CPU with AMX, else fp32."""
    log_every: int = 10
    """Optimiser steps between two lines of ``metrics.jsonl``."""
    save_every: int = 100
    """Optimiser steps between two checkpoints; 0 saves at the end only."""
    ema: float = 0.0
    """Decay of the running mean of the weights, 0 to below 1; 0 keeps none."""
    trackers: list[str] = field(default_factory=list)
    """Further logs, of ``wandb`` and ``tensorboard``; empty writes ``metrics.jsonl`` only."""

    def __post_init__(self) -> None:
        _check(bool(self.folder.strip()), "run.folder", "must name a folder", self.folder)
        _check(self.seed >= 0, "run.seed", "must be 0 or more", self.seed)
        _check(self.log_every >= 1, "run.log_every", "must be 1 or more", self.log_every)
        _check(self.save_every >= 0, "run.save_every", "must be 0 (at the end only) or more", self.save_every)
        _check(0 <= self.ema < 1, "run.ema", "must be from 0 (off) to below 1", self.ema)
        _check(set(self.trackers) <= {"wandb", "tensorboard"}, "run.trackers", "may hold wandb and tensorboard", self.trackers)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms; 0 switches a term off."""

    dice: float = 1.0
    """Soft Dice on the mask."""
    ce: float = 1.0
    """Binary cross-entropy on the mask logits."""
    iou: float = 0.1
    """Squared error of the predicted overlap."""

    def __post_init__(self) -> None:
        _check(min(self.dice, self.ce, self.iou) >= 0, "loss.dice, loss.ce, loss.iou", "must be 0 or more", (self.dice, self.ce, self.iou))
        _check(self.dice + self.ce > 0, "loss.dice, loss.ce", "must not both be 0", (self.dice, self.ce))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``samed3d train`` reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clicks: ClickConfig = field(default_factory=ClickConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def load_config(cls: type[T], path: Path | str | None = None, overrides: Sequence[str] = ()) -> T:
    """A config dataclass from a YAML file and overrides.

    Args:
        cls: The dataclass to build; its own defaults stand for what the file leaves out.
        path: YAML file, or None for the defaults.
        overrides: ``"section.key=value"`` strings, the value in YAML; later ones win.

    Raises:
        InputError: for a missing or broken file, an unknown key (the nearest name is given), a wrong type or a broken rule.
    """
    tree: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return _build(cls, tree, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts and lists, ready for YAML or JSON; ``load_config`` reads it back to an equal object."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"config file cannot be read: {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config file must be UTF-8 text: {path}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"config file must be a mapping of sections, got a {type(tree).__name__}: {path}")
    return tree


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # here, so that importing the dataclasses costs nothing on a bare GPU machine

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"not valid YAML: {where}{line} ({getattr(error, 'problem', None) or 'unreadable'})") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise InputError(f"--set needs section.key=value, got {override!r}")
    node = tree
    for part in parts[:-1]:
        below = node.get(part)
        if below is None:
            below = node[part] = {}
        if not isinstance(below, dict):
            raise InputError(f"--set {override!r}: {part!r} is a value, not a section")
        node = below
    node[parts[-1]] = _parse_yaml(text, f"--set {override}")


def _build(cls: type[T], tree: Any, prefix: str) -> T:
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"config key {prefix!r} must be a section of keys, got {tree!r}")
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            remedy = f"did you mean {f'{prefix}.' if prefix else ''}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise InputError(f"unknown config key {dotted!r}; {remedy}")
        values[key] = _coerce(value, hints[key], dotted)
    return cls(**values)


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, changed only where nothing is lost (int to float, list to tuple, "1e-4" to float)."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)  # type: ignore[arg-type]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(value, next(k for k in inner if k is not type(None)), key)
    if origin is Literal:
        _check(value in inner, f"config key {key!r}", f"must be one of {', '.join(map(str, inner))}", value)
        return value
    if origin in (list, tuple):
        fixed = len(inner) if origin is tuple and inner[-1] is not Ellipsis else None
        rule = f"must be a list of {fixed or ''} values".replace("  ", " ")
        _check(isinstance(value, list | tuple) and (fixed is None or len(value) == fixed), f"config key {key!r}", rule, value)
        kinds = inner if fixed is not None else [inner[0]] * len(value)
        return origin(_coerce(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        _check(value is None or isinstance(value, dict), f"config key {key!r}", "must be a mapping", value)
        return {str(k): v for k, v in (value or {}).items()}
    return _coerce_scalar(value, kind, key)


def _coerce_scalar(value: Any, kind: Any, key: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as text
        except (TypeError, ValueError):
            number = math.nan
        _check(math.isfinite(number), f"config key {key!r}", "must be a finite number", value)
        return number
    rules = {bool: "must be true or false", int: "must be a whole number", float: "must be a number", str: "must be text"}
    good = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    _check(good, f"config key {key!r}", rules.get(kind, f"must be a {kind.__name__}"), value)
    return value


def _check(holds: bool, key: str, rule: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{key} {rule}, got {value!r}")

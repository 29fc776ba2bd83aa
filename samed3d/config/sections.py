"""The sections of a training config: every key with its meaning, its unit and the value that switches it off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from samed3d.errors import InputError

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""


def at_least(low: int, meaning: str = "") -> Rule:
    """The rule of a least value; ``meaning`` says what that value does."""
    return f"must be {low}{f' ({meaning})' if meaning else ''} or more", lambda value: value >= low


SHARE: Rule = ("must be from 0 to 1", lambda value: 0 <= value <= 1)
RISING: Rule = (
    "must be rising shares of a cycle, above 0 and at most 1",
    lambda value: all(0 < a < b <= 1 for a, b in zip([1e-9, *value], value, strict=False)),
)
ABOVE_0: Rule = ("must be above 0", lambda value: value > 0)


def check(holds: bool, key: str, rule: str, value: Any) -> None:
    """Refuse a value that breaks a rule.

    Raises:
        InputError: that names the key, the rule and the value.
    """
    if not holds:
        raise InputError(f"{key} {rule}, got {value!r}")


def ruled(default: Any, rule: Rule) -> Any:
    """A field with a default and a rule, which ``Section`` checks; a list is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Section:
    """Base of the sections: checks every field that has a rule."""

    section = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            if "rule" in each.metadata:
                rule, holds = each.metadata["rule"]
                value = getattr(self, each.name)
                check(holds(value), f"{self.section}.{each.name}", rule, value)


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
    """Trained parameters: all, all but the image encoder, or decoders and adapters on a frozen image encoder."""
    adapter: Literal["none", "lora", "fact"] = "none"
    """Adapter on the image encoder's attention or convolutions; needed for train: adapters."""
    rank: int = 8
    """Rank of the adapter."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Where training samples come from and how they are cut."""

    section = "data"

    corpus: list[str] = field(default_factory=list)
    """Folders of prepared corpora (``samed3d prepare``); empty trains on generated volumes only."""
    synthetic_share: float = ruled(1.0, SHARE)
    """Share of samples that are generated, 0 to 1; 0 switches generation off, 1 needs no corpus."""
    crop: tuple[int, int, int] = ruled((64, 64, 64), ("must be at least 8 voxels on each axis", lambda v: min(v) >= 8))
    """Shape of a sample in voxels, zyx."""
    fill: tuple[float, float] = ruled((0.25, 1.0), ("must be two rising numbers above 0", lambda v: 0 < v[0] <= v[1]))
    """Least and greatest extent of the object as a share of the crop's edge; not used with ``spacing_mm``."""
    spacing_mm: float = ruled(0.0, at_least(0, "the object's scale"))
    """Isotropic spacing of the crops in mm, for models that have one; 0 lets the crop follow the object's size."""
    placement: Literal["jittered", "centred"] = "jittered"
    """Where the object lies in the crop: anywhere, or with its box in the crop's middle (SAM-Med3D)."""
    augment: Literal["full", "flips"] = "full"
    """Mirroring, axis order, contrast, bias, resolution and noise; or mirroring alone."""
    transforms: list[dict[str, Any]] = field(default_factory=list)
    """Transforms of torchio with their arguments, e.g. ``[{RandomMotion: {p: 0.1}}]``, applied before ``augment``."""
    blur_probability: float = ruled(0.0, SHARE)
    """Probability of a Gaussian blur of a real crop with ``augment: full``; 0 never blurs."""
    workers: int = ruled(0, at_least(0))
    """Processes that load samples; 0 loads them in the training process."""
    split_seed: int = 0
    """Seed of the split by subject into training and validation."""
    validation_share: float = ruled(0.1, ("must be from 0 to below 1", lambda v: 0 <= v < 1))
    """Share of subjects that are never trained on, 0 to below 1; 0 trains on all."""
    hold_out: list[str] = field(default_factory=list)
    """Sources of the corpus that are never trained on; empty holds none out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        blur, share = self.blur_probability, self.synthetic_share
        check(
            not blur or self.augment == "full",
            "data.blur_probability",
            f"must be 0 with data.augment={self.augment}",
            blur,
        )
        if not self.corpus and share < 1:
            remedy = "name a prepared corpus in data.corpus or set data.synthetic_share=1"
            raise InputError(f"data.synthetic_share must be 1 while data.corpus is empty, got {share:g}; {remedy}")
        if self.corpus and share == 1:
            rule = f"data.synthetic_share must be below 1 when data.corpus is given ({len(self.corpus)} folders), got 1"
            raise InputError(f"{rule}: the corpus would never be drawn; set data.synthetic_share=0 or a share")


@dataclass(frozen=True)
class ClickConfig(Section):
    """The simulated user of the training loop."""

    section = "clicks"

    interactions: int = ruled(4, at_least(1))
    """Decodes per sample, each after one more prompt."""
    policy: Literal["uniform", "centre", "ritm", "mixed"] = "uniform"
    """Where a click falls in the mask's error (``clicks.py``); mixed: first uniform, then any of the three."""
    box_probability: float = ruled(0.3, SHARE)
    """Probability that a sample's first prompt is a jittered box instead of a click; 0 never gives a box."""
    mask_only_probability: float = ruled(0.1, SHARE)
    """Probability that a later decode gets the previous mask and no new click; 0 always clicks."""
    mask_only_turns: list[str] = ruled([], ("may hold last and random", lambda v: set(v) <= {"last", "random"}))
    """Turns with the previous mask and no click: ``last``, and ``random``, one of the later turns drawn per batch
    (SAM-Med3D has both); empty has none."""
    window_probability: float = ruled(0.0, SHARE)
    """Probability of hiding the previous mask outside a random window, in a turn without a click; 0 never hides it."""
    detach: bool = True
    """Whether the previous mask is detached from the gradient; false keeps one graph over all decodes."""
    memory: Literal["all", "newest", "spec"] = "spec"
    """Clicks given at each decode: all, the newest only, or what the model's spec says."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimiser and its schedule."""

    section = "optim"

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """AdamW, SGD with Nesterov's momentum, or Muon (for matrices and kernels; AdamW for the rest)."""
    lr: float = ruled(1e-3, ABOVE_0)
    """Peak learning rate."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate of parameters by the beginning of their names, e.g. ``{mask_decoder: 0.1}``."""
    weight_decay: float = ruled(0.05, at_least(0))
    """Weight decay, decoupled from the gradient with adamw, part of it with sgd; 0 switches it off."""
    decay_all: bool = False
    """Whether norms, biases, positions and tokens decay too (SAM-Med3D)."""
    betas: tuple[float, float] = ruled(
        (0.9, 0.999), ("must each be from 0 to below 1", lambda v: all(0 <= b < 1 for b in v))
    )
    """For adamw and muon: decay of the first and second moment, each in [0, 1)."""
    momentum: float = ruled(0.9, ("must be from 0 (none) to below 1", lambda v: 0 <= v < 1))
    """For sgd and muon: momentum, 0 (none) to below 1."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0; 0 starts at the peak."""
    schedule: Literal["cosine", "cosine_minutes", "constant", "multistep", "power"] = "cosine"
    """Learning rate after the warm-up. cosine: half a cosine to 0 at the last step; cosine_minutes: to 0 when
    ``max_minutes`` are over (not repeatable to the last digit, and ``--resume`` starts it again); multistep: times
    ``gamma`` at each of ``milestones``; power: the remaining share of the steps to the power ``exponent``."""
    exponent: float = ruled(0.9, ABOVE_0)
    """For power: 1 is a straight line to 0, more falls early, less falls late; above 0."""
    schedule_length: float = ruled(1.0, at_least(1, "ends with the run"))
    """Length of the schedule in runs: 1 ends with the run, 2 is half-way when the run ends; not for constant."""
    milestones: list[float] = ruled([0.6, 0.9], RISING)
    """For multistep: rising shares of a cycle, each from 0 to 1."""
    gamma: float = ruled(0.1, ("must be above 0 and at most 1", lambda v: 0 < v <= 1))
    """For multistep: factor on the learning rate at each milestone."""
    cycles: int = ruled(1, at_least(1))
    """How often the schedule runs within the run."""
    grad_clip: float = ruled(1.0, at_least(0, "off"))
    """Greatest gradient norm; 0 does not clip."""
    accumulate: int = ruled(1, at_least(1))
    """Batches per optimiser step."""
    batch: int = ruled(2, at_least(1))
    """Samples per batch and process."""
    steps: int = ruled(100, at_least(1))
    """Optimiser steps of the run; not used with ``epochs``."""
    epochs: float = ruled(0.0, at_least(0, "count optim.steps"))
    """Length of the run in passes, each with a sample per training structure of the corpus; 0 counts ``steps``."""
    max_minutes: float = ruled(0.0, at_least(0, "no limit"))
    """Wall-clock limit in minutes, after which the run saves and ends; 0 sets no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, factor in self.lr_scale.items():
            good = isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0
            check(good, f"optim.lr_scale.{part}", "must be a number above 0", factor)
        if self.schedule == "cosine_minutes":
            rule = "must be above 0 with optim.schedule=cosine_minutes"
            check(self.max_minutes > 0, "optim.max_minutes", rule, self.max_minutes)
        check(self.warmup_steps >= 0, "optim.warmup_steps", "must be 0 or more", self.warmup_steps)


@dataclass(frozen=True)
class RunConfig(Section):
    """Where a run writes and how it repeats."""

    section = "run"

    folder: str = ruled("runs/tiny", ("must name a folder", lambda v: bool(v.strip())))
    """Folder for checkpoints, ``config.json`` and ``metrics.jsonl``."""
    seed: int = ruled(0, at_least(0))
    """Seed of weights, samples and clicks; the same seed gives the same run on a CPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto takes a GPU (CUDA's, then Apple's) where there is one; cuda and mps refuse to run without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward; auto: bf16 on a GPU that has it and a CPU with AMX, else fp32; fp16 needs a GPU."""
    compile: bool = False
    """Whether torch.compile compiles the image encoder: slower to start, faster afterwards on a GPU."""
    activation_checkpointing: bool = False
    """Whether transformer blocks recompute their activations in the backward pass: less memory, a third more time."""
    log_every: int = ruled(10, at_least(1))
    """Optimiser steps between two lines of ``metrics.jsonl``."""
    save_every: int = ruled(100, at_least(0, "at the end only"))
    """Optimiser steps between two checkpoints; 0 saves at the end only."""
    keep: int = ruled(2, at_least(0, "last.pt alone"))
    """Earlier checkpoints that are kept as ``step_NNNNNN.pt`` beside ``last.pt``; 0 keeps ``last.pt`` alone."""
    ema: float = ruled(0.0, ("must be from 0 (off) to below 1", lambda v: 0 <= v < 1))
    """Decay of the exponential moving average (EMA) of the weights, 0 to below 1; 0 keeps none."""
    trackers: list[str] = ruled([], ("may hold wandb and tensorboard", lambda v: set(v) <= {"wandb", "tensorboard"}))
    """Further logs, of ``wandb`` and ``tensorboard``; empty writes ``metrics.jsonl`` only."""


@dataclass(frozen=True)
class ValidationConfig(Section):
    """Simulated clicks on whole volumes of held-out subjects during the run."""

    section = "validation"

    every: int = ruled(0, at_least(0, "off"))
    """Optimiser steps between two validations; 0 switches them off."""
    cases: int = ruled(8, at_least(1))
    """Images, drawn once per run, spread over the sources."""
    structures: int = ruled(2, at_least(1))
    """Structures per image."""
    clicks: int = ruled(5, at_least(1))
    """Clicks per structure; the best checkpoint is the one with the highest Dice after the last."""
    seed: int = ruled(0, at_least(0))
    """Seed of the cases and of their first clicks."""
    hold_out: bool = False
    """Whether the sources of ``data.hold_out`` are measured too, beside validation subjects of the trained sources."""
    images: bool = True
    """Whether pictures of some cases with clicks and masks are written into the run folder."""


@dataclass(frozen=True)
class LossConfig(Section):
    """Weights of the loss's terms; 0 switches a term off."""

    section = "loss"

    dice: float = 1.0
    """Soft Dice on the mask."""
    ce: float = 1.0
    """Binary cross-entropy on the mask logits."""
    iou: float = 0.1
    """Squared error of the predicted IoU."""
    dice_smooth: float = ruled(1.0, ABOVE_0)
    """Number of voxels added to numerator and denominator of Dice; above 0."""
    dice_form: Literal["auto", "squared", "plain"] = "auto"
    """Whether the denominator of Dice has squares; auto: for promptable models (SAM-Med3D), not for semantic ones
    (nnU-Net)."""
    dice_background: bool = False
    """For semantic segmentation: whether the background counts as one of the classes of Dice."""
    dice_batch: bool = False
    """For semantic segmentation: whether Dice is computed over a process's whole batch as one volume, or by crop."""
    turns: Literal["mean", "sum"] = "mean"
    """Whether the losses of a sample's turns are averaged or added up (SAM-Med3D)."""
    distill: float = ruled(0.0, at_least(0, "off"))
    """Squared distance of the encoder's features to those of ``teacher``; 0 switches distillation off."""
    teacher: str = ""
    """Checkpoint (name or file) of the frozen model to learn from; needed for ``distill``."""
    distill_layers: list[tuple[int, int]] = field(default_factory=list)
    """Pairs [block of the model, block of the teacher] to compare, from 0, or -1 for the output; empty: [-1, -1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dice, ce, iou = self.dice, self.ce, self.iou
        check(min(dice, ce, iou) >= 0, "loss.dice, loss.ce, loss.iou", "must be 0 or more", (dice, ce, iou))
        check(dice + ce > 0, "loss.dice, loss.ce", "must not both be 0", (dice, ce))
        if self.distill and not self.teacher:
            raise InputError(f"loss.teacher must name a checkpoint when loss.distill is above 0, got {self.teacher!r}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``samed3d train`` reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clicks: ClickConfig = field(default_factory=ClickConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

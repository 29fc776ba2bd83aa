"""The sections of a training config: every key with its meaning, its unit and the value that switches it off.

Nothing here knows a model or a tensor. How a file becomes these dataclasses is in ``config/reading.py``; read
``training/loop.py`` next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from samed3d.errors import InputError


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
    """Which parameters learn: all, everything but the image encoder, or only adapters put on a frozen image encoder and
    the decoder."""
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
    """Least and greatest extent of the object as a share of the crop's edge; not used with ``spacing_mm``."""
    spacing_mm: float = 0.0
    """Fixed isotropic spacing of the crops in mm, for models that have one; 0 lets the crop follow the object's
    size."""
    placement: Literal["jittered", "centred"] = "jittered"
    """Where the object lies in the crop: anywhere, or with the middle of its box in the crop's middle (SAM-Med3D)."""
    augment: Literal["full", "flips"] = "full"
    """Mirroring, axis order, contrast, bias, resolution and noise; or mirroring alone."""
    blur_probability: float = 0.0
    """Chance of a Gaussian blur of a real crop with ``augment: full``; 0 never blurs."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""
    split_seed: int = 0
    """Seed of the split by subject into training and validation."""
    validation_share: float = 0.1
    """Share of subjects that are never trained on, 0 to below 1; 0 trains on all."""
    hold_out: list[str] = field(default_factory=list)
    """Sources of the corpus that are never trained on; empty holds none out."""

    def __post_init__(self) -> None:
        check(0 <= self.synthetic_share <= 1, "data.synthetic_share", "must be from 0 to 1", self.synthetic_share)
        check(min(self.crop) >= 8, "data.crop", "must be at least 8 voxels on each axis", self.crop)
        check(0 < self.fill[0] <= self.fill[1], "data.fill", "must be two rising numbers above 0", self.fill)
        check(self.spacing_mm >= 0, "data.spacing_mm", "must be 0 (the object's scale) or more", self.spacing_mm)
        check(0 <= self.blur_probability <= 1, "data.blur_probability", "must be from 0 to 1", self.blur_probability)
        if self.blur_probability and self.augment != "full":
            raise InputError(
                f"data.blur_probability must be 0 with data.augment={self.augment}, got {self.blur_probability:g}"
            )
        check(self.workers >= 0, "data.workers", "must be 0 or more", self.workers)
        check(
            0 <= self.validation_share < 1, "data.validation_share", "must be from 0 to below 1", self.validation_share
        )
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
    policy: Literal["uniform", "centre", "ritm", "mixed"] = "uniform"
    """Where the next click falls in the error of the current mask (rules in ``clicks.py``); mixed is uniform for the
    first click and any of the three for each later one."""
    box_probability: float = 0.3
    """Chance that a sample's first prompt is a jittered box instead of a click; 0 never gives a box."""
    mask_only_probability: float = 0.1
    """Chance that a later decode gets the previous mask and no new click; 0 always clicks."""
    mask_only_turns: list[str] = field(default_factory=list)
    """Turns that bring the previous mask and no click: ``last``, and ``random``, one of the later turns drawn per batch
    (in SAM-Med3D both, its random one among turns 3 to 9 of 11); empty has none."""
    window_probability: float = 0.0
    """Chance that a decode without a new click knows the previous mask in a window of the crop only, as after zooming
    out; 0 never."""
    detach: bool = True
    """Whether the previous mask is cut from the gradient before it is fed back; false keeps one graph over all
    decodes."""
    memory: Literal["all", "newest", "spec"] = "spec"
    """Clicks given at each decode: all, the newest only, or what the model's spec says."""

    def __post_init__(self) -> None:
        check(self.interactions >= 1, "clicks.interactions", "must be 1 or more", self.interactions)
        check(0 <= self.box_probability <= 1, "clicks.box_probability", "must be from 0 to 1", self.box_probability)
        check(
            0 <= self.mask_only_probability <= 1,
            "clicks.mask_only_probability",
            "must be from 0 to 1",
            self.mask_only_probability,
        )
        check(
            0 <= self.window_probability <= 1,
            "clicks.window_probability",
            "must be from 0 to 1",
            self.window_probability,
        )
        check(
            set(self.mask_only_turns) <= {"last", "random"},
            "clicks.mask_only_turns",
            "may hold last and random",
            self.mask_only_turns,
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """AdamW, stochastic gradient descent with Nesterov's momentum, or Muon (matrices and kernels; AdamW for the
    rest)."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on the rate of the parameters whose names begin so, e.g. ``{mask_decoder: 0.1}``; empty gives all the same
    rate."""
    weight_decay: float = 0.05
    """Weight decay, decoupled from the gradient with adamw, part of it with sgd; 0 switches it off."""
    decay_all: bool = False
    """Whether norms, biases, positions and tokens decay too (SAM-Med3D)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """For adamw and muon: decay of the first and second moment, each in [0, 1)."""
    momentum: float = 0.9
    """For sgd and muon: share of the last step that is taken again, 0 (none) to below 1."""
    warmup_steps: int = 0
    """Optimiser steps over which the rate rises from 0; 0 starts at the peak."""
    schedule: Literal["cosine", "cosine_minutes", "constant", "multistep", "power"] = "cosine"
    """Course of the rate after the warm-up: half a cosine to 0 at the last step, or when ``max_minutes`` are over
    (whatever the machine does in them; it starts again with ``--resume`` and is not repeatable to the last digit),
    flat, times ``gamma`` at each of
    ``milestones``, or as the share of steps that are left to the power of ``exponent``."""
    exponent: float = 0.9
    """For power: 1 is a straight line to 0, more falls early, less falls late; above 0."""
    schedule_length: float = 1.0
    """Length of the schedule in runs: 1 ends with the run, 2 is half way through when the run ends; not for
    constant."""
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.9])
    """For multistep: rising shares of a cycle, each from 0 to 1."""
    gamma: float = 0.1
    """For multistep: factor on the rate at each milestone."""
    cycles: int = 1
    """How often the schedule starts again within the run; 1 runs through it once."""
    grad_clip: float = 1.0
    """Greatest gradient norm; 0 does not clip."""
    accumulate: int = 1
    """Batches per optimiser step."""
    batch: int = 2
    """Samples per batch and process."""
    steps: int = 100
    """Optimiser steps of the run; not used with ``epochs``."""
    epochs: float = 0.0
    """Length of the run in passes over the corpus, a pass being as many samples as the corpus has structures to train
    on; 0 counts
    ``steps``."""
    max_minutes: float = 0.0
    """Wall-clock limit in minutes, after which the run saves and ends; 0 sets no limit."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", "must be above 0", self.lr)
        check(self.weight_decay >= 0, "optim.weight_decay", "must be 0 or more", self.weight_decay)
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", "must each be from 0 to below 1", self.betas)
        check(0 <= self.momentum < 1, "optim.momentum", "must be from 0 (none) to below 1", self.momentum)
        check(self.exponent > 0, "optim.exponent", "must be above 0", self.exponent)
        check(
            self.schedule_length >= 1,
            "optim.schedule_length",
            "must be 1 (ends with the run) or more",
            self.schedule_length,
        )
        check(self.grad_clip >= 0, "optim.grad_clip", "must be 0 (off) or more", self.grad_clip)
        check(self.accumulate >= 1, "optim.accumulate", "must be 1 or more", self.accumulate)
        check(self.batch >= 1, "optim.batch", "must be 1 or more", self.batch)
        check(self.steps >= 1, "optim.steps", "must be 1 or more", self.steps)
        check(self.epochs >= 0, "optim.epochs", "must be 0 (count optim.steps) or more", self.epochs)
        check(self.cycles >= 1, "optim.cycles", "must be 1 or more", self.cycles)
        check(0 < self.gamma <= 1, "optim.gamma", "must be above 0 and at most 1", self.gamma)
        rising = all(0 < a < b <= 1 for a, b in zip([1e-9, *self.milestones], self.milestones, strict=False))
        check(rising, "optim.milestones", "must be rising shares of a cycle, above 0 and at most 1", self.milestones)
        for part, factor in self.lr_scale.items():
            good = isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0
            check(good, f"optim.lr_scale.{part}", "must be a number above 0", factor)
        check(self.max_minutes >= 0, "optim.max_minutes", "must be 0 (no limit) or more", self.max_minutes)
        if self.schedule == "cosine_minutes":
            check(
                self.max_minutes > 0,
                "optim.max_minutes",
                "must be above 0 with optim.schedule=cosine_minutes",
                self.max_minutes,
            )
        if self.warmup_steps < 0 or (self.warmup_steps > self.steps and not self.epochs):
            raise InputError(
                f"optim.warmup_steps must be from 0 to optim.steps ({self.steps}), got {self.warmup_steps}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes and how it repeats."""

    folder: str = "runs/tiny"
    """Folder for checkpoints, ``config.json`` and ``metrics.jsonl``."""
    seed: int = 0
    """Seed of weights, samples and clicks; the same seed gives the same run on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU where there is one, cuda refuses to run without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward; auto takes bf16 on a GPU that has it and on a CPU with AMX, else fp32. fp16 needs a
    GPU."""
    compile: bool = False
    """Whether the image encoder goes through torch.compile: slow to start, faster afterwards on a GPU."""
    activation_checkpointing: bool = False
    """Whether transformer blocks forget their activations and compute them again in the backward: less memory, a third
    more time."""
    log_every: int = 10
    """Optimiser steps between two lines of ``metrics.jsonl``."""
    save_every: int = 100
    """Optimiser steps between two checkpoints; 0 saves at the end only."""
    keep: int = 2
    """How many of the last checkpoints stay as ``step_NNNNNN.pt`` beside ``last.pt``; 0 keeps ``last.pt`` alone."""
    ema: float = 0.0
    """Decay of the running mean of the weights, 0 to below 1; 0 keeps none."""
    trackers: list[str] = field(default_factory=list)
    """Further logs, of ``wandb`` and ``tensorboard``; empty writes ``metrics.jsonl`` only."""

    def __post_init__(self) -> None:
        check(bool(self.folder.strip()), "run.folder", "must name a folder", self.folder)
        check(self.seed >= 0, "run.seed", "must be 0 or more", self.seed)
        check(self.log_every >= 1, "run.log_every", "must be 1 or more", self.log_every)
        check(self.save_every >= 0, "run.save_every", "must be 0 (at the end only) or more", self.save_every)
        check(self.keep >= 0, "run.keep", "must be 0 (last.pt alone) or more", self.keep)
        check(0 <= self.ema < 1, "run.ema", "must be from 0 (off) to below 1", self.ema)
        check(
            set(self.trackers) <= {"wandb", "tensorboard"},
            "run.trackers",
            "may hold wandb and tensorboard",
            self.trackers,
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Simulated clicks on whole volumes of held-back subjects, while the run goes on."""

    every: int = 0
    """Optimiser steps between two validations; 0 switches them off."""
    cases: int = 8
    """Images, drawn once per run, spread over the sources."""
    structures: int = 2
    """Structures per image."""
    clicks: int = 5
    """Clicks per structure; the best checkpoint is the one with the highest Dice after the last."""
    seed: int = 0
    """Seed of the cases and of their first clicks."""
    hold_out: bool = False
    """Whether the sources of ``data.hold_out`` are measured too; false measures held-back subjects of the trained
    sources alone."""
    images: bool = True
    """Whether pictures of some cases with clicks and masks are written into the run folder."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "validation.every", "must be 0 (off) or more", self.every)
        check(self.cases >= 1, "validation.cases", "must be 1 or more", self.cases)
        check(self.structures >= 1, "validation.structures", "must be 1 or more", self.structures)
        check(self.clicks >= 1, "validation.clicks", "must be 1 or more", self.clicks)
        check(self.seed >= 0, "validation.seed", "must be 0 or more", self.seed)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms; 0 switches a term off."""

    dice: float = 1.0
    """Soft Dice on the mask."""
    ce: float = 1.0
    """Binary cross-entropy on the mask logits."""
    iou: float = 0.1
    """Squared error of the predicted overlap."""
    dice_smooth: float = 1.0
    """What is added to both sides of the Dice fraction, in voxels; above 0."""
    dice_form: Literal["auto", "squared", "plain"] = "auto"
    """Whether probabilities are squared below the fraction of Dice; auto squares them for promptable models (SAM-Med3D)
    and not for automatic ones (nnU-Net)."""
    dice_background: bool = False
    """For automatic models: whether the background counts as one of the classes of Dice."""
    dice_batch: bool = False
    """For automatic models: whether Dice is taken over a process's whole batch as over one volume, or crop by crop."""
    turns: Literal["mean", "sum"] = "mean"
    """Whether the losses of a sample's turns are averaged or added up (SAM-Med3D)."""
    distill: float = 0.0
    """Squared distance of the encoder's features to those of ``teacher``."""
    teacher: str = ""
    """Checkpoint (name or file) of the frozen model to learn from; needed for ``distill``."""
    distill_layers: list[tuple[int, int]] = field(default_factory=list)
    """Pairs [block of the model, block of the teacher] to compare, from 0, -1 being the encoder's output; empty
    compares the outputs."""

    def __post_init__(self) -> None:
        check(
            min(self.dice, self.ce, self.iou) >= 0,
            "loss.dice, loss.ce, loss.iou",
            "must be 0 or more",
            (self.dice, self.ce, self.iou),
        )
        check(self.dice + self.ce > 0, "loss.dice, loss.ce", "must not both be 0", (self.dice, self.ce))
        check(self.dice_smooth > 0, "loss.dice_smooth", "must be above 0", self.dice_smooth)
        check(self.distill >= 0, "loss.distill", "must be 0 (off) or more", self.distill)
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


def check(holds: bool, key: str, rule: str, value: Any) -> None:
    """Refuse a value that breaks a rule.

    Raises:
        InputError: that names the key, the rule and the value.
    """
    if not holds:
        raise InputError(f"{key} {rule}, got {value!r}")

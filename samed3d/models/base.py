"""The contracts that models keep: promptable ones encode once and decode per prompt, semantic ones give all classes at
once.

A model sees one crop, already resampled and normalised as its ``ModelSpec`` says; it never sees a file, a spacing or a
user. Builders are listed in ``models/__init__.py``; weights are read and written by ``models/weights.py``. Read
``models/sam_med3d.py`` next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from samed3d.geometry import IntTriple
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.prompts import MASK_LOGIT_THRESHOLD


@dataclass(frozen=True)
class ModelSpec:
    """What a caller must know to use a model rightly.

    Attributes:
        name: Registry name.
        input_shape_zyx: Crop shape that the weights were trained on, in voxels.
        spacing_mm: Isotropic crop spacing in mm, or None for a model of relative scale (any spacing; the crop follows
            the object).
        normalisation: A method of ``crops.normalise``; it sets how many channels the image has. ``"zscore_volume"`` for
            a
            ``SemanticModel``, whose crops are scaled by their whole volume (``data.semantic.Intensities``).
        ct_clamp_hu: Clamp for CT before normalising, or None.
        tensor_axes: ``"zyx"``, or ``"xyz"`` for weights trained on x-first tensors (SAM-Med3D through torchio).
        prompts: What the model understands, of ``"point" "box" "mask"``.
        click_memory: ``"all"`` clicks are given at each decode, or only the ``"newest"`` plus the previous
            low-resolution logits.
        first_mask: What stands for "no mask yet": ``"none"`` (a trained no-mask state) or ``"zeros"`` (zero logits,
            SAM-Med3D).
        click_logit_threshold: Logit above which training's simulated user called a voxel foreground (0.5 in SAM-Med3D's
            code).
        bf16: Whether inference runs in bf16 where the processor computes in it; for weights that were trained so.
        source: Paper or repository that defines the architecture.
        classes: Output channels of a ``SemanticModel``, background first; 0 for a promptable model.
        in_channels: Image channels of a ``SemanticModel`` whose volumes have several (MR sequences); a promptable
            model's number of channels follows from ``normalisation``.
    """

    name: str
    input_shape_zyx: IntTriple
    spacing_mm: float | None = None
    normalisation: str = "zscore"
    ct_clamp_hu: tuple[float, float] | None = None
    tensor_axes: str = "zyx"
    prompts: frozenset[str] = frozenset({"point", "box", "mask"})
    click_memory: str = "all"
    first_mask: str = "none"
    click_logit_threshold: float = MASK_LOGIT_THRESHOLD
    bf16: bool = False
    source: str = ""
    classes: int = 0
    in_channels: int = 1


@dataclass
class MaskOutput:
    """What a decode returns.

    Attributes:
        logits: (B, M, D, H, W) unbounded, at the crop's resolution.
        iou: (B, M) predicted overlap with the true mask, in [0, 1] where the head is trained.
        lowres_logits: (B, 1, d, h, w) what ``PromptBatch.mask_logits`` takes back for the next prompt.
    """

    logits: Tensor
    iou: Tensor
    lowres_logits: Tensor


@dataclass(frozen=True)
class Adaptation:
    """What an adapted model says of itself, and its weights file of it: the file holds only what was trained, beside a
    base.

    Attributes:
        kind: ``"lora"`` or ``"fact"``.
        rank: Of every adapter.
        base: Name or file of the weights that it was put on.
        base_sha256: Of their tensors (``weights.tensors_sha256``); another base is refused.
    """

    kind: str
    rank: int
    base: str
    base_sha256: str


Features = dict[str, Tensor]
"""What ``encode`` returns: named tensors, batch first, to be kept by the caller and given to ``decode`` any number of
times."""


class PromptableModel(nn.Module, ABC):
    """Base of all promptable models. ``config`` holds the keyword arguments that rebuild it.

    ``encoder_parts`` names the submodules, dotted, that hold every parameter that ``encode`` uses: what "frozen image
    encoder" means, and where adapters go; ``prompt_parts`` those that read prompts. ``adaptation`` is set while
    adapters are on.
    """

    spec: ModelSpec
    config: dict[str, Any]
    encoder_parts: tuple[str, ...] = ("image_encoder",)
    prompt_parts: tuple[str, ...] = ("prompt_encoder",)
    adaptation: Adaptation | None = None

    @abstractmethod
    def encode(self, image: Tensor) -> Features:
        """Features of a (B, C, D, H, W) crop, normalised as the spec says. Independent of any prompt."""

    @abstractmethod
    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """The mask for these prompts on features from ``encode``."""

    def forward(self, image: Tensor, prompts: PromptBatch) -> MaskOutput:
        """``decode(encode(image), prompts)``."""
        return self.decode(self.encode(image), prompts)


class SemanticModel(nn.Module, ABC):
    """Base of all automatic models: every class of a crop at once, no prompt. ``config`` holds the keyword arguments
    that rebuild it.
    """

    spec: ModelSpec
    config: dict[str, Any]

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of a (B, C, D, H, W) crop, normalised as the spec says; channel 0 is background."""

    def forward_supervised(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """What training compares with the truth: (weight, logits) per output, the finest first; coarser ones only with
        deep supervision.
        """
        return [(1.0, self(image))]


AnyModel = PromptableModel | SemanticModel


@dataclass(frozen=True)
class ModelEntry:
    """A line of the registry: the builder, and the overrides that make a tiny instance for tests."""

    build: Any
    tiny: dict[str, Any] = field(default_factory=dict)

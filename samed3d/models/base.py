"""The contract of all models: ``PromptableModel`` and ``SemanticModel``, what they take, and what they answer.

A model sees one crop, already resampled and normalised as its ``ModelSpec`` says. A promptable model works in two
steps, ``features = encode(image)`` once per crop and ``decode(features, prompts)`` once per prompt; a semantic model
segments all classes at once, without prompts. Models read no files: ``models/weights.py`` does, ``models/__init__.py``
lists them by name, and ``inference/predictor.py`` makes their crops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from samed3d.crops import image_channels
from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.prompts import MASK_LOGIT_THRESHOLD


@dataclass(frozen=True)
class ModelSpec:
    """What a caller must know of a model.

    Attributes:
        name: Registry name.
        input_shape_zyx: Crop shape that the weights were trained on, in voxels.
        spacing_mm: Isotropic crop spacing in mm, or None for any spacing: the crop follows the object's size.
        normalisation: A method of ``crops.normalise``; it sets how many channels the image has. ``"zscore_volume"`` for
            a ``SemanticModel``, whose crops are scaled by their whole volume (``data.semantic.Intensities``).
        ct_clamp_hu: Limits to which CT is cut before normalising, in HU, or None.
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

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """(C, D, H, W) of a crop."""
        channels = self.in_channels if self.classes else image_channels(self.normalisation)
        return (channels, *self.input_shape_zyx)

    def check_image(self, image: Tensor) -> None:
        """Refuse a batch of crops of another shape than (B, *image_shape) with an ``InputError`` that names it."""
        if tuple(image.shape[1:]) != self.image_shape:
            shape = ", ".join(str(n) for n in self.image_shape)
            raise InputError(f"image must be (B, {shape}) for {self.name}, got {tuple(image.shape)}; resample the crop")

    def check_prompts(self, prompts: PromptBatch) -> None:
        """Refuse boxes, with an ``InputError``, where the model does not understand them."""
        if prompts.boxes is not None and "box" not in self.prompts:
            known = " or ".join(f"{kind}s" for kind in ("point", "mask") if kind in self.prompts)
            raise InputError(f"prompts must be {known} for {self.name}, got a box; use a samed3d_* model for boxes")


@dataclass
class MaskOutput:
    """What ``decode`` returns.

    Attributes:
        logits: (B, M, D, H, W) unbounded, at the crop's resolution.
        iou: (B, M) predicted IoU of the mask, in [0, 1] where the head is trained.
        lowres_logits: (B, 1, d, h, w) what ``PromptBatch.mask_logits`` takes back for the next prompt.
    """

    logits: Tensor
    iou: Tensor
    lowres_logits: Tensor


@dataclass(frozen=True)
class Adaptation:
    """Which adapters a model has, and on which weights; a weights file of it holds only what was trained beside those.

    Attributes:
        kind, rank: ``"lora"`` or ``"fact"``, and the rank of every adapter.
        base: Name or file of the weights that the adapters were put on.
        base_sha256: Hash of their tensors (``weights.tensors_sha256``); another base is refused.
    """

    kind: str
    rank: int
    base: str
    base_sha256: str


Features = dict[str, Tensor]
"""What ``encode`` returns: named tensors, batch first, which callers keep for any number of ``decode`` calls."""


class PromptableModel(nn.Module, ABC):
    """Base of all promptable models.

    Attributes:
        spec: What a caller must know.
        config: Keyword arguments that rebuild the model.
        encoder_parts: Submodules, dotted, with every parameter that ``encode`` uses: what "frozen image encoder" means,
            and where adapters go.
        prompt_parts: Submodules that read prompts.
        adaptation: Set while adapters are on.
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
    """Base of all semantic segmentation models: every class of a crop at once, no prompt. Attributes as above."""

    spec: ModelSpec
    config: dict[str, Any]

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of a (B, C, D, H, W) crop, normalised as the spec says; channel 0 is background."""

    def forward_supervised(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """(weight, logits) of each output that training compares with the truth, the finest first."""
        return [(1.0, self(image))]


AnyModel = PromptableModel | SemanticModel


@dataclass(frozen=True)
class ArchitectureConfig:
    """Base of the numbers and switches of an architecture. Lists, as JSON and YAML have them, become tuples."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _as_tuples(getattr(self, entry.name)))


@dataclass(frozen=True)
class ModelEntry:
    """A line of the registry: the builder, and the overrides that make a tiny instance for tests."""

    build: Callable[..., AnyModel]
    tiny: dict[str, Any] = field(default_factory=dict)


def family(network: Callable[..., AnyModel], configs: dict[str, Any], tiny: dict[str, Any]) -> dict[str, ModelEntry]:
    """Registry entries of one network in several sizes: a config by registry name; overrides for a tiny instance."""

    def builder(name: str) -> Callable[..., AnyModel]:
        return lambda **overrides: network(name, replace(configs[name], **overrides))

    return {name: ModelEntry(builder(name), tiny) for name in configs}


def own_overlap(logits: Tensor) -> Tensor:
    """(B, 1) IoU of a probability map with its own mask, for models without an IoU head: near 1 where they are sure."""
    prob = logits.float().sigmoid().flatten(1)
    mask = (prob > 0.5).to(prob.dtype)
    return ((prob * mask).sum(1) / prob.maximum(mask).sum(1).clamp(min=1e-6))[:, None]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value

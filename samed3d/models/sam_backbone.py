"""SAM's 2D image encoders in 3D models: opened, frozen, never stored; and SAM's own checkpoints as our weights files.

SAM3D, MA-SAM and 3DSAM-adapter build on them. A checkpoint of such a model names the encoder's file and the hash of its
tensors; that file is a ``.pth`` as published or what ``import_sam`` made of it. The encoders are in ``nn/vit2d.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samed3d.errors import InputError, check_choice
from samed3d.geometry import IntTriple
from samed3d.models.base import ArchitectureConfig, ModelSpec
from samed3d.models.weights import (
    check_state,
    header_of,
    import_upstream,
    load_state_strict,
    read_state,
    tensors_sha256,
    write_tensors,
)
from samed3d.nn.vit2d import SAM_SIZES, SamEncoder2d, TimmEncoder2d, build_encoder, encoder_state

SOURCE = "Segment Anything (Kirillov et al., ICCV 2023, arXiv:2304.02643), weights under Apache-2.0"
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackboneConfig(ArchitectureConfig):
    """What the configs of all models on a frozen 2D encoder hold.

    Attributes:
        class_names: What is segmented, background not listed.
        input_shape: Crop (D, H, W) in voxels.
        backbone: 2D encoder: ``sam_vit_b|l|h``, or ``timm:NAME`` where the model takes any.
        backbone_weights: Its file, or ``""`` for random weights.
        backbone_sha256: Hash of its tensors; filled in when the model is built.
    """

    class_names: tuple[str, ...] = ("object",)
    input_shape: IntTriple = (128, 128, 128)
    backbone: str = "sam_vit_b"
    backbone_weights: str = ""
    backbone_sha256: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_names:
            raise InputError("class_names must name at least one class, got none")

    def semantic_spec(self, name: str, source: str, **more: Any) -> ModelSpec:
        """The spec of a semantic segmentation model of these classes."""
        more |= {"normalisation": "zscore_volume", "prompts": frozenset(), "classes": len(self.class_names) + 1}
        return ModelSpec(name, self.input_shape, source=source, **more)


class FrozenParts(nn.Module):
    """A module whose frozen parameters stay out of ``state_dict`` and keep their values in ``load_state_dict``.

    They are parameters like others: ``.to()`` moves them, a count of all parameters includes them.
    """

    numbers: Any
    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.frozen_names: frozenset[str] = frozenset()

    def freeze(self, names: Iterable[str]) -> None:
        """Stop training these parameters (names as in ``named_parameters``), for good."""
        self.frozen_names = frozenset(names)
        for name in self.frozen_names:
            self.get_parameter(name).requires_grad_(False)

    def open_backbone(self, config: BackboneConfig, any_encoder: bool = False) -> tuple[Any, dict[str, Tensor]]:
        """Build and check the encoder; set ``numbers`` and ``config``, with the encoder's hash in them.

        Returns:
            The encoder, and the whole state dict of its file (see ``open_encoder``).

        Raises:
            InputError: as ``open_encoder``, or without ``any_encoder`` if it is not SAM's.
        """
        encoder, sha256, state = open_encoder(config.backbone, config.backbone_weights, config.backbone_sha256)
        if not (any_encoder or isinstance(encoder, SamEncoder2d)):
            known = "sam_vit_b, sam_vit_l, sam_vit_h"
            raise InputError(f"backbone must be one of SAM's encoders ({known}), got {config.backbone!r}")
        self.numbers = replace(config, backbone_sha256=sha256)
        self.config = asdict(self.numbers)
        return encoder, state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.state_dict``, without the frozen parameters."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in self.frozen_names:
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Runs before the children are loaded: they find the frozen tensors that they already hold.
        for name in self.frozen_names:
            state_dict.setdefault(prefix + name, self.get_parameter(name).detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def open_encoder(
    name: str, weights: str, sha256: str = ""
) -> tuple[SamEncoder2d | TimmEncoder2d, str, dict[str, Tensor]]:
    """A pretrained 2D encoder (see ``vit2d.build_encoder``), the hash of its tensors, and its file's whole state dict.

    Without a file the weights are random, which a warning says, and the state dict is empty; on the meta device so is
    the hash. A ``sha256`` is what the hash must be.

    Raises:
        InputError: if the file does not hold that encoder, or the hash differs.
    """
    encoder = build_encoder(name)
    if next(encoder.parameters()).is_meta:
        return encoder, "", {}
    state: dict[str, Tensor] = {}
    if weights:
        state = read_state(weights)
        try:
            load_state_strict(encoder, encoder_state(state, name))
        except InputError as error:
            raise InputError(f"{weights} does not hold the encoder {name}: {error}") from error
    else:
        logger.warning("the frozen encoder %s has random weights; name its file in backbone_weights", name)
    actual = tensors_sha256(encoder.state_dict())
    if sha256 and actual != sha256:
        rule = f"the file that this model was trained on (sha256 of its tensors {sha256[:16]}...)"
        found = f"{weights or 'random weights'} ({actual[:16]}...)"
        raise InputError(f"backbone_weights must be {rule}, got {found}; give the right file")
    return encoder, actual, state


def import_sam(source: Path, output: Path, name: str) -> int:
    """Convert ``sam_vit_{b,l,h}_*.pth`` to one ``.safetensors`` file with SAM's names, for ``backbone_weights``.

    Nothing in the checkpoint is executed; the output is no model that ``load`` builds.

    Returns:
        How many tensors were written.

    Raises:
        InputError: for a name that is not in ``SAM_SIZES``, or a file that does not hold that encoder whole.
    """
    check_choice("model", name, SAM_SIZES)
    state = import_upstream(source)
    found = encoder_state(state, name)
    with torch.device("meta"):
        own = build_encoder(name).state_dict()
    try:
        check_state(own, found)
    except InputError as error:
        raise InputError(f"{source} is no {name}: {error}; give --model another name") from error
    whole = {key: tensor for key, tensor in state.items() if key.startswith(PARTS)}
    kept = whole or {f"image_encoder.{key}": tensor for key, tensor in found.items()}
    spec = ModelSpec(name, (1, 1024, 1024), prompts=frozenset(), source=SOURCE)
    about = {"imported_from": source.name, "licence": "Apache-2.0"}
    write_tensors({key: tensor.contiguous() for key, tensor in kept.items()}, output, {**header_of(spec, {}), **about})
    return len(kept)

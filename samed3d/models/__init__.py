"""The registry: every architecture by name, one visible dict of builders.

``create_model`` builds with random weights, ``load`` also reads them. Each builder is one function in the file named
here, where every number of the architecture can be read. Read ``models/base.py`` for the contract.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from samed3d.crops import image_channels
from samed3d.errors import InputError
from samed3d.models.adapter_weights import put_on_base
from samed3d.models.base import AnyModel, ModelEntry, PromptableModel
from samed3d.models.fast_sam3d import fast_sam3d
from samed3d.models.ma_sam import ma_sam_b, ma_sam_h, ma_sam_l
from samed3d.models.sam3d import sam3d
from samed3d.models.sam3d_adapter import sam3d_adapter, sam3d_adapter_auto
from samed3d.models.sam_med3d import sam_med3d_b, sam_med3d_b256, sam_med3d_h, sam_med3d_l
from samed3d.models.sam_med3d_moe import MixtureOfExperts, coarsest_feature
from samed3d.models.samed3d_unet import samed3d_unet
from samed3d.models.samed3d_vit import samed3d_base, samed3d_small, samed3d_tiny
from samed3d.models.samu import samu, samu_extended
from samed3d.models.weights import (
    ADAPTER_KEY,
    find_checkpoint,
    list_checkpoints,
    load_state_strict,
    read_weights,
    spec_from_json,
    spec_to_json,
)

__all__ = ["MODELS", "create_model", "list_models", "load", "load_promptable"]

_TINY_UNET = {
    "input_shape": (32, 32, 32),
    "widths": (8, 8, 16, 16),
    "decoder_widths": (8, 8, 16, 16),
    "encoder_blocks": (1, 1, 1, 1),
    "joint_blocks": 1,
    "similarity_heads": (2, 2, 2),
}
_TINY_VIT = {
    "input_shape": (16, 16, 16),
    "patch": 8,
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "prompt_dim": 32,
    "stem_width": 4,
}
_TINY_SAM = {
    "input_shape": (16, 16, 16),
    "patch": 8,
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "global_blocks": (1,),
    "window": 3,
    "prompt_dim": 48,
    "decoder_mlp_dim": 32,
}
_TINY_STUDENT = {
    "input_shape": (16, 16, 16),
    "patch": 8,
    "dim": 24,
    "depth": 2,
    "plain_blocks": 1,
    "heads": 2,
    "prompt_dim": 48,
    "decoder_mlp_dim": 32,
}
_TINY_SAMU = {"input_shape": (16, 16, 16), "widths": (8, 8, 16, 16), "token_dim": 16}
_TINY_SAM3D = {
    "input_shape": (6, 32, 32),
    "class_names": ("a", "b"),
    "backbone": "sam_vit_tiny",
    "widths": (8, 8, 8, 8),
}
_TINY_MA_SAM = {
    "input_shape": (3, 32, 32),
    "class_names": ("a", "b"),
    "backbone": "sam_vit_tiny",
    "rank": 4,
    "adapter_width": 8,
}
_TINY_SAM3D_ADAPTER = {
    "input_shape": (16, 16, 16),
    "backbone": "sam_vit_tiny",
    "window": 2,
    "taps": (2, 4),
    "channels": 8,
}


def sam_med3d_moe(
    base: str = "sam_med3d_b",
    base_config: dict[str, Any] | None = None,
    experts: dict[str, list[str]] | None = None,
    threshold: float = 0.5,
    hidden: int = 64,
) -> MixtureOfExperts:
    """A mixture of decoders over any promptable model (see ``sam_med3d_moe.py``); ``training/moe.py`` fills it from
    checkpoints.

    Args:
        base: Architecture of the general model and of every expert.
        base_config: Its keyword arguments.
        experts: Name of each expert to the tensors that are its own; None gives two with all tensors outside the
            encoder.
        threshold: Least probability of an expert for it to be chosen.
        hidden: Hidden channels of the gate.
    """
    numbers = dict(base_config or {})
    general = create_model(base, **numbers)
    if not isinstance(general, PromptableModel):
        raise InputError(f"base must be a promptable model, got {base!r}")
    if experts is None:
        encoder = tuple(f"{part}." for part in general.encoder_parts)
        own = [name for name, _ in general.named_parameters() if not name.startswith(encoder)]
        experts = {"first": own, "second": own}
    with torch.device("meta"):
        twin = create_model(base, **numbers)
        assert isinstance(twin, PromptableModel)  # as the general one
        feature, channels = coarsest_feature(twin, image_channels(general.spec.normalisation))
    config = {"base": base, "base_config": numbers, "experts": experts, "threshold": threshold, "hidden": hidden}
    return MixtureOfExperts(general, feature, channels, experts, threshold, hidden, config)


MODELS: dict[str, ModelEntry] = {
    "samed3d_unet": ModelEntry(samed3d_unet, _TINY_UNET),
    "samed3d_tiny": ModelEntry(samed3d_tiny, _TINY_VIT),
    "samed3d_small": ModelEntry(samed3d_small, _TINY_VIT),
    "samed3d_base": ModelEntry(samed3d_base, _TINY_VIT),
    "sam_med3d_b": ModelEntry(sam_med3d_b, _TINY_SAM),
    "sam_med3d_b256": ModelEntry(sam_med3d_b256, _TINY_SAM),
    "sam_med3d_l": ModelEntry(sam_med3d_l, _TINY_SAM),
    "sam_med3d_h": ModelEntry(sam_med3d_h, _TINY_SAM),
    "fast_sam3d": ModelEntry(fast_sam3d, _TINY_STUDENT),
    "sam3d": ModelEntry(sam3d, _TINY_SAM3D),
    "sam3d_adapter": ModelEntry(sam3d_adapter, _TINY_SAM3D_ADAPTER),
    "sam3d_adapter_auto": ModelEntry(
        sam3d_adapter_auto, {**_TINY_SAM3D_ADAPTER, "upsample": 4, "class_names": ("a", "b")}
    ),
    "ma_sam_b": ModelEntry(ma_sam_b, _TINY_MA_SAM),
    "ma_sam_l": ModelEntry(ma_sam_l, _TINY_MA_SAM),
    "ma_sam_h": ModelEntry(ma_sam_h, _TINY_MA_SAM),
    "sam_med3d_moe": ModelEntry(sam_med3d_moe, {"base": "samed3d_unet", "base_config": _TINY_UNET}),
    "samu": ModelEntry(samu, _TINY_SAMU),
    "samu_extended": ModelEntry(samu_extended, _TINY_SAMU),
}


def list_models() -> list[str]:
    """Names that ``create_model`` knows, sorted."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> AnyModel:
    """Build a model with random weights.

    Args:
        name: One of ``list_models()``.
        **overrides: Keyword arguments of that builder (the numbers of the architecture).

    Raises:
        InputError: if the name is unknown (the message gives the nearest names) or the builder does not take the
            overrides.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; nearest: {_nearest(name, list_models())} (all: samed3d models)")
    try:
        return MODELS[name].build(**overrides)
    except TypeError as error:
        raise InputError(f"model {name!r} cannot be built with {overrides}: {error}") from error


def load(name_or_path: str | Path) -> AnyModel:
    """A model with its trained weights, in ``eval()`` mode on the CPU.

    Args:
        name_or_path: A shipped checkpoint (``"default"``) or a ``.safetensors`` file written by samed3d.

    Raises:
        InputError: if it is neither, or the file does not hold the architecture that its header names.
    """
    path = find_checkpoint(name_or_path)
    if path is None:
        name = str(name_or_path)
        if name in MODELS:
            raise InputError(
                f"model {name!r} has no weights here; create_model({name!r}) builds it with random weights"
            )
        near = _nearest(name, [*list_checkpoints(), *list_models()])
        raise InputError(f"no checkpoint or file is called {name!r}; nearest names: {near} (all: samed3d models)")
    state, header = read_weights(path)
    model = create_model(header["model"], **header["config"])
    if ADAPTER_KEY in header and isinstance(model, PromptableModel):
        state = put_on_base(model, state, header, path)
    try:
        load_state_strict(model, state)
    except InputError as error:
        raise InputError(f"{path} is not a {header['model']!r} checkpoint: {error}") from error
    model.spec = spec_from_json(
        {**spec_to_json(model.spec), **header["spec"]}
    )  # what an older file does not say, the builder says
    return model.eval()


def load_promptable(name_or_path: str | Path) -> PromptableModel:
    """As ``load``, for callers that prompt.

    Raises:
        InputError: as ``load``, and for an automatic model.
    """
    model = load(name_or_path)
    if not isinstance(model, PromptableModel):
        raise InputError(
            f"model must take prompts, got {str(name_or_path)!r}, a {model.spec.name!r}, which is automatic"
        )
    return model


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known)

"""The registry: ``create_model`` builds an architecture by name with random weights, ``load`` reads trained ones.

The numbers of an architecture are in the table at the end of its file, the contract of all models is in ``base.py``.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from samed3d.errors import InputError
from samed3d.models import ma_sam, sam3d, sam3d_adapter, sam_med3d, samed3d_unet, samed3d_vit, samu
from samed3d.models.base import AnyModel, ModelEntry, PromptableModel
from samed3d.models.sam_med3d_moe import MixtureOfExperts, coarsest_feature
from samed3d.models.weights import (
    ADAPTER_KEY,
    HUB,
    PRETRAINED,
    find_checkpoint,
    list_checkpoints,
    load_state_strict,
    put_on_base,
    read_weights,
    spec_from_json,
    spec_to_json,
)

__all__ = ["MODELS", "create_model", "from_pretrained", "list_models", "load", "load_promptable"]


def sam_med3d_moe(
    base: str = "sam_med3d_b",
    base_config: dict[str, Any] | None = None,
    experts: dict[str, list[str]] | None = None,
    threshold: float = 0.5,
    hidden: int = 64,
) -> MixtureOfExperts:
    """A mixture of decoders over any promptable model, which ``training/moe.py`` fills from checkpoints.

    Args:
        base: Architecture of the general model and of every expert.
        base_config: Its keyword arguments.
        experts: Names of each expert's own tensors; None gives two experts with all tensors outside the encoder.
        threshold: Least probability of an expert for it to be chosen.
        hidden: Hidden channels of the gate.

    Raises:
        InputError: if the base takes no prompts.
    """
    numbers = dict(base_config or {})
    general = create_model(base, **numbers)
    if not isinstance(general, PromptableModel):
        raise InputError(f"base must be a promptable model, got {base!r}; use one whose prompts are not empty")
    if experts is None:
        encoder = tuple(f"{part}." for part in general.encoder_parts)
        own = [name for name, _ in general.named_parameters() if not name.startswith(encoder)]
        experts = {"first": own, "second": own}
    with torch.device("meta"):
        twin = create_model(base, **numbers)
    assert isinstance(twin, PromptableModel)  # as the general one
    config = {"base": base, "base_config": numbers, "experts": experts, "threshold": threshold, "hidden": hidden}
    return MixtureOfExperts(general, *coarsest_feature(twin), experts, threshold, hidden, config)


MODELS: dict[str, ModelEntry] = {
    **samed3d_unet.MODELS,
    **samed3d_vit.MODELS,
    **sam_med3d.MODELS,
    **sam3d.MODELS,
    **sam3d_adapter.MODELS,
    **ma_sam.MODELS,
    **samu.MODELS,
    "sam_med3d_moe": ModelEntry(
        sam_med3d_moe, {"base": "samed3d_unet", "base_config": samed3d_unet.MODELS["samed3d_unet"].tiny}
    ),
}


def list_models() -> list[str]:
    """Names that ``create_model`` takes, sorted."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> AnyModel:
    """Build one of ``list_models()`` with random weights; ``overrides`` are numbers and switches of its config.

    Raises:
        InputError: if the name is unknown (the message gives the nearest names) or the architecture does not take the
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

    The name is that of a shipped checkpoint (``"default"``), a ``.safetensors`` file written by samed3d, or a model on
    Hugging Face (``"hf://OWNER/NAME"``, ``"hf://OWNER/NAME@REVISION"``).

    Raises:
        InputError: if it is none of them, or the file does not hold the architecture that its header names.
    """
    path, name = find_checkpoint(name_or_path), str(name_or_path)
    if path is None:
        if name in MODELS:
            remedy = f"create_model({name!r}) builds it with random weights"
            raise InputError(f"model {name!r} has no weights here; {remedy}")
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
    # Fields that an older file lacks are as the builder has them.
    model.spec = spec_from_json({**spec_to_json(model.spec), **header["spec"]})
    return model.eval()


def from_pretrained(name_or_folder: str | Path, revision: str | None = None) -> AnyModel:
    """As ``load``, for a folder of ``samed3d.save_pretrained`` or a model on Hugging Face by ``OWNER/NAME``.

    Raises:
        InputError: as ``load``.
    """
    if Path(name_or_folder).is_dir():
        return load(Path(name_or_folder) / PRETRAINED)
    return load(f"{HUB}{name_or_folder}{f'@{revision}' if revision else ''}")


def load_promptable(name_or_path: str | Path) -> PromptableModel:
    """As ``load``, for callers that prompt.

    Raises:
        InputError: as ``load``, and for a semantic segmentation model.
    """
    model = load(name_or_path)
    if not isinstance(model, PromptableModel):
        kind = f"a {model.spec.name!r}, which segments all classes without prompts"
        raise InputError(f"model must take prompts, got {str(name_or_path)!r}, {kind}; samed3d models lists the others")
    return model


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known)

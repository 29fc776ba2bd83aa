"""Weights files that hold only what was trained beside a base: adapters, and whatever else was not frozen.

Such a file is a few MB and of no use without its base, which its header names with a hash of the tensors.
``models.load`` reads it like any other. Writing is ``weights.save_weights`` of a model whose ``adaptation`` is set.
Read ``training/trainable.py`` for what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from samed3d.errors import InputError
from samed3d.models.base import Adaptation, PromptableModel
from samed3d.models.weights import ADAPTER_KEY, find_checkpoint, read_weights, tensors_sha256
from samed3d.nn.adapters import add_adapters


def put_on_base(
    model: PromptableModel, trained: Mapping[str, Tensor], header: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """Give a freshly built model the adapters of a file, and find the rest of its tensors in the base.

    Args:
        model: Built from the header; gets its adapters, and everything that the file does not hold is frozen.
        trained: Tensors of the file.
        header: Of the file.
        path: The file; its base may lie beside it.

    Returns:
        The whole state dict, to be loaded strictly.

    Raises:
        InputError: if the base is not found or is not the one that the adapters were trained on.
    """
    try:
        adaptation = Adaptation(**header[ADAPTER_KEY])
    except TypeError as error:
        raise InputError(
            f"header of {path} must name kind, rank, base and base_sha256 of its adapter ({error}); update samed3d"
        ) from error
    base = _base_state(adaptation, path)
    add_adapters(model, adaptation.kind, adaptation.rank)
    model.adaptation = adaptation
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return {**base, **trained}


def _base_state(adaptation: Adaptation, path: Path) -> dict[str, Tensor]:
    found = find_checkpoint(adaptation.base) or find_checkpoint(path.with_name(Path(adaptation.base).name))
    if found is None:
        raise InputError(f"{path} is an adapter of {adaptation.base!r}, which is not there; put that file beside it")
    state, header = read_weights(found)
    if ADAPTER_KEY in header:
        raise InputError(
            f"{path} is an adapter of {found}, which is an adapter itself; merge that one into its base first"
        )
    actual = tensors_sha256(state)
    if actual != adaptation.base_sha256:
        remedy = "find the weights that it was trained on, or train the adapter again"
        raise InputError(
            f"{path} was trained on weights with tensors {adaptation.base_sha256[:12]}, {found} has {actual[:12]}; {remedy}"
        )
    return state

"""The registry: every architecture by name, one visible dict of builders.

``create_model`` builds with random weights, ``load`` also reads them. Each builder is one function in the file named here, where every
number of the architecture can be read. Read ``models/base.py`` for the contract.
"""

from __future__ import annotations

import difflib
from typing import Any

from samed3d.errors import InputError
from samed3d.models.base import ModelEntry, PromptableModel
from samed3d.models.weights import load

__all__ = ["MODELS", "create_model", "list_models", "load"]

MODELS: dict[str, ModelEntry] = {}


def list_models() -> list[str]:
    """Names that ``create_model`` knows, sorted."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> PromptableModel:
    """Build a model with random weights.

    Args:
        name: One of ``list_models()``.
        **overrides: Keyword arguments of that builder (the numbers of the architecture).

    Raises:
        InputError: if the name is unknown; the message gives the nearest names.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.3) or list_models()
        raise InputError(f"unknown model {name!r}; nearest: {', '.join(near)} (all: samed3d models)")
    return MODELS[name].build(**overrides)

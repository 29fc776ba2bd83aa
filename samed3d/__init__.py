"""Fully-3D promptable segmentation: open a volume, click, get the whole structure back in the volume's own grid.

The public names below are loaded when they are first used: ``import samed3d`` alone imports neither torch nor
SimpleITK.
They are described in ``docs/api.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samed3d.errors import InputError
    from samed3d.evaluation.run import evaluate
    from samed3d.inference.export import save_pretrained
    from samed3d.inference.session import Session
    from samed3d.models import create_model, from_pretrained, list_models, load
    from samed3d.prompts import Box, Lasso, Mask, Point, Scribble
    from samed3d.training.loop import train
    from samed3d.volume import Volume, read_volume

__version__ = "0.1.0"
__all__ = [
    "Box",
    "InputError",
    "Lasso",
    "Mask",
    "Point",
    "Scribble",
    "Session",
    "Volume",
    "__version__",
    "create_model",
    "evaluate",
    "from_pretrained",
    "list_models",
    "load",
    "read_volume",
    "save_pretrained",
    "train",
]

_MODULES = {
    "samed3d.errors": ("InputError",),
    "samed3d.evaluation.run": ("evaluate",),
    "samed3d.inference.export": ("save_pretrained",),
    "samed3d.inference.session": ("Session",),
    "samed3d.models": ("create_model", "from_pretrained", "list_models", "load"),
    "samed3d.prompts": ("Box", "Lasso", "Mask", "Point", "Scribble"),
    "samed3d.training.loop": ("train",),
    "samed3d.volume": ("Volume", "read_volume"),
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'samed3d' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""Fully-3D promptable segmentation: open a volume, click, get the whole structure back in the volume's own grid.

The public names below are loaded when they are first used: ``import samed3d`` alone imports neither torch nor SimpleITK.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samed3d.inference.session import Session
    from samed3d.models import create_model, list_models, load
    from samed3d.prompts import Box, Lasso, Mask, Point, Scribble
    from samed3d.volume import Volume

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Lasso",
    "Mask",
    "Point",
    "Scribble",
    "Session",
    "Volume",
    "__version__",
    "create_model",
    "list_models",
    "load",
]

_HOME = {
    "Box": "samed3d.prompts",
    "Lasso": "samed3d.prompts",
    "Mask": "samed3d.prompts",
    "Point": "samed3d.prompts",
    "Scribble": "samed3d.prompts",
    "Session": "samed3d.inference.session",
    "Volume": "samed3d.volume",
    "create_model": "samed3d.models",
    "list_models": "samed3d.models",
    "load": "samed3d.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'samed3d' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""timm for tests: importable even where torchvision was built for another torch, as PyPI's is beside a CPU build of
torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest


def timm_or_skip() -> Any:
    """The module; its vision transformers need none of torchvision's compiled operators."""

    def ignore(*_args: Any, **_more: Any) -> Callable[[Any], Any]:
        return lambda function: function

    with mock.patch("torch.library.register_fake", ignore):
        return pytest.importorskip("timm", reason="timm is not installed: pip install 'samed3d[timm]'")

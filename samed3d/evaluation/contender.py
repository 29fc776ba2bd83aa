"""The face behind which everything is measured: a contender opens a volume and gives something to click on.

Read ``contenders.py`` for who they are, ``protocols/base.py`` for who clicks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from samed3d.evaluation.meter import Meter
from samed3d.models.base import PromptableModel
from samed3d.prompts import Prompt
from samed3d.volume import Volume


class Clickable(Protocol):
    """One opened volume: a ``Session``, a baseline, another program."""

    def add(self, prompt: Prompt, object_id: int = 1) -> Any:
        """Take a prompt."""

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The object's mask after it, (D, H, W)."""


class Contender(ABC):
    """Something that can be measured.

    Attributes:
        name: As it is called in the results.
        takes: Kinds of prompt that may come first.
        model: The network behind it, for protocols that choose the crop themselves; None for all else.
        knows_truth: Whether it is a bound.
        fingerprint: Changes when its weights do.
        device: Where its network runs.
        meter: What its prompts cost.
    """

    model: PromptableModel | None = None
    knows_truth: bool = False
    fingerprint: str = ""
    device: str = "cpu"

    def __init__(self, name: str, takes: frozenset[str], meter: Meter | None = None) -> None:
        self.name, self.takes, self.meter = name, takes, meter or Meter()

    @abstractmethod
    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """Begin on a volume. ``truth`` is for bounds only."""

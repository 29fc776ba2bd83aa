"""Things to measure whose answers are known: a subject that knows the target, and a method around any such
subject."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samed3d.evaluation.cases import LabelledCase, LoadedCase
from samed3d.evaluation.measuring import CaseResults, measure
from samed3d.evaluation.methods import Method, MethodSession
from samed3d.evaluation.protocols import protocol_of
from samed3d.evaluation.protocols.base import EvaluationSettings
from samed3d.prompts import Prompt
from samed3d.volume import Volume


class Scripted:
    """Answers its n-th prompt with the n-th mask (the last one again after that) and keeps what it was told."""

    def __init__(self, *masks: np.ndarray) -> None:
        self.masks, self.prompts = masks, []

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        self.prompts.append(prompt)

    def mask_of(self, object_id: int) -> np.ndarray:
        return self.masks[min(len(self.prompts), len(self.masks)) - 1].astype(np.uint8)


class Fake(Method):
    """A method that opens whatever ``make`` gives, and keeps it."""

    def __init__(
        self, make: Callable[[Volume, np.ndarray], MethodSession], takes: tuple[str, ...] = ("point", "box", "scribble")
    ) -> None:
        super().__init__("fake", frozenset(takes))
        self.make, self.opened = make, []

    def open(self, volume: Volume, truth: np.ndarray) -> MethodSession:
        self.opened.append(self.make(volume, truth))
        return self.opened[-1]


def measured(
    method: Method, volume: Volume, labels: np.ndarray, protocol: str = "samed3d", clicks: int = 3, **ask: object
) -> CaseResults:
    """One case in memory through a protocol."""
    from pathlib import Path

    case = LabelledCase("set", "case", "subject", "CT", "unseen subject", Path("image"), Path("labels"), {1: "one"})
    ask = {"min_voxels": 1} | ask
    return measure(case, method, protocol_of(protocol), EvaluationSettings(clicks, **ask), LoadedCase(volume, labels))  # type: ignore[arg-type]

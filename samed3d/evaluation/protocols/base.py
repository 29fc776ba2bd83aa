"""What every protocol is: a rule for where the simulated user points next, on what the rule looks, and where the mask
is scored.

A protocol walks one structure (or, where its rules say so, all structures of a case together) and yields a ``Turn`` per
prompt; scoring is left to ``measuring.py``. Read ``samed3d.py`` next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from samed3d.evaluation.cases import Loaded
from samed3d.evaluation.meter import Cost
from samed3d.evaluation.methods import Method
from samed3d.evaluation.results import PromptStrategy, Row
from samed3d.geometry import IntTriple, Triple, zyx_to_ijk
from samed3d.prompts import Box, Point, Prompt
from samed3d.volume import Volume

FIRST = {"click": "point", "box": "box", "scribble": "scribble"}
"""The kind of prompt behind each value of the column ``prompt``."""
Click = tuple[IntTriple, bool]
"""A zyx voxel and whether it is positive."""


@dataclass(frozen=True)
class Task:
    """One structure to find.

    Attributes:
        volume: The image.
        target: (D, H, W) bool in the file's own order.
        rng: Of this structure, seed and strategy.
        clicks: How many at most.
        strategy: Click policy and first prompt.
    """

    volume: Volume
    target: NDArray[np.bool_]
    rng: np.random.Generator
    clicks: int
    strategy: PromptStrategy


@dataclass
class Turn:
    """What one prompt led to.

    Attributes:
        click: How many clicks have been given; 0 after a box or scribble alone.
        prompts: What was said, in ijk of the image; empty where nothing was.
        mask: (D, H, W) bool, where the protocol scores.
        cost: Of these prompts.
        clicked: The newest click on the mask's grid, or None.
        target: What the mask is compared with where that is not the task's own.
        spacing_zyx_mm: Of ``mask`` where that is not the image's.
    """

    click: int
    prompts: list[Prompt]
    mask: NDArray[np.bool_]
    cost: Cost
    clicked: Click | None = None
    target: NDArray[np.bool_] | None = None
    spacing_zyx_mm: Triple | None = None


class _Rules(ABC):
    """What both forms of protocol have.

    Attributes:
        name: On the command line.
        title: One line.
        optimistic_bias: What makes its scores higher than a user's would be; empty where nothing does.
        leaks_truth: Whether more of the truth than the prompts reaches the model.
        fixed_clicks: How many clicks its rules give; None where the run says.
        tolerance_mm: Its own NSD tolerance; None takes the run's.
        summary_columns: Columns by which ``results.json`` splits its means.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    optimistic_bias: ClassVar[str] = ""
    leaks_truth: ClassVar[bool] = False
    fixed_clicks: ClassVar[int | None] = None
    tolerance_mm: ClassVar[float | None] = None
    summary_columns: ClassVar[tuple[str, ...]] = ("group", "source")

    def strategies(self, policies: Sequence[str], prompts: Sequence[str]) -> list[PromptStrategy]:
        """The prompt strategies of each structure; only ``samed3d`` lets the user choose policies and first prompts."""
        return [PromptStrategy(self.name)]

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """The generator of a repetition of a case's ``number``-th structure."""
        return np.random.default_rng([seed, number])

    def own_scores(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The protocol's own scores per case, from the rows of one model: ``source subject group score value``."""
        return []


class StructureProtocol(_Rules):
    """A protocol that takes one structure at a time."""

    @abstractmethod
    def walk(self, method: Method, task: Task) -> Iterator[Turn]:
        """Prompt until ``task.clicks`` are given or nothing is wrong."""


class CaseProtocol(_Rules):
    """A protocol that takes all structures of a case at once."""

    @abstractmethod
    def walk_case(
        self, method: Method, case: Loaded, values: Sequence[int], clicks: int, seed: int
    ) -> Iterator[list[Turn]]:
        """Rounds, each with one turn per value of ``values``."""


def point_at(click: Click) -> Point:
    """A click as a prompt."""
    (z, y, x), positive = click
    return Point(zyx_to_ijk((float(z), float(y), float(x))), positive)


def box_around(low: IntTriple, high: IntTriple) -> Box:
    """A half-open zyx box as a prompt, whose corners both belong to it."""
    z, y, x = (float(v - 1) for v in high)
    return Box(zyx_to_ijk((float(low[0]), float(low[1]), float(low[2]))), zyx_to_ijk((z, y, x)))

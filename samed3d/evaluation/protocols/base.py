"""Interface of evaluation protocols: who prompts, on what the simulated user bases the next prompt, and what is scored.

A protocol runs a method on the structures of a case and yields a ``Turn`` per prompt; ``measuring.py`` scores them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, LoadedCase
from samed3d.evaluation.meter import Cost
from samed3d.evaluation.methods import Method
from samed3d.evaluation.results import PromptStrategy, Row
from samed3d.geometry import Grid, IntTriple, Region, Triple, zyx_to_ijk
from samed3d.prompts import Box, Point, Prompt
from samed3d.volume import Volume

logger = logging.getLogger(__name__)

MIN_VOXELS = 100
"""Structures with fewer voxels are not measured, because a few voxels would decide their Dice."""
FIRST_PROMPTS = {"click": "point", "box": "box", "scribble": "scribble", "none": "none"}
"""For each value of the column ``prompt``, the kind of prompt that a method must take."""
Click = tuple[IntTriple, bool]
"""A zyx voxel and whether it is positive."""
Answer = tuple[NDArray[np.bool_], Cost]
"""A mask and the cost of the prompts that led to it."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of a run that apply to every case, as ``run.evaluate`` takes them.

    ``clicks`` and ``tolerance_mm`` hold where the protocol does not fix them, ``policies`` and ``prompts`` for the
    protocol ``samed3d``. Structures of fewer than ``min_voxels`` are not measured.
    """

    clicks: int
    seeds: int = 1
    policies: tuple[str, ...] = ("centre",)
    prompts: tuple[str, ...] = ("click",)
    labels_per_case: int | None = None
    min_voxels: int = MIN_VOXELS
    tolerance_mm: float = 2.0
    surfaces: bool = True


@dataclass(frozen=True)
class StructureTask:
    """One structure to segment with at most so many clicks.

    ``target`` is (D, H, W) bool in the file's own order and not empty; ``rng`` is of this structure and seed.
    """

    volume: Volume
    target: NDArray[np.bool_]
    rng: np.random.Generator
    clicks: int
    strategy: PromptStrategy = PromptStrategy("samed3d", "centre")


@dataclass
class Turn:
    """The result of one prompt.

    Attributes:
        click: Number of clicks given so far; 0 after a box or scribble alone, or without prompts.
        prompts: The new prompts, in ijk of the image.
        mask: (D, H, W) bool, where the protocol scores.
        clicked: The newest click on the mask's grid, or None.
        target: The reference of ``mask`` where that is not the structure's own; ``spacing_zyx_mm`` likewise.
    """

    click: int
    prompts: list[Prompt]
    mask: NDArray[np.bool_]
    cost: Cost
    clicked: Click | None = None
    target: NDArray[np.bool_] | None = None
    spacing_zyx_mm: Triple | None = None


@dataclass
class StructureRun:
    """One structure with one seed and prompt strategy: its label value, its reference (D, H, W) and its turns."""

    label: int
    target: NDArray[np.bool_]
    seed: int
    strategy: PromptStrategy
    turns: Iterable[Turn]


class EvaluationProtocol(ABC):
    """The rules of an evaluation.

    Attributes:
        name: On the command line.
        title: One line.
        optimistic_bias: What makes its scores higher than a user's would be; empty where nothing does.
        leaks_truth: Whether more of the reference than the prompts reaches the model.
        fixed_clicks: Number of clicks by its rules; None where the run decides.
        tolerance_mm: Its own NSD tolerance; None takes the run's.
        summary_columns: Columns by which ``results.json`` splits its means.
        replayable: Whether the saved prompts through a session give its masks again (``pictures.py``).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    optimistic_bias: ClassVar[str] = ""
    leaks_truth: ClassVar[bool] = False
    fixed_clicks: ClassVar[int | None] = None
    tolerance_mm: ClassVar[float | None] = None
    summary_columns: ClassVar[tuple[str, ...]] = ("group", "source")
    replayable: ClassVar[bool] = False

    @abstractmethod
    def run(
        self, method: Method, case: LabelledCase, loaded: LoadedCase, settings: EvaluationSettings
    ) -> Iterator[StructureRun]:
        """Evaluate the structures of a case; turns of one run are consumed before the next run is asked for."""

    def strategies(self, settings: EvaluationSettings) -> list[PromptStrategy]:
        """The prompt strategies of each structure."""
        return [PromptStrategy(self.name)]

    def usable_strategies(self, method: Method, settings: EvaluationSettings) -> list[PromptStrategy]:
        """The prompt strategies whose first prompt the method takes.

        Raises:
            InputError: if there is none.
        """
        strategies = self.strategies(settings)
        fit = [strategy for strategy in strategies if self.can_start(method, strategy)]
        if not fit:
            given = ", ".join(dict.fromkeys(FIRST_PROMPTS[strategy.prompt] for strategy in strategies))
            needs = " or a ".join(sorted(method.takes))
            if "none" in (given, needs):
                needs = "takes no prompts" if needs == "none" else f"needs a {needs} first"
                raise InputError(f"model {method.name!r} {needs}; it cannot be measured by protocol {self.name!r}")
            raise InputError(
                f"model {method.name!r} needs a {needs} first; protocol {self.name!r} gives it only: {given}"
            )
        return fit

    def suits(self, method: Method, settings: EvaluationSettings) -> bool:
        """Whether the method takes any of the protocol's first prompts."""
        return any(self.can_start(method, strategy) for strategy in self.strategies(settings))

    def can_start(self, method: Method, strategy: PromptStrategy) -> bool:
        """Whether the method takes the first prompt of a strategy."""
        return FIRST_PROMPTS[strategy.prompt] in method.takes

    def clicks(self, settings: EvaluationSettings) -> int:
        """The number of clicks per structure."""
        return settings.clicks if self.fixed_clicks is None else self.fixed_clicks

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """The generator of a repetition of a case's ``number``-th structure."""
        return np.random.default_rng([seed, number])

    def own_scores(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The protocol's own scores per case, from the rows of one model: ``source subject group score value``."""
        return []


class StructureProtocol(EvaluationProtocol):
    """A protocol that takes one structure at a time."""

    @abstractmethod
    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Prompt until ``task.clicks`` are given or nothing is wrong."""

    def run(
        self, method: Method, case: LabelledCase, loaded: LoadedCase, settings: EvaluationSettings
    ) -> Iterator[StructureRun]:
        """Every structure with every seed and strategy."""
        strategies, clicks = self.usable_strategies(method, settings), self.clicks(settings)
        for number, value in enumerate(structures(case, loaded, settings)):
            target = loaded.labels == value
            for seed in range(settings.seeds):
                for strategy in strategies:
                    task = StructureTask(loaded.volume, target, self.rng(seed, number), clicks, strategy)
                    yield StructureRun(value, target, seed, strategy, self.simulate(method, task))


def structures(case: LabelledCase, loaded: LoadedCase, settings: EvaluationSettings) -> list[int]:
    """Label values of the structures to measure, ascending."""
    found = zip(*np.unique(loaded.labels, return_counts=True), strict=True)
    values = sorted(int(value) for value, count in found if value != 0 and count >= settings.min_voxels)
    if not values:
        logger.warning("left out %s: no structure of at least %d voxels", case.case, settings.min_voxels)
    return some_labels(values, settings)


def some_labels(values: list[int], settings: EvaluationSettings) -> list[int]:
    """``settings.labels_per_case`` of some values, drawn with a fixed seed; sorted."""
    if settings.labels_per_case is None or len(values) <= settings.labels_per_case:
        return values
    return sorted(int(v) for v in np.random.default_rng(0).permutation(values)[: settings.labels_per_case])


def click_turns(
    clicks: int,
    choose: Callable[[int, NDArray[np.bool_]], Click | None],
    give: Callable[[Click], Answer],
    mask: NDArray[np.bool_],
) -> Iterator[Turn]:
    """Give at most so many clicks to a method one after the other, the first on the given mask, (D, H, W).

    ``choose`` returns the next click for its number, from 1, and the mask so far; None ends the series.
    """
    for number in range(1, clicks + 1):
        click = choose(number, mask)
        if click is None:
            return
        mask, cost = give(click)
        yield Turn(number, [point_at(click)], mask, cost, click)


def point_at(click: Click) -> Point:
    """A click as a prompt."""
    (z, y, x), positive = click
    return Point(zyx_to_ijk((float(z), float(y), float(x))), positive)


def box_around(low: IntTriple, high: IntTriple) -> Box:
    """A half-open zyx box as a prompt, whose corners both belong to it."""
    z, y, x = (float(v - 1) for v in high)
    return Box(zyx_to_ijk((float(low[0]), float(low[1]), float(low[2]))), zyx_to_ijk((z, y, x)))


def cube_around(middle: IntTriple, edge_mm: float, grid: Grid) -> Region:
    """The voxels of an image whose centres lie in a cube around a voxel."""
    half = [edge_mm / spacing / 2 for spacing in grid.spacing_zyx_mm]
    low = tuple(int(np.ceil(v - h)) for v, h in zip(middle, half, strict=True))
    high = tuple(int(np.floor(v + h)) + 1 for v, h in zip(middle, half, strict=True))
    return Region(low, high).clip(grid.shape_zyx)  # type: ignore[arg-type]

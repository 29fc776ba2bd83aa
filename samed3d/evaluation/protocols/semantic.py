"""Protocol of semantic segmentation models: every class of a whole volume at once, at the volume's native grid.

There are no prompts: the rows have click 0 and policy and prompt ``none``. A case has one row per class that its source
labels; a class that is in neither mask has no Dice and is part of no mean, a class that is in one mask only has Dice 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from samed3d.evaluation.cases import LabelledCase, LoadedCase
from samed3d.evaluation.methods import Method
from samed3d.evaluation.protocols.base import EvaluationProtocol, EvaluationSettings, StructureRun, Turn, some_labels
from samed3d.evaluation.results import PromptStrategy
from samed3d.inference.sliding_window import segment_volume

logger = logging.getLogger(__name__)


class SemanticProtocol(EvaluationProtocol):
    """See the module."""

    name = "automatic"
    title = "every class of the whole volume at once, without prompts"
    fixed_clicks = 0
    summary_columns = ("group", "source", "name")

    def strategies(self, settings: EvaluationSettings) -> list[PromptStrategy]:
        """One, without prompts."""
        return [PromptStrategy(self.name, "none", "none")]

    def run(
        self, method: Method, case: LabelledCase, loaded: LoadedCase, settings: EvaluationSettings
    ) -> Iterator[StructureRun]:
        """Segment the volume once and yield one turn per class."""
        (strategy,) = self.usable_strategies(method, settings)
        values = class_values(case, tuple(method.model.config["class_names"]))
        if not values:
            logger.warning("left out %s: %s labels none of the classes", case.case, case.source)
            return
        with method.meter.running() as cost:
            predicted = segment_volume(loaded.volume, method.model, device=method.device)
        for number in some_labels(sorted(values), settings):
            turn = Turn(0, [], predicted == number, cost)
            yield StructureRun(values[number][0], np.isin(loaded.labels, values[number]), 0, strategy, [turn])


def class_values(case: LabelledCase, classes: tuple[str, ...]) -> dict[int, list[int]]:
    """The label values of a case that belong to each class number: by name, or by category where no name fits."""
    numbers = {name.casefold(): number for number, name in enumerate(classes, start=1)}
    found: dict[int, list[int]] = {}
    for value, name in sorted(case.names.items()):
        number = numbers.get(name.casefold(), numbers.get(case.categories.get(value, "").casefold()))
        if number is not None and value:
            found.setdefault(number, []).append(value)
    return found

"""Validation during training: simulated clicks on whole volumes of held-out subjects, as ``samed3d evaluate`` does.

The protocol is ``samed3d`` with the click policy ``centre``. The cases are drawn once per run and distributed over the
processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samed3d.config import TrainConfig
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.data.sampling import in_validation_part, split_weight
from samed3d.data.semantic import class_number
from samed3d.errors import InputError
from samed3d.evaluation.cases import corpus_volume
from samed3d.evaluation.measuring import dice_by_click
from samed3d.evaluation.protocols.base import MIN_VOXELS
from samed3d.inference.session import Session
from samed3d.inference.sliding_window import segment_volume
from samed3d.metrics import dice
from samed3d.models.base import AnyModel, SemanticModel
from samed3d.volume import Volume

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

PICTURES = 4
"""Number of cases of which each validation writes a picture."""


@dataclass
class ValidationCase:
    """An image of validation and its structures that are measured."""

    corpus: Corpus
    case: CaseRecord
    labels: list[LabelRecord]


@dataclass
class ValidationResult:
    """Mean Dice over structures after each click, how many structures, and the seconds it took."""

    dice: list[float]
    structures: int
    seconds: float


class Validation:
    """The held-out volumes of a run.

    Raises:
        InputError: if no subject of the corpus is held out.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: Path) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.held = held_cases(config)

    def measure(self, model: AnyModel, step: int, stopped: Callable[[], bool]) -> ValidationResult | None:
        """Measure this process's share of the cases and gather; None if the run was asked to stop meanwhile.

        The model is in eval mode; a semantic segmentation model has one Dice per structure instead of one per click.
        ``step`` names the pictures, ``stopped`` is called between cases.
        """
        began = time.monotonic()
        rows: list[list[float]] = []
        interrupted = False
        for number in range(self.accelerator.process_index, len(self.held), self.accelerator.num_processes):
            if interrupted := stopped():
                break
            rows += self._measure_case(model, number, step)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows, interrupted = gather_object(rows), any(gather_object([interrupted]))
        if interrupted or not rows:
            return None
        return ValidationResult(np.mean(sorted(rows), axis=0).tolist(), len(rows), time.monotonic() - began)

    def _measure_case(self, model: AnyModel, number: int, step: int) -> list[list[float]]:
        """Dice by click of each structure of one case."""
        settings, held = self.config.validation, self.held[number]
        try:
            volume = corpus_volume(held.corpus, held.case)
            layers = {r.layer: np.asarray(held.corpus.labels(held.case, r.layer)[:]) for r in held.labels}
        except (InputError, OSError, RuntimeError, ValueError) as error:
            logger.warning("validation leaves out a damaged case: %s (%s)", held.case.id, error)
            return []
        targets = [layers[label.layer] == label.value for label in held.labels]
        if isinstance(model, SemanticModel):
            numbers = {name: number for number, name in enumerate(model.config["class_names"], start=1)}
            classes = [class_number(label, numbers) for label in held.labels]
            if not any(classes):
                return []
            predicted = segment_volume(volume, model, device=self.accelerator.device)
            return [[dice(predicted == c, target)] for c, target in zip(classes, targets, strict=True) if c]
        session = Session(volume, model, "cpu" if self.accelerator.device.type == "cpu" else "auto")
        rows = []
        for position, target in enumerate(targets):
            rng = np.random.default_rng([settings.seed, number, position])
            rows.append(dice_by_click(session, volume, target, settings.clicks, rng, position + 1))
        if settings.images and number < PICTURES and rows:
            self._draw(session, volume, held, step, rows[0][-1])
        return rows

    def _draw(self, session: Session, volume: Volume, held: ValidationCase, step: int, dice: float) -> None:
        try:
            from samed3d.drawing import write_preview

            folder = self.folder / "validation"
            folder.mkdir(exist_ok=True)
            name = f"step_{step:06d}_{held.case.id.replace('/', '_')}.png"
            title = f"{held.case.id}: {held.labels[0].name}, step {step}, Dice {dice:.3f}"
            write_preview(folder / name, volume, session.mask_of(1), session.objects()[:1], title=title)
        except (ImportError, InputError) as error:  # a picture is no reason to end a run
            logger.warning("no picture of a validation case: %s", error)


def held_cases(config: TrainConfig) -> list[ValidationCase]:
    """The cases to measure: held-out subjects that have an image, spread over the sources, the same for the same seed.

    Raises:
        InputError: if there are none.
    """
    settings = config.validation
    by_source: dict[str, list[ValidationCase]] = {}
    for entry in config.data.corpus:
        corpus = Corpus(Path(split_weight(entry)[0]))
        for case in corpus.cases:
            labels = [label for label in case.labels if label.voxels >= MIN_VOXELS]
            if case.has_image and labels and _is_measured(case, config):
                by_source.setdefault(case.source, []).append(ValidationCase(corpus, case, labels))
    rng = np.random.default_rng(settings.seed)
    mixed = [[cases[int(i)] for i in rng.permutation(len(cases))] for _, cases in sorted(by_source.items())]
    mixed = [mixed[int(i)] for i in rng.permutation(len(mixed))]
    chosen = [held for layer in zip_longest(*mixed) for held in layer if held is not None][: settings.cases]
    if not chosen:
        corpora = ", ".join(config.data.corpus) or "data.corpus (empty)"
        raise InputError(
            f"validation.every is {settings.every}, but no labelled image of {corpora} is held out; raise "
            f"data.validation_share ({config.data.validation_share:g}) or set validation.every=0"
        )
    for held in chosen:
        picked = rng.permutation(len(held.labels))[: settings.structures]
        held.labels = [held.labels[int(i)] for i in sorted(picked)]
    return chosen


def _is_measured(case: CaseRecord, config: TrainConfig) -> bool:
    if case.split == "test":
        return False
    if case.source in config.data.hold_out:
        return config.validation.hold_out
    return in_validation_part(case, config.data)

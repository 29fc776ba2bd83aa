"""Validation while a run goes on: simulated clicks on whole volumes of subjects that are never trained on.

The rule is that of ``samed3d evaluate`` with protocol ``samed3d`` and its user ``centre``: native grid, full mask, the
first click uniform in the structure, each next one in the middle of the largest error, no ground truth but through the
clicks. The cases are drawn once per run and shared out over the processes. Read ``evaluation/protocols/samed3d.py`` for
other users.
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
import torch
from numpy.typing import NDArray

from samed3d.clicks import next_click
from samed3d.config import TrainConfig
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.data.sampling import in_validation_part, split_weight
from samed3d.data.semantic import class_number
from samed3d.errors import InputError
from samed3d.geometry import RAS_DIRECTION, Grid, as_triple, zyx_to_ijk
from samed3d.inference.session import Session
from samed3d.inference.sliding_window import segment_volume
from samed3d.metrics import dice
from samed3d.models.base import AnyModel, SemanticModel
from samed3d.prompts import Point
from samed3d.volume import Volume

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MIN_VOXELS = 100
"""Structures with fewer voxels are not measured: a few voxels more or less would be all that counts."""
PICTURES = 4
"""Cases of which a picture is written at each validation."""


@dataclass
class Held:
    """An image of validation and its structures that are clicked."""

    corpus: Corpus
    case: CaseRecord
    labels: list[LabelRecord]

    def read(self) -> Volume:
        """The whole image, as a volume in canonical axes."""
        z, y, x = self.case.spacing_zyx_mm
        return Volume(
            np.asarray(self.corpus.image(self.case)[:]),
            Grid(self.case.shape_zyx, (x, y, z), direction_lps=RAS_DIRECTION),
            self.case.id,
            self.case.modality,
        )


@dataclass
class Found:
    """Mean Dice over structures after each click, how many structures, and the seconds it took."""

    dice: list[float]
    structures: int
    seconds: float


class Validation:
    """The held-back volumes of a run.

    Raises:
        InputError: if the corpus holds no subject back.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: Path) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.held = held_cases(config)

    def measure(self, model: AnyModel, step: int, stopped: Callable[[], bool]) -> Found | None:
        """Click through this process's share of the cases and gather; None if the run was asked to stop meanwhile.

        An automatic model is not clicked: its one Dice per structure stands where the clicks would.

        Args:
            model: Left in eval mode.
            step: For the names of the pictures.
            stopped: Asked between structures.
        """
        began = time.monotonic()
        rows: list[list[float]] = []
        broken = False
        for number in range(self.accelerator.process_index, len(self.held), self.accelerator.num_processes):
            if broken := stopped():
                break
            rows += self._click(model, number, step)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows, broken = gather_object(rows), any(gather_object([broken]))
        if broken or not rows:
            return None
        return Found(np.mean(sorted(rows), axis=0).tolist(), len(rows), time.monotonic() - began)

    def _click(self, model: AnyModel, number: int, step: int) -> list[list[float]]:
        """Dice by click of each structure of one case."""
        settings, held = self.config.validation, self.held[number]
        try:
            volume = held.read()
            layers = {
                layer: np.asarray(held.corpus.labels(held.case, layer)[:]) for layer in {r.layer for r in held.labels}
            }
        except (InputError, OSError, RuntimeError, ValueError) as error:
            logger.warning("validation passes over a damaged case: %s (%s)", held.case.id, error)
            return []
        if isinstance(model, SemanticModel):
            return automatic_dice(model, volume, layers, held.labels, self.accelerator.device)
        session = Session(volume, model, "cpu" if self.accelerator.device.type == "cpu" else "auto")
        rows = []
        for position, label in enumerate(held.labels):
            rng = np.random.default_rng([settings.seed, number, position])
            rows.append(click_through(session, layers[label.layer] == label.value, settings.clicks, rng, position + 1))
        if settings.images and number < PICTURES and rows:
            self._draw(session, volume, held, step, rows[0][-1])
        return rows

    def _draw(self, session: Session, volume: Volume, held: Held, step: int, dice: float) -> None:
        try:
            from samed3d.drawing import write_preview

            folder = self.folder / "validation"
            folder.mkdir(exist_ok=True)
            name = f"step_{step:06d}_{held.case.id.replace('/', '_')}.png"
            title = f"{held.case.id}: {held.labels[0].name}, step {step}, Dice {dice:.3f}"
            write_preview(folder / name, volume, session.mask_of(1), session.objects()[:1], title=title)
        except (ImportError, InputError) as error:  # a picture is no reason to end a run
            logger.warning("no picture of a validation case: %s", error)


def automatic_dice(
    model: SemanticModel, volume: Volume, layers: dict[int, NDArray], labels: list[LabelRecord], device: torch.device
) -> list[list[float]]:
    """Dice, alone in a list, of each structure that is one of the model's classes."""
    numbers = {name: number for number, name in enumerate(model.config["class_names"], start=1)}
    known = [(class_number(label, numbers), label) for label in labels if class_number(label, numbers)]
    if not known:
        return []
    predicted = segment_volume(volume, model, device=device)
    return [[dice(predicted == number, layers[label.layer] == label.value)] for number, label in known]


def click_through(
    session: Session, target: NDArray[np.bool_], clicks: int, rng: np.random.Generator, object_id: int
) -> list[float]:
    """Dice of a structure's mask on the whole volume after each click; a perfect mask needs no further click and keeps
    its Dice.

    Args:
        session: On the volume.
        target: (D, H, W) bool, on the volume's grid; not empty.
        clicks: How many.
        rng: Of the first click.
        object_id: Not used before on ``session``.
    """
    mask = np.zeros(target.shape, dtype=bool)
    found: list[float] = []
    for turn in range(clicks):
        click = next_click(mask, target, "uniform" if turn == 0 else "centre", rng)
        if click is not None:
            session.add(Point(zyx_to_ijk(as_triple(list(click[0]))), click[1]), object_id=object_id)
            mask = session.mask_of(object_id).astype(bool)
        found.append(dice(mask, target))
    return found


def held_cases(config: TrainConfig) -> list[Held]:
    """The cases to measure: held-back subjects that have an image, spread over the sources, the same for the same seed.

    Raises:
        InputError: if there are none.
    """
    settings = config.validation
    by_source: dict[str, list[Held]] = {}
    for entry in config.data.corpus:
        corpus = Corpus(Path(split_weight(entry)[0]))
        for case in corpus.cases:
            labels = [label for label in case.labels if label.voxels >= MIN_VOXELS]
            if case.has_image and labels and _is_measured(case, config):
                by_source.setdefault(case.source, []).append(Held(corpus, case, labels))
    rng = np.random.default_rng(settings.seed)
    mixed = [[cases[int(i)] for i in rng.permutation(len(cases))] for _, cases in sorted(by_source.items())]
    mixed = [mixed[int(i)] for i in rng.permutation(len(mixed))]
    chosen = [held for layer in zip_longest(*mixed) for held in layer if held is not None][: settings.cases]
    if not chosen:
        raise InputError(
            f"validation.every is {settings.every}, but no labelled image of {', '.join(config.data.corpus) or 'data.corpus (empty)'} is "
            f"held back; raise data.validation_share ({config.data.validation_share:g}) or set validation.every=0"
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

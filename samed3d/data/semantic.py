"""Training samples for semantic segmentation: a crop of a labelled image and its map of class numbers.

Crops have the model's own spacing and shape and lie anywhere in the image; a third of them is placed on a voxel of a
class, as in nnU-Net. Intensities are scaled by the whole image's statistics, as in ``inference/sliding_window.py``. A
structure that a source does not label, or that preparation dropped, counts as background there: train one model on
sources that label the same structures, prepared with ``--rules lenient``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samed3d.config import DataConfig
from samed3d.crops import LEAST_DEVIATION, sample_crop
from samed3d.data import sampling
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.data.sampling import Drawn, RawCrop, SampleDataset, crop_spacing
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, IntTriple, Triple, as_triple
from samed3d.models.base import SemanticModel
from samed3d.resample import nearest_crop

logger = logging.getLogger(__name__)

FOREGROUND_SHARE = 1 / 3
"""Share of crops that are placed on a voxel of a class."""
SCALE_PROBABILITY, SCALES = 0.2, (0.7, 1.4)
CUT_PERCENT = (0.5, 99.5)
"""Intensities beyond these percentiles of the image are cut."""
STATISTICS_VOXELS = 2_000_000


@dataclass(frozen=True)
class Intensities:
    """Statistics of a whole image: cut at ``low`` and ``high``, then ``mean`` and ``deviation``."""

    low: float
    high: float
    mean: float
    deviation: float

    @classmethod
    def of(cls, array: NDArray) -> Intensities:
        """Statistics of a (D, H, W) array, from about two million voxels on a regular grid, read slice by slice."""
        step = max(1, math.ceil((math.prod(array.shape) / STATISTICS_VOXELS) ** (1 / 3)))
        slices = (np.asarray(array[z : z + 1])[0, ::step, ::step] for z in range(0, array.shape[0], step))
        values = np.concatenate([one.astype(np.float64).ravel() for one in slices])
        low, high = (float(v) for v in np.percentile(values, CUT_PERCENT))
        values = values.clip(low, high)
        least = LEAST_DEVIATION * max(-low, high) or 1.0
        return cls(low, high, float(values.mean()), max(float(values.std()), least))

    def scale(self, crop: Tensor, inside: Tensor) -> Tensor:
        """(D, H, W) raw intensities to mean 0 and deviation 1 of the image; voxels outside the volume are 0."""
        scaled = (crop.clamp(self.low, self.high) - self.mean) / self.deviation
        return torch.where(inside, scaled, 0.0)


@dataclass(frozen=True)
class SemanticCase:
    """The images of one case (one per modality, in the order of their channels) with its label map."""

    corpus: Corpus
    images: tuple[CaseRecord, ...]

    @property
    def about(self) -> CaseRecord:
        """The first image: shape, spacing and labels are the same for all."""
        return self.images[0]


def training_cases(config: DataConfig) -> list[tuple[float, SemanticCase]]:
    """Weight and case for every labelled image that may be trained on, those of one case together."""
    found: dict[tuple[str, str], tuple[float, Corpus, list[CaseRecord]]] = {}
    for weight, corpus, case in sampling.training_cases(config):
        if case.has_image and case.labels:
            found.setdefault((str(corpus.folder), case.case), (weight, corpus, []))[2].append(case)
    ordered = ((w, corpus, sorted(images, key=lambda c: c.channel)) for w, corpus, images in found.values())
    return [(weight, SemanticCase(corpus, tuple(images))) for weight, corpus, images in ordered]


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Sorted names of the structures that may be trained on: a single source's own names, the categories of several.

    Raises:
        InputError: if there is none.
    """
    cases = [case.about for _, case in training_cases(config)]
    one_source = len({case.source for case in cases}) == 1
    names = {r.name if one_source else r.category or r.name for case in cases for r in case.labels}
    if not names:
        rule = "data.corpus must hold labelled images for a semantic segmentation model"
        raise InputError(f"{rule}, got {config.corpus or 'none'}")
    return tuple(sorted(names))


def median_spacing_mm(config: DataConfig) -> Triple:
    """The median of the cases' spacings, axis by axis, as in nnU-Net."""
    spacings = [case.about.spacing_zyx_mm for _, case in training_cases(config)]
    return as_triple(np.median(np.array(spacings), axis=0).round(4))


def target_spacing(model: SemanticModel) -> Triple | None:
    """Spacing of a model's crops, zyx in mm; None for each image's own."""
    if model.config.get("spacing_zyx_mm"):
        return as_triple(model.config["spacing_zyx_mm"])
    edge = model.spec.spacing_mm
    return None if edge is None else (edge, edge, edge)


def class_number(label: LabelRecord, numbers: dict[str, int]) -> int:
    """The class of a structure, by the source's name for it or by its category; 0 for none."""
    return numbers.get(label.name) or numbers.get(label.category) or 0


class SemanticDataset(SampleDataset):
    """Samples with all classes; ``target`` holds uint8 class numbers.

    Classes 1, 2, ... have the names of ``classes``; other structures are background. Of ``config``, ``crop``, ``fill``
    and ``placement`` are not used; a ``spacing_zyx_mm`` of None is each image's own, ``channels`` are images per case.

    Raises:
        InputError: if no case holds any of the classes, or none has that many images.
    """

    def __init__(
        self,
        config: DataConfig,
        classes: tuple[str, ...],
        shape_zyx: IntTriple,
        spacing_zyx_mm: Triple | None,
        channels: int,
        seed: int,
        length: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(config, seed, length, start)
        self.classes, self.shape_zyx, self.spacing_zyx_mm = classes, shape_zyx, spacing_zyx_mm
        self._statistics: dict[str, Intensities] = {}
        self._numbers = {name: number for number, name in enumerate(classes, start=1)}
        cases = training_cases(config)
        labelled = [(w, c) for w, c in cases if any(class_number(r, self._numbers) for r in c.about.labels)]
        if not labelled:
            corpora = ", ".join(config.corpus) or "no corpus (data.corpus is empty)"
            rule = f"class_names must be categories of the training cases, got {', '.join(classes)}"
            raise InputError(f"{rule}; {corpora} holds none of them")
        chosen = [(w, c) for w, c in labelled if len(c.images) == channels]
        if not chosen:
            counts = sorted({len(c.images) for _, c in labelled})
            rule = f"in_channels must be the number of images per case, got {channels}"
            raise InputError(f"{rule}; the corpus has {counts}")
        self.real = [case for _, case in chosen]
        self._by_first_image = {case.about.id: case for case in self.real}
        self._ends = np.cumsum([w for w, _ in chosen]) / sum(w for w, _ in chosen)
        self._warn_of_dropped()

    def _warn_of_dropped(self) -> None:
        """Log how many structures of these classes are missing from the label maps."""
        for corpus in {id(case.corpus): case.corpus for case in self.real}.values():
            cases = [case.about.case for case in self.real if case.corpus is corpus]
            rows = corpus.label_table.where(case=cases, kept="0")
            dropped = int(sum(np.isin(rows["name"], self.classes) | np.isin(rows["category"], self.classes)))
            if dropped:
                what = "%d structures of these classes were dropped when %s was prepared and count as background; "
                logger.warning(what + "prepare the corpus with --rules lenient", dropped, corpus.folder)

    def _draw(self, rng: np.random.Generator, generator: torch.Generator) -> Drawn:
        at = min(int(np.searchsorted(self._ends, rng.random(), side="right")), len(self.real) - 1)
        return self.real[at].about, partial(self._cut, self.real[at], rng)

    def _cut(self, case: SemanticCase, rng: np.random.Generator) -> RawCrop:
        """A crop of all images of a case, with class numbers."""
        frame = self._frame(case, rng)
        arrays = [case.corpus.image(image) for image in case.images]
        for image, array in zip(case.images, arrays, strict=True):
            if image.id not in self._statistics:
                self._statistics[image.id] = Intensities.of(array)
        crops, insides = zip(*(sample_crop(array, frame) for array in arrays), strict=True)
        target = torch.from_numpy(class_map(case, self._numbers, frame))
        return RawCrop(torch.stack(crops), insides[0], target, crop_spacing(case.about, frame), case.about)

    def _tensors(self, crop: RawCrop) -> tuple[Tensor, Tensor]:
        assert crop.case is not None
        known = [self._statistics[image.id] for image in self._by_first_image[crop.case.id].images]
        scaled = [one.scale(channel, crop.inside) for one, channel in zip(known, crop.image, strict=True)]
        return torch.stack(scaled), crop.target

    def _frame(self, case: SemanticCase, rng: np.random.Generator) -> CropFrame:
        """Where the crop lies: on a voxel of a class, or anywhere; inside the image where that is large enough."""
        about = case.about
        target = self.spacing_zyx_mm or about.spacing_zyx_mm
        scale = rng.uniform(*SCALES) if self.config.augment == "full" and rng.random() < SCALE_PROBABILITY else 1.0
        steps = [scale * t / s for t, s in zip(target, about.spacing_zyx_mm, strict=True)]
        centre = [rng.uniform(-0.5, n - 0.5) for n in about.shape_zyx]
        known = [label for label in about.labels if class_number(label, self._numbers) and label.points is not None]
        if known and rng.random() < FOREGROUND_SHARE:
            label = known[int(rng.integers(len(known)))]
            assert label.points is not None
            centre = [float(v) for v in label.points[int(rng.integers(len(label.points)))]]
        inside = []
        for middle, step, count, size in zip(centre, steps, self.shape_zyx, about.shape_zyx, strict=True):
            half = step * count / 2
            inside.append(min(max(middle, half - 0.5), size - 0.5 - half) if 2 * half < size else (size - 1) / 2)
        return CropFrame.centred(as_triple(inside), as_triple(steps), self.shape_zyx).snapped()


def class_map(case: SemanticCase, numbers: dict[str, int], frame: CropFrame) -> NDArray[np.uint8]:
    """Class numbers on a frame by nearest neighbour; 0 outside the volume and for structures not in ``numbers``.

    Where structures overlap (further layers of the label map), the later layer counts.
    """
    result = np.zeros(frame.shape_zyx, np.uint8)
    for layer in sorted({label.layer for label in case.about.labels}):
        values = nearest_crop(case.corpus.labels(case.about, layer), frame)
        for label in case.about.labels:
            if label.layer == layer and (number := class_number(label, numbers)):
                result[values == label.value] = number
    return result

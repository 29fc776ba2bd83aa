"""Training samples with all classes at once: a crop of a labelled image and its map of class numbers, for automatic
models.

Unlike ``sampling.py``, crops have the model's own spacing and shape and lie anywhere in the image; a third of them is
placed on a voxel of a class, as nnU-Net does. Intensities are scaled by the whole image's statistics, not the crop's,
so that a crop of air stays air: the same functions serve ``inference/sliding_window.py``. Read ``training/semantic.py``
next.

A structure that a source does not label counts as background there, and so does one that preparation dropped: train one
model on sources that label the same things, prepared with ``--rules lenient``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samed3d.config import DataConfig
from samed3d.crops import sample_crop
from samed3d.data.augment import augment_intensity
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.data.sampling import is_held_out, split_weight
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, IntTriple, Triple, as_triple
from samed3d.models.base import SemanticModel

logger = logging.getLogger(__name__)

FOREGROUND_SHARE = 1 / 3
"""Share of crops that are placed on a voxel of a class."""
SCALE_PROBABILITY = 0.2
SCALES = (0.7, 1.4)
CUT_PERCENT = (0.5, 99.5)
"""Intensities beyond these percentiles of the image are cut."""
STATISTICS_VOXELS = 2_000_000
ATTEMPTS = 20


@dataclass(frozen=True)
class Intensities:
    """Statistics of a whole image: cut at ``low`` and ``high``, then ``mean`` and ``deviation``."""

    low: float
    high: float
    mean: float
    deviation: float

    @classmethod
    def of(cls, array: NDArray) -> Intensities:
        """Of a (D, H, W) array, read slice by slice, of which about two million voxels on a regular grid are looked
        at.
        """
        shape = array.shape
        step = max(1, math.ceil((math.prod(shape) / STATISTICS_VOXELS) ** (1 / 3)))
        rows = [
            np.asarray(array[z : z + 1])[0, ::step, ::step].astype(np.float32).ravel() for z in range(0, shape[0], step)
        ]
        values = np.concatenate(rows)
        low, high = np.percentile(values, CUT_PERCENT)
        values = values.clip(low, high)
        return cls(float(low), float(high), float(values.mean()), max(float(values.std()), 1e-6))

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
    for entry in config.corpus:
        folder, weight = split_weight(entry)
        corpus = Corpus(Path(folder))
        for case in corpus.cases:
            if case.has_image and case.labels and not is_held_out(case, config):
                found.setdefault((folder, case.case), (weight, corpus, []))[2].append(case)
    return [
        (w, SemanticCase(corpus, tuple(sorted(images, key=lambda c: c.channel))))
        for w, corpus, images in found.values()
    ]


def class_names(config: DataConfig) -> tuple[str, ...]:
    """What is labelled in everything that may be trained on, sorted: a single source's own names, the categories of
    several sources.

    Raises:
        InputError: if there is nothing.
    """
    cases = training_cases(config)
    one_source = len({case.about.source for _, case in cases}) == 1
    names = {
        label.name if one_source else label.category or label.name for _, case in cases for label in case.about.labels
    }
    if not names:
        raise InputError(f"data.corpus must hold labelled images for an automatic model, got {config.corpus or 'none'}")
    return tuple(sorted(names))


def median_spacing_mm(config: DataConfig) -> Triple:
    """The middle of the cases' spacings, axis by axis (nnU-Net's rule for the spacing of its crops)."""
    spacings = [case.about.spacing_zyx_mm for _, case in training_cases(config)]
    return as_triple(np.median(np.array(spacings), axis=0).round(4))


def target_spacing(model: SemanticModel) -> Triple | None:
    """Spacing of the crops that a model is given, zyx in mm; None for each image's own."""
    if model.config.get("spacing_zyx_mm"):
        z, y, x = model.config["spacing_zyx_mm"]
        return (z, y, x)
    edge = model.spec.spacing_mm
    return None if edge is None else (edge, edge, edge)


def class_number(label: LabelRecord, numbers: dict[str, int]) -> int:
    """The class of a structure, by the source's name for it or by its category; 0 for none."""
    return numbers.get(label.name) or numbers.get(label.category) or 0


class SemanticDataset(Dataset[dict[str, Tensor | str | int]]):
    """Index to sample: ``image`` (C, D, H, W) float32, ``target`` (1, D, H, W) uint8 class numbers; ``case``,
    ``index``, ``skipped``.

    The sample depends on seed and index alone. A damaged case is reported once, kept in ``bad``, and another is drawn
    in its place.

    Args:
        config: Corpora, split and augmentation; ``crop``, ``fill`` and ``placement`` are not used.
        classes: Names of classes 1, 2, ...; labels of other categories are background.
        shape_zyx: Crop in voxels.
        spacing_zyx_mm: Of the crops, or None for each image's own.
        channels: Images per case.
        seed: Of all randomness.
        length: Number of samples.
        start: First index.

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
        self.config, self.classes, self.shape_zyx, self.spacing_zyx_mm = config, classes, shape_zyx, spacing_zyx_mm
        self.seed, self.length, self.start = seed, length, start
        self.bad: dict[str, str] = {}
        self._statistics: dict[str, Intensities] = {}
        self._numbers = {name: number for number, name in enumerate(classes, start=1)}
        labelled = [
            (w, c)
            for w, c in training_cases(config)
            if any(class_number(label, self._numbers) for label in c.about.labels)
        ]
        if not labelled:
            corpora = ", ".join(config.corpus) or "no corpus (data.corpus is empty)"
            raise InputError(
                f"class_names must be categories of the training cases, got {', '.join(classes)}; {corpora} holds none of them"
            )
        chosen = [(w, c) for w, c in labelled if len(c.images) == channels]
        if not chosen:
            counts = sorted({len(c.images) for _, c in labelled})
            raise InputError(
                f"in_channels must be the number of images per case, got {channels}; the corpus has {counts}"
            )
        self.real = [case for _, case in chosen]
        self._warn_of_dropped()
        self._ends = np.cumsum([w for w, _ in chosen]) / sum(w for w, _ in chosen)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        """The sample of one index.

        Raises:
            InputError: if only damaged cases came up in many attempts.
        """
        number = self.start + index
        rng = np.random.default_rng([self.seed, number])
        skipped: list[str] = []
        for _ in range(ATTEMPTS):
            at = min(int(np.searchsorted(self._ends, rng.random(), side="right")), len(self.real) - 1)
            case = self.real[at]
            try:
                image, target = self._cut(case, rng)
            except (
                InputError,
                OSError,
                RuntimeError,
                ValueError,
            ) as error:  # blosc2 and zlib report a damaged chunk in several ways
                skipped.append(self._reported(case.about, error))
                continue
            return {
                "image": image,
                "target": target[None],
                "case": case.about.id,
                "index": number,
                "skipped": "\n".join(skipped),
            }
        raise InputError(f"no readable case in {ATTEMPTS} attempts at sample {number}; the last: {skipped[-1]}")

    def _warn_of_dropped(self) -> None:
        """Say how many structures of these classes are missing from the label maps."""
        for corpus in {id(case.corpus): case.corpus for case in self.real}.values():
            rows = corpus.label_table.where(
                case=[case.about.case for case in self.real if case.corpus is corpus], kept="0"
            )
            dropped = sum(
                name in self._numbers or group in self._numbers
                for name, group in zip(rows["name"], rows["category"], strict=True)
            )
            if dropped:
                rule = "count as background; prepare the corpus with --rules lenient"
                logger.warning(
                    "%d structures of these classes were dropped when %s was prepared and %s",
                    dropped,
                    corpus.folder,
                    rule,
                )

    def _reported(self, case: CaseRecord, error: Exception) -> str:
        if case.id not in self.bad:
            self.bad[case.id] = f"{case.id} ({error})"
            logger.warning("skipping a damaged case: %s", self.bad[case.id])
        return self.bad[case.id]

    def _cut(self, case: SemanticCase, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Augmented crop and class numbers."""
        frame = self._frame(case, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        flips = [axis for axis in (-3, -2, -1) if rng.random() < 0.5]
        target = torch.from_numpy(class_map(case, self._numbers, frame)).flip(flips)
        channels = []
        for image in case.images:
            array = case.corpus.image(image)
            if image.id not in self._statistics:
                self._statistics[image.id] = Intensities.of(array)
            crop, inside = sample_crop(array, frame)
            if self.config.augment == "full":
                crop = augment_intensity(crop, inside, generator, self.config.blur_probability)
            channels.append(self._statistics[image.id].scale(crop, inside).flip(flips))
        return torch.stack(channels), target

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
    """Class numbers on a frame by nearest neighbour; outside the volume, and where nothing in ``numbers`` is, 0.

    Where structures overlap (further layers of the label map), the later layer counts.
    """
    index, flags, part = [], [], []
    for axis, size in enumerate(case.about.shape_zyx):
        at = frame.origin_zyx_vox[axis] + (np.arange(frame.shape_zyx[axis]) + 0.5) * frame.step_zyx_vox[axis] - 0.5
        voxel = np.clip(np.floor(at + 0.5).astype(int), 0, size - 1)
        part.append(slice(int(voxel[0]), int(voxel[-1]) + 1))
        index.append(voxel - voxel[0])
        flags.append((at >= -0.5) & (at < size - 0.5))
    inside = flags[0][:, None, None] & flags[1][:, None] & flags[2]
    result = np.zeros(frame.shape_zyx, np.uint8)
    for layer in sorted({label.layer for label in case.about.labels}):
        values = np.asarray(case.corpus.labels(case.about, layer)[tuple(part)])[np.ix_(*index)]
        for label in case.about.labels:
            if label.layer == layer and (number := class_number(label, numbers)):
                result[(values == label.value) & inside] = number
    return result

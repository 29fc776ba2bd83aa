"""Training samples: one crop and one target per index, the same for the same seed and index in any worker and order.

The object fills a drawn share of the crop, and the crop's middle lies anywhere between the object's middle and a random
voxel of it, so that no centre prior can be learned. ``data.spacing_mm`` and ``data.placement`` give centred crops of
one spacing, as for SAM-Med3D. Generated samples come from ``synthesis.py``. Read ``training/step.py`` next.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samed3d.config import DataConfig
from samed3d.crops import is_ct, normalise, sample_crop
from samed3d.data.augment import SampleTransforms, augment_intensity, orient
from samed3d.data.corpus import GROUP_SEPARATOR, CaseRecord, Corpus, LabelRecord, in_validation
from samed3d.data.synthesis import synthetic_case
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, Triple, as_triple
from samed3d.resample import nearest_crop

logger = logging.getLogger(__name__)

MIN_TARGET_VOXELS = 20
"""A target with fewer crop voxels is drawn again: one click would cover it."""
ATTEMPTS = 20
UNION_PROBABILITY = 0.1
"""Chance that a target is the union of several structures of the case, as a whole organ is of its parts."""
AXIS_JITTER = 0.15
LARGEST_CROP = 1.2
"""A crop's edge never exceeds this multiple of the volume's longest edge."""
LABELMAP_SHARE = 0.5
"""Share of generated samples that paint a corpus's label map instead of random shapes, where the corpus has any."""

Choice = tuple[Corpus, CaseRecord, LabelRecord]
Sample = dict[str, Tensor | str | int]


@dataclass(frozen=True)
class Weighting:
    """Exponents that set how often a structure is drawn: 1 is in proportion, 0 makes all alike.

    They weigh a source's number of structures, a category's number of structures within its source, and a structure's
    volume within its category (below 0 prefers small ones).
    """

    source: float = 0.5
    category: float = 0.5
    size: float = 0.0


@dataclass(frozen=True)
class RawCrop:
    """A crop before augmentation and normalisation."""

    image: Tensor  # (C, D, H, W) raw intensities
    inside: Tensor  # (D, H, W) bool, the voxels that belong to the volume
    target: Tensor  # (D, H, W) bool mask or class numbers
    spacing_zyx_mm: Triple = (1.0, 1.0, 1.0)
    case: CaseRecord | None = None  # None for a generated crop of random shapes
    painted: bool = False  # whether intensities are generated
    is_ct: bool = False  # whether they are Hounsfield units that the model's clamp applies to


Drawn = tuple[CaseRecord | None, Callable[[], RawCrop]]


class SampleDataset(Dataset[Sample], ABC):
    """Base of the training datasets: index to sample, with augmentation and a replacement for damaged cases.

    A sample has ``image`` (C, D, H, W) float32; ``target`` (1, D, H, W); ``case``, its id; ``index``, its number in the
    run; ``skipped``, the damaged cases met on the way to it, one per line. It depends on seed and index alone, so that
    processes, workers and a resumed run draw the same. A case whose file is damaged is reported once, kept in ``bad``,
    and another is drawn in its place. A resumed run continues at sample number ``start``.

    Raises:
        InputError: if ``data.transforms`` names no transform of torchio.
    """

    needs_target = False  # whether a crop needs MIN_TARGET_VOXELS, and its axes may be reordered

    def __init__(self, config: DataConfig, seed: int, length: int, start: int = 0) -> None:
        self.config, self.seed, self.length, self.start = config, seed, length, start
        self.bad: dict[str, str] = {}
        self.transforms = SampleTransforms(config.transforms) if config.transforms else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """The sample of one index.

        Raises:
            InputError: if no usable target was found in ``ATTEMPTS`` attempts.
        """
        number = self.start + index
        rng = np.random.default_rng([self.seed, number])
        skipped: list[str] = []
        for _ in range(ATTEMPTS):
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            case, read = self._draw(rng, generator)
            try:
                crop = read()
            except (OSError, RuntimeError, ValueError) as error:  # a damaged chunk raises any of them
                if case is None:
                    raise
                if case.id not in self.bad:
                    self.bad[case.id] = f"{case.id} ({error})"
                    logger.warning("skipping a damaged case: %s", self.bad[case.id])
                skipped.append(self.bad[case.id])
                continue
            image, target = self._tensors(self._augmented(crop, rng, generator))
            if int(target.sum()) >= MIN_TARGET_VOXELS or not self.needs_target:
                return {
                    "image": image,
                    "target": target[None],
                    "case": crop.case.id if crop.case else "generated",
                    "index": number,
                    "skipped": "\n".join(skipped),
                }
        bad = f"; {len(self.bad)} cases are damaged, the last: {list(self.bad.values())[-1]}" if self.bad else ""
        what = f"no target of {MIN_TARGET_VOXELS} voxels in {ATTEMPTS} attempts at sample {number}"
        raise InputError(f"{what}; prepare the corpus with stricter rules, or use larger crops{bad}")

    @abstractmethod
    def _draw(self, rng: np.random.Generator, generator: torch.Generator) -> Drawn:
        """The case that is drawn (None for random shapes), and a function that reads or makes its crop."""

    @abstractmethod
    def _tensors(self, crop: RawCrop) -> tuple[Tensor, Tensor]:
        """Normalised image (C, D, H, W) and target (D, H, W)."""

    def _augmented(self, crop: RawCrop, rng: np.random.Generator, generator: torch.Generator) -> RawCrop:
        image, inside, target = crop.image, crop.inside, crop.target
        if self.transforms is not None:
            seed = int(rng.integers(2**62))
            image, (inside, target) = self.transforms(image, [inside, target], crop.spacing_zyx_mm, seed)
        full, blur = self.config.augment == "full", self.config.blur_probability
        *channels, inside, target = orient([*image, inside, target], rng, reorder=full and self.needs_target)
        if full and not crop.painted:
            channels = [augment_intensity(channel, inside, generator, blur) for channel in channels]
        return replace(crop, image=torch.stack(channels), inside=inside, target=target)


class CropDataset(SampleDataset):
    """Samples of one structure each for promptable models; ``target`` is bool, on the model's tensor axes.

    A corpus of the config may carry a weight, ``folder=3``: it is drawn three times as often. ``normalisation``,
    ``tensor_axes`` and ``ct_clamp_hu`` (for cases that are CT) are as in the model's spec; ``weighting`` says how often
    sources, categories and sizes are drawn.

    Raises:
        InputError: if a corpus has no case left for training, or none with a structure large enough at
            ``data.spacing_mm``.
    """

    needs_target = True

    def __init__(
        self,
        config: DataConfig,
        length: int,
        seed: int,
        start: int = 0,
        normalisation: str = "zscore_rank",
        weighting: Weighting | None = None,
        tensor_axes: str = "zyx",
        ct_clamp_hu: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(config, seed, length, start)
        self._ct: dict[str, bool] = {}
        self.normalisation, self.tensor_axes, self.ct_clamp_hu = normalisation, tensor_axes, ct_clamp_hu
        found = [
            (weight, (corpus, case, label))
            for weight, corpus, case in training_cases(config)
            for label in case.labels
            if has_enough_voxels(case, label, config.spacing_mm)
        ]
        real, maps = ([one for one in found if one[1][1].has_image == wanted] for wanted in (True, False))
        if config.corpus and not real and config.synthetic_share < 1:
            size = f" and data.spacing_mm, at which a structure needs {MIN_TARGET_VOXELS} voxels"
            check = f"check data.hold_out, data.validation_share{size if config.spacing_mm else ''}"
            raise InputError(f"no labelled image is left for training in {', '.join(config.corpus)}; {check}")
        self.real, self.real_ends = _weighted(real, weighting or Weighting())
        self.maps, self.map_ends = _weighted(maps, weighting or Weighting())

    def _draw(self, rng: np.random.Generator, generator: torch.Generator) -> Drawn:
        painted = rng.random() < self.config.synthetic_share
        if painted and not (self.maps and rng.random() < LABELMAP_SHARE):
            return None, partial(self._random_shapes, rng, generator)
        choices, ends = (self.maps, self.map_ends) if painted else (self.real, self.real_ends)
        choice = choices[int(np.searchsorted(ends, rng.random(), side="right"))]
        read = partial(self._painted_labels, choice, rng, generator) if painted else partial(self._cut, choice, rng)
        return choice[1], read

    def _tensors(self, crop: RawCrop) -> tuple[Tensor, Tensor]:
        clamp = self.ct_clamp_hu if crop.is_ct else None
        image = normalise(crop.image[0], crop.inside, self.normalisation, clamp)
        if self.tensor_axes == "xyz":
            target = rearrange(crop.target, "z y x -> x y z").contiguous()
            return rearrange(image, "c z y x -> c x y z").contiguous(), target
        return image, crop.target

    def _random_shapes(self, rng: np.random.Generator, generator: torch.Generator) -> RawCrop:
        image, labels = synthetic_case(self.config.crop, generator)
        values = np.unique(labels.numpy())
        values = values[values > 0]
        target = labels == int(rng.choice(values)) if len(values) else torch.zeros_like(labels, dtype=torch.bool)
        return RawCrop(image[None], torch.ones_like(target), target, painted=True)

    def _painted_labels(self, choice: Choice, rng: np.random.Generator, generator: torch.Generator) -> RawCrop:
        """A generated image of a real label map."""
        corpus, case, label = choice
        frame = object_frame(case, label, self.config, rng)
        given = torch.from_numpy(nearest_crop(corpus.labels(case, label.layer), frame).astype(np.int16))
        image, labels = synthetic_case(frame.shape_zyx, generator, given, deform=True)
        target = labels == label.value
        return RawCrop(image[None], torch.ones_like(target), target, crop_spacing(case, frame), case, painted=True)

    def _cut(self, choice: Choice, rng: np.random.Generator) -> RawCrop:
        """A crop of a labelled image."""
        corpus, case, label = choice
        frame = object_frame(case, label, self.config, rng)
        values = [label.value]
        if rng.random() < UNION_PROBABILITY and len(case.labels) > 1:
            values = [r.value for r in case.labels if r is label or (rng.random() < 0.5 and r.layer == label.layer)]
        image, inside = sample_crop(corpus.image(case), frame)
        target = sample_mask(corpus.labels(case, label.layer), values, frame) & inside
        if self.ct_clamp_hu is not None and case.id not in self._ct:  # may read the whole image, once
            self._ct[case.id] = is_ct(case.modality, corpus.image(case))
        clamped = self._ct.get(case.id, False)
        return RawCrop(image[None], inside, target, crop_spacing(case, frame), case, is_ct=clamped)


def crop_spacing(case: CaseRecord, frame: CropFrame) -> Triple:
    """Spacing of a crop's voxels, zyx in mm."""
    return as_triple([step * mm for step, mm in zip(frame.step_zyx_vox, case.spacing_zyx_mm, strict=True)])


def training_cases(config: DataConfig) -> Iterator[tuple[float, Corpus, CaseRecord]]:
    """Every case that may be trained on, with its corpus and the corpus's weight.

    Left out are cases whose subject is in validation or test, and whose source is held out.
    """
    for entry in config.corpus:
        folder, weight = split_weight(entry)
        corpus = Corpus(folder)
        for case in corpus.cases:
            if not (in_validation_part(case, config) or case.split == "test" or case.source in config.hold_out):
                yield weight, corpus, case


def in_validation_part(case: CaseRecord, config: DataConfig) -> bool:
    """Whether a case's subject, or one that shares an image with it, is on the validation side of the split."""
    # Any member counts: evaluation reads the sources, not the corpus, and has each subject under its own name only.
    names = {case.subject, *filter(None, case.split_group.split(GROUP_SEPARATOR))}
    return any(in_validation(name, config.validation_share, config.split_seed) for name in names)


def has_enough_voxels(case: CaseRecord, label: LabelRecord, spacing_mm: float) -> bool:
    """Whether a structure has enough voxels at a fixed spacing; with spacing 0 the crop follows it, however small."""
    return not spacing_mm or label.voxels * math.prod(case.spacing_zyx_mm) / spacing_mm**3 >= MIN_TARGET_VOXELS


def split_weight(entry: str) -> tuple[str, float]:
    """A corpus entry of the config as folder and weight: ``corpora/a=3`` is drawn three times as often as ``a``.

    Raises:
        InputError: if the weight is not a number above 0.
    """
    folder, equals, text = entry.rpartition("=")
    if not equals or Path(entry).exists():
        return entry, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise InputError(f"data.corpus weight must be a number above 0, got {text!r} in {entry!r}")
    return folder, weight


def object_frame(case: CaseRecord, label: LabelRecord, config: DataConfig, rng: np.random.Generator) -> CropFrame:
    """A crop in which the object fills a drawn share (log-uniform in ``config.fill``) of the edge, placed with jitter.

    ``config.spacing_mm`` fixes the voxels instead; ``config.placement: centred`` centres the crop on the object's box.
    """
    spacing = case.spacing_zyx_mm
    if config.spacing_mm:
        steps = [config.spacing_mm / s for s in spacing]
    else:
        extent_mm = max(n * s for n, s in zip(label.region.shape_zyx, spacing, strict=True))
        low, high = config.fill
        fill = math.exp(rng.uniform(math.log(low), math.log(high)))
        whole_mm = max(n * s for n, s in zip(case.shape_zyx, spacing, strict=True))
        step_mm = min(extent_mm / fill, LARGEST_CROP * whole_mm) / max(config.crop)
        steps = [step_mm / s * math.exp(rng.uniform(-AXIS_JITTER, AXIS_JITTER)) for s in spacing]
    region = label.region
    centre = [(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)]
    if config.placement == "centred":
        return CropFrame.centred(as_triple(centre), as_triple(steps), config.crop)
    assert label.points is not None
    voxel = label.points[int(rng.integers(len(label.points)))].tolist()
    pull = rng.random()
    middle = [pull * v + (1 - pull) * c for v, c in zip(voxel, centre, strict=True)]
    jittered = [m + rng.uniform(-0.15, 0.15) * s * n for m, s, n in zip(middle, steps, config.crop, strict=True)]
    return CropFrame.centred(as_triple(jittered), as_triple(steps), config.crop)


def sample_mask(labels: NDArray, values: list[int], frame: CropFrame) -> Tensor:
    """The structures' mask on a frame: linear interpolation of the binary mask, cut at one half."""
    reach = int(math.ceil(max(1.0, *frame.step_zyx_vox))) + 2
    part = frame.region().expand(reach).clip((labels.shape[0], labels.shape[1], labels.shape[2]))
    if part.is_empty:
        return torch.zeros(frame.shape_zyx, dtype=torch.bool)
    moved = frame.shifted(as_triple([-float(a) for a in part.start_zyx]))
    return sample_crop(np.isin(labels[part.slices], values), moved)[0] > 0.5


def _weighted(choices: list[tuple[float, Choice]], weighting: Weighting) -> tuple[list[Choice], NDArray[np.float64]]:
    """The choices, and the cumulative probability up to and including each."""
    if not choices:
        return [], np.zeros(0)

    def numbered(keys: Iterable[Any]) -> NDArray[np.int64]:
        numbers: dict[Any, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys])

    source = numbered((corpus.folder, case.source) for _, (corpus, case, _) in choices)
    category = numbered((corpus.folder, case.source, label.category) for _, (corpus, case, label) in choices)
    volumes = [label.voxels * math.prod(case.spacing_zyx_mm) for _, (_, case, label) in choices]
    size = np.array(volumes) ** weighting.size
    in_category = np.bincount(category) ** weighting.category
    home = np.zeros(len(in_category), np.int64)  # the source of each category
    home[category] = source
    in_source = np.bincount(home, weights=in_category)
    share = size / np.bincount(category, weights=size)[category] * (in_category / in_source[home])[category]
    weights = np.array([weight for weight, _ in choices]) * np.bincount(source)[source] ** weighting.source * share
    ends = np.cumsum(weights)
    ends /= ends[-1]
    ends[-1] = 1.0  # rounding must not leave a gap
    return [choice for _, choice in choices], ends

"""Training samples: one crop and one target per index, the same for the same seed and index whatever the worker or the order.

The crop follows the object, not a fixed spacing: the object fills a drawn share of it, the crop's middle lies anywhere between the object's
middle and a random voxel of it, so no centre prior can be learned. Generated samples come from ``synthesis.py``, from random shapes or from
a corpus's label maps. Read ``training/loop.py`` next.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samed3d.config import DataConfig
from samed3d.crops import normalise, sample_crop
from samed3d.data.augment import augment_intensity, orient
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord, in_validation
from samed3d.data.synthesis import synthetic_case
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, Triple, as_triple

logger = logging.getLogger(__name__)

MIN_TARGET_VOXELS = 20
"""A target with fewer crop voxels is drawn again: a click would be all there is."""
ATTEMPTS = 20
UNION_PROBABILITY = 0.1
"""Chance that a target is the union of several structures of the case (a whole organ of parts, a whole brain)."""
AXIS_JITTER = 0.15
LARGEST_CROP = 1.2
"""A crop's edge never exceeds this multiple of the volume's longest edge: more would only show emptiness."""
LABELMAP_SHARE = 0.5
"""Share of generated samples that paint a corpus's label map instead of random shapes, where the corpus has any."""

Choice = tuple[Corpus, CaseRecord]


class CropDataset(Dataset[dict[str, Tensor | str]]):
    """Index to sample: ``image`` (C, D, H, W) float32 normalised, ``target`` (1, D, H, W) bool, ``case`` its id.

    Args:
        config: What to draw.
        length: Number of samples; indices from ``start`` on, so that a resumed run goes on where it stopped.
        seed: Of all randomness.
        start: First index.
        normalisation: As in the model's spec.

    Raises:
        InputError: if a corpus has no case left for training.
    """

    def __init__(self, config: DataConfig, length: int, seed: int, start: int = 0, normalisation: str = "zscore_rank") -> None:
        self.config, self.length, self.seed, self.start, self.normalisation = config, length, seed, start, normalisation
        self.real: list[list[Choice]] = []
        self.maps: list[list[Choice]] = []
        for folder in config.corpus:
            self._add(Corpus(Path(folder)))
        if config.corpus and not self.real and config.synthetic_share < 1:
            raise InputError(
                f"no labelled image is left for training in {', '.join(config.corpus)}; check data.hold_out and data.validation_share"
            )
        self.real_weights, self.map_weights = _source_weights(self.real), _source_weights(self.maps)

    def _add(self, corpus: Corpus) -> None:
        by_source: dict[tuple[str, bool], list[Choice]] = {}
        for case in corpus.cases:
            held = case.source in self.config.hold_out or in_validation(case.subject, self.config.validation_share, self.config.split_seed)
            if case.labels and not held:
                by_source.setdefault((case.source, case.has_image), []).append((corpus, case))
        for (_, has_image), cases in sorted(by_source.items()):
            (self.real if has_image else self.maps).append(cases)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """The sample of one index.

        Raises:
            RuntimeError: if no usable target was found in many attempts.
        """
        rng = np.random.default_rng([self.seed, self.start + index])
        for _ in range(ATTEMPTS):
            image, target, case = self._draw(rng)
            if int(target.sum()) >= MIN_TARGET_VOXELS:
                return {"image": image, "target": target[None], "case": case}
        raise RuntimeError(f"no target of {MIN_TARGET_VOXELS} voxels in {ATTEMPTS} attempts at sample {self.start + index}")

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, str]:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        painted = rng.random() < self.config.synthetic_share
        image, inside, target, case = self._generated(rng, generator) if painted else self._cut(rng)
        image, inside, target = orient([image, inside, target], rng)
        if not painted:
            image = augment_intensity(image, inside, generator)
        return normalise(image, inside, self.normalisation), target, case

    def _generated(self, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, str]:
        """A painted sample with its exact mask: image, inside, target, case."""
        if self.maps and rng.random() < LABELMAP_SHARE:
            corpus, case, label = _pick(self.maps, self.map_weights, rng)
            stored = corpus.arrays(case)[1]
            frame = object_frame(stored, case.spacing_zyx_mm, label, self.config, rng)
            drawn, name = _nearest(stored, frame), case.id
            image, labels = synthetic_case(frame.shape_zyx, generator, torch.from_numpy(drawn.astype(np.int16)), deform=True)
            value = label.value
        else:
            image, labels = synthetic_case(self.config.crop, generator)
            values = np.unique(labels.numpy())
            value, name = int(rng.choice(values[values > 0])) if (values > 0).any() else 0, "generated"
        target = labels == value if value else torch.zeros_like(labels, dtype=torch.bool)
        return image, torch.ones_like(target), target, name

    def _cut(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, str]:
        """A crop of a labelled image: image, inside, target, case."""
        corpus, case, label = _pick(self.real, self.real_weights, rng)
        image, labels = corpus.arrays(case)
        assert image is not None
        frame = object_frame(labels, case.spacing_zyx_mm, label, self.config, rng)
        values = [label.value]
        if rng.random() < UNION_PROBABILITY and len(case.labels) > 1:
            values = [r.value for r in case.labels if rng.random() < 0.5 or r is label]
        crop, inside = sample_crop(image, frame)
        target = sample_mask(labels, values, frame) & inside
        return crop, inside, target, case.id


def object_frame(labels: NDArray, spacing: Triple, label: LabelRecord, config: DataConfig, rng: np.random.Generator) -> CropFrame:
    """A crop in which the object fills a drawn share (log-uniform in ``config.fill``) of the edge, placed with jitter."""
    extent_mm = max(n * s for n, s in zip(label.region.shape_zyx, spacing, strict=True))
    low, high = config.fill
    fill = math.exp(rng.uniform(math.log(low), math.log(high)))
    whole_mm = max(n * s for n, s in zip(labels.shape, spacing, strict=True))
    step_mm = min(extent_mm / fill, LARGEST_CROP * whole_mm) / max(config.crop)
    steps = [step_mm / s * math.exp(rng.uniform(-AXIS_JITTER, AXIS_JITTER)) for s in spacing]
    start = label.region.start_zyx
    inside = np.flatnonzero(labels[label.region.slices] == label.value)
    voxel = np.unravel_index(int(rng.choice(inside)), label.region.shape_zyx)
    pull = rng.random()
    middle = [a + pull * v + (1 - pull) * (n - 1) / 2 for a, v, n in zip(start, voxel, label.region.shape_zyx, strict=True)]
    jittered = [m + rng.uniform(-0.15, 0.15) * s * n for m, s, n in zip(middle, steps, config.crop, strict=True)]
    return CropFrame.centred(as_triple(jittered), as_triple(steps), config.crop)


def sample_mask(labels: NDArray, values: list[int], frame: CropFrame) -> Tensor:
    """The structures' mask on a frame: linear interpolation of the binary mask, cut at one half."""
    reach = int(math.ceil(max(1.0, *frame.step_zyx_vox))) + 2
    part = frame.region().expand(reach).clip((labels.shape[0], labels.shape[1], labels.shape[2]))
    if part.is_empty:
        return torch.zeros(frame.shape_zyx, dtype=torch.bool)
    mask = np.isin(labels[part.slices], values)
    moved = frame.shifted(as_triple([-float(a) for a in part.start_zyx]))
    return sample_crop(mask, moved)[0] > 0.5


def _nearest(labels: NDArray, frame: CropFrame) -> NDArray:
    """The label map on a frame by nearest neighbour; outside the volume is background."""
    index, inside = [], []
    for axis, size in enumerate(labels.shape):
        at = frame.origin_zyx_vox[axis] + (np.arange(frame.shape_zyx[axis]) + 0.5) * frame.step_zyx_vox[axis] - 0.5
        index.append(np.clip(np.round(at).astype(int), 0, size - 1))
        inside.append((at >= -0.5) & (at < size - 0.5))
    return labels[np.ix_(*index)] * (inside[0][:, None, None] & inside[1][:, None] & inside[2])


def _pick(groups: list[list[Choice]], weights: NDArray, rng: np.random.Generator) -> tuple[Corpus, CaseRecord, LabelRecord]:
    """A source by weight, then a case, then a structure, each uniform."""
    cases = groups[int(rng.choice(len(groups), p=weights))]
    corpus, case = cases[int(rng.integers(len(cases)))]
    return corpus, case, case.labels[int(rng.integers(len(case.labels)))]


def _source_weights(groups: list[list[Choice]]) -> NDArray:
    """Square root of the number of structures: large sources do not drown small ones, nor the reverse."""
    sizes = np.sqrt([sum(len(case.labels) for _, case in cases) for cases in groups])
    return sizes / sizes.sum() if len(groups) else sizes

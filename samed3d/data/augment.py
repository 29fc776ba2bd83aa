"""Augmentation of raw crops: axes, contrast, bias, blur, resolution and noise; and torchio, as transforms and data set.

Intensities keep their scale: normalising comes after, as the model's spec asks. Scale and place change where the crop
is cut (``data/sampling.py``). ``docs/design_notes.md`` compares the speed with torchio's, which is imported only when a
config names a transform or a caller asks for subjects.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from samed3d.data.corpus import CaseRecord, Corpus
from samed3d.errors import InputError, nearest_name
from samed3d.geometry import Triple

PERMUTE_PROBABILITY = 0.3
BLUR_SIGMA_VOX = (0.5, 1.5)


def orient(volumes: list[Tensor], rng: np.random.Generator, *, reorder: bool = True) -> list[Tensor]:
    """Mirror each axis with probability one half, all tensors alike; with ``reorder`` sometimes exchange the axes of a
    cubic crop.
    """
    axes = [axis for axis in range(3) if rng.random() < 0.5]
    order = [0, 1, 2]
    if reorder and len(set(volumes[0].shape)) == 1 and rng.random() < PERMUTE_PROBABILITY:
        order = [int(a) for a in rng.permutation(3)]
    return [v.flip(axes).permute(order).contiguous() for v in volumes]


def augment_intensity(image: Tensor, inside: Tensor, generator: Generator, blur_probability: float = 0.0) -> Tensor:
    """Change what a scanner or a contrast agent might change in (D, H, W) raw intensities.

    ``inside`` marks the voxels that belong to the volume. With a ``blur_probability`` of 0 nothing is drawn for the
    Gaussian blur, so that the other draws stay.
    """

    def chance(probability: float) -> bool:
        return bool(torch.rand(1, generator=generator) < probability)

    def between(low: float, high: float) -> float:
        return float(torch.rand(1, generator=generator)) * (high - low) + low

    chosen = image[inside]
    if chosen.numel() < 2 or float(chosen.max()) <= float(chosen.min()):
        return image
    low, high, deviation = float(chosen.min()), float(chosen.max()), float(chosen.std())
    if chance(0.5):
        image = low + (high - low) * ((image - low) / (high - low)).clamp(0, 1) ** math.exp(between(-0.5, 0.5))
    if chance(0.15):
        image = low + high - image
    if chance(0.3):
        coarse = torch.randn(1, 1, 3, 3, 3, generator=generator) * between(0.05, 0.3)
        bias = F.interpolate(coarse, size=image.shape, mode="trilinear", align_corners=True)[0, 0]
        image = low + (image - low) * (1 + bias)
    if blur_probability and chance(blur_probability):
        image = gaussian_blur(image, between(*BLUR_SIGMA_VOX))
    if chance(0.25):
        size = [max(4, int(n / between(1.2, 3.0))) for n in image.shape]
        small = F.interpolate(image[None, None], size=size, mode="trilinear", align_corners=False)
        image = F.interpolate(small, size=image.shape, mode="trilinear", align_corners=False)[0, 0]
    if chance(0.4):
        image = image + torch.randn(image.shape, generator=generator) * (between(0.0, 0.3) * deviation)
    return image


def gaussian_blur(image: Tensor, sigma_vox: float) -> Tensor:
    """(D, H, W) smoothed by a Gaussian that is cut at three deviations; border voxels are repeated outwards."""
    radius = max(1, math.ceil(3 * sigma_vox))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma_vox) ** 2)
    weights /= weights.sum()
    for axis, size in enumerate(image.shape):
        padded = image.index_select(axis, torch.arange(-radius, size + radius).clamp(0, size - 1))
        image = torch.zeros_like(image)
        for offset, weight in enumerate(weights.tolist()):
            image.add_(padded.narrow(axis, offset, size), alpha=weight)
    return image


class SampleTransforms:
    """torchio transforms in the order of the config, applied to a crop and its masks together.

    torchio gets the crop in RAS+ with its spacing, so that millimetres and anatomical axes mean what they say. Masks
    are label maps to it: only spatial transforms change them, by nearest neighbour. Each entry is one mapping from a
    transform's name to its arguments, e.g. ``{"RandomMotion": {"p": 0.1}}``.

    Raises:
        InputError: if torchio is missing, or an entry, a name or an argument is wrong; the nearest name is given.
    """

    def __init__(self, entries: Sequence[Mapping[str, Mapping[str, Any] | None]]) -> None:
        self.transforms = [_make_transform(entry) for entry in entries]

    def __call__(
        self, image: Tensor, masks: Sequence[Tensor], spacing_zyx_mm: Triple, seed: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Transform a (C, D, H, W) crop of raw intensities and its masks, each (D, H, W) bool or uint8.

        ``seed`` is that of all that the transforms draw; torch's global generator is left as it was.

        Raises:
            InputError: if a transform changes the crop's shape or fails.
        """
        import torchio

        affine = np.diag([*reversed(spacing_zyx_mm), 1.0])
        contents: dict[str, Any] = {
            f"mask{number}": torchio.LabelMap(tensor=rearrange(mask, "z y x -> 1 x y z").to(torch.uint8), affine=affine)
            for number, mask in enumerate(masks)
        }
        contents["image"] = torchio.ScalarImage(tensor=rearrange(image, "c z y x -> c x y z"), affine=affine)
        subject: Any = torchio.Subject(**contents)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for transform in self.transforms:
                try:
                    subject = transform(subject)
                except Exception as error:  # torchio raises many types
                    raise InputError(f"data.transforms {transform.name} failed: {_first_line(error)}") from error
                if subject.spatial_shape != tuple(reversed(image.shape[1:])):
                    raise InputError(
                        f"data.transforms must keep the crop's shape, but {transform.name} changed "
                        f"{tuple(image.shape[1:])} to {tuple(reversed(subject.spatial_shape))} (zyx); leave it out"
                    )
        changed = [
            rearrange(subject[f"mask{number}"].data, "1 x y z -> z y x").to(mask.dtype).contiguous()
            for number, mask in enumerate(masks)
        ]
        return rearrange(subject["image"].data, "c x y z -> c z y x").float().contiguous(), changed


def _make_transform(entry: Mapping[str, Mapping[str, Any] | None]) -> Any:
    try:
        import torchio
    except ImportError as error:
        what = "data.transforms needs torchio, which is not installed"
        raise InputError(f"{what}; pip install 'samed3d[train]'") from error
    if not isinstance(entry, Mapping) or len(entry) != 1:
        rule = "must be a list of one transform each, such as {RandomMotion: {p: 0.1}}"
        raise InputError(f"data.transforms {rule}, got {entry!r}")
    ((name, arguments),) = entry.items()
    known = {
        each: kind
        for each, kind in vars(torchio).items()
        if inspect.isclass(kind) and issubclass(kind, torchio.Transform) and not inspect.isabstract(kind)
    }
    if name not in known:
        raise InputError(f"data.transforms: torchio has no transform {name!r}; {nearest_name(name, known)}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InputError(f"data.transforms {name} must have a mapping of arguments, got {arguments!r}")
    accepted = _argument_names(known[name])
    for argument in arguments:
        if argument not in accepted:
            raise InputError(f"data.transforms {name} has no argument {argument!r}; {nearest_name(argument, accepted)}")
    try:
        return known[name](**arguments)
    except Exception as error:  # torchio raises many types
        raise InputError(f"data.transforms {name} refuses {dict(arguments)}: {_first_line(error)}") from error


def _argument_names(kind: type) -> list[str]:
    """Arguments of a transform's constructor, with those that it passes on to its base classes."""
    names: list[str] = []
    for one in kind.__mro__:
        if "__init__" not in vars(one):
            continue
        parameters = list(inspect.signature(vars(one)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def corpus_subjects(corpus: Corpus | Path | str, transform: Any = None) -> Any:
    """The labelled images of a corpus as a ``torchio.SubjectsDataset`` that reads them when asked.

    Each subject has ``image`` and ``labels`` (all layers as channels) in RAS+ with its spacing, and ``case``,
    ``source``, ``patient`` and ``names`` (label value and layer to name).

    Raises:
        InputError: if there is no corpus, or it has no labelled image.
    """
    import torchio

    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    about = corpus.folder / "corpus.json"
    subjects = [
        torchio.Subject(
            image=torchio.ScalarImage(about, reader=partial(_read, corpus, case, None)),
            labels=torchio.LabelMap(about, reader=partial(_read, corpus, case, 1 + max(r.layer for r in case.labels))),
            case=case.id,
            source=case.source,
            patient=case.subject,
            names={(label.layer, label.value): label.name for label in case.labels},
        )
        for case in corpus.cases
        if case.has_image and case.labels
    ]
    if not subjects:
        raise InputError(f"corpus must hold a labelled image, got none in {corpus.folder}")
    return torchio.SubjectsDataset(subjects, transform)


def _read(corpus: Corpus, case: CaseRecord, layers: int | None, _path: Path) -> tuple[Tensor, np.ndarray]:
    """Tensor and affine as torchio has them: of the image, or of so many layers of the label map."""
    arrays = [corpus.image(case)] if layers is None else [corpus.labels(case, layer) for layer in range(layers)]
    tensor = torch.from_numpy(rearrange([array[:] for array in arrays], "c z y x -> c x y z").copy())
    return tensor, np.diag([*reversed(case.spacing_zyx_mm), 1.0])

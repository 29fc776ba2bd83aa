"""torchio in training: any of its transforms on every training sample, and a corpus as its ``SubjectsDataset``.

torchio is imported when a config names a transform or a caller asks for subjects. ``augment.py`` is the faster
augmentation that is on by default.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from samed3d.config import nearest_name
from samed3d.data.corpus import CaseRecord, Corpus
from samed3d.errors import InputError
from samed3d.geometry import Triple


class SampleTransforms:
    """torchio transforms in the order of the config, applied to a crop and its masks together.

    torchio sees the crop in RAS+ with its spacing, so that millimetres and anatomical axes mean what they say. Masks
    are label maps to it: only spatial transforms change them, by nearest neighbour.

    Args:
        entries: One mapping each from a transform's name to its arguments, e.g. ``{"RandomMotion": {"p": 0.1}}``.

    Raises:
        InputError: if torchio is missing, or an entry, a name or an argument is wrong; the nearest name is given.
    """

    def __init__(self, entries: Sequence[Mapping[str, Mapping[str, Any] | None]]) -> None:
        self.transforms = [_make_transform(entry) for entry in entries]

    def __call__(
        self, image: Tensor, masks: Sequence[Tensor], spacing_zyx_mm: Triple, seed: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Transform one crop.

        Args:
            image: (C, D, H, W) raw intensities.
            masks: Each (D, H, W) bool or uint8.
            spacing_zyx_mm: Of the crop's voxels.
            seed: Of all that the transforms draw; torch's global generator is left as it was.

        Raises:
            InputError: if a transform changes the crop's shape or fails.
        """
        import torchio

        affine = np.diag([*reversed(spacing_zyx_mm), 1.0])
        labels = {
            f"mask{number}": torchio.LabelMap(tensor=rearrange(mask, "z y x -> 1 x y z").to(torch.uint8), affine=affine)
            for number, mask in enumerate(masks)
        }
        scalar = torchio.ScalarImage(tensor=rearrange(image, "c z y x -> c x y z"), affine=affine)
        subject: Any = torchio.Subject(image=scalar, **labels)
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
            rearrange(subject[name].data, "1 x y z -> z y x").to(mask.dtype).contiguous()
            for name, mask in zip(labels, masks, strict=True)
        ]
        return rearrange(subject["image"].data, "c x y z -> c z y x").float().contiguous(), changed


def _make_transform(entry: Mapping[str, Mapping[str, Any] | None]) -> Any:
    try:
        import torchio
    except ImportError as error:
        raise InputError(
            "data.transforms needs torchio, which is not installed; pip install 'samed3d[train]'"
        ) from error
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise InputError(
            f"data.transforms must be a list of one transform each, such as {{RandomMotion: {{p: 0.1}}}}, got {entry!r}"
        )
    ((name, arguments),) = entry.items()
    known = {
        each: kind
        for each, kind in vars(torchio).items()
        if inspect.isclass(kind) and issubclass(kind, torchio.Transform) and not inspect.isabstract(kind)
    }
    if name not in known:
        raise InputError(f"data.transforms: torchio has no transform {name!r}; {nearest_name(name, known)}")
    if not isinstance(arguments or {}, Mapping):
        raise InputError(f"data.transforms {name} must have a mapping of arguments, got {arguments!r}")
    accepted = _argument_names(known[name])
    for argument in arguments or {}:
        if argument not in accepted:
            raise InputError(f"data.transforms {name} has no argument {argument!r}; {nearest_name(argument, accepted)}")
    try:
        return known[name](**(arguments or {}))
    except Exception as error:  # torchio raises many types
        raise InputError(f"data.transforms {name} refuses {dict(arguments or {})}: {_first_line(error)}") from error


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

    Args:
        corpus: A prepared corpus or its folder.
        transform: A torchio transform for every subject.

    Raises:
        InputError: if there is no corpus, or it has no labelled image.
    """
    import torchio

    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    cases = [case for case in corpus.cases if case.has_image and case.labels]
    if not cases:
        raise InputError(f"corpus must hold a labelled image, got none in {corpus.folder}")
    subjects = [
        torchio.Subject(
            image=torchio.ScalarImage(corpus.folder / "corpus.json", reader=partial(_read_image, corpus, case)),
            labels=torchio.LabelMap(corpus.folder / "corpus.json", reader=partial(_read_labels, corpus, case)),
            case=case.id,
            source=case.source,
            patient=case.subject,
            names={(label.layer, label.value): label.name for label in case.labels},
        )
        for case in cases
    ]
    return torchio.SubjectsDataset(subjects, transform)


def _read_image(corpus: Corpus, case: CaseRecord, _path: Path) -> tuple[Tensor, np.ndarray]:
    return _as_torchio([np.asarray(corpus.image(case)[:])], case)


def _read_labels(corpus: Corpus, case: CaseRecord, _path: Path) -> tuple[Tensor, np.ndarray]:
    layers = range(1 + max(label.layer for label in case.labels))
    return _as_torchio([np.asarray(corpus.labels(case, layer)[:]) for layer in layers], case)


def _as_torchio(arrays: list[np.ndarray], case: CaseRecord) -> tuple[Tensor, np.ndarray]:
    tensor = torch.from_numpy(rearrange(arrays, "c z y x -> c x y z").copy())
    return tensor, np.diag([*reversed(case.spacing_zyx_mm), 1.0])

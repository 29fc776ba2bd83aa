"""The layout that SAM-Med3D trains on: ``CATEGORY/DATASET/imagesTr/CASE.nii.gz`` with one binary
``labelsTr/CASE.nii.gz``.

There each image is stored once per category. Here the copies become one case with one structure per category: they are
found by dataset and file name, and must be equal in content when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import pack_layers, read_image
from data_prep.readers.facts import facts_of, subject_rule
from data_prep.readers.names import image_files, safe_name, subfolders, without_suffix
from data_prep.readers.totalseg import structure_masks
from samed3d.errors import InputError
from samed3d.volume import Volume
from samed3d.volume.label_maps import EmptyLabelError, grid_difference

_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR", "us": "US", "pet": "PET"}
_PARTS = ("Tr", "Ts", "Val")


@dataclass
class _Copies:
    """One case: its image and label by category."""

    images: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)


class SaMed3dReader:
    """SA-Med3D-140K's layout; see the module."""

    name = "sa_med3d"
    looks_for = "CATEGORY/DATASET/imagesTr and labelsTr (SA-Med3D-140K)"

    def recognises(self, folder: Path) -> bool:
        """Whether there are images and labels two folders down, without ``dataset.json`` (that would be nnU-Net)."""
        for category in subfolders(folder):
            for dataset in subfolders(category):
                if (
                    (dataset / "imagesTr").is_dir()
                    and (dataset / "labelsTr").is_dir()
                    and not (dataset / "dataset.json").exists()
                ):
                    return True
        return False

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality differs by dataset."""
        return facts_of(folder, self.name)

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every image once, with a label for each category that has one."""
        facts, person = self.source(folder), subject_rule(folder)
        found: dict[tuple[str, str, str], _Copies] = defaultdict(_Copies)
        for category in subfolders(folder):
            for dataset in subfolders(category):
                for part in _PARTS:
                    for path in image_files(dataset / f"images{part}"):
                        found[dataset.name, part, without_suffix(path)].images[category.name] = path
                    for path in image_files(dataset / f"labels{part}"):
                        found[dataset.name, part, without_suffix(path)].labels[category.name] = path
        cases: list[RawCase] = []
        problems = []
        for (dataset_name, part, name), copies in sorted(found.items()):
            if not copies.labels:
                if part == "Tr":
                    problems += [Problem(str(p), "image has no label in labelsTr") for p in copies.images.values()]
                continue
            if not copies.images:
                problems += [Problem(str(p), f"label has no image in images{part}") for p in copies.labels.values()]
                continue
            problems += [
                Problem(
                    str(path),
                    f"image has no label in labels{part} of this category; the case is taken with its other labels",
                )
                for category, path in copies.images.items()
                if category not in copies.labels
            ]
            paths = {f"image:{c}": str(p) for c, p in copies.images.items()} | {
                f"label:{c}": str(p) for c, p in copies.labels.items()
            }
            case_id = safe_name(f"{dataset_name}.{name}" if part == "Tr" else f"{dataset_name}.{name}.{part}")
            modality = _MODALITIES.get(dataset_name.split("_")[0].lower(), facts.modality)
            split = None if part == "Tr" else "test"
            cases.append(
                RawCase(case_id, facts.name, f"{dataset_name}.{person(name)}", modality, split, self.name, paths)
            )
        return cases, problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The image and a structure per category.

        Raises:
            InputError: if a file cannot be used, grids differ, a label is not binary, or the copies of the image are
                not one image.
        """
        copies = [path for key, path in sorted(case.paths.items()) if key.startswith("image:")]
        image = read_image(copies[0])
        _check_copies(image, copies)
        labels = [
            (key.removeprefix("label:"), Path(path))
            for key, path in sorted(case.paths.items())
            if key.startswith("label:")
        ]
        masks = structure_masks(labels, image.grid, image.source, repair_geometry=repair_geometry)
        try:
            layers = pack_layers(masks, image.grid.shape_zyx)
        except EmptyLabelError as error:
            raise EmptyLabelError(f"{error}: {', '.join(str(path) for _, path in labels)}") from error
        return RawArrays([(case.modality, image)], image.grid, layers)


def _check_copies(image: Volume, paths: list[str]) -> None:
    """That files hold the image already read: equal bytes, else equal voxels on an equal grid.

    Raises:
        InputError: for two images of one name.
    """
    first = _digest(paths[0]) if len(paths) > 1 else ""
    for path in paths[1:]:
        if _digest(path) == first:
            continue
        other = read_image(path)
        if grid_difference(image.grid, other.grid) or not np.array_equal(image.array, other.array):
            raise InputError(
                f"two different images have one dataset and name: {paths[0]} and {path}; rename one with its label"
            )


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error

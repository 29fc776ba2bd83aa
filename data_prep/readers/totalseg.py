"""TotalSegmentator's layout: one folder per subject with ``ct.nii.gz`` or ``mri.nii.gz`` and
``segmentations/STRUCTURE.nii.gz``.

``meta.csv`` at the top prescribes the split, where it is there; its "val" counts as training, as only "test" was kept
apart.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import pack_layers, read_image, read_label_on, single_structure
from data_prep.readers.facts import facts_of
from data_prep.readers.names import image_files, safe_name, subfolders, without_suffix
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume.label_maps import EmptyLabelError

_IMAGES = {"ct": "CT", "mri": "MR", "mr": "MR"}
_SPLITS = {"train": "train", "val": "train", "test": "test"}


class TotalsegReader:
    """One binary mask file per structure; see the module."""

    name = "totalseg"
    looks_for = "SUBJECT/ct.nii.gz or mri.nii.gz with SUBJECT/segmentations/ (TotalSegmentator)"

    def recognises(self, folder: Path) -> bool:
        """Whether some subfolder holds both an image and segmentations."""
        return any((sub / "segmentations").is_dir() and _images(sub) for sub in subfolders(folder))

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality where all subjects share it."""
        kinds = {_IMAGES[without_suffix(image).lower()] for sub in subfolders(folder) for image in _images(sub)}
        return facts_of(folder, self.name, modality=kinds.pop() if len(kinds) == 1 else "")

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every subject folder with an image and at least one segmentation."""
        facts, splits = self.source(folder), _splits(folder / "meta.csv")
        cases, problems = [], []
        for sub in subfolders(folder):
            images, masks = _images(sub), image_files(sub / "segmentations")
            if not images and not masks:
                continue
            reason = ""
            if not images:
                reason = "label has no image: ct.nii.gz or mri.nii.gz is missing beside segmentations"
            elif not masks:
                reason = "image has no label: segmentations is missing or empty"
            elif len(images) > 1:
                reason = f"one image is needed, got {' and '.join(p.name for p in images)}"
            if reason:
                problems.append(Problem(str(sub), reason))
                continue
            paths = {"image": str(images[0]), "segmentations": str(sub / "segmentations")}
            modality = _IMAGES[without_suffix(images[0]).lower()]
            cases.append(
                RawCase(safe_name(sub.name), facts.name, sub.name, modality, splits.get(sub.name), self.name, paths)
            )
        return cases, problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The image and its structures; files without a voxel (structures out of view) are left out.

        Raises:
            InputError: if a file cannot be used, grids differ, or every structure is empty.
        """
        image = read_image(case.paths["image"])
        folder = Path(case.paths["segmentations"])
        masks = structure_masks(
            [(without_suffix(p), p) for p in image_files(folder)],
            image.grid,
            image.source,
            repair_geometry=repair_geometry,
        )
        try:
            layers = pack_layers(masks, image.grid.shape_zyx)
        except EmptyLabelError as error:
            raise EmptyLabelError(f"{error}: {folder}") from error
        return RawArrays([(case.modality, image)], image.grid, layers)


def structure_masks(
    named: list[tuple[str, Path]], grid: Grid, image: str, *, repair_geometry: bool = False
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The masks of files that hold one structure each, one at a time; empty ones are left out.

    Args:
        named: (structure, path).
        grid: Grid of the image.
        image: The image, for messages.
        repair_geometry: As ``read_label_on``.

    Raises:
        InputError: if a file cannot be read, is on another grid, or holds more than one structure.
    """
    for name, path in named:
        try:
            array = read_label_on(grid, path, image, repair_geometry=repair_geometry)
        except EmptyLabelError:
            continue
        yield name, single_structure(array, str(path))


def _images(folder: Path) -> list[Path]:
    return [p for p in image_files(folder) if without_suffix(p).lower() in _IMAGES]


def _splits(path: Path) -> dict[str, str]:
    """Split by subject from a ``meta.csv`` (separated by semicolons or commas); empty where there is none.

    Raises:
        InputError: if it has no column for the subject.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        rows = csv.DictReader(file, delimiter=";" if ";" in first else ",")
        if "image_id" not in (rows.fieldnames or ()):
            raise InputError(f"meta.csv must have a column image_id, got {', '.join(rows.fieldnames or ())}: {path}")
        return {row["image_id"]: _SPLITS[row["split"]] for row in rows if row.get("split") in _SPLITS}

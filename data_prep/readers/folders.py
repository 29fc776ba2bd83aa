"""Layouts that folders and file names describe: TotalSegmentator, SA-Med3D-140K, and any other by two patterns."""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import FileReader, read_images
from data_prep.readers.facts import (
    common_modality,
    facts_of,
    image_files,
    modality_of_name,
    subfolders,
    subject_rule,
    without_suffix,
)
from samed3d.errors import InputError
from samed3d.volume import SUFFIXES
from samed3d.volume.label_maps import grid_difference

_Matches = dict[str, list[tuple[str, str]]]
"""Case to (channel or structure, path) of its files."""


class TotalsegReader(FileReader):
    """TotalSegmentator: ``SUBJECT/ct.nii.gz`` or ``mri.nii.gz`` with ``SUBJECT/segmentations/STRUCTURE.nii.gz``.

    ``meta.csv`` at the top prescribes the split, where it is there; its "val" counts as training, as only "test" was
    kept apart.
    """

    name = "totalseg"
    looks_for = "SUBJECT/ct.nii.gz or mri.nii.gz with SUBJECT/segmentations/ (TotalSegmentator)"
    _images = {"ct": "CT", "mri": "MR", "mr": "MR"}
    _splits = {"train": "train", "val": "train", "test": "test"}

    def recognises(self, folder: Path) -> bool:
        """Whether some subfolder holds both an image and segmentations."""
        return any((sub / "segmentations").is_dir() and self._images_of(sub) for sub in subfolders(folder))

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality where all subjects share it."""
        kinds = {modality for sub in subfolders(folder) for modality, _ in self._images_of(sub)}
        return facts_of(folder, self.name, modality=common_modality(kinds))

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every subject folder with an image and at least one segmentation.

        Raises:
            InputError: if ``meta.csv`` has no column for the subject.
        """
        facts, splits = self.source(folder), self._read_splits(folder / "meta.csv")
        for sub in subfolders(folder):
            images, masks = self._images_of(sub), image_files(sub / "segmentations")
            if masks and not images:
                yield Problem(str(sub), "label has no image: ct.nii.gz or mri.nii.gz is missing beside segmentations")
            elif images and not masks:
                yield Problem(str(sub), "image has no label: segmentations is missing or empty")
            elif len(images) > 1:
                got = " and ".join(Path(path).name for _, path in images)
                yield Problem(str(sub), f"one image is needed, got {got}")
            elif images:
                labels = [(without_suffix(path), str(path)) for path in masks]
                more = {"modality": images[0][0], "split": splits.get(sub.name)}
                yield self.case(facts, sub.name, sub.name, images, labels, **more)

    def _images_of(self, folder: Path) -> list[tuple[str, str]]:
        """(modality, path) of the images of a subject."""
        named = [(without_suffix(path).lower(), path) for path in image_files(folder)]
        return [(self._images[name], str(path)) for name, path in named if name in self._images]

    def _read_splits(self, path: Path) -> dict[str, str]:
        """Split by subject from a ``meta.csv`` (separated by semicolons or commas); empty where there is none."""
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter=";" if ";" in first else ",")
            if "image_id" not in (names := rows.fieldnames or ()):
                raise InputError(f"meta.csv must have a column image_id, got {', '.join(names)}: {path}")
            return {row["image_id"]: self._splits[row["split"]] for row in rows if row.get("split") in self._splits}


class SaMed3dReader(FileReader):
    """What SAM-Med3D trains on: ``CATEGORY/DATASET/imagesTr/CASE.nii.gz`` with one binary ``labelsTr/CASE.nii.gz``.

    There each image is stored once per category. Here the copies become one case with one structure per category: they
    are found by data set and file name, and must be equal in content when they are loaded.
    """

    name = "sa_med3d"
    looks_for = "CATEGORY/DATASET/imagesTr and labelsTr (SA-Med3D-140K)"

    def recognises(self, folder: Path) -> bool:
        """Whether there are images and labels two folders down, without ``dataset.json`` (that would be nnU-Net)."""
        return any(
            (dataset / "imagesTr").is_dir()
            and (dataset / "labelsTr").is_dir()
            and not (dataset / "dataset.json").exists()
            for category in subfolders(folder)
            for dataset in subfolders(category)
        )

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every image once, with a label for each category that has one."""
        facts, person = self.source(folder), subject_rule(folder)
        for (dataset, part, name), (copies, masks) in sorted(self._copies(folder).items()):
            if not copies:
                yield from (Problem(path, f"label has no image in images{part}") for path in masks.values())
                continue
            taken = " of this category; the case is taken with its other labels" if masks else ""
            unlabelled = [
                path for category, path in copies.items() if category not in masks and (masks or part == "Tr")
            ]
            yield from (Problem(path, f"image has no label in labels{part}{taken}") for path in unlabelled)
            if not masks:
                continue
            modality = modality_of_name(dataset) or facts.modality
            first, *others = (path for _, path in sorted(copies.items()))
            yield self.case(
                facts,
                f"{dataset}.{name}" if part == "Tr" else f"{dataset}.{name}.{part}",
                f"{dataset}.{person(name)}",
                [(modality, first)],
                sorted(masks.items()),
                modality=modality,
                split=None if part == "Tr" else "test",
                extra={f"copy_{number}": path for number, path in enumerate(others)},
            )

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The image and a structure per category.

        Raises:
            InputError: as ``FileReader.load``, or if the copies of the image are not one image.
        """
        raw = super().load(case, repair_geometry=repair_geometry)
        image, path = raw.images[0][1], case.images[0][1]
        for copy in (text for key, text in case.extra.items() if key.startswith("copy_")):
            if _digest(copy) == _digest(path):
                continue
            [(_, other)] = read_images([("", copy)])
            if grid_difference(image.grid, other.grid) or not np.array_equal(image.array, other.array):
                raise InputError(
                    f"two different images have one dataset and name: {path} and {copy}; rename one with its label"
                )
        return raw

    def _copies(self, folder: Path) -> dict[tuple[str, str, str], tuple[dict[str, str], dict[str, str]]]:
        """(data set, part, case) to its images and its labels, each by category."""
        found: dict[tuple[str, str, str], tuple[dict[str, str], dict[str, str]]] = defaultdict(lambda: ({}, {}))
        datasets = [dataset for category in subfolders(folder) for dataset in subfolders(category)]
        for dataset, part in itertools.product(datasets, ("Tr", "Ts", "Val")):
            for number, kind in enumerate(("images", "labels")):
                for path in image_files(dataset / f"{kind}{part}"):
                    found[dataset.name, part, without_suffix(path)][number][dataset.parent.name] = str(path)
        return found


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


class PlainReader(FileReader):
    """Any folder of images and labels that two patterns describe.

    A pattern is a path below the source with ``{case}``, as in ``images/{case}.nii.gz`` and
    ``labels/{case}_seg.nii.gz``. An image pattern may have ``{channel}`` (one file per channel), a label pattern
    ``{label}`` (one file per structure); ``{suffix}`` is any image suffix and ``*`` any text within a name. Without
    patterns, a few usual layouts are tried. A label map's names come from ``labels`` in ``source.json`` (name to
    value), else they are numbered.
    """

    name = "plain"
    looks_for = "images/ and labels/, or what --image-pattern and --label-pattern say"
    usual_patterns = (
        ("images/{case}{suffix}", "labels/{case}{suffix}"),
        ("images/{case}{suffix}", "labels/{case}.seg.nrrd"),
        ("images/{case}{suffix}", "masks/{case}{suffix}"),
        ("image/{case}{suffix}", "label/{case}{suffix}"),
        ("imagesTr/{case}{suffix}", "labelsTr/{case}{suffix}"),
        ("{case}/imaging{suffix}", "{case}/segmentation{suffix}"),
        ("{case}/image{suffix}", "{case}/label{suffix}"),
        ("{case}_image{suffix}", "{case}_label{suffix}"),
    )

    def __init__(self, image_pattern: str | None = None, label_pattern: str | None = None) -> None:
        """Patterns given together, or none to try ``usual_patterns`` in their order.

        Raises:
            InputError: if only one is given, or one has no ``{case}``, an unknown place, or leads out of the source.
        """
        if (image_pattern is None) != (label_pattern is None):
            raise InputError("--image-pattern and --label-pattern must be given together")
        self._patterns: Sequence[tuple[str, str]] = self.usual_patterns
        if image_pattern is not None and label_pattern is not None:
            _check_pattern("--image-pattern", image_pattern, "channel")
            _check_pattern("--label-pattern", label_pattern, "label")
            self._patterns = ((image_pattern, label_pattern),)

    def recognises(self, folder: Path) -> bool:
        """Whether some image has a label by the patterns."""
        return self._matches(folder) is not None

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every image with its label or labels.

        Raises:
            InputError: if no image has a label by the patterns.
        """
        matched = self._matches(folder)
        if matched is None:
            raise InputError(
                f"no image with a label in {folder}; say where they are with --image-pattern and --label-pattern"
            )
        facts, person = self.source(folder), subject_rule(folder)
        images, labels = matched
        of_labels = {path for files in labels.values() for _, path in files}
        images = {case: [f for f in files if f[1] not in of_labels] for case, files in images.items()}
        source_json = folder / "source.json"
        extra = {"source_json": str(source_json)} if source_json.is_file() else {}
        for case in sorted(set(labels) | {c for c, files in images.items() if files}):
            mine, masks = images.get(case, []), labels.get(case, [])
            reason = "" if mine and masks else "image has no label" if mine else "label has no image"
            if any(len({name for name, _ in files}) < len(files) for files in (mine, masks)):
                where = ", ".join(Path(path).name for _, path in (*mine, *masks))
                reason = f"two cases have the id {case!r}: {where}; rename one of them"
            path = (mine or masks)[0][1]
            yield Problem(path, reason) if reason else self.case(facts, case, person(case), mine, masks, extra=extra)

    def _matches(self, folder: Path) -> tuple[_Matches, _Matches] | None:
        """Images and labels by the first patterns by which an image of the folder has a label."""
        found = ((match_files(folder, image), match_files(folder, label)) for image, label in self._patterns)
        return next(((images, labels) for images, labels in found if set(images) & set(labels)), None)


def _check_pattern(flag: str, pattern: str, other: str) -> None:
    places = re.findall(r"\{(.*?)\}", pattern)
    if "case" not in places or set(places) - {"case", "suffix", other}:
        raise InputError(f"{flag} must have {{case}}, and may have {{{other}}} and {{suffix}}, got {pattern!r}")
    if pattern.startswith("/") or ".." in Path(pattern).parts:
        raise InputError(f"{flag} must be a path below the source, got {pattern!r}")


def match_files(folder: Path, pattern: str) -> _Matches:
    """Case to the sorted (channel or label or "", path) of the files of a folder that follow a pattern.

    The pattern is a relative path with ``{case}`` and possibly ``{channel}`` or ``{label}``; a place that comes twice
    must match alike.
    """
    expression, seen = "", set()
    for piece in re.split(r"(\{\w+\})", pattern):
        place = piece[1:-1]
        if piece[:1] != "{" or place not in ("case", "channel", "label", "suffix"):
            expression += re.escape(piece).replace(r"\*", "[^/]*")
        elif place == "suffix":
            expression += "(?:" + "|".join(map(re.escape, SUFFIXES)) + ")"
        elif place in seen:
            expression += f"(?P={place})"
        else:  # what follows a case is short: BraTS_001_t1
            expression += f"(?P<{place}>[^/]+{'' if place == 'case' else '?'})"
            seen.add(place)
    regex = re.compile(expression)
    found: _Matches = defaultdict(list)
    for path in sorted(folder.glob("/".join("*" for _ in Path(pattern).parts))):
        relative = path.relative_to(folder)
        match = regex.fullmatch(relative.as_posix())
        if match and path.is_file() and not any(part.startswith(".") for part in relative.parts):
            groups = match.groupdict()
            found[groups["case"]].append((groups.get("channel") or groups.get("label") or "", str(path)))
    return dict(found)

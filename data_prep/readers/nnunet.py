"""Layouts that a ``dataset.json`` describes: nnU-Net raw data (version 1 and 2) and the Medical Segmentation Decathlon.

nnU-Net 1 has the same ``dataset.json`` as the Decathlon, but a channel number in its file names: a list whose first
image exists under the listed name is the Decathlon's.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.cases import Problem, RawCase, SourceFacts
from data_prep.readers.assembly import FileReader
from data_prep.readers.facts import channel_names, facts_of, image_files, read_json, subject_rule, without_suffix
from data_prep.readers.labels import table_of_dataset_json
from samed3d.errors import InputError
from samed3d.volume import SUFFIXES

logger = logging.getLogger(__name__)

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_ABSENT = "listed in dataset.json but not there"
_Files = tuple[list[Path], dict[int, Path]]
"""The labels of a case (one or none), and its images by channel number."""


class _DatasetJsonReader(FileReader):
    """What both layouts share: facts and label names come from ``dataset.json``."""

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``dataset.json`` and ``source.json``."""
        about = read_json(folder / "dataset.json")
        stated = about.get("modality")
        modality = stated if isinstance(stated, str) else ", ".join(channel_names(about))
        return facts_of(folder, self.name, about, modality=modality)

    def _about(self, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """``dataset.json``, which must name its labels, and ``RawCase.extra`` of the cases that it describes."""
        path = folder / "dataset.json"
        about = read_json(path)
        table_of_dataset_json(about, path)
        files = {"dataset_json": path, "source_json": folder / "source.json"}
        return about, {key: str(file) for key, file in files.items() if file.is_file()}


class MsdReader(_DatasetJsonReader):
    """The Decathlon: ``training`` lists image and label of each case; several modalities are one 4D image."""

    name = "msd"
    looks_for = "dataset.json that lists its files in training (Decathlon)"

    def recognises(self, folder: Path) -> bool:
        """Whether ``dataset.json`` lists cases whose image has the listed name."""
        try:
            about = read_json(folder / "dataset.json")
        except InputError:
            return False
        return any((folder / entry["image"]).is_file() for entry in _entries(about, "training", "image"))

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every entry of ``training``, and of ``validation`` as in AMOS; ``test`` has no labels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        about, extra = self._about(folder)
        facts, person = self.source(folder), subject_rule(folder)
        channels = channel_names(about) or [facts.modality or "image"]
        listed: set[Path] = set()
        for entry in [*about["training"], *about.get("validation", ())]:
            if not _has_text(entry, "image", "label"):
                reason = f"training entry must name image and label, got {entry!r}"
                yield Problem(str(folder / "dataset.json"), reason)
                continue
            image, label = folder / entry["image"], folder / entry["label"]
            listed |= {image.resolve(), label.resolve()}
            if absent := [path for path in (image, label) if not path.is_file()]:
                yield Problem(str(absent[0]), _ABSENT)
                continue
            name, images = without_suffix(image), [(channel, str(image)) for channel in channels]
            yield self.case(facts, name, person(name), images, [("", str(label))], extra=extra)
        for part, what in (("imagesTr", "image"), ("labelsTr", "label")):
            spare = [p for p in image_files(folder / part) if p.resolve() not in listed]
            yield from (Problem(str(p), f"{what} is not listed in dataset.json") for p in spare)


class NnunetReader(_DatasetJsonReader):
    """nnU-Net: ``imagesTr/CASE_0000.nii.gz`` (a file per channel), ``labelsTr/CASE.nii.gz``, and the same with Ts.

    Version 2 may list its files in ``dataset`` instead, name regions made of several values, and use another
    ``file_ending``. A folder without any image is a set of label maps, from which images can be generated. Images in
    ``imagesTs`` without a ``labelsTs`` are no cases.
    """

    name = "nnunet"
    looks_for = "dataset.json with labelsTr/ (nnU-Net)"

    def recognises(self, folder: Path) -> bool:
        """Whether there is a ``dataset.json`` with a folder of labels, or one that lists its files."""
        if not (folder / "dataset.json").is_file() or (folder / "labelsTr").is_dir():
            return (folder / "dataset.json").is_file()
        try:
            return isinstance(read_json(folder / "dataset.json").get("dataset"), dict)
        except InputError:
            return False

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every label with its channels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        about, extra = self._about(folder)
        ending = str(about.get("file_ending", ".nii.gz")).lower()
        if ending not in SUFFIXES:
            rule = f"file_ending must be one of {' '.join(SUFFIXES)}, got {ending!r}"
            raise InputError(f"{rule}: {folder / 'dataset.json'}; convert the files")
        facts, person, channels = self.source(folder), subject_rule(folder), dict(enumerate(channel_names(about)))
        subjects = {str(c["case"]): str(c["subject"]) for c in about.get("cases", ()) if "case" in c and "subject" in c}
        tested = bool(image_files(folder / "labelsTs", (ending,)))
        names: set[str] = set()
        for part, found, problems in _parts(folder, about, ending):
            yield from problems
            label_maps_only = bool(part) and not image_files(folder / f"images{part}")
            if label_maps_only and not about.get("labels_only"):
                logger.warning("%s has no images%s; its labels are taken as label maps without image", folder, part)
            for name, (labels, files) in sorted(found.items()):
                if reason := "" if label_maps_only and labels else _incomplete(labels, files, len(channels)):
                    yield Problem(str([*labels, *files.values()][0]), reason)
                    continue
                images = [
                    (channels.get(number, facts.modality or f"image_{number:04d}"), str(path))
                    for number, path in sorted(files.items())
                ]
                split = "test" if part == "Ts" else "train" if tested else None
                subject, label = subjects.get(name) or person(name), str(labels[0])
                case = self.case(facts, name, subject, images, [("", label)], split=split, extra=extra)
                yield replace(case, id=f"{case.id}.{part}") if name in names else case  # the same name in Tr and Ts
                names.add(name)
        # The training list of version 1 names its labels.
        counts = Counter(folder / entry["label"] for entry in _entries(about, "training", "label"))
        twice = "listed twice in dataset.json; two cases cannot have one id, it is taken once"
        reasons = {p: twice if n > 1 else _ABSENT for p, n in counts.items() if n > 1 or not p.is_file()}
        yield from (Problem(str(path), reason) for path, reason in reasons.items())


def _incomplete(labels: list[Path], files: dict[int, Path], channels: int) -> str:
    """Why a case cannot be used; empty where all is there. ``channels``: how many ``dataset.json`` names, or 0."""
    if not labels:
        return "image has no label in the folder of labels"
    if not files:
        return "label has no image in the folder of images"
    expected = channels or max(files) + 1
    missing = sorted(set(range(expected)) - set(files))
    return f"channel {missing[0]:04d} is missing ({expected} in dataset.json)" if missing else ""


def _parts(folder: Path, about: dict[str, Any], ending: str) -> Iterator[tuple[str, dict[str, _Files], list[Problem]]]:
    """Files by case of each part ("Tr", "Ts", or "" for what ``dataset`` lists), and what is wrong with others."""
    if isinstance(about.get("dataset"), dict):
        yield "", *_listed(folder, about["dataset"])
        return
    for part in ("Tr", "Ts"):
        found: dict[str, _Files] = defaultdict(lambda: ([], {}))
        problems: list[Problem] = []
        labels = image_files(folder / f"labels{part}", (ending,))
        if part == "Ts" and not labels:
            if unlabelled := len(image_files(folder / "imagesTs", (ending,))):
                logger.info("%s: %d images in imagesTs have no labelsTs and are left out", folder.name, unlabelled)
            continue
        for path in labels:
            found[without_suffix(path, (ending,))][0].append(path)
        for path in image_files(folder / f"images{part}", (ending,)):
            if match := _CHANNEL.fullmatch(without_suffix(path, (ending,))):
                found[match.group(1)][1][int(match.group(2))] = path
            else:
                problems.append(Problem(str(path), f"image name must end in a channel number, CASE_0000{ending}"))
        files = [p for what in ("images", "labels") for p in image_files(folder / f"{what}{part}")]
        strange = [p for p in files if not p.name.lower().endswith(ending)]
        problems += [Problem(str(p), f"name must end in {ending} (file_ending of dataset.json)") for p in strange]
        yield part, found, problems


def _listed(folder: Path, listed: dict[str, Any]) -> tuple[dict[str, _Files], list[Problem]]:
    """The files that ``dataset`` of version 2 lists by case, and what is wrong with the list."""
    found: dict[str, _Files] = {}
    problems: list[Problem] = []
    for name, entry in listed.items():
        try:
            files = [folder / entry["label"]], {n: folder / p for n, p in enumerate(entry["images"])}
        except (KeyError, TypeError):
            problems.append(Problem(str(folder / "dataset.json"), f"dataset entry {name!r} must have images and label"))
            continue
        if absent := [path for path in (*files[0], *files[1].values()) if not path.is_file()]:
            problems.append(Problem(str(absent[0]), f"listed in dataset.json for case {name!r} but not there"))
        else:
            found[name] = files
    return found, problems


def _entries(about: dict[str, Any], key: str, *texts: str) -> list[dict[str, Any]]:
    """The entries of a list in ``dataset.json`` that have these texts."""
    entries = about.get(key)
    return [entry for entry in entries if _has_text(entry, *texts)] if isinstance(entries, list) else []


def _has_text(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys)

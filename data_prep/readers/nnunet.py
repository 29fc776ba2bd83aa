"""Layouts that a ``dataset.json`` describes: nnU-Net raw data (version 1 and 2) and the Medical Segmentation Decathlon.

nnU-Net has ``imagesTr/CASE_0000.nii.gz``, one file per channel, ``labelsTr/CASE.nii.gz``, and the same with Ts. Version
2 may list its files in ``dataset`` instead, name regions made of several values, and use another ``file_ending``. A
folder without any image is a set of label maps, from which images can be generated. Images in ``imagesTs`` without a
``labelsTs`` are no cases.

The Decathlon lists image and label of each case in ``training``; several modalities are one 4D image. nnU-Net 1 has the
same ``dataset.json``, but a channel number in its file names: a list whose first image exists under the listed name is
the Decathlon's.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cases import Problem, RawCase, SourceFacts
from data_prep.readers.assembly import FileReader
from data_prep.readers.facts import (
    channel_names,
    facts_of,
    image_files,
    read_json,
    safe_name,
    subject_rule,
    without_suffix,
)
from data_prep.readers.labels import table_of_dataset_json
from samed3d.errors import InputError
from samed3d.volume import SUFFIXES

logger = logging.getLogger(__name__)

_CHANNEL = re.compile(r"(.+)_(\d{4})")


class _DatasetJsonReader(FileReader):
    """What both layouts share: facts and label names come from ``dataset.json``."""

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``dataset.json`` and ``source.json``."""
        about = read_json(folder / "dataset.json")
        stated = about.get("modality")
        modality = stated if isinstance(stated, str) else ", ".join(channel_names(about))
        return facts_of(folder, self.name, about, modality=modality)

    def _extra(self, folder: Path) -> dict[str, str]:
        files = {"dataset_json": folder / "dataset.json", "source_json": folder / "source.json"}
        return {key: str(path) for key, path in files.items() if path.is_file()}


class MsdReader(_DatasetJsonReader):
    """Tasks of the Decathlon; see the module."""

    name = "msd"
    looks_for = "dataset.json that lists its files in training (Decathlon)"

    def recognises(self, folder: Path) -> bool:
        """Whether ``dataset.json`` lists cases whose image has the listed name."""
        try:
            training = read_json(folder / "dataset.json").get("training")
        except InputError:
            return False
        entries = training if isinstance(training, list) else []
        return any((folder / e["image"]).is_file() for e in entries if isinstance(e, dict) and _is_text(e, "image"))

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every entry of ``training``, and of ``validation`` as in AMOS; ``test`` has no labels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        path = folder / "dataset.json"
        about = read_json(path)
        table_of_dataset_json(about, path)
        facts, person = self.source(folder), subject_rule(folder)
        channels = channel_names(about) or [facts.modality or "image"]
        cases: dict[str, RawCase] = {}
        problems = []
        listed: set[Path] = set()
        for entry in [*about["training"], *about.get("validation", ())]:
            if not (isinstance(entry, dict) and _is_text(entry, "image", "label")):
                problems.append(Problem(str(path), f"training entry must name image and label, got {entry!r}"))
                continue
            image, label = folder / entry["image"], folder / entry["label"]
            listed |= {image.resolve(), label.resolve()}
            name = without_suffix(image)
            case_id = safe_name(name)
            if absent := [p for p in (image, label) if not p.is_file()]:
                problems.append(Problem(str(absent[0]), "listed in dataset.json but not there"))
            elif case_id in cases:
                reason = f"two cases have the id {case_id}; this one is left out, rename it"
                problems.append(Problem(str(image), reason))
            else:
                images, labels = tuple((channel, str(image)) for channel in channels), (("", str(label)),)
                about_case = (case_id, facts.name, person(name), facts.modality, None, self.name)
                cases[case_id] = RawCase(*about_case, images, labels, self._extra(folder))
        for part, what in (("imagesTr", "image"), ("labelsTr", "label")):
            spare = [p for p in image_files(folder / part) if p.resolve() not in listed]
            problems += [Problem(str(p), f"{what} is not listed in dataset.json") for p in spare]
        return list(cases.values()), problems


@dataclass
class _Files:
    """What was found of one case of nnU-Net."""

    label: Path | None = None
    channels: dict[int, Path] = field(default_factory=dict)

    def incomplete(self, channels: int) -> str:
        """Why the case cannot be used; empty where all is there. ``channels``: how many ``dataset.json`` names."""
        if self.label is None:
            return "image has no label in the folder of labels"
        if not self.channels:
            return "label has no image in the folder of images"
        expected = channels or max(self.channels) + 1
        missing = sorted(set(range(expected)) - set(self.channels))
        return f"channel {missing[0]:04d} is missing ({expected} in dataset.json)" if missing else ""


class NnunetReader(_DatasetJsonReader):
    """nnU-Net raw data; see the module."""

    name = "nnunet"
    looks_for = "dataset.json with labelsTr/ (nnU-Net)"

    def recognises(self, folder: Path) -> bool:
        """Whether there is a ``dataset.json`` with a folder of labels, or one that lists its files."""
        if not (folder / "dataset.json").is_file():
            return False
        if (folder / "labelsTr").is_dir():
            return True
        try:
            return isinstance(read_json(folder / "dataset.json").get("dataset"), dict)
        except InputError:
            return False

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every label with its channels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        path = folder / "dataset.json"
        about = read_json(path)
        table_of_dataset_json(about, path)
        ending = str(about.get("file_ending", ".nii.gz")).lower()
        if ending not in SUFFIXES:
            raise InputError(
                f"file_ending must be one of {' '.join(SUFFIXES)}, got {ending!r}: {path}; convert the files"
            )
        facts, person, channels = self.source(folder), subject_rule(folder), dict(enumerate(channel_names(about)))
        subjects = {str(c["case"]): str(c["subject"]) for c in about.get("cases", ()) if "case" in c and "subject" in c}
        tested = bool(image_files(folder / "labelsTs", (ending,)))
        cases: dict[str, RawCase] = {}
        problems: list[Problem] = []
        for part, found in _parts(folder, about, ending, problems):
            label_maps_only = bool(part) and not image_files(folder / f"images{part}")
            if label_maps_only and not about.get("labels_only"):
                logger.warning("%s has no images%s; its labels are taken as label maps without image", folder, part)
            for name, files in sorted(found.items()):
                reason = "" if label_maps_only and files.label else files.incomplete(len(channels))
                if reason:
                    problems.append(Problem(str(files.label or next(iter(files.channels.values()))), reason))
                    continue
                case_id = safe_name(name)
                case_id += f".{part}" if case_id in cases else ""  # the same name in Tr and Ts
                images = tuple(
                    (channels.get(number, facts.modality or f"image_{number:04d}"), str(p))
                    for number, p in sorted(files.channels.items())
                )
                split = "test" if part == "Ts" else "train" if tested else None
                subject = subjects.get(name) or person(name)
                about_case = (case_id, facts.name, subject, facts.modality, split, self.name)
                cases[case_id] = RawCase(*about_case, images, (("", str(files.label)),), self._extra(folder))
        return list(cases.values()), problems + _listed_but_absent(folder, about)


def _parts(
    folder: Path, about: dict[str, Any], ending: str, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, _Files]]]:
    """Files by case of each part ("Tr", "Ts", or "" for what ``dataset`` lists); what has no case's name goes to
    ``problems``.
    """
    if isinstance(about.get("dataset"), dict):
        yield "", _listed(folder, about["dataset"], problems)
        return
    for part in ("Tr", "Ts"):
        found: dict[str, _Files] = defaultdict(_Files)
        labels = image_files(folder / f"labels{part}", (ending,))
        if part == "Ts" and not labels:
            if unlabelled := len(image_files(folder / "imagesTs", (ending,))):
                logger.info("%s: %d images in imagesTs have no labelsTs and are left out", folder.name, unlabelled)
            continue
        for path in labels:
            found[without_suffix(path, (ending,))].label = path
        for path in image_files(folder / f"images{part}", (ending,)):
            match = _CHANNEL.fullmatch(without_suffix(path, (ending,)))
            if match is None:
                problems.append(Problem(str(path), f"image name must end in a channel number, CASE_0000{ending}"))
            else:
                found[match.group(1)].channels[int(match.group(2))] = path
        files = [p for what in ("images", "labels") for p in image_files(folder / f"{what}{part}")]
        strange = [p for p in files if not p.name.lower().endswith(ending)]
        problems += [Problem(str(p), f"name must end in {ending} (file_ending of dataset.json)") for p in strange]
        yield part, found


def _listed(folder: Path, listed: dict[str, Any], problems: list[Problem]) -> dict[str, _Files]:
    """The files that ``dataset`` of version 2 lists by case."""
    found: dict[str, _Files] = {}
    for name, entry in listed.items():
        try:
            files = _Files(folder / entry["label"], {n: folder / p for n, p in enumerate(entry["images"])})
        except (KeyError, TypeError):
            problems.append(Problem(str(folder / "dataset.json"), f"dataset entry {name!r} must have images and label"))
            continue
        if absent := [p for p in (files.label, *files.channels.values()) if p and not p.is_file()]:
            problems.append(Problem(str(absent[0]), f"listed in dataset.json for case {name!r} but not there"))
        else:
            found[name] = files
    return found


def _listed_but_absent(folder: Path, about: dict[str, Any]) -> list[Problem]:
    """Labels that the ``training`` list of version 1 names and that are not there, or that it names twice."""
    training = about.get("training")
    entries = training if isinstance(training, list) else []
    labels = [folder / e["label"] for e in entries if isinstance(e, dict) and _is_text(e, "label")]
    twice = "listed twice in dataset.json; two cases cannot have one id, it is taken once"
    reasons = {
        label: twice if count > 1 else "listed in dataset.json but not there"
        for label, count in Counter(labels).items()
        if count > 1 or not label.is_file()
    }
    return [Problem(str(label), reason) for label, reason in reasons.items()]


def _is_text(entry: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(entry.get(key), str) for key in keys)

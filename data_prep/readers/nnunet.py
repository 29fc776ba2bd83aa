"""nnU-Net raw data, version 1 and 2: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``, and the
same with Ts.

Version 2 may list its files in ``dataset`` instead, name regions made of several values, and use another
``file_ending``. A folder without any image is a set of label maps, from which images can be generated. Images in
``imagesTs`` without a ``labelsTs`` are no cases.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import read_images, read_label_on
from data_prep.readers.dataset_json import channel_names, label_table, stated_modality
from data_prep.readers.facts import facts_of, read_json, source_json_path, subject_rule
from data_prep.readers.names import image_files, safe_name, without_suffix
from samed3d.errors import InputError
from samed3d.volume import SUFFIXES
from samed3d.volume.label_maps import read_label_map

logger = logging.getLogger(__name__)

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass
class _Files:
    """What was found of one case."""

    label: Path | None = None
    channels: dict[int, Path] = field(default_factory=dict)


class NnunetReader:
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

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``dataset.json`` and ``source.json``."""
        about = read_json(folder / "dataset.json")
        return facts_of(folder, self.name, about, modality=stated_modality(about))

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every label with its channels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        path = folder / "dataset.json"
        about = read_json(path)
        label_table(about, path)
        ending = str(about.get("file_ending", ".nii.gz")).lower()
        if ending not in SUFFIXES:
            raise InputError(
                f"file_ending must be one of {' '.join(SUFFIXES)}, got {ending!r}: {path}; convert the files"
            )
        facts, person = self.source(folder), subject_rule(folder)
        subjects = {str(c["case"]): str(c["subject"]) for c in about.get("cases", ()) if "case" in c and "subject" in c}
        tested = bool(image_files(folder / "labelsTs", (ending,)))
        cases: list[RawCase] = []
        problems: list[Problem] = []
        for part, found in _parts(folder, about, ending, problems):
            label_maps_only = bool(part) and not image_files(folder / f"images{part}")
            if label_maps_only and not about.get("labels_only"):
                logger.warning("%s has no images%s; its labels are taken as label maps without image", folder, part)
            for name, files in sorted(found.items()):
                reason = "" if label_maps_only and files.label else _incomplete(files, len(channel_names(about)))
                if reason:
                    problems.append(Problem(str(files.label or next(iter(files.channels.values()))), reason))
                    continue
                case_id = safe_name(name)
                if case_id in {c.id for c in cases}:  # the same name in Tr and Ts
                    case_id += f".{part}"
                paths = {f"image_{number:04d}": str(p) for number, p in sorted(files.channels.items())}
                paths |= {"label": str(files.label), "dataset_json": str(path)} | source_json_path(folder)
                split = "test" if part == "Ts" else "train" if tested else None
                cases.append(
                    RawCase(
                        case_id, facts.name, subjects.get(name) or person(name), facts.modality, split, self.name, paths
                    )
                )
        return cases, problems + _listed_but_absent(folder, about)

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The channels of a case and its label; regions that overlap come in several layers.

        Raises:
            InputError: if a file cannot be used, grids differ, or a label value is not in ``dataset.json``.
        """
        path = Path(case.paths["dataset_json"])
        about = read_json(path)
        table, channels = label_table(about, path), channel_names(about)
        named = []
        for key in sorted(k for k in case.paths if k.startswith("image_")):
            number = int(key.removeprefix("image_"))
            named.append((channels[number] if number < len(channels) else case.modality or key, case.paths[key]))
        images = read_images(named, repair_geometry=repair_geometry)
        label = case.paths["label"]
        if images:
            grid = images[0][1].grid
            array = read_label_on(grid, label, images[0][1].source, repair_geometry=repair_geometry)
        else:
            array, grid = read_label_map(label)
        open_ended = facts_of(path.parent, self.name, about).label_kind == "instance"
        return RawArrays(images, grid, table.layers(array, label, open_ended=open_ended))


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
            unlabelled = len(image_files(folder / "imagesTs", (ending,)))
            if unlabelled:
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
        strange = [
            p
            for what in ("images", "labels")
            for p in image_files(folder / f"{what}{part}")
            if not p.name.lower().endswith(ending)
        ]
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
        absent = [p for p in [files.label, *files.channels.values()] if p and not p.is_file()]
        if absent:
            problems.append(Problem(str(absent[0]), f"listed in dataset.json for case {name!r} but not there"))
        else:
            found[name] = files
    return found


def _incomplete(files: _Files, channels: int) -> str:
    """Why a case cannot be used; empty where all is there."""
    if files.label is None:
        return "image has no label in the folder of labels"
    if not files.channels:
        return "label has no image in the folder of images"
    missing = sorted(set(range(channels or max(files.channels) + 1)) - set(files.channels))
    if missing:
        return f"channel {missing[0]:04d} is missing ({channels or max(files.channels) + 1} in dataset.json)"
    return ""


def _listed_but_absent(folder: Path, about: dict[str, Any]) -> list[Problem]:
    """Labels that the ``training`` list of version 1 names and that are not there, or that it names twice."""
    problems = []
    seen: set[Path] = set()
    for entry in about.get("training", ()) if isinstance(about.get("training"), list) else ():
        if not (isinstance(entry, dict) and isinstance(entry.get("label"), str)):
            continue
        label = folder / entry["label"]
        if label in seen:
            problems.append(
                Problem(str(label), "listed twice in dataset.json; two cases cannot have one id, it is taken once")
            )
        elif not label.is_file():
            problems.append(Problem(str(label), "listed in dataset.json but not there"))
        seen.add(label)
    return problems

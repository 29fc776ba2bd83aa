"""DICOM: any tree of image series with DICOM-SEG or RTSTRUCT, as hospitals and The Cancer Imaging Archive deliver it.

Headers tell what belongs together: a case is one image series with all SEGs and RTSTRUCTs that refer to it; other
series are left alone. The subject is the patient ID, or the folder at the top where there is none.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import Problem, RawArrays, RawCase, Reader, SourceFacts
from data_prep.readers.facts import facts_of, safe_name
from data_prep.readers.labels import pack_layers
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import read_volume
from samed3d.volume.dicom_labels import (
    LABEL_MODALITIES,
    DicomFile,
    looks_like_dicom,
    read_dicom_labels,
    scan_dicom,
    series_identifier,
)

logger = logging.getLogger(__name__)

_MODALITIES = {"CT": "CT", "MR": "MR", "PT": "PET", "US": "US", "NM": "NM", "CR": "X-ray", "DX": "X-ray"}
# How many files to look at before a folder counts as not DICOM.
_GLANCE = 64


class DicomReader(Reader):
    """Image series with SEG or RTSTRUCT; see the module."""

    name = "dicom"
    looks_for = "DICOM files with SEG or RTSTRUCT, at any depth"

    def recognises(self, folder: Path) -> bool:
        """Whether one of the first files below the folder is DICOM."""
        looked = 0
        for root, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                looked += 1
                if looks_like_dicom(Path(root, name)):
                    return True
                if looked >= _GLANCE:
                    return False
        return False

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality is that of each case."""
        return facts_of(folder, self.name)

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every image series that a SEG or RTSTRUCT refers to; reads all headers below the folder.

        Raises:
            InputError: if pydicom is not installed.
        """
        _check_pydicom()
        facts = self.source(folder)
        files, bad = scan_dicom(folder)
        problems = [Problem(str(path), reason) for path, reason in bad]
        series: dict[str, list[DicomFile]] = defaultdict(list)
        for file in files:
            if file.modality not in LABEL_MODALITIES:
                series[file.series].append(file)
        labels_of: dict[str, list[DicomFile]] = defaultdict(list)
        tried: set[str] = set()
        for file in files:
            if file.modality in LABEL_MODALITIES:
                target = _series_of(file, series)
                if isinstance(target, Problem):
                    problems.append(target)
                    tried.add(_person(file, folder))
                else:
                    labels_of[target].append(file)
        cases = []
        for uid, labels in sorted(labels_of.items(), key=lambda item: str(series[item[0]][0].path)):
            first = series[uid][0]
            if len({file.path.parent for file in series[uid]}) > 1:
                where = ", ".join(sorted({str(file.path.parent) for file in series[uid]}))
                problems.append(
                    Problem(
                        str(first.path.parent), f"series {uid} is spread over several folders: {where}; keep one copy"
                    )
                )
                continue
            person = _person(first, folder)
            case_id = f"{safe_name(person)}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"
            modality = _MODALITIES.get(first.modality, first.modality)
            images, masks = ((modality, str(first.path.parent)),), tuple(("", str(f.path)) for f in labels)
            about = (case_id, facts.name, person, modality, None, self.name)
            cases.append(RawCase(*about, images, masks, {"series": uid}))
        labelled = {case.subject for case in cases} | tried
        for person, path in sorted({_person(s[0], folder): s[0].path.parent for s in series.values()}.items()):
            if person not in labelled:
                problems.append(
                    Problem(str(path), f"image has no label: no SEG or RTSTRUCT refers to a series of {person}")
                )
        return cases, problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The series and every structure of its SEGs and RTSTRUCTs, those that overlap in several layers.

        Raises:
            InputError: if a file cannot be used, a label lies outside the image, or no structure has a voxel.
        """
        _check_pydicom()
        folder = Path(case.images[0][1])
        image = read_volume(folder, series=series_identifier(folder, case.extra["series"]))
        labels = [Path(path) for _, path in case.labels]
        layers = pack_layers(_all_masks(labels, image.grid), image.grid.shape_zyx, ", ".join(map(str, labels)))
        return RawArrays([(case.modality, image)], image.grid, layers)


def _all_masks(labels: list[Path], grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The structures of all files; a name that a second file uses again is told apart by the file's name."""
    owner: dict[str, Path] = {}
    for path in labels:
        for name, mask in read_dicom_labels(path, grid):
            yield (name if owner.setdefault(name, path) == path else f"{name} ({path.stem})"), mask


def _series_of(label: DicomFile, series: dict[str, list[DicomFile]]) -> str | Problem:
    """The image series a SEG or RTSTRUCT was drawn on: the one it names, else the only one of its patient in its
    coordinate system.
    """
    held = [uid for uid in label.refers_to if uid in series]
    if len(held) == 1:
        return held[0]
    if len(held) > 1:
        reason = f"{label.modality} refers to {len(held)} series: {', '.join(held)}; leave only the one it was drawn on"
    elif label.refers_to:
        there = sorted({uid for uid, files in series.items() if files[0].patient == label.patient})
        holds = ", ".join(there) or "no image series of this patient"
        reason = f"{label.modality} points at another series, {', '.join(label.refers_to)}, which is not there; there is {holds}"
    else:
        near = [
            uid
            for uid, files in series.items()
            if label.frame_of_reference
            and (files[0].frame_of_reference, files[0].patient) == (label.frame_of_reference, label.patient)
        ]
        if len(near) == 1:
            return near[0]
        reason = f"{label.modality} names no series, and {len(near)} series of this patient share its coordinate system; one is needed"
    return Problem(str(label.path), reason)


def _person(file: DicomFile, folder: Path) -> str:
    relative = file.path.relative_to(folder)
    return file.patient or (relative.parts[0] if len(relative.parts) > 1 else folder.resolve().name)


def _check_pydicom() -> None:
    from importlib.util import find_spec

    if find_spec("pydicom") is None:
        raise InputError("reading DICOM labels needs pydicom, which is not installed; pip install 'samed3d[dicom]'")

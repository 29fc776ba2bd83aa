"""DICOM: any tree of image series with DICOM-SEG or RTSTRUCT, as hospitals and The Cancer Imaging Archive deliver it.

A case is one image series with all SEGs and RTSTRUCTs that refer to it, by their headers; other series are left out.
The subject is the patient ID, or the folder at the top where there is none.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import Problem, RawArrays, RawCase
from data_prep.readers.assembly import FileReader
from data_prep.readers.facts import safe_name
from data_prep.readers.labels import pack_layers
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import read_volume
from samed3d.volume.dicom_headers import LABEL_MODALITIES, looks_like_dicom
from samed3d.volume.dicom_labels import DicomFile, read_dicom_labels, scan_dicom

_MODALITIES = {"PT": "PET", "CR": "X-ray", "DX": "X-ray"}
_FILES_TO_RECOGNISE_BY = 64


class DicomReader(FileReader):
    """Image series with SEG or RTSTRUCT; see the module."""

    name = "dicom"
    looks_for = "DICOM files with SEG or RTSTRUCT, at any depth"

    def recognises(self, folder: Path) -> bool:
        """Whether one of the first files below the folder is DICOM."""
        looked = 0
        for root, folders, names in os.walk(folder):
            folders.sort()
            first = sorted(names)[: _FILES_TO_RECOGNISE_BY - looked]
            looked += len(first)
            if any(looks_like_dicom(Path(root, name)) for name in first):
                return True
            if looked == _FILES_TO_RECOGNISE_BY:
                break
        return False

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every image series that a SEG or RTSTRUCT refers to; reads all headers below the folder.

        Raises:
            InputError: if highdicom is not installed.
        """
        _check_highdicom()
        files, bad = scan_dicom(folder)
        yield from (Problem(str(path), reason) for path, reason in bad)
        series: dict[str, list[DicomFile]] = defaultdict(list)
        for file in files:
            if file.modality not in LABEL_MODALITIES:
                series[file.series].append(file)
        labels_of: dict[str, list[DicomFile]] = defaultdict(list)
        labelled: set[str] = set()
        for file in files:
            if file.modality in LABEL_MODALITIES:
                uid, reason = _series_of(file, series)
                if uid:
                    labels_of[uid].append(file)
                else:
                    yield Problem(str(file.path), reason)
                    labelled.add(_person(file, folder))
        for uid, labels in sorted(labels_of.items(), key=lambda item: str(series[item[0]][0].path)):
            folders = sorted({str(file.path.parent) for file in series[uid]})
            if len(folders) > 1:
                reason = f"series {uid} is spread over several folders: {', '.join(folders)}; keep one copy"
                yield Problem(str(series[uid][0].path.parent), reason)
                continue
            person = _person(series[uid][0], folder)
            labelled.add(person)
            name = f"{safe_name(person)}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"
            modality = _MODALITIES.get(series[uid][0].modality, series[uid][0].modality)
            images, masks = [(modality, folders[0])], [("", str(file.path)) for file in labels]
            yield self.case(self.source(folder), name, person, images, masks, modality=modality, extra={"series": uid})
        people = {_person(files[0], folder): files[0].path.parent for files in series.values()}
        for person, path in sorted(people.items()):
            if person not in labelled:
                yield Problem(str(path), f"image has no label: no SEG or RTSTRUCT refers to a series of {person}")

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The series and every structure of its SEGs and RTSTRUCTs, those that overlap in several layers.

        Raises:
            InputError: if a file cannot be used, a label lies outside the image, or no structure has a voxel.
        """
        _check_highdicom()
        folder = Path(case.images[0][1])
        image = read_volume(folder, series=case.extra["series"], untilt="untilt" in case.extra)
        labels = [Path(path) for _, path in case.labels]
        layers = pack_layers(_all_masks(labels, image.grid), image.grid.shape_zyx, ", ".join(map(str, labels)))
        return RawArrays([(case.modality, image)], image.grid, layers)


def _all_masks(labels: list[Path], grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The structures of all files; a name that a second file uses again gets that file's name."""
    owner: dict[str, Path] = {}
    for path in labels:
        for name, mask in read_dicom_labels(path, grid):
            yield (name if owner.setdefault(name, path) == path else f"{name} ({path.stem})"), mask


def _series_of(label: DicomFile, series: dict[str, list[DicomFile]]) -> tuple[str, str]:
    """The image series that a SEG or RTSTRUCT was drawn on, or why there is none: the one it names, else the only one
    of its patient in its frame of reference.
    """
    kind = label.modality
    held = [uid for uid in label.refers_to if uid in series]
    if len(held) > 1:
        return "", f"{kind} refers to {len(held)} series: {', '.join(held)}; leave only the one it was drawn on"
    if held:
        return held[0], ""
    if label.refers_to:
        there = sorted({uid for uid, files in series.items() if files[0].patient == label.patient})
        holds = ", ".join(there) or "no image series of this patient"
        others = ", ".join(label.refers_to)
        return "", f"{kind} points at another series, {others}, which is not there; there is {holds}"
    place = (label.frame_of_reference, label.patient)
    near = [
        uid for uid, (first, *_) in series.items() if place[0] and (first.frame_of_reference, first.patient) == place
    ]
    if len(near) == 1:
        return near[0], ""
    among = f"{len(near)} series of this patient share its coordinate system"
    return "", f"{kind} names no series, and {among}; one is needed"


def _person(file: DicomFile, folder: Path) -> str:
    relative = file.path.relative_to(folder)
    return file.patient or (relative.parts[0] if len(relative.parts) > 1 else folder.resolve().name)


def _check_highdicom() -> None:
    if find_spec("highdicom") is None:
        raise InputError("reading DICOM labels needs highdicom; pip install 'samed3d[dicom]'")

"""The npz files of the CVPR 2025 challenge for interactive 3D segmentation: ``imgs``, ``gts`` and ``spacing`` of one
case per file.

Files carry no position and no names of their labels. ``spacing`` is taken as x, y, z, as the challenge's preparation
wrote it from SimpleITK; for files written otherwise, ``source.json`` may say ``"spacing_order": "zyx"``. Nothing in a
file is executed.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import LabelLayer, Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import present_values
from data_prep.readers.facts import facts_of, read_source_json, source_json_path, subject_rule, value_names
from data_prep.readers.names import image_files, safe_name, without_suffix
from samed3d.errors import InputError
from samed3d.geometry import Grid, Triple, as_triple
from samed3d.volume import Volume
from samed3d.volume.label_maps import whole_numbers

_SUFFIX = (".npz",)
_MODALITIES = {
    "ct": "CT",
    "mr": "MR",
    "mri": "MR",
    "pet": "PET",
    "us": "US",
    "microscopy": "microscopy",
    "microscope": "microscopy",
}


class NpzReader:
    """Challenge npz files; see the module."""

    name = "npz"
    looks_for = "*.npz with imgs and gts (CVPR 2025)"

    def recognises(self, folder: Path) -> bool:
        """Whether the folder's first npz file has ``imgs``."""
        files = image_files(folder, _SUFFIX)
        return bool(files) and "imgs" in _members(files[0])

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality where all file names share it."""
        kinds = {_modality(path) for path in image_files(folder, _SUFFIX)}
        return facts_of(folder, self.name, modality=kinds.pop() if len(kinds) == 1 else "")

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every npz file with an image and labels; files that hold only the one or the other are problems."""
        facts, person = self.source(folder), subject_rule(folder)
        cases, problems = [], []
        for path in image_files(folder, _SUFFIX):
            members = _members(path)
            missing = [key for key in ("imgs", "gts") if key not in members]
            if missing:
                reasons = {"imgs": "label has no image: imgs is missing", "gts": "image has no label: gts is missing"}
                reason = "not a readable npz file" if not members else "; ".join(reasons[key] for key in missing)
                problems.append(Problem(str(path), reason))
                continue
            name = without_suffix(path, _SUFFIX)
            paths = {"npz": str(path)} | source_json_path(folder)
            modality = _modality(path) or facts.modality
            cases.append(RawCase(safe_name(name), facts.name, person(name), modality, None, self.name, paths))
        return cases, problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """Image and labels of a file.

        Raises:
            InputError: if the file is damaged, an array is not 3D or of another shape, or the spacing is not three
                positive numbers.
        """
        path = Path(case.paths["npz"])
        order = str(read_source_json(path.parent).get("spacing_order", "xyz"))
        try:
            with np.load(path, allow_pickle=False) as stored:
                image, labels = stored["imgs"], stored["gts"]
                spacing = stored["spacing"] if "spacing" in stored.files else None
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(
                f"npz is damaged, or holds Python objects, which are not read: {path} ({error})"
            ) from error
        if image.ndim != 3:
            raise InputError(f"imgs must be 3D, got {image.ndim}D {image.shape}: {path}")
        if labels.shape != image.shape:
            raise InputError(
                f"image and label must share one grid: imgs is {image.shape} and gts is {labels.shape}: {path}"
            )
        low, high = _finite_range(image, path)
        if low == high:
            raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
        labels = whole_numbers(labels, str(path))
        shape = (image.shape[0], image.shape[1], image.shape[2])
        grid = Grid(shape, _spacing_xyz(spacing, order, path))
        given = value_names(case.paths)
        names = {value: given.get(value, f"label {value}") for value in present_values(labels)}
        return RawArrays([(case.modality, Volume(image, grid, str(path)))], grid, [LabelLayer(labels, names)])


def _members(path: Path) -> set[str]:
    """Names of the arrays in a file, without reading them; empty for a file that is no npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def _modality(path: Path) -> str:
    return _MODALITIES.get(path.name.split("_")[0].lower(), "")


def _finite_range(image: NDArray, path: Path) -> tuple[float, float]:
    if image.dtype.kind not in "biuf":
        raise InputError(f"imgs must hold numbers, got {image.dtype}: {path}")
    low, high = float(image.min()), float(image.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"image holds NaN or infinite voxels: {path}; replace them with the background value")
    return low, high


def _spacing_xyz(spacing: NDArray | None, order: str, path: Path) -> Triple:
    if spacing is None:
        raise InputError(f"npz must hold spacing (3 numbers, mm): {path}")
    values = np.asarray(spacing, dtype=np.float64).reshape(-1)
    if values.size != 3 or not (np.isfinite(values).all() and (values > 0).all()):
        raise InputError(f"spacing must be three numbers > 0, got {values.tolist()}: {path}")
    return as_triple(values if order == "xyz" else values[::-1])

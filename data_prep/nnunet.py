"""Labelled folders in nnU-Net layout to one corpus.

A source is a folder with ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``; or a folder of such folders. Label
maps without images are kept for generating images. Other layouts are not read yet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.data.corpus import CaseRecord, LabelRecord, write_case, write_index
from samed3d.errors import InputError
from samed3d.geometry import as_triple, bounding_region
from samed3d.volume import read_volume

logger = logging.getLogger(__name__)


def prepare(
    sources: list[Path],
    out: Path,
    *,
    max_side: int | None = None,
    min_voxels: int = 30,
    licence_flags: tuple[str, ...] = ("ok",),
    on_case: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a corpus.

    Args:
        sources: nnU-Net folders, or folders of them.
        out: Folder to make; must not hold a corpus yet.
        max_side: Coarsen volumes whose longest side has more voxels than this (for a small training cache), or None to keep all.
        min_voxels: Structures smaller than this are left out of the index (their voxels stay in the map).
        licence_flags: Take a source only if its ``licence_flag`` is one of these or absent.
        on_case: Told ``(done, total)`` after each case.

    Raises:
        InputError: if a source holds no dataset, no case is left, a case's image and labels differ in grid, a label map holds fractions, or
            ``out`` already holds a corpus.
    """
    if (out / "corpus.json").exists():
        raise InputError(f"output folder already holds a corpus: {out}; choose another or delete it")
    datasets = [d for s in sources for d in _datasets(s)]
    jobs = []
    facts = {}
    for folder in datasets:
        about = json.loads((folder / "dataset.json").read_text())
        name = folder.name
        if about.get("licence_flag", "ok") not in licence_flags:
            logger.warning("left out %s: licence_flag is %s", name, about["licence_flag"])
            continue
        facts[name] = {k: about.get(k, "") for k in ("modality", "licence", "attribution", "label_kind")}
        jobs += [(folder, about, path) for path in sorted((folder / "labelsTr").glob("*.nii.gz"))]
    if not jobs:
        where = ", ".join(map(str, sources))
        raise InputError(f"no case to prepare in {where}: no .nii.gz in labelsTr, or no licence_flag of {', '.join(licence_flags)}")
    cases: list[CaseRecord] = []
    for number, (folder, about, path) in enumerate(jobs, start=1):
        cases += _convert(folder, about, path, out, max_side, min_voxels)
        if on_case:
            on_case(number, len(jobs))
    write_index(out, cases, facts)
    return out


def _datasets(source: Path) -> list[Path]:
    found = [source] if (source / "dataset.json").exists() else sorted(p.parent for p in source.glob("*/dataset.json"))
    if not found:
        raise InputError(f"source must be a folder with dataset.json, or a folder of such folders, got {source}")
    return found


def _convert(folder: Path, about: dict, path: Path, out: Path, max_side: int | None, min_voxels: int) -> list[CaseRecord]:
    """One stored case per image channel (the same labels), or one without image."""
    name = path.name.removesuffix(".nii.gz")
    subject = next((c["subject"] for c in about.get("cases", []) if c["case"] == name), name)
    labels = read_volume(path)
    view = labels.view
    stored = np.ascontiguousarray(view.to_canonical(_whole_numbers(labels.array, path)))
    images = sorted((folder / "imagesTr").glob(f"{name}_[0-9][0-9][0-9][0-9].nii.gz"))
    channels: list[tuple[str, NDArray | None]] = [("", None)] if not images else []
    for channel, image_path in enumerate(images):
        image = read_volume(image_path)
        if image.grid.shape_zyx != labels.grid.shape_zyx or not np.allclose(image.grid.affine_ras, labels.grid.affine_ras, atol=1e-3):
            raise InputError(f"image and label must share one grid: {image_path} and {path}")
        suffix = f"_{channel:04d}" if len(images) > 1 else ""
        channels.append((suffix, np.ascontiguousarray(image.view.to_canonical(image.array))))
    strides = tuple(-(-n // max_side) if max_side else 1 for n in stored.shape)
    spacing = as_triple([s * k for s, k in zip(view.spacing_zyx_mm, strides, strict=True)])
    stored = _coarsen(stored, strides, smooth=False)
    names = {int(v): k for k, v in about.get("labels", {}).items() if isinstance(v, int)}
    records = _label_records(stored, names, min_voxels)
    shape = (stored.shape[0], stored.shape[1], stored.shape[2])
    cases = []
    for suffix, array in channels:
        modality = about.get("channel_names", {}).get(str(int(suffix[1:] or 0)), about.get("modality", ""))
        case = CaseRecord(f"{folder.name}.{name}{suffix}", folder.name, subject, modality, shape, spacing, array is not None, records)
        write_case(out, case, None if array is None else _coarsen(array, strides, smooth=True), stored)
        cases.append(case)
    return cases


def _whole_numbers(labels: NDArray, path: Path) -> NDArray:
    """Labels as integers; some tools store them as floats."""
    if labels.dtype.kind != "f":
        return labels
    if not np.array_equal(labels, np.round(labels)):
        raise InputError(f"a label map must hold whole numbers only: {path}")
    return labels.astype(np.int32)


def _label_records(labels: NDArray, names: dict[int, str], min_voxels: int) -> list[LabelRecord]:
    records = []
    for value in np.unique(labels):
        mask = labels == value
        count = int(mask.sum())
        if value != 0 and count >= min_voxels:
            records.append(LabelRecord(int(value), names.get(int(value), f"label {value}"), count, bounding_region(mask)))
    return records


def _coarsen(array: NDArray, strides: tuple[int, ...], *, smooth: bool) -> NDArray:
    """Every ``strides``-th voxel per axis; ``smooth`` takes the mean around it first (images), labels are never mixed."""
    if set(strides) == {1}:
        return array
    kept = tuple(slice(k // 2, None, k) for k in strides)
    if not smooth:
        return np.ascontiguousarray(array[kept])
    from scipy.ndimage import uniform_filter

    coarse = uniform_filter(array.astype(np.float32), size=strides)[kept]
    return (np.round(coarse) if np.issubdtype(array.dtype, np.integer) else coarse).astype(array.dtype)

"""Tiny data sets on disk in each layout that the readers know, as the real ones are laid out. Voxels are seeded and
small."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.cases import Problem, RawCase
from data_prep.readers import find_sources, load_case
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import write_volume
from tests.conftest import oblique_grid

SHAPE = (5, 6, 7)


def image_array(seed: int = 0, shape: tuple[int, int, int] = SHAPE, dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def label_array(
    values: tuple[int, ...] = (1, 2), shape: tuple[int, int, int] = SHAPE, dtype: str = "uint8"
) -> np.ndarray:
    """Each value fills one x plane; the rest is background."""
    array = np.zeros(shape, dtype)
    for n, value in enumerate(values):
        array[:, :, 1 + n] = value
    return array


def put(path: Path, array: np.ndarray, grid: Grid | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, array, grid or oblique_grid(array.shape))
    return path


def put_4d(path: Path, volumes: list[np.ndarray]) -> Path:
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(v) for v in volumes]), str(path))
    return path


def put_json(path: Path, body: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


def nnunet_v2(
    folder: Path, *, cases: tuple[str, ...] = ("case_001", "case_002"), ending: str = ".nii.gz", **changes: object
) -> Path:
    """Two channels, regions, and a labelled test part."""
    about = {
        "channel_names": {"0": "FLAIR", "1": "T1c"},
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3},
        "regions_class_order": [1, 2, 3],
        "numTraining": len(cases),
        "file_ending": ending,
        **changes,
    }
    put_json(folder / "dataset.json", about)
    for part, names in (("Tr", cases), ("Ts", ("case_101",))):
        for n, case in enumerate(names):
            put(folder / f"labels{part}" / f"{case}{ending}", label_array((1, 2, 3)))
            for channel in range(2):
                put(folder / f"images{part}" / f"{case}_{channel:04d}{ending}", image_array(10 * n + channel))
    return folder


def nnunet_v1(folder: Path) -> Path:
    """As written for nnU-Net 1: values to names, a list of files without channel numbers, unlabelled test images."""
    names = ["la_003", "la_004"]
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    about = {
        "name": "Heart",
        "licence": "CC-BY-SA 4.0",
        "reference": "King's College London",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium", "2": "wall"},
        "numTraining": 2,
        "numTest": 1,
        "training": training,
        "test": ["./imagesTs/la_001.nii.gz"],
    }
    put_json(folder / "dataset.json", about)
    for n, name in enumerate(names):
        put(folder / "imagesTr" / f"{name}_0000.nii.gz", image_array(n))
        put(folder / "labelsTr" / f"{name}.nii.gz", label_array())
    put(folder / "imagesTs" / "la_001_0000.nii.gz", image_array(9))
    return folder


def msd(folder: Path, *, modalities: int = 1) -> Path:
    """A Decathlon task: the listed names are the names on disk; several modalities are one 4D file."""
    names = ["BRATS_001", "BRATS_002"]
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    about = {
        "name": "BRATS",
        "description": "Gliomas",
        "reference": "https://www.med.upenn.edu/sbia/brats2017.html",
        "licence": "CC-BY-SA 4.0",
        "release": "2.0 04/05/2018",
        "tensorImageSize": "4D" if modalities > 1 else "3D",
        "modality": {str(n): name for n, name in enumerate(("FLAIR", "T1w", "t1gd", "T2w")[:modalities])},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor"},
        "numTraining": 2,
        "numTest": 1,
        "training": training,
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    put_json(folder / "dataset.json", about)
    for n, name in enumerate(names):
        volumes = [image_array(10 * n + m) for m in range(modalities)]
        if modalities > 1:
            put_4d(folder / "imagesTr" / f"{name}.nii.gz", volumes)
        else:
            put(folder / "imagesTr" / f"{name}.nii.gz", volumes[0], Grid(SHAPE))
        put(folder / "labelsTr" / f"{name}.nii.gz", label_array(), Grid(SHAPE))
        (folder / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"left by macOS")
    put(folder / "imagesTs" / "BRATS_485.nii.gz", image_array(9), Grid(SHAPE))
    return folder


def totalseg(folder: Path, *, image: str = "ct") -> Path:
    """Two subjects, one mask per structure (some empty), and the table that prescribes the split."""
    for n, subject in enumerate(("s0000", "s0001")):
        put(folder / subject / f"{image}.nii.gz", image_array(n))
        masks = {
            "liver": label_array((1,)),
            "spleen": np.roll(label_array((1,)), 2, axis=2),
            "prostate": np.zeros(SHAPE, np.uint8),
        }
        for name, mask in masks.items():
            put(folder / subject / "segmentations" / f"{name}.nii.gz", mask)
    (folder / "meta.csv").write_text(
        "image_id;age;gender;institute;study_type;split\ns0000;69;m;B;ct thorax;val\ns0001;52;f;C;ct;test\n"
    )
    return folder


def plain(folder: Path, *, suffix: str = ".nii.gz") -> Path:
    for n, case in enumerate(("anna", "bert")):
        put(folder / "images" / f"{case}{suffix}", image_array(n))
        put(folder / "labels" / f"{case}{suffix}", label_array())
    return folder


def sa_med3d(folder: Path) -> Path:
    """Two categories of one data set with the image stored twice, and a second data set that uses the same case
    name."""
    masks = {"liver": label_array((1,)), "spleen": np.roll(label_array((1,)), 2, axis=2)}
    for category, mask in masks.items():
        put(folder / category / "ct_WORD" / "imagesTr" / "word_0001.nii.gz", image_array(1))
        put(folder / category / "ct_WORD" / "labelsTr" / "word_0001.nii.gz", mask)
    put(folder / "liver" / "mr_CHAOS" / "imagesTr" / "word_0001.nii.gz", image_array(2))
    put(folder / "liver" / "mr_CHAOS" / "labelsTr" / "word_0001.nii.gz", masks["liver"])
    return folder


def npz(folder: Path) -> Path:
    """Two files as the challenge gives them: 8-bit image, labels, spacing in x, y, z."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(("CT_AMOS_amos_0018", "MR_ProstateT2_7")):
        np.savez_compressed(
            folder / f"{name}.npz", imgs=image_array(n, dtype="uint8"), gts=label_array(), spacing=(0.7, 0.8, 5.0)
        )
    return folder


# One spoilt case in a good data set

SPOILT = "case_001"


def to_be_spoilt(folder: Path) -> Path:
    """An nnU-Net 2 data set of three cases, of which a test spoils ``SPOILT``."""
    return nnunet_v2(folder, labels={"background": 0, "a": 1, "b": 2, "c": 3}, channel_names={"0": "CT", "1": "CT"})


def label_of(folder: Path) -> Path:
    return folder / "labelsTr" / f"{SPOILT}.nii.gz"


def image_of(folder: Path) -> Path:
    return folder / "imagesTr" / f"{SPOILT}_0000.nii.gz"


def listed(folder: Path) -> tuple[list[RawCase], list[Problem]]:
    """Cases and problems of a folder that is one data set."""
    [(reader, found)] = find_sources([folder])
    return reader.cases(found)


def reading_changes_nothing(folder: Path) -> None:
    """Read all that can be read below a folder; no byte on disk may change."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with suppress(InputError):
        for reader, source in find_sources([folder]):
            for case in reader.cases(source)[0]:
                with suppress(InputError):
                    load_case(case, repair_geometry=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

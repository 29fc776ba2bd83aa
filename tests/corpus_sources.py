"""Small labelled sources in nnU-Net layout, for tests of the corpus."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.cases import LabelLayer, RawArrays, RawCase, SourceFacts
from data_prep.clean import rules_from
from data_prep.convert import Settings, Task, store
from data_prep.manifest import write_manifest
from samed3d.geometry import RAS_DIRECTION, Grid
from samed3d.volume import Volume, write_volume

SHAPE = (20, 24, 28)
MM = Grid(SHAPE, (1.0, 1.0, 1.0))
EVERYTHING = Settings(rules_from("lenient", []))
LABELS = {"background": 0, "liver": 1, "kidney": 2}


def case_arrays(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Noise with two blocks, and their labels: value 1 in the lower half, value 2 above it."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    d, h, w = shape
    labels[1 : d // 2, 2 : h - 2, 2 : w - 2] = 1
    labels[d // 2 + 1 : d - 1, 4 : h - 4, 3 : 3 + w // 3] = 2
    return (rng.integers(0, 50, shape) + 100 * labels).astype(np.int16), labels


def write_case(folder: Path, name: str, image: np.ndarray, labels: np.ndarray, grid: Grid = MM) -> None:
    """One case of a source."""
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", image, grid)
    write_volume(folder / "labelsTr" / f"{name}.nii.gz", labels, grid)


def make_source(
    folder: Path, cases: int = 3, first_seed: int = 0, labels: dict[str, int] | None = None, **about: object
) -> Path:
    """A source of a few cases; ``about`` goes into ``dataset.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        write_case(folder, f"case{number}", *case_arrays(first_seed + number))
    body = {
        "channel_names": {"0": "CT"},
        "labels": labels or LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "licence": "CC0",
        **about,
    }
    (folder / "dataset.json").write_text(json.dumps(body))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; the lock does not count."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def store_case(
    corpus: Path,
    source: str,
    case: str,
    image: np.ndarray | None,
    labels: np.ndarray,
    spacing_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0),
    modality: str = "CT",
) -> None:
    """Put one case into a corpus without files of its source; ``case`` is its subject as well. Values are named s1, s2,
    ..."""
    grid = Grid(labels.shape, spacing_zyx[::-1], direction_lps=RAS_DIRECTION)  # stored as it is
    names = {int(v): f"s{v}" for v in np.unique(labels) if v}
    images = [] if image is None else [(modality, Volume(image, grid, case))]
    facts = SourceFacts(source, "test", modality=modality)
    task = Task(RawCase(case, source, case, modality, None, "test"), facts, EVERYTHING, str(corpus), "")
    store(task, RawArrays(images, grid, [LabelLayer(labels, names)]), [])


def store_corpus(folder: Path, modality: str = "CT") -> Path:
    """Make the stored cases a corpus."""
    for source in sorted(p for p in (folder / "records").iterdir()):
        (source / "source.json").write_text(json.dumps(asdict(SourceFacts(source.name, "test", modality=modality))))
    write_manifest(folder, json.loads(json.dumps(asdict(EVERYTHING))), [])
    return folder

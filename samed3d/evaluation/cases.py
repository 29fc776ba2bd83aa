"""Labelled volumes to measure on, straight from nnU-Net folders, with who was trained on what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from samed3d.data.corpus import in_validation
from samed3d.errors import InputError
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import grid_difference, read_label_map

SPLITS = ("val", "train", "all")


@dataclass(frozen=True)
class Split:
    """What a model was kept from: a share of subjects, and whole sources.

    Attributes:
        validation_share: Share of subjects kept back.
        seed: Of that split.
        hold_out: Sources kept back.
    """

    validation_share: float = 0.2
    seed: int = 0
    hold_out: tuple[str, ...] = ()

    def group(self, source: str, subject: str) -> str:
        """``"held-out source"``, ``"unseen subject"`` or ``"trained on"``."""
        if source in self.hold_out:
            return "held-out source"
        return "unseen subject" if in_validation(subject, self.validation_share, self.seed) else "trained on"


@dataclass(frozen=True)
class LabelledCase:
    """One image with its label map, not read yet."""

    source: str
    case: str
    subject: str
    modality: str
    group: str
    image_path: Path
    label_path: Path
    names: dict[int, str]

    def read(self) -> tuple[Volume, NDArray]:
        """The image, and the label map (D, H, W) in the file's own order.

        Raises:
            InputError: if the two do not share one grid, or the label map is not one.
            EmptyLabelError: if nothing is labelled.
        """
        image = read_volume(self.image_path)
        labels, grid = read_label_map(self.label_path)
        if difference := grid_difference(image.grid, grid):
            raise InputError(f"image and label must share one grid ({difference}): {self.image_path} and {self.label_path}")
        return image, labels


def find_cases(folders: list[Path], split: Split, which: str, limit: int | None = None) -> list[LabelledCase]:
    """Cases of nnU-Net folders (or folders of them) on one side of the split, first image channel only.

    Args:
        folders: Each with ``dataset.json``, or holding folders that have one; label-only sets are passed over.
        split: What the model was kept from.
        which: ``"val"`` (unseen subjects and held-out sources), ``"train"`` or ``"all"``.
        limit: Cases per source.

    Raises:
        InputError: for another ``which``, or when nothing is found.
    """
    if which not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {which!r}")
    found: list[LabelledCase] = []
    for folder in folders:
        datasets = [folder] if (folder / "dataset.json").exists() else sorted(p.parent for p in folder.glob("*/dataset.json"))
        for dataset in datasets:
            chosen = [c for c in _cases_of(dataset, split) if which == "all" or (c.group == "trained on") == (which == "train")]
            found += chosen[:limit]
    if not found:
        raise InputError(f"no labelled case on side {which!r} of the split in {', '.join(map(str, folders))}")
    return found


def _cases_of(dataset: Path, split: Split) -> Iterator[LabelledCase]:
    about = json.loads((dataset / "dataset.json").read_text())
    subjects = {c["case"]: c.get("subject", c["case"]) for c in about.get("cases", [])}
    names = {int(v): k for k, v in about.get("labels", {}).items() if isinstance(v, int)}
    for label_path in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        case = label_path.name.removesuffix(".nii.gz")
        image_path = dataset / "imagesTr" / f"{case}_0000.nii.gz"
        if image_path.exists():
            subject = subjects.get(case, case)
            group = split.group(dataset.name, subject)
            yield LabelledCase(dataset.name, case, subject, str(about.get("modality", "")), group, image_path, label_path, names)

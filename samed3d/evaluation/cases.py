"""Labelled volumes for evaluation, and which of them a model was trained on.

Cases come from nnU-Net folders, prepared corpora and files of the CVPR 2025 challenge. No image is read until its case
is evaluated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.data.challenge_npz import ChallengeBox, members, read_boxes, read_case
from samed3d.data.corpus import CaseRecord, Corpus, in_validation
from samed3d.errors import InputError
from samed3d.evaluation.results import TRAINED_ON, group_by
from samed3d.geometry import RAS_DIRECTION, Grid, Triple
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import EmptyLabelError, read_label_on

SPLITS = ("val", "train", "all")


@dataclass(frozen=True)
class TrainingSplit:
    """What was held out when a model was trained.

    Attributes:
        validation_share: Share of subjects.
        seed: Of that split.
        hold_out: Whole sources.
    """

    validation_share: float = 0.2
    seed: int = 0
    hold_out: tuple[str, ...] = ()

    @classmethod
    def of_models(cls, names: Sequence[str]) -> TrainingSplit:
        """The split stored in the first checkpoint that has one; the default split where none has."""
        for name in names:
            path = find_checkpoint(name.rpartition(":")[2])
            stored = read_header(path).get("training", {}).get("data") if path else None
            if stored:
                return cls(stored["validation_share"], stored["split_seed"], tuple(stored["hold_out"]))
        return cls()

    def group(self, source: str, subject: str) -> str:
        """``"held-out source"``, ``"unseen subject"`` or ``"trained on"``."""
        if source in self.hold_out:
            return "held-out source"
        return "unseen subject" if in_validation(subject, self.validation_share, self.seed) else TRAINED_ON


@dataclass
class LoadedCase:
    """A case in memory: image and (D, H, W) labels; of a challenge file also boxes, and spacing in the file's order."""

    volume: Volume
    labels: NDArray
    boxes: list[ChallengeBox] | None = None
    challenge_spacing: Triple | None = None

    @property
    def is_challenge_file(self) -> bool:
        """Whether the case is a challenge file, in which missing boxes mean that no box is given."""
        return self.challenge_spacing is not None


@dataclass(frozen=True)
class LabelledCase:
    """One image with its label map, not read yet.

    Attributes:
        source: Data set.
        case: Name, unique within the source.
        subject: Person, animal or specimen.
        modality: As the data set states it.
        group: Whether the evaluated checkpoint was trained on it, see ``TrainingSplit.group``.
        image_path: Image file, or the folder of a corpus.
        label_path: Label map, or the folder of a corpus.
        names: Names of the label values.
        load: Reads the case where the two paths are not an image and a label map.
        categories: Categories of the label values, for semantic models trained on several sources.
    """

    source: str
    case: str
    subject: str
    modality: str
    group: str
    image_path: Path
    label_path: Path
    names: dict[int, str]
    load: Callable[[], LoadedCase] | None = field(default=None, compare=False, repr=False)
    categories: dict[int, str] = field(default_factory=dict, compare=False)

    def loaded(self) -> LoadedCase:
        """The case in memory.

        Raises:
            InputError: if image and labels do not share one grid, or the label map is not one.
            EmptyLabelError: if nothing is labelled.
        """
        if self.load is not None:
            found = self.load()
        else:
            image = read_volume(self.image_path)
            found = LoadedCase(image, read_label_on(self.label_path, image.grid, str(self.image_path)))
        found.volume.modality = found.volume.modality or self.modality
        return found


def find_cases(folders: list[Path], split: TrainingSplit, which: str, limit: int | None = None) -> list[LabelledCase]:
    """Cases on one side of a split.

    Args:
        folders: Each an nnU-Net folder (first image channel only), a corpus, a folder of challenge npz files, or a
            folder of these; label-only sets are left out.
        split: What was held out of the model's training.
        which: ``"val"`` (unseen subjects and held-out sources), ``"train"`` or ``"all"``.
        limit: Cases per source.

    Raises:
        InputError: for another ``which``, when nothing is found, or when two cases have one name.
    """
    if which not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {which!r}")
    found: list[LabelledCase] = []
    for folder in folders:
        datasets = [folder] if _kind(folder) else sorted(p for p in folder.iterdir() if p.is_dir() and _kind(p))
        for dataset in datasets:
            cases = _READERS[_kind(dataset)](dataset, split)
            wanted = [case for case in cases if which in ("all", "train" if case.group == TRAINED_ON else "val")]
            found += [case for mine in group_by(wanted, lambda case: case.source).values() for case in mine[:limit]]
    if not found:
        raise InputError(f"no labelled case on side {which!r} of the split in {', '.join(map(str, folders))}")
    for (source, name), same in group_by(found, lambda case: (case.source, case.case)).items():
        if len(same) > 1:
            raise InputError(
                f"case ids must be unique within a source, got {name!r} of {source!r} twice: {same[0].image_path} and "
                f"{same[1].image_path}; give each once"
            )
    return found


def _kind(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    if (folder / "corpus.json").exists():
        return "corpus"
    if (folder / "dataset.json").exists():
        return "nnunet"
    first = next(iter(sorted(folder.glob("*.npz"))), None)
    return "npz" if first is not None and "imgs" in members(first) else ""


def _nnunet_cases(dataset: Path, split: TrainingSplit) -> Iterator[LabelledCase]:
    about = json.loads((dataset / "dataset.json").read_text())
    subjects = {c["case"]: c.get("subject", c["case"]) for c in about.get("cases", [])}
    names = {int(v): k for k, v in about.get("labels", {}).items() if isinstance(v, int)}
    for label_path in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        case = label_path.name.removesuffix(".nii.gz")
        image_path = dataset / "imagesTr" / f"{case}_0000.nii.gz"
        if image_path.exists():
            subject = subjects.get(case, case)
            group = split.group(dataset.name, subject)
            yield LabelledCase(
                dataset.name, case, subject, str(about.get("modality", "")), group, image_path, label_path, names
            )


def _corpus_cases(folder: Path, split: TrainingSplit) -> Iterator[LabelledCase]:
    corpus = Corpus(folder)
    for record in corpus.cases:
        if record.has_image and record.labels:
            names = {label.value: label.name for label in record.labels if label.layer == 0}
            load = functools.partial(_load_from_corpus, folder, record.id)
            people = (record.split_group or record.subject).split("|")
            groups = [split.group(record.source, person) for person in people]
            group = next((g for g in groups if g != TRAINED_ON), TRAINED_ON)
            yield LabelledCase(
                record.source, record.id, record.subject, record.modality, group, folder, folder, names, load=load
            )


def corpus_volume(corpus: Corpus, record: CaseRecord) -> Volume:
    """The image of a case of a corpus, in canonical axes."""
    z, y, x = record.spacing_zyx_mm
    grid = Grid(record.shape_zyx, (x, y, z), direction_lps=RAS_DIRECTION)
    return Volume(np.asarray(corpus.image(record)[:]), grid, f"{corpus.folder}:{record.id}", record.modality)


def _load_from_corpus(folder: Path, case_id: str) -> LoadedCase:
    corpus = Corpus(folder)
    record = next(r for r in corpus.cases if r.id == case_id)
    kept = [label.value for label in record.labels if label.layer == 0]
    if not kept:
        raise EmptyLabelError(f"no structure was kept: {case_id}")
    labels = np.asarray(corpus.labels(record)[:])
    return LoadedCase(corpus_volume(corpus, record), np.where(np.isin(labels, kept), labels, 0))


def _npz_cases(folder: Path, split: TrainingSplit) -> Iterator[LabelledCase]:
    for path in sorted(folder.glob("*.npz")):
        load, modality = functools.partial(_load_from_npz, path), path.name.split("_")[0]
        group = split.group(folder.name, path.stem)
        yield LabelledCase(folder.name, path.stem, path.stem, modality, group, path, _truth_beside(path), {}, load=load)


def _truth_beside(path: Path) -> Path:
    """The file with the labels of a challenge file: itself, or one of the same name in a folder ``gts`` beside it."""
    return path if "gts" in members(path) else path.parent / "gts" / path.name


def _load_from_npz(path: Path) -> LoadedCase:
    truth = _truth_beside(path)
    if not truth.exists():
        raise InputError(f"npz must hold gts, or have it in {truth}: {path}")
    image, labels, spacing = read_case(path, truth)
    # The challenge wrote SimpleITK's spacing, x first, beside z-first arrays.
    grid = Grid((image.shape[0], image.shape[1], image.shape[2]), spacing, direction_lps=RAS_DIRECTION)
    return LoadedCase(Volume(image, grid, str(path)), labels, read_boxes(path), spacing)


_READERS: dict[str, Callable[[Path, TrainingSplit], Iterator[LabelledCase]]] = {
    "nnunet": _nnunet_cases,
    "corpus": _corpus_cases,
    "npz": _npz_cases,
}

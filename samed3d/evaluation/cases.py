"""Labelled volumes for evaluation, and which of them a model was trained on.

Cases come from nnU-Net folders, prepared corpora and files of the CVPR 2025 challenge. No image is read until its case
is evaluated.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.data.challenge_npz import ChallengeBox, members, read_boxes, read_case
from samed3d.data.corpus import CaseRecord, Corpus, image_hash, shape_text
from samed3d.data.exposure import NOT_UNSEEN, SIDES, TRAINED_ON, TrainingHistory, stored_hash, subjects_of
from samed3d.errors import InputError
from samed3d.evaluation.results import group_by
from samed3d.geometry import RAS_DIRECTION, Grid, Triple
from samed3d.pages import count
from samed3d.volume import SUFFIXES, Volume, read_volume
from samed3d.volume.itk import open_header, suffix_of
from samed3d.volume.label_maps import EmptyLabelError, merged_values, read_label_on, segment_names

logger = logging.getLogger(__name__)

SPLITS = ("val", "train", "all")


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
        case: Name, unique within the source.
        group: On which side of the measured models' training it is, one of ``exposure.SIDES``; "" until it is judged.
        image_path: Image file, or the folder of a corpus; ``label_path`` likewise.
        names: Names of the label values.
        load: Reads the case where the two paths are not an image and a label map.
        categories: Categories of the label values, for semantic models trained on several sources.
        people: The subject and all that are split together with it.
        unusable: Why it cannot be measured.
        known_as: ``SOURCE/SUBJECT`` under which a measured model was trained on the very same image.
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
    people: tuple[str, ...] = ()
    unusable: str = ""
    known_as: str = ""

    def image_hash(self, shapes: Collection[str]) -> str:
        """The image's hash (``corpus.image_hash``); "" where its shape is none of ``shapes`` or it cannot be read."""
        try:
            if self.image_path.is_dir():
                corpus = Corpus(self.image_path)
                return stored_hash(corpus, next(record for record in corpus.cases if record.id == self.case))
            if self.load is not None:
                return image_hash(self.load().volume.array)
            with contextlib.suppress(InputError):  # headers that only the whole reader takes
                if shape_text(open_header(self.image_path).GetSize()[:3]) not in shapes:
                    return ""
            return image_hash(read_volume(self.image_path).array)
        except InputError as error:  # measuring it will say why
            logger.warning("not compared with the training images: %s", error)
            return ""

    def with_categories(self, category_of: Callable[[str, str], str]) -> LabelledCase:
        """The case with the category of each label's name and source."""
        return replace(self, categories={v: category_of(name, self.source) for v, name in self.names.items()})

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


@dataclass
class CaseSelection:
    """The cases of a run, and those that were left out, by reason."""

    cases: list[LabelledCase] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, case: LabelledCase) -> None:
        """Note a case that is not measured."""
        name = f"{case.source}/{case.case}"
        self.left_out.setdefault(reason, []).append(f"{name} (is {case.known_as})" if case.known_as else name)

    def described(self, most: int = 8) -> list[str]:
        """A line for each reason, with the number of cases and their names, of which at most so many."""
        return [
            f"left out {count(len(names), 'case')}, {reason}: {', '.join(names[:most])}"
            + (f" and {len(names) - most} more" if len(names) > most else "")
            for reason, names in self.left_out.items()
        ]


def find_cases(folders: list[Path], history: TrainingHistory, which: str, limit: int | None = None) -> CaseSelection:
    """Cases on one side of the measured models' training.

    Args:
        folders: Each an nnU-Net folder (first image channel only), a corpus, a folder of challenge npz files,
            ``images/`` and ``labels/``, or a folder of these.
        history: What the models were trained on.
        which: ``"val"`` (everything that they were not trained on), ``"train"`` or ``"all"``.
        limit: Cases per source.

    Raises:
        InputError: for another ``which``, when nothing is found, or when two cases have one name.
    """
    if which not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {which!r}")
    found, shapes = CaseSelection(), history.shapes
    datasets = [
        dataset
        for folder in folders
        for dataset in ([folder] if kind_of(folder) else sorted(p for p in folder.iterdir() if kind_of(p)))
    ]
    for mine in [cases for d in datasets for cases in group_by(_READERS[kind_of(d)](d), lambda c: c.source).values()]:
        taken = 0
        for case in mine:
            if case.unusable:
                found.leave_out(case.unusable, case)
            elif limit is not None and taken >= limit:
                found.leave_out(f"beyond {limit} per data set", case)
            else:
                case = _judged(case, history, shapes)
                if which == "all" or (which == "train") == (case.group in NOT_UNSEEN):
                    found.cases.append(case)
                    taken += 1
                else:
                    found.leave_out(case.group, case)
    if not found.cases:
        told = "; ".join(found.described()) or "no data set was recognised"
        remedy = "; --split all measures those too" if set(found.left_out) & set(SIDES) else ""
        raise InputError(
            f"no labelled case on side {which!r} of the split in {', '.join(map(str, folders))}: {told}{remedy}"
        )
    for (source, name), same in group_by(found.cases, lambda case: (case.source, case.case)).items():
        if len(same) > 1:
            raise InputError(
                f"case ids must be unique within a source, got {name!r} of {source!r} twice: {same[0].image_path} and "
                f"{same[1].image_path}; give each once"
            )
    return found


@contextlib.contextmanager
def only_warnings(name: str) -> Iterator[None]:
    """Without the messages of a part of the package, such as of a session about its crops."""
    said = logging.getLogger(name)
    level = said.level
    said.setLevel(logging.WARNING)
    try:
        yield
    finally:
        said.setLevel(level)


def _judged(case: LabelledCase, history: TrainingHistory, shapes: Collection[str]) -> LabelledCase:
    """The case with its side of the training: by its names, and by its image where the names say nothing against it."""
    side = history.side(case.source, case.people or (case.subject,))
    with only_warnings("samed3d.volume"):
        known = "" if side in NOT_UNSEEN or not shapes else history.known_image(case.image_hash(shapes))
    return replace(case, group=TRAINED_ON if known else side, known_as=known)


def smallest(found: CaseSelection, count: int) -> CaseSelection:
    """The smallest file of each source, of the ``count`` sources where it covers the smallest extent."""

    def longest_edge(case: LabelledCase) -> float:
        try:
            grid = case.loaded().volume.grid
            return max(n * s for n, s in zip(grid.shape_zyx, grid.spacing_zyx_mm, strict=True))
        except EmptyLabelError:
            return float("inf")

    per_source: dict[str, LabelledCase] = {}
    for case in sorted(found.cases, key=lambda case: case.image_path.stat().st_size):
        per_source.setdefault(case.source, case)
    chosen = sorted(per_source.values(), key=longest_edge)[:count]
    for case in found.cases:
        if case not in chosen:
            found.leave_out("not among the small cases of --quick", case)
    return CaseSelection(chosen, found.left_out)


def kind_of(folder: Path) -> str:
    """``"corpus"``, ``"nnunet"``, ``"plain"`` or ``"npz"``; "" for any other folder or file."""
    if not folder.is_dir():
        return ""
    if (folder / "corpus.json").exists():
        return "corpus"
    if (folder / "dataset.json").exists():
        return "nnunet"
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return "plain"
    first = next(iter(sorted(folder.glob("*.npz"))), None)
    return "npz" if first is not None and "imgs" in members(first) else ""


def _nnunet_cases(dataset: Path) -> Iterator[LabelledCase]:
    about = json.loads((dataset / "dataset.json").read_text())
    subjects = {c["case"]: c.get("subject", c["case"]) for c in about.get("cases", [])}
    names = {int(v): k for k, v in about.get("labels", {}).items() if isinstance(v, int)}
    for label_path in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        case = label_path.name.removesuffix(".nii.gz")
        image_path, modality = dataset / "imagesTr" / f"{case}_0000.nii.gz", str(about.get("modality", ""))
        who = (dataset.name, case, subjects.get(case, case), modality, "")
        unusable = "" if image_path.exists() else "no image"
        yield LabelledCase(*who, image_path, label_path, names, unusable=unusable)


def _plain_cases(folder: Path) -> Iterator[LabelledCase]:
    """``images/CASE.*`` with ``labels/CASE.*``; a ``.seg.nrrd`` names its structures."""
    images = {path.name.removesuffix(suffix_of(path)): path for path in sorted((folder / "images").iterdir())}
    for label in sorted(path for path in (folder / "labels").iterdir() if suffix_of(path) in SUFFIXES):
        case = label.name.removesuffix(suffix_of(label)).removesuffix(".seg")
        layers = segment_names(label)
        names = {value: layers[layer][own] for (layer, own), value in merged_values(layers).items()}
        image = images.get(case, folder / "images" / case)
        unusable = "" if case in images else "no image"
        yield LabelledCase(folder.name, case, case, "", "", image, label, names, unusable=unusable)


def _corpus_cases(folder: Path) -> Iterator[LabelledCase]:
    for record in Corpus(folder).cases:
        yield LabelledCase(
            record.source,
            record.id,
            record.subject,
            record.modality,
            "",
            folder,
            folder,
            {label.value: label.name for label in record.labels if label.layer == 0},
            load=functools.partial(_load_from_corpus, folder, record.id),
            people=subjects_of(record),
            unusable="" if record.has_image and record.labels else "no image" if record.labels else "no structure kept",
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


def _npz_cases(folder: Path) -> Iterator[LabelledCase]:
    for path in sorted(folder.glob("*.npz")):
        load, modality = functools.partial(_load_from_npz, path), path.name.split("_")[0]
        yield LabelledCase(folder.name, path.stem, path.stem, modality, "", path, _truth_beside(path), {}, load=load)


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


_READERS: dict[str, Callable[[Path], Iterator[LabelledCase]]] = {
    "nnunet": _nnunet_cases,
    "plain": _plain_cases,
    "corpus": _corpus_cases,
    "npz": _npz_cases,
}

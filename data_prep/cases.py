"""What a reader of source data passes to the pipeline: facts about the source, its cases, and their arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from numpy.typing import NDArray

from samed3d.geometry import Grid
from samed3d.volume import Volume


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a data set as a whole; empty where it is not stated."""

    name: str  # safe as a file name
    format: str  # of the reader
    modality: str = ""  # empty where it differs by case, too
    licence: str = ""
    licence_flag: str = "ok"  # "unclear" where no licence was stated
    attribution: str = ""
    label_kind: str = "semantic"  # one value per category; or "instance": each value is one object of one category
    url: str = ""


@dataclass(frozen=True)
class RawCase:
    """One case that has not been loaded yet; small and picklable.

    ``images`` are (channel, path) pairs; channels with one path are the volumes of one 4D file. ``labels`` are
    (structure, path) pairs, one structure per file, or one pair without a name: a map of several.
    """

    id: str  # unique within the source and safe as a file name
    source: str
    subject: str  # no subject is split between training and validation
    modality: str  # empty where the source states none
    split: str | None  # "train" or "test" where the source prescribes it
    reader: str
    images: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    extra: dict[str, str] = field(default_factory=dict)  # what else the reader needs: paths of files, options

    @property
    def paths(self) -> list[str]:
        """Everything that may name a file of the case, the image or else the label first."""
        return list(dict.fromkeys([path for _, path in (*self.images, *self.labels)] + list(self.extra.values())))

    @property
    def first_path(self) -> str:
        """The path that stands for the case in messages."""
        return next(iter(self.paths), self.id)


@dataclass(frozen=True)
class Problem:
    """An input that cannot become a case, or a warning about one that did, with the reason in one line."""

    path: str
    reason: str
    kind: str = "refused"


@dataclass
class LabelLayer:
    """Structures that do not overlap: (D, H, W) integers in the stored order of the image, and each value's name."""

    array: NDArray
    names: dict[int, str]


@dataclass
class RawArrays:
    """One case in memory: its images by channel or modality (none for a label map only), and its labels, on one grid.

    Structures that overlap lie in different layers.
    """

    images: list[tuple[str, Volume]]
    grid: Grid
    layers: list[LabelLayer] = field(default_factory=list)


class Reader(ABC):
    """One layout of source data on disk: its name for ``--format``, and what it recognises a folder by."""

    name: str = ""
    looks_for: str = ""

    def recognises(self, folder: Path) -> bool:
        """Whether ``folder`` is laid out the way this reader expects; cheap, never raises."""
        return False

    @abstractmethod
    def source(self, folder: Path) -> SourceFacts:
        """What is known of the data set in ``folder``."""

    @abstractmethod
    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every case, and every input that cannot become one; reads no voxels.

        Raises:
            InputError: if the data set as a whole cannot be read.
        """

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """The entries of a folder; of cases that share an id the first is kept, and ids that are no file names are not.

        Raises:
            InputError: as ``entries``.
        """
        kept: dict[str, RawCase] = {}
        problems: list[Problem] = []
        for entry in self.entries(folder):
            if isinstance(entry, Problem):
                problems.append(entry)
            elif not entry.id or "/" in entry.id or "\\" in entry.id or entry.id[0] == "." or entry.id == "source":
                reason = f"case id must be a plain file name, got {entry.id!r}; rename the file"
                problems.append(Problem(entry.first_path, reason))
            elif (first := kept.setdefault(entry.id.lower(), entry)) is not entry:  # some file systems take A for a
                reason = f"two cases have the id {entry.id!r}, the other is {first.first_path}; rename one"
                problems.append(Problem(entry.first_path, reason))
        return list(kept.values()), problems

    @abstractmethod
    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The arrays of one case; with ``repair_geometry``, grids that disagree are repaired instead of refused.

        Raises:
            InputError: with the reason, if the files of the case cannot be used.
        """

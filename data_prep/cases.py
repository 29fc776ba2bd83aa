"""What a reader of source data passes to the pipeline: facts about the source, its cases, and their arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from numpy.typing import NDArray

from samed3d.geometry import Grid
from samed3d.volume import Volume


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a data set as a whole.

    Attributes:
        name: Its name, safe as a file name.
        format: Name of the reader that recognised it.
        modality: Modality of all of its images ("CT", "MR", ...), or empty where it differs by case.
        licence: Licence as the source states it, or empty.
        licence_flag: "ok" where the licence was stated, "unclear" where it was not.
        attribution: Whom to cite.
        label_kind: "semantic" (one value per category) or "instance" (each value is one object of the same category).
        url: Where the data came from.
    """

    name: str
    format: str
    modality: str = ""
    licence: str = ""
    licence_flag: str = "ok"
    attribution: str = ""
    label_kind: str = "semantic"
    url: str = ""


@dataclass(frozen=True)
class RawCase:
    """One case that has not been loaded yet; small and picklable.

    Attributes:
        id: Unique within the source and safe as a file name.
        source: :attr:`SourceFacts.name`.
        subject: The person or animal; no subject is split between training and validation.
        modality: Modality of the image, or empty where the source states none.
        split: "train" or "test" where the source prescribes it, else None.
        reader: Name of the reader that loads it.
        images: (channel, path) pairs; channels with one path are the volumes of one 4D file.
        labels: (structure, path) pairs, one structure per file; or one pair without a name: a map of several.
        extra: What else the reader needs to load the case: paths of further files, or options.
    """

    id: str
    source: str
    subject: str
    modality: str
    split: str | None
    reader: str
    images: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    extra: dict[str, str] = field(default_factory=dict)

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
    """Structures that do not overlap.

    Attributes:
        array: (D, H, W) integers in the stored order of the image; 0 is background.
        names: Name of each value.
    """

    array: NDArray
    names: dict[int, str]


@dataclass
class RawArrays:
    """One case in memory.

    Attributes:
        images: (channel or modality name, image) pairs on one grid; empty for a case that is a label map only.
        grid: Grid that the images and the layers share.
        layers: Label layers; structures that overlap lie in different layers.
    """

    images: list[tuple[str, Volume]]
    grid: Grid
    layers: list[LabelLayer] = field(default_factory=list)


class Reader(ABC):
    """One layout of source data on disk.

    Attributes:
        name: What ``--format`` calls it.
        looks_for: What it recognises a folder by, for messages.
    """

    name: str = ""
    looks_for: str = ""

    def recognises(self, folder: Path) -> bool:
        """Whether ``folder`` is laid out the way this reader expects; cheap, never raises."""
        return False

    @abstractmethod
    def source(self, folder: Path) -> SourceFacts:
        """What is known of the data set in ``folder``."""

    @abstractmethod
    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every case, and every input that cannot become one; reads no voxels.

        Raises:
            InputError: if the data set as a whole cannot be read.
        """

    @abstractmethod
    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The arrays of one case; with ``repair_geometry``, grids that disagree are repaired instead of refused.

        Raises:
            InputError: with the reason, if the files of the case cannot be used.
        """

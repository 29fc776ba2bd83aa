"""What a reader of source data hands to the pipeline: facts about the source, cases, and the arrays of one case.

A reader (``readers/``) lists cases without touching a voxel and loads one case when asked; the pipeline
(``pipeline.py``) cleans and stores it. Nothing here reads or writes a file. Read ``pipeline.py`` next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

from samed3d.geometry import Grid
from samed3d.volume import Volume


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a dataset as a whole.

    Attributes:
        name: Name of the dataset, file-name safe.
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
    """One image with its labels, not yet loaded; small and picklable.

    Attributes:
        id: Unique within the source and safe as a file name.
        source: :attr:`SourceFacts.name`.
        subject: The person or animal; splits never share one.
        modality: Modality of the image, or empty where the source states none.
        split: "train" or "test" where the source prescribes it, else None.
        reader: Name of the reader in ``readers.READERS`` that loads it.
        paths: All that the reader needs to load it, by a name of its own choice.
    """

    id: str
    source: str
    subject: str
    modality: str
    split: str | None
    reader: str
    paths: dict[str, str]


@dataclass(frozen=True)
class Problem:
    """An input that cannot become a case, with the reason in one line."""

    path: str
    reason: str


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


class Reader(Protocol):
    """One layout of source data on disk."""

    name: str

    def recognises(self, folder: Path) -> bool:
        """Whether ``folder`` is laid out the way this reader expects; cheap, never raises."""
        ...

    def source(self, folder: Path) -> SourceFacts:
        """What is known of the dataset in ``folder``."""
        ...

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every case, and every input that cannot become one; reads no voxels."""
        ...

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The arrays of one case; with ``repair_geometry``, grids that disagree are mended instead of refused.

        Raises:
            InputError: with the reason, where the files of the case cannot be used.
        """
        ...

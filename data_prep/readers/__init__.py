"""Readers of source data, and which of them a folder needs.

Each reader lists cases without reading a voxel and loads one case when asked (``data_prep/cases.py``). A new layout is
a new class and a line in ``READERS``. All treat bad input alike: a file that cannot become a case is a ``Problem`` of
the listing, a case that cannot be loaded is an ``InputError`` with its reason; every dropped file is listed and nothing
on disk is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from data_prep.cases import RawArrays, RawCase, Reader
from data_prep.readers.dicom import DicomReader
from data_prep.readers.facts import safe_name, subfolders
from data_prep.readers.folders import PlainReader, SaMed3dReader, TotalsegReader
from data_prep.readers.nnunet import MsdReader, NnunetReader
from data_prep.readers.npz import NpzReader
from samed3d.errors import InputError, check_choice

logger = logging.getLogger(__name__)

# How far below a SOURCE data sets are looked for.
_MAX_DEPTH = 3


# In order of recognition: layouts that say what they are first, those that many folders resemble last.
READERS: dict[str, Reader] = {
    "msd": MsdReader(),
    "nnunet": NnunetReader(),
    "totalseg": TotalsegReader(),
    "sa_med3d": SaMed3dReader(),
    "npz": NpzReader(),
    "plain": PlainReader(),
    "dicom": DicomReader(),
}


def load_case(case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
    """The arrays of one case, by the reader that listed it; see ``Reader.load``.

    Raises:
        InputError: with the reason, where the files of the case cannot be used.
    """
    return READERS[case.reader].load(case, repair_geometry=repair_geometry)


def find_sources(
    paths: Sequence[Path], format: str | None = None, patterns: tuple[str | None, str | None] = (None, None)
) -> list[tuple[Reader, Path]]:
    """The data sets in folders, or in folders of folders (of folders), each with its reader.

    ``format`` names the reader of all of them; None recognises each by itself. ``patterns`` of images and labels are
    those of ``PlainReader`` and imply the format ``plain``.

    Raises:
        InputError: if a path is no folder, the format is unknown, nothing is recognised in a path, or two data sets
            have one name.
    """
    if format is not None:
        check_choice("--format", format, READERS)
    readers: list[Reader] = list(READERS.values()) if format is None else [READERS[format]]
    if tuple(patterns) != (None, None):
        if format not in (None, "plain"):
            raise InputError(f"--image-pattern and --label-pattern are for --format plain, got --format {format}")
        readers = [PlainReader(*patterns)]
    found: list[tuple[Reader, Path]] = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"source must be a folder, got {path}")
        here = _below(path, readers, _MAX_DEPTH)
        if not here:
            looked = "; ".join(f"{reader.name}: {reader.looks_for}" for reader in readers)
            raise InputError(f"no data set recognised in {path}; looked for {looked}")
        found += [entry for entry in here if entry[1].resolve() not in {known.resolve() for _, known in found}]
    names: dict[str, Path] = {}
    for _, folder in found:
        other = names.setdefault(safe_name(folder.resolve().name), folder)
        if other != folder:
            raise InputError(f"data sets need names of their own, got {other} and {folder}; rename one of the folders")
    return found


def _below(folder: Path, readers: Sequence[Reader], depth: int) -> list[tuple[Reader, Path]]:
    subs = subfolders(folder) if depth else []
    for reader in readers:
        if reader.recognises(folder):
            # DICOM files at some depth may lie in a folder of data sets, of which some are in another layout.
            others = [other for other in readers if other is not reader] if reader.name == "dicom" else []
            if not any(_below(sub, others, depth - 1) for sub in subs if others):
                return [(reader, folder)]
    found = [entry for sub in subs for entry in _below(sub, readers, depth - 1)]
    if found:
        for sub in subs:
            if not any(sub == known or sub in known.parents for _, known in found):
                logger.warning("nothing recognised in %s, which is left out", sub)
    return found

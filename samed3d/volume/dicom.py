"""Reading one series of a folder of DICOM slices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samed3d.errors import InputError
from samed3d.volume.files import check_dimensions, execute, one_channel
from samed3d.volume.itk import itk_reason, open_header, silenced

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)


def read_dicom(folder: Path, series: str | int | None, channel: int | None) -> tuple[sitk.Image, str, tuple[str, ...]]:
    """The picked series of a folder of DICOM slices, as a 3D image of one channel, its modality, and notes.

    Raises:
        InputError: as ``read_volume``.
    """
    import SimpleITK as sitk

    uid, names = _files_of(folder, series)
    modality = _tag(names[0], "0008|0060")
    if len(names) == 1:  # a multi-frame file holds the whole volume
        return execute(Path(names[0]), channel), modality, ()
    logger.info("reading %d slices of series %s", len(names), uid)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    said: list[str] = []
    try:
        with silenced(said):
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"DICOM series is damaged or mixed: {folder} ({itk_reason(error, said)})") from error
    check_dimensions(image.GetSize(), image.GetSpacing(), folder)
    tag = "0020|0032"
    positions = [reader.GetMetaData(n, tag) for n in range(len(names)) if reader.HasMetaDataKey(n, tag)]
    notes = _check_slice_positions(positions, image.GetDirection(), folder)
    return one_channel(image, channel, folder), modality, notes


def slice_files(folder: Path, series: str | int | None) -> list[Path]:
    """The files of the picked series in the order of the slices that ``read_dicom`` makes of them.

    Raises:
        InputError: as ``read_volume``.
    """
    return [Path(name) for name in _files_of(folder, series)[1]]


def _files_of(folder: Path, series: str | int | None) -> tuple[str, Sequence[str]]:
    """The UID of the picked series and its files, the first slice first."""
    import SimpleITK as sitk

    with silenced([]):
        uids = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
        files = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids}
    if not uids:
        raise InputError(f"no DICOM series in folder: {folder}; give the folder that holds the slices")
    uid = _picked_series(files, series, folder)
    return uid, files[uid]


def _picked_series(files: dict[str, Sequence[str]], series: str | int | None, folder: Path) -> str:
    uids = list(files)
    asked = "" if series is None else str(series)
    if asked in files:
        return asked
    if asked.isdigit() and 1 <= int(asked) <= len(uids):
        return uids[int(asked) - 1]
    if not asked and len(uids) == 1:
        return uids[0]
    listed = "; ".join(
        f"{n} = {_tag(files[uid][0], '0008|103e') or 'no description'!r}, {len(files[uid])} slices, UID {uid}"
        for n, uid in enumerate(uids, start=1)
    )
    if asked:
        raise InputError(f"--series must be a number or UID of {folder}, got {asked!r}; it holds: {listed}")
    raise InputError(
        f"DICOM folder holds {len(uids)} series, pick one with --series N or UID: {folder} holds: {listed}"
    )


def _tag(file: str, tag: str) -> str:
    """A DICOM attribute of a file as text; empty if the file lacks it."""
    reader = open_header(Path(file))
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _check_slice_positions(positions: Sequence[str], direction: Sequence[float], folder: Path) -> tuple[str, ...]:
    """Refuse slices that lie on one another, note of gaps: ITK spaces all slices evenly either way."""
    normal = np.array(direction).reshape(3, 3)[:, 2]
    along = np.sort([float(np.dot([float(v) for v in p.split("\\")], normal)) for p in positions])
    gaps = np.diff(along)
    if gaps.size and gaps.min() < 1e-3:
        raise InputError(
            f"DICOM series has several slices at one position (phases or echoes?): {folder}; keep one of them each"
        )
    if gaps.size and gaps.max() - gaps.min() > 0.01 * gaps.mean():
        return (f"slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart; they are treated as evenly spaced",)
    return ()

"""The pixels of a DICOM volume: each slice is decoded, scaled by its own slope and put at its place."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.volume.dicom_headers import Encoding, Slice
from samed3d.volume.dicom_series import Layout, layout_of, pick_stack
from samed3d.volume.files import check_dimensions, one_channel
from samed3d.volume.itk import array_of, itk_reason, open_header, silenced

_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
_SCALING_TAGS = (0x00281052, 0x00281053, 0x00283000)
_GREY_FRAMES = "1.2.840.10008.5.1.4.1.1.7.3"  # a storage class without scaling


def read_dicom(path: Path, series: str | int | None, channel: int | None, untilt: bool) -> tuple[NDArray, str, Layout]:
    """The picked volume of a folder of DICOM files or of one file: (D, H, W) values, modality and layout.

    Raises:
        InputError: as ``read_volume``.
    """
    stack = pick_stack(path, series)
    first = stack.slices[0]
    if len(stack.slices) == 1:
        check_dimensions((*first.encoding.shape[:0:-1], 1), (*first.spacing_mm, 1.0), path)
    layout = layout_of(stack, path, untilt)
    if first.encoding.is_grey and channel not in (None, 0):
        raise InputError(f"--channel must be 0 for an image of one channel, got {channel}: {path}")
    array = np.empty((len(layout.slices), *first.encoding.shape[1:]), _pixel_type(layout.slices))
    decoded: dict[Path, NDArray] = {}
    for plane, one in zip(array, layout.slices, strict=True):
        try:
            _read_plane(plane, one, channel, decoded)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"DICOM file is damaged: {one.file} ({error})") from error
    return _resampled(array, layout) if layout.resampled else array, stack.modality, layout


def _pixel_type(slices: list[Slice]) -> type[np.generic]:
    """The smallest integer type that holds what every slice can hold, or float32 where a scaling is not integer."""
    ranges = []
    for encoding, rescale in {(s.encoding, s.rescale) for s in slices}:
        if encoding.floating or (encoding.is_grey and not all(float(v).is_integer() for v in rescale)):
            return np.float32
        slope, intercept = rescale if encoding.is_grey else (1.0, 0.0)
        low, high = (-(2 ** (encoding.stored - 1)), 2 ** (encoding.stored - 1) - 1)
        low, high = (low, high) if encoding.signed else (0, 2**encoding.stored - 1)
        ranges += [low * slope + intercept, high * slope + intercept]
    fits = (t for t in _INTEGERS if np.iinfo(t).min <= min(ranges) and max(ranges) <= np.iinfo(t).max)
    return next(fits, np.float32)


def _read_plane(plane: NDArray, one: Slice, channel: int | None, decoded: dict[Path, NDArray]) -> None:
    """Fill a plane with the values of a slice; ``decoded`` keeps the frames of compressed multi-frame files."""
    encoding = one.encoding
    values = decoded.get(one.file)
    if values is None:
        if encoding.is_grey and encoding.offset >= 0:
            kind = encoding.floating or f"<{'i' if encoding.signed else 'u'}{encoding.allocated // 8}"
            pixels = encoding.shape[1] * encoding.shape[2]
            at = encoding.offset + one.frame * pixels * np.dtype(kind).itemsize
            values = np.fromfile(one.file, kind, pixels, offset=at).reshape(1, *encoding.shape[1:])
        else:
            values = _decoded(one.file, encoding, channel)
            if encoding.shape[0] > 1:
                decoded[one.file] = values
    found = values[one.frame if len(values) > 1 else 0]
    if not encoding.is_grey:
        plane[:] = found
        return
    if (spare := encoding.allocated - encoding.stored) and not encoding.floating:  # higher bits may hold overlays
        found = found << spare >> spare
    slope, intercept = one.rescale
    if plane.dtype.kind == "f":
        plane[:] = found * slope + intercept
    else:  # integers wrap round and back where a step in between leaves their range
        plane[:] = found
        plane *= plane.dtype.type(int(slope)) if slope != 1 else plane.dtype.type(1)
        plane += plane.dtype.type(int(intercept))


def _decoded(file: Path, encoding: Encoding, channel: int | None) -> NDArray:
    """The stored values (frames, rows, columns) of a file that ITK decodes, without its scaling."""
    from pydicom import dcmread
    from pydicom.dataset import FileDataset
    from pydicom.uid import UID

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = file
        if encoding.is_grey:
            data = dcmread(file)
            if encoding.offset == -1 and not data.file_meta.TransferSyntaxUID.is_compressed:
                return np.asarray(data.pixel_array).reshape(encoding.shape)
            # ITK applies the scaling of the first frame to all: it gets the pixels without any.
            bare = FileDataset("", data.group_dataset(0x0028), file_meta=data.file_meta, preamble=b"\0" * 128)
            for tag in _SCALING_TAGS:
                bare.pop(tag, None)
            bare.SOPClassUID = bare.file_meta.MediaStorageSOPClassUID = UID(_GREY_FRAMES)
            bare.SOPInstanceUID, bare.PixelData = bare.file_meta.MediaStorageSOPInstanceUID, data.PixelData
            bare["PixelData"].is_undefined_length = True
            source = Path(folder, "pixels.dcm")
            bare.save_as(source)
        reader = open_header(source, file)
        said: list[str] = []
        try:
            with silenced(said):
                image = one_channel(reader.Execute(), channel, file)
        except RuntimeError as error:
            raise InputError(f"DICOM file is cut or damaged: {file} ({itk_reason(error, said)})") from error
    return array_of(image).reshape(encoding.shape)


def _resampled(array: NDArray, layout: Layout) -> NDArray:
    """Slices on an orthogonal, evenly spaced grid: linear within a slice and between two; the lowest value outside."""
    from scipy.ndimage import shift

    lowest = array.min()
    count, *size = layout.grid.shape_zyx
    whole = np.floor(layout.places_kji).astype(int)
    part = layout.places_kji - whole
    planes = np.full((len(array), *size), lowest, np.float32)
    rows, columns = array.shape[1:]
    for plane, values, (_, j, i), (_, dj, di) in zip(planes, array, whole, part, strict=True):
        plane[j : j + rows, i : i + columns] = values
        if max(dj, di) > 1e-4:
            plane[:] = shift(plane, (dj, di), order=1, cval=float(lowest))
    out = np.empty((count, *size), array.dtype)
    for k in range(count):
        after = min(int(np.searchsorted(layout.places_kji[:, 0], k - 1e-6)), len(planes) - 1)
        before = max(after - 1, 0)
        gap = layout.places_kji[after, 0] - layout.places_kji[before, 0]
        weight = (layout.places_kji[after, 0] - k) / gap if gap > 0 else 0.0
        mixed = planes[after] * (1 - weight) + planes[before] * weight
        out[k] = np.rint(mixed) if out.dtype.kind in "iu" else mixed
    return out

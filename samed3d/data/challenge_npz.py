"""Files of the CVPR 2025 challenge for interactive 3D segmentation: cases, inputs of a program, and its answers.

A case holds ``imgs`` and ``gts`` (D, H, W), ``spacing`` and perhaps ``boxes``. A program gets ``imgs spacing boxes``
and from the first click on ``clicks clicks_order prev_pred``; it answers ``segs``. Boxes and clicks are pickled Python
objects, and unpickling an arbitrary object can run code; this reader builds containers, numbers and text only. The
rules of the challenge are in ``evaluation/protocols/cvpr25.py``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple
from samed3d.output import replacing
from samed3d.volume.label_maps import whole_numbers

BOX_KEYS = tuple("z_min z_max z_mid z_mid_x_min z_mid_y_min z_mid_x_max z_mid_y_max".split())
ChallengeBox = dict[str, int]
"""One structure's box: its extent in z and a 2D box on the slice ``z_mid``; voxel indices, both ends inside."""
Clicks = dict[str, list[list[int]]]
"""One structure's clicks: ``{"fg": [[z, y, x], ...], "bg": [...]}``."""

_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


class _Unpickler(pickle.Unpickler):
    """Builds arrays, numbers, text and containers, and refuses everything else, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def members(path: Path) -> set[str]:
    """Names of the arrays in a file, without reading them; empty for a file that is no npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def read_array(path: Path, name: str) -> NDArray:
    """A plain array of a file.

    Raises:
        InputError: if it is missing, damaged or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored[name]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(
            f"npz has no readable {name!r}, or it holds Python objects, which are not read: {path} ({error})"
        ) from error


def read_case(path: Path, truth: Path | None = None) -> tuple[NDArray, NDArray, Triple]:
    """The image, the labels and the spacing of a case.

    Args:
        path: The file with ``imgs`` and ``spacing``.
        truth: The file with ``gts`` where that is another one.

    Returns:
        (D, H, W) image; (D, H, W) labels in the smallest unsigned type; spacing in the order of the file.

    Raises:
        InputError: if a file is damaged, an array is not 3D or of another shape, the image is constant or not finite,
            or the labels are empty or no whole numbers.
    """
    truth = truth or path
    image, labels = read_array(path, "imgs"), read_array(truth, "gts")
    if image.ndim != 3:
        raise InputError(f"imgs must be 3D, got {image.ndim}D {image.shape}: {path}")
    if labels.shape != image.shape:
        raise InputError(
            f"image and label must share one grid: imgs is {image.shape} and gts is {labels.shape}: {truth}"
        )
    if image.dtype.kind not in "biuf":
        raise InputError(f"imgs must hold numbers, got {image.dtype}: {path}")
    low, high = float(image.min()), float(image.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"image holds NaN or infinite voxels: {path}; replace them with the background value")
    if low == high:
        raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
    return image, whole_numbers(labels, str(truth)), read_spacing(path)


def read_objects(path: Path, name: str) -> list[Any]:
    """An array of Python objects (``boxes``, ``clicks``, ``clicks_order``) as a list.

    Raises:
        InputError: if it is missing or damaged, or names anything but arrays, numbers, text and containers.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            file = io.BytesIO(member.read())
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, kind = header(file)
        if kind.hasobject:
            values = _Unpickler(file).load()
        else:
            file.seek(0)
            values = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise InputError(f"npz has no readable {name!r}: {path} ({error})") from error
    return list(np.asarray(values, dtype=object).reshape(-1))


def read_boxes(path: Path) -> list[ChallengeBox] | None:
    """The boxes of a case, one per structure in the order of its labels; None where the file has none.

    Raises:
        InputError: if a box lacks a key.
    """
    if "boxes" not in members(path):
        return None
    boxes = read_objects(path, "boxes")
    for box in boxes:
        if not isinstance(box, dict) or (missing := set(BOX_KEYS) - set(box)):
            raise InputError(
                f"boxes must be dicts with {' '.join(BOX_KEYS)}, got {box!r}: {path}"
                + (f"; {missing} missing" if box else "")
            )
    return [{key: int(box[key]) for key in BOX_KEYS} for box in boxes]


def read_spacing(path: Path) -> Triple:
    """``spacing``, three numbers > 0 in the order of the file (see ``protocols/cvpr25.py``)."""
    values = np.asarray(read_array(path, "spacing"), dtype=np.float64).reshape(-1)
    if values.size != 3 or not (np.isfinite(values).all() and (values > 0).all()):
        raise InputError(f"spacing must be three numbers > 0, got {values.tolist()}: {path}")
    return as_triple(values)


def write_input(
    path: Path,
    image: NDArray,
    spacing: Triple,
    boxes: Sequence[ChallengeBox] | None,
    clicks: Sequence[Clicks] = (),
    clicks_order: Sequence[Sequence[str | None]] = (),
    prev_pred: NDArray | None = None,
) -> None:
    """Write what a program of the challenge is given for one iteration.

    Args:
        path: An ``.npz``.
        image: (D, H, W).
        spacing: In the order of the source.
        boxes: One per structure, or None where the case has none.
        clicks: One per structure; empty in the first iteration.
        clicks_order: One per structure: ``"fg"``, ``"bg"`` or None per click.
        prev_pred: (D, H, W) labels of the iteration before.
    """
    arrays: dict[str, Any] = {"imgs": image, "spacing": np.asarray(spacing)}
    if boxes is not None:
        arrays["boxes"] = _objects(boxes)
    if clicks:
        arrays |= {"clicks": _objects(clicks), "clicks_order": _objects(clicks_order), "prev_pred": prev_pred}
    _write(path, arrays)


def write_answer(path: Path, segs: NDArray, all_segs: Sequence[NDArray] = ()) -> None:
    """Write a prediction: ``segs`` uint8 (D, H, W), and where given the masks of every iteration as ``all_segs``."""
    arrays: dict[str, Any] = {"segs": segs.astype(np.uint8, copy=False)}
    if all_segs:
        arrays["all_segs"] = np.stack([s.astype(np.uint8, copy=False) for s in all_segs])
    _write(path, arrays)


def _objects(values: Sequence[Any]) -> NDArray:
    array = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        array[number] = value
    return array


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)

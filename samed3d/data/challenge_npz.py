"""Cases of the CVPR 2025 challenge for interactive 3D segmentation: ``imgs``, ``gts``, ``spacing`` and ``boxes``.

Boxes are pickled Python objects, and unpickling an arbitrary object can run code; this reader builds arrays, numbers,
text and containers only. The rules of the challenge are in ``evaluation/protocols/cvpr25.py``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple
from samed3d.volume.label_maps import whole_numbers

BOX_KEYS = tuple("z_min z_max z_mid z_mid_x_min z_mid_y_min z_mid_x_max z_mid_y_max".split())
ChallengeBox = dict[str, int]
"""One structure's box: its extent in z and a 2D box on the slice ``z_mid``; voxel indices, both ends inside."""
_HARMLESS = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError)


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


def read_case(path: Path, truth: Path | None = None) -> tuple[NDArray, NDArray, Triple]:
    """The image, the labels and the spacing of a case; ``truth`` is the file with ``gts`` where that is another one.

    Returns:
        (D, H, W) image; (D, H, W) labels in the smallest unsigned type; spacing in the order of the file (see
        ``protocols/cvpr25.py``).

    Raises:
        InputError: if a file is damaged or holds Python objects, an array is not 3D or of another shape, the image is
            constant or not finite, the labels are empty or no whole numbers, or the spacing is no three numbers > 0.
    """
    truth = truth or path
    image, labels = _read_array(path, "imgs"), _read_array(truth, "gts")
    if image.ndim != 3:
        raise InputError(f"imgs must be 3D, got {image.ndim}D {image.shape}: {path}")
    if labels.shape != image.shape:
        shapes = f"imgs is {image.shape} and gts is {labels.shape}"
        raise InputError(f"image and label must share one grid: {shapes}: {truth}")
    if image.dtype.kind not in "biuf":
        raise InputError(f"imgs must hold numbers, got {image.dtype}: {path}")
    low, high = float(image.min()), float(image.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"image holds NaN or infinite voxels: {path}; replace them with the background value")
    if low == high:
        raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
    labels = whole_numbers(labels, str(truth))
    spacing = np.asarray(_read_array(path, "spacing"), dtype=np.float64).reshape(-1)
    if spacing.size != 3 or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(f"spacing must be three numbers > 0, got {spacing.tolist()}: {path}")
    return image, labels, as_triple(spacing)


def read_boxes(path: Path) -> list[ChallengeBox] | None:
    """The boxes of a case, one per structure in the order of its labels; None where the file has none.

    Raises:
        InputError: if the boxes are damaged, name anything but arrays, numbers, text and containers, or lack a key.
    """
    if "boxes" not in members(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive, archive.open("boxes.npy") as member:
            file = io.BytesIO(member.read())
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        values = _Unpickler(file).load() if header(file)[2].hasobject else None
    except _DAMAGED as error:
        raise InputError(f"npz has no readable 'boxes': {path} ({error})") from error
    boxes = np.asarray(_read_array(path, "boxes") if values is None else values, dtype=object).ravel().tolist()
    for box in boxes:
        if not isinstance(box, dict) or (missing := set(BOX_KEYS) - set(box)):
            lacking = f"; {missing} missing" if isinstance(box, dict) else ""
            raise InputError(f"boxes must be dicts with {' '.join(BOX_KEYS)}, got {box!r}: {path}{lacking}")
    return [{key: int(box[key]) for key in BOX_KEYS} for box in boxes]


def _read_array(path: Path, name: str) -> NDArray:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored[name]
    except _DAMAGED as error:
        reason = "or it holds Python objects, which are not read"
        raise InputError(f"npz has no readable {name!r}, {reason}: {path} ({error})") from error

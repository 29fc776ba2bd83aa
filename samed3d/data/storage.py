"""Arrays on disk: chunked and compressed (``.b2nd``, by blosc2), so that a crop reads only the chunks under it, or
plain numpy (``.npz``), which is read whole, for a machine that has only torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.output import replacing

STORAGES = ("b2nd", "npz")
CHUNK = 64
BLOCK = 32
_LEVEL = 1


class StoredArray:
    """An array on disk that is read by slicing, with the shape and slices of a numpy array."""

    def __init__(self, array: Any) -> None:
        """Wrap an opened array (blosc2 or numpy)."""
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype

    def __getitem__(self, index: Any) -> NDArray:
        """The voxels under ``index`` (integers and slices of step 1), read now."""
        return np.asarray(self._array[index])

    @property
    def held_bytes(self) -> int:
        """Memory that keeping it open takes."""
        return self._array.nbytes if isinstance(self._array, np.ndarray) else 4096


class LayerOf:
    """One (D, H, W) layer of a stored (layers, D, H, W) label map."""

    def __init__(self, stored: StoredArray, layer: int) -> None:
        """Layer number ``layer`` of ``stored``."""
        self._stored, self._layer = stored, layer
        self.shape = stored.shape[1:]
        self.dtype = stored.dtype

    def __getitem__(self, index: Any) -> NDArray:
        """The voxels under a (z, y, x) index, read now."""
        picked = index if isinstance(index, tuple) else (index,)
        return self._stored[(self._layer, *picked)]


def check_storage(storage: str) -> None:
    """That arrays can be written in ``storage`` here, before any work is done.

    Raises:
        InputError: if it is not one of ``STORAGES``, or needs a package that is missing.
    """
    if storage not in STORAGES:
        raise InputError(f"--storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if storage == "b2nd":
        _blosc2()


def write_array(path: Path, array: NDArray) -> None:
    """Write an array of any strides; the suffix (``.b2nd``, ``.npz``) is the storage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            np.savez_compressed(partial, array=array)
        else:
            _write_b2nd(partial, array)


def open_array(path: Path) -> StoredArray:
    """Open an array; ``.npz`` is read whole.

    Raises:
        InputError: if blosc2 is needed and missing, or the file is missing or damaged.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as stored:
                return StoredArray(stored["array"])
        blosc2 = _blosc2()
        return StoredArray(blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1)))
    except InputError:
        raise
    except (
        Exception
    ) as error:  # zipfile, zlib, OSError and blosc2's RuntimeError: a damaged file makes them raise almost anything
        raise InputError(
            f"array is missing or damaged: {path} ({type(error).__name__}: {error}); delete its record and prepare "
            "again"
        ) from error


def _write_b2nd(path: Path, array: NDArray) -> None:
    blosc2 = _blosc2()
    spatial = array.shape[-3:]
    lead = (1,) * (array.ndim - 3)
    chunks = lead + tuple(min(CHUNK, n) for n in spatial)
    # Sorting bytes by their place helps numbers of several bytes; on bytes it would only cost time.
    filters = [blosc2.Filter.SHUFFLE] if array.dtype.itemsize > 1 else [blosc2.Filter.NOFILTER]
    settings = blosc2.CParams(
        codec=blosc2.Codec.ZSTD, clevel=_LEVEL, filters=filters, typesize=array.dtype.itemsize, nthreads=1
    )
    blocks = lead + tuple(min(BLOCK, n) for n in chunks[-3:])
    stored = blosc2.empty(
        array.shape, dtype=array.dtype, chunks=chunks, blocks=blocks, urlpath=str(path), mode="w", cparams=settings
    )
    for layer in np.ndindex(array.shape[:-3]):
        for z in range(0, spatial[0], CHUNK):  # one row of chunks at a time: the whole array is never copied
            index = (*(slice(i, i + 1) for i in layer), slice(z, min(z + CHUNK, spatial[0])))
            stored[index] = np.ascontiguousarray(array[index])


def _blosc2() -> Any:
    try:
        import blosc2
    except ModuleNotFoundError as error:
        raise InputError("a .b2nd corpus needs blosc2: pip install blosc2, or prepare with --storage npz") from error
    return blosc2

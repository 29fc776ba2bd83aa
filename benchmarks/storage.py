"""Measure what stores volumes best: size, time to write, time to read a random crop. Prints one Markdown table.

    python benchmarks/storage.py IMAGE.nii.gz LABELS.nii.gz ...

Each file is stored in every way; crops are 128^3 or as large as the volume. Times are of one thread, in processor time,
the file opened afresh for each crop. Beside them, reading the .nii.gz whole. Needs blosc2 and zarr.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samed3d.volume import read_volume  # noqa: E402

CROP = 128
REPEATS = 10
Way = tuple[Callable[[Path, NDArray], Any], Callable[[Path], Any]]


def b2nd(chunk: int, codec: str, level: int, shuffle: bool) -> Way:
    """Chunked blosc2 in one file."""
    import blosc2

    def write(path: Path, array: NDArray) -> None:
        chunks = tuple(min(chunk, n) for n in array.shape)
        blocks = tuple(min(32, n) for n in chunks)
        wanted = blosc2.Filter.SHUFFLE if shuffle and array.itemsize > 1 else blosc2.Filter.NOFILTER
        settings = blosc2.CParams(
            codec=blosc2.Codec[codec], clevel=level, filters=[wanted], typesize=array.itemsize, nthreads=1
        )
        blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=str(path), mode="w", cparams=settings)

    return write, lambda path: blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))


def zarr3(chunk: int, level: int) -> Way:
    """Zarr version 3 with the Blosc codec; a file per chunk."""
    import zarr
    from zarr.codecs import BloscCodec

    def write(path: Path, array: NDArray) -> None:
        codec = BloscCodec(
            cname="zstd",
            clevel=level,
            shuffle="shuffle" if array.itemsize > 1 else "noshuffle",
            typesize=array.itemsize,
        )
        chunks = tuple(min(chunk, n) for n in array.shape)
        zarr.create_array(store=str(path), shape=array.shape, chunks=chunks, dtype=array.dtype, compressors=[codec])[
            :
        ] = array

    return write, lambda path: zarr.open_array(str(path), mode="r")


def npz() -> Way:
    """Plain numpy, read whole."""

    def write(path: Path, array: NDArray) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, array=array)

    return write, lambda path: np.load(path)["array"]


def size_of(path: Path) -> tuple[int, int]:
    """Bytes and number of files."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files), len(files)


def crops(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Random crops, the same for every way."""
    rng = np.random.default_rng(0)
    starts = [[int(rng.integers(0, max(1, n - CROP + 1))) for n in shape] for _ in range(REPEATS)]
    return [tuple(slice(a, min(a + CROP, n)) for a, n in zip(start, shape, strict=True)) for start in starts]


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Least processor time of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    os.environ["BLOSC_NTHREADS"] = "1"
    ways = {f"b2nd zstd-1, chunk {n}": b2nd(n, "ZSTD", 1, True) for n in (32, 64, 128)}
    ways |= {"b2nd zstd-5, chunk 64": b2nd(64, "ZSTD", 5, True), "b2nd lz4-5, chunk 64": b2nd(64, "LZ4", 5, True)}
    ways |= {f"zarr 3 zstd-1, chunk {n}": zarr3(n, 1) for n in (64, 128)} | {"npz": npz()}
    print(
        "| volume | stored as | files | MB | write ms | crop ms | times quicker than the .nii.gz |\n|---|---|---|---|---|---|---|"
    )
    for path in options.files:
        volume = read_volume(path)
        array = np.ascontiguousarray(volume.view.to_canonical(volume.array))
        whole = seconds(lambda p=path: read_volume(p))
        title = f"{path.parent.parent.name} {path.parent.name[:-2]} {'x'.join(map(str, array.shape))} {array.dtype}"
        print(f"| {title} | .nii.gz | 1 | {path.stat().st_size / 1e6:.2f} | | {1e3 * whole:.1f} | 1 |")
        for name, (write, read) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "array"
                write(target, array)
                shutil.rmtree(target) if target.is_dir() else target.unlink()
                writing = seconds(lambda w=write, t=target, a=array: w(t, a), 1)
                reading = seconds(lambda r=read, t=target, a=array: [r(t)[c] for c in crops(a.shape)]) / REPEATS
                held, files = size_of(target)
            line = f"{files} | {held / 1e6:.2f} | {1e3 * writing:.0f} | {1e3 * reading:.2f} | {whole / reading:.0f}"
            print(f"| | {name} | {line} |")


if __name__ == "__main__":
    main()

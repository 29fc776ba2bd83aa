"""Arrays as nnInteractive's clients send and expect them, with every declared size checked before anything is
allocated.

The layout (little-endian): ``NNIA``, version 1, codec, number of axes, length of the type's name, the name, one int64
per axis, the number of chunks, then per chunk its plain length, its packed length and a blosc2 frame. Source: observed
from ``nninteractive-client`` 2.6.0. The routes are in ``nninteractive.py``; what the prompts become is in
``nninteractive_prompts.py``.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError

_HEAD = struct.Struct("<4sBBBB")
_CHUNK = struct.Struct("<QQ")
_MAGIC, _VERSION, _ZSTD, _LZ4 = b"NNIA", 1, 1, 2
_LARGEST_CHUNK = 1 << 30
DTYPES = frozenset("bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split())
_MOST_AXES = 4
_WIDEST = 4
"""Bytes per voxel that the largest image may have."""


def pack_array(array: NDArray) -> bytes:
    """An array in one message."""
    import blosc2

    array = np.ascontiguousarray(array)
    name, raw = array.dtype.name.encode(), array.reshape(-1).view(np.uint8).data
    starts = range(0, len(raw), _LARGEST_CHUNK)
    parts = [
        _HEAD.pack(_MAGIC, _VERSION, _ZSTD, array.ndim, len(name)),
        name,
        struct.pack(f"<{array.ndim}q", *array.shape),
    ]
    parts.append(struct.pack("<I", len(starts)))
    for start in starts:
        chunk = raw[start : start + _LARGEST_CHUNK]
        packed = blosc2.compress2(
            chunk,
            typesize=array.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            filters=[blosc2.Filter.NOFILTER],
            nthreads=1,
        )
        parts += [_CHUNK.pack(len(chunk), len(packed)), packed]
    return b"".join(parts)


def unpack_array(body: bytes, largest_voxels: int) -> NDArray:
    """The array of a message.

    Args:
        body: The whole message.
        largest_voxels: More are refused before any memory is taken for them.

    Raises:
        InputError: if the message is cut or damaged, of a type that is not plain numbers, or too large.
    """
    shape, dtype, at = _header(body)
    count = math.prod(shape)
    if count > largest_voxels or count * dtype.itemsize > largest_voxels * _WIDEST:
        raise InputError(
            f"an array must have at most {largest_voxels} voxels here, got {' x '.join(map(str, shape))} of {dtype}"
        )
    chunks, at = _number(body, at)
    out = np.empty(count, dtype)
    plain = out.view(np.uint8).data
    done = 0
    for _ in range(chunks):
        if at + _CHUNK.size > len(body):
            raise InputError("the array is cut: its last chunks are missing; send it again")
        length, packed = _CHUNK.unpack_from(body, at)
        at += _CHUNK.size
        if done + length > len(plain) or at + packed > len(body) or length % dtype.itemsize:
            raise InputError("the array is damaged: a chunk is longer than the array, or than the message")
        _unpack_chunk(memoryview(body)[at : at + packed], plain[done : done + length])
        done, at = done + length, at + packed
    if done != len(plain) or at != len(body):
        raise InputError(f"the array must hold {len(plain)} bytes for its shape, got {done}, and nothing after them")
    return out.reshape(shape)


def _header(body: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and where the chunks begin."""
    if len(body) < _HEAD.size:
        raise InputError(f"an array must begin with a header of {_HEAD.size} bytes, got {len(body)}")
    magic, version, codec, axes, length = _HEAD.unpack_from(body)
    if magic != _MAGIC or version != _VERSION or codec not in (_ZSTD, _LZ4):
        raise InputError(
            f"an array must be of wire version {_VERSION} (zstd or lz4), got {magic!r} version {version} codec {codec}"
        )
    at = _HEAD.size + length
    if not 1 <= axes <= _MOST_AXES or at + 8 * axes > len(body):
        raise InputError(
            f"an array must have 1 to {_MOST_AXES} axes and a whole header, got {axes} axes in {len(body)} bytes"
        )
    name = body[_HEAD.size : at].decode("latin-1")
    if name not in DTYPES:
        raise InputError(f"an array must be of one of the types {' '.join(sorted(DTYPES))}, got {name[:40]!r}")
    shape = struct.unpack_from(f"<{axes}q", body, at)
    if any(n < 0 for n in shape):
        raise InputError(f"an array's shape must not be negative, got {shape}")
    return shape, np.dtype(name), at + 8 * axes


def _number(body: bytes, at: int) -> tuple[int, int]:
    if at + 4 > len(body):
        raise InputError("the array is cut: nothing follows its header; send it again")
    return struct.unpack_from("<I", body, at)[0], at + 4


def _unpack_chunk(packed: memoryview, target: memoryview) -> None:
    import blosc2

    try:
        plain, stored, _ = blosc2.get_cbuffer_sizes(packed)
        if plain != len(target) or stored > len(packed):
            raise InputError(f"the array is damaged: a chunk declares {len(target)} bytes and holds {plain}")
        blosc2.decompress2(packed, dst=target)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the array is damaged: a chunk cannot be unpacked ({error})") from error

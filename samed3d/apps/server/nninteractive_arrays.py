"""nnInteractive's arrays and interactions: bytes to arrays, array positions to prompts, drawn masks to strokes.

An array's axes are taken as z, y, x in the order in which they come, so that a client that sends (X, Y, Z) and one that
sends (Z, Y, X) both receive their own axes. A message holds, little-endian: ``NNIA``, version 1, codec, number of axes,
length of the type's name, the name, one int64 per axis, the number of chunks, then per chunk its plain length, its
packed length and a blosc2 frame. Every declared size is checked before memory is allocated. Source: observed from
``nninteractive-client`` 2.6.0.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

import cc3d
import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import RAS_DIRECTION, Grid, IntTriple, Region, Triple, as_triple, bounding_region
from samed3d.prompts import Box, Lasso, Mask, PackedMask, Point, Prompt, Scribble
from samed3d.volume.contours import trace_contours

DTYPES = frozenset("bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split())
_HEAD = struct.Struct("<4sBBBB")
_CHUNK = struct.Struct("<QQ")
_MAGIC, _VERSION, _ZSTD, _LZ4 = b"NNIA", 1, 1, 2
_LARGEST_CHUNK = 1 << 30
_MOST_AXES = 4
_WIDEST = 4
"""Bytes per voxel that the largest image may have."""
_LONGEST_PATH = 10_000
_MOST_STROKES = 256


# Bytes


def pack_array(array: NDArray) -> bytes:
    """An array as one message."""
    import blosc2

    array = np.ascontiguousarray(array)
    name, raw = array.dtype.name.encode(), array.reshape(-1).view(np.uint8).data
    starts = range(0, len(raw), _LARGEST_CHUNK)
    head = _HEAD.pack(_MAGIC, _VERSION, _ZSTD, array.ndim, len(name))
    parts = [head, name, struct.pack(f"<{array.ndim}q", *array.shape), struct.pack("<I", len(starts))]
    settings = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.NOFILTER], "nthreads": 1}
    for start in starts:
        chunk = raw[start : start + _LARGEST_CHUNK]
        packed = blosc2.compress2(chunk, typesize=array.itemsize, **settings)
        parts += [_CHUNK.pack(len(chunk), len(packed)), packed]
    return b"".join(parts)


def unpack_array(body: bytes, largest_voxels: int) -> NDArray:
    """The array of a message.

    Args:
        body: The whole message.
        largest_voxels: An array with more is refused before memory is allocated for it.

    Raises:
        InputError: if the message is cut or damaged, of a type that is not plain numbers, or too large.
    """
    at = 0

    def take(count: int) -> memoryview:
        nonlocal at
        at += count
        if at > len(body):
            raise InputError(
                f"the array is cut: its message must have at least {at} bytes, got {len(body)}; send again"
            )
        return memoryview(body)[at - count : at]

    magic, version, codec, axes, length = _HEAD.unpack(take(_HEAD.size))
    if magic != _MAGIC or version != _VERSION or codec not in (_ZSTD, _LZ4):
        got = f"{magic!r} version {version} codec {codec}"
        raise InputError(f"an array must be of wire version {_VERSION} (zstd or lz4), got {got}")
    name = str(take(length), "latin-1")
    if name not in DTYPES:
        raise InputError(f"an array must be of one of the types {' '.join(sorted(DTYPES))}, got {name[:40]!r}")
    if not 1 <= axes <= _MOST_AXES:
        raise InputError(f"an array must have 1 to {_MOST_AXES} axes, got {axes}")
    shape, dtype = struct.unpack(f"<{axes}q", take(8 * axes)), np.dtype(name)
    count = math.prod(shape)
    if min(shape) < 0:
        raise InputError(f"an array's shape must not be negative, got {shape}")
    if count > largest_voxels or count * dtype.itemsize > largest_voxels * _WIDEST:
        sizes = " x ".join(map(str, shape))
        raise InputError(f"an array must have at most {largest_voxels} voxels here, got {sizes} of {dtype}")
    (chunks,) = struct.unpack("<I", take(4))
    out = np.empty(count, dtype)
    plain, done = out.view(np.uint8).data, 0
    for _ in range(chunks):
        size, packed = _CHUNK.unpack(take(_CHUNK.size))
        if done + size > len(plain) or size % dtype.itemsize:
            raise InputError("the array is damaged: a chunk is longer than the array")
        _unpack_chunk(take(packed), plain[done : done + size])
        done += size
    if done != len(plain) or at != len(body):
        raise InputError(f"the array must hold {len(plain)} bytes for its shape, got {done}, and nothing after them")
    return out.reshape(shape)


def _unpack_chunk(packed: memoryview, target: memoryview) -> None:
    import blosc2

    try:
        plain, stored, _ = blosc2.get_cbuffer_sizes(packed)
        if plain != len(target) or stored > len(packed):
            raise InputError(f"the array is damaged: a chunk declares {len(target)} bytes and holds {plain}")
        blosc2.decompress2(packed, dst=target)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the array is damaged: a chunk cannot be unpacked ({error})") from error


# Positions


def grid_of(shape: IntTriple, properties: object) -> Grid:
    """The grid of an image that came as an array; its ``spacing``, if given, is in the order of the array's axes."""
    given = properties.get("spacing") if isinstance(properties, dict) else None
    spacing: Triple = (1.0, 1.0, 1.0)
    if given is not None:
        if not _are_three(given, (int, float)) or not all(0 < v < math.inf for v in given):
            raise InputError(f"spacing must be three numbers > 0 in mm, got {str(given)[:80]}")
        spacing = as_triple(given[::-1])
    return Grid(shape, spacing, direction_lps=RAS_DIRECTION)


def point_prompt(coordinates: Any, include: bool) -> Prompt:
    """A click at an array position."""
    if not _are_three(coordinates, (int, float)):
        raise InputError(f"coordinates must be three numbers, got {str(coordinates)[:80]}")
    return Point(as_triple(coordinates[::-1]), include)


def box_prompt(bbox: Any, include: bool, shape: IntTriple) -> Prompt:
    """A half-open box of the array, clipped to it. A negative box becomes a negative lasso, so it must be flat."""
    region = _clipped(bbox, shape, "bbox_coords")
    low = as_triple(list(region.start_zyx[::-1]))
    high = as_triple([stop - 1 for stop in region.stop_zyx[::-1]])
    if include:
        return Box(low, high)
    flat = [axis for axis in range(3) if low[axis] == high[axis]]
    if len(flat) != 1:
        raise InputError(
            "a negative box must be one voxel thick along exactly one axis, got a 3D one; "
            "use negative points or scribbles"
        )
    a, b = (axis for axis in range(3) if axis != flat[0])
    outline = np.tile(low, (4, 1))
    outline[:, a] = [low[a] - 0.5, high[a] + 0.5, high[a] + 0.5, low[a] - 0.5]
    outline[:, b] = [low[b] - 0.5, low[b] - 0.5, high[b] + 0.5, high[b] + 0.5]
    return Lasso(tuple(as_triple(at) for at in outline), False)


def mask_prompt(mask: NDArray, shape: IntTriple) -> Prompt:
    """A segmentation of the whole image to start from."""
    if mask.shape != shape:
        raise InputError(f"the initial segmentation must have the image's shape {shape}, got {mask.shape}")
    return Mask(PackedMask.of(mask))


def _clipped(bbox: Any, shape: IntTriple, name: str) -> Region:
    three = isinstance(bbox, list) and len(bbox) == 3
    if not three or not all(isinstance(p, list) and len(p) == 2 and all(type(v) is int for v in p) for p in bbox):
        raise InputError(f"{name} must be three pairs of whole numbers, got {str(bbox)[:80]}")
    region = Region((bbox[0][0], bbox[1][0], bbox[2][0]), (bbox[0][1], bbox[1][1], bbox[2][1])).clip(shape)
    if any(low >= high for low, high in bbox) or region.is_empty:
        raise InputError(f"{name} must hold at least one voxel of the image {shape}, got {bbox}")
    return region


def _are_three(values: Any, types: tuple[type, ...]) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(type(v) in types for v in values)


# Drawn masks


def drawn_region(mask: NDArray, bbox: Any, shape: IntTriple) -> tuple[NDArray[np.bool_], IntTriple]:
    """A drawn mask, cut to its bounding box, and the first voxel (zyx) of that box.

    Args:
        mask: Of the whole image, or of ``bbox``.
        bbox: Half-open box, or None.
        shape: Of the image.
    """
    region = Region((0, 0, 0), shape) if bbox is None else _clipped(bbox, shape, "interaction_bbox")
    if mask.shape != region.shape_zyx:
        what = "the image's shape" if bbox is None else "the shape of interaction_bbox"
        raise InputError(f"the drawn mask must have {what} {region.shape_zyx}, got {mask.shape}")
    drawn = mask != 0
    tight = bounding_region(drawn)
    if tight.is_empty:
        raise InputError("nothing is drawn: every voxel of the mask is zero")
    d, h, w = (a + b for a, b in zip(region.start_zyx, tight.start_zyx, strict=True))
    return drawn[tight.slices], (d, h, w)


def drawn_prompts(kind: str, mask: NDArray, bbox: Any, shape: IntTriple, include: bool) -> list[Prompt]:
    """The prompts of a drawing, of kind "scribble" or "lasso"; arguments as ``drawn_region``."""
    drawn, start = drawn_region(mask, bbox, shape)
    return (scribble_prompts if kind == "scribble" else lasso_prompts)(drawn, start, include)


def scribble_prompts(drawn: NDArray[np.bool_], start: IntTriple, include: bool) -> list[Prompt]:
    """Scribbles that mark exactly the drawn voxels: one path from neighbour to neighbour per connected piece."""
    prompts: list[Prompt] = []
    for piece in _pieces(drawn, 26):
        path = _without_diagonals(_path_through(piece))
        for first in range(0, len(path), _LONGEST_PATH):
            part = path[first : first + _LONGEST_PATH]
            prompts.append(Scribble(tuple(_ijk(zyx, start) for zyx in part), include, radius_vox=0.0))
    if len(prompts) > _MOST_STROKES:
        limit = f"{_MOST_STROKES} strokes of {_LONGEST_PATH} voxels"
        raise InputError(f"a scribble must be at most {limit}, got {len(prompts)}; draw less at once")
    return prompts


def lasso_prompts(drawn: NDArray[np.bool_], start: IntTriple, include: bool) -> list[Prompt]:
    """Lassos around every connected piece of one slice; holes are filled."""
    from scipy.ndimage import binary_fill_holes

    flat = [axis for axis in range(3) if drawn.shape[axis] == 1]
    if not flat:
        raise InputError(f"a lasso must lie in one slice of one of the axes, got a box of {drawn.shape}")
    axis = flat[0]
    prompts: list[Prompt] = []
    for piece in _pieces(np.expand_dims(drawn.squeeze(axis), 0), 6):
        (corners,) = trace_contours(binary_fill_holes(piece[0]))
        outline = np.insert(corners[:, ::-1], axis, 0.0, axis=1)
        if len(outline) > _LONGEST_PATH:
            limit = f"at most {_LONGEST_PATH} corners, got {len(outline)}"
            raise InputError(f"the outline of a lasso must have {limit}; draw it smoother")
        prompts.append(Lasso(tuple(_ijk(zyx, start) for zyx in outline), include))
    if len(prompts) > _MOST_STROKES:
        raise InputError(f"a lasso must be at most {_MOST_STROKES} pieces, got {len(prompts)}; draw fewer at once")
    return prompts


def _pieces(drawn: NDArray[np.bool_], connectivity: Literal[6, 26]) -> list[NDArray[np.bool_]]:
    labels = np.asarray(cc3d.connected_components(drawn, connectivity=connectivity))
    return [labels == label for label in range(1, int(labels.max()) + 1)]


def _ijk(zyx: Sequence[float] | NDArray, start: IntTriple) -> Triple:
    z, y, x = (float(v) + s for v, s in zip(zyx, start, strict=True))
    return (x, y, z)


def _path_through(piece: NDArray[np.bool_]) -> list[IntTriple]:
    """Every voxel of a connected piece, ordered so that consecutive ones are neighbours; some are passed twice."""
    left = {(int(z), int(y), int(x)) for z, y, x in np.argwhere(piece)}
    at = min(left)
    left.discard(at)
    path, back = [at], [at]
    while left:
        step = next((n for n in _neighbours(at) if n in left), None)
        if step is not None:
            left.discard(step)
            back.append(step)
        else:
            back.pop()
            step = back[-1]
        path.append(step)
        at = step
    return path


def _neighbours(at: IntTriple) -> list[IntTriple]:
    z, y, x = at
    steps = itertools.product((-1, 0, 1), repeat=3)
    return [(z + a, y + b, x + c) for a, b, c in steps if (a, b, c) != (0, 0, 0)]


def _without_diagonals(path: list[IntTriple]) -> list[Sequence[float]]:
    """Add a corner just before the middle of every diagonal step, so that the line touches no third voxel."""
    exact: list[Sequence[float]] = [path[0]]
    for before, after in itertools.pairwise(path):
        if sum(a != b for a, b in zip(before, after, strict=True)) > 1:
            exact.append([a + 0.49 * (b - a) for a, b in zip(before, after, strict=True)])
        exact.append(after)
    return exact

"""What travels between server and client: masks as packed bits of the changed box, and the error that has a status.

Positions on the wire are ijk. A box of voxels is ``start`` (inside) to ``stop`` (outside), i, j, k. Voxels run x first,
then y, then z: the order of NIfTI, and of a (D, H, W) array read row by row. ``bits`` is one bit per voxel of the box,
the highest bit of a byte first, zlib ("deflate" to a browser), base64; ``prompts/packed.py`` uses the same. Nothing
here needs torch or FastAPI, so that a client can use it. Read ``server.py`` next for the routes, ``client.py`` for the
other end.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region

API_VERSION = 1
_COMPRESSION = 1  # masks shrink a lot at any level; a click must not wait for the last per cent


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status, 400 to 599.
        message: One line that says what to do.
        retry_after: Seconds after which trying again makes sense, or None.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, " ".join(message.split()), retry_after


def inflate(data: bytes, limit: int, what: str) -> bytes:
    """Decompress one zlib or gzip stream of at most ``limit`` bytes; never holds more than that.

    Raises:
        InputError: if the stream is damaged, cut, followed by something else, or longer than ``limit``.
    """
    stream = zlib.decompressobj(wbits=47)
    try:
        out = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise InputError(f"{what} must be a zlib or gzip stream, got damaged bytes ({error})") from error
    if len(out) > limit:
        raise InputError(f"{what} must hold at most {limit} bytes, got more; check the box they belong to")
    if not stream.eof or stream.unused_data:
        raise InputError(f"{what} must be one whole stream, got {'trailing bytes' if stream.eof else 'a cut one'}")
    return out


def update_to_json(object_id: int, region: Region, mask: NDArray) -> dict[str, Any]:
    """What changed of one object: within the box, its mask is now this.

    Args:
        object_id: Whose mask it is.
        region: Stored zyx.
        mask: (d, h, w), the region's shape; not 0 is inside.
    """
    bits = zlib.compress(np.packbits(mask != 0).tobytes(), _COMPRESSION)
    box = {"start": list(region.start_zyx[::-1]), "stop": list(region.stop_zyx[::-1])}
    return {"object_id": object_id, **box, "bits": base64.b64encode(bits).decode("ascii")}


def update_from_json(entry: Any, size_ijk: IntTriple) -> tuple[int, Region, NDArray[np.uint8]]:
    """The inverse of ``update_to_json``: object, region (stored zyx) and the uint8 mask inside it.

    Raises:
        InputError: if the box leaves the volume, or the bits are damaged or not as many as the box has voxels.
    """
    if not isinstance(entry, dict) or type(entry.get("object_id")) is not int:
        raise InputError("an update must be an object with object_id, start, stop and bits")
    start, stop = _voxel(entry.get("start"), "start"), _voxel(entry.get("stop"), "stop")
    if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, size_ijk, strict=True)):
        raise InputError(f"the box of an update must lie in the volume of size {size_ijk}, got {start} to {stop}")
    region = Region(start[::-1], stop[::-1])
    count = math.prod(region.shape_zyx)
    try:
        packed = base64.b64decode(entry.get("bits", ""), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"bits must be base64, got something else ({error})") from error
    raw = inflate(packed, -(-count // 8), "bits")
    if len(raw) != -(-count // 8):
        raise InputError(f"bits must be {-(-count // 8)} bytes for {count} voxels, got {len(raw)}")
    return (
        entry["object_id"],
        region,
        np.unpackbits(np.frombuffer(raw, np.uint8), count=count).reshape(region.shape_zyx),
    )


def _voxel(value: Any, what: str) -> IntTriple:
    if not isinstance(value, Sequence) or len(value) != 3 or any(type(v) is not int for v in value):
        raise InputError(f"{what} must be three whole numbers i, j, k, got {str(value)[:80]}")
    return (value[0], value[1], value[2])

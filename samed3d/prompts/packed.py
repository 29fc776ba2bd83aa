"""A mask as packed bits of its bounding box: small enough to keep one per prompt, to send, and to write into JSON.

It is not a file format of its own; ``volume/writing.py`` has those.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region, bounding_region

_LEVEL = 1  # masks shrink a lot at any level
_MOST_VOXELS = 2**33


@dataclass(frozen=True)
class PackedMask:
    """A (D, H, W) mask of which only the bounding box is kept.

    Attributes:
        shape_zyx: Of the whole mask.
        region: The bounding box of its voxels; empty for an empty mask.
        bits: zlib-compressed ``numpy.packbits`` of the box, C order (x fastest).
    """

    shape_zyx: IntTriple
    region: Region
    bits: bytes

    @classmethod
    def of(cls, mask: NDArray) -> PackedMask:
        """Pack a whole (D, H, W) mask; what is not zero belongs to it."""
        d, h, w = mask.shape
        return cls.of_part(mask, Region((0, 0, 0), (d, h, w)), (d, h, w))

    @classmethod
    def of_part(cls, part: NDArray, region: Region, shape_zyx: IntTriple) -> PackedMask:
        """Pack a (d, h, w) mask that is known inside ``region`` only and empty elsewhere in ``shape_zyx``."""
        tight = bounding_region(part)
        box, packer = part[tight.slices], zlib.compressobj(_LEVEL)
        eights = (np.packbits(box[first : first + 8] != 0).tobytes() for first in range(0, len(box), 8))  # whole bytes
        bits = b"".join([*map(packer.compress, eights), packer.flush()])
        return cls(shape_zyx, tight if tight.is_empty else tight.shifted(region.start_zyx), bits)

    @property
    def voxels(self) -> int:
        """How many belong to it."""
        return sum(int(np.count_nonzero(plane)) for plane in self.planes())

    def inside(self) -> NDArray[np.bool_]:
        """The mask within ``region``."""
        return self._slices(zlib.decompress(self.bits), 0, self.region.shape_zyx[0])

    def planes(self) -> Iterator[NDArray[np.bool_]]:
        """The mask within ``region``, slice by slice, of which only one is unpacked at a time."""
        packed = zlib.decompress(self.bits)
        for number in range(self.region.shape_zyx[0]):
            yield self._slices(packed, number, number + 1)[0]

    def _slices(self, packed: bytes, start: int, stop: int) -> NDArray[np.bool_]:
        _, height, width = self.region.shape_zyx
        first, last = start * height * width, stop * height * width
        bits = np.unpackbits(np.frombuffer(packed, np.uint8)[first // 8 : -(-last // 8)])
        return bits[first % 8 :][: last - first].reshape(stop - start, height, width).view(bool)

    def on(self, region: Region) -> NDArray[np.bool_]:
        """The mask within any region of the whole; only the slices in it are unpacked."""
        common = self.region.intersection(region)
        part = np.zeros(region.shape_zyx, dtype=bool)
        packed = b"" if common.is_empty else zlib.decompress(self.bits)
        for piece in common.slabs():
            planes, *rest = piece.slices_in(self.region)
            part[piece.slices_in(region)] = self._slices(packed, planes.start, planes.stop)[:, *rest]
        return part

    def full(self) -> NDArray[np.bool_]:
        """The whole (D, H, W) mask."""
        mask = np.zeros(self.shape_zyx, dtype=bool)
        mask[self.region.slices] = self.inside()
        return mask

    def to_json(self) -> dict[str, Any]:
        """``size``, ``start`` and ``stop`` as i, j, k, and the bits as base64."""
        ends = {"size": self.shape_zyx[::-1], "start": self.region.start_zyx[::-1], "stop": self.region.stop_zyx[::-1]}
        return {**{key: list(value) for key, value in ends.items()}, "bits": base64.b64encode(self.bits).decode()}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> PackedMask:
        """The inverse of ``to_json``.

        Raises:
            InputError: if the numbers do not describe a box in a volume, or the bits are damaged or not as many as the
                box has voxels.
        """
        shape, start, stop = (_whole(body.get(key), key) for key in ("size", "start", "stop"))
        if (
            not all(0 <= a <= b <= n for a, b, n in zip(start, stop, shape, strict=True))
            or int(np.prod(shape, dtype=object)) > _MOST_VOXELS
        ):
            raise InputError(
                f"mask start and stop must lie in its size, got start {start}, stop {stop}, size {shape} (zyx)"
            )
        region = Region(start, stop)
        expected = -(-int(np.prod(region.shape_zyx, dtype=np.int64)) // 8)
        try:
            bits = base64.b64decode(body.get("bits", ""), validate=True)
            stream = zlib.decompressobj()
            found = len(stream.decompress(bits, expected + 1))  # never more than the box can hold, whatever was sent
        except (zlib.error, binascii.Error, TypeError, ValueError) as error:
            raise InputError(f"mask bits are damaged ({error}); write the file again") from error
        if found != expected or not stream.eof or stream.unused_data:
            raise InputError(
                f"mask bits must hold {expected} bytes for its box, got {found if found <= expected else 'more'}"
            )
        return cls(shape, region, bits)


@dataclass
class MaskUpdate:
    """What one call changed.

    Attributes:
        region: Box of the voxels that changed, zyx of the stored array; empty if none did.
        mask: The object's uint8 mask inside it.
        seconds: That the call took.
        object_id: Whose mask.
        prompt_id: Of the prompt that was added, moved or removed; 0 if there is none.
    """

    region: Region
    mask: NDArray[np.uint8]
    seconds: float
    object_id: int = 1
    prompt_id: int = 0

    @property
    def changed(self) -> bool:
        """Whether any voxel changed."""
        return not self.region.is_empty


def _whole(values: Any, key: str) -> IntTriple:
    """Three whole numbers given x first, as zyx."""
    if not isinstance(values, list) or len(values) != 3 or not all(type(v) is int for v in values):
        raise InputError(f"mask {key} must be three whole numbers, got {values!r}")
    return (values[2], values[1], values[0])

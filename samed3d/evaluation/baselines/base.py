"""What methods without training share: prompts become voxels, every new prompt makes the mask anew.

Read ``regions.py`` for the first of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region, Triple, ijk_to_zyx
from samed3d.prompts import Box, Point, Prompt, Scribble, box_in_grid, point_in_grid
from samed3d.volume import Volume


@dataclass
class Said:
    """What was said of one object, in stored zyx voxels: clicked or painted voxels on it and off it, and a box or
    None.
    """

    inside: list[IntTriple] = field(default_factory=list)
    outside: list[IntTriple] = field(default_factory=list)
    box: Region | None = None


class ClassicalMethod(ABC):
    """A method on one volume.

    Attributes:
        name: As on the command line.
        takes: Prompts that can come first, of ``"point" "box" "scribble"``; clicks may always follow.
        knows_truth: Whether it is a bound, made from the reference itself.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset({"point", "scribble"})
    knows_truth: ClassVar[bool] = False

    def __init__(self, volume: Volume, truth: NDArray[np.bool_] | None = None) -> None:
        """On a volume; ``truth`` (D, H, W) is only looked at by bounds."""
        self.volume, self.truth = volume, truth
        self._said: dict[int, Said] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Take a prompt and make the mask anew.

        Raises:
            InputError: for a prompt that the method does not take, one outside the volume, or a negative click before
                anything else.
        """
        before = self._said.get(object_id)
        kind = type(prompt).__name__.lower()
        if not isinstance(prompt, Point | Scribble | Box) or (
            kind not in self.takes and not (before and isinstance(prompt, Point))
        ):
            taken = (
                "points only"
                if "box" not in self.takes
                else "a box first"
                if "point" not in self.takes
                else "points, boxes and scribbles"
            )
            raise InputError(f"{self.name} takes {taken}, got a {kind}")
        said = Said(list(before.inside), list(before.outside), before.box) if before else Said()
        self._note(said, prompt)
        if not said.inside and said.box is None:
            raise InputError(f"{self.name} needs a positive prompt before a negative one")
        self._masks[object_id] = self.segment(said).astype(np.uint8)
        self._said[object_id] = said

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The object's mask, uint8 0 or 1, (D, H, W)."""
        return self._masks[object_id]

    @abstractmethod
    def segment(self, said: Said) -> NDArray:
        """The mask (D, H, W) for everything said of an object; at least one voxel inside or a box is given."""

    def _note(self, said: Said, prompt: Point | Scribble | Box) -> None:
        grid = self.volume.grid
        if isinstance(prompt, Box):
            low, high = (ijk_to_zyx(corner) for corner in box_in_grid(prompt, grid))
            said.box = Region(_voxel(low), tuple(v + 1 for v in _voxel(high)))  # type: ignore[arg-type]
            return
        points = (
            [prompt] if isinstance(prompt, Point) else [Point(at, prompt.positive, prompt.space) for at in prompt.path]
        )
        (said.inside if prompt.positive else said.outside).extend(
            _voxel(ijk_to_zyx(point_in_grid(p, grid))) for p in points
        )


def _voxel(zyx: Triple) -> IntTriple:
    z, y, x = (int(np.floor(v + 0.5)) for v in zyx)
    return (z, y, x)


def longest_edge_mm(volume: Volume) -> float:
    """Of the image: what stands for scale where nothing is known of the structure, as for our own first crop."""
    return max(n * s for n, s in zip(volume.grid.shape_zyx, volume.grid.spacing_zyx_mm, strict=True))


def region_around(voxels: list[IntTriple], reach_mm: float, spacing_zyx_mm: Triple, shape_zyx: IntTriple) -> Region:
    """The part of a volume within ``reach_mm`` along each axis of some voxels."""
    reach = [int(np.ceil(reach_mm / s)) for s in spacing_zyx_mm]
    low = tuple(min(v[a] for v in voxels) - reach[a] for a in range(3))
    high = tuple(max(v[a] for v in voxels) + reach[a] + 1 for a in range(3))
    return Region(low, high).clip(shape_zyx)  # type: ignore[arg-type]

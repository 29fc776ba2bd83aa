"""Classical interactive methods behind the same two calls as ``Session``: add a prompt, look at the mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import ijk_to_zyx
from samed3d.prompts import Point, Prompt, point_in_grid
from samed3d.volume import Volume, grow_region

BASELINES = ("region_growing",)
MULTIPLIER = 1.25
"""Width of the accepted intensities in standard deviations; the best of eight values on training subjects (docs/measure.md)."""


class RegionGrowing:
    """SimpleITK's confidence-connected region growing from all positive clicks; negative clicks have no meaning for it and are ignored."""

    def __init__(self, volume: Volume, multiplier: float = MULTIPLIER) -> None:
        self.volume, self.multiplier = volume, multiplier
        self._seeds: dict[int, list[tuple[int, int, int]]] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Add a click and grow anew.

        Raises:
            InputError: for a box, or a point outside the volume.
        """
        if not isinstance(prompt, Point):
            raise InputError("region_growing takes points only, got a box")
        z, y, x = (int(np.floor(v + 0.5)) for v in ijk_to_zyx(point_in_grid(prompt, self.volume.grid)))
        if not prompt.positive and object_id in self._masks:
            return
        self._seeds.setdefault(object_id, []).append((z, y, x))
        self._masks[object_id] = grow_region(self.volume.array, self._seeds[object_id], self.multiplier)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The object's mask, uint8 0 or 1, (D, H, W)."""
        return self._masks[object_id]

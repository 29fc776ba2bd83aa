"""The click loop on one structure of a whole volume: prompt, look at the full native-grid mask, click where it is most wrong.

No ground truth reaches what is measured but through the clicks. Read ``clicks.py`` for the rules, ``run.py`` for who is clicked.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import next_click
from samed3d.geometry import zyx_to_ijk
from samed3d.metrics import dice
from samed3d.prompts import Point, Prompt
from samed3d.volume import Volume


class Clickable(Protocol):
    """What is measured: a ``Session`` or a baseline."""

    def add(self, prompt: Prompt, object_id: int = 1) -> Any:
        """Take a prompt."""

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The mask after it."""


def click_through(
    subject: Clickable, volume: Volume, target: NDArray[np.bool_], clicks: int, rng: np.random.Generator, object_id: int
) -> list[dict[str, Any]]:
    """Click one structure up to ``clicks`` times; one row per click, a perfect mask repeats its last row, an empty target gives none.

    Args:
        subject: What is measured.
        volume: Its image.
        target: (D, H, W) bool, in the file's own order.
        clicks: How many.
        rng: Of the first click.
        object_id: A number not used before on ``subject``.
    """
    mask = np.zeros(target.shape, dtype=bool)
    rows: list[dict[str, Any]] = []
    for turn in range(1, clicks + 1):
        click = next_click(mask, target, "uniform" if turn == 1 else "centre", rng)
        if click is None:
            rows += [rows[-1] | {"click": turn, "seconds": 0.0}] if rows else []
            continue
        zyx, positive = click
        began = time.perf_counter()
        subject.add(Point(zyx_to_ijk(zyx), positive), object_id=object_id)
        seconds = time.perf_counter() - began
        mask = subject.mask_of(object_id).astype(bool)
        rows.append(
            {"click": turn, "dice": round(dice(mask, target), 5), "obeyed": int(mask[zyx] == positive), "seconds": round(seconds, 4)}
        )
    return rows

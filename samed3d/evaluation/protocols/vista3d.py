"""VISTA3D's iterative point protocol, without and with the two choices that make it optimistically biased.

First click: the target eroded by 3 x 3 x 3, its largest component, the voxel nearest that component's mean. Each next
one: missed and surplus voxels eroded alike, the largest component of each; the missed one where it is at least as
large; a random voxel in it. Where nothing is left after eroding, the first ten clicks try once more with a
kernel that is flat across slices; otherwise the series ends. All clicks are kept.

``vista3d-points-flattering`` follows the released script: surplus voxels in slices without any target are deleted
before scoring **and** before the next click, and the score is the best so far. Both differ from the script: the model
chooses its own crop (the script: a sliding window), components are 26-connected, and the first click falls back to the
whole target where eroding leaves nothing of it.

Source: ``val_multigpu_point_iterative.py`` of Project-MONAI/VISTA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import largest_component
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    Answer,
    Click,
    StructureProtocol,
    StructureTask,
    Turn,
    click_turns,
    point_at,
)
from samed3d.geometry import IntTriple, bounding_region
from samed3d.metrics import dice

CUBE, FLAT = (3, 3, 3), (1, 3, 3)
FLAT_UNTIL = 10


class Vista3dPoints(StructureProtocol):
    """The click rule, scored on the whole mask."""

    name = "vista3d-points"
    title = "VISTA3D's point rule, scored on the whole mask after each click"
    replayable = True

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Click by the rule."""
        session = MeteredSession.open(method, task.volume, task.target)

        def choose(number: int, mask: NDArray[np.bool_]) -> Click | None:
            if number == 1:
                return first_click(task.target), True
            return further_click(mask, task.target, number - 1, task.rng)

        def give(click: Click) -> Answer:
            mask, cost = session.give([point_at(click)])
            return self.visible(mask, task.target), cost

        return click_turns(task.clicks, choose, give, np.zeros(task.target.shape, bool))

    def visible(self, mask: NDArray[np.bool_], target: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The part of the mask that is scored and that the next click is based on."""
        return mask


class Vista3dPointsReleased(Vista3dPoints):
    """As the released script: surplus outside the target's slices is deleted, and the best score so far counts."""

    name = "vista3d-points-flattering"
    title = "VISTA3D's point rule as released: surplus in slices without target deleted, best so far"
    optimistic_bias = "surplus in slices without target is deleted by the truth; the best score so far counts"
    leaks_truth = True
    replayable = False

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """The same turns with the best mask so far."""
        best, highest = np.zeros(task.target.shape, bool), -1.0
        for turn in super().simulate(method, task):
            if (current := dice(turn.mask, task.target)) >= highest:
                best, highest = turn.mask, current
            yield replace(turn, mask=best)

    def visible(self, mask: NDArray[np.bool_], target: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask without surplus in slices that have no target."""
        return mask & np.asarray(target.any(axis=(1, 2)))[:, None, None]


def first_click(target: NDArray[np.bool_]) -> IntTriple:
    """The voxel of the eroded target's largest component that is nearest its mean."""
    region = bounding_region(target)
    inner = target[region.slices]
    eroded = _eroded(inner, CUBE)
    found = np.argwhere(largest_component(eroded if eroded.any() else inner))
    nearest = found[int(((found - found.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    z, y, x = (int(v) + a for v, a in zip(nearest, region.start_zyx, strict=True))
    return (z, y, x)


def further_click(
    pred: NDArray[np.bool_], target: NDArray[np.bool_], number: int, rng: np.random.Generator
) -> Click | None:
    """The click after the ``number``-th, or None where eroding leaves nothing wrong."""
    region = bounding_region(pred ^ target)
    if region.is_empty:
        return None
    pred, target = pred[region.slices], target[region.slices]
    for kernel in (CUBE, FLAT) if number < FLAT_UNTIL else (CUBE,):
        missed, surplus = (largest_component(_eroded(m, kernel)) for m in (target & ~pred, pred & ~target))
        chosen = missed if np.count_nonzero(missed) >= np.count_nonzero(surplus) else surplus
        where = np.argwhere(chosen)
        if len(where):
            at = where[int(rng.integers(len(where)))]
            z, y, x = (int(v) + a for v, a in zip(at, region.start_zyx, strict=True))
            return (z, y, x), chosen is missed
    return None


def _eroded(mask: NDArray[np.bool_], kernel: IntTriple) -> NDArray[np.bool_]:
    from scipy.ndimage import binary_erosion

    return binary_erosion(mask, np.ones(kernel, bool))

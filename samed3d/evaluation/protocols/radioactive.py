"""RadioActive's interactive loop for 3D models: a random click in the target, then five at random wrong voxels, six
masks in all.

Clicks stay inside the model's patch around the first click (a model of relative scale has no patch; for it, and for
whatever is no model of ours, the whole image counts). All prompts are sent again each time, with the low-resolution
logits; a perfect mask ends the loop and its mask is repeated. Scored on the whole image.

Source: ``radioa`` of MIC-DKFZ/radioactive, ``threeDCropped`` prompters, ``interactive_max_iter = 5``, seed 11121. Its
random numbers are not reproduced, only its rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import next_click
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import StructureProtocol, Task, Turn, point_at
from samed3d.geometry import IntTriple, Region

SEED = 11121


class Radioactive3d(StructureProtocol):
    """See the module."""

    name = "radioactive-3d"
    title = "RadioActive's 3D loop: one random click, five at random wrong voxels of the model's patch"
    fixed_clicks = 6

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """From RadioActive's seed."""
        return np.random.default_rng([SEED, seed, number])

    def walk(self, method: Method, task: Task) -> Iterator[Turn]:
        """Click inside the patch."""
        session = MeteredSession.open(method, task.volume, task.target)
        mask: NDArray[np.bool_] = np.zeros(task.target.shape, bool)
        patch: Region | None = None
        for number in range(1, task.clicks + 1):
            # What lies outside the patch counts as right, so that no click falls there.
            shown = task.target if patch is None else _inside(task.target, patch)
            click = next_click(mask if patch is None else _inside(mask, patch), shown, "uniform", task.rng)
            if click is None:
                return
            patch = patch or _patch(method, task, click[0])
            mask, cost = session.give([point_at(click)])
            yield Turn(number, [point_at(click)], mask, cost, click)


def _patch(method: Method, task: Task, middle: IntTriple) -> Region:
    shape = task.volume.grid.shape_zyx
    spec = method.model.spec if method.model is not None else None
    if spec is None or spec.spacing_mm is None:
        return Region((0, 0, 0), shape)
    half = [max(spec.input_shape_zyx) * spec.spacing_mm / s / 2 for s in task.volume.grid.spacing_zyx_mm]
    low = tuple(int(np.ceil(v - h)) for v, h in zip(middle, half, strict=True))
    high = tuple(int(np.floor(v + h)) + 1 for v, h in zip(middle, half, strict=True))
    return Region(low, high).clip(shape)  # type: ignore[arg-type]


def _inside(mask: NDArray[np.bool_], region: Region) -> NDArray[np.bool_]:
    cut = np.zeros_like(mask)
    cut[region.slices] = mask[region.slices]
    return cut

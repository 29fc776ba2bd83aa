"""RadioActive's interactive loop for 3D models: a random click in the target, then five at random wrong voxels.

Clicks stay inside the model's patch around the first click. For a model of relative scale, and for everything that is
no network of ours, the patch is the whole image. All prompts are sent again each time, with the low-resolution logits;
a perfect mask ends the loop and is repeated. Scored on the whole image.

Source: ``radioa`` of MIC-DKFZ/radioactive, ``threeDCropped`` prompters, ``interactive_max_iter = 5``, seed 11121. Its
random numbers are not reproduced, only its rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import next_click
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    Click,
    StructureProtocol,
    StructureTask,
    Turn,
    click_turns,
    cube_around,
    point_at,
)
from samed3d.geometry import IntTriple, Region

SEED = 11121


class Radioactive3d(StructureProtocol):
    """See the module."""

    name = "radioactive-3d"
    title = "RadioActive's 3D loop: one random click, five at random wrong voxels of the model's patch"
    fixed_clicks = 6
    replayable = True

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """From RadioActive's seed."""
        return np.random.default_rng([SEED, seed, number])

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Click inside the patch."""
        session = MeteredSession.open(method, task.volume, task.target)
        patch = Region((0, 0, 0), task.volume.grid.shape_zyx)

        def choose(number: int, mask: NDArray[np.bool_]) -> Click | None:
            nonlocal patch
            # Voxels outside the patch count as right, so that no click falls there.
            click = next_click(_inside(mask, patch), _inside(task.target, patch), "uniform", task.rng)
            if number == 1 and click is not None:
                patch = _patch(method, task, click[0])
            return click

        nothing = np.zeros(task.target.shape, bool)
        return click_turns(task.clicks, choose, lambda click: session.give([point_at(click)]), nothing)


def _patch(method: Method, task: StructureTask, middle: IntTriple) -> Region:
    spec = method.model.spec if method.model is not None else None
    if spec is None or spec.spacing_mm is None:
        return Region((0, 0, 0), task.volume.grid.shape_zyx)
    return cube_around(middle, max(spec.input_shape_zyx) * spec.spacing_mm, task.volume.grid)


def _inside(mask: NDArray[np.bool_], region: Region) -> NDArray[np.bool_]:
    cut = np.zeros_like(mask)
    cut[region.slices] = mask[region.slices]
    return cut

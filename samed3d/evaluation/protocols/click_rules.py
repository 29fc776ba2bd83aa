"""Two groups' rules of the next click on the whole image: RadioActive's and VISTA3D's.

RadioActive's 3D loop (``radioactive-3d``): a random click in the target, then five at random wrong voxels. Clicks stay
inside the model's patch around the first click. For a model of relative scale, and for everything that is no network of
ours, the patch is the whole image. A perfect mask ends the loop and is repeated. Source: ``radioa`` of
MIC-DKFZ/radioactive, ``threeDCropped`` prompters, ``interactive_max_iter = 5``, seed 11121. Its random numbers are not
reproduced, only its rule.

VISTA3D's iterative point protocol (``vista3d-points``): the first click is the voxel nearest the mean of the largest
component of the target eroded by 3 x 3 x 3. Each next one: missed and surplus voxels eroded alike, the largest part
of each; the missed one where it is at least as large; a random voxel in it. Where nothing is left after eroding, the
first ten clicks try once more with a kernel that is flat across slices; otherwise the series ends.

``vista3d-points-flattering`` follows the released script: surplus voxels in slices without any target are deleted
before scoring **and** before the next click, and the score is the best so far. Both differ from the script: the model
chooses its own crop (the script: a sliding window), components are 26-connected, and the first click falls back to the
whole target where eroding leaves nothing of it.

Source: ``val_multigpu_point_iterative.py`` of Project-MONAI/VISTA.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import largest_component, next_click
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    Answer,
    Click,
    StructureProtocol,
    StructureTask,
    Turn,
    click_turns,
    cube_around,
    point_at,
)
from samed3d.geometry import IntTriple, bounding_region
from samed3d.metrics import dice

SEED = 11121
CUBE, FLAT = (3, 3, 3), (1, 3, 3)
FLAT_UNTIL = 10


Chooser = Callable[[int, NDArray[np.bool_]], Click | None]
"""The next click from its number, from 1, and the mask so far; None ends the series."""


class ClickRule(StructureProtocol):
    """A protocol that gives clicks on the whole image by a rule and scores the whole mask."""

    replayable = True

    @abstractmethod
    def chooser(self, method: Method, task: StructureTask) -> Chooser:
        """The rule for one structure."""

    def visible(self, mask: NDArray[np.bool_], target: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The part of the mask that is scored and that the next click is based on."""
        return mask

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Click by the rule."""
        session = MeteredSession.open(method, task.volume, task.target)

        def give(click: Click) -> Answer:
            mask, cost = session.give([point_at(click)])
            return self.visible(mask, task.target), cost

        return click_turns(task.clicks, self.chooser(method, task), give, np.zeros(task.target.shape, bool))


class Radioactive3d(ClickRule):
    """RadioActive's; see the module."""

    name = "radioactive-3d"
    title = "RadioActive's 3D loop: one random click, five at random wrong voxels of the model's patch"
    fixed_clicks = 6

    def rng(self, seed: int, number: int) -> np.random.Generator:
        """From RadioActive's seed."""
        return np.random.default_rng([SEED, seed, number])

    def chooser(self, method: Method, task: StructureTask) -> Chooser:
        """Click inside the patch: voxels outside count as right, so that no click falls there."""
        patch: tuple[slice, ...] = (slice(None),) * 3

        def choose(number: int, mask: NDArray[np.bool_]) -> Click | None:
            nonlocal patch
            shown, wanted = np.zeros_like(mask), np.zeros_like(mask)
            shown[patch], wanted[patch] = mask[patch], task.target[patch]
            click = next_click(shown, wanted, "uniform", task.rng)
            spec = method.model.spec if method.model is not None else None
            if number == 1 and click is not None and spec is not None and spec.spacing_mm is not None:
                edge_mm = max(spec.input_shape_zyx) * spec.spacing_mm
                patch = cube_around(click[0], edge_mm, task.volume.grid).slices
            return click

        return choose


class Vista3dPoints(ClickRule):
    """VISTA3D's click rule, scored on the whole mask."""

    name = "vista3d-points"
    title = "VISTA3D's point rule, scored on the whole mask after each click"

    def chooser(self, method: Method, task: StructureTask) -> Chooser:
        """The middle of the target, then the largest eroded error."""
        return lambda number, mask: (
            (first_click(task.target), True) if number == 1 else further_click(mask, task.target, number - 1, task.rng)
        )


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

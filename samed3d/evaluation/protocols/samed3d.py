"""Our protocol: the whole image on its own grid, several click policies, no ground truth but through the prompts.

Each next prompt comes from the error of the **full mask**; scores are those after n clicks, not the best so far. Click
policies:

- ``uniform``: every click uniform over all wrong voxels (SAM-Med3D's rule).
- ``centre``: the first click uniform in the structure, each next one at the voxel deepest inside the largest wrong
  component.
- ``ritm``: of missed and surplus voxels the deeper kind, a random voxel at more than half that depth.
- ``noisy``: aimed at the middle of the largest wrong component, missing it by ``ERROR_MM`` along each axis, with the
  sign that was meant; each click costs ``DELAY_SECONDS`` of the person's time, which the score ``seconds to ...``
  counts.

The first prompt is a ``click``, a ``box`` whose faces are off by up to ``BOX_JITTER`` of its edge, or a ``scribble``
along the middle of one slice. Source of the rules: ``clicks.py``. Simulated users that click centres are known to be
optimistic (arXiv 2404.01816).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from samed3d.clicks import next_click, noisy_click, user_box, user_stroke
from samed3d.errors import InputError
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    Click,
    EvaluationSettings,
    StructureProtocol,
    StructureTask,
    Turn,
    box_around,
    click_turns,
    point_at,
)
from samed3d.evaluation.results import PromptStrategy
from samed3d.geometry import as_triple, zyx_to_ijk
from samed3d.prompts import Prompt, Scribble

POLICIES = ("uniform", "centre", "ritm", "noisy")
PROMPTS = ("click", "box", "scribble")
ERROR_MM = 2.0
"""Standard deviation of a noisy click along each axis: an assumption, about two voxels of a usual CT slice."""
DELAY_SECONDS = 2.0
"""Time that a person needs for a click: an assumption that only ``seconds to ...`` depends on."""
BOX_JITTER = 0.1


class Samed3dProtocol(StructureProtocol):
    """See the module."""

    name = "samed3d"
    title = "full native grid, several users, click, box or scribble first"
    replayable = True

    def strategies(self, settings: EvaluationSettings) -> list[PromptStrategy]:
        """Every policy with every first prompt.

        Raises:
            InputError: for an unknown one.
        """
        for what, given, known in (("policy", settings.policies, POLICIES), ("prompt", settings.prompts, PROMPTS)):
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"{what} must be one of {', '.join(known)} or all, got {unknown[0]!r}")
        return [PromptStrategy(self.name, policy, first) for first in settings.prompts for policy in settings.policies]

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """A first prompt, then clicks."""
        return prompt_structure(MeteredSession.open(method, task.volume, task.target), task)


def prompt_structure(session: MeteredSession, task: StructureTask, object_id: int = 1) -> Iterator[Turn]:
    """Segment a structure with the prompts of a simulated user; ``object_id`` was not used before on the session."""
    mask = np.zeros(task.target.shape, dtype=bool)
    clicks_first = task.strategy.prompt == "click"
    if not clicks_first:
        first = _first_prompt(task)
        mask, cost = session.give([first], object_id)
        yield Turn(0, [first], mask, cost)

    def choose(number: int, mask: np.ndarray) -> Click | None:
        policy = task.strategy.policy
        if policy == "noisy":
            return noisy_click(mask, task.target, task.volume.grid.spacing_zyx_mm, ERROR_MM, task.rng)
        starts = number == 1 and clicks_first and policy == "centre"
        return next_click(mask, task.target, "uniform" if starts else policy, task.rng)

    yield from click_turns(task.clicks, choose, lambda click: session.give([point_at(click)], object_id), mask)


def _first_prompt(task: StructureTask) -> Prompt:
    if task.strategy.prompt == "box":
        box = user_box(task.target, BOX_JITTER, task.rng)
        assert box is not None, "structures without voxels are refused before"
        return box_around(*box)
    path = user_stroke(task.target, task.rng)
    return Scribble(tuple(zyx_to_ijk(as_triple(list(at))) for at in path), radius_vox=0.0)

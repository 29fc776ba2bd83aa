"""Our protocol: the whole image on its own grid, several kinds of user, nothing of the truth but the prompts.

Each next prompt comes from the error of the **full mask**; scores are those after n clicks, not the best so far.
``policy`` is the user:

- ``uniform``: every click uniform over all wrong voxels (SAM-Med3D's rule).
- ``centre``: the first click uniform in the structure, each next one at the voxel deepest inside the largest wrong
  component.
- ``ritm``: of missed and surplus voxels the deeper kind, a random voxel at more than half that depth.
- ``noisy``: meant for the middle of the largest wrong component, landing beside it by ``ERROR_MM`` along each axis,
  with the sign that was meant; each click costs ``DELAY_SECONDS`` of the person's time, which the score ``seconds to
  ...`` counts.

``prompt`` is what comes first: a ``click``, a ``box`` whose faces are off by up to ``BOX_JITTER`` of its edge, or a
``scribble`` along the middle of one slice. Source of the rules: ``clicks.py``; that robots which click centres flatter
is known (arXiv 2404.01816).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import next_click, noisy_click, user_box, user_stroke
from samed3d.errors import InputError
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    FIRST,
    Click,
    StructureProtocol,
    Task,
    Turn,
    box_around,
    point_at,
)
from samed3d.evaluation.results import PromptStrategy
from samed3d.geometry import as_triple, zyx_to_ijk
from samed3d.prompts import Prompt, Scribble

POLICIES = ("uniform", "centre", "ritm", "noisy")
PROMPTS = tuple(FIRST)
ERROR_MM = 2.0
"""Standard deviation of a noisy click along each axis. An assumption, not a measurement: about two voxels of a usual CT
slice."""
DELAY_SECONDS = 2.0
"""What a person needs for a click. An assumption that only ``seconds to ...`` of the noisy user depends on."""
BOX_JITTER = 0.1


class Samed3dProtocol(StructureProtocol):
    """See the module."""

    name = "samed3d"
    title = "full native grid, several users, click, box or scribble first"

    def strategies(self, policies: Sequence[str], prompts: Sequence[str]) -> list[PromptStrategy]:
        """Every policy with every first prompt.

        Raises:
            InputError: for one that is not known.
        """
        for what, given, known in (("policy", policies, POLICIES), ("prompt", prompts, PROMPTS)):
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"{what} must be one of {', '.join(known)} or all, got {unknown[0]!r}")
        return [PromptStrategy(self.name, policy, prompt) for prompt in prompts for policy in policies]

    def walk(self, method: Method, task: Task) -> Iterator[Turn]:
        """A first prompt where one is asked for, then clicks."""
        session = MeteredSession.open(method, task.volume, task.target)
        mask = np.zeros(task.target.shape, dtype=bool)
        if task.strategy.prompt != "click":
            first = first_prompt(task)
            mask, cost = session.give([first])
            yield Turn(0, [first], mask, cost)
        for number in range(1, task.clicks + 1):
            click = policy_click(task, mask, first=number == 1 and task.strategy.prompt == "click")
            if click is None:
                return
            mask, cost = session.give([point_at(click)])
            yield Turn(number, [point_at(click)], mask, cost, click)


def first_prompt(task: Task) -> Prompt:
    """The box or scribble of a structure."""
    if task.strategy.prompt == "box":
        box = user_box(task.target, BOX_JITTER, task.rng)
        assert box is not None, "structures without voxels are refused before"
        return box_around(*box)
    path = user_stroke(task.target, task.rng)
    return Scribble(tuple(zyx_to_ijk(as_triple(list(at))) for at in path), radius_vox=0.0)


def policy_click(task: Task, mask: NDArray[np.bool_], first: bool) -> Click | None:
    """The next click of the task's user."""
    if task.strategy.policy == "noisy":
        return noisy_click(mask, task.target, task.volume.grid.spacing_zyx_mm, ERROR_MM, task.rng)
    policy = "uniform" if first and task.strategy.policy == "centre" else task.strategy.policy
    return next_click(mask, task.target, policy, task.rng)

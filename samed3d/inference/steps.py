"""An object's prompts as a chain of steps, each with the mask after it; editing one replays from there.

The mask after every step is kept as packed bits, so that undo shows it at once. The logits behind it are kept for the
most recent steps within a memory bound and are otherwise computed again from the prompts, exactly as before. Read
``edits.py`` next; ``strokes.py`` for what a prompt means, ``placement.py`` for where the model looks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from samed3d.geometry import IntTriple, Region, Triple
from samed3d.inference.placement import Placed, place
from samed3d.inference.predictor import CanonicalPrompts, Canvas, CropPredictor
from samed3d.inference.strokes import OBEYED_LOGIT, Said, joined, obeyed, start_from, understood, unknown_axis
from samed3d.prompts import MASK_LOGIT_THRESHOLD, PackedMask, Prompt
from samed3d.volume import Volume

HELD_BYTES = 512 * 2**20
"""Logits of earlier steps that are kept at most."""
MOST_DEPTH = 2.0
"""An object bounded in one slice is taken to reach at most this multiple of its size there to either side."""


@dataclass(frozen=True)
class Others:
    """What the other objects held when a step was predicted with them as background: their masks, and a voxel deep in
    each.
    """

    mask: PackedMask
    points: tuple[Triple, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One prompt of an object, or one look without a new prompt, and the mask after it.

    Attributes:
        before: The step before, or None.
        id: The prompt's number; 0 for a look.
        prompt: As given; None for a look.
        said: The prompt on the canonical volume; None for a look.
        looked: Whether the model was asked; False for a prompt that waits for the next look.
        others: The other objects, where they counted as background.
        mask: The object on the canonical volume after this step.
        seconds: That it took.
        depth: How far the object was found to reach across the slices of 2D boxes and lassos, half-open, if they left
            that open.
    """

    before: Step | None = field(repr=False)
    id: int
    prompt: Prompt | None
    said: Said | None
    looked: bool
    others: Others | None
    mask: PackedMask
    seconds: float = 0.0
    depth: tuple[float, float] | None = None

    @property
    def chain(self) -> list[Step]:
        """All steps up to this one, oldest first."""
        steps: list[Step] = []
        step: Step | None = self
        while step is not None:
            steps.append(step)
            step = step.before
        return steps[::-1]


class Chains:
    """Predicts the steps of all objects of one volume and keeps what is behind their masks.

    Args:
        volume: The image.
        predictor: The model on it.
        held_bytes: Bound on the logits that are kept.
    """

    def __init__(self, volume: Volume, predictor: CropPredictor, held_bytes: int = HELD_BYTES) -> None:
        self.volume, self.predictor, self.held_bytes = volume, predictor, held_bytes
        self._held: OrderedDict[Step, Placed | None] = OrderedDict()
        self._bytes = 0

    def check(self, prompt: Prompt) -> Said:
        """The prompt on the canonical volume; raises ``InputError`` if it cannot be used."""
        return understood(prompt, self.volume, self.predictor.model.spec)

    def extended(
        self, before: Step | None, prompt_id: int, prompt: Prompt | None, look: bool, others: Others | None
    ) -> Step:
        """A chain with one more prompt (or look, where ``prompt`` is None), predicted."""
        began = time.perf_counter()
        said = None if prompt is None else self.check(prompt)
        step = Step(before, prompt_id, prompt, said, look, others, nothing(self.predictor.shape_zyx))
        placed, depth = self._advance(step, None if before is None else self.placed(before))
        done = replace(step, mask=self._packed(placed), seconds=time.perf_counter() - began, depth=depth)
        self._hold(done, placed)
        return done

    def rebuilt(self, chain: Sequence[Step], prompt_id: int, prompt: Prompt | None) -> Step | None:
        """The chain with one prompt replaced, or taken out where ``prompt`` is None; later steps are predicted again.

        Returns:
            The new last step; None if no prompt is left.
        """
        first = next(n for n, step in enumerate(chain) if step.id == prompt_id)
        last = chain[first].before
        rest = list(chain[first + 1 :])
        if prompt is not None:
            last = self.extended(last, prompt_id, prompt, chain[first].looked, chain[first].others)
        elif not any(step.prompt is not None for step in [*chain[:first], *rest]):
            return None
        for step in rest:
            last = self.extended(last, step.id, step.prompt, step.looked, step.others)
        return last

    def placed(self, step: Step) -> Placed | None:
        """The logits after a step, predicted again where they are no longer kept; None before anything positive was
        said.
        """
        missing: list[Step] = []
        at: Step | None = step
        while at is not None and at not in self._held:
            missing.append(at)
            at = at.before
        placed = None if at is None else self._held[at]
        if at is not None:
            self._held.move_to_end(at)
        for entry in reversed(missing):
            placed, _ = self._advance(entry, placed)
            self._hold(entry, placed)
        return placed

    def clear(self) -> None:
        """Let go of everything that can be computed again."""
        self._held.clear()
        self._bytes = 0

    def _advance(self, step: Step, previous: Placed | None) -> tuple[Placed | None, tuple[float, float] | None]:
        """The state after a step, from the one before it; and its ``depth``."""
        chain = step.chain
        said = [s.said for s in chain if s.said is not None]
        known = step.depth or (step.before.depth if step.before is not None else None)
        if step.said is not None and step.said.prior is not None:
            return start_from(step.said.prior), None
        if not step.looked or not any(s.positive for s in said):
            return previous, known
        fresh = 0
        for entry in reversed(chain):
            if entry is not step and entry.looked:
                break
            fresh += entry.said is not None
        depth = self._depth(step, said, fresh, previous, known)
        prompts = self._prompts(step, said, fresh, depth)
        placed = place(self.predictor, prompts, previous)
        if previous is not None and fresh and not prompts.newest_positive:
            placed = Placed(placed.crop, _never_more(placed.canvas, previous.canvas))
        if step.others is not None:
            _without(placed.canvas, step.others.mask)
        return Placed(placed.crop, obeyed(placed.canvas, said)), depth

    def _prompts(self, step: Step, said: list[Said], fresh: int, depth: tuple[float, float] | None) -> CanonicalPrompts:
        prompts = joined(said, fresh, depth)
        if step.others is not None:
            prompts.points[:0] = [(at, False) for at in step.others.points]
        return prompts

    def _depth(
        self, step: Step, said: list[Said], fresh: int, previous: Placed | None, known: tuple[float, float] | None
    ) -> tuple[float, float] | None:
        """How far an object that was bounded in slices reaches across them, by a first look without a box.

        A model that knows 3D boxes answers far better when it is given one, and nobody wants to draw two.
        """
        axis = unknown_axis(said)
        if axis is None or "box" not in self.predictor.model.spec.prompts:
            return None
        new = fresh and any(s.extent is not None for s in said[len(said) - fresh :])
        if step.depth is not None or not new:
            return known
        prompts = self._prompts(step, said, fresh, None)
        assert prompts.extent is not None
        low, high = prompts.extent
        spacing = self.predictor.spacing_zyx_mm
        most = MOST_DEPTH * max((high[a] - low[a]) * spacing[a] for a in range(3) if a != axis) / spacing[axis]
        mask = self._packed(place(self.predictor, prompts, previous)).region
        start, stop = (mask.start_zyx[axis], mask.stop_zyx[axis]) if not mask.is_empty else (low[axis], high[axis])
        return min(max(start, low[axis] - most), low[axis]), max(min(stop, high[axis] + most), high[axis])

    def _packed(self, placed: Placed | None) -> PackedMask:
        shape = self.predictor.shape_zyx
        if placed is None:
            return nothing(shape)
        return PackedMask.of_part((placed.canvas.logits > MASK_LOGIT_THRESHOLD).numpy(), placed.canvas.region, shape)

    def _hold(self, step: Step, placed: Placed | None) -> None:
        self._held[step] = placed
        self._bytes += _size(placed)
        while self._bytes > self.held_bytes and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= _size(oldest)


def nothing(shape_zyx: IntTriple) -> PackedMask:
    """An empty mask."""
    return PackedMask.of_part(np.zeros((0, 0, 0), bool), Region((0, 0, 0), (0, 0, 0)), shape_zyx)


def _size(placed: Placed | None) -> int:
    if placed is None:
        return 0
    tensors: list[Tensor] = [placed.canvas.logits]
    if placed.crop is not None:
        tensors += [placed.crop.logits, placed.crop.inside, placed.crop.lowres_logits]
    return sum(t.numel() * t.element_size() for t in tensors)


def _never_more(canvas: Canvas, before: Canvas) -> Canvas:
    """The new logits, nowhere above the earlier ones: a click off the object takes away and never adds."""
    region = canvas.region
    earlier = torch.full(region.shape_zyx, -OBEYED_LOGIT)
    start = [max(a, b) for a, b in zip(region.start_zyx, before.region.start_zyx, strict=True)]
    stop = [min(a, b) for a, b in zip(region.stop_zyx, before.region.stop_zyx, strict=True)]
    if all(a < b for a, b in zip(start, stop, strict=True)):
        common = Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        earlier[common.slices_in(region)] = before.logits[common.slices_in(before.region)]
    return Canvas(region, torch.minimum(canvas.logits, earlier))


def _without(canvas: Canvas, others: PackedMask) -> None:
    """Take the other objects' voxels out of a canvas, in place."""
    taken = torch.from_numpy(others.on(canvas.region))
    canvas.logits[taken] = canvas.logits[taken].clamp(max=-OBEYED_LOGIT)

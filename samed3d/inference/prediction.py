"""From an object's prompts to its mask: a chain of steps, one per prompt, each with the mask after it.

The mask after every step is kept as packed bits, so that undo shows it at once. The logits behind it are kept for the
newest steps, up to ``KEPT_BYTES``, and are otherwise predicted again from the prompts, with exactly the same result.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samed3d.geometry import EMPTY_REGION, IntTriple, Region, Triple, as_triple
from samed3d.inference.crop_search import Prediction, predict_object
from samed3d.inference.model_prompts import Corners, ModelPrompts, combine, open_axis, since_mask, to_model_prompts
from samed3d.inference.predictor import Canvas, CropPredictor
from samed3d.prompts import PackedMask, Prompt
from samed3d.volume import Volume

KEPT_BYTES = 512 * 2**20
MAX_DEPTH = 2.0
"""An object that is bounded in one slice reaches at most this multiple of its size there to either side."""
MAX_GROWTH = 1.0
"""An object reaches at most this multiple of the size of a lasso inside it beyond that lasso, in the slice."""
LEAST_FILL, CORNER_FILL = 0.4, 0.5
"""Least share of a lasso's box that a mask must fill, and share of the box beside the lasso beyond which the lasso was
drawn inside the object."""
CLICK_LOGIT = 1.0
"""Least logit of a voxel that was clicked or drawn over; minus that for a negative prompt."""
MASK_PROMPT_LOGIT = 4
"""Logit of a given mask's voxels, and minus that around it."""


@dataclass(frozen=True)
class OtherObjects:
    """The other objects when a step was predicted with them as background: their masks, and a voxel deep in each."""

    mask: PackedMask
    points: tuple[Triple, ...]


@dataclass(frozen=True, eq=False)
class PromptStep:
    """One prompt of an object, or one prediction without a new prompt, and the mask after it.

    ``box`` is where the object was found, half-open, if 2D boxes and lassos do not bound it across their slices.
    """

    before: PromptStep | None = field(repr=False)
    id: int  # the prompt's number; 0 if there is no new prompt
    prompt: Prompt | None  # as given
    model_prompts: ModelPrompts | None  # on the canonical volume
    predicted: bool  # False for a prompt that waits for the next prediction
    others: OtherObjects | None  # if they count as background
    mask: PackedMask  # of the object on the canonical volume after this step
    seconds: float = 0.0  # that the step took
    box: Corners | None = None

    @property
    def chain(self) -> list[PromptStep]:
        """All steps up to this one, oldest first."""
        steps = [self]
        while steps[-1].before is not None:
            steps.append(steps[-1].before)
        return steps[::-1]


class PromptHistory:
    """Predicts the steps of all objects of one volume; up to ``kept_bytes`` of the logits behind masks are kept."""

    def __init__(self, volume: Volume, predictor: CropPredictor, kept_bytes: int = KEPT_BYTES) -> None:
        self.volume, self.predictor, self.kept_bytes = volume, predictor, kept_bytes
        self._kept: OrderedDict[PromptStep, Prediction | None] = OrderedDict()
        self._bytes = 0

    def check(self, prompt: Prompt) -> ModelPrompts:
        """The prompt on the canonical volume; raises ``InputError`` if it cannot be used."""
        return to_model_prompts(prompt, self.volume, self.predictor.model.spec)

    def extend(
        self,
        before: PromptStep | None,
        prompt_id: int,
        prompt: Prompt | None,
        predict: bool,
        others: OtherObjects | None,
    ) -> PromptStep:
        """The step after ``before`` for a new prompt, or for a new prediction where ``prompt`` is None."""
        began = time.perf_counter()
        model_prompts = None if prompt is None else self.check(prompt)
        mask = empty_mask(self.predictor.shape_zyx)
        step = PromptStep(before, prompt_id, prompt, model_prompts, predict, others, mask)
        prediction, box = self._advance(step, None if before is None else self.prediction(before))
        done = replace(step, mask=self._packed(prediction), seconds=time.perf_counter() - began, box=box)
        self._keep(done, prediction)
        return done

    def rebuild(self, chain: Sequence[PromptStep], prompt_id: int, prompt: Prompt | None) -> PromptStep | None:
        """The chain with one prompt replaced, or removed where ``prompt`` is None; later steps are predicted again.

        Returns:
            The new last step; None if no prompt is left.
        """
        first = next(n for n, step in enumerate(chain) if step.id == prompt_id)
        last = chain[first].before
        rest = list(chain[first + 1 :])
        if prompt is not None:
            last = self.extend(last, prompt_id, prompt, chain[first].predicted, chain[first].others)
        elif not any(step.prompt is not None for step in [*chain[:first], *rest]):
            return None
        for step in rest:
            last = self.extend(last, step.id, step.prompt, step.predicted, step.others)
        return last

    def prediction(self, step: PromptStep) -> Prediction | None:
        """The logits after a step, predicted again if they are no longer kept; None before any positive prompt."""
        missing: list[PromptStep] = []
        at: PromptStep | None = step
        while at is not None and at not in self._kept:
            missing.append(at)
            at = at.before
        prediction = None if at is None else self._kept[at]
        if at is not None:
            self._kept.move_to_end(at)
        for entry in reversed(missing):
            prediction, _ = self._advance(entry, prediction)
            self._keep(entry, prediction)
        return prediction

    @property
    def nbytes(self) -> int:
        """Memory of what ``clear`` deletes."""
        return self._bytes + self.predictor.nbytes

    def clear(self) -> None:
        """Delete everything that can be computed again, the model's features included."""
        self.predictor.clear()
        self._kept.clear()
        self._bytes = 0

    def _advance(self, step: PromptStep, previous: Prediction | None) -> tuple[Prediction | None, Corners | None]:
        """The prediction after a step, from the one before it; and the step's ``box``."""
        chain = step.chain
        prompts = [s.model_prompts for s in chain if s.model_prompts is not None]
        box = step.box or (step.before.box if step.before is not None else None)
        if step.model_prompts is not None and step.model_prompts.mask is not None:
            return _start_from(step.model_prompts.mask), None
        if not step.predicted or not any(p.positive for p in prompts):
            return previous, box
        new = 0
        for entry in reversed(chain):
            if entry is not step and entry.predicted:
                break
            new += entry.model_prompts is not None
        background = () if step.others is None else step.others.points
        axis = open_axis(prompts)
        if axis is None or "box" not in self.predictor.model.spec.prompts:
            box = None
        elif step.box is None and (drawn := [p for p in prompts[len(prompts) - new :] if p.slice_box is not None]):
            box = self._find_box(combine(prompts, new, None, background), axis, drawn[-1].voxels, previous)
        combined = combine(prompts, new, box, background)
        found = predict_object(self.predictor, combined, previous)
        corrections = []
        if previous is not None and step.before is not None and new and not combined.positive:
            corrections.append(_limit(step.before.mask, within=False))  # a negative prompt never adds a voxel
        if step.others is not None:
            corrections.append(_limit(step.others.mask, within=True))
        canvas = replace(found.canvas, corrections=tuple(corrections))
        return Prediction(found.crop, _enforce_clicks(canvas, prompts)), box

    def _find_box(
        self, prompts: ModelPrompts, axis: int, lasso: NDArray[np.intp] | None, previous: Prediction | None
    ) -> Corners:
        """The box of an object that is bounded in slices of one axis, from a prediction without a box.

        A model that takes 3D boxes is far better with one, and a user should not have to draw two 2D ones. A lasso may
        lie inside its object: a crop as small as that shows too little, and where the mask reaches beyond the lasso on
        all sides so does the box.
        """
        assert prompts.slice_box is not None
        low, high = (np.array(corner) for corner in prompts.slice_box)
        spacing, flat = np.array(self.predictor.spacing_zyx_mm), np.arange(3) == axis
        inside = Region(tuple(np.floor(low).astype(int).tolist()), tuple(np.ceil(high).astype(int).tolist()))
        mask = self._packed(predict_object(self.predictor, prompts, previous))
        if lasso is not None and mask.on(inside).mean() < LEAST_FILL:  # once more, in the crop of a click
            mask = self._packed(predict_object(self.predictor, replace(prompts, slice_box=None), previous))
        most = np.where(flat, MAX_DEPTH * ((high - low) * spacing)[~flat].max() / spacing, 0.0)
        if lasso is not None:
            beside = np.ones(inside.shape_zyx, bool)
            beside[tuple((lasso - np.array(inside.start_zyx)).T)] = False
            if beside.any() and mask.on(inside)[beside].mean() > CORNER_FILL:
                most = np.where(flat, most, MAX_GROWTH * (high - low))
        found = mask.region
        if found.is_empty:
            return prompts.slice_box
        start, stop = np.clip(found.start_zyx, low - most, low), np.clip(found.stop_zyx, high, high + most)
        return as_triple(start), as_triple(stop)

    def _packed(self, prediction: Prediction | None) -> PackedMask:
        shape = self.predictor.shape_zyx
        return empty_mask(shape) if prediction is None else prediction.canvas.mask(shape)

    def _keep(self, step: PromptStep, prediction: Prediction | None) -> None:
        self._kept[step] = prediction
        self._bytes += _size(prediction)
        while self._bytes > self.kept_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def empty_mask(shape_zyx: IntTriple) -> PackedMask:
    """A mask without a voxel."""
    return PackedMask.of_part(np.zeros((0, 0, 0), bool), EMPTY_REGION, shape_zyx)


def _size(prediction: Prediction | None) -> int:
    """Bytes."""
    if prediction is None:
        return 0
    tensors = [] if prediction.canvas.values is None else [prediction.canvas.values]
    if prediction.crop is not None:
        tensors += [prediction.crop.logits, prediction.crop.inside, prediction.crop.lowres_logits]
    return sum(t.nbytes for t in tensors)


def _start_from(mask: PackedMask) -> Prediction:
    """A given mask as if it had been predicted."""
    region = Region((0, 0, 0), (1, 1, 1)) if mask.region.is_empty else mask.region.expand(1).clip(mask.shape_zyx)
    return Prediction(
        None,
        Canvas(region, torch.from_numpy(mask.on(region)).to(torch.int8) * (2 * MASK_PROMPT_LOGIT) - MASK_PROMPT_LOGIT),
    )


def _enforce_clicks(canvas: Canvas, prompts: Sequence[ModelPrompts]) -> Canvas:
    """Give every voxel under a prompt its prompt's sign, the newest last; the canvas grows to hold positive ones."""
    marked = [(p.voxels, p.positive) for p in since_mask(prompts) if p.voxels is not None and len(p.voxels)]

    def enforce(part: Region, logits: Tensor) -> None:
        for voxels, positive in marked:
            index = voxels - np.array(part.start_zyx)
            index = index[((index >= 0) & (index < np.array(part.shape_zyx))).all(1)]
            where = tuple(torch.from_numpy(index[:, axis].astype(np.int64)) for axis in range(3))
            values = logits[where]
            logits[where] = values.clamp(min=CLICK_LOGIT) if positive else values.clamp(max=-CLICK_LOGIT)

    region = canvas.region
    for voxels, positive in marked:
        if positive:
            region = region.union(Region(tuple(voxels.min(0).tolist()), tuple((voxels.max(0) + 1).tolist())))
    values = canvas.values if region == canvas.region or canvas.values is None else canvas.on_region(region)
    return replace(canvas, region=region, values=values, corrections=(*canvas.corrections, enforce))


def _limit(mask: PackedMask, within: bool) -> Callable[[Region, Tensor], None]:
    """A correction that makes the voxels of a mask, or all others, background."""

    def limit(part: Region, logits: Tensor) -> None:
        limited = torch.from_numpy(mask.on(part) == within)
        torch.minimum(logits, torch.where(limited, -CLICK_LOGIT, math.inf), out=logits)

    return limit

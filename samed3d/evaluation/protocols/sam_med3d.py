"""SAM-Med3D's protocols: a cube of 192 mm, the newest click with the low-resolution logits of the one before.

``sam-med3d`` is the paper's: a random click in the target, the cube around it; each next click uniform over the wrong
voxels of the cubes so far; where the mask runs into a face of a cube, a further cube half a width beyond is decoded as
well. Scored on the whole image. ``sam-med3d-released`` is the released script's: the cube is centred on the **true**
bounding box at 1.5 mm, the first two clicks follow RITM's rule and later ones are uniform, and the score is taken
inside the cube only, so that a target beyond the cube costs nothing; the paper's tables report the best of all clicks,
which is the score ``best Dice``.

A network gets exactly that cube, on its own grid where that is not 128^3; a method that is no network of ours gets the
cube as an image of its own. Dice is of one series of clicks, which later clicks do not restart.

Source: SAM-Med3D, section 4 (paper); ``val.py`` before 2025-04 and ``utils/click_method.py`` of uni-medical/SAM-Med3D
(released).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from samed3d.clicks import next_click
from samed3d.crops import BACKGROUND_LOGIT, TileSum, sample_crop
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
from samed3d.evaluation.results import Row, curves
from samed3d.geometry import RAS_DIRECTION, CropFrame, Grid, IntTriple, Region, as_triple, bounding_region, zyx_to_ijk
from samed3d.inference.crop_search import next_tiles
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import CropMask, CropPredictor
from samed3d.prompts import MASK_LOGIT_THRESHOLD, Point
from samed3d.resample import nearest_crop
from samed3d.volume import Volume

EDGE_MM, SPACING_MM, CUBE = 192.0, 1.5, (128, 128, 128)
MAX_CUBES = 8
"""The paper: most targets need one or two. A bad network fills every cube, and each costs an encoding."""


class SamMed3d(StructureProtocol):
    """The paper's; see the module."""

    name = "sam-med3d"
    title = (
        "SAM-Med3D's paper: a 192 mm cube around the first click, newest click only, further cubes where the mask "
        "touches a face"
    )

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Click in the cube."""
        nothing = np.zeros(task.target.shape, bool)
        first = next_click(nothing, task.target, "uniform", task.rng)
        assert first is not None, "structures without voxels are refused before"
        own = method.model is None
        window = _cut_out(method, task, first[0]) if own else _Cubes(method, task, first[0])

        def choose(number: int, mask: NDArray[np.bool_]) -> Click | None:
            if number == 1:
                return first
            predicted = np.zeros(task.target.shape, bool)
            for region in window.predicted:
                predicted[region.slices] = True
            return next_click(window.clicked_on(mask) & predicted, task.target & predicted, "uniform", task.rng)

        return click_turns(task.clicks, choose, window.give, nothing)


class _OwnImage:
    """A part of a grid as an image of its own, for methods that choose no crop."""

    def __init__(
        self, method: Method, volume: Volume, target: NDArray[np.bool_], region: Region, shape: IntTriple
    ) -> None:
        """``volume`` and ``target`` are what ``region`` shows of a grid of ``shape``."""
        self._session, self._shape = MeteredSession.open(method, volume, target), shape
        self.predicted = [region]

    def give(self, click: Click) -> Answer:
        (region,) = self.predicted
        (z, y, x), start = click[0], region.start_zyx
        inside, cost = self._session.give([point_at(((z - start[0], y - start[1], x - start[2]), click[1]))])
        mask = np.zeros(self._shape, bool)
        mask[region.slices] = inside
        return mask, cost

    def clicked_on(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask


def _cut_out(method: Method, task: StructureTask, first: IntTriple) -> _OwnImage:
    """The cube around the first click."""
    grid = task.volume.grid
    region = cube_around(first, EDGE_MM, grid)
    axes = np.asarray(grid.direction_lps).reshape(3, 3)
    origin = np.asarray(grid.origin_lps_mm) + axes @ (np.asarray(region.start_zyx[::-1]) * grid.spacing_xyz_mm)
    cut = Grid(region.shape_zyx, grid.spacing_xyz_mm, as_triple(origin), grid.direction_lps)
    array = np.ascontiguousarray(task.volume.array[region.slices])
    volume = Volume(array, cut, f"{task.volume.source} (cut)", task.volume.modality)
    return _OwnImage(method, volume, task.target[region.slices], region, grid.shape_zyx)


def _resampled(method: Method, task: StructureTask, frame: CropFrame, target: NDArray[np.bool_]) -> _OwnImage:
    """The crop at the voxels that are scored."""
    crop, inside = sample_crop(task.volume.view.to_canonical(task.volume.array), frame)
    array = torch.where(inside, crop, crop[inside].min()).numpy()
    grid = Grid(CUBE, (SPACING_MM, SPACING_MM, SPACING_MM), direction_lps=RAS_DIRECTION)
    volume = Volume(array, grid, f"{task.volume.source} (crop)", task.volume.modality)
    return _OwnImage(method, volume, target, Region((0, 0, 0), CUBE), CUBE)


class _Cubes:
    """A network on the cube around the first click and those beyond its faces, averaged where they overlap."""

    def __init__(self, method: Method, task: StructureTask, first: IntTriple) -> None:
        self._method, self._view = method, task.volume.view
        self._predictor = _predictor(method, task.volume)
        middle = self._view.position_to_canonical(as_triple(list(first)))
        start = _cube_frame(self._predictor, middle).snapped()
        self._frames = [start]
        self._crops: dict[CropFrame, CropMask] = {}
        self._logits = torch.full(self._predictor.shape_zyx, BACKGROUND_LOGIT)

    @property
    def predicted(self) -> list[Region]:
        """The cubes so far, in the file's own order."""
        return [self._view.region_to_stored(frame.region().clip(self._predictor.shape_zyx)) for frame in self._frames]

    def give(self, click: Click) -> Answer:
        """Decode every cube that shows the click, and new ones beyond touched faces."""
        at = self._view.position_to_canonical(as_triple(list(click[0])))
        with self._method.meter.running() as cost:
            prompts = ModelPrompts([(at, click[1])])
            for frame in self._frames:  # grows while it runs
                known = self._crops.get(frame)
                if known is None or frame.contains(at):
                    self._crops[frame] = self._predictor.decode(
                        frame, prompts, None if known is None else known.lowres_logits
                    )
                    new = [other for other in next_tiles(self._crops[frame]) if other not in self._frames]
                    self._frames += new[: MAX_CUBES - len(self._frames)]
            self._blend()
        return self._stored(self._logits > MASK_LOGIT_THRESHOLD), cost

    def clicked_on(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask that the simulated user sees: the released code thresholds it differently from the answer."""
        threshold = self._predictor.model.spec.click_logit_threshold
        return mask if threshold == MASK_LOGIT_THRESHOLD else self._stored(self._logits > threshold)

    def _blend(self) -> None:
        total = TileSum((2,), self._view.whole)
        for crop in self._crops.values():
            canvas = self._predictor.paste(crop)
            logits = canvas.logits
            total.add(canvas.region, torch.stack([logits, torch.ones_like(logits)]))
        logits, count = total.values
        self._logits = torch.where(count > 0, logits / count.clamp(min=1), BACKGROUND_LOGIT)

    def _stored(self, mask: Tensor) -> NDArray[np.bool_]:
        return np.ascontiguousarray(self._view.to_stored(mask.numpy()))


class SamMed3dReleased(StructureProtocol):
    """The released script's; see the module."""

    name = "sam-med3d-released"
    title = "SAM-Med3D's released script: crop centred on the truth, scored inside the crop"
    optimistic_bias = (
        "the crop is centred on the true bounding box; what lies outside it is not scored; "
        "tables report the best of all clicks"
    )
    leaks_truth = True

    def simulate(self, method: Method, task: StructureTask) -> Iterator[Turn]:
        """Click in the crop around the truth."""
        view = task.volume.view
        truth = view.to_canonical(task.target)
        region = bounding_region(truth)
        middle = as_triple([(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)])
        frame = CropFrame.centred(middle, as_triple([SPACING_MM / s for s in view.spacing_zyx_mm]), CUBE)
        target = nearest_crop(truth, frame)
        if not target.any():
            return  # a structure thinner than the crop's voxels is gone, as in the script
        own = method.model is None
        window = _resampled(method, task, frame, target) if own else _FixedNetwork(method, task, frame)

        def choose(number: int, mask: NDArray[np.bool_]) -> Click | None:
            return next_click(window.clicked_on(mask), target, "ritm" if number <= 2 else "uniform", task.rng)

        for turn in click_turns(task.clicks, choose, window.give, np.zeros(CUBE, bool)):
            assert turn.clicked is not None
            at = view.position_to_stored(frame.to_volume(as_triple(list(turn.clicked[0]))))
            prompt = Point(zyx_to_ijk(at), turn.clicked[1])
            yield replace(turn, prompts=[prompt], target=target, spacing_zyx_mm=(SPACING_MM,) * 3)

    def own_scores(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """``best Dice``: the best of all clicks of each structure, as the paper's tables have it."""
        return [curve[0] | {"score": "best Dice", "value": max(row["dice"] for row in curve)} for curve in curves(rows)]


class _FixedNetwork:
    """A network on one crop; its answer is resampled to the 1.5 mm voxels that are scored."""

    def __init__(self, method: Method, task: StructureTask, frame: CropFrame) -> None:
        self._method, self._scored = method, frame
        self._predictor = _predictor(method, task.volume)
        self._frame = _cube_frame(self._predictor, frame.to_volume(as_triple([(n - 1) / 2 for n in frame.shape_zyx])))
        self._lowres: Tensor | None = None
        self._logits = torch.full(CUBE, BACKGROUND_LOGIT)

    def give(self, click: Click) -> Answer:
        prompts = ModelPrompts([(self._scored.to_volume(as_triple(list(click[0]))), click[1])])
        with self._method.meter.running() as cost:
            crop = self._predictor.decode(self._frame, prompts, self._lowres)
            self._lowres, self._logits = crop.lowres_logits, crop.logits
            if crop.logits.shape != CUBE:
                self._logits = F.interpolate(crop.logits[None, None], CUBE, mode="trilinear")[0, 0]
        return (self._logits > MASK_LOGIT_THRESHOLD).numpy(), cost

    def clicked_on(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask that the simulated user sees."""
        return (self._logits > self._predictor.model.spec.click_logit_threshold).numpy()


def _predictor(method: Method, volume: Volume) -> CropPredictor:
    return CropPredictor.of(method.model.eval(), torch.device(method.device), volume)


def _cube_frame(predictor: CropPredictor, middle: tuple[float, float, float]) -> CropFrame:
    """A cube of ``EDGE_MM`` on the model's own grid."""
    shape = predictor.crop_shape
    steps = as_triple([EDGE_MM / n / s for n, s in zip(shape, predictor.spacing_zyx_mm, strict=True)])
    return CropFrame.centred(middle, steps, shape)

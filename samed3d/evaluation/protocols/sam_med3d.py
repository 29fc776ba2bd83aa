"""SAM-Med3D's protocols: a cube of 192 mm, the newest click with the low-resolution logits of the one before.

``sam-med3d`` is the paper's: a random click in the target, the cube around it; each next click uniform over the wrong
voxels that have been looked at; where the mask runs into a face of the cube, a further cube half a width beyond is
decoded as well. Scored on the whole image. ``sam-med3d-released`` is the released script's: the cube is centred on the
**true** bounding box at 1.5 mm, the first two clicks follow RITM's rule and later ones are uniform, and the score is
taken inside the cube only; the paper's tables report the best of all clicks, which is the score ``best Dice``. A target
beyond the cube costs nothing there.

A network is shown exactly that cube, through its own grid where that is not 128^3; whatever is no network of ours gets
the cube as an image of its own. Dice here are of one run each; a structure's later clicks do not restart it.

Source: SAM-Med3D, section 4 (paper); ``val.py`` before 2025-04 and ``utils/click_method.py`` of uni-medical/SAM-Med3D
(released).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from samed3d.clicks import next_click
from samed3d.crops import BACKGROUND_LOGIT, sample_crop
from samed3d.evaluation.meter import Cost
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import Click, StructureProtocol, Task, Turn, point_at
from samed3d.evaluation.results import Row, curves
from samed3d.geometry import CropFrame, Grid, IntTriple, Region, as_triple, bounding_region, zyx_to_ijk
from samed3d.inference.crop_search import touched_faces
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import CropMask, CropPredictor
from samed3d.prompts import MASK_LOGIT_THRESHOLD, Point
from samed3d.resample import nearest_crop
from samed3d.volume import Volume

EDGE_MM, SPACING_MM, CUBE = 192.0, 1.5, (128, 128, 128)
MAX_CUBES = 8
"""The paper: most targets need one or two. A network without sense fills every cube, and each costs an encoding."""
_RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


class SamMed3d(StructureProtocol):
    """The paper's; see the module."""

    name = "sam-med3d"
    title = "SAM-Med3D's paper: a 192 mm cube around the first click, newest click only, further cubes where the mask touches a face"

    def walk(self, method: Method, task: Task) -> Iterator[Turn]:
        """Click in the cube."""
        first = next_click(np.zeros(task.target.shape, bool), task.target, "uniform", task.rng)
        assert first is not None, "structures without voxels are refused before"
        window = _Cubes(method, task, first[0]) if method.model is not None else _CutOut(method, task, first[0])
        click: Click | None = first
        for number in range(1, task.clicks + 1):
            if click is None:
                return
            mask, cost = window.give(click)
            yield Turn(number, [point_at(click)], mask, cost, click)
            seen = np.zeros(task.target.shape, bool)
            for region in window.seen:
                seen[region.slices] = True
            click = next_click(window.clicked_on(mask) & seen, task.target & seen, "uniform", task.rng)


class _CutOut:
    """The cube as an image of its own, for whatever chooses no crop."""

    def __init__(self, method: Method, task: Task, first: IntTriple) -> None:
        grid = task.volume.grid
        half = [EDGE_MM / s / 2 for s in grid.spacing_zyx_mm]
        low = tuple(int(np.ceil(v - h)) for v, h in zip(first, half, strict=True))
        high = tuple(int(np.floor(v + h)) + 1 for v, h in zip(first, half, strict=True))
        region = Region(low, high).clip(grid.shape_zyx)  # type: ignore[arg-type]
        origin = np.asarray(grid.direction_lps).reshape(3, 3) @ (
            np.asarray(region.start_zyx[::-1]) * grid.spacing_xyz_mm
        )
        cut = Grid(
            region.shape_zyx,
            grid.spacing_xyz_mm,
            as_triple(np.asarray(grid.origin_lps_mm) + origin),
            grid.direction_lps,
        )
        self._volume = Volume(
            np.ascontiguousarray(task.volume.array[region.slices]), cut, f"{task.volume.source} (cut)"
        )
        self._session = MeteredSession.open(method, self._volume, task.target[region.slices])
        self._shape, self.seen = grid.shape_zyx, [region]

    def give(self, click: Click) -> tuple[NDArray[np.bool_], Cost]:
        (z, y, x), start = click[0], self.seen[0].start_zyx
        inside, cost = self._session.give([point_at(((z - start[0], y - start[1], x - start[2]), click[1]))])
        mask = np.zeros(self._shape, bool)
        mask[self.seen[0].slices] = inside
        return mask, cost

    def clicked_on(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask


class _Cubes:
    """A network on the cube around the first click and those beyond its faces, averaged where they overlap."""

    def __init__(self, method: Method, task: Task, first: IntTriple) -> None:
        assert method.model is not None
        self._method, self._view = method, task.volume.view
        self._predictor = _predictor(method, task.volume)
        middle = self._view.position_to_canonical(as_triple(list(first)))
        start = _cube_frame(self._predictor, middle).snapped()
        self._frames = [start]
        self._crops: dict[CropFrame, CropMask] = {}
        self._logits = torch.full(self._predictor.shape_zyx, BACKGROUND_LOGIT)

    @property
    def seen(self) -> list[Region]:
        """What has been looked at, in the file's own order."""
        return [self._view.region_to_stored(frame.region().clip(self._predictor.shape_zyx)) for frame in self._frames]

    def give(self, click: Click) -> tuple[NDArray[np.bool_], Cost]:
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
                    self._extend(self._crops[frame])
            self._blend()
        return self._stored(self._logits > MASK_LOGIT_THRESHOLD), cost

    def clicked_on(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask that the simulated user sees: the released code cuts raw logits elsewhere than the answer."""
        threshold = self._predictor.model.spec.click_logit_threshold
        return mask if threshold == MASK_LOGIT_THRESHOLD else self._stored(self._logits > threshold)

    def _extend(self, crop: CropMask) -> None:
        for axis, side in touched_faces(crop):
            offset = [0.0, 0.0, 0.0]
            offset[axis] = side * crop.frame.extent_zyx_vox[axis] / 2
            frame = crop.frame.shifted(as_triple(offset))
            if frame not in self._frames and len(self._frames) < MAX_CUBES:
                self._frames.append(frame)

    def _blend(self) -> None:
        total, count = torch.zeros(self._predictor.shape_zyx), torch.zeros(self._predictor.shape_zyx)
        for crop in self._crops.values():
            canvas = self._predictor.paste(crop)
            total[canvas.region.slices] += canvas.logits
            count[canvas.region.slices] += 1
        self._logits = torch.where(count > 0, total / count.clamp(min=1), BACKGROUND_LOGIT)

    def _stored(self, mask: Tensor) -> NDArray[np.bool_]:
        return np.ascontiguousarray(self._view.to_stored(mask.numpy()))


class SamMed3dReleased(StructureProtocol):
    """The released script's; see the module."""

    name = "sam-med3d-released"
    title = "SAM-Med3D's released script: crop centred on the truth, scored inside the crop"
    optimistic_bias = "the crop is centred on the true bounding box; what lies outside it is not scored; tables report the best of all clicks"
    leaks_truth = True

    def walk(self, method: Method, task: Task) -> Iterator[Turn]:
        """Click in the crop around the truth."""
        view = task.volume.view
        truth = view.to_canonical(task.target)
        region = bounding_region(truth)
        middle = as_triple([(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)])
        frame = CropFrame.centred(middle, as_triple([SPACING_MM / s for s in view.spacing_zyx_mm]), CUBE)
        target = nearest_crop(truth, frame)
        if not target.any():
            return  # a structure thinner than the crop's voxels is gone, as in the script
        window = (
            _FixedNetwork(method, task, frame) if method.model is not None else _FixedImage(method, task, frame, target)
        )
        mask = seen = np.zeros(CUBE, bool)
        for number in range(1, task.clicks + 1):
            click = next_click(seen, target, "ritm" if number <= 2 else "uniform", task.rng)
            if click is None:
                return
            mask, seen, cost = window.give(click)
            at = view.position_to_stored(frame.to_volume(as_triple(list(click[0]))))
            yield Turn(
                number,
                [Point(zyx_to_ijk(at), click[1])],
                mask,
                cost,
                click,
                target,
                (SPACING_MM, SPACING_MM, SPACING_MM),
            )

    def own_scores(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """``best Dice``: the best of all clicks of each structure, as the paper's tables have it."""
        keys = ("case", "source", "subject", "group", "policy", "prompt")
        return [
            {key: curve[0][key] for key in keys} | {"score": "best Dice", "value": max(row["dice"] for row in curve)}
            for curve in curves(rows)
        ]


class _FixedNetwork:
    """A network on one crop; its answer is brought to the 1.5 mm voxels that are scored."""

    def __init__(self, method: Method, task: Task, frame: CropFrame) -> None:
        self._method, self._scored = method, frame
        self._predictor = _predictor(method, task.volume)
        middle = frame.to_volume(as_triple([(n - 1) / 2 for n in frame.shape_zyx]))
        self._frame = _cube_frame(self._predictor, middle)
        self._lowres: Tensor | None = None

    def give(self, click: Click) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Cost]:
        """The mask, and what the simulated user takes for it."""
        prompts = ModelPrompts([(self._scored.to_volume(as_triple(list(click[0]))), click[1])])
        with self._method.meter.running() as cost:
            crop = self._predictor.decode(self._frame, prompts, self._lowres)
            self._lowres, logits = crop.lowres_logits, crop.logits
            if logits.shape != CUBE:
                logits = F.interpolate(logits[None, None], CUBE, mode="trilinear")[0, 0]
        threshold = self._predictor.model.spec.click_logit_threshold
        return (logits > MASK_LOGIT_THRESHOLD).numpy(), (logits > threshold).numpy(), cost


class _FixedImage:
    """The resampled crop as an image of its own."""

    def __init__(self, method: Method, task: Task, frame: CropFrame, target: NDArray[np.bool_]) -> None:
        crop, inside = sample_crop(task.volume.view.to_canonical(task.volume.array), frame)
        array = torch.where(inside, crop, crop[inside].min()).numpy()
        grid = Grid(CUBE, (SPACING_MM, SPACING_MM, SPACING_MM), (0.0, 0.0, 0.0), _RAS)
        self._session = MeteredSession.open(method, Volume(array, grid, f"{task.volume.source} (crop)"), target)

    def give(self, click: Click) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Cost]:
        """The mask, twice."""
        mask, cost = self._session.give([point_at(click)])
        return mask, mask, cost


def _predictor(method: Method, volume: Volume) -> CropPredictor:
    assert method.model is not None
    view = volume.view
    return CropPredictor(
        method.model.eval(), torch.device(method.device), view.to_canonical(volume.array), view.spacing_zyx_mm
    )


def _cube_frame(predictor: CropPredictor, middle: tuple[float, float, float]) -> CropFrame:
    """A cube of ``EDGE_MM`` on the model's own grid."""
    shape = predictor.crop_shape
    steps = as_triple([EDGE_MM / n / s for n, s in zip(shape, predictor.spacing_zyx_mm, strict=True)])
    return CropFrame.centred(middle, steps, shape)

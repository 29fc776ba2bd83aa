"""Which crops of the volume to predict: the prompts tell where, the mask tells how far. No ground truth is used.

Read ``predictor.py`` next.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samed3d.crops import BACKGROUND_LOGIT, TileSum, paste_crop
from samed3d.geometry import EMPTY_REGION, CropFrame, IntTriple, Region, Triple, as_triple, bounding_region
from samed3d.inference.model_prompts import Corners, ModelPrompts
from samed3d.inference.predictor import Canvas, CropMask, CropPredictor
from samed3d.prompts import MASK_LOGIT_THRESHOLD

logger = logging.getLogger(__name__)

ZOOM_STEP = 1.6
FIRST_EDGE = 0.5
"""Edge of the crop around a first click as a share of the volume's longest edge; it is never finer than the image."""
BOX_FILL = 0.6
"""The share of the crop that a box fills."""
SMALL_FILL = 0.4
"""A mask that fills less of the crop's edge is predicted again in a smaller crop."""
GOOD_FILL = 0.45
LEAST_HELD = 0.5
"""A first mask that holds less of what the prompts mark is predicted again in a larger crop."""
TOUCH_SHARE = 0.01
"""A face counts as touched when this share of its voxels (at least 4) is mask."""
MAX_TILES = 27


@dataclass
class Prediction:
    """An object between two prompts."""

    crop: CropMask | None  # the last predicted one, an input of the next prediction; None for a mask that was given
    canvas: Canvas  # logits of what has been predicted so far


def predict_object(predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None) -> Prediction:
    """Predict an object from all its prompts.

    For a model of relative scale the search zooms: out while the mask touches the crop's border, in when the mask is
    small there. For a model of fixed spacing it tiles: where the mask touches the border, a crop half an extent further
    is predicted as well and blended.

    Args:
        predictor: The model on the volume.
        prompts: All prompts, with at least one positive point or a box.
        previous: The prediction before the newest prompts, or a given mask, or None.
    """
    relative = predictor.model.spec.spacing_mm is None
    return (_Zoom if relative else _Tiles)(predictor, prompts, previous).predict()


def touched_faces(crop: CropMask) -> list[tuple[int, int]]:
    """(axis, -1 or 1) of every face of the crop inside the volume that the mask touches."""
    mask = (crop.logits > MASK_LOGIT_THRESHOLD) & crop.inside
    faces = []
    for axis in range(3):
        for side, index in ((-1, 0), (1, mask.shape[axis] - 1)):
            face = mask.select(axis, index)
            if int(face.sum()) >= max(4, TOUCH_SHARE * face.numel()):
                faces.append((axis, side))
    return faces


def next_tiles(crop: CropMask) -> list[CropFrame]:
    """Frames half an extent further through every touched face (the paper's 50 % overlap)."""
    frames = []
    for axis, side in touched_faces(crop):
        offset = [0.0, 0.0, 0.0]
        offset[axis] = side * crop.frame.extent_zyx_vox[axis] / 2
        frames.append(crop.frame.shifted(as_triple(offset)))
    return frames


class _Search:
    """One prediction of one object; the arguments are those of ``predict_object``."""

    def __init__(self, predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None) -> None:
        self.predictor, self.prompts, self.previous = predictor, prompts, previous
        self.crop = None if previous is None else previous.crop
        self.spacing = predictor.spacing_zyx_mm
        self.only_removes = previous is not None and not prompts.positive  # a negative prompt never enlarges the mask

    def lowres_on(self, frame: CropFrame) -> Tensor | None:
        """The earlier mask as an input for a crop."""
        if self.previous is None:
            return None
        like = None if self.crop is None else self.crop.lowres_logits
        return self.predictor.lowres_of(self.previous.canvas, frame, like)

    def frame(self, middle: Triple, step_mm: float) -> CropFrame:
        """A crop around a position with cubic voxels of ``step_mm``."""
        steps = as_triple([step_mm / s for s in self.spacing])
        return CropFrame.centred(middle, steps, self.predictor.crop_shape).snapped()


class _Zoom(_Search):
    """The search of a model of relative scale: one crop of any size."""

    def predict(self) -> Prediction:
        """Predict where the prompts are, zoom out while the mask touches the border, zoom in once if it is small."""
        predictor, prompts = self.predictor, self.prompts
        # A larger crop would only add voxels outside the volume.
        largest = max(n * s for n, s in zip(predictor.shape_zyx, self.spacing, strict=True))
        frame, lowres = self.start(largest)
        first = crop = predictor.decode(frame, prompts, lowres)
        canvas = predictor.paste(crop)
        # A crop that lies inside its object shows nothing to segment: the mask leaves out what was marked.
        while self.edge_mm(crop.frame) < largest and self.is_too_small(crop):
            wider = self.fitted(min(self.edge_mm(crop.frame) * ZOOM_STEP, largest), _middle(crop))
            before = None if self.misses(crop) else predictor.lowres_of(canvas, wider, crop.lowres_logits)
            crop = predictor.decode(wider, prompts, before)
            canvas = predictor.paste(crop)
        if self.misses(crop) and crop is not first:
            crop, canvas = first, predictor.paste(first)
        extents = zip(_mask_region(crop).shape_zyx, crop.frame.shape_zyx, strict=True)
        fill = max(n / m for n, m in extents)
        smaller = crop.frame.zoomed(fill / GOOD_FILL) if fill else crop.frame
        if 0 < fill < SMALL_FILL and all(smaller.contains(at) for at, _ in prompts.points):
            closer = self.fitted(self.edge_mm(crop.frame) * fill / GOOD_FILL, _middle(crop))
            nearer = predictor.decode(closer, prompts, predictor.lowres_of(canvas, closer, crop.lowres_logits))
            if not touched_faces(nearer):
                return Prediction(nearer, predictor.paste(nearer))
        return Prediction(crop, canvas)

    def is_too_small(self, crop: CropMask) -> bool:
        """Whether a larger crop would show more of the object."""
        return not self.only_removes and bool(touched_faces(crop) or self.misses(crop))

    def misses(self, crop: CropMask) -> bool:
        """Whether the first prediction of an object leaves out most of what was marked."""
        if self.previous is not None or self.prompts.voxels is None:
            return False
        frame = crop.frame
        at = (self.prompts.voxels + 0.5 - frame.origin_zyx_vox) // frame.step_zyx_vox
        at = at[((at >= 0) & (at < frame.shape_zyx)).all(1)].astype(np.int64)
        held = crop.logits.numpy()[tuple(at.T)] > MASK_LOGIT_THRESHOLD
        return bool(held.size) and float(held.mean()) < LEAST_HELD

    def start(self, largest: float) -> tuple[CropFrame, Tensor | None]:
        """The first crop to predict, and the earlier mask on it."""
        predictor, prompts = self.predictor, self.prompts
        reach = prompts.positives
        if prompts.newest_box is not None:
            low, high = prompts.newest_box
            reach = [*reach, low, as_triple([v - 1 for v in high])]
        if self.crop is not None:
            frame = self.crop.frame
            if all(frame.contains(at) for at in reach):
                return frame, self.crop.lowres_logits
            frame = self.fitted(max(self.edge_mm(frame), self.edge_around(reach, frame)), _middle(self.crop))
            return frame, self.lowres_on(frame)
        if self.previous is not None:
            tight = self.previous.canvas.mask(predictor.shape_zyx).region
            known = self.previous.canvas.region if tight.is_empty else tight
            frame = self.around((as_triple(known.start_zyx), as_triple(known.stop_zyx)), reach, reach)
            return frame, self.lowres_on(frame)
        box = prompts.box or prompts.slice_box
        if box is not None:
            return self.around(box, prompts.positives, reach), None
        finest = min(self.spacing) * max(predictor.crop_shape)
        edge = max(finest, FIRST_EDGE * largest, self.edge_around(reach))
        return self.fitted(min(edge, largest), prompts.positives[-1]), None

    def around(self, box: Corners, needed: Sequence[Triple], reach: Sequence[Triple]) -> CropFrame:
        """The crop of which a box fills ``BOX_FILL``; a larger one if it does not hold the ``needed`` positions."""
        size_mm = max((b - a) * s for a, b, s in zip(*box, self.spacing, strict=True))
        frame = self.cube(_box_middle(box), size_mm / BOX_FILL)
        if all(frame.contains(at) for at in needed):
            return frame
        return self.fitted(max(self.edge_mm(frame), self.edge_around(reach, frame)), _box_middle(box))

    def fitted(self, edge_mm: float, middle: Triple) -> CropFrame:
        """A cube around ``middle``, moved to hold the positive points and little outside the volume."""
        centre = list(middle)
        for axis, (size, spacing) in enumerate(zip(self.predictor.shape_zyx, self.spacing, strict=True)):
            half = edge_mm / spacing / 2
            low, high = half - 0.5, size - 0.5 - half
            centre[axis] = (size - 1) / 2 if low >= high else min(max(centre[axis], low), high)
            reach = max(0.0, half - 1.5 * edge_mm / spacing / max(self.predictor.crop_shape))
            for at in self.prompts.positives:  # oldest first: where not all fit, the newest one is inside
                centre[axis] = min(max(centre[axis], at[axis] - reach), at[axis] + reach)
        return self.cube(as_triple(centre), edge_mm)

    def cube(self, middle: Triple, edge_mm: float) -> CropFrame:
        """A crop whose longest edge is ``edge_mm``."""
        return self.frame(middle, edge_mm / max(self.predictor.crop_shape))

    def edge_mm(self, frame: CropFrame) -> float:
        """The longest edge of a crop."""
        return max(e * s for e, s in zip(frame.extent_zyx_vox, self.spacing, strict=True))

    def edge_around(self, reach: Sequence[Triple], frame: CropFrame | None = None) -> float:
        """Edge in mm of a cube around positions and a crop's middle half, with some room."""
        edge = 0.0
        for axis, spacing in enumerate(self.spacing):
            values = [at[axis] for at in reach]
            if frame is not None:
                origin, extent = frame.origin_zyx_vox[axis], frame.extent_zyx_vox[axis]
                values += [origin + extent / 4, origin + extent * 3 / 4]
            edge = max(edge, (max(values) - min(values)) * spacing * 1.25)
        return edge


class _Tiles(_Search):
    """The search of a model of fixed spacing: overlapping crops, blended."""

    def predict(self) -> Prediction:
        """Predict the first crop and those beyond touched faces."""
        predictor = self.predictor
        frame, lowres = self.start()
        first = predictor.decode(frame, self.prompts, lowres)
        tiles, waiting = {frame}, [] if self.only_removes else next_tiles(first)
        before = None if self.previous is None else self.previous.canvas
        total = TileSum((2,), EMPTY_REGION if before is None else before.region)
        canvas = _blended(total, first, predictor.shape_zyx, before)
        while waiting and len(tiles) < MAX_TILES:
            frame = waiting.pop(0)
            if frame in tiles:
                continue
            logger.info("tile %d", len(tiles) + 1)
            tiles.add(frame)
            crop = predictor.decode(frame, self.prompts, predictor.lowres_of(canvas, frame, first.lowres_logits))
            waiting += next_tiles(crop)
            canvas = _blended(total, crop, predictor.shape_zyx, before)
        return Prediction(first, canvas)

    def start(self) -> tuple[CropFrame, Tensor | None]:
        """The last crop if it holds the newest prompt, otherwise one around that prompt; and the earlier mask on it."""
        prompts = self.prompts
        box = prompts.newest_box or prompts.box or prompts.slice_box
        assert prompts.points or box is not None
        newest = prompts.points[-1][0] if prompts.points or box is None else _box_middle(box)
        if self.previous is not None and self.crop is not None:
            # A negative click outside the mask changes nothing: no crop is moved there.
            at = Region((0, 0, 0), (1, 1, 1)).shifted((round(newest[0]), round(newest[1]), round(newest[2])))
            needless = not prompts.positive and float(self.previous.canvas.on_region(at)) <= MASK_LOGIT_THRESHOLD
            if needless or self.crop.frame.contains(newest, margin_vox=min(self.predictor.crop_shape) / 8):
                return self.crop.frame, self.crop.lowres_logits
        assert self.predictor.model.spec.spacing_mm is not None
        frame = self.frame(newest, self.predictor.model.spec.spacing_mm)
        return frame, self.lowres_on(frame)


def _blended(total: TileSum, tile: CropMask, shape_zyx: IntTriple, before: Canvas | None) -> Canvas:
    """Add a tile with weights that fall to its faces; the mean of all tiles over the logits before them."""
    region, values = paste_crop(tile.logits, tile.frame, shape_zyx)
    hats = [1e-3 + 1 - torch.linspace(-1, 1, n + 2)[1:-1].abs() for n in region.shape_zyx]
    weight = hats[0][:, None, None] * hats[1][:, None] * hats[2]
    total.add(region, torch.stack([values * weight, weight]))
    logits, weights = total.values
    base = torch.full_like(logits, BACKGROUND_LOGIT) if before is None else before.on_region(total.region)
    return Canvas(total.region, torch.where(weights > 0, logits / weights.clamp(min=1e-9), base))


def _mask_region(crop: CropMask) -> Region:
    return bounding_region(((crop.logits > MASK_LOGIT_THRESHOLD) & crop.inside).numpy())


def _middle(crop: CropMask) -> Triple:
    """The volume position of the middle of the mask's bounding box, or of the crop's if the mask is empty."""
    region = _mask_region(crop)
    ends = ((0, 0, 0), crop.frame.shape_zyx) if region.is_empty else (region.start_zyx, region.stop_zyx)
    return crop.frame.to_volume(as_triple([(a + b - 1) / 2 for a, b in zip(*ends, strict=True)]))


def _box_middle(box: Corners) -> Triple:
    return as_triple([(a + b) / 2 - 0.5 for a, b in zip(*box, strict=True)])

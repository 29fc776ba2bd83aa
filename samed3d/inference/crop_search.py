"""Which crops of the volume to predict: the prompts tell where, the mask tells how far. No ground truth is used.

For a model of relative scale the search zooms: out while the mask touches the crop's border, in when the mask is small
there. For a model of fixed spacing it tiles: where the mask touches the border, a crop half an extent further is
predicted as well and blended. Read ``predictor.py`` next.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from samed3d.crops import BACKGROUND_LOGIT
from samed3d.geometry import CropFrame, Region, Triple, as_triple, bounding_region
from samed3d.inference.model_prompts import Corners, ModelPrompts
from samed3d.inference.predictor import Canvas, CropMask, CropPredictor
from samed3d.prompts import MASK_LOGIT_THRESHOLD

logger = logging.getLogger(__name__)

ZOOM_STEP = 1.6
FIRST_EDGE = 0.5
"""Edge of the crop around a first click, as a share of the volume's longest edge; the crop is never finer than the image."""
LARGEST_CROP = 1.0
"""Zooming out ends when the crop's edge is this multiple of the volume's longest edge."""
BOX_FILL = 0.6
"""The share of the crop that a box fills."""
SMALL_FILL = 0.4
"""A mask that fills less of the crop's edge is predicted again in a smaller crop."""
GOOD_FILL = 0.45
TOUCH_SHARE = 0.01
"""A face counts as touched when this share of its voxels (at least 4) is mask."""
MAX_TILES = 27


@dataclass
class Prediction:
    """An object between two prompts.

    Attributes:
        crop: The last predicted crop, whose low-resolution logits are an input of the next prediction; None for a mask
            that was given.
        canvas: Logits of the part of the volume that has been predicted so far.
    """

    crop: CropMask | None
    canvas: Canvas


def predict_object(predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None) -> Prediction:
    """Predict an object from all its prompts.

    Args:
        predictor: The model on the volume.
        prompts: All prompts, with at least one positive point or a box.
        previous: The prediction before the newest prompts, or a given mask, or None.
    """
    if predictor.model.spec.spacing_mm is None:
        return _zoom(predictor, prompts, previous)
    return _tile(predictor, prompts, previous)


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


def _zoom(predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None) -> Prediction:
    """Predict where the prompts are, zoom out while the mask touches the border, zoom in once if it is small."""
    frame, prior = _start(predictor, prompts, previous)
    crop = predictor.decode(frame, prompts, prior)
    canvas = predictor.paste(crop)
    largest = _largest_edge(predictor)
    only_removes = previous is not None and not prompts.positive  # a negative prompt never enlarges the mask
    while not only_removes and touched_faces(crop) and _edge_mm(predictor, crop.frame) < largest:
        wider = _fitted(predictor, prompts, min(_edge_mm(predictor, crop.frame) * ZOOM_STEP, largest), _middle(crop))
        crop = predictor.decode(wider, prompts, predictor.lowres_of(canvas, wider, crop.lowres_logits))
        canvas = predictor.paste(crop)
    fill = _fill(crop)
    if 0 < fill < SMALL_FILL and _holds_points(crop.frame, prompts, fill / GOOD_FILL):
        closer = _fitted(predictor, prompts, _edge_mm(predictor, crop.frame) * fill / GOOD_FILL, _middle(crop))
        nearer = predictor.decode(closer, prompts, predictor.lowres_of(canvas, closer, crop.lowres_logits))
        if not touched_faces(nearer):
            return Prediction(nearer, predictor.paste(nearer))
    return Prediction(crop, canvas)


def _largest_edge(predictor: CropPredictor) -> float:
    """Edge in mm of the largest crop: a larger one would only add voxels outside the volume."""
    return LARGEST_CROP * max(n * s for n, s in zip(predictor.shape_zyx, predictor.spacing_zyx_mm, strict=True))


def _holds_points(frame: CropFrame, prompts: ModelPrompts, factor: float) -> bool:
    """Whether a crop ``factor`` times as large around the same middle would still hold every point, also negative ones."""
    return all(frame.zoomed(factor).contains(at) for at, _ in prompts.points)


def _start(
    predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None
) -> tuple[CropFrame, Tensor | None]:
    """The first crop to predict, and the earlier mask on it."""
    reach = prompts.positives + _inner_corners(prompts.newest_box)
    if previous is not None and previous.crop is not None:
        frame = previous.crop.frame
        if all(frame.contains(at) for at in reach):
            return frame, previous.crop.lowres_logits
        edge = max(_edge_mm(predictor, frame), _edge_around(predictor, reach, frame))
        frame = _fitted(predictor, prompts, edge, _middle(previous.crop))
        return frame, predictor.lowres_of(previous.canvas, frame, previous.crop.lowres_logits)
    if previous is not None:
        known = _known_region(previous.canvas)
        corners = (as_triple(known.start_zyx), as_triple(known.stop_zyx))
        frame = _around(predictor, prompts, corners, reach, reach)
        return frame, predictor.lowres_of(previous.canvas, frame)
    box = prompts.box or prompts.slice_box
    if box is not None:
        return _around(predictor, prompts, box, prompts.positives, reach), None
    largest = _largest_edge(predictor)
    edge = max(
        min(predictor.spacing_zyx_mm) * max(predictor.crop_shape), FIRST_EDGE * largest, _edge_around(predictor, reach)
    )
    return _fitted(predictor, prompts, min(edge, largest), prompts.positives[-1]), None


def _around(
    predictor: CropPredictor, prompts: ModelPrompts, box: Corners, needed: list[Triple], reach: list[Triple]
) -> CropFrame:
    """The crop of which a box fills ``BOX_FILL``; a larger one if it does not hold the ``needed`` positions."""
    size_mm = max((b - a) * s for a, b, s in zip(*box, predictor.spacing_zyx_mm, strict=True))
    frame = _frame(predictor, _box_middle(box), size_mm / BOX_FILL)
    if all(frame.contains(at) for at in needed):
        return frame
    edge = max(_edge_mm(predictor, frame), _edge_around(predictor, reach, frame))
    return _fitted(predictor, prompts, edge, _box_middle(box))


def _box_middle(box: Corners) -> Triple:
    return as_triple([(a + b) / 2 - 0.5 for a, b in zip(*box, strict=True)])


def _inner_corners(box: Corners | None) -> list[Triple]:
    """The centres of the two corner voxels of a half-open box."""
    return [] if box is None else [box[0], as_triple([v - 1 for v in box[1]])]


def _known_region(canvas: Canvas) -> Region:
    """The bounding box of a canvas's mask; its whole region if the mask is empty."""
    tight = bounding_region((canvas.logits > MASK_LOGIT_THRESHOLD).numpy())
    return canvas.region if tight.is_empty else tight.shifted(canvas.region.start_zyx)


def _edge_around(predictor: CropPredictor, reach: list[Triple], frame: CropFrame | None = None) -> float:
    """Edge in mm of a cube around positions and a crop's middle half, with some room."""
    edge = 0.0
    for axis, spacing in enumerate(predictor.spacing_zyx_mm):
        values = [at[axis] for at in reach]
        if frame is not None:
            origin, extent = frame.origin_zyx_vox[axis], frame.extent_zyx_vox[axis]
            values += [origin + extent / 4, origin + extent * 3 / 4]
        edge = max(edge, (max(values) - min(values)) * spacing * 1.25)
    return edge


def _fitted(predictor: CropPredictor, prompts: ModelPrompts, edge_mm: float, middle: Triple) -> CropFrame:
    """A cube around ``middle``, moved so that little of it lies outside the volume and it holds the positive points."""
    centre = list(middle)
    for axis, (size, spacing) in enumerate(zip(predictor.shape_zyx, predictor.spacing_zyx_mm, strict=True)):
        half = edge_mm / spacing / 2
        low, high = half - 0.5, size - 0.5 - half
        centre[axis] = (size - 1) / 2 if low >= high else min(max(centre[axis], low), high)
        for at in prompts.positives:  # oldest first: where not all fit, the newest one is inside
            reach = max(0.0, half - 1.5 * edge_mm / spacing / max(predictor.crop_shape))
            centre[axis] = min(max(centre[axis], at[axis] - reach), at[axis] + reach)
    return _frame(predictor, as_triple(centre), edge_mm)


def _frame(predictor: CropPredictor, middle: Triple, edge_mm: float) -> CropFrame:
    """A crop with isotropic voxels whose longest edge is ``edge_mm``."""
    step_mm = edge_mm / max(predictor.crop_shape)
    steps = as_triple([step_mm / s for s in predictor.spacing_zyx_mm])
    return CropFrame.centred(middle, steps, predictor.crop_shape).snapped()


def _edge_mm(predictor: CropPredictor, frame: CropFrame) -> float:
    return max(e * s for e, s in zip(frame.extent_zyx_vox, predictor.spacing_zyx_mm, strict=True))


def _mask_region(crop: CropMask) -> Region:
    return bounding_region(((crop.logits > MASK_LOGIT_THRESHOLD) & crop.inside).numpy())


def _fill(crop: CropMask) -> float:
    """The mask's longest extent as a share of the crop's edge."""
    return max(n / m for n, m in zip(_mask_region(crop).shape_zyx, crop.frame.shape_zyx, strict=True))


def _middle(crop: CropMask) -> Triple:
    """The volume position of the middle of the mask's bounding box, or of the crop's where there is no mask."""
    region = _mask_region(crop)
    ends = ((0, 0, 0), crop.frame.shape_zyx) if region.is_empty else (region.start_zyx, region.stop_zyx)
    return crop.frame.to_volume(as_triple([(a + b - 1) / 2 for a, b in zip(*ends, strict=True)]))


def _tile(predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None) -> Prediction:
    spacing = predictor.model.spec.spacing_mm
    assert spacing is not None
    steps = as_triple([spacing / s for s in predictor.spacing_zyx_mm])
    frame, prior = _first_tile(predictor, prompts, previous, steps)
    first = predictor.decode(frame, prompts, prior)
    tiles = {frame}
    only_removes = previous is not None and not prompts.positive
    waiting = [] if only_removes else _neighbours(first)
    blend = _Blend(None if previous is None else previous.canvas)
    blend.add(predictor.paste(first))
    while waiting and len(tiles) < MAX_TILES:
        frame = waiting.pop(0)
        if frame in tiles:
            continue
        logger.info("tile %d", len(tiles) + 1)
        tiles.add(frame)
        crop = predictor.decode(frame, prompts, predictor.lowres_of(blend.canvas(), frame, first.lowres_logits))
        waiting += _neighbours(crop)
        blend.add(predictor.paste(crop))
    return Prediction(first, blend.canvas())


def _first_tile(
    predictor: CropPredictor, prompts: ModelPrompts, previous: Prediction | None, steps: Triple
) -> tuple[CropFrame, Tensor | None]:
    """The last crop again if it holds the newest prompt, otherwise a crop around that prompt; and the mask on it."""
    box = prompts.newest_box or prompts.box or prompts.slice_box
    assert prompts.points or box is not None
    newest = prompts.points[-1][0] if prompts.points or box is None else _box_middle(box)
    crop = None if previous is None else previous.crop
    if previous is not None and crop is not None:
        # A negative click outside the mask changes nothing: no crop is moved there.
        needless = not prompts.positive and not _is_mask(previous.canvas, newest)
        if needless or crop.frame.contains(newest, margin_vox=min(predictor.crop_shape) / 8):
            return crop.frame, crop.lowres_logits
    frame = CropFrame.centred(newest, steps, predictor.crop_shape).snapped()
    if previous is None:
        return frame, None
    return frame, predictor.lowres_of(previous.canvas, frame, None if crop is None else crop.lowres_logits)


def _is_mask(canvas: Canvas, at: Triple) -> bool:
    """Whether the voxel at a position belongs to the mask."""
    index = tuple(round(v) - a for v, a in zip(at, canvas.region.start_zyx, strict=True))
    within = all(0 <= i < n for i, n in zip(index, canvas.region.shape_zyx, strict=True))
    return within and bool(canvas.logits[index] > MASK_LOGIT_THRESHOLD)


def _neighbours(crop: CropMask) -> list[CropFrame]:
    """Frames half an extent further through every touched face (the paper's 50 % overlap)."""
    frames = []
    for axis, side in touched_faces(crop):
        offset = [0.0, 0.0, 0.0]
        offset[axis] = side * crop.frame.extent_zyx_vox[axis] / 2
        frames.append(crop.frame.shifted(as_triple(offset)))
    return frames


class _Blend:
    """Overlapping tiles averaged with weights that fall to the tiles' faces, over what was known before; a tile is
    added once.
    """

    def __init__(self, before: Canvas | None) -> None:
        self._before = before
        self._region = Region((0, 0, 0), (0, 0, 0)) if before is None else before.region
        self._total, self._weights = torch.zeros(self._region.shape_zyx), torch.zeros(self._region.shape_zyx)

    def add(self, tile: Canvas) -> None:
        """Take in a tile's logits on the volume."""
        whole = self._region.union(tile.region)
        if whole != self._region:
            self._total, self._weights = (_moved(part, self._region, whole) for part in (self._total, self._weights))
            self._region = whole
        where = tile.region.slices_in(whole)
        hats = [1e-3 + 1 - torch.linspace(-1, 1, n + 2)[1:-1].abs() for n in tile.region.shape_zyx]
        weight = hats[0][:, None, None] * hats[1][:, None] * hats[2]
        self._total[where] += tile.logits * weight
        self._weights[where] += weight

    def canvas(self) -> Canvas:
        """The average so far."""
        logits = torch.full(self._region.shape_zyx, BACKGROUND_LOGIT)
        if self._before is not None:
            logits[self._before.region.slices_in(self._region)] = self._before.logits
        return Canvas(self._region, torch.where(self._weights > 0, self._total / self._weights.clamp(min=1e-9), logits))


def _moved(values: Tensor, region: Region, whole: Region) -> Tensor:
    """An array of a region as one of a region around it, with zeros beyond."""
    larger = torch.zeros(whole.shape_zyx)
    if not region.is_empty:
        larger[region.slices_in(whole)] = values
    return larger

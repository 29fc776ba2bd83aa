"""Where the next click would tell the model most: the least certain place near the border of a mask. Used by ``session.py``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple, bounding_region
from samed3d.inference.predictor import Canvas
from samed3d.prompts import MASK_LOGIT_THRESHOLD

WINDOW_VOX = 5
"""Edge of the cube over which uncertainty is averaged: every border is uncertain in its last voxel, a doubtful one over several."""
BAND_VOX = 4
"""How far from the mask's border a suggestion may lie."""
FREE_VOX = 4.0
"""A suggestion keeps this far from earlier clicks, in the finest voxels."""


def least_certain(canvas: Canvas, clicked: Sequence[Triple], spacing_zyx_mm: Triple) -> tuple[Triple, bool]:
    """The voxel of a canvas where the model knows least, and whether it calls it object.

    Args:
        canvas: The object's logits.
        clicked: Canonical zyx positions of earlier prompts.
        spacing_zyx_mm: Of the canonical volume.

    Raises:
        InputError: if nothing was predicted.
    """
    if canvas.region.is_empty:
        raise InputError("object has no mask yet: add a prompt first")
    mask = canvas.logits > MASK_LOGIT_THRESHOLD
    region = bounding_region(mask.numpy()).expand(BAND_VOX).clip(canvas.logits.shape)  # type: ignore[arg-type]
    if not bool(mask.any()):
        region = region.expand(max(canvas.logits.shape)).clip(canvas.logits.shape)  # type: ignore[arg-type]
    logits = canvas.logits[region.slices][None, None]
    doubt = 1 - torch.tanh(logits.abs() / 2)  # 1 - |2p - 1|
    doubt = F.avg_pool3d(doubt, WINDOW_VOX, stride=1, padding=WINDOW_VOX // 2)[0, 0]
    if bool(mask.any()):
        near = mask[region.slices].float()[None, None]
        wide = 2 * BAND_VOX + 1
        grown = F.max_pool3d(near, wide, stride=1, padding=BAND_VOX)
        shrunk = -F.max_pool3d(-near, wide, stride=1, padding=BAND_VOX)
        doubt = torch.where((grown - shrunk)[0, 0] > 0, doubt, -1.0)
    start = np.array(canvas.region.start_zyx) + np.array(region.start_zyx)
    steps = np.array(spacing_zyx_mm) / min(spacing_zyx_mm)
    axes = [(torch.arange(n, dtype=torch.float32) + float(a)) for n, a in zip(doubt.shape, start, strict=True)]
    for at in clicked:
        squared = [((axis - p) * float(s)) ** 2 for axis, p, s in zip(axes, at, steps, strict=True)]
        close = squared[0][:, None, None] + squared[1][:, None] + squared[2] < FREE_VOX**2
        doubt = torch.where(close, doubt - 2.0, doubt)
    best = np.array(np.unravel_index(int(doubt.argmax()), tuple(doubt.shape)))
    positive = bool(canvas.logits[tuple((best + np.array(region.start_zyx)).tolist())] > MASK_LOGIT_THRESHOLD)
    return as_triple(best + start), positive

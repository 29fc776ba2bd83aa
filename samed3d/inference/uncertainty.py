"""Where the next click would tell the model most: the least certain place near the border of a mask. Used by
``session.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, Region, Triple, as_triple
from samed3d.inference.predictor import Canvas
from samed3d.prompts import MASK_LOGIT_THRESHOLD, Point

WINDOW_VOX = 5
"""Edge of the cube over which uncertainty is averaged: every border is uncertain in its last voxel, a doubtful one over
several."""
BAND_VOX = 4
"""How far from the mask's border a suggestion may lie."""
LONGEST = 128
"""Larger canvases are searched in steps of several voxels."""
FREE_VOX = 4.0
"""A suggestion keeps this far from earlier clicks, in the finest voxels."""


def least_certain(canvas: Canvas, clicked: Sequence[Triple], view: CanonicalView) -> Point:
    """A click on the voxel of a canvas where the model knows least, with the sign that the model predicts.

    ``clicked`` are canonical zyx positions of earlier prompts.

    Raises:
        InputError: if nothing was predicted.
    """
    if canvas.region.is_empty:
        raise InputError("object has no mask yet: add a prompt first")
    (first, *low), (stop, *high) = canvas.region.start_zyx, canvas.region.stop_zyx
    step = max(1, -(-max(canvas.shape) // LONGEST))
    planes = (Region((k, low[0], low[1]), (k + 1, high[0], high[1])) for k in range(first, stop, step))
    logits = torch.cat([canvas.on_region(plane)[:, ::step, ::step] for plane in planes])
    mask = logits > MASK_LOGIT_THRESHOLD
    doubt = 1 - torch.tanh(logits.abs() / 2)  # 1 - |2p - 1|
    doubt = _pooled(doubt, WINDOW_VOX, F.avg_pool3d)
    if bool(mask.any()):
        near, wide = mask.float(), 2 * BAND_VOX + 1
        band = _pooled(near, wide, F.max_pool3d) + _pooled(1 - near, wide, F.max_pool3d) > 1
        doubt = torch.where(band, doubt, -1.0)
    start = np.array(canvas.region.start_zyx)
    scale = np.array(view.spacing_zyx_mm) / min(view.spacing_zyx_mm)
    axes = [torch.arange(n, dtype=torch.float32) * step + float(a) for n, a in zip(doubt.shape, start, strict=True)]
    for at in clicked:
        squared = [((axis - p) * float(s)) ** 2 for axis, p, s in zip(axes, at, scale, strict=True)]
        close = squared[0][:, None, None] + squared[1][:, None] + squared[2] < FREE_VOX**2
        doubt = torch.where(close, doubt - 2.0, doubt)
    best = np.array(np.unravel_index(int(doubt.argmax()), tuple(doubt.shape)))
    position = as_triple(view.position_to_stored(as_triple(best * step + start))[::-1])
    return Point(position, bool(mask[tuple(best.tolist())]))


def _pooled(values: torch.Tensor, width: int, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A pooling over a cube of ``width`` voxels, one axis after the other, which costs a fraction of doing it at
    once.
    """
    pooled = values[None, None]
    for axis in range(3):
        kernel = [width if a == axis else 1 for a in range(3)]
        pooled = pool(pooled, kernel, stride=1, padding=[k // 2 for k in kernel])
    return pooled[0, 0]

"""What a prompt means on the canonical volume: a few points and a box for the model, and voxels whose label is then not
contradicted.

Models are trained on points, boxes and masks. A scribble or a lasso becomes a bounded number of points; its voxels are
obeyed as clicks are. A 2D box becomes the point in its middle and says how large the crop is. Read ``steps.py`` next;
what each prompt means to a user is in ``prompts/kinds.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.crops import BACKGROUND_LOGIT
from samed3d.errors import InputError
from samed3d.geometry import Region, Triple, as_triple, ijk_to_zyx
from samed3d.inference.placement import Placed
from samed3d.inference.predictor import CanonicalPrompts, Canvas
from samed3d.models.base import ModelSpec
from samed3d.prompts import (
    Box,
    Lasso,
    Mask,
    PackedMask,
    Point,
    Prompt,
    Scribble,
    box_in_grid,
    path_in_grid,
    point_in_grid,
)
from samed3d.volume import Volume
from samed3d.volume.contours import toggle_polygon

OBEYED_LOGIT = 1.0
"""A clicked voxel gets at least this much of its click's sign: a click is never contradicted at its own voxel."""
PRIOR_LOGIT = 4.0
"""Logit of a given mask's voxels, and minus that around it."""
STROKE_POINTS = 5
"""Most points that the model is given of one scribble or lasso."""
MAX_STROKE_SAMPLES = 400_000

Corners = tuple[Triple, Triple]


@dataclass(frozen=True, eq=False)
class Said:
    """One prompt on the canonical volume.

    Attributes:
        points: (zyx position, positive) for the model, the one to be called newest last.
        box: Half-open corners in voxel edges, for the model, or None.
        extent: The same of what bounds the object in one slice, or None.
        flat: The axis along which ``extent`` is one voxel thick.
        voxels: (N, 3) zyx voxels that are obeyed.
        positive: Whether it says what belongs to the object.
        prior: The mask to start from, or None.
    """

    points: tuple[tuple[Triple, bool], ...] = ()
    box: Corners | None = None
    extent: Corners | None = None
    flat: int | None = None
    voxels: NDArray[np.intp] | None = None
    positive: bool = True
    prior: PackedMask | None = None


def understood(prompt: Prompt, volume: Volume, spec: ModelSpec) -> Said:
    """A prompt on the canonical volume.

    Raises:
        InputError: if it lies outside the volume, is not what it should be, or the model does not understand it.
    """
    flat = _flat_axis(prompt, volume) if isinstance(prompt, Box) else None
    needs = "mask" if isinstance(prompt, Mask) else "box" if isinstance(prompt, Box) and flat is None else "point"
    if needs not in spec.prompts:
        name = type(prompt).__name__.lower() if needs == "point" else needs
        raise InputError(
            f"model {spec.name!r} does not understand a {name}; it takes {', '.join(sorted(spec.prompts - {'mask'}))}"
        )
    if isinstance(prompt, Point):
        at = _canonical(point_in_grid(prompt, volume.grid), volume)
        return Said(((at, prompt.positive),), voxels=_voxels([at], volume), positive=prompt.positive)
    if isinstance(prompt, Box):
        return _box(prompt, flat, volume)
    if isinstance(prompt, Scribble):
        return _scribble(prompt, volume)
    if isinstance(prompt, Lasso):
        return _lasso(prompt, volume)
    return Said(prior=_given_mask(prompt, volume))


def joined(said: Sequence[Said], fresh: int, depth: tuple[float, float] | None = None) -> CanonicalPrompts:
    """All prompts of an object as a model is given them, the newest last.

    Args:
        said: Oldest first. What was said before the last given mask is part of that mask.
        fresh: How many of the last were not predicted yet.
        depth: How far the object reaches along ``unknown_axis``, half-open; None if that is not known.
    """
    current, newest = since_prior(said), said[len(said) - fresh :]
    points = [point for s in current for point in s.points]
    prior = current[0].prior if current else None
    if prior is not None and not any(positive for _, positive in points):
        points.insert(0, (deepest_voxel(prior), True))
    box = _union([s.box for s in current]) or _solid(current, depth)
    newest_extent = _union([s.box or s.extent for s in newest])
    return CanonicalPrompts(
        points=points,
        box=box,
        extent=_union([s.extent for s in current]),
        newest_positive=any(s.positive for s in newest) or not newest,
        newest_extent=box if newest_extent is not None and box is not None else newest_extent,
    )


def since_prior(said: Sequence[Said]) -> Sequence[Said]:
    """What was said from the last given mask on."""
    return said[max((n for n, s in enumerate(said) if s.prior is not None), default=0) :]


def unknown_axis(said: Sequence[Said]) -> int | None:
    """The axis along which an object that is bounded in slices only is not bounded; None where there is no such one."""
    current = since_prior(said)
    flat = {s.flat for s in current if s.extent is not None}
    return flat.pop() if len(flat) == 1 and not any(s.box is not None for s in current) else None


def _solid(said: Sequence[Said], depth: tuple[float, float] | None) -> Corners | None:
    """The 3D box that 2D ones make together: each axis is bounded by those that are not flat along it, the last one by
    ``depth``.
    """
    extents = [(s.extent, s.flat) for s in said if s.extent is not None]
    low, high = [], []
    for axis in range(3):
        ends = [(extent[0][axis], extent[1][axis]) for extent, flat in extents if flat != axis] or (
            [depth] if depth and extents else []
        )
        if not ends:
            return None
        low.append(min(a for a, _ in ends))
        high.append(max(b for _, b in ends))
    return as_triple(low), as_triple(high)


def obeyed(canvas: Canvas, said: Sequence[Said]) -> Canvas:
    """Give every voxel under a prompt its prompt's sign, the newest last; the canvas grows to hold what belongs to the
    object.
    """
    for entry in since_prior(said):
        if entry.voxels is None or not len(entry.voxels):
            continue
        low, high = entry.voxels.min(0), entry.voxels.max(0) + 1
        if entry.positive:
            canvas = _grown(canvas, Region(tuple(low.tolist()), tuple(high.tolist())))
        index = entry.voxels - np.array(canvas.region.start_zyx)
        index = index[((index >= 0) & (index < np.array(canvas.region.shape_zyx))).all(1)]
        where = tuple(torch.from_numpy(index[:, axis].astype(np.int64)) for axis in range(3))
        values = canvas.logits[where]
        canvas.logits[where] = values.clamp(min=OBEYED_LOGIT) if entry.positive else values.clamp(max=-OBEYED_LOGIT)
    return canvas


def start_from(prior: PackedMask) -> Placed:
    """A given mask as if it had been predicted."""
    d, h, w = prior.shape_zyx
    region = prior.region.expand(1).clip((d, h, w)) if not prior.region.is_empty else Region((0, 0, 0), (1, 1, 1))
    return Placed(None, Canvas(region, (torch.from_numpy(prior.on(region)).float() * 2 - 1) * PRIOR_LOGIT))


def _canonical(ijk: Triple, volume: Volume) -> Triple:
    return volume.view.position_to_canonical(ijk_to_zyx(ijk))


def _voxels(positions: Sequence[Triple] | NDArray, volume: Volume) -> NDArray[np.intp]:
    """The voxels that positions fall into, each once."""
    exact = (
        np.asarray(positions, dtype=np.float64).reshape(-1, 3).round(6)
    )  # a half that came from mm rounds as one given in voxels
    rounded = np.floor(exact + 0.5).astype(np.intp)
    return np.unique(np.clip(rounded, 0, np.array(volume.view.shape_zyx) - 1), axis=0)


def _flat_axis(box: Box, volume: Volume) -> int | None:
    """The canonical axis along which a box is one voxel of several; None for a 3D box."""
    ends = np.array([_canonical(corner, volume) for corner in box_in_grid(box, volume.grid)])
    same = (np.floor(ends[0] + 0.5) == np.floor(ends[1] + 0.5)) & (np.array(volume.view.shape_zyx) > 1)
    return int(np.flatnonzero(same)[0]) if same.sum() == 1 else None


def _box(box: Box, flat: int | None, volume: Volume) -> Said:
    ends = np.array([_canonical(corner, volume) for corner in box_in_grid(box, volume.grid)])
    corners = (as_triple(ends.min(0)), as_triple(ends.max(0) + 1))  # both corner voxels belong to the box
    if flat is None:
        return Said(box=corners)
    return Said(((as_triple(ends.mean(0)), True),), extent=corners, flat=flat)


def _scribble(scribble: Scribble, volume: Volume) -> Said:
    path = np.array([_canonical(ijk, volume) for ijk in path_in_grid(scribble, volume.grid)]).round(6)
    steps = np.abs(np.diff(path, axis=0)).max(1)
    counts = np.maximum(1, np.ceil(2 * steps).astype(int))  # no voxel under the line is missed by much at half a voxel
    if counts.sum() > MAX_STROKE_SAMPLES:
        raise InputError(
            f"scribble must be at most {MAX_STROKE_SAMPLES // 2} voxels long, got {steps.sum():.0f}; draw several"
        )
    pieces = [a + (b - a) * (np.arange(n) / n)[:, None] for a, b, n in zip(path[:-1], path[1:], counts, strict=True)]
    line = np.concatenate([*pieces, path[-1:]])
    voxels = _voxels(line, volume)
    brush = _brush(scribble.radius_vox, volume.view.spacing_zyx_mm)
    if len(brush) > 1:
        voxels = np.unique(np.concatenate([voxels + offset for offset in brush]), axis=0)
        voxels = voxels[((voxels >= 0) & (voxels < np.array(volume.view.shape_zyx))).all(1)]
    count = min(STROKE_POINTS, len(np.unique(np.floor(line + 0.5), axis=0)))
    chosen = [line[round((n + 0.5) / count * (len(line) - 1))] for n in range(count)]
    middle = chosen.pop(count // 2)  # models that remember one click get the middle of the stroke
    return Said(
        tuple((as_triple(at), scribble.positive) for at in [*chosen, middle]), voxels=voxels, positive=scribble.positive
    )


def _brush(radius_vox: float, spacing_zyx_mm: Triple) -> NDArray[np.intp]:
    """Offsets under a round brush: as wide as ``radius_vox`` of the finest voxels, in mm, so that it stays in a thick
    slice.
    """
    radius = radius_vox * min(spacing_zyx_mm)
    reach = [int(radius / s + 1e-9) for s in spacing_zyx_mm]
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    return offsets[np.linalg.norm(offsets * np.array(spacing_zyx_mm), axis=1) <= radius + 1e-9]


def _lasso(lasso: Lasso, volume: Volume) -> Said:
    path = np.array([_canonical(ijk, volume) for ijk in path_in_grid(lasso, volume.grid)]).round(6)
    axis = int(np.argmin(np.ptp(path, axis=0)))
    if np.ptp(path[:, axis]) > 1.0:
        raise InputError(
            f"lasso must lie in one slice of one axis, got an outline {np.ptp(path[:, axis]):.1f} voxels thick; draw it in a slice"
        )
    at = int(np.clip(np.floor(path[:, axis].mean() + 0.5), 0, volume.view.shape_zyx[axis] - 1))
    rows, columns = (a for a in range(3) if a != axis)
    plane = np.zeros((volume.view.shape_zyx[rows], volume.view.shape_zyx[columns] + 1), dtype=bool)
    toggle_polygon(plane, path[:, [columns, rows]])
    inside = np.logical_xor.accumulate(plane, axis=1)[:, :-1]
    if not inside.any():
        raise InputError(
            "lasso must enclose the centre of a voxel of the volume, got an outline that holds none; draw it larger"
        )
    spacing = (volume.view.spacing_zyx_mm[rows], volume.view.spacing_zyx_mm[columns])
    deep, points = _deep_part(inside, spacing)
    shown = deep if lasso.positive else np.argwhere(inside)
    whole = np.argwhere(inside)
    low, high = _into_volume(whole.min(0)[None], axis, at)[0], _into_volume(whole.max(0)[None], axis, at)[0] + 1
    return Said(
        points=tuple((as_triple(p), lasso.positive) for p in _into_volume(points, axis, at)),
        extent=(as_triple(low), as_triple(high)) if lasso.positive else None,
        flat=axis if lasso.positive else None,
        voxels=_into_volume(shown, axis, at),
        positive=lasso.positive,
    )


def _deep_part(inside: NDArray[np.bool_], spacing: tuple[float, float]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The pixels at half the greatest depth or more, and a few of them far from each other, the deepest last."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(inside, 1), sampling=spacing)[1:-1, 1:-1]
    deep = np.argwhere(depth >= depth.max() / 2)
    chosen = [np.array(np.unravel_index(int(depth.argmax()), depth.shape))]
    while len(chosen) < STROKE_POINTS:
        apart = np.min([np.linalg.norm((deep - c) * np.array(spacing), axis=1) for c in chosen], axis=0)
        if apart.max() < 2 * depth.max():
            break
        chosen.append(deep[int(apart.argmax())])
    return deep, np.array(chosen[::-1])


def _into_volume(pixels: NDArray[np.intp], axis: int, at: int) -> NDArray[np.intp]:
    return np.insert(pixels, axis, at, axis=1)


def _given_mask(prompt: Mask, volume: Volume) -> PackedMask:
    """The prior in canonical order."""
    if isinstance(prompt.mask, str):
        raise InputError(f"mask {prompt.mask} must be read before it is placed")
    if prompt.mask.shape_zyx != volume.grid.shape_zyx:
        raise InputError(
            f"mask must have the image's shape (D, H, W) {volume.grid.shape_zyx}, got {prompt.mask.shape_zyx}"
        )
    if prompt.mask.region.is_empty:
        raise InputError("mask must hold a voxel, got an empty one; leave it out")
    return PackedMask.of(volume.view.to_canonical(prompt.mask.full()))


def read_prior(prompt: Prompt, volume: Volume) -> Prompt:
    """A mask prompt that names a file, with the file's mask on the image's grid in its place; any other prompt as it
    is.

    Raises:
        InputError: if the file cannot be read, or holds nothing inside the image.
    """
    if not isinstance(prompt, Mask) or not isinstance(prompt.mask, str):
        return prompt
    from samed3d.volume.label_maps import grid_difference, read_label_map, resample_labels

    labels, grid = read_label_map(Path(prompt.mask))
    if grid_difference(grid, volume.grid):
        labels = resample_labels(labels, grid, volume.grid)
    if not labels.any():
        raise InputError(f"mask lies outside the image: {prompt.mask}; it was drawn on another one")
    return Mask(labels)


def deepest_voxel(prior: PackedMask) -> Triple:
    """The voxel deepest inside a mask, zyx."""
    from samed3d.clicks import distance_inside

    depth = distance_inside(prior.inside())
    return as_triple(
        [
            float(a + b)
            for a, b in zip(np.unravel_index(int(depth.argmax()), depth.shape), prior.region.start_zyx, strict=True)
        ]
    )


def _union(ends: Sequence[Corners | None]) -> Corners | None:
    known = [e for e in ends if e is not None]
    if not known:
        return None
    return as_triple(np.min([e[0] for e in known], axis=0)), as_triple(np.max([e[1] for e in known], axis=0))


def _grown(canvas: Canvas, region: Region) -> Canvas:
    """The canvas on a region that also holds another one."""
    whole = canvas.region.union(region)
    if whole == canvas.region:
        return canvas
    logits = torch.full(whole.shape_zyx, BACKGROUND_LOGIT)
    logits[canvas.region.slices_in(whole)] = canvas.logits
    return Canvas(whole, logits)

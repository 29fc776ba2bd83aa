"""What prompts mean to a model: ``ModelPrompts``, points and a box on the canonical volume.

Models are trained on points, boxes and masks. A scribble or a lasso becomes at most ``STROKE_POINTS`` points, and every
voxel under it is labelled in the mask afterwards. A 2D box becomes the point in its middle and tells how large the crop
must be. Read ``crop_search.py`` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple, ijk_to_zyx
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

STROKE_POINTS = 5
"""Most points that the model is given of one scribble or lasso."""
MAX_STROKE_SAMPLES = 400_000

Corners = tuple[Triple, Triple]


@dataclass(frozen=True, eq=False)
class ModelPrompts:
    """One prompt, or all prompts of an object together, on the canonical volume.

    ``slice_box`` is that of 2D boxes and lassos: it tells where to predict and is not given to the model. The last two
    of a single prompt only: ``flat_axis``, along which ``slice_box`` is one voxel thick, and ``mask``, to start from.
    """

    points: Sequence[tuple[Triple, bool]] = ()  # zyx position and sign of each, oldest first
    box: Corners | None = None  # half-open low and high corner in voxel edges
    slice_box: Corners | None = None
    positive: bool = True  # whether any prompt since the last prediction marks the object
    newest_box: Corners | None = None  # ``box`` or ``slice_box`` of the prompts since the last prediction
    voxels: NDArray[np.intp] | None = None  # (N, 3) zyx that get its label; of all prompts, those on the object
    flat_axis: int | None = None
    mask: PackedMask | None = None

    @property
    def positives(self) -> list[Triple]:
        """Positions on the object, oldest first. Only these move a crop: a negative click does not tell where the
        object is.
        """
        return [at for at, positive in self.points if positive]


def to_model_prompts(prompt: Prompt, volume: Volume, spec: ModelSpec) -> ModelPrompts:
    """One prompt on the canonical volume.

    Raises:
        InputError: if it lies outside the volume, is malformed, or the model does not take prompts of its kind.
    """
    flat_axis = None
    if isinstance(prompt, Box):
        ends = np.array([_canonical(corner, volume) for corner in box_in_grid(prompt, volume.grid)])
        same = (np.floor(ends[0] + 0.5) == np.floor(ends[1] + 0.5)) & (np.array(volume.view.shape_zyx) > 1)
        flat_axis = int(same.argmax()) if same.sum() == 1 else None
    needs = "mask" if isinstance(prompt, Mask) else "box" if isinstance(prompt, Box) and flat_axis is None else "point"
    if needs not in spec.prompts:
        name = type(prompt).__name__.lower() if needs == "point" else needs
        raise InputError(
            f"model {spec.name!r} does not understand a {name}; it takes {', '.join(sorted(spec.prompts - {'mask'}))}"
        )
    if isinstance(prompt, Point):
        at = _canonical(point_in_grid(prompt, volume.grid), volume)
        return ModelPrompts(((at, prompt.positive),), positive=prompt.positive, voxels=_voxels([at], volume))
    if isinstance(prompt, Box):
        corners = (as_triple(ends.min(0)), as_triple(ends.max(0) + 1))  # both corner voxels belong to the box
        if flat_axis is None:
            return ModelPrompts(box=corners)
        return ModelPrompts(((as_triple(ends.mean(0)), True),), slice_box=corners, flat_axis=flat_axis)
    if isinstance(prompt, Scribble):
        return _scribble(prompt, volume)
    if isinstance(prompt, Lasso):
        return _lasso(prompt, volume)
    if isinstance(prompt.mask, str):
        raise InputError(f"mask {prompt.mask} must be read before it is placed")
    if prompt.mask.shape_zyx != volume.grid.shape_zyx:
        rule = f"mask must have the image's shape (D, H, W) {volume.grid.shape_zyx}"
        raise InputError(f"{rule}, got {prompt.mask.shape_zyx}")
    if prompt.mask.region.is_empty:
        raise InputError("mask must hold a voxel, got an empty one; leave it out")
    return ModelPrompts(mask=PackedMask.of(volume.view.to_canonical(prompt.mask.full())))


def combine(
    prompts: Sequence[ModelPrompts],
    new: int,
    found: Corners | None = None,
    background: Sequence[Triple] = (),
) -> ModelPrompts:
    """All prompts of an object, oldest first, as one; those before the last given mask are part of that mask.

    The last ``new`` were given since the last prediction. ``found`` is the box of an object with an ``open_axis``,
    half-open, if known; ``background`` are zyx positions off the object, older than all prompts.
    """
    current, newest = since_mask(prompts), prompts[len(prompts) - new :]
    points = [point for p in current for point in p.points]
    mask = current[0].mask if current else None
    if mask is not None and not any(positive for _, positive in points):
        points.insert(0, (deepest_voxel(mask), True))
    box = _union([p.box for p in current]) or _box_of_slices(current, found)
    marked = [p.voxels for p in current if p.positive and p.voxels is not None]
    newest_box = _union([p.box or p.slice_box for p in newest])
    return ModelPrompts(
        points=[*((at, False) for at in background), *points],
        box=box,
        slice_box=_union([p.slice_box for p in current]),
        positive=any(p.positive for p in newest) or not newest,
        newest_box=box if newest_box is not None and box is not None else newest_box,
        voxels=np.concatenate(marked) if marked else None,
    )


def since_mask(prompts: Sequence[ModelPrompts]) -> Sequence[ModelPrompts]:
    """The prompts from the last given mask on."""
    return prompts[max((n for n, p in enumerate(prompts) if p.mask is not None), default=0) :]


def open_axis(prompts: Sequence[ModelPrompts]) -> int | None:
    """The axis along which an object has no bounds, if only 2D boxes or lassos of that axis bound it."""
    current = since_mask(prompts)
    flat = {p.flat_axis for p in current if p.slice_box is not None}
    return flat.pop() if len(flat) == 1 and not any(p.box is not None for p in current) else None


def _box_of_slices(prompts: Sequence[ModelPrompts], found: Corners | None) -> Corners | None:
    """The 3D box of 2D ones: each axis is bounded by those that are not flat along it and by ``found``."""
    boxes = [(p.slice_box, p.flat_axis) for p in prompts if p.slice_box is not None]
    low, high = [], []
    for axis in range(3):
        ends = [(box[0][axis], box[1][axis]) for box, flat_axis in boxes if flat_axis != axis]
        if found and boxes:
            ends.append((found[0][axis], found[1][axis]))
        if not ends:
            return None
        low.append(min(a for a, _ in ends))
        high.append(max(b for _, b in ends))
    return as_triple(low), as_triple(high)


def _canonical(ijk: Triple, volume: Volume) -> Triple:
    return volume.view.position_to_canonical(ijk_to_zyx(ijk))


def _voxels(positions: Sequence[Triple] | NDArray, volume: Volume) -> NDArray[np.intp]:
    """The voxels that positions fall into, each once."""
    # Six decimals: a half that was given in mm rounds like one given in voxels.
    exact = np.asarray(positions, dtype=np.float64).reshape(-1, 3).round(6)
    rounded = np.floor(exact + 0.5).astype(np.intp)
    return np.unique(np.clip(rounded, 0, np.array(volume.view.shape_zyx) - 1), axis=0)


def _scribble(scribble: Scribble, volume: Volume) -> ModelPrompts:
    path = np.array([_canonical(ijk, volume) for ijk in path_in_grid(scribble, volume.grid)]).round(6)
    steps = np.abs(np.diff(path, axis=0)).max(1)
    counts = np.maximum(1, np.ceil(2 * steps).astype(int))  # a sample every half voxel hits every voxel under the line
    if counts.sum() > MAX_STROKE_SAMPLES:
        most = MAX_STROKE_SAMPLES // 2
        raise InputError(f"scribble must be at most {most} voxels long, got {steps.sum():.0f}; draw several")
    pieces = [a + (b - a) * (np.arange(n) / n)[:, None] for a, b, n in zip(path[:-1], path[1:], counts, strict=True)]
    line = np.concatenate([*pieces, path[-1:]])
    voxels = _voxels(line, volume)
    brush = _brush(scribble.radius_vox, volume.view.spacing_zyx_mm)
    if len(brush) > 1:
        voxels = np.unique(np.concatenate([voxels + offset for offset in brush]), axis=0)
        voxels = voxels[((voxels >= 0) & (voxels < np.array(volume.view.shape_zyx))).all(1)]
    count = min(STROKE_POINTS, len(np.unique(np.floor(line + 0.5), axis=0)))
    chosen = [line[round((n + 0.5) / count * (len(line) - 1))] for n in range(count)]
    middle = chosen.pop(count // 2)  # a model that is given the newest click only gets the middle of the stroke
    points = [(as_triple(at), scribble.positive) for at in [*chosen, middle]]
    return ModelPrompts(points, positive=scribble.positive, voxels=voxels)


def _brush(radius_vox: float, spacing_zyx_mm: Triple) -> NDArray[np.intp]:
    """Offsets under a round brush of ``radius_vox`` finest voxels: it is round in mm and stays in a thick slice."""
    radius = radius_vox * min(spacing_zyx_mm)
    reach = [int(radius / s + 1e-9) for s in spacing_zyx_mm]
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    return offsets[np.linalg.norm(offsets * np.array(spacing_zyx_mm), axis=1) <= radius + 1e-9]


def _lasso(lasso: Lasso, volume: Volume) -> ModelPrompts:
    path = np.array([_canonical(ijk, volume) for ijk in path_in_grid(lasso, volume.grid)]).round(6)
    axis = int(np.argmin(np.ptp(path, axis=0)))
    thickness = np.ptp(path[:, axis])
    if thickness > 1.0:
        found = f"got an outline {thickness:.1f} voxels thick"
        raise InputError(f"lasso must lie in one slice of one axis, {found}; draw it in a slice")
    at = int(np.clip(np.floor(path[:, axis].mean() + 0.5), 0, volume.view.shape_zyx[axis] - 1))
    rows, columns = (a for a in range(3) if a != axis)
    plane = np.zeros((volume.view.shape_zyx[rows], volume.view.shape_zyx[columns] + 1), dtype=bool)
    toggle_polygon(plane, path[:, [columns, rows]])
    inside = np.logical_xor.accumulate(plane, axis=1)[:, :-1]
    if not inside.any():
        raise InputError("lasso must enclose the centre of a voxel of the volume, got none; draw it larger")
    spacing = (volume.view.spacing_zyx_mm[rows], volume.view.spacing_zyx_mm[columns])
    pixels = (np.argwhere(inside), *_deep_part(inside, spacing))
    whole, deep, points = (np.insert(found, axis, at, axis=1) for found in pixels)
    return ModelPrompts(
        points=[(as_triple(p), lasso.positive) for p in points],
        slice_box=(as_triple(whole.min(0)), as_triple(whole.max(0) + 1)) if lasso.positive else None,
        positive=lasso.positive,
        flat_axis=axis if lasso.positive else None,
        voxels=deep if lasso.positive else whole,
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


def read_mask_file(prompt: Prompt, volume: Volume) -> Prompt:
    """A ``Mask`` that names a file becomes one that holds the file's mask on the image's grid; other prompts stay.

    Raises:
        InputError: if the file cannot be read, or holds nothing inside the image.
    """
    if not isinstance(prompt, Mask) or not isinstance(prompt.mask, str):
        return prompt
    from samed3d.volume.label_maps import read_label_on

    return Mask(read_label_on(prompt.mask, volume.grid, volume.source, mismatch="resample", overlaps=True))


def deepest_voxel(mask: PackedMask) -> Triple:
    """The voxel deepest inside a mask, zyx."""
    from samed3d.clicks import distance_inside

    depth = distance_inside(mask.inside())
    return as_triple(np.array(np.unravel_index(int(depth.argmax()), depth.shape)) + mask.region.start_zyx)


def _union(boxes: Sequence[Corners | None]) -> Corners | None:
    """The smallest box around all that are given."""
    given = np.array([box for box in boxes if box is not None])
    return (as_triple(given[:, 0].min(0)), as_triple(given[:, 1].max(0))) if len(given) else None

"""Dice, surface Dice (NSD), 95th percentile Hausdorff distance and volume error of masks; areas under click curves.

Distances are in mm. ``nsd`` and ``hd95_mm`` take surfaces as sets of voxels: those that touch background by a face, or
the border of the array; distances run between voxel centres. ``nsd_subvoxel`` weighs surface elements by their area in
mm2, so that it does not depend on how a surface lies in the grid: an element sits at a corner where eight voxels meet
and not all eight are alike, its area is that of the marching-cubes patch between the centres of those voxels, and
distances run between corners. This is the definition of DeepMind's ``surface-distance``, which the CVPR 2025 challenge
uses.

Only numpy is needed at import; distances use ``edt`` where it is installed, else SciPy. Rules for empty masks, so that
no case drops out of an average unseen:

==================  ======  ======  ==================
masks               Dice    NSD     HD95
==================  ======  ======  ==================
both empty          nan     nan     nan
one empty           0       0       the image diagonal
==================  ======  ======  ==================
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import Region, Triple, bounding_region

DISTANCE_SLACK_MM = 1e-5
"""Distances are single precision: one that equals the tolerance must count as within it."""

_Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]
_Corner = tuple[int, ...]
_CORNERS: tuple[_Corner, ...] = tuple(itertools.product((0, 1), repeat=3))


def dice(pred: NDArray, target: NDArray) -> float:
    """Twice the overlap over the sum of the sizes of two (D, H, W) masks, in [0, 1]; nan where both are empty.

    Raises:
        ValueError: if the shapes differ.
    """
    a, b = _as_masks(pred, target)
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2.0 * int(np.count_nonzero(a & b)) / total if total else float("nan")


def volume_error(pred: NDArray, target: NDArray) -> float:
    """(Predicted - true) / true volume: -1 for an empty prediction, 0 for equal sizes, inf or nan without a target."""
    a, b = _as_masks(pred, target)
    size, wanted = int(np.count_nonzero(a)), int(np.count_nonzero(b))
    return (size - wanted) / wanted if wanted else math.inf if size else math.nan


def surface_scores(
    pred: NDArray,
    target: NDArray,
    spacing_zyx_mm: Triple,
    tolerance_mm: float,
    wanted: Sequence[str] = ("nsd", "nsd_subvoxel", "hd95_mm"),
) -> dict[str, float]:
    """Surface scores of two (D, H, W) masks by name; those that share distances compute them once.

    ``nsd``, the normalised surface Dice, is the share of both surfaces' voxels within ``tolerance_mm`` of the other
    surface, in [0, 1]; ``nsd_subvoxel`` is the share of their area; ``hd95_mm`` is the larger of the two directed 95th
    percentile distances.

    Raises:
        ValueError: if the shapes differ or the tolerance is negative.

    Source:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
        radiotherapy (2018), whose surface Dice is ``nsd_subvoxel``.
    """
    if tolerance_mm < 0:
        raise ValueError(f"tolerance_mm must be >= 0, got {tolerance_mm}")
    masks = _cut_together(pred, target)
    if masks is None:
        if not (np.any(pred) or np.any(target)):
            return dict.fromkeys(wanted, math.nan)
        diagonal = image_diagonal_mm(pred.shape, spacing_zyx_mm)
        return {name: diagonal if name == "hd95_mm" else 0.0 for name in wanted}
    found: dict[str, float] = {}
    if {"nsd", "hd95_mm"} & set(wanted):
        there, back = _distances(masks, spacing_zyx_mm)
        near = np.concatenate([there, back]) <= tolerance_mm + DISTANCE_SLACK_MM
        found = {"nsd": float(near.mean()), "hd95_mm": float(max(np.percentile(d, 95) for d in (there, back)))}
    if "nsd_subvoxel" in wanted:
        found["nsd_subvoxel"] = _near_area(masks, spacing_zyx_mm, tolerance_mm)
    return {name: found[name] for name in wanted}


def image_diagonal_mm(shape_zyx: tuple[int, ...], spacing_zyx_mm: Triple) -> float:
    """The diagonal of a whole array: the HD95 where one mask is missing."""
    return float(np.linalg.norm(np.multiply(shape_zyx, spacing_zyx_mm)))


def _as_masks(pred: NDArray, target: NDArray) -> _Masks:
    if pred.shape != target.shape or pred.ndim != 3:
        raise ValueError(f"pred and target must be (D, H, W) of one shape, got {pred.shape} and {target.shape}")
    return pred.astype(bool, copy=False), target.astype(bool, copy=False)


def _cut_together(pred: NDArray, target: NDArray) -> _Masks | None:
    """Both masks in their common bounding box with one voxel of background around it; None where either is empty."""
    a, b = _as_masks(pred, target)
    region_a, region_b = bounding_region(a), bounding_region(b)
    if region_a.is_empty or region_b.is_empty:
        return None
    region = region_a.union(region_b).expand(1)
    return _cut(a, region), _cut(b, region)


def _cut(mask: NDArray[np.bool_], region: Region) -> NDArray[np.bool_]:
    inside = region.clip((mask.shape[0], mask.shape[1], mask.shape[2]))
    starts = zip(region.start_zyx, inside.start_zyx, strict=True)
    stops = zip(region.stop_zyx, inside.stop_zyx, strict=True)
    return np.pad(mask[inside.slices], [(a - o, p - b) for (o, a), (p, b) in zip(starts, stops, strict=True)])


def _distances(masks: _Masks, spacing_zyx_mm: Triple) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance of each surface voxel of one mask to the nearest of the other, in mm, in both directions."""
    a, b = (_surface_voxels(mask) for mask in masks)
    return distance_to_false(~b, spacing_zyx_mm)[a], distance_to_false(~a, spacing_zyx_mm)[b]


def _surface_voxels(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels with a background voxel as a face neighbour; the outermost layer of ``mask`` must be background."""
    inner = mask.copy()
    for axis in range(3):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask & ~inner


def distance_to_false(mask: NDArray[np.bool_], spacing_zyx: Triple) -> NDArray[np.float32]:
    """Euclidean distance of each True voxel of (D, H, W) to the nearest False one; the array's border is none."""
    try:
        import edt  # five times faster than scipy; optional

        return edt.edt(np.ascontiguousarray(mask), anisotropy=spacing_zyx, black_border=False, parallel=1)
    except ImportError:
        from scipy.ndimage import distance_transform_edt

        return distance_transform_edt(mask, sampling=spacing_zyx).astype(np.float32)


def _near_area(masks: _Masks, spacing_zyx_mm: Triple, tolerance_mm: float) -> float:
    """The share of both surfaces' area within the tolerance of the other."""
    areas = element_areas(spacing_zyx_mm)
    elements = [areas[_codes(mask)] for mask in masks]
    near = total = 0.0
    for own, other in (elements, elements[::-1]):
        where = own > 0
        distances = distance_to_false(other == 0, spacing_zyx_mm)[where]
        near += float(own[where][distances <= tolerance_mm + DISTANCE_SLACK_MM].sum())
        total += float(own[where].sum())
    return near / total


def _codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """For each corner between eight voxels, one bit per voxel: (D - 1, H - 1, W - 1)."""
    d, h, w = (n - 1 for n in mask.shape)
    codes = np.zeros((d, h, w), np.uint8)
    for bit, (z, y, x) in enumerate(_CORNERS):
        codes |= mask[z : z + d, y : y + h, x : x + w].astype(np.uint8) << bit
    return codes


@functools.lru_cache(maxsize=16)
def element_areas(spacing_zyx_mm: Triple) -> NDArray[np.float64]:
    """The area in mm2 of the patch of each of the 256 patterns of eight voxels, (256,); 0 for all or none in the mask.

    The four or fewer voxels of the smaller side are cut off, edge-connected ones together. A patch of more than three
    vertices is split into the triangles that have the largest area on the unit cube.
    """
    areas = np.zeros(256)
    for code in range(256):
        inside = [c for bit, c in enumerate(_CORNERS) if code >> bit & 1]
        smaller = inside if len(inside) <= 4 else [c for c in _CORNERS if c not in inside]
        for part in _connected(smaller):
            loop = _loop(part)
            # Rounded, so that equal areas keep their order and the first is taken for every spacing.
            splits = _triangulations(tuple(range(len(loop))))
            best = max(splits, key=lambda split, loop=loop: round(_area(loop, split), 9))  # type: ignore[misc]
            areas[code] += _area(loop * spacing_zyx_mm, best)
    areas.setflags(write=False)
    return areas


def _beside(corner: _Corner, axis: int) -> _Corner:
    """The corner at the other end of the cube's edge along ``axis``."""
    return tuple(value ^ int(a == axis) for a, value in enumerate(corner))


def _connected(corners: list[_Corner]) -> list[frozenset[_Corner]]:
    """The parts of a set of corners that edges of the cube connect."""
    left, parts = set(corners), []
    while left:
        found = [left.pop()]
        for corner in found:
            beside = {_beside(corner, axis) for axis in range(3)} & left
            left -= beside
            found += sorted(beside)
        parts.append(frozenset(found))
    return parts


def _loop(part: frozenset[_Corner]) -> NDArray[np.float64]:
    """(n, 3) middles of the cube's edges that part a connected set of corners from the others, in order around it."""
    ends = [(c, n) for c in sorted(part) for axis in range(3) if (n := _beside(c, axis)) not in part]
    middles = np.array(ends).mean(axis=1)
    outward = 0.5 - np.mean(list(part), axis=0)
    around = (middles - middles.mean(axis=0)) @ np.linalg.svd(outward[None])[2][1:].T  # on the plane across
    return middles[np.argsort(np.arctan2(*around.T))]


def _triangulations(polygon: tuple[int, ...]) -> Iterator[list[tuple[int, int, int]]]:
    if len(polygon) < 3:
        yield []
        return
    for k in range(1, len(polygon) - 1):
        for left in _triangulations(polygon[: k + 1]):
            for right in _triangulations(polygon[k:]):
                yield [*left, *right, (polygon[0], polygon[k], polygon[-1])]


def _area(points: NDArray[np.float64], triangles: list[tuple[int, int, int]]) -> float:
    return float(
        sum(np.linalg.norm(np.cross(points[b] - points[a], points[c] - points[a])) / 2 for a, b, c in triangles)
    )


def trapezoid(scores: Sequence[float]) -> float:
    """Area under scores one click apart, in score x clicks: five scores of 1 give 4 (the CVPR 2025 challenge's AUC).

    Raises:
        ValueError: for fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"an area needs at least two scores, got {len(scores)}")
    return float(sum((a + b) / 2 for a, b in zip(scores[:-1], scores[1:], strict=True)))


def area_under_curve(scores: Sequence[float]) -> float:
    """The mean height of the curve: ``trapezoid`` over its width, in the unit of the scores; a single score is its own
    mean.
    """
    return trapezoid(scores) / (len(scores) - 1) if len(scores) > 1 else float(scores[0])


def clicks_to(scores: Sequence[float], quality: float, first_click: int = 1) -> int | None:
    """After how many clicks a score of at least ``quality`` was reached first; None where it never was (a failure).

    Args:
        scores: One per click, in order.
        quality: In the unit of the scores.
        first_click: The number of clicks that the first score stands for: 0 where a box came first.
    """
    return next((number for number, score in enumerate(scores, start=first_click) if score >= quality), None)


def monotone_share(scores: Sequence[float], slack: float = 0.0) -> float | None:
    """The share of further clicks that did not make the score worse by more than ``slack``; None without a further
    click.
    """
    steps = [b >= a - slack for a, b in zip(scores[:-1], scores[1:], strict=True)]
    return sum(steps) / len(steps) if steps else None

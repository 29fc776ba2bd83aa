"""Surface Dice over surface elements: each counts with its area in mm2, so that it does not depend on how a surface
lies in the grid.

A surface element sits at a corner where eight voxels meet and not all eight are alike; its area is that of the
marching-cubes patch between the centres of those voxels. Distances run from corner to corner. This is the definition of
DeepMind's ``surface-distance``, which the CVPR 2025 challenge scores with; ``masks.nsd`` counts surface voxels instead.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import Region, Triple, bounding_region
from samed3d.metrics.masks import DISTANCE_SLACK_MM, as_masks, cut, distance_to, image_diagonal_mm, surface_distances

_Corner = tuple[int, ...]
_CORNERS: tuple[_Corner, ...] = tuple(itertools.product((0, 1), repeat=3))


def nsd_subvoxel(pred: NDArray, target: NDArray, spacing_zyx_mm: Triple, tolerance_mm: float) -> float:
    """The share of both surfaces' area that lies within ``tolerance_mm`` of the other one.

    Args:
        pred: (D, H, W) mask.
        target: (D, H, W) reference.
        spacing_zyx_mm: Voxel edge along z, y, x.
        tolerance_mm: Distance that counts as agreement, >= 0.

    Returns:
        A value in [0, 1]; nan where both masks are empty, 0 where one is.

    Raises:
        ValueError: if the shapes differ or the tolerance is negative.

    Source:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
        radiotherapy (2018).
    """
    if tolerance_mm < 0:
        raise ValueError(f"tolerance_mm must be >= 0, got {tolerance_mm}")
    a, b = as_masks(pred, target)
    region_a, region_b = bounding_region(a), bounding_region(b)
    if region_a.is_empty or region_b.is_empty:
        return float("nan") if region_a.is_empty and region_b.is_empty else 0.0
    return subvoxel_in(a, b, region_a.union(region_b).expand(1), spacing_zyx_mm, tolerance_mm)


def surface_scores(pred: NDArray, target: NDArray, spacing_zyx_mm: Triple, tolerance_mm: float) -> dict[str, float]:
    """``nsd``, ``nsd_subvoxel`` and ``hd95_mm`` of two masks; the rules for empty masks of ``masks.py`` hold."""
    a, b = as_masks(pred, target)
    found = surface_distances(a, b, spacing_zyx_mm)
    if found is None:
        none = float("nan")
        if not (a.any() or b.any()):
            return {"nsd": none, "nsd_subvoxel": none, "hd95_mm": none}
        return {"nsd": 0.0, "nsd_subvoxel": 0.0, "hd95_mm": image_diagonal_mm(a.shape, spacing_zyx_mm)}
    region = bounding_region(a).union(bounding_region(b)).expand(1)
    subvoxel = subvoxel_in(a, b, region, spacing_zyx_mm, tolerance_mm)
    return {"nsd": found.share_within(tolerance_mm), "nsd_subvoxel": subvoxel, "hd95_mm": found.percentile(95)}


def subvoxel_in(
    a: NDArray[np.bool_], b: NDArray[np.bool_], region: Region, spacing_zyx_mm: Triple, tolerance_mm: float
) -> float:
    """``nsd_subvoxel`` of two masks that are not empty inside a region that holds both with a voxel of room."""
    areas = element_areas(spacing_zyx_mm)
    elements = [areas[_codes(cut(mask, region))] for mask in (a, b)]
    near = total = 0.0
    for own, other in (elements, elements[::-1]):
        where = own > 0
        distances = distance_to(other > 0, spacing_zyx_mm)[where]
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
    """The area in mm2 of the patch for each of the 256 ways in which eight voxels can belong to a mask; 0 for all or
    none.

    The four or fewer voxels of the smaller side are cut off, edge-connected ones together. A patch of more than three
    vertices is split into the triangles that have the largest area on the unit cube.
    """
    areas = np.zeros(256)
    for code in range(256):
        inside = [c for bit, c in enumerate(_CORNERS) if code >> bit & 1]
        smaller = inside if len(inside) <= 4 else [c for c in _CORNERS if c not in inside]
        for part in _connected(smaller):
            for loop in _loops(part):
                unit, scaled = np.array(loop), np.array(loop) * spacing_zyx_mm
                # Rounded, so that equal areas keep their order and the first is taken for every spacing.
                best = max(_triangulations(tuple(range(len(loop)))), key=lambda split: round(_area(unit, split), 9))
                areas[code] += _area(scaled, best)
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


def _loops(part: frozenset[_Corner]) -> list[list[tuple[float, ...]]]:
    """The closed lines, through middles of the cube's edges, that part a connected set of corners from the others."""
    joined: dict[tuple[_Corner, _Corner], list[tuple[_Corner, _Corner]]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        for group in _connected([c for c in part if c[axis] == side]):
            edges = sorted((c, n) for c in group for a in range(3) if a != axis and (n := _beside(c, a)) not in part)
            if edges:  # two: a line enters and leaves each face
                joined.setdefault(edges[0], []).append(edges[1])
                joined.setdefault(edges[1], []).append(edges[0])
    loops = []
    while joined:
        edge = min(joined)
        path = []
        while edge in joined:
            path.append(edge)
            edge = next((n for n in joined.pop(edge) if n in joined), edge)
        loops.append([tuple((a + b) / 2 for a, b in zip(*ends, strict=True)) for ends in path])
    return loops


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

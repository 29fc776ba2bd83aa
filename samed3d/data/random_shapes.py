"""Random label maps: cells, blobs, nested organs and vessels of many forms, painted over each other. Torch only.

The shapes are no anatomy; they are meant to vary. Noise comes from few coefficients and three small matrix products,
and solids are painted inside their bounding boxes only, so that one thread makes a 64^3 map in a few milliseconds.
Lengths are fractions of the half edge: the volume spans -1..1 along each axis. ``synthesis.py`` gives labels intensity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from samed3d.errors import InputError, check_choice
from samed3d.geometry import IntTriple, Triple

MAX_STRUCTURES = 12
MIN_FRACTION = 2e-4
"""Structures with a smaller share of the voxels are dropped."""
_ELLIPSOIDS = 0.6
"""Share of solids that are ellipsoids; the others are rounded boxes, cylinders and boxes."""
_SLAB = 1 << 15
"""Voxels taken at once where many channels are compared, so that they stay in the processor's cache."""


def random_numbers(generator: Generator, *shape: int) -> Tensor:
    """Draws in [0, 1) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    """One draw in [low, high)."""
    return low + (high - low) * float(random_numbers(generator))


def log_uniform(generator: Generator, low: float, high: float) -> float:
    """One draw in [low, high), uniform in the logarithm; ``low > 0``."""
    return math.exp(uniform(generator, math.log(low), math.log(high)))


def integer(generator: Generator, low: int, high: int) -> int:
    """One whole number, ``low`` and ``high`` included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def _spline_matrix(size: int, cells: float, phase: float, device: torch.device) -> Tensor:
    """(size, K) cubic B-spline of ``cells`` knot intervals: turns K white coefficients into a line of unit variance."""
    position = (torch.arange(size, device=device) + 0.5) * (cells / size) + phase
    knots = torch.arange(-1, math.ceil(cells + phase) + 2, device=device)
    t = (position[:, None] - knots[None, :]).abs()
    near = 2 / 3 - t * t + t * t * t / 2
    far = (2 - t).clamp_min(0).pow(3) / 6
    weights = torch.where(t < 1, near, far)
    return weights / weights.norm(dim=1, keepdim=True)


def noise_field(channels: int, shape_zyx: Sequence[int], cells: float | Triple, generator: Generator) -> Tensor:
    """(channels, D, H, W) smooth Gaussian noise of unit variance on ``generator.device``.

    ``cells`` are the waves over the volume along z, y, x (one number for all): few is smooth, half the voxels is nearly
    white.
    """
    per_axis = (cells, cells, cells) if isinstance(cells, (int, float)) else cells
    axes = zip(shape_zyx, per_axis, random_numbers(generator, 3).tolist(), strict=True)
    bz, by, bx = (_spline_matrix(size, waves, phase, generator.device) for size, waves, phase in axes)
    coarse = torch.randn(channels, bz.shape[1], by.shape[1] * bx.shape[1], generator=generator, device=generator.device)
    planes = (bz @ coarse).reshape(channels * shape_zyx[0], by.shape[1], bx.shape[1])
    return ((by @ planes).reshape(-1, bx.shape[1]) @ bx.T).reshape(channels, *shape_zyx)


def random_labels(shape_zyx: IntTriple, generator: Generator, *, kind: str | None = None) -> tuple[Tensor, int]:
    """A label map of random structures, each axis of ``shape_zyx`` >= 8, on the generator's device.

    ``kind`` is one of ``KINDS``, or None to draw one or to paint several over each other.

    Returns:
        ``(labels, n)``: int16 (D, H, W) with 0 for background and every one of 1..n present. Most structures, not all,
        are one connected piece.

    Raises:
        InputError: if ``kind`` is unknown or an axis is too short.
    """
    if min(shape_zyx) < 8:
        raise InputError(f"shape_zyx needs at least 8 voxels along each axis, got {tuple(shape_zyx)}")
    labels = torch.zeros(shape_zyx, dtype=torch.int16, device=generator.device)
    if kind is None:
        kind = list(KINDS)[integer(generator, 0, len(KINDS) - 1)] if uniform(generator) < 0.5 else "mixture"
    check_choice("kind", kind, KINDS)
    KINDS[kind](labels, generator)
    n = _compact(labels)
    while n < 2:  # a draw may leave almost nothing inside the volume
        _paint_solid(labels, n + 1, _coordinates(labels.shape, generator, 0.1), generator, 0.3, 0.7, spread=0.4)
        n = _compact(labels)
    return labels, n


def _compact(labels: Tensor) -> int:
    """Drop structures that are too small or too many and renumber the rest 1..n, in place."""
    flat = labels.view(-1)
    counts = torch.bincount(flat.int())
    counts[0] = 0
    keep = counts >= max(8, int(MIN_FRACTION * labels.numel()))
    rank = keep.cumsum(0)
    keep &= rank <= MAX_STRUCTURES
    table = torch.where(keep, rank, 0).to(torch.int16)
    flat.copy_(table.take(flat.long()))
    return int(keep.sum())


def _coordinates(shape: torch.Size, generator: Generator, strength: float) -> Tensor:
    """(3, D, H, W) voxel positions z, y, x in -1..1, bent by smooth noise, which bends the solids drawn in them."""
    cells = uniform(generator, 1.5, 5.0)
    field = noise_field(3, shape, cells, generator).mul_(strength / cells)
    if strength > 0 and uniform(generator) < 0.5:  # bumps on top of bends
        cells = uniform(generator, 5.0, 14.0)
        field.add_(noise_field(3, shape, cells, generator), alpha=uniform(generator, 0.0, 0.4) / cells)
    for axis, n in enumerate(shape):
        line = (torch.arange(n, device=generator.device) + 0.5) * (2 / n) - 1
        field[axis] += line.view([-1 if a == axis else 1 for a in range(3)])
    return field


def _argmax(scores: Tensor) -> Tensor:
    """int32 ``argmax(0)`` of up to 32 channels of order one, several times faster on a CPU."""
    best = torch.full(scores.shape[1:], torch.iinfo(torch.int32).min, dtype=torch.int32, device=scores.device)
    for k, score in enumerate(scores):  # the low bits hold the index, so that a plain maximum finds both
        torch.maximum(best, (score * 2.0**17).int().bitwise_left_shift_(5).add_(k), out=best)
    return best.bitwise_and_(31)


def _paint_over(labels: Tensor, new: Tensor) -> None:
    """Put the non-zero voxels of ``new`` (int16) over ``labels``."""
    labels.mul_((new == 0).to(torch.int16)).add_(new)


def _paint_cells(labels: Tensor, generator: Generator) -> None:
    """Voronoi cells with wavy borders; some are left out, sometimes walls stay free between them."""
    count = integer(generator, 4, 12)
    place = _coordinates(labels.shape, generator, uniform(generator, 0.0, 0.6)).reshape(3, -1)
    centres = random_numbers(generator, count, 3) * 2.2 - 1.1
    weight = random_numbers(generator, count) * (uniform(generator) * count ** (-2 / 3))
    wall = uniform(generator, 0.05, 0.3) * count ** (-2 / 3) if uniform(generator) < 0.4 else 0.0
    kept = (random_numbers(generator, 32) < uniform(generator, 0.4, 1.0)).to(torch.int16)
    table = kept * (kept.cumsum(0) + int(labels.max())).to(torch.int16)
    new = torch.empty_like(labels).view(-1)
    offset = (weight - centres.square().sum(1))[:, None]
    for part, near in zip(new.split(_SLAB), place.split(_SLAB, dim=1), strict=True):
        scores = ((2 * centres) @ near).add_(offset)
        torch.take(table, _argmax(scores).long(), out=part)
        if wall:
            first, second = scores[0], torch.full_like(scores[0], -math.inf)  # the greatest score and the next
            for score in scores[1:]:
                second = torch.maximum(second, torch.minimum(first, score))
                first = torch.maximum(first, score)
            part *= first.sub_(second) > wall
    _paint_over(labels, new.view(labels.shape))


def _paint_blobs(labels: Tensor, generator: Generator) -> None:
    """The greatest of several smooth noises, each drawn towards its own place so that it stays mostly in one piece."""
    count = integer(generator, 3, 7)
    scores = noise_field(count, labels.shape, log_uniform(generator, 1.5, 5.0), generator)
    pull = uniform(generator, 0.5, 3.0)
    place = _coordinates(labels.shape, generator, 0.0).reshape(3, -1)
    centres = random_numbers(generator, count, 3) * 2 - 1
    towards = ((2 * pull * centres) @ place).sub_(pull * centres.square().sum(1)[:, None])
    scores += towards.view_as(scores)
    scores[0] += uniform(generator, 0.0, 2.0)  # background
    table = torch.arange(32, device=labels.device, dtype=torch.int16)
    table[1:] += int(labels.max())
    _paint_over(labels, table.take(_argmax(scores).long()))


def _paint_nested(labels: Tensor, generator: Generator) -> None:
    """A body, organs in it, lesions in the organs; any of them may have a wall."""
    place = _coordinates(labels.shape, generator, uniform(generator, 0.05, 0.5))
    label = int(labels.max()) + 1
    if uniform(generator) < 0.6:
        _paint_solid(labels, label, place, generator, 0.6, 1.3, spread=0.3)
        label += 1
    for _ in range(integer(generator, 2, 8)):
        label = _paint_solid(labels, label, place, generator, 0.08, 0.7, spread=0.9)


def _paint_solid(
    labels: Tensor, label: int, place: Tensor, generator: Generator, small: float, large: float, spread: float
) -> int:
    """Paint one turned solid of radius ``small``..``large``, perhaps with a wall or lesion; returns the next label."""
    draws = random_numbers(generator, 16).tolist()
    centre = [(2 * d - 1) * spread for d in draws[:3]]
    radius = small * (large / small) ** draws[3]
    radii = torch.tensor([radius * 2 ** (1.6 * d - 0.8) for d in draws[4:7]], device=place.device)
    bend = (draws[7] - 0.5) * 1.6 if draws[7] > 0.5 else 0.0
    reach = float(radii.max()) * (1.2 if draws[9] < _ELLIPSOIDS else 1.6) * (1 + bend / 2) + 0.05
    window = tuple(
        slice(max(0, math.floor((c - reach + 1) * n / 2)), max(0, min(n, math.ceil((c + reach + 1) * n / 2))))
        for c, n in zip(centre, labels.shape, strict=True)
    )
    target = labels[window]
    if target.numel() == 0:
        return label
    middle = [min(n - 1, max(0, int((c + 1) * n / 2))) for c, n in zip(centre, labels.shape, strict=True)]
    local = (place[(slice(None), *window)] - place[:, middle[0], middle[1], middle[2]].view(3, 1, 1, 1)).view(3, -1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, device=generator.device)).Q
    q = (turn / radii[:, None]) @ local
    if bend:  # bananas and beans
        q[0].add_(q[1].square(), alpha=bend)
    q[1:] *= 1 + q[0] * ((draws[8] - 0.5) * 0.8)  # tapering
    depth = _solid_depth(q, draws[9]).view(target.shape)
    target.masked_fill_(depth < 1, label)
    if draws[10] < 0.25:  # a wall: the inside is another structure
        label += 1
        target.masked_fill_(depth < (0.5 + 0.4 * draws[11]) ** 2, label)
    if draws[12] < 0.2 and radius > 0.2:  # a lesion off the middle
        label += 1
        shift = torch.tensor([d - 0.5 for d in draws[13:16]], device=place.device)[:, None]
        lesion = (q - shift).square().sum(0).view(target.shape)
        target.masked_fill_((lesion < (0.2 + 0.3 * draws[11]) ** 2) & (depth < 1), label)
    return label + 1


def _solid_depth(q: Tensor, choice: float) -> Tensor:
    """(N,) 0 in the middle, 1 on the surface of an ellipsoid, rounded box, cylinder or box, at (3, N) positions."""
    square = q.square()
    if choice < _ELLIPSOIDS:
        return square.sum(0)
    if choice < 0.8:
        return square.square().sum(0)
    if choice < 0.93:
        return torch.maximum(square[0] + square[1], square[2])
    return square.amax(0)


def _paint_tubes(labels: Tensor, generator: Generator) -> None:
    """One to four vessels along smooth curves, each with branches that carry its label."""
    label = int(labels.max()) + 1
    for tube in range(integer(generator, 1, 4)):
        radius = log_uniform(generator, 0.03, 0.16)
        start = random_numbers(generator, 3) * 1.6 - 0.8
        trunk = _paint_curve(labels, label + tube, start, radius, generator)
        for _ in range(integer(generator, 0, 3)):
            root = trunk[integer(generator, 0, trunk.shape[0] - 1)]
            _paint_curve(labels, label + tube, root, radius * uniform(generator, 0.5, 0.9), generator)


def _paint_curve(labels: Tensor, label: int, start: Tensor, radius: float, generator: Generator) -> Tensor:
    """Sweep a ball from ``start`` along a random smooth curve; returns the (M, 3) curve in -1..1."""
    device = labels.device
    half = torch.tensor(labels.shape, device=device) / 2
    smallest = float(half.min())
    radius_vox = max(1.0, radius * smallest)
    count = min(400, max(8, int(3.0 * smallest / max(0.6, radius_vox / 3))))
    steps = torch.linspace(0, 1, count, device=device)[:, None]
    heading = torch.nn.functional.normalize(torch.randn(3, generator=generator, device=device), dim=0)
    wave = _spline_matrix(count, uniform(generator, 1.0, 4.0), 0.0, device)
    wobble = wave @ torch.randn(wave.shape[1], 4, generator=generator, device=device)
    curve = start + steps * heading * uniform(generator, 0.6, 2.5)
    curve = curve + (wobble[:, :3] - wobble[:1, :3]) * uniform(generator, 0.1, 0.35)
    reach = math.ceil(radius_vox * 1.5)
    line = torch.arange(-reach, reach + 1, device=device)
    ball = torch.cartesian_prod(line, line, line)
    distance = ball.square().sum(1).float().sqrt()
    ball, distance = ball[distance <= reach], distance[distance <= reach]
    local_radius = radius_vox * (1 + 0.25 * wobble[:, 3].clamp(-2, 2))
    point, offset = (distance[None, :] <= local_radius[:, None]).nonzero(as_tuple=True)
    voxel = ((curve + 1) * half - 0.5).round().long()[point] + ball[offset]
    inside = ((voxel >= 0) & (voxel < torch.tensor(labels.shape, device=device))).all(1)
    strides = torch.tensor(labels.stride(), device=device)
    labels.view(-1)[(voxel[inside] * strides).sum(1)] = label
    return curve


def _paint_mixture(labels: Tensor, generator: Generator) -> None:
    """Two or three of the other kinds over each other."""
    painters = (_paint_cells, _paint_blobs, _paint_nested, _paint_tubes)
    for _ in range(integer(generator, 1, 2)):
        painters[integer(generator, 0, 2)](labels, generator)
    painters[integer(generator, 2, 3)](labels, generator)


KINDS: dict[str, Callable[[Tensor, Generator], None]] = {
    "cells": _paint_cells,
    "blobs": _paint_blobs,
    "nested": _paint_nested,
    "tubes": _paint_tubes,
    "mixture": _paint_mixture,
}
"""Every kind of label map by name."""

"""Simulated users: where the next click, box or stroke falls, given the current mask and the wanted one.

One rule per policy serves a batch of crops in training (``sample_clicks``) and one whole volume in evaluation
(``next_click``). Random numbers come from CPU generators and only choose among candidate voxels, so the same seed gives
the same clicks on a CPU and on a GPU. A perfect mask or an empty target gives no click, never an error. On a CPU, edt
and cc3d (or scipy) compute distances and components; on a GPU, torch does, with equal results. Read
``models/base.py`` next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from samed3d.devices import widest_float
from samed3d.errors import InputError, check_choice
from samed3d.geometry import IntTriple, Triple, bounding_region
from samed3d.metrics import distance_to_false

POLICIES = ("uniform", "centre", "ritm")
_NEIGHBOURS = list(itertools.product((-1, 0, 1), repeat=3))


def sample_clicks(
    pred_mask: Tensor, target_mask: Tensor, policy: str, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """One click per sample of a batch, which does not depend on the others of its batch.

    Args:
        pred_mask: (B, 1, D, H, W) bool, the current masks.
        target_mask: (B, 1, D, H, W) bool.
        policy: As in ``next_click``, or ``"mixed"``: uniform while a sample has no mask, then any of the policies.
        generators: One CPU generator per sample.

    Returns:
        Points (B, 1, 3) float zyx and labels (B, 1): 1 for a missed voxel, 0 for a surplus one, -1 where nothing is
        wrong.
    """
    pred, target = pred_mask[:, 0], target_mask[:, 0]
    draws = uniform_draws(generators, 2, pred.device)
    if policy == "mixed":
        has_mask = pred.flatten(1).any(dim=1)
        rules = torch.where(has_mask, (draws[:, 0] * len(POLICIES)).long(), POLICIES.index("uniform"))
    else:
        rules = torch.full((len(pred),), POLICIES.index(policy), device=pred.device)
    candidates = click_candidates(pred, target, rules)
    count = candidates.flatten(1).sum(dim=1)
    drawn = (draws[:, 1] * count).long().minimum(count - 1)  # rounding to float32 may make a draw 1
    rank = torch.where(rules == POLICIES.index("centre"), 0, drawn)
    flat = _nth_voxel(candidates, rank)
    labels = target.flatten(1).gather(1, flat[:, None]).long()
    points = torch.stack(torch.unravel_index(flat, pred.shape[1:]), dim=-1)
    return points[:, None].float(), torch.where(count[:, None] > 0, labels, -1)


def next_click(
    pred_mask: NDArray[np.bool_],
    target_mask: NDArray[np.bool_],
    policy: str = "uniform",
    rng: np.random.Generator | None = None,
) -> tuple[IntTriple, bool] | None:
    """The next click on one (D, H, W) mask.

    Args:
        pred_mask: Current mask; all False before the first click.
        target_mask: What the user wants.
        policy: ``"uniform"``: uniform over all wrong voxels (SAM-Med3D, section 3). ``"centre"``: the voxel deepest
            inside the largest wrong component (the CVPR 2025 challenge's rule). ``"ritm"``: of missed and of surplus
            voxels take the deeper kind, then a random voxel at more than half that depth (RITM, as in SAM-Med3D's
            released validation).
        rng: Needed for ``"uniform"`` and ``"ritm"``.

    Returns:
        The zyx voxel and whether it is positive (a missed voxel), or None where nothing is wrong.

    Raises:
        InputError: for an unknown policy or a missing generator.
    """
    check_choice("click policy", policy, POLICIES)
    pred, target = np.asarray(pred_mask, bool), np.asarray(target_mask, bool)
    region = bounding_region(pred ^ target)
    if region.is_empty:
        return None
    if rng is None and policy != "centre":
        raise InputError(f"click policy {policy!r} needs a random generator")
    cut, wanted = (torch.from_numpy(np.ascontiguousarray(mask[region.slices]))[None] for mask in (pred, target))
    candidates = click_candidates(cut, wanted, torch.tensor([POLICIES.index(policy)]))
    rank = 0 if rng is None or policy == "centre" else int(rng.integers(int(candidates.sum())))
    flat = int(_nth_voxel(candidates, torch.tensor([rank])))
    at = np.unravel_index(flat, region.shape_zyx)
    z, y, x = (int(v) + start for v, start in zip(at, region.start_zyx, strict=True))
    return (z, y, x), bool(target[z, y, x])


def click_candidates(pred: Tensor, target: Tensor, rules: Tensor) -> Tensor:
    """Voxels (B, D, H, W) among which each sample's next click is drawn; of ``"centre"`` the first one counts.

    ``rules`` (B,) is an index into ``POLICIES`` for each sample. Empty where nothing is wrong.
    """
    error = pred ^ target
    centre, ritm = ((rules == POLICIES.index(name)).nonzero()[:, 0] for name in ("centre", "ritm"))
    if not len(centre) and not len(ritm):
        return error
    parts = [largest_components(error[centre]), error[ritm] & target[ritm], error[ritm] & pred[ritm]]
    deepest, missed, surplus = squared_depths(torch.cat(parts)).split([len(part) for part in parts])
    candidates = error.clone()
    candidates[centre] &= deepest == _peak(deepest)
    depth = torch.where(_peak(missed) >= _peak(surplus), missed, surplus)
    candidates[ritm] = 4 * depth > _peak(depth)  # more than half as deep, in squares
    return candidates


def uniform_draws(generators: Sequence[torch.Generator], count: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, count) in [0, 1), a row from each CPU generator, moved to a device in its widest float."""
    draws = torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])
    return draws.to(widest_float(device)).to(device)


def _nth_voxel(candidates: Tensor, rank: Tensor) -> Tensor:
    """(B,) flat index of the True voxel number ``rank`` (from 0) of each sample; any index where there is none."""
    ends = candidates.flatten(1).cumsum(dim=1, dtype=torch.int32)
    found = torch.searchsorted(ends, rank.int()[:, None], right=True)[:, 0]
    return found.clamp(max=ends.shape[1] - 1)


def _peak(values: Tensor) -> Tensor:
    return values.amax(dim=(1, 2, 3), keepdim=True)


def distance_inside(mask: NDArray[np.bool_], spacing_zyx: Triple = (1.0, 1.0, 1.0)) -> NDArray[np.float32]:
    """Euclidean distance of each True voxel to the nearest False one; beyond the array counts as False."""
    return distance_to_false(np.pad(mask, 1), spacing_zyx)[1:-1, 1:-1, 1:-1]


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The 26-connected component with the most voxels, of equal ones the first; all False for an empty mask."""
    try:
        import cc3d

        labels = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    except ImportError:
        from scipy.ndimage import label

        labels, _ = label(mask, structure=np.ones((3, 3, 3)))
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax() if counts.max() > 0 else np.zeros_like(mask)


def squared_depths(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool to float32: ``distance_inside`` of each sample in voxels, squared."""
    if not (mask.is_cpu and len(mask)):
        return squared_depths_by_torch(mask)
    depths = np.stack([distance_inside(sample) for sample in mask.numpy()])
    return torch.from_numpy(depths).square_().round_()


def largest_components(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool: ``largest_component`` of each sample."""
    if not (mask.is_cpu and len(mask)):
        return largest_components_by_torch(mask)
    return torch.from_numpy(np.stack([largest_component(sample) for sample in mask.numpy()]))


def squared_depths_by_torch(mask: Tensor) -> Tensor:
    """``squared_depths`` by shifted minima, one axis after the other: a few passes over small integers."""
    far = sum((n + 2) ** 2 for n in mask.shape[1:])
    kind = torch.int16 if 2 * far < 1 << 15 else torch.int32
    inside = F.pad(mask, (1, 1) * 3)  # by False
    lines = inside.to(kind) * (max(inside.shape[1:]) - 1)
    step = 1
    while step < inside.shape[3]:  # along the last axis, distances are sums of powers of two
        for to, of in _shifted_views(lines, lines, 3, step):
            torch.minimum(to, of + step, out=to)
        step *= 2
    squares = lines * lines
    for axis in (2, 1):
        before = squares.clone()
        reach = math.isqrt(int(before.max())) if before.numel() else 0
        for step in range(1, min(reach, inside.shape[axis] - 1) + 1):
            for to, of in _shifted_views(squares, before, axis, step):
                torch.minimum(to, of + step * step, out=to)
    return squares[:, 1:-1, 1:-1, 1:-1].float()


def _shifted_views(to: Tensor, of: Tensor, axis: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of voxels that lie ``step`` apart along an axis, in both directions: where to write and what to read."""
    n = to.shape[axis] - step
    yield to.narrow(axis, step, n), of.narrow(axis, 0, n)
    yield to.narrow(axis, 0, n), of.narrow(axis, step, n)


def largest_components_by_torch(mask: Tensor) -> Tensor:
    """``largest_components`` on the True voxels alone.

    Source: the hooking and short-cutting of FastSV (Zhang, Azad and Hu 2020).
    """
    where = mask.nonzero()
    count, found = len(where), torch.zeros_like(mask)
    if not count:
        return found
    # True voxels are numbered; every other voxel, and a border of one, has the number `count`, which is never smallest.
    number = torch.full([mask.shape[0], *(n + 2 for n in mask.shape[1:])], count, device=mask.device)
    sample, z, y, x = where.unbind(1)
    number[sample, z + 1, y + 1, x + 1] = torch.arange(count, device=mask.device)
    neighbours = torch.stack([number[sample, z + 1 + dz, y + 1 + dy, x + 1 + dx] for dz, dy, dx in _NEIGHBOURS])
    label = torch.arange(count + 1, device=mask.device)  # of a voxel of the same component, in the end of its first
    while True:
        before = label
        smallest = label[neighbours].amin(dim=0)
        label = label.scatter_reduce(0, label[:-1], smallest, "amin")
        label[:-1] = torch.minimum(label[:-1], smallest)
        label = label[label]
        if torch.equal(label, before):
            break
    label = label[:-1]
    size = torch.bincount(label, minlength=count)[label]
    most = torch.zeros(len(mask), dtype=size.dtype, device=mask.device).scatter_reduce(0, sample, size, "amax")
    first = torch.full([len(mask)], count, device=mask.device)
    first = first.scatter_reduce(0, sample, torch.where(size == most[sample], label, count), "amin")
    found[sample, z, y, x] = label == first[sample]
    return found


def noisy_click(
    pred_mask: NDArray[np.bool_],
    target_mask: NDArray[np.bool_],
    spacing_zyx_mm: tuple[float, float, float],
    sigma_mm: float,
    rng: np.random.Generator,
) -> tuple[IntTriple, bool] | None:
    """A person's click: aimed at the middle of the largest wrong component, off by a random distance.

    The sign is the one that was meant, even where the click lands on the wrong side of a border. ``sigma_mm`` is the
    standard deviation of the error along each axis; clicks stay inside the volume.

    Returns:
        As ``next_click``.
    """
    meant = next_click(pred_mask, target_mask, "centre")
    if meant is None:
        return None
    offsets = rng.normal(0.0, sigma_mm, 3) / np.asarray(spacing_zyx_mm)
    z, y, x = (
        int(np.clip(round(v + o), 0, n - 1)) for v, o, n in zip(meant[0], offsets, target_mask.shape, strict=True)
    )
    return (z, y, x), meant[1]


def jittered_boxes(target_mask: Tensor, jitter: float, generators: Sequence[torch.Generator]) -> Tensor:
    """A user's box per sample: the tight box with each face moved by up to ``jitter`` of the edge length.

    Args:
        target_mask: (B, 1, D, H, W) bool; an empty target gives the whole crop.
        jitter: Share of the edge.
        generators: One CPU generator per sample.

    Returns:
        (B, 2, 3) float half-open zyx. Boxes stay in the crop and keep at least one voxel per axis.
    """
    draws = uniform_draws(generators, 6, target_mask.device).view(-1, 2, 3)
    return _moved_boxes(target_mask[:, 0], (draws * 2 - 1) * jitter).float()


def user_box(
    target_mask: NDArray[np.bool_], jitter: float, rng: np.random.Generator
) -> tuple[IntTriple, IntTriple] | None:
    """``jittered_boxes`` for one (D, H, W) volume, rounded to voxels, half-open zyx; None for an empty target."""
    if not target_mask.any():
        return None
    moves = torch.from_numpy(rng.uniform(-jitter, jitter, (3, 2)).T[None].copy())
    low, high = _moved_boxes(torch.from_numpy(np.ascontiguousarray(target_mask, bool))[None], moves)[0].round().int()
    return tuple(low.tolist()), tuple(high.tolist())


def _moved_boxes(target: Tensor, moves: Tensor) -> Tensor:
    """(B, 2, 3) tight boxes of (B, D, H, W), their faces moved by ``moves`` (B, 2, 3) edges."""
    faces = []
    for axis in range(3):
        lines = target.any(dim=[other + 1 for other in range(3) if other != axis])
        size, there = lines.shape[1], lines.byte()
        filled = lines.any(dim=1)
        low = torch.where(filled, there.argmax(dim=1), 0).to(moves.dtype)
        high = torch.where(filled, size - there.flip(1).argmax(dim=1), size).to(moves.dtype)
        edge = high - low
        low = (low + moves[:, 0, axis] * edge).clamp(min=0, max=size - 1)
        high = (high + moves[:, 1, axis] * edge).clamp(max=size)
        faces.append(torch.stack([low, torch.maximum(high, low + 1)], dim=1))
    return torch.stack(faces, dim=2)


def user_stroke(target_mask: NDArray[np.bool_], rng: np.random.Generator) -> list[IntTriple]:
    """A person's stroke along the middle of the structure in one of its larger slices; empty for an empty target.

    The slice (of the array's first axis) is drawn among those with at least half the largest slice's area. The stroke
    follows the slice's largest component along its longer side, from middle to middle of its runs, and leaves out a
    fifth at either end; its zyx voxels lie inside the structure.
    """
    areas = target_mask.sum(axis=(1, 2))
    if not areas.any():
        return []
    z = int(rng.choice(np.flatnonzero(2 * areas >= areas.max())))
    part = largest_component(target_mask[z : z + 1])[0]
    turned = part if part.any(axis=1).sum() >= part.any(axis=0).sum() else part.T
    middles = [(int(row), _middle_of_longest_run(turned[row])) for row in np.flatnonzero(turned.any(axis=1))]
    margin = len(middles) // 5
    kept = middles[margin : len(middles) - margin]
    return [(z, a, b) if turned is part else (z, b, a) for a, b in kept]


def _middle_of_longest_run(line: NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return int(starts[longest] + stops[longest] - 1) // 2

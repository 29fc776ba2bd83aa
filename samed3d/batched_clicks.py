"""The rules of ``clicks.py`` for a whole batch at once, without leaving the device: a GPU must not wait for a CPU's
distance maps.

Same rules, other draws: a click follows from the sample's generator alone, but is not the one that the CPU would have
drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES = ("uniform", "centre", "ritm")
_NEIGHBOURS = list(itertools.product((-1, 0, 1), repeat=3))


def clicks_of_batch(
    pred_mask: Tensor, target_mask: Tensor, policy: str, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """One click per sample, by one rule or by ``"mixed"``: uniform while a sample has no mask, then any rule.

    Args:
        pred_mask: (B, 1, D, H, W) bool, the current masks.
        target_mask: (B, 1, D, H, W) bool.
        policy: As in ``clicks.policy_clicks``.
        generators: B of them, on the tensors' device.

    Returns:
        Points (B, 1, 3) float zyx and labels (B, 1): 1 for a missed voxel, 0 for a surplus one, -1 where nothing is
        wrong.
    """
    pred, target = pred_mask[:, 0], target_mask[:, 0]
    error = pred ^ target
    shape, device = error.shape[1:], error.device
    if policy == "mixed":
        drawn = torch.cat([torch.randint(len(POLICIES), (1,), generator=g, device=device) for g in generators])
        rule = torch.where(pred.flatten(1).any(dim=1), drawn, torch.zeros_like(drawn))
    else:
        rule = torch.full((len(error),), POLICIES.index(policy), device=device)
    draw = torch.stack([torch.rand(shape, generator=g, device=device) for g in generators])
    score = (draw + 1) * error
    centre, ritm = ((rule == POLICIES.index(name)).nonzero()[:, 0] for name in ("centre", "ritm"))
    if len(centre) or len(ritm):
        parts = [largest_components(error[centre]), error[ritm] & target[ritm], error[ritm] & pred[ritm]]
        score[centre], missed, surplus = squared_depth(torch.cat(parts)).split([len(part) for part in parts])
    if len(ritm):
        most = [depth.flatten(1).amax(dim=1).view(-1, 1, 1, 1) for depth in (missed, surplus)]
        depth = torch.where(most[0] >= most[1], missed, surplus)
        score[ritm] = (draw[ritm] + 1) * (4 * depth > torch.maximum(*most))  # more than half as deep, in squares
    return clicks_at_highest(score, error, target)


def clicks_at_highest(score: Tensor, error: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Clicks (as ``clicks_of_batch``) on the voxel of the highest score of each sample; all three are (B, D, H, W)."""
    height, width = score.shape[2:]
    flat = score.flatten(1).argmax(dim=1)
    points = torch.stack([flat // (height * width), flat // width % height, flat % width], dim=-1)
    labels = target.flatten(1).gather(1, flat[:, None]).long()
    return points[:, None].float(), torch.where(
        error.flatten(1).any(dim=1, keepdim=True), labels, torch.full_like(labels, -1)
    )


def squared_depth(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool to float32: squared Euclidean distance of each True voxel to the nearest False one; outside
    counts as False.

    One axis after the other adds its squares. A few passes over small numbers: memory traffic is all that this costs.
    """
    far = sum((n + 2) ** 2 for n in mask.shape[1:])
    kind = torch.int16 if 2 * far < 1 << 15 else torch.int32
    inside = F.pad(mask, (1, 1) * 3)  # by False
    lines = inside.to(kind) * (max(inside.shape) - 1)
    step = 1
    while step < inside.shape[3]:  # along the last axis, distances are sums of powers of two
        for to, of in _shifts(lines, 3, step):
            torch.minimum(to, of + step, out=to)
        step *= 2
    squares = lines * lines
    for axis in (2, 1):
        before = squares.clone()
        reach = math.isqrt(int(before.max())) if before.numel() else 0
        for step in range(1, min(reach, inside.shape[axis] - 1) + 1):
            for to, of in _shifts(squares, axis, step, before):
                torch.minimum(to, of + step * step, out=to)
    return squares[:, 1:-1, 1:-1, 1:-1].float()


def _shifts(volumes: Tensor, axis: int, step: int, source: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what lies ``step`` voxels apart along an axis, both ways: where to write and what to read, from
    ``source`` if given.
    """
    source = volumes if source is None else source
    n = volumes.shape[axis] - step
    yield volumes.narrow(axis, step, n), source.narrow(axis, 0, n)
    yield volumes.narrow(axis, 0, n), source.narrow(axis, step, n)


def largest_components(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool to the 26-connected component with the most voxels of each sample; of equal ones the first in
    the volume.

    Source: the hooking and short-cutting of FastSV (Zhang, Azad and Hu 2020), on the True voxels alone.
    """
    where = mask.nonzero()
    count, found = len(where), torch.zeros_like(mask)
    if not count:
        return found
    # True voxels by number, with a border; whatever is not one has the number ``count``, which no neighbour takes for
    # the smallest.
    number = torch.full([mask.shape[0], *(n + 2 for n in mask.shape[1:])], count, device=mask.device)
    sample, z, y, x = where.unbind(1)
    number[sample, z + 1, y + 1, x + 1] = torch.arange(count, device=mask.device)
    neighbours = torch.stack([number[sample, z + 1 + dz, y + 1 + dy, x + 1 + dx] for dz, dy, dx in _NEIGHBOURS])
    label = torch.arange(
        count + 1, device=mask.device
    )  # the number of another voxel of the same component, at last of its first
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

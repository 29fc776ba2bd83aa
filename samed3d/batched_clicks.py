"""The rules of ``clicks.py`` for a whole batch at once, without leaving the device: a GPU must not wait for a CPU's distance maps.

Same rules, other draws: a click follows from the sample's generator alone, but is not the one that the CPU would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES = ("uniform", "centre", "ritm")
_CHUNK = 1 << 28
"""Numbers that a step of the distance map may hold at once."""
_STEPS_BETWEEN_LOOKS = 4


def clicks_of_batch(pred_mask: Tensor, target_mask: Tensor, policy: str, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One click per sample, by one rule or by ``"mixed"``: uniform while a sample has no mask, then any rule.

    Args:
        pred_mask: (B, 1, D, H, W) bool, the current masks.
        target_mask: (B, 1, D, H, W) bool.
        policy: As in ``clicks.policy_clicks``.
        generators: B of them, on the tensors' device.

    Returns:
        Points (B, 1, 3) float zyx and labels (B, 1): 1 for a missed voxel, 0 for a surplus one, -1 where nothing is wrong.
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
    if len(centre):
        score[centre] = squared_depth(largest_components(error[centre]))
    if len(ritm):
        missed, surplus = squared_depth(error[ritm] & target[ritm]), squared_depth(error[ritm] & pred[ritm])
        most = [depth.flatten(1).amax(dim=1).view(-1, 1, 1, 1) for depth in (missed, surplus)]
        depth = torch.where(most[0] >= most[1], missed, surplus)
        score[ritm] = (draw[ritm] + 1) * (4 * depth > torch.maximum(*most))  # more than half as deep, in squares
    flat = score.flatten(1).argmax(dim=1)
    points = torch.stack([flat // (shape[1] * shape[2]), flat // shape[2] % shape[1], flat % shape[2]], dim=-1)
    labels = target.flatten(1).gather(1, flat[:, None]).long()
    return points[:, None].float(), torch.where(error.flatten(1).any(dim=1, keepdim=True), labels, torch.full_like(labels, -1))


def squared_depth(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool to float32: squared Euclidean distance of each True voxel to the nearest False one; outside counts as False."""
    far = sum((n + 2) ** 2 for n in mask.shape[1:])
    kind = torch.int16 if 2 * far < 1 << 15 else torch.int32  # it is the memory's speed that counts
    size = mask[0].numel() * (max(mask.shape[1:]) + 2)
    parts = []
    for part in mask.split(max(1, _CHUNK // size)):
        distance = part.to(kind) * far
        for axis in (3, 2, 1):  # along one axis after the other, the squares add up
            lines = F.pad(distance.movedim(axis, -1), (1, 1))
            n = lines.shape[-1] - 2
            offset = torch.arange(1, n + 1, device=mask.device)[:, None] - torch.arange(n + 2, device=mask.device)
            distance = (lines.unsqueeze(-2) + offset.square().to(kind)).amin(dim=-1).movedim(-1, axis)
        parts.append(distance)
    return torch.cat(parts).float()


def largest_components(mask: Tensor) -> Tensor:
    """(B, D, H, W) bool to the 26-connected component with the most voxels of each sample."""
    batch, shape, voxels = mask.shape[0], mask.shape[1:], mask[0].numel()
    # Each voxel's label is the number of a voxel of its component, counted from the end, so that 0 is free for the background. The highest
    # spreads to the neighbours, and each voxel takes over what the voxel that it names has by now.
    numbers = torch.arange(voxels, 0, -1, device=mask.device).view(shape).expand_as(mask)
    labels = torch.where(mask, numbers, 0)
    while True:
        before = labels
        for _ in range(_STEPS_BETWEEN_LOOKS):
            spread = F.max_pool3d(labels[:, None].double() if voxels > 1 << 24 else labels[:, None].float(), 3, stride=1, padding=1)
            labels = spread[:, 0].long() * mask
            flat = labels.flatten(1)
            labels = (flat.gather(1, (voxels - flat).clamp(max=voxels - 1)) * (flat > 0)).view_as(labels)
        if torch.equal(labels, before):
            break
    flat = labels.flatten(1)
    counts = torch.zeros(batch, voxels + 1, dtype=torch.int32, device=mask.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    counts[:, 0] = 0
    found = counts.flip(1).argmax(dim=1)  # of equal ones, the first in the volume
    return (labels == (voxels - found).view(-1, 1, 1, 1)) & mask

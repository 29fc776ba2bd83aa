"""Simulated users: where the next click falls, given what is wrong. Every rule takes its generator.

Two forms: ``next_click``, ``noisy_click``, ``user_box`` and ``user_stroke`` for one full volume (evaluation, demo;
numpy) and
``error_clicks``, ``sample_clicks``, ``jittered_boxes`` for a batch of crops (training; torch, on any device). A perfect
mask or an empty target gives no click, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samed3d.batched_clicks import POLICIES, clicks_at_highest, clicks_of_batch
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, bounding_region

__all__ = [
    "POLICIES",
    "distance_inside",
    "error_clicks",
    "jittered_boxes",
    "largest_component",
    "next_click",
    "noisy_click",
    "policy_clicks",
    "sample_clicks",
    "user_box",
    "user_stroke",
]


def distance_inside(
    mask: NDArray[np.bool_], spacing_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> NDArray[np.float32]:
    """Euclidean distance of each True voxel to the nearest False one; beyond the array counts as False."""
    padded = np.pad(mask, 1)
    try:
        import edt  # five times faster than scipy; optional

        return edt.edt(padded, anisotropy=spacing_zyx)[1:-1, 1:-1, 1:-1]
    except ImportError:
        from scipy.ndimage import distance_transform_edt

        return distance_transform_edt(padded, sampling=spacing_zyx)[1:-1, 1:-1, 1:-1].astype(np.float32)


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The 26-connected component with the most voxels (all False for an empty mask)."""
    try:
        import cc3d

        labels = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    except ImportError:
        from scipy.ndimage import label

        labels, _ = label(mask, structure=np.ones((3, 3, 3)))
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax() if counts.max() > 0 else np.zeros_like(mask)


def next_click(
    pred_mask: NDArray[np.bool_],
    target_mask: NDArray[np.bool_],
    policy: str = "uniform",
    rng: np.random.Generator | None = None,
) -> tuple[IntTriple, bool] | None:
    """The next click on a (D, H, W) mask.

    Args:
        pred_mask: Current mask; all False before the first click.
        target_mask: What the user wants.
        policy: ``"uniform"``: uniform over all wrong voxels (SAM-Med3D). ``"centre"``: the voxel deepest inside the
            largest wrong component (the CVPR 2025 challenge's rule). ``"ritm"``: of missed and of surplus voxels take
            the deeper kind, then a random voxel at more than half that depth (RITM, as in SAM-Med3D's released
            validation).
        rng: Needed for ``"uniform"`` and ``"ritm"``.

    Returns:
        The zyx voxel and whether it is positive (a missed voxel), or None where nothing is wrong.

    Raises:
        InputError: for an unknown policy.
    """
    if policy not in POLICIES:
        raise InputError(f"click policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    pred, target = np.asarray(pred_mask, bool), np.asarray(target_mask, bool)
    region = bounding_region(pred ^ target)
    if region.is_empty:
        return None
    pred, target = pred[region.slices], target[region.slices]
    error = pred ^ target
    if policy == "centre":
        depth = distance_inside(largest_component(error))
        flat = int(depth.argmax())
    else:
        if rng is None:
            raise InputError(f"click policy {policy!r} needs a random generator")
        candidates = error if policy == "uniform" else _ritm_candidates(pred, target)
        where = np.flatnonzero(candidates)
        flat = int(where[rng.integers(len(where))])
    z, y, x = (int(v) for v in np.unravel_index(flat, error.shape))
    start = region.start_zyx
    return (z + start[0], y + start[1], x + start[2]), bool(target[z, y, x])


def _ritm_candidates(pred: NDArray[np.bool_], target: NDArray[np.bool_]) -> NDArray[np.bool_]:
    missed, surplus = distance_inside(target & ~pred), distance_inside(pred & ~target)
    depth = missed if missed.max() >= surplus.max() else surplus
    return depth > depth.max() / 2


def noisy_click(
    pred_mask: NDArray[np.bool_],
    target_mask: NDArray[np.bool_],
    spacing_zyx_mm: tuple[float, float, float],
    sigma_mm: float,
    rng: np.random.Generator,
) -> tuple[IntTriple, bool] | None:
    """A person's click: meant for the middle of the largest wrong component, landing beside it.

    The sign is the one that was meant, even where the click lands on the wrong side of a border.

    Args:
        pred_mask: As in ``next_click``.
        target_mask: As in ``next_click``.
        spacing_zyx_mm: Voxel edges.
        sigma_mm: Standard deviation of the error along each axis, in mm; clicks stay inside the volume.
        rng: Of the error.

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


def user_box(
    target_mask: NDArray[np.bool_], jitter: float, rng: np.random.Generator
) -> tuple[IntTriple, IntTriple] | None:
    """A person's 3D box: the tight one with each face moved by up to ``jitter`` of the edge, half-open zyx; None for an
    empty target.

    The box stays in the volume and keeps at least one voxel per axis. ``jittered_boxes`` is the same for a batch in
    training.
    """
    tight = bounding_region(target_mask)
    if tight.is_empty:
        return None
    low, high = [], []
    for a, b, size, moves in zip(
        tight.start_zyx, tight.stop_zyx, target_mask.shape, rng.uniform(-jitter, jitter, (3, 2)), strict=True
    ):
        start = min(max(0, round(a + moves[0] * (b - a))), size - 1)
        low.append(start)
        high.append(max(min(size, round(b + moves[1] * (b - a))), start + 1))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def user_stroke(target_mask: NDArray[np.bool_], rng: np.random.Generator) -> list[IntTriple]:
    """A person's stroke: along the middle of the structure in one of its larger slices, zyx voxels inside it; empty for
    an empty target.

    The slice (of the array's first axis) is drawn among those with at least half the largest slice's area; there the
    largest component is followed along its longer side from middle to middle of its runs, and a fifth is left out at
    either end.
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


def error_clicks(pred_mask: Tensor, target_mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One click per sample, uniform over its wrong voxels.

    Args:
        pred_mask: (B, 1, D, H, W) bool, the current mask.
        target_mask: (B, 1, D, H, W) bool.
        generator: On the tensors' device.

    Returns:
        Points (B, 1, 3) float zyx and labels (B, 1): 1 for a missed voxel, 0 for a surplus one, -1 where nothing is
        wrong.

    Source:
        SAM-Med3D, section 3; its released code calls a voxel foreground at logit > 0.5, callers choose that when they
        make the mask.
    """
    error = (pred_mask ^ target_mask)[:, 0]
    draw = torch.rand(error.shape, generator=generator, device=error.device) + 1.0
    return clicks_at_highest(draw * error, error, target_mask[:, 0])


def policy_clicks(
    pred_mask: Tensor, target_mask: Tensor, policy: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``error_clicks`` for any policy, all samples from one generator; the others than ``"uniform"`` visit each sample
    on the CPU.

    ``"mixed"`` is uniform while there is no mask, then any of the others, drawn per call.
    """
    if policy == "mixed":
        number = torch.randint(len(POLICIES), (1,), generator=generator, device=pred_mask.device)
        policy = POLICIES[int(number)] if bool(pred_mask.any()) else "uniform"
    if policy == "uniform":
        return error_clicks(pred_mask, target_mask, generator)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=pred_mask.device))
    rng = np.random.default_rng(seed)
    points, labels = [], []
    for pred, target in zip(pred_mask[:, 0].cpu().numpy(), target_mask[:, 0].cpu().numpy(), strict=True):
        click = next_click(pred, target, policy, rng)
        points.append(click[0] if click else (0, 0, 0))
        labels.append(-1 if click is None else int(click[1]))
    device = pred_mask.device
    return torch.tensor(points, dtype=torch.float32, device=device)[:, None], torch.tensor(labels, device=device)[
        :, None
    ]


def sample_clicks(
    pred_mask: Tensor, target_mask: Tensor, policy: str, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """``policy_clicks`` with a generator for each sample: a sample's click does not depend on the batch that it is in.

    On a GPU the whole batch is clicked at once (``batched_clicks.py``).
    """
    if pred_mask.is_cuda:
        return clicks_of_batch(pred_mask, target_mask, policy, generators)
    samples = zip(pred_mask, target_mask, generators, strict=True)
    clicked = [policy_clicks(pred[None], target[None], policy, generator) for pred, target, generator in samples]
    return torch.cat([points for points, _ in clicked]), torch.cat([labels for _, labels in clicked])


def jittered_boxes(target_mask: Tensor, jitter: float, generators: Sequence[torch.Generator]) -> Tensor:
    """A user's box per sample: the tight box with each face moved by up to ``jitter`` of the edge length, (B, 2, 3)
    half-open zyx.

    An empty target gives the whole crop. Boxes stay in the crop and keep at least one voxel per axis. One generator per
    sample, on the tensor's device.
    """
    draw = torch.cat([torch.rand(1, 2, 3, generator=generator, device=target_mask.device) for generator in generators])
    moves = (draw * 2 - 1).double()
    low, high = [], []
    for axis in range(3):
        lines = target_mask[:, 0].movedim(axis + 1, 1).flatten(2).any(dim=2)
        size = lines.shape[1]
        there = lines.byte()
        a = torch.where(lines.any(dim=1), there.argmax(dim=1), 0).double()
        b = torch.where(lines.any(dim=1), size - there.flip(1).argmax(dim=1), size).double()
        edge = b - a
        a = (a + moves[:, 0, axis] * jitter * edge).clamp(min=0).clamp(max=size - 1)
        low.append(a)
        high.append(torch.maximum((b + moves[:, 1, axis] * jitter * edge).clamp(max=size), a + 1))
    return torch.stack([torch.stack(low, dim=1), torch.stack(high, dim=1)], dim=1).float()

"""Prompts as dense maps and learned similarities, at any resolution of a crop.

Clicks are seen twice: where they are (Gaussian bumps of two widths, boxes, the earlier mask) and what lies under them (features sampled
at the click and compared with every voxel's). The second is what lets a click speak for a whole structure of any appearance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.nn.prompt_batch import PromptBatch

MAP_CHANNELS = 9
"""Narrow and wide bump per sign (4), inside the box, a box is given, mask probability, mask logit / 4 (clamped), a mask is given."""

Shape = tuple[int, int, int]


def positions_at(points: Tensor, stride: float) -> Tensor:
    """Voxel-centre positions of the full crop as positions on a grid ``stride`` times coarser."""
    return (points + 0.5) / stride - 0.5


def click_bumps(prompts: PromptBatch, stride: int, shape: Shape, sigma: float) -> Tensor:
    """Strongest Gaussian bump per voxel, (B, 2, d, h, w): channel 0 object clicks, 1 background clicks; zero where there are none."""
    points = positions_at(prompts.points.float(), stride)
    lines = []
    for axis, size in enumerate(shape):
        offset = torch.arange(size, device=points.device, dtype=points.dtype) - points[..., axis, None]
        lines.append(torch.exp(-0.5 * (offset / sigma) ** 2))
    channels = []
    for label in (1, 0):
        there = (prompts.point_labels == label).to(points.dtype)
        if points.shape[1] == 0:
            channels.append(points.new_zeros(points.shape[0], *shape))
            continue
        bumps = torch.einsum("bnd,bnh,bnw,bn->bndhw", *lines, there)
        channels.append(bumps.amax(dim=1))
    return torch.stack(channels, dim=1)


def box_map(prompts: PromptBatch, stride: int, shape: Shape) -> Tensor:
    """(B, 2, d, h, w): the share of each coarse voxel inside the box, and whether a box is given."""
    batch = prompts.points.shape[0]
    if prompts.boxes is None:
        return prompts.points.new_zeros(batch, 2, *shape)
    low, high = prompts.boxes[:, 0].float() / stride, prompts.boxes[:, 1].float() / stride
    inside = torch.ones(batch, *shape, device=low.device)
    for axis, size in enumerate(shape):
        edge = torch.arange(size, device=low.device, dtype=low.dtype)
        cover = (torch.minimum(edge + 1, high[:, axis, None]) - torch.maximum(edge, low[:, axis, None])).clamp(0, 1)
        inside = inside * cover.view(batch, *(size if a == axis else 1 for a in range(3)))
    valid = inside.new_ones(batch) if prompts.box_valid is None else prompts.box_valid.to(inside.dtype)
    valid = valid.view(batch, 1, 1, 1)
    return torch.stack([inside * valid, valid.expand_as(inside)], dim=1)


def mask_map(prompts: PromptBatch, shape: Shape) -> Tensor:
    """(B, 3, d, h, w): probability and scaled logit of the earlier mask, and whether one is given."""
    batch = prompts.points.shape[0]
    if prompts.mask_logits is None:
        return prompts.points.new_zeros(batch, 3, *shape)
    logits = prompts.mask_logits.float()
    if tuple(logits.shape[2:]) != shape:
        logits = F.adaptive_avg_pool3d(logits, shape)
    return torch.cat([logits.sigmoid(), (logits / 4).clamp(-2, 2), torch.ones_like(logits)], dim=1)


def prompt_maps(prompts: PromptBatch, stride: int, shape: Shape) -> Tensor:
    """All dense maps at one resolution, (B, MAP_CHANNELS, d, h, w)."""
    bumps = [click_bumps(prompts, stride, shape, sigma) for sigma in (1.0, 4.0)]
    return torch.cat([*bumps, box_map(prompts, stride, shape), mask_map(prompts, shape)], dim=1)


def sample_at(features: Tensor, points: Tensor, stride: float) -> Tensor:
    """Trilinear features (B, N, C) of a (B, C, d, h, w) map at crop positions (B, N, 3); positions outside take the border's."""
    size = torch.tensor(features.shape[2:], device=points.device, dtype=torch.float32)
    unit = (positions_at(points.float(), stride) + 0.5) / size * 2 - 1
    grid = unit.flip(-1)[:, :, None, None, :]
    sampled = F.grid_sample(features.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[..., 0, 0].transpose(1, 2)


class ClickSimilarity(nn.Module):
    """How much each voxel resembles what was clicked: per head, the largest dot product with any object click and any background click.

    Output (B, 2 * heads, d, h, w); a sign without clicks gives zeros. Source of the idea: visual sampling at the click, 3DSAM-adapter.
    """

    def __init__(self, channels: int, heads: int, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Conv3d(channels, heads * head_dim, 1)
        self.key = nn.Linear(channels, heads * head_dim)

    def project(self, features: Tensor) -> Tensor:
        """The prompt-independent half, (B, heads * head_dim, d, h, w): compute once per crop."""
        return self.query(features)

    def forward(self, features: Tensor, projected: Tensor, prompts: PromptBatch, stride: int) -> Tensor:
        """``features`` are sampled at the clicks, ``projected`` is ``project(features)``."""
        batch, _, *shape = projected.shape
        if prompts.points.shape[1] == 0:
            return projected.new_zeros(batch, 2 * self.heads, *shape)
        keys = self.key(sample_at(features, prompts.points, stride).to(self.key.weight.dtype))
        keys = keys.view(batch, -1, self.heads, self.head_dim)
        voxels = projected.view(batch, self.heads, self.head_dim, -1) if projected.is_contiguous() else projected.reshape(
            batch, self.heads, self.head_dim, -1
        )
        scores = torch.einsum("bnhc,bhcv->bnhv", keys.to(voxels.dtype), voxels) * self.head_dim**-0.5
        maps = []
        for label in (1, 0):
            there = (prompts.point_labels == label)[:, :, None, None]
            best = scores.masked_fill(~there, -1e4).amax(dim=1)
            maps.append(torch.where(there.any(dim=1), best, torch.zeros_like(best)))
        return torch.cat(maps, dim=1).view(batch, 2 * self.heads, *shape)

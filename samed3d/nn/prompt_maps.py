"""Prompts as dense maps and learned similarities, at any resolution of a crop.

Maps say where the prompts are: Gaussian bumps of two widths at clicks, boxes, the earlier mask. Similarities compare
the features under each click with every voxel's, so that one click stands for a whole structure of any appearance.
Both are channels-last, (B, d, h, w, channels): so they are built without copies, and ``nn.Linear`` takes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.geometry import IntTriple
from samed3d.nn.prompt_batch import NEGATIVE, POSITIVE, PromptBatch

SIGMAS = (1.0, 4.0)
"""Widths of the bumps, in voxels of the map."""
MASK_CHANNELS = 3
MAP_CHANNELS = 2 * len(SIGMAS) + 2 + MASK_CHANNELS
"""A bump per width and sign; inside the box, a box is given; mask probability, mask logit / 4 (clamped), mask given."""


def positions_at(points: Tensor, stride: float) -> Tensor:
    """Voxel-centre positions of the full crop as positions on a grid ``stride`` times coarser."""
    return (points.float() + 0.5) / stride - 0.5


def click_bumps(prompts: PromptBatch, stride: int, shape: IntTriple) -> Tensor:
    """Strongest Gaussian bump per voxel, (B, d, h, w, 2 * len(SIGMAS)): per width object, then background clicks."""
    points = positions_at(prompts.points, stride)
    if points.shape[1] == 0:
        return points.new_zeros(points.shape[0], *shape, 2 * len(SIGMAS))
    offsets = [torch.arange(n, device=points.device) - points[..., axis, None] for axis, n in enumerate(shape)]
    maps = []
    for sigma in SIGMAS:
        z, y, x = (torch.exp(-0.5 * (offset / sigma) ** 2) for offset in offsets)
        for label in (POSITIVE, NEGATIVE):
            there = (prompts.point_labels == label).to(z.dtype)
            maps.append(torch.einsum("bnd,bnh,bnw->bndhw", z * there[..., None], y, x).amax(dim=1))
    return torch.stack(maps, dim=-1)


def box_map(prompts: PromptBatch, stride: int, shape: IntTriple) -> Tensor:
    """(B, d, h, w, 2): the share of each coarse voxel inside the box, and whether a box is given."""
    batch = prompts.points.shape[0]
    if prompts.boxes is None:
        return prompts.points.new_zeros(batch, *shape, 2)
    low, high = prompts.boxes[:, 0].float() / stride, prompts.boxes[:, 1].float() / stride
    valid = prompts.has_box().to(low.dtype).view(batch, 1, 1, 1)
    inside = valid
    for axis, size in enumerate(shape):
        edge = torch.arange(size, device=low.device, dtype=low.dtype)
        cover = (torch.minimum(edge + 1, high[:, axis, None]) - torch.maximum(edge, low[:, axis, None])).clamp(0, 1)
        inside = inside * cover.view(batch, *(size if a == axis else 1 for a in range(3)))
    return torch.stack([inside, valid.expand_as(inside)], dim=-1)


def mask_map(prompts: PromptBatch, shape: IntTriple) -> Tensor:
    """(B, d, h, w, 3): probability and scaled logit of the earlier mask, and whether one is given."""
    if prompts.mask_logits is None:
        return prompts.points.new_zeros(prompts.points.shape[0], *shape, MASK_CHANNELS)
    logits = _resized(prompts.mask_logits.float(), shape)[:, 0]
    maps = torch.stack([logits.sigmoid(), (logits / 4).clamp(-2, 2), torch.ones_like(logits)], dim=-1)
    return maps if prompts.mask_valid is None else maps * prompts.mask_valid.to(maps.dtype)[:, None, None, None, None]


def _resized(logits: Tensor, shape: IntTriple) -> Tensor:
    """Means of blocks on a coarser grid, copies on a finer one; ONNX lacks the pooling for edges that do not divide."""
    size = logits.shape[2:]
    if all(n % m == 0 for n, m in zip(size, shape, strict=True)):
        return F.avg_pool3d(logits, [n // m for n, m in zip(size, shape, strict=True)])
    if all(m % n == 0 for n, m in zip(size, shape, strict=True)):
        return F.interpolate(logits, size=shape, mode="nearest")
    return F.adaptive_avg_pool3d(logits, shape)


def prompt_maps(prompts: PromptBatch, stride: int, shape: IntTriple) -> Tensor:
    """All dense maps at one resolution, (B, d, h, w, MAP_CHANNELS) float32."""
    return torch.cat(
        [click_bumps(prompts, stride, shape), box_map(prompts, stride, shape), mask_map(prompts, shape)], dim=-1
    )


def sample_at(features: Tensor, points: Tensor, stride: float) -> Tensor:
    """Trilinear features (B, N, C) float32 of (B, C, d, h, w) under points; outside of the crop, those of the border.

    ``points`` are (B, N, 3) in voxels of the crop, of which ``stride`` lie along a voxel of the features.
    """
    if points.shape[1] == 0:
        return features.new_zeros(points.shape[0], 0, features.shape[1], dtype=torch.float32)
    size = torch.tensor(features.shape[2:], device=points.device)
    at = positions_at(points, stride).clamp(min=0).minimum(size - 1.0)
    low = at.floor().long()
    weight = at - low
    corner = torch.tensor([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], device=points.device)
    index = torch.minimum(low[:, :, None] + corner, size - 1)  # (B, N, 8, 3); one gather: backward makes one buffer
    share = torch.where(corner == 1, weight[:, :, None], 1 - weight[:, :, None]).prod(dim=-1, keepdim=True)
    batch = torch.arange(points.shape[0], device=points.device)[:, None, None]
    picked = features.movedim(1, -1)[batch, index[..., 0], index[..., 1], index[..., 2]]
    return (picked.float() * share).sum(dim=2)


class ClickSimilarity(nn.Module):
    """How much each voxel resembles what was clicked, per head (a learned product) and sign of the click.

    Each head gives the largest value over all clicks of a sign.

    Source: ours, after the visual sampling at the click of 3DSAM-adapter, which does not compare with every voxel.
    """

    def __init__(self, channels: int, heads: int, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.key = nn.Linear(channels, heads * head_dim)
        self.back = nn.Parameter(torch.randn(heads, head_dim, channels) * channels**-0.5)

    def forward(self, features: Tensor, prompts: PromptBatch, stride: int) -> Tensor:
        """(B, C, d, h, w) features to (B, d, h, w, 2 * heads); a sign without clicks gives zeros."""
        batch, _, d, h, w = features.shape
        if prompts.points.shape[1] == 0:
            return features.new_zeros(batch, d, h, w, 2 * self.heads)
        keys = self.key(sample_at(features, prompts.points, stride))
        keys = rearrange(keys, "b n (heads k) -> b n heads k", heads=self.heads).float()
        # The voxel side of the product is linear, so it is folded into one vector per click and head in feature space.
        probes = torch.einsum("bnhk,hkc->bcnh", keys, self.back.float()).flatten(2) * self.head_dim**-0.5
        voxels = rearrange(features, "b c d h w -> b (d h w) c")
        scores = rearrange(voxels @ probes.to(voxels.dtype), "b v (n heads) -> b v n heads", heads=self.heads)
        maps = []
        for label in (POSITIVE, NEGATIVE):
            there = (prompts.point_labels == label)[:, None, :, None]
            best = scores.masked_fill(~there, -1e4).amax(dim=2)
            maps.append(best.masked_fill(~there.any(dim=2), 0.0))
        return rearrange(torch.cat(maps, dim=-1), "b (d h w) c -> b d h w c", d=d, h=h, w=w)

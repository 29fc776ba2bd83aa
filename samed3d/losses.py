"""Training losses on logits: soft Dice, cross-entropy, and the error of the predicted IoU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samed3d.prompts import MASK_LOGIT_THRESHOLD


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0, squared: bool = True) -> Tensor:
    """1 - soft Dice per sample of (B, 1, D, H, W), mean over the batch.

    ``squared`` squares the denominator (MONAI's ``squared_pred``).
    """
    return soft_dice_loss(logits.float().sigmoid().flatten(2), target.flatten(2), smooth, squared, (2,))


def soft_dice_loss(
    prob: Tensor, target: Tensor, smooth: float, squared: bool = False, voxels: tuple[int, ...] = (2,)
) -> Tensor:
    """1 - soft Dice of (B, K, N) probabilities, summed over the axes ``voxels``, mean over the others.

    ``smooth`` is added to both sides of the fraction; ``squared`` squares the probabilities in the denominator.
    """
    truth = target.to(prob.dtype)
    overlap = 2 * (prob * truth).sum(voxels) + smooth
    return (1 - overlap / ((prob.square() if squared else prob).sum(voxels) + truth.sum(voxels) + smooth)).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy per voxel of (B, 1, D, H, W), mean over all."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.to(torch.float32))


def hard_overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU (B,) of the thresholded mask; both are 1 where mask and target are empty."""
    mask, truth = (logits > MASK_LOGIT_THRESHOLD).flatten(1), target.flatten(1).bool()
    both = (mask & truth).sum(dim=1).float()
    total = mask.sum(dim=1) + truth.sum(dim=1)
    empty = total == 0
    dice = torch.where(empty, 1.0, 2 * both / total.clamp(min=1))
    iou = torch.where(empty, 1.0, both / (total - both).clamp(min=1))
    return dice, iou


def iou_loss(predicted: Tensor, overlap: Tensor) -> Tensor:
    """Mean squared error of the predicted IoU (B, 1) against the mask's true IoU (B,)."""
    return F.mse_loss(predicted[:, 0].float(), overlap.detach())

"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from samed3d.losses import cross_entropy, dice_loss, hard_overlap, iou_loss

LOG3 = math.log(3.0)
"""A logit of log 3 is a probability of 3/4."""


def volume(*values: float) -> torch.Tensor:
    """One sample of (1, 1, 1, 1, n)."""
    return torch.tensor(values)[None, None, None, None]


def test_dice_loss_has_squared_denominators_and_a_smooth_term():
    logits, target = volume(LOG3, -LOG3, 0.0, LOG3), volume(1, 1, 0, 0).bool()
    # p = 3/4 1/4 1/2 3/4; sum p t = 1, sum p^2 = 9/16 + 1/16 + 1/4 + 9/16 = 23/16, sum t = 2
    assert float(dice_loss(logits, target)) == pytest.approx(1 - (2 * 1 + 1) / (23 / 16 + 2 + 1))
    assert float(dice_loss(logits, target, smooth=0.0)) == pytest.approx(1 - 2 / (23 / 16 + 2))


def test_dice_loss_is_the_mean_over_samples_not_over_voxels():
    big, small = torch.full((1, 1, 2, 2, 2), 40.0), torch.full((1, 1, 2, 2, 2), -40.0)
    targets = [torch.ones(1, 1, 2, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)]
    targets[1][0, 0, 0, 0, 0] = True
    each = [float(dice_loss(x, t)) for x, t in zip((big, small), targets, strict=True)]
    assert each == pytest.approx([0.0, 1 - 1 / 2])
    assert float(dice_loss(torch.cat([big, small]), torch.cat(targets))) == pytest.approx(0.25)


def test_dice_loss_of_nothing_is_zero():
    assert float(dice_loss(volume(-50.0, -50.0), volume(0, 0).bool())) == pytest.approx(0.0, abs=1e-6)


def test_cross_entropy_by_hand_and_for_extreme_logits():
    logits, target = volume(LOG3, LOG3, 0.0), volume(1, 0, 1).bool()
    assert float(cross_entropy(logits, target)) == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3)
    assert float(cross_entropy(volume(-200.0), volume(1).bool())) == pytest.approx(200.0)


def test_losses_are_computed_in_float32():
    logits, target = (
        torch.linspace(-4, 4, 4096).view(1, 1, 16, 16, 16),
        torch.arange(4096).view(1, 1, 16, 16, 16) % 2 == 0,
    )
    for loss in (dice_loss, cross_entropy):
        half = loss(logits.bfloat16(), target)
        assert half.dtype == torch.float32
        assert float(half) == pytest.approx(float(loss(logits.bfloat16().float(), target)), abs=1e-7)


def test_hard_overlap_by_hand():
    logits = torch.cat(
        [
            volume(1.0, 2.0, -1.0, 0.0),
            volume(-1.0, -1.0, -1.0, 1.0),
            volume(-1.0, 0.0, -2.0, -3.0),
            volume(-1, -1, -1, -1),
        ]
    )
    target = torch.cat([volume(1, 0, 1, 0), volume(1, 1, 1, 0), volume(0, 0, 0, 0), volume(1, 0, 0, 0)]).bool()
    dice, iou = hard_overlap(logits, target)  # a logit of exactly 0 is outside
    assert dice.tolist() == pytest.approx([2 / 4, 0.0, 1.0, 0.0])
    assert iou.tolist() == pytest.approx([1 / 3, 0.0, 1.0, 0.0])


def test_iou_loss_by_hand_and_only_the_prediction_learns():
    predicted, overlap = torch.tensor([[0.5], [1.0]], requires_grad=True), torch.tensor([1.0, 0.8], requires_grad=True)
    loss = iou_loss(predicted, overlap)
    assert float(loss.detach()) == pytest.approx((0.25 + 0.04) / 2)
    loss.backward()
    assert overlap.grad is None
    assert predicted.grad[:, 0].tolist() == pytest.approx([-0.5, 0.2])


def test_gradients_are_right():
    logits = torch.randn(
        2, 1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    target = torch.rand(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(1)) > 0.5
    for loss in (dice_loss, cross_entropy):
        (gradient,) = torch.autograd.grad(loss(logits, target), logits)
        step = torch.zeros_like(logits)
        step[1, 0, 1, 0, 1] = 1e-2
        slope = (loss(logits + step, target) - loss(logits - step, target)).detach() / 2e-2
        assert float(slope) == pytest.approx(float(gradient[1, 0, 1, 0, 1]), rel=1e-2, abs=1e-4)

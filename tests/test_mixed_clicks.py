"""Training turns that are like a session's: clicks of several kinds of user, and a mask that zooming out has left in a window."""

from __future__ import annotations

import math

import torch
from test_training import session
from torch import Tensor

from samed3d.clicks import next_click, policy_clicks
from samed3d.crops import BACKGROUND_LOGIT
from samed3d.training.step import windowed


def test_a_window_leaves_the_mask_as_it_is_or_unknown_outside_a_box_around_the_click():
    logits = torch.randn(1, 12, 16, 10, generator=torch.Generator().manual_seed(0))
    point, generator = torch.tensor([1.0, 15.0, 5.0]), torch.Generator().manual_seed(3)
    assert torch.equal(windowed(logits, point, 0.0, generator), logits)
    for _ in range(20):
        known = windowed(logits, point, 1.0, generator)
        there = known == logits
        assert bool((known[~there] == BACKGROUND_LOGIT).all())
        assert bool(there[0, 1, 15, 5])
        edges = [int(there[0].movedim(axis, 0).flatten(1).any(1).sum()) for axis in range(3)]
        assert int(there.sum()) == math.prod(edges)  # a box
        assert all(int(n * 0.5) <= edge <= n * 0.9 for edge, n in zip(edges, logits.shape[1:], strict=True))


def test_windows_come_with_turns_that_bring_no_click_only():
    windowed_masks = session(3)(mask_only_probability=1.0, window_probability=1.0).seen
    assert windowed_masks[0].mask_logits is None
    assert all(bool((prompts.mask_logits == BACKGROUND_LOGIT).any()) for prompts in windowed_masks[1:])
    clicked = session(3)(window_probability=1.0).seen
    assert not any(bool((prompts.mask_logits == BACKGROUND_LOGIT).any()) for prompts in clicked[1:])


def test_mixed_clicks_begin_anywhere_and_then_follow_any_rule():
    pred, target = torch.zeros(1, 1, 9, 9, 9, dtype=torch.bool), torch.zeros(1, 1, 9, 9, 9, dtype=torch.bool)
    target[..., 1:8, 1:8, 1:8] = True

    def clicks(mask: Tensor) -> set[tuple[float, ...]]:
        found = [policy_clicks(mask, target, "mixed", torch.Generator().manual_seed(seed))[0] for seed in range(60)]
        return {tuple(points.flatten().tolist()) for points in found}

    first = clicks(pred)
    assert len(first) > 40 and (4.0, 4.0, 4.0) not in first  # uniform: the centre is one voxel of 343
    pred[..., 1:8, 1:8, 1] = True
    later = clicks(pred)
    deepest = next_click(pred[0, 0].numpy(), target[0, 0].numpy(), "centre")
    assert deepest is not None and deepest[0] in later
    assert len(later) > 20

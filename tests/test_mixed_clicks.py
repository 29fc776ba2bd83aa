"""Training turns that are like a session's: clicks of several kinds of user, and a mask that zooming out has left in a
window."""

from __future__ import annotations

import math

import torch
from test_training import session
from torch import Tensor

from samed3d.clicks import next_click, policy_clicks
from samed3d.crops import BACKGROUND_LOGIT
from samed3d.training.step import windowed


def test_a_window_leaves_the_mask_as_it_is_or_unknown_outside_a_box_around_the_click():
    logits = torch.randn(20, 1, 12, 16, 10, generator=torch.Generator().manual_seed(0))
    points, generators = (
        torch.tensor([[1.0, 15.0, 5.0]]).expand(20, 3),
        [torch.Generator().manual_seed(seed) for seed in range(20)],
    )
    assert torch.equal(windowed(logits, points, 0.0, generators), logits)
    known = windowed(logits, points, 1.0, generators)
    assert len({int((one == BACKGROUND_LOGIT).sum()) for one in known}) > 5
    for one, whole in zip(known[:, 0], logits[:, 0], strict=True):
        there = one == whole
        assert bool((one[~there] == BACKGROUND_LOGIT).all())
        assert bool(there[1, 15, 5])
        edges = [int(there.movedim(axis, 0).flatten(1).any(1).sum()) for axis in range(3)]
        assert int(there.sum()) == math.prod(edges)  # a box
        assert all(int(n * 0.5) <= edge <= n * 0.9 for edge, n in zip(edges, whole.shape, strict=True))


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

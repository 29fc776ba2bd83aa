"""Training turns that are like a session's: clicks of several kinds of user, and a mask that zooming out has left in a
window."""

from __future__ import annotations

import math

import torch
from test_training import session

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

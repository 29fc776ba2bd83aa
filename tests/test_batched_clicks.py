"""A batch clicked at once, as on a GPU, obeys the rules of the clicks on one volume; here on the CPU, in test_gpu.py on
a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samed3d.batched_clicks import clicks_of_batch, largest_components, squared_depth
from samed3d.clicks import POLICIES, distance_inside, largest_component, next_click


def blobs(count: int, shape: tuple[int, int, int], level: float, seed: int = 0) -> Tensor:
    """(count, D, H, W) bool: smooth shapes of several parts; the last is empty."""
    coarse = torch.randn(count, 1, 6, 7, 5, generator=torch.Generator().manual_seed(seed))
    masks = F.interpolate(coarse, size=shape, mode="trilinear")[:, 0] > level
    masks[-1] = False
    return masks


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + number) for number in range(count)]


@pytest.mark.parametrize("shape", [(16, 21, 18), (9, 11, 130)])
def test_depth_is_the_distance_map_squared(shape):
    for mask, depth in zip(masks := blobs(5, shape, 0.0), squared_depth(masks), strict=True):
        np.testing.assert_allclose(depth.sqrt(), distance_inside(mask.numpy()), rtol=1e-6)
    assert squared_depth(torch.ones(1, 5, 5, 5, dtype=torch.bool))[0, 2, 2, 2] == 9  # the border counts as outside


@pytest.mark.parametrize("level", [-0.3, 0.0, 0.5])
def test_the_largest_component_is_that_of_one_volume(level):
    for mask, found in zip(masks := blobs(6, (16, 21, 18), level), largest_components(masks), strict=True):
        assert (found.numpy() == largest_component(mask.numpy())).all()


def test_a_winding_component_is_followed_to_its_end():
    mask = torch.zeros(1, 15, 15, 15, dtype=torch.bool)
    mask[0, ::2, ::2] = True  # lines along x ...
    for z in range(0, 15, 2):
        for y in range(1, 15, 2):
            mask[0, z, y, 0 if y % 4 == 1 else 14] = True  # ... joined to a snake within each slice
    for z in range(1, 15, 2):
        mask[0, z, 0, 0] = True  # ... and all slices to one
    assert torch.equal(largest_components(mask), mask)


def test_centre_clicks_are_those_of_one_volume():
    pred, target = blobs(6, (12, 16, 14), 0.2, 1), blobs(6, (12, 16, 14), 0.0, 2)
    points, labels = clicks_of_batch(pred[:, None], target[:, None], "centre", generators(6))
    for one, wanted, point, label in zip(
        pred.numpy(), target.numpy(), points[:, 0].long().tolist(), labels[:, 0].tolist(), strict=True
    ):
        click = next_click(one, wanted, "centre")
        depth = distance_inside(largest_component(one ^ wanted))
        if click is None:
            assert label == -1
        else:
            assert depth[tuple(point)] == pytest.approx(depth[click[0]]) and label == int(wanted[tuple(point)])


@pytest.mark.parametrize("policy", [*POLICIES, "mixed"])
def test_clicks_are_right_and_follow_from_the_samples_generator_alone(policy):
    pred, target = blobs(6, (12, 16, 14), 0.2, 1)[:, None], blobs(6, (12, 16, 14), 0.0, 2)[:, None]
    pred[1], pred[2] = False, target[2]
    points, labels = clicks_of_batch(pred, target, policy, generators(6))
    assert points.shape == (6, 1, 3) and points.dtype == torch.float32 and labels.dtype == torch.int64
    for number, (point, label) in enumerate(zip(points[:, 0].long().tolist(), labels[:, 0].tolist(), strict=True)):
        wrong = bool((pred[number] ^ target[number]).any())
        assert (label == -1) == (not wrong)
        if wrong:
            at = (number, 0, *point)
            assert bool(pred[at]) != bool(target[at]) and label == int(target[at])
    alone, _ = clicks_of_batch(pred[3:4], target[3:4], policy, generators(6)[3:4])
    assert torch.equal(alone[0], points[3])


def test_ritm_clicks_lie_at_more_than_half_the_depth_of_the_deeper_kind():
    target, pred = torch.zeros(200, 1, 11, 11, 24, dtype=torch.bool), torch.zeros(200, 1, 11, 11, 24, dtype=torch.bool)
    target[..., 1:10, 1:10, 1:10], pred[..., 4:7, 4:7, 15:18] = True, True  # depths 5 and 2
    points, labels = clicks_of_batch(pred, target, "ritm", generators(200))
    assert bool((labels == 1).all()) and float(points.min()) == 3 and float(points.max()) == 7
    assert len({tuple(p) for p in points[:, 0].tolist()}) > 80


def test_mixed_clicks_begin_uniform_and_then_follow_any_rule():
    target, pred = torch.zeros(90, 1, 9, 9, 9, dtype=torch.bool), torch.zeros(90, 1, 9, 9, 9, dtype=torch.bool)
    target[..., 1:8, 1:8, 1:8] = True
    first, _ = clicks_of_batch(pred, target, "mixed", generators(90))
    assert len({tuple(p) for p in first[:, 0].tolist()}) > 60
    pred[..., 1:8, 1:8, 1] = True
    later, _ = clicks_of_batch(pred, target, "mixed", generators(90))
    deepest = next_click(pred[0, 0].numpy(), target[0, 0].numpy(), "centre")
    assert deepest is not None
    assert 15 < sum(tuple(p) == deepest[0] for p in later[:, 0].tolist()) < 50  # a third

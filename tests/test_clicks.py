"""Simulated users: each rule on masks whose answer is known, one volume or a batch, with and without the fast
libraries."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samed3d.clicks import (
    POLICIES,
    distance_inside,
    jittered_boxes,
    largest_component,
    largest_components,
    largest_components_by_torch,
    next_click,
    sample_clicks,
    squared_depths,
    squared_depths_by_torch,
)
from samed3d.errors import InputError

SHAPE = (7, 8, 9)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_each(count: int, seed: int = 0) -> list[torch.Generator]:
    """A generator for each sample."""
    return [seeded(10_000 * seed + number) for number in range(count)]


def block(*corners: tuple[int, int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in corners)] = True
    return mask


def as_batch(*masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(masks))[:, None]


def blobs(count: int, shape: tuple[int, int, int], level: float, seed: int = 0) -> Tensor:
    """(count, D, H, W) bool: smooth shapes of several parts; the last is empty."""
    coarse = torch.randn(count, 1, 6, 7, 5, generator=seeded(seed))
    masks = F.interpolate(coarse, size=shape, mode="trilinear")[:, 0] > level
    masks[-1] = False
    return masks


@pytest.fixture
def without_fast_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edt", None)
    monkeypatch.setitem(sys.modules, "cc3d", None)


def check_even(counts: np.ndarray, draws: int) -> None:
    """Pearson's statistic of equal chances: its mean is the degrees of freedom, its deviation the root of twice
    that."""
    expected = draws / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), counts


# One volume


def test_uniform_hits_every_wrong_voxel_alike_and_no_other(rng):
    target, pred = block((1, 3), (2, 4), (3, 6)), block((2, 4), (2, 4), (4, 7))
    error = pred ^ target
    draws = 3000
    found = [next_click(pred, target, "uniform", rng) for _ in range(draws)]
    counts = np.zeros(SHAPE, int)
    for zyx, positive in found:
        counts[zyx] += 1
        assert positive == target[zyx]
    assert counts[~error].sum() == 0
    check_even(counts[error], draws)


def test_first_click_is_uniform_in_the_target(rng):
    target = block((1, 4), (2, 4), (3, 5))
    found = {next_click(np.zeros(SHAPE, bool), target, "uniform", rng) for _ in range(300)}
    assert found == {(tuple(int(i) for i in v), True) for v in np.argwhere(target)}


def test_centre_is_the_deepest_voxel_of_the_largest_wrong_component():
    shape = (12, 12, 20)
    target = block((1, 10), (1, 4), (1, 4), shape=shape) | block(
        (2, 7), (6, 11), (10, 15), shape=shape
    )  # 81 voxels, thin; 125, thick
    assert next_click(np.zeros(shape, bool), target, "centre") == ((4, 8, 12), True)
    assert next_click(target, np.zeros(shape, bool), "centre") == ((4, 8, 12), False)
    # The component with the most voxels, not the deepest: here the slab is thinner and larger.
    slab = block((0, 12), (0, 12), (17, 18), shape=shape)
    zyx, positive = next_click(np.zeros(shape, bool), block((2, 7), (6, 11), (5, 10), shape=shape) | slab, "centre")
    assert zyx[2] == 17 and positive


def test_centre_joins_voxels_that_touch_by_a_corner():
    target = (
        block((0, 2), (0, 2), (0, 2)) | block((2, 4), (2, 4), (2, 4)) | block((4, 7), (0, 2), (7, 9))
    )  # 8 + 8 joined against 12
    zyx, _ = next_click(np.zeros(SHAPE, bool), target, "centre")
    assert max(zyx) < 4


def test_centre_counts_the_array_border_as_outside():
    full = np.ones((5, 5, 5), bool)
    assert next_click(~full, full, "centre") == ((2, 2, 2), True)


def test_ritm_takes_the_deeper_kind_beyond_half_its_depth(rng):
    shape = (11, 11, 24)
    missed, surplus = (
        block((1, 10), (1, 10), (1, 10), shape=shape),
        block((4, 7), (4, 7), (15, 18), shape=shape),
    )  # depths 5 and 2
    drawn = [next_click(surplus, missed, "ritm", rng) for _ in range(1000)]
    allowed = block((3, 8), (3, 8), (3, 8), shape=shape)  # depth 3, 4 and 5 of 5
    counts = np.zeros(shape, int)
    for zyx, positive in drawn:
        counts[zyx] += 1
        assert positive
    assert counts[~allowed].sum() == 0
    check_even(counts[allowed], 1000)
    assert {positive for _, positive in (next_click(missed, surplus, "ritm", rng) for _ in range(20))} == {False}


def test_ritm_prefers_missed_voxels_when_both_are_as_deep(rng):
    one, other = block((1, 4), (1, 4), (1, 4)), block((1, 4), (1, 4), (5, 8))
    assert next_click(one, other, "ritm", rng) == ((2, 2, 6), True)
    assert next_click(other, one, "ritm", rng) == ((2, 2, 2), True)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_wrong_gives_no_click(policy, rng):
    for mask in (np.zeros(SHAPE, bool), block((1, 3), (1, 3), (1, 3)), np.ones(SHAPE, bool)):
        assert next_click(mask, mask, policy, rng) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_one_wrong_voxel_is_found_anywhere(policy, rng):
    for corner in ((0, 0, 0), (6, 7, 8), (3, 0, 8)):
        target = np.zeros(SHAPE, bool)
        target[corner] = True
        assert next_click(np.zeros(SHAPE, bool), target, policy, rng) == (corner, True)
        assert next_click(np.ones(SHAPE, bool), ~target, policy, rng) == (corner, False)


@pytest.mark.parametrize("policy", POLICIES)
def test_same_seed_same_clicks(policy, rng):
    pred, target = rng.random(SHAPE) > 0.6, rng.random(SHAPE) > 0.5
    first, second, other = (
        [next_click(pred, target, policy, r) for _ in range(9)] for r in map(np.random.default_rng, (3, 3, 4))
    )
    assert first == second
    assert (first == other) == (policy == "centre")


def test_integers_count_as_masks(rng):
    target = block((1, 3), (2, 4), (3, 6)).astype(np.uint8)
    assert next_click(np.zeros_like(target), target * 7, "centre") == next_click(
        np.zeros(SHAPE, bool), target > 0, "centre"
    )


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="click policy must be one of uniform, centre, ritm, got 'random'"):
        next_click(np.zeros(SHAPE, bool), np.ones(SHAPE, bool), "random")
    with pytest.raises(InputError, match="'ritm' needs a random generator"):
        next_click(np.zeros(SHAPE, bool), np.ones(SHAPE, bool), "ritm")


# Distances and components: edt and cc3d, scipy, torch


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.2)])
def test_depth_is_the_distance_to_the_nearest_voxel_outside(spacing, rng):
    mask = rng.random((5, 6, 7)) > 0.3
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    expected = np.zeros(mask.shape)
    for voxel in np.argwhere(mask):
        expected[tuple(voxel)] = np.sqrt((((outside - voxel) * spacing) ** 2).sum(axis=1).min())
    assert np.allclose(distance_inside(mask, spacing), expected, atol=1e-4)


def test_scipy_gives_the_same_as_edt_and_cc3d(request, rng):
    masks = [rng.random((9, 10, 11)) > share for share in (0.2, 0.5, 0.85, 1.0)]
    masks.append(np.asfortranarray(masks[0]))
    pairs = list(zip(masks, masks[1:], strict=False))

    def everything() -> list:
        found: list = [distance_inside(m, (2.0, 0.5, 1.0)) for m in masks] + [largest_component(m) for m in masks]
        return found + [next_click(a, b, policy, np.random.default_rng(1)) for a, b in pairs for policy in POLICIES]

    fast = everything()
    request.getfixturevalue("without_fast_libraries")
    with pytest.raises(ImportError):
        import edt  # noqa: F401
    slow = everything()
    for one, other in zip(fast, slow, strict=True):
        assert np.allclose(one, other, atol=1e-4) if isinstance(one, np.ndarray) else one == other


def test_largest_component_of_nothing_is_nothing(request):
    assert not largest_component(np.zeros(SHAPE, bool)).any()
    request.getfixturevalue("without_fast_libraries")
    assert not largest_component(np.zeros(SHAPE, bool)).any()


@pytest.mark.parametrize("shape", [(16, 21, 18), (9, 11, 130)])
def test_torch_gives_the_squared_distances_of_the_cpu_libraries(shape):
    masks = blobs(5, shape, 0.0)
    assert torch.equal(squared_depths_by_torch(masks), squared_depths(masks))
    np.testing.assert_allclose(squared_depths(masks)[0].sqrt(), distance_inside(masks[0].numpy()), rtol=1e-6)
    assert squared_depths_by_torch(torch.ones(1, 5, 5, 5, dtype=torch.bool))[0, 2, 2, 2] == 9  # the border is outside


@pytest.mark.parametrize("level", [-0.3, 0.0, 0.5])
def test_torch_gives_the_components_of_the_cpu_libraries(level):
    masks = blobs(6, (16, 21, 18), level)
    assert torch.equal(largest_components_by_torch(masks), largest_components(masks))
    assert (largest_components(masks)[0].numpy() == largest_component(masks[0].numpy())).all()


def test_of_components_of_one_size_the_first_counts():
    masks = torch.zeros(1, 5, 5, 9, dtype=torch.bool)
    masks[0, 1:3, 1:3, 6:8] = masks[0, 3:5, 1:3, 0:2] = True
    for find in (largest_components, largest_components_by_torch):
        found = find(masks)
        assert int(found.sum()) == 8 and bool(found[0, 1, 1, 6])


@pytest.mark.parametrize("find", [largest_components, largest_components_by_torch])
def test_a_winding_component_is_followed_to_its_end(find):
    mask = torch.zeros(1, 15, 15, 15, dtype=torch.bool)
    mask[0, ::2, ::2] = True  # lines along x ...
    for z in range(0, 15, 2):
        for y in range(1, 15, 2):
            mask[0, z, y, 0 if y % 4 == 1 else 14] = True  # ... joined to a snake within each slice
    for z in range(1, 15, 2):
        mask[0, z, 0, 0] = True  # ... and all slices to one
    assert torch.equal(find(mask), mask)


@pytest.mark.parametrize("policy", [*POLICIES, "mixed"])
def test_the_kernels_of_cpu_and_gpu_give_the_same_clicks(policy, monkeypatch):
    pred, target = blobs(12, (12, 16, 14), 0.2, 1)[:, None], blobs(12, (12, 16, 14), 0.0, 2)[:, None]
    expected = sample_clicks(pred, target, policy, one_each(12))
    monkeypatch.setattr("samed3d.clicks.squared_depths", squared_depths_by_torch)
    monkeypatch.setattr("samed3d.clicks.largest_components", largest_components_by_torch)
    found = sample_clicks(pred, target, policy, one_each(12))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# A batch of crops


def test_uniform_clicks_of_a_batch_hit_every_wrong_voxel_alike():
    target, pred = block((1, 3), (2, 4), (3, 6)), block((2, 4), (2, 4), (4, 7))
    draws, counts = 3000, np.zeros(SHAPE, int)
    points, labels = sample_clicks(as_batch(*[pred] * draws), as_batch(*[target] * draws), "uniform", one_each(draws))
    assert points.shape == (draws, 1, 3) and points.dtype == torch.float32
    assert labels.shape == (draws, 1) and labels.dtype == torch.int64
    for point, label in zip(points[:, 0].long().tolist(), labels[:, 0].tolist(), strict=True):
        counts[tuple(point)] += 1
        assert label == int(target[tuple(point)])
    assert counts[~(pred ^ target)].sum() == 0
    check_even(counts[pred ^ target], draws)


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_follow_the_rule_of_the_policy(policy):
    target, wrong = block((1, 6), (1, 6), (1, 6)), block((2, 4), (0, 2), (7, 9))
    empty, perfect = np.zeros(SHAPE, bool), block((0, 2), (0, 2), (0, 2))
    preds, targets = as_batch(empty, wrong, perfect, empty), as_batch(target, empty, perfect, empty)
    points, labels = sample_clicks(preds, targets, policy, one_each(4))
    assert labels[:, 0].tolist() == [1, 0, -1, -1]
    first, second = (tuple(p) for p in points[:2, 0].long().tolist())
    assert target[first] and wrong[second]
    if policy == "centre":
        assert first == (3, 3, 3)
    again, _ = sample_clicks(preds, targets, policy, one_each(4))
    assert torch.equal(points, again)
    others = [sample_clicks(preds, targets, policy, one_each(4, s))[0] for s in range(1, 9)]
    assert all(torch.equal(points, p) for p in others) == (policy == "centre")


def test_centre_clicks_of_a_batch_are_those_of_one_volume():
    pred, target = blobs(6, (12, 16, 14), 0.2, 1), blobs(6, (12, 16, 14), 0.0, 2)
    points, labels = sample_clicks(pred[:, None], target[:, None], "centre", one_each(6))
    for number in range(6):
        click = next_click(pred[number].numpy(), target[number].numpy(), "centre")
        at, label = tuple(points[number, 0].long().tolist()), int(labels[number, 0])
        assert label == -1 if click is None else (at, bool(label)) == click


@pytest.mark.parametrize("policy", [*POLICIES, "mixed"])
def test_clicks_are_right_and_follow_from_the_samples_generator_alone(policy):
    pred, target = blobs(6, (12, 16, 14), 0.2, 1)[:, None], blobs(6, (12, 16, 14), 0.0, 2)[:, None]
    pred[1], pred[2] = False, target[2]
    points, labels = sample_clicks(pred, target, policy, one_each(6))
    for number, (point, label) in enumerate(zip(points[:, 0].long().tolist(), labels[:, 0].tolist(), strict=True)):
        wrong = bool((pred[number] ^ target[number]).any())
        assert (label == -1) == (not wrong)
        if wrong:
            at = (number, 0, *point)
            assert bool(pred[at]) != bool(target[at]) and label == int(target[at])
    alone, _ = sample_clicks(pred[3:4], target[3:4], policy, one_each(6)[3:4])
    assert torch.equal(alone[0], points[3])


def test_ritm_clicks_of_a_batch_lie_at_more_than_half_the_depth_of_the_deeper_kind():
    target, pred = torch.zeros(200, 1, 11, 11, 24, dtype=torch.bool), torch.zeros(200, 1, 11, 11, 24, dtype=torch.bool)
    target[..., 1:10, 1:10, 1:10], pred[..., 4:7, 4:7, 15:18] = True, True  # depths 5 and 2
    points, labels = sample_clicks(pred, target, "ritm", one_each(200))
    assert bool((labels == 1).all()) and float(points.min()) == 3 and float(points.max()) == 7
    assert len({tuple(p) for p in points[:, 0].tolist()}) > 80


def test_mixed_clicks_begin_uniform_and_then_follow_any_rule():
    target, pred = torch.zeros(90, 1, 9, 9, 9, dtype=torch.bool), torch.zeros(90, 1, 9, 9, 9, dtype=torch.bool)
    target[..., 1:8, 1:8, 1:8] = True
    first, _ = sample_clicks(pred, target, "mixed", one_each(90))
    assert len({tuple(p) for p in first[:, 0].tolist()}) > 60
    pred[..., 1:8, 1:8, 1] = True
    later, _ = sample_clicks(pred, target, "mixed", one_each(90))
    deepest = next_click(pred[0, 0].numpy(), target[0, 0].numpy(), "centre")
    assert deepest is not None
    assert 15 < sum(tuple(p) == deepest[0] for p in later[:, 0].tolist()) < 50  # a third


def test_boxes_without_jitter_are_tight_and_half_open():
    boxes = jittered_boxes(as_batch(block((1, 3), (2, 4), (3, 9)), block((0, 7), (0, 1), (8, 9))), 0.0, one_each(2))
    assert boxes.tolist() == [[[1, 2, 3], [3, 4, 9]], [[0, 0, 8], [7, 1, 9]]]


def test_jitter_moves_faces_by_at_most_its_share_and_stays_in_the_crop():
    target = as_batch(*[block((5, 15), (0, 20), (8, 28), shape=(20, 20, 36))] * 200)
    boxes = jittered_boxes(target, 0.1, one_each(200))
    moved = boxes - torch.tensor([[5.0, 0.0, 8.0], [15.0, 20.0, 28.0]])
    assert (moved.abs() <= torch.tensor([1.0, 2.0, 2.0]) + 1e-5).all()
    assert (boxes[:, 0] >= 0).all() and (boxes[:, 1] <= torch.tensor([20.0, 20.0, 36.0])).all()
    for face in (moved[:, 0, 0], moved[:, 1, 0], moved[:, 0, 2], moved[:, 1, 2]):
        assert face.min() < -0.8 * face.abs().max() and face.max() > 0.8 * face.abs().max(), "both inward and outward"
    assert (moved[:, 0, 1] >= 0).all() and (moved[:, 1, 1] <= 0).all()
    assert torch.equal(boxes, jittered_boxes(target, 0.1, one_each(200)))


def test_a_box_keeps_one_voxel_per_axis_whatever_the_jitter():
    corners = [block((0, 1), (0, 1), (0, 1)), block((6, 7), (7, 8), (8, 9)), block((3, 4), (3, 4), (3, 4))]
    for seed in range(20):
        boxes = jittered_boxes(as_batch(*corners), 3.0, one_each(3, seed))
        assert ((boxes[:, 1] - boxes[:, 0]) > 1 - 1e-5).all()
        assert (boxes[:, 0] >= 0).all() and (boxes[:, 1] <= torch.tensor(SHAPE)).all()


def test_an_empty_target_gives_the_whole_crop():
    boxes = jittered_boxes(as_batch(np.zeros(SHAPE, bool)), 0.0, one_each(1))
    assert boxes.tolist() == [[[0, 0, 0], list(SHAPE)]]


def test_no_rule_touches_a_global_generator(rng):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    pred, target = as_batch(np.zeros(SHAPE, bool)), as_batch(block((1, 3), (1, 3), (1, 3)))
    for policy in POLICIES:
        sample_clicks(pred, target, policy, one_each(1))
        next_click(pred[0, 0].numpy(), target[0, 0].numpy(), policy, rng)
    jittered_boxes(target, 0.1, one_each(1))
    assert torch.equal(torch_state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()

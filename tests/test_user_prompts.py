"""Simulated people: clicks that miss, boxes that are not tight, strokes; all inside the volume and the same for the
same seed."""

from __future__ import annotations

import numpy as np
import pytest

from samed3d.clicks import noisy_click, user_box, user_stroke


def cuboid() -> np.ndarray:
    mask = np.zeros((20, 24, 28), bool)
    mask[4:13, 5:16, 8:25] = True
    return mask


def test_a_click_without_error_is_the_deepest_voxel(rng):
    target = cuboid()
    (z, y, x), positive = noisy_click(np.zeros_like(target), target, (1.0, 1.0, 1.0), 0.0, rng)
    assert z == 8 and positive and 9 <= y <= 11 and 12 <= x <= 20
    assert noisy_click(target, target, (1.0, 1.0, 1.0), 2.0, rng) is None


def test_the_error_is_in_millimetres_and_keeps_the_sign_that_was_meant(rng):
    target = cuboid()
    target[:] = False
    target[9:11, 11:13, 13:15] = True  # so small that most clicks miss it
    found = [noisy_click(np.zeros_like(target), target, (1.0, 2.0, 0.5), 2.0, rng) for _ in range(400)]
    assert all(positive for _, positive in found), "a missed click is still called positive"
    offsets = np.array([at for at, _ in found]) - np.array([9, 11, 13])
    spread = offsets.std(axis=0) * (1.0, 2.0, 0.5)
    assert np.all(np.abs(spread - 2.0) < 0.4) and not all(target[at] for at, _ in found)
    surplus = noisy_click(np.ones_like(target), target, (1.0, 1.0, 1.0), 0.0, rng)
    assert surplus is not None and surplus[1] is False


def test_clicks_stay_in_the_volume(rng):
    target = np.zeros((3, 3, 3), bool)
    target[0, 0, 0] = True
    found = [noisy_click(np.zeros_like(target), target, (1.0, 1.0, 1.0), 20.0, rng) for _ in range(50)]
    assert all(0 <= v < 3 for at, _ in found for v in at)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_boxes_are_nearly_tight(rng, jitter):
    target = cuboid()
    for _ in range(30):
        low, high = user_box(target, jitter, rng)
        for axis, (a, b) in enumerate(((4, 13), (5, 16), (8, 25))):
            slack = round(jitter * (b - a)) + (1 if jitter else 0)
            assert (
                abs(low[axis] - a) <= slack
                and abs(high[axis] - b) <= slack
                and low[axis] < high[axis] <= target.shape[axis]
            )
    assert user_box(np.zeros((3, 3, 3), bool), 0.1, rng) is None


def test_a_stroke_lies_inside_along_the_longer_side(rng):
    target = cuboid()
    path = user_stroke(target, rng)
    assert all(target[at] for at in path) and len({z for z, _, _ in path}) == 1
    xs = [x for _, _, x in path]
    assert xs == list(range(xs[0], xs[0] + len(xs))) and len(xs) == 17 - 2 * 3 and {y for _, y, _ in path} == {10}
    assert user_stroke(np.zeros((3, 3, 3), bool), rng) == []


def test_a_stroke_follows_a_bent_structure_and_one_voxel_is_enough(rng):
    target = np.zeros((1, 30, 30), bool)
    for y in range(30):
        x = int(10 + 8 * np.sin(y / 8))
        target[0, y, x : x + 4] = True
    assert all(target[at] for at in user_stroke(target, rng))
    single = np.zeros((4, 4, 4), bool)
    single[2, 1, 3] = True
    assert user_stroke(single, rng) == [(2, 1, 3)]


def test_strokes_are_seeded():
    one, other = (user_stroke(cuboid(), np.random.default_rng(5)) for _ in range(2))
    assert one == other

"""Methods without training on images where what they should find is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES, BaselineSession
from samed3d.geometry import Grid
from samed3d.metrics import dice
from samed3d.prompts import Box, Point, Scribble
from samed3d.volume import Volume

SPACING = (1.0, 1.5, 2.0)
CLICK = Point((8.0, 9.0, 7.0))


def scene(noise: float = 0.05) -> tuple[Volume, np.ndarray]:
    """A bright ball of about 9 mm around i, j, k = 8, 9, 7 and a second one apart from it."""
    z, y, x = np.ogrid[:16, :26, :40]
    near = lambda k, j, i: ((z - k) * 2) ** 2 + ((y - j) * 1.5) ** 2 + (x - i) ** 2 <= 81  # noqa: E731
    ball, other = near(7, 9, 8), near(8, 16, 31)
    image = (ball | other) * 1.0 + np.random.default_rng(0).normal(0, noise, ball.shape)
    grid = Grid(ball.shape, SPACING, (5.0, 6.0, 7.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    return Volume(image.astype(np.float32), grid, "memory"), ball


SETTINGS = {
    "region_growing": {"multiplier": 4.0},
    "fast_marching": {"reach": 1.0, "sharpness": 0.5},
    "random_walker": {"reach": 1.0, "beta": 130.0},
}
"""The scene is small beside its ball; the methods' own constants are for whole images."""


@pytest.mark.parametrize("kind", ["region_growing", "fast_marching", "random_walker"])
def test_interactive_methods_find_the_clicked_ball_and_not_the_other(kind):
    volume, ball = scene()
    found = BaselineSession(kind, volume, **SETTINGS[kind])
    found.add(CLICK, object_id=3)
    mask = found.mask_of(3)
    assert mask.dtype == np.uint8 and mask.shape == ball.shape and set(np.unique(mask)) <= {0, 1}
    assert dice(mask, ball) > 0.8 and not mask[8, 16, 31]


@pytest.mark.parametrize("kind", ["fast_marching", "random_walker", "dilated_ball"])
def test_a_negative_click_takes_its_surroundings_away(kind):
    volume, _ = scene()
    found = BaselineSession(kind, volume, **SETTINGS.get(kind, {}))
    found.add(CLICK)
    before = found.mask_of(1)
    found.add(Point((14.0, 9.0, 7.0), positive=False))
    after = found.mask_of(1)
    assert before[7, 9, 14] and not after[7, 9, 14] and after[7, 9, 8] and after.sum() < before.sum()


def test_a_second_positive_click_adds():
    volume, _ = scene()
    for kind in ("fast_marching", "dilated_ball", "random_walker"):
        found = BaselineSession(kind, volume, **SETTINGS.get(kind, {}))
        found.add(CLICK)
        assert not found.mask_of(1)[8, 16, 31]
        found.add(Point((31.0, 16.0, 8.0)))
        assert found.mask_of(1)[8, 16, 31] and found.mask_of(1)[7, 9, 8]


def test_a_stroke_is_its_voxels():
    volume, _ = scene()
    one, other = BaselineSession("dilated_ball", volume), BaselineSession("dilated_ball", volume)
    one.add(Scribble(((8.0, 9.0, 7.0), (12.0, 9.0, 7.0))))
    other.add(Point((8.0, 9.0, 7.0)))
    other.add(Point((12.0, 9.0, 7.0)))
    assert np.array_equal(one.mask_of(1), other.mask_of(1))


def test_a_ball_has_its_radius_in_millimetres():
    volume, _ = scene()
    found = BaselineSession("dilated_ball", volume)
    found.add(CLICK)
    z, y, x = np.nonzero(found.mask_of(1))
    assert (x.max() - 8, y.max() - 9, z.max() - 7) == (10, 6, 5)


def test_threshold_in_box_takes_the_side_of_the_middle():
    volume, ball = scene()
    for image in (volume, Volume(-volume.array, volume.grid, "memory")):
        found = BaselineSession("threshold_in_box", image)
        found.add(Box((0, 2, 2), (18, 16, 12)))
        assert dice(found.mask_of(1), ball) > 0.99
        found.add(Point((31.0, 16.0, 8.0)))
        assert not found.mask_of(1)[8, 16, 31], "clicks after the box are ignored"


def test_the_bound_falls_with_a_coarser_lattice_and_needs_the_truth():
    volume, ball = scene()
    scores = []
    for lattice_mm in (1.0, 3.0, 6.0, 12.0):
        found = BaselineSession("oracle_bound", volume, ball, lattice_mm=lattice_mm)
        found.add(CLICK)
        scores.append(dice(found.mask_of(1), ball))
    assert scores[0] > 0.95 and scores == sorted(scores, reverse=True) and 0.3 < scores[2] < 0.95
    with pytest.raises(InputError, match="oracle_bound is made from the truth, got none"):
        BaselineSession("oracle_bound", volume)


def test_prompts_that_cannot_come_first_are_refused():
    volume, ball = scene()
    with pytest.raises(InputError, match="fast_marching takes points only, got a box"):
        BaselineSession("fast_marching", volume).add(Box((0, 0, 0), (3, 3, 3)))
    with pytest.raises(InputError, match="threshold_in_box takes a box first, got a point"):
        BaselineSession("threshold_in_box", volume).add(CLICK)
    with pytest.raises(InputError, match="dilated_ball needs a positive prompt before a negative one"):
        BaselineSession("dilated_ball", volume).add(Point((1.0, 1.0, 1.0), positive=False))
    with pytest.raises(InputError, match="point must lie inside the volume"):
        BaselineSession("dilated_ball", volume).add(Point((99.0, 1.0, 1.0)))
    assert {name for name, kind in BASELINES.items() if kind.knows_truth} == {"oracle_bound"}


def test_random_walker_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(InputError, match="random_walker needs scikit-image: pip install scikit-image"):
        BaselineSession("random_walker", scene()[0]).add(CLICK)


def test_thin_images_do_not_break_the_region_methods():
    volume, ball = scene()
    thin = Volume(volume.array[7:8].copy(), Grid((1, *volume.array.shape[1:]), SPACING), "memory")
    for kind in ("region_growing", "fast_marching", "random_walker", "dilated_ball"):
        found = BaselineSession(kind, thin)
        found.add(Point((8.0, 9.0, 0.0)))
        assert found.mask_of(1)[0, 9, 8]

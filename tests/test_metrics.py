"""Metrics on cubes whose answer is known by hand, against a brute-force oracle, and their rules for empty masks."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samed3d.metrics import _cut_together, _distances, dice, surface_scores

SPACING = (3.0, 1.0, 0.5)


def one_score(name):
    return lambda a, b, spacing, tolerance_mm=0.0: surface_scores(a, b, spacing, tolerance_mm, (name,))[name]


nsd, nsd_subvoxel, hd95 = map(one_score, ("nsd", "nsd_subvoxel", "hd95_mm"))


def surface_distances(a, b, spacing):
    return _distances(_cut_together(a, b), spacing)


def cube(start: tuple[int, int, int], size: int, shape: tuple[int, int, int] = (12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((5, 6, 7)) < 0.3, rng.random((5, 6, 7)) < 0.3


def brute_force(
    pred: np.ndarray, target: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Every surface voxel against every other, by the definition."""

    def surface(mask):
        found = []
        for z, y, x in np.argwhere(mask):
            beside = [(z + 1, y, x), (z - 1, y, x), (z, y + 1, x), (z, y - 1, x), (z, y, x + 1), (z, y, x - 1)]
            if any(
                min(p) < 0 or any(v >= n for v, n in zip(p, mask.shape, strict=True)) or not mask[p] for p in beside
            ):
                found.append((z, y, x))
        return np.array(found) * spacing

    a, b = surface(pred), surface(target)
    table = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return table.min(1), table.min(0)


def test_dice_by_hand():
    assert dice(cube((2, 2, 2), 4), cube((2, 2, 2), 4)) == 1.0
    assert dice(cube((2, 2, 2), 4), cube((4, 2, 2), 4)) == 0.5
    assert dice(cube((0, 0, 0), 2), cube((6, 6, 6), 2)) == 0.0
    assert dice(cube((2, 2, 2), 4).astype(np.uint8) * 7, cube((2, 2, 2), 4)) == 1.0


def test_shifted_cube_by_hand():
    """A 4-cube moved by two voxels along z: 16 + 16 of its 56 surface voxels are 6 mm off (end planes), the rest at
    most that."""
    a, b = cube((2, 2, 2), 4), cube((4, 2, 2), 4)
    there, back = surface_distances(a, b, SPACING)
    assert len(there) == len(back) == 56
    assert there.max() == pytest.approx(6.0)
    assert hd95(a, b, SPACING) == pytest.approx(6.0)
    assert nsd(a, b, SPACING, 6.0) == 1.0
    assert nsd(a, a, SPACING, 0.0) == 1.0


def test_single_voxels_and_tolerance_at_the_limit():
    a, b = cube((3, 3, 3), 1), cube((3, 3, 5), 1)
    assert hd95(a, b, SPACING) == pytest.approx(1.0)
    assert nsd(a, b, SPACING, 1.0) == 1.0
    assert nsd(a, b, SPACING, 0.99) == 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("without_edt", [False, True])
def test_against_brute_force(monkeypatch, seed, without_edt):
    if without_edt:
        monkeypatch.setitem(sys.modules, "edt", None)
    a, b = blobs(seed)
    there, back = brute_force(a, b, SPACING)
    found = surface_distances(a, b, SPACING)
    for one, wanted in zip(found, (there, back), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-5)
    assert hd95(a, b, SPACING) == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert nsd(a, b, SPACING, 1.0) == pytest.approx(np.mean(np.concatenate([there, back]) <= 1.0))


def test_mask_at_the_border_has_a_surface_there():
    full = np.ones((3, 3, 3), bool)
    inner = cube((1, 1, 1), 1, (3, 3, 3))
    there, back = surface_distances(full, inner, (1.0, 1.0, 1.0))
    assert len(there) == 26
    assert back.tolist() == [1.0]


def test_empty_masks():
    empty, one = np.zeros((4, 4, 4), bool), cube((1, 1, 1), 2, (4, 4, 4))
    assert math.isnan(dice(empty, empty))
    assert math.isnan(nsd(empty, empty, SPACING, 1.0))
    assert math.isnan(hd95(empty, empty, SPACING))
    for a, b in ((empty, one), (one, empty)):
        assert dice(a, b) == 0.0
        assert nsd(a, b, SPACING, 1.0) == 0.0
        assert hd95(a, b, SPACING) == pytest.approx(4 * math.sqrt(9 + 1 + 0.25))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"of one shape, got \(4, 4, 4\) and \(4, 4, 5\)"):
        dice(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match="tolerance_mm must be >= 0, got -1"):
        nsd(np.ones((4, 4, 4)), np.ones((4, 4, 4)), SPACING, -1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), axes=st.permutations([0, 1, 2]), flip=st.integers(0, 2), scale=st.floats(0.1, 10))
def test_properties(seed, axes, flip, scale):
    """Symmetric in its arguments, unmoved by permuting and flipping the axes, and HD95 in proportion to the spacing."""
    a, b = blobs(seed)
    moved = [np.flip(np.transpose(m, axes), flip) for m in (a, b)]
    spacing = tuple(SPACING[i] for i in axes)
    assert dice(a, b) == dice(b, a) == dice(*moved)
    assert nsd(a, b, SPACING, 1.2) == pytest.approx(nsd(b, a, SPACING, 1.2)) == pytest.approx(nsd(*moved, spacing, 1.2))
    assert hd95(a, b, SPACING) == pytest.approx(hd95(b, a, SPACING)) == pytest.approx(hd95(*moved, spacing), rel=1e-5)
    assert hd95(a, b, tuple(scale * s for s in SPACING)) == pytest.approx(scale * hd95(a, b, SPACING), rel=1e-5)

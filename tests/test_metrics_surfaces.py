"""Surface elements, series of clicks, and all surface metrics against the programs that others score with, where these
are installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_metrics import hd95, nsd, nsd_subvoxel

from samed3d.metrics import (
    _codes,
    area_under_curve,
    clicks_to,
    dice,
    element_areas,
    monotone_share,
    surface_scores,
    trapezoid,
    volume_error,
)

SPACING = (3.0, 1.0, 0.5)


def ball(radius: float, middle: tuple[float, float, float], shape: tuple[int, int, int] = (24, 26, 28)) -> np.ndarray:
    grid = np.indices(shape)
    return sum((g - m) ** 2 for g, m in zip(grid, middle, strict=True)) <= radius**2


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Balls that overlap, that do not, that touch the border, noise, and a thin sheet."""
    rng = np.random.default_rng(3)
    sheet = np.zeros((24, 26, 28), bool)
    sheet[10, 3:20, 4:22] = True
    return [
        (ball(6, (11, 12, 13)), ball(7, (12, 12, 14))),
        (ball(3, (5, 5, 5)), ball(4, (18, 19, 20))),
        (ball(9, (2, 3, 25)), ball(8, (0, 4, 27))),
        (rng.random((24, 26, 28)) < 0.2, rng.random((24, 26, 28)) < 0.1),
        (sheet, ball(7, (11, 12, 13))),
    ]


# Surface elements


def test_areas_by_hand():
    """A single voxel's corner is a triangle between the middles of three edges; two neighbours a rectangle, a face the
    square."""
    unit = element_areas((1.0, 1.0, 1.0))
    assert unit[0] == unit[255] == 0
    assert unit[0b1] == pytest.approx(math.sqrt(3) / 8) == pytest.approx(unit[0b11111110])
    assert unit[0b11] == pytest.approx(math.sqrt(0.5))
    assert element_areas(SPACING)[0b1111] == pytest.approx(1.0 * 0.5), "a face across z is spanned by y and x"
    assert element_areas(SPACING)[0b01010101] == pytest.approx(3.0 * 1.0)


def test_the_area_of_a_large_box_is_nearly_that_of_its_faces():
    box = np.zeros((30, 40, 50), bool)
    box[5:25, 5:35, 5:45] = True
    found = element_areas(SPACING)[_codes(box)].sum()
    z, y, x = 20 * 3.0, 30 * 1.0, 40 * 0.5
    assert 0.93 < found / (2 * (z * y + y * x + x * z)) < 1.0, "edges are cut off, faces are exact"


def test_two_cubes_by_hand():
    """Shifted by one voxel of 3 mm: at 3 mm all agrees; at 0 mm a known part does."""
    a, b = np.zeros((2, 12, 12, 12), bool)
    a[3:7, 3:7, 3:7] = True
    b[4:8, 3:7, 3:7] = True
    assert nsd_subvoxel(a, b, SPACING, 3.0) == 1.0
    assert nsd_subvoxel(a, a, SPACING, 0.0) == 1.0
    assert 0 < nsd_subvoxel(a, b, SPACING, 0.0) < 1


def test_weights_differ_from_counts_where_voxels_are_flat():
    a, b = ball(6, (11, 12, 13)), ball(6, (12, 12, 13))
    assert abs(nsd_subvoxel(a, b, SPACING, 1.0) - nsd(a, b, SPACING, 1.0)) > 0.01


def test_all_at_once_is_the_same_as_one_by_one():
    for a, b in pairs():
        found = surface_scores(a, b, SPACING, 1.5)
        assert found == {
            "nsd": nsd(a, b, SPACING, 1.5),
            "nsd_subvoxel": nsd_subvoxel(a, b, SPACING, 1.5),
            "hd95_mm": hd95(a, b, SPACING),
        }


def test_empty_masks():
    empty, one = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    one[1:3, 1:3, 1:3] = True
    assert all(math.isnan(v) for v in surface_scores(empty, empty, SPACING, 1.0).values())
    diagonal = 4 * math.sqrt(9 + 1 + 0.25)
    for a, b in ((empty, one), (one, empty)):
        assert surface_scores(a, b, SPACING, 1.0) == {
            "nsd": 0.0,
            "nsd_subvoxel": 0.0,
            "hd95_mm": pytest.approx(diagonal),
        }
    assert math.isnan(nsd_subvoxel(empty, empty, SPACING, 1.0)) and nsd_subvoxel(empty, one, SPACING, 1.0) == 0.0
    with pytest.raises(ValueError, match="tolerance_mm must be >= 0, got -1"):
        nsd_subvoxel(one, one, SPACING, -1)


def test_volume_error_is_signed():
    small, large = ball(3, (11, 12, 13)), ball(5, (11, 12, 13))
    assert volume_error(small, large) == pytest.approx(small.sum() / large.sum() - 1)
    assert volume_error(large, small) > 1 and volume_error(np.zeros_like(small), small) == -1.0
    assert math.isinf(volume_error(small, np.zeros_like(small)))


# Against other programs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", range(len(pairs())))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING, (2.0, 0.7, 1.1)])
def test_against_surface_distance(number, spacing):
    theirs = pytest.importorskip(
        "surface_distance", reason="surface-distance is not installed (pip install surface-distance)"
    )
    a, b = pairs()[number]
    found = theirs.compute_surface_distances(b, a, spacing)
    for tolerance in (0.0, 1.0, 2.0):
        wanted = theirs.compute_surface_dice_at_tolerance(found, tolerance)
        assert nsd_subvoxel(a, b, spacing, tolerance) == pytest.approx(wanted, abs=1e-6)
    assert dice(a, b) == theirs.compute_dice_coefficient(b, a)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("number", range(len(pairs())))
def test_against_monai(number):
    pytest.importorskip("monai", reason="MONAI is not installed (pip install monai)")
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    a, b = pairs()[number]
    one, two = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    wanted = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=SPACING)
    assert hd95(a, b, SPACING) == pytest.approx(float(wanted), rel=1e-5)
    for tolerance in (1.0, 2.0):
        agreed = compute_surface_dice(one, two, [tolerance], include_background=True, spacing=SPACING)
        assert nsd(a, b, SPACING, tolerance) == pytest.approx(float(agreed), abs=1e-6)


# Series of clicks


def test_curves_by_hand():
    assert trapezoid([0.5, 0.7, 0.9]) == pytest.approx(1.4) and trapezoid([1.0] * 5) == 4.0
    assert area_under_curve([0.5, 0.7, 0.9]) == pytest.approx(0.7) and area_under_curve([0.3]) == 0.3
    assert clicks_to([0.5, 0.8, 0.9], 0.8) == 2 and clicks_to([0.5, 0.8], 0.9) is None
    assert clicks_to([0.85, 0.9], 0.85, first_click=0) == 0
    assert monotone_share([0.5, 0.6, 0.55, 0.7]) == pytest.approx(2 / 3) and monotone_share([0.5]) is None
    assert monotone_share([0.5, 0.495], slack=0.01) == 1.0
    with pytest.raises(ValueError, match="at least two scores, got 1"):
        trapezoid([0.5])

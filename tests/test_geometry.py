"""Grids agree with ITK, the canonical view is right for every storage order, crop frames and regions invert."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_grid, rotation_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from samed3d.geometry import CanonicalView, CropFrame, Grid, Region, bounding_region, ijk_to_zyx, zyx_to_ijk

SHAPE = (4, 5, 6)
STORAGE_ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
positions = st.tuples(*[st.floats(-50, 50)] * 3)


def stored_grid(order: tuple[int, int, int], signs: tuple[int, int, int], tilt: np.ndarray) -> Grid:
    """A grid whose voxel axis n runs along world axis ``order[n]`` with that sign, then tilted."""
    direction = np.zeros((3, 3))
    for voxel, (world, sign) in enumerate(zip(order, signs, strict=True)):
        direction[world, voxel] = sign
    return Grid(SHAPE, (0.7, 1.3, 2.5), (3.0, -4.0, 5.0), tuple(float(v) for v in (tilt @ direction).ravel()))


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (8.0, -12.0, 15.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize(("order", "signs"), STORAGE_ORDERS)
def test_canonical_view_of_every_storage_order(order, signs, tilt):
    grid = stored_grid(order, signs, rotation_matrix(tilt))
    view = CanonicalView.of(grid)
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    canonical = view.to_canonical(array)
    assert canonical.shape == view.shape_zyx
    assert np.shares_memory(canonical, array)
    np.testing.assert_array_equal(view.to_stored(canonical), array)
    for stored in itertools.product(*map(range, SHAPE)):
        seen = view.position_to_canonical(stored)
        assert canonical[tuple(int(v) for v in seen)] == array[stored]
        assert view.position_to_stored(seen) == stored
    # The canonical axes point to superior, anterior and right, each within the tilt of its own world axis.
    origin = np.array(grid.ijk_to_ras_mm(zyx_to_ijk(view.position_to_stored((0, 0, 0)))))
    for axis, world in enumerate((2, 1, 0)):
        one = tuple(float(a == axis) for a in range(3))
        step = np.array(grid.ijk_to_ras_mm(zyx_to_ijk(view.position_to_stored(one)))) - origin
        assert step[world] > 0.9 * view.spacing_zyx_mm[axis]
        assert np.linalg.norm(step) == pytest.approx(view.spacing_zyx_mm[axis])


@pytest.mark.parametrize(("order", "signs"), STORAGE_ORDERS[::5])
def test_regions_follow_the_canonical_view(order, signs):
    view = CanonicalView.of(stored_grid(order, signs, np.eye(3)))
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    region = Region((1, 0, 2), (3, 2, 4))
    stored = view.region_to_stored(region)
    picked = array[stored.slices]
    assert sorted(picked.ravel()) == sorted(view.to_canonical(array)[region.slices].ravel())


def test_forty_five_degrees_gives_each_axis_once():
    grid = Grid(SHAPE, direction_lps=tuple(float(v) for v in rotation_matrix((45.0, 45.0, 45.0)).ravel()))
    assert sorted(CanonicalView.of(grid).axes) == [0, 1, 2]


@pytest.mark.parametrize("left_handed", [False, True])
def test_grid_positions_agree_with_itk(left_handed):
    grid = oblique_grid(SHAPE, left_handed=left_handed)
    image = sitk.Image(grid.size_ijk, sitk.sitkUInt8)
    image.SetSpacing(grid.spacing_xyz_mm)
    image.SetOrigin(grid.origin_lps_mm)
    image.SetDirection(grid.direction_lps)
    for ijk in [(0, 0, 0), (5, 4, 3), (1, 2, 3)]:
        x, y, z = image.TransformIndexToPhysicalPoint(ijk)
        np.testing.assert_allclose(grid.ijk_to_ras_mm(ijk), (-x, -y, z), atol=1e-9)
    lps = image.TransformContinuousIndexToPhysicalPoint((1.25, -0.5, 2.75))
    np.testing.assert_allclose(grid.ras_mm_to_ijk((-lps[0], -lps[1], lps[2])), (1.25, -0.5, 2.75), atol=1e-9)


@given(ijk=positions)
def test_ras_round_trip(ijk):
    grid = oblique_grid()
    np.testing.assert_allclose(grid.ras_mm_to_ijk(grid.ijk_to_ras_mm(ijk)), ijk, atol=1e-8)


def test_contains_is_the_extent_of_the_voxels():
    grid = Grid((4, 5, 6))
    assert grid.contains_ijk((-0.5, -0.5, -0.5))
    assert grid.contains_ijk((5.49, 4.49, 3.49))
    assert not grid.contains_ijk((5.5, 4, 3))
    assert not grid.contains_ijk((3, 4, 5))
    assert ijk_to_zyx((1, 2, 3)) == zyx_to_ijk((1, 2, 3)) == (3, 2, 1)


@given(
    origin=positions,
    step=st.tuples(*[st.floats(0.1, 5)] * 3),
    position=positions,
)
def test_crop_frame_round_trip(origin, step, position):
    frame = CropFrame(origin, step, (8, 9, 10))
    np.testing.assert_allclose(frame.to_volume(frame.to_crop(position)), position, atol=1e-9)
    np.testing.assert_allclose(frame.to_crop(frame.to_volume(position)), position, atol=1e-7)


@given(centre=positions, step=st.tuples(*[st.floats(0.1, 5)] * 3), factor=st.floats(0.3, 3))
def test_crop_frame_centre_zoom_and_shift(centre, step, factor):
    frame = CropFrame.centred(centre, step, (8, 9, 10))
    np.testing.assert_allclose(frame.to_crop(centre), (3.5, 4.0, 4.5), atol=1e-7)
    wide = frame.zoomed(factor)
    np.testing.assert_allclose(wide.to_crop(centre), (3.5, 4.0, 4.5), atol=1e-6)
    np.testing.assert_allclose(wide.extent_zyx_vox, np.multiply(frame.extent_zyx_vox, factor))
    np.testing.assert_allclose(frame.shifted((1, 2, 3)).to_crop(np.add(centre, (1, 2, 3))), (3.5, 4.0, 4.5), atol=1e-7)


@settings(max_examples=40)
@given(origin=st.tuples(*[st.integers(-40, 40).map(lambda n: n / 4)] * 3), step=st.sampled_from([0.5, 0.75, 1.0, 1.5]))
def test_crop_region_is_the_voxels_whose_centres_lie_inside(origin, step):
    frame = CropFrame(origin, (step, step, step), (4, 4, 4))
    region = frame.region()
    for axis in range(3):
        low, high = frame.origin_zyx_vox[axis], frame.origin_zyx_vox[axis] + frame.extent_zyx_vox[axis]
        inside = [n for n in range(-20, 30) if low <= n + 0.5 < high]
        assert (region.start_zyx[axis], region.stop_zyx[axis]) == (inside[0], inside[-1] + 1)


def test_identity_frame_is_the_volume():
    frame = CropFrame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SHAPE)
    assert frame.to_crop((1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
    assert frame.region() == Region((0, 0, 0), SHAPE)
    assert frame.contains((0, 0, 0)) and not frame.contains((0, 0, 0), margin_vox=1)


def test_region_algebra():
    region = Region((-2, 1, 0), (3, 9, 4))
    assert region.shape_zyx == (5, 8, 4)
    assert region.clip((4, 5, 6)) == Region((0, 1, 0), (3, 5, 4))
    assert region.expand(1) == Region((-3, 0, -1), (4, 10, 5))
    assert Region((5, 5, 5), (9, 9, 9)).clip((4, 4, 4)).is_empty
    empty = Region((7, 7, 7), (7, 7, 7))
    assert region.union(empty) == empty.union(region) == region
    assert Region((0, 0, 0), (1, 1, 1)).union(Region((3, 2, 1), (4, 3, 2))) == Region((0, 0, 0), (4, 3, 2))


def test_bounding_region():
    mask = np.zeros(SHAPE, bool)
    assert bounding_region(mask).is_empty
    mask[1, 2, 3] = mask[2, 4, 0] = True
    assert bounding_region(mask) == Region((1, 2, 0), (3, 5, 4))

"""Pictures of volumes: orientation for every storage order, aspect, grey values, prompts and outlines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import oblique_grid
from PIL import Image, ImageColor

from samed3d.drawing import (
    NEGATIVE,
    OBJECT_COLOURS,
    POSITIVE,
    PREVIEW_WIDTH,
    SOFT_TISSUE_HU,
    grey_range,
    round_length,
    write_preview,
)
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.prompts import Box, ObjectPrompts, Point
from samed3d.volume import Volume

ORANGE, BLUE, GREEN, RED = (ImageColor.getrgb(c) for c in (*OBJECT_COLOURS[:2], POSITIVE, NEGATIVE))
WIDTH = PREVIEW_WIDTH
SHAPE = (16, 32, 32)
SPACING = (1.0, 1.0, 2.0)
LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def volume_of(
    array: np.ndarray, direction: tuple[float, ...] = LPS, spacing: tuple[float, float, float] = SPACING
) -> Volume:
    return Volume(array, Grid(array.shape, spacing, (0.0, 0.0, 0.0), direction), "test")


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(100, 10, SHAPE).astype(np.float32)


def picture(tmp_path, volume, mask, prompts, title="") -> np.ndarray:
    """The preview of some objects, or of one with these prompts."""
    objects = prompts if prompts and isinstance(prompts[0], ObjectPrompts) else [ObjectPrompts(prompts=prompts)]
    write_preview(tmp_path / "p.png", volume, mask, objects, title=title)
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def spots(pixels: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """For each of the three panels, the box (left, top, right, bottom) around pixels of that colour; panels without any
    are left out."""
    close = np.abs(pixels[:-75] - colour).max(-1) < 40  # the legend lies in the last rows
    found = []
    for part in np.array_split(np.arange(pixels.shape[1]), 3):
        rows, columns = np.flatnonzero(close[:, part].any(1)), np.flatnonzero(close[:, part].any(0))
        if rows.size:
            found.append((part[columns[0]], rows[0], part[columns[-1]], rows[-1]))
    return found


def test_a_cube_in_mm_is_a_square_in_every_panel(tmp_path, rng):
    mask = np.zeros(SHAPE, bool)
    mask[4:10, 8:20, 10:22] = True  # 12 mm along each axis
    pixels = picture(tmp_path, volume_of(noise(rng)), mask, [Point((15, 14, 7))], title="a cube")
    assert pixels.shape[1] == WIDTH
    sides = [side for left, top, right, bottom in spots(pixels, ORANGE) for side in (right - left, bottom - top)]
    assert len(sides) == 6
    assert max(sides) - min(sides) <= 4
    assert np.mean(sides) == pytest.approx(12 / 28 * (WIDTH - 72) / 3, rel=0.05)  # shown with a margin of 8 voxels


def test_the_right_of_the_patient_is_left_and_front_and_head_are_up(tmp_path, rng):
    """In LPS voxels, low i is the patient's right, low j the front, high k the head."""
    mask = np.zeros(SHAPE, bool)
    mask[12:15, 2:7, 3:8] = True
    prompts = [Point((5, 4, 13)), Point((31, 31, 0), positive=False)]  # the second makes the picture show everything
    axial, coronal, sagittal = spots(picture(tmp_path, volume_of(noise(rng)), mask, prompts), ORANGE)
    assert axial[2] < WIDTH / 6 and axial[3] < WIDTH / 6
    assert WIDTH / 3 < coronal[2] < WIDTH / 2
    assert sagittal[2] < WIDTH * 5 / 6
    assert coronal[3] < WIDTH / 6 and sagittal[3] < WIDTH / 6


@pytest.mark.parametrize(
    ("order", "signs"),
    list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))[3::9],
)
def test_picture_does_not_depend_on_the_storage_order(tmp_path, rng, order, signs):
    array = noise(rng)
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 5:20, 12:25] = 1
    clicks = [(15, 10, 5, True), (4, 25, 5, False)]
    expected = picture(tmp_path, volume_of(array), mask, [Point((i, j, k), positive=p) for i, j, k, p in clicks])
    # Voxel axis n of the stored array runs along axis order[n] of the plain one.
    zyx = tuple(2 - order[2 - n] for n in range(3))
    flips = tuple(slice(None, None, signs[2 - n]) for n in range(3))
    direction = np.zeros((3, 3))
    for n in range(3):
        direction[order[n], n] = signs[n]
    turned, turned_mask = (np.transpose(a, zyx)[flips] for a in (array, mask))
    volume = volume_of(turned, tuple(direction.ravel()), tuple(SPACING[order[n]] for n in range(3)))
    moved = []
    for *ijk, positive in clicks:
        at = [ijk[order[n]] if signs[n] > 0 else SHAPE[2 - order[n]] - 1 - ijk[order[n]] for n in range(3)]
        moved.append(Point(tuple(at), positive=positive))
    found = picture(tmp_path, volume, turned_mask, moved)
    np.testing.assert_array_equal(found[:-40], expected[:-40])  # the last line names the voxel as stored


def test_prompts_near_the_slice_are_drawn_and_others_not(tmp_path, rng):
    volume, mask = volume_of(noise(rng)), np.zeros(SHAPE, bool)
    pixels = picture(tmp_path, volume, mask, [Point((15, 15, 8)), Point((6, 25, 8), positive=False)])
    assert len(spots(pixels, GREEN)) == 3
    (found,) = spots(pixels, RED)  # on the axial slice, not on those at j = 15 and i = 15
    assert found[2] < WIDTH / 6 and found[1] > WIDTH / 6
    boxed = picture(tmp_path, volume, mask, [Box((4, 4, 2), (11, 11, 9))])
    (left, top, right, bottom), *others = spots(boxed, GREEN)
    side = 8 / 19.5 * (WIDTH - 72) / 3  # of the 19.5 voxels that are shown
    assert right - left == pytest.approx(bottom - top, abs=3) == pytest.approx(side, rel=0.05)
    assert len(others) == 2


def test_label_map_has_a_colour_for_each_object(tmp_path, rng):
    labels = np.zeros(SHAPE, np.int16)
    labels[4:10, 4:12, 4:12] = 1
    labels[4:10, 4:12, 18:28] = 2
    far = Point((31, 31, 0), positive=False)  # makes the picture show everything
    objects = [ObjectPrompts(1, "liver", [Point((8, 8, 7))]), ObjectPrompts(2, "spleen", [Point((22, 8, 7)), far])]
    pixels = picture(tmp_path, volume_of(noise(rng)), labels, objects)
    assert spots(pixels, ORANGE)[0][2] < spots(pixels, BLUE)[0][0]
    assert len(spots(pixels, ORANGE)) == 3  # the sagittal slice passes through the first object only
    assert len(spots(pixels, BLUE)) == 2


def test_oblique_volume_in_ras_and_mask_without_prompt(tmp_path, rng):
    grid = oblique_grid((9, 10, 11), left_handed=True)
    volume = Volume(rng.integers(0, 99, grid.shape_zyx).astype(np.int16), grid, "test")
    mask = np.zeros(grid.shape_zyx, bool)
    mask[3:6, 3:6, 3:6] = True
    ras = picture(tmp_path, volume, mask, [Point(grid.ijk_to_ras_mm((4, 4, 4)), space="ras")])
    ijk = picture(tmp_path, volume, mask, [Point((4, 4, 4))])
    assert np.mean(ras != ijk) < 0.001  # a marker may move by a pixel with the last bits of its position
    assert len(spots(picture(tmp_path, volume, mask, []), ORANGE)) == 3
    assert picture(tmp_path, volume, np.zeros_like(mask), []).shape[1] == WIDTH


def test_single_voxel_objects_and_long_volumes_stay_visible(tmp_path, rng):
    array = rng.normal(size=(120, 8, 8)).astype(np.float32)
    mask = np.zeros(array.shape, bool)
    mask[60, 4, 4] = True
    pixels = picture(tmp_path, volume_of(array, spacing=(1.0, 1.0, 3.0)), mask, [Point((1, 4, 60), positive=False)])
    assert pixels.shape[0] < 1100
    assert np.any(np.abs(pixels[:-75] - ORANGE).max(-1) < 60)


def testround_lengths():
    assert [round_length(v) for v in (0.07, 0.1, 1.99, 2, 4.9, 30, 170)] == [0.05, 0.1, 1, 2, 2, 20, 100]


def test_failures_leave_nothing(tmp_path, rng):
    volume = volume_of(noise(rng))
    with pytest.raises(ValueError, match=r"mask must have the volume's shape \(16, 32, 32\), got \(2, 2, 2\)"):
        write_preview(tmp_path / "p.png", volume, np.zeros((2, 2, 2)), [])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="output must be a file, got a folder: .*folder.png"):
        write_preview(tmp_path / "folder.png", volume, np.zeros(SHAPE, bool), [])
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_slices_pass_through_the_first_positive_prompt(tmp_path, rng):
    """A small object lies at the second prompt only, so the slices that show it are those through that prompt."""
    mask = np.zeros(SHAPE, bool)
    mask[3:8, 7:12, 18:23] = True
    prompts = [Point((2, 2, 14), positive=False), Point((20, 9, 5)), Point((3, 3, 13))]
    pixels = picture(tmp_path, volume_of(noise(rng)), mask, prompts)
    assert len(spots(pixels, ORANGE)) == len(spots(pixels, GREEN)) == 3
    assert not spots(pixels, RED)


def test_the_picture_shows_the_objects_with_a_margin(tmp_path, rng):
    array = rng.normal(100, 10, (60, 60, 60)).astype(np.float32)
    mask = np.zeros(array.shape, bool)
    mask[10:40, 10:40, 10:40] = True
    for shape in ((60, 60, 60), (200, 60, 300)):  # the same picture of the object, whatever lies further away
        padded = np.pad(array, [(0, n - 60) for n in shape])
        inside = np.pad(mask, [(0, n - 60) for n in shape])
        pixels = picture(tmp_path, volume_of(padded, spacing=(1.0, 1.0, 1.0)), inside, [])
        left, top, right, bottom = spots(pixels, ORANGE)[0]
        assert right - left == pytest.approx(30 / 55 * (WIDTH - 72) / 3, rel=0.03) == pytest.approx(bottom - top, abs=3)


def test_grey_values_of_ct_are_a_soft_tissue_window_that_holds_the_object(rng):
    ct = rng.normal(40, 20, (20, 20, 20))
    ct[:5], ct[5] = -1000, 900
    assert grey_range(ct) == grey_range(ct, ct[8:12]) == SOFT_TISSUE_HU
    low, high = grey_range(ct, ct[:5])  # an object of air
    assert low == -1000 and high == 240
    assert grey_range(ct, ct[5])[1] == 900
    mr = rng.uniform(0, 4000, (20, 20, 20))
    assert grey_range(mr) == pytest.approx((40, 3980), abs=30)
    assert grey_range(mr, np.array([9000.0])) == grey_range(mr)
    low, high = grey_range(np.zeros((3, 3, 3)))
    assert low < high

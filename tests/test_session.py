"""Sessions: from ijk or mm to a mask on the image's own grid, whatever its axis order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.session import Session
from samed3d.models import create_model
from samed3d.prompts import Box, ObjectPrompts, Point
from samed3d.volume import Volume, read_volume
from tests.brightness_model import BrightnessModel


def ball_volume(
    shape=(24, 28, 32), centre=(11, 15, 13), radius=5.0, spacing=(1.0, 1.0, 1.0), noise=0.05
) -> tuple[Volume, np.ndarray]:
    """A bright ball on noise, RAS-aligned, and its mask."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    mask = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius**2
    ground = np.random.default_rng(0).normal(0, noise, shape)
    grid = Grid(shape, spacing, (3.0, -4.0, 5.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    return Volume((mask + ground).astype(np.float32), grid, "ball"), mask


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a.astype(bool) & b.astype(bool)).sum()) / float(a.astype(bool).sum() + b.astype(bool).sum())


def permuted(volume: Volume, axes: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same body stored with other axes: array and grid change together."""
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.grid.spacing_xyz_mm)
    image.SetOrigin(volume.grid.origin_lps_mm)
    image.SetDirection(volume.grid.direction_lps)
    image = sitk.Flip(sitk.PermuteAxes(image, axes), [bool(f) for f in flips])
    array = sitk.GetArrayFromImage(image)
    return Volume(array, Grid(array.shape, image.GetSpacing(), image.GetOrigin(), image.GetDirection()), "permuted")


def to_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing_xyz_mm)
    image.SetOrigin(grid.origin_lps_mm)
    image.SetDirection(grid.direction_lps)
    return image


def test_a_click_gives_the_structure_on_the_images_own_grid():
    volume, mask = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    update = session.add(Point((13, 15, 11)))
    assert session.mask.shape == volume.array.shape and session.mask.dtype == np.uint8
    assert overlap(session.mask, mask) > 0.9
    assert np.array_equal(update.mask, session.mask[update.region.slices]) and update.seconds > 0
    assert session.mask.sum() == update.mask.sum()


@pytest.mark.parametrize(
    ("axes", "flips"), list(itertools.product(itertools.permutations(range(3)), [(0, 0, 0), (1, 0, 0), (0, 1, 1)]))
)
def test_the_mask_follows_however_the_volume_is_stored(axes, flips):
    """The same click in mm on a rotated, flipped or permuted file gives the same body part, voxel for voxel."""
    volume, _ = ball_volume(spacing=(1.0, 1.3, 2.0))
    torch.manual_seed(0)
    model = create_model(
        "samed3d_unet", input_shape=(32, 32, 32), widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8)
    ).eval()
    ras = volume.grid.ijk_to_ras_mm((13, 15, 11))
    straight = Session(volume, model)
    straight.add(Point(ras, space="ras"))
    other = permuted(volume, axes, flips)
    turned = Session(other, model)
    update = turned.add(Point(ras, space="ras"))
    np.testing.assert_array_equal(update.mask, turned.mask[update.region.slices])
    assert update.mask.sum() == turned.mask.sum()
    expected = permuted(Volume(straight.probability(), volume.grid, ""), axes, flips).array
    assert straight.probability().std() > 0
    np.testing.assert_allclose(turned.probability(), expected, atol=1e-5)


def test_ijk_and_mm_are_the_same_click():
    volume, _ = ball_volume(spacing=(0.7, 1.3, 2.0))
    a, b = (Session(volume, BrightnessModel((32, 32, 32))) for _ in range(2))
    a.add(Point((13, 15, 11)))
    b.add(Point(volume.grid.ijk_to_ras_mm((13, 15, 11)), space="ras"))
    np.testing.assert_array_equal(a.mask, b.mask)


def test_saved_mask_has_the_inputs_geometry(tmp_path):
    volume, _ = ball_volume(spacing=(0.5, 0.75, 2.5))
    sitk.WriteImage(to_image(volume.array, volume.grid), str(tmp_path / "ct.nii.gz"))
    session = Session.open(tmp_path / "ct.nii.gz", model=BrightnessModel((32, 32, 32)))
    session.add(Point((13, 15, 11)))
    session.save(tmp_path / "mask.nii.gz")
    session.save_probability(tmp_path / "p.nii.gz")
    source, mask = sitk.ReadImage(str(tmp_path / "ct.nii.gz")), sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(source, what)() == getattr(mask, what)()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), session.mask)
    probability = read_volume(tmp_path / "p.nii.gz").array
    assert probability.min() >= 0 and probability.max() <= 1
    np.testing.assert_array_equal(probability > 0.5, session.mask.astype(bool))


def test_a_click_is_obeyed_at_its_own_voxel():
    volume, mask = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(Point((13, 15, 11)))
    dark = (2, 2, 2)
    assert not session.mask[2, 2, 2]
    session.add(Point(dark))
    assert session.mask[2, 2, 2]
    session.add(Point((13, 15, 11), positive=False))
    assert not session.mask[11, 15, 13] and session.mask.sum() > mask.sum() / 2


def test_a_later_click_in_the_same_place_does_not_encode_again():
    volume, _ = ball_volume()
    model = BrightnessModel((48, 48, 48))
    session = Session(volume, model)
    session.add(Point((13, 15, 11)))
    first = model.encoded
    session.add(Point((14, 15, 11)))
    session.add(Point((5, 5, 5), positive=False))
    assert model.encoded == first
    assert model.seen[-1].points.shape[1] == 3 and model.seen[-1].point_labels.tolist() == [[1, 1, 0]]
    assert model.seen[-1].mask_logits is not None


def test_newest_memory_gives_the_model_one_click():
    volume, _ = ball_volume()
    model = BrightnessModel((48, 48, 48), click_memory="newest")
    session = Session(volume, model)
    session.add(Point((13, 15, 11)))
    session.add(Point((5, 6, 7), positive=False))
    assert model.seen[-1].points.shape[1] == 1 and model.seen[-1].point_labels.tolist() == [[0]]


def test_xyz_models_see_and_answer_on_their_own_axes():
    volume, mask = ball_volume(centre=(11, 15, 13))
    model = BrightnessModel((32, 32, 32), spacing_mm=1.0, tensor_axes="xyz")
    session = Session(volume, model)
    session.add(Point((16, 14, 9)))
    assert overlap(session.mask, mask) > 0.9
    np.testing.assert_allclose(model.seen[-1].points[0, 0].numpy(), [15.5, 15.5, 15.5], atol=0.51)


def test_several_objects_make_one_label_map(tmp_path):
    volume, mask = ball_volume(noise=0.0)
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add_all(
        [
            ObjectPrompts(1, "ball", [Point((13, 15, 11))]),
            ObjectPrompts(7, "corner", [Box((0, 0, 0), (3, 3, 3)), Point((1, 1, 1))]),
        ]
    )
    assert [o.name for o in session.objects()] == ["ball", "corner"]
    assert session.labels[11, 15, 13] == 1 and session.labels[1, 1, 1] == 7 and session.labels[20, 2, 2] == 0
    session.save(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "labels.nii.gz").array, session.labels)
    assert [o["id"] for o in session.report()["objects"]] == [1, 7]


def test_box_corners_reach_the_model_as_half_open_edges():
    volume, _ = ball_volume()
    model = BrightnessModel((32, 32, 32))
    Session(volume, model).add(Box((8, 10, 6), (17, 19, 15)))
    low, high = model.seen[0].boxes[0]
    size = (high - low).numpy()
    np.testing.assert_allclose(size, size[0], rtol=1e-5)  # ten voxels on each axis at one isotropic step
    assert 0.55 < size[0] / 32 < 0.65
    np.testing.assert_allclose(((low + high) / 2).numpy(), 16, atol=1.0)  # the crop may move by half a voxel


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Point((13, 15, 24)), r"point must lie inside the volume, ijk \(0, 0, 0\) to \(31, 27, 23\)"),
        (Point((13, 15, 11), positive=False), "needs a positive point or a box before a negative point"),
        (Box((40, 0, 0), (50, 5, 5)), "box must meet the volume"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, message):
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel())
    with pytest.raises(InputError, match=message):
        session.add(prompt)
    assert session.objects() == []
    with pytest.raises(InputError, match="has no mask yet"):
        _ = session.mask


def test_a_bad_prompt_leaves_the_session_as_it_was():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(Point((13, 15, 11)))
    before = session.mask
    with pytest.raises(InputError, match="point must lie inside"):
        session.add(Point((99, 0, 0)))
    np.testing.assert_array_equal(session.mask, before)
    assert len(session.objects()[0].prompts) == 1


def test_a_model_without_boxes_says_so():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel(prompts=frozenset({"point", "mask"})))
    with pytest.raises(InputError, match="does not understand a box; it takes point"):
        session.add(Box((8, 10, 6), (17, 19, 15)))

"""Scribbles, lassos, 2D boxes and given masks: what the model is told of them, and the voxels that are then not
contradicted."""

from __future__ import annotations

import numpy as np
import pytest

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.model_prompts import STROKE_POINTS, to_model_prompts
from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, Mask, PackedMask, Point, Scribble
from samed3d.volume import Volume, write_mask
from tests.brightness_model import BrightnessModel
from tests.clicked_model import ClickedModel
from tests.conftest import oblique_grid
from tests.test_session import ball_volume, permuted


def given(model: BrightnessModel, session: Session) -> np.ndarray:
    """The points of the last decode as stored zyx positions."""
    frame = session._prompts.prediction(session._state.objects[session.current].step).crop.frame
    seen = [frame.to_volume(tuple(at)) for at in model.seen[-1].points[0].tolist()]
    return np.array([session.volume.view.position_to_stored(at) for at in seen])


def test_a_scribble_is_obeyed_under_the_brush_and_gives_a_few_points():
    volume, _ = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    session.add(Scribble(((2, 3, 20), (20, 3, 20)), radius_vox=1.0))
    mask = session.mask
    assert mask[20, 3, 2:21].all() and mask[20, 2, 2:21].all() and mask[19, 3, 2:21].all() and mask[20, 3, 21]
    assert not mask[20, 5, 2:21].any() and not mask[20, 3, 23:].any()
    points = given(model, session)
    assert len(points) == STROKE_POINTS and model.seen[-1].point_labels.tolist() == [[1] * STROKE_POINTS]
    np.testing.assert_allclose(points[:, :2], [[20, 3]] * STROKE_POINTS, atol=1e-4)
    assert abs(points[-1, 2] - 11) < 0.6 and np.ptp(points[:, 2]) > 12  # the middle is the newest
    session.add(Scribble(((8, 15, 11), (18, 15, 11)), positive=False, radius_vox=0))
    assert not session.mask[11, 15, 8:19].any() and session.mask[20, 3, 2:21].all()


def test_the_brush_stays_in_a_thick_slice():
    volume, _ = ball_volume(spacing=(1.0, 1.0, 4.0))
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(Scribble(((4, 4, 20), (4, 4, 20)), radius_vox=2.0))
    mask = session.mask
    assert mask[20, 4, 2:7].all() and mask[20, 2:7, 4].all() and not mask[19, 4, 4] and not mask[21, 4, 4]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_lasso_holds_in_its_slice_of_any_axis(axis):
    """Outline around a square of 11 voxels: its deep half belongs to the object, a negative one takes all of it."""
    volume, _ = ball_volume(shape=(24, 24, 24), centre=(12, 12, 12), radius=2.0, noise=0.0)
    corners = [(3, 3), (3, 13), (13, 13), (13, 3)]
    outline = tuple(tuple(np.insert(np.array(c, float), axis, 9.0).tolist()) for c in corners)  # ijk; axis 0 is i
    session = Session(volume, BrightnessModel((24, 24, 24)))
    session.add(Lasso(outline))
    plane = np.moveaxis(session.mask, 2 - axis, 0)[9]
    assert plane[6:11, 6:11].all() and not plane[:3].any() and not plane[14:].any()
    session.add(Point((12, 12, 12)))
    session.add(
        Lasso(tuple(tuple(np.insert(np.array(c, float), axis, 12.0).tolist()) for c in corners), positive=False)
    )
    whole = np.moveaxis(session.mask, 2 - axis, 0)
    kept = np.argwhere(whole[12][4:13, 4:13])
    assert kept.tolist() == [] and whole[9][6:11, 6:11].all()


def test_a_lasso_that_cannot_be_used():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel())
    with pytest.raises(InputError, match=r"lasso must lie in one slice of one axis, got an outline 7\.0 voxels thick"):
        session.add(Lasso(((2, 2, 2), (9, 9, 6), (2, 12, 10))))
    with pytest.raises(InputError, match="lasso must enclose the centre of a voxel"):
        session.add(Lasso(((2.1, 2.1, 5), (2.2, 2.1, 5), (2.2, 2.2, 5))))
    with pytest.raises(InputError, match=r"lasso must lie inside the volume, ijk \(0, 0, 0\) to \(31, 27, 23\)"):
        session.add(Lasso(((50, 50, 5), (60, 50, 5), (50, 60, 5))))
    with pytest.raises(InputError, match="scribble must lie inside the volume"):
        session.add(Scribble(((2, 2, 2), (2, 2, 24))))
    with pytest.raises(InputError, match="scribble must be at most 200000 voxels long"):
        session.add(Scribble(tuple((0.0, 0.0, float(23 * (n % 2))) for n in range(9999))))
    assert session.objects() == []


def test_a_2d_box_is_a_point_and_a_scale():
    volume, mask = ball_volume()
    model = BrightnessModel((32, 32, 32), prompts=frozenset({"point", "mask"}))  # needs no model that knows boxes
    session = Session(volume, model)
    session.add(Box((8, 10, 11), (17, 19, 11)))
    assert model.seen[0].boxes is None
    np.testing.assert_allclose(given(model, session), [[11, 14.5, 12.5]], atol=1e-4)
    edge = session._prompts.prediction(session._state.objects[1].step).crop.frame.extent_zyx_vox
    np.testing.assert_allclose(edge, 10 / 0.6, rtol=1e-6)
    assert 2 * (session.mask.astype(bool) & mask).sum() / (session.mask.sum() + mask.sum()) > 0.9


def test_a_2d_box_becomes_a_3d_one_as_deep_as_the_object_is_found_to_be():
    volume, mask = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    session.add(Box((8, 10, 11), (17, 19, 11)))
    assert model.seen[0].boxes is None and model.seen[1].boxes is not None
    step = session._state.objects[1].step
    frame = session._prompts.prediction(step).crop.frame
    low, high = (
        np.array(frame.to_volume(tuple(v - 0.5 for v in edge))) + 0.5 for edge in model.seen[-1].boxes[0].tolist()
    )
    np.testing.assert_allclose([low[1:], high[1:]], [[10, 8], [20, 18]], atol=1e-4)
    region = np.argwhere(mask.any((1, 2)))
    assert (
        abs(low[0] - region.min()) <= 1
        and abs(high[0] - region.max() - 1) <= 1
        and (step.box[0][0], step.box[1][0]) == pytest.approx((low[0], high[0]))
    )
    session.add(Point((14, 15, 11)))  # the box stays, and is not looked for again
    assert len(model.seen) == 3 and model.seen[-1].boxes is not None
    session.add(Box((13, 9, 6), (13, 20, 15)))  # a second one, across the first, bounds what was open
    frame = session._prompts.prediction(session._state.objects[1].step).crop.frame
    low, high = (
        np.array(frame.to_volume(tuple(v - 0.5 for v in edge))) + 0.5 for edge in model.seen[-1].boxes[0].tolist()
    )
    np.testing.assert_allclose([low, high], [[6, 9, 8], [16, 21, 18]], atol=1e-4)
    assert len(model.seen) == 4


def test_a_thin_slice_of_a_deep_object_is_followed_within_reason():
    """A bright column through the whole volume: two widths to either side, no further."""
    array = np.zeros((60, 20, 20), np.float32)
    array[:, 8:12, 8:12] = 1.0
    session = Session(Volume(array, Grid(array.shape), "column"), BrightnessModel((32, 32, 32)))
    session.add(Box((8, 8, 30), (11, 11, 30)))
    low, high = session._state.objects[1].step.box
    assert (low[0], high[0]) == (22.0, 39.0)


def test_a_given_mask_is_the_object_until_the_next_prompt():
    volume, ball = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    start = np.zeros(ball.shape, np.uint8)
    start[8:14, 10:20, 9:17] = 7
    update = session.add(Mask(start))
    assert model.seen == [] and update.changed
    np.testing.assert_array_equal(session.mask, start > 0)
    session.predict()
    assert model.seen[-1].mask_logits is not None and float(model.seen[-1].mask_logits.max()) > 3
    assert model.seen[-1].point_labels.tolist() == [[1]]  # the deepest voxel stands for it
    session.undo()
    session.add(Point((13, 15, 11)))
    assert session.mask[11, 15, 13] and model.seen[-1].points.shape[1] == 1
    frame = session._prompts.prediction(session._state.objects[1].step).crop.frame
    assert all(frame.contains(session.volume.view.position_to_canonical(at)) for at in ((8, 10, 9), (13, 19, 16)))


def test_a_given_mask_forgets_what_was_said_before():
    volume, ball = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    session.add(Point((2, 2, 2)))
    session.add(Mask(ball))
    np.testing.assert_array_equal(session.mask, ball)
    session.add(Point((13, 15, 11)))
    assert not session.mask[2, 2, 2] and model.seen[-1].points.shape[1] == 1


def test_a_mask_file_is_put_on_the_images_grid(tmp_path):
    volume, ball = ball_volume(spacing=(1.0, 1.3, 2.0))
    turned = permuted(Volume(ball.astype(np.uint8), volume.grid, ""), (2, 0, 1), (1, 0, 1))
    write_mask(tmp_path / "start.nrrd", turned.array, turned.grid)
    session = Session(volume, ClickedModel())
    session.add(Mask(tmp_path / "start.nrrd"))
    np.testing.assert_array_equal(session.mask, ball)
    assert isinstance(session.objects()[0].prompts[0].mask, PackedMask)  # the file may change; the session does not
    far = Grid(ball.shape, (1, 1, 1), (900.0, 0, 0))
    write_mask(tmp_path / "far.nrrd", ball, far)
    with pytest.raises(InputError, match="label lies outside its image"):
        session.add(Mask(tmp_path / "far.nrrd"))
    with pytest.raises(InputError, match=r"mask must have the image's shape .*got \(2, 2, 2\)"):
        session.add(Mask(np.ones((2, 2, 2))))
    with pytest.raises(InputError, match="mask must hold a voxel, got an empty one"):
        session.add(Mask(np.zeros(ball.shape)))


def test_strokes_in_millimetres_are_those_in_voxels():
    shape = (16, 18, 20)
    z, y, x = np.indices(shape)
    volume = Volume((z + 2 * y - x).astype(np.float32), oblique_grid(shape), "oblique")
    ras = volume.grid.ijk_to_ras_mm
    path = ((4.0, 5.0, 6.0), (12.0, 9.0, 6.0), (10.0, 14.0, 6.0))
    for make in (lambda p, s: Scribble(p, space=s), lambda p, s: Lasso(p, space=s)):
        said = [
            to_model_prompts(make(p, s), volume, ClickedModel().spec)
            for s, p in (("ijk", path), ("ras", tuple(ras(at) for at in path)))
        ]
        np.testing.assert_array_equal(said[0].voxels, said[1].voxels)
        np.testing.assert_allclose([at for at, _ in said[0].points], [at for at, _ in said[1].points], atol=1e-6)
        assert len(said[0].voxels) > 5 and len(said[0].points) > 0


@pytest.mark.parametrize("part", [np.zeros((0, 0, 0), bool), np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)])
def test_packed_masks_give_back_what_they_hold(part):
    packed = PackedMask.of(part)
    np.testing.assert_array_equal(packed.full(), part)
    assert PackedMask.from_json(packed.to_json()) == packed


def test_packed_bits_are_never_unpacked_beyond_their_box():
    mask = np.random.default_rng(0).random((9, 8, 7)) > 0.5
    body = PackedMask.of(mask).to_json()
    np.testing.assert_array_equal(PackedMask.from_json(body).full(), mask)
    bomb = PackedMask.of(np.ones((200, 200, 200), bool)).to_json()["bits"]
    with pytest.raises(InputError, match="mask bits must hold 63 bytes for its box, got more"):
        PackedMask.from_json({**body, "bits": bomb})
    with pytest.raises(InputError, match="mask bits must hold 63 bytes"):
        PackedMask.from_json({**body, "bits": PackedMask.of(mask[:2]).to_json()["bits"]})

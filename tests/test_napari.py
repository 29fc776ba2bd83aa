"""The napari plugin without napari and without a window: sessions in this process and on a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samed3d.apps.client import Client
from samed3d.apps.napari_plugin.controller import Controller, error_message, open_remote
from samed3d.inference.session import Session
from samed3d.prompts import Box, Point, point_in_grid
from samed3d.volume import Volume, read_volume
from tests.brightness_model import BrightnessModel
from tests.clicked_model import ClickedModel
from tests.server_tools import BALL_IJK, ServerProcess, write_ball


def ball(tmp_path: Path) -> Volume:
    write_ball(tmp_path / "ball.nii.gz")
    return read_volume(tmp_path / "ball.nii.gz")


def started(volume: Volume, model=None) -> Controller:
    controller = Controller(Session(volume, model or BrightnessModel((16, 16, 16))))
    controller.start()
    return controller


def refused(controller: Controller) -> list[str]:
    messages: list[str] = []
    controller.on_error.append(lambda error: messages.append(error_message(error)))
    return messages


def test_a_click_changes_its_part_of_the_label_map(tmp_path):
    controller = started(ball(tmp_path))
    seen = []
    controller.on_change.append(seen.append)
    numbers: list[int] = []
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1), numbers.append)
    (change,) = seen
    assert numbers == [1] and change.current == 1 and change.can_undo and change.seconds > 0
    assert 0 < change.labels.sum() and change.labels.shape == change.region.shape_zyx
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    assert change.objects[0].numbered == {1: Point(BALL_IJK)}


def test_undo_and_redo_bring_masks_and_prompts_back_exactly(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    steps = [controller.labels.copy()]
    for at in (BALL_IJK, (20, 8, 16), (10, 20, 6)):
        controller.edit(lambda s, at=at: s.add(Point(at), 1))
        steps.append(controller.labels.copy())
    assert len({step.tobytes() for step in steps}) == 4
    for step in steps[-2::-1]:
        controller.edit(lambda s: s.undo())
        np.testing.assert_array_equal(controller.labels, step)
    controller.edit(lambda s: s.undo())  # nothing left: nothing happens
    assert not controller.state.can_undo and controller.state.objects == ()
    for step in steps[1:]:
        controller.edit(lambda s: s.redo())
        np.testing.assert_array_equal(controller.labels, step)


def test_moving_and_removing_prompts_changes_the_mask(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    one = controller.labels.copy()
    controller.edit(lambda s: s.add(Point((20, 8, 16)), 1))
    two = controller.labels.copy()
    controller.edit(lambda s: s.move(2, Point((21, 20, 16))))
    assert not np.array_equal(controller.labels, two)
    controller.edit(lambda s: s.remove(2))
    np.testing.assert_array_equal(controller.labels, one)


def test_several_objects_share_the_label_map_as_the_session_says(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    for number, at in ((1, BALL_IJK), (2, (19, 15, 11)), (3, (5, 5, 5))):
        controller.edit(lambda s, at=at, number=number: s.add(Point(at), number))
    assert set(np.unique(controller.labels)) == {0, 1, 2, 3}
    assert (controller.session.mask_of(1) & controller.session.mask_of(2)).any()  # so that there is something to settle
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.edit(lambda s: s.edit_object(2, locked=True))
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.edit(lambda s: s.edit_object(2, visible=False))
    assert 2 not in controller.labels
    np.testing.assert_array_equal(controller.labels > 0, controller.session.mask_of(1) | controller.session.mask_of(3))
    controller.edit(lambda s: s.undo())
    controller.edit(lambda s: s.undo())
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.edit(lambda s: s.remove_object(3))
    assert 3 not in controller.labels
    controller.edit(lambda s: s.undo())
    np.testing.assert_array_equal(controller.labels, controller.session.labels)


def test_painting_is_a_mask_to_start_from(tmp_path):
    controller = started(ball(tmp_path))
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    painted = controller.labels.copy()
    i, j, k = BALL_IJK
    painted[k, j, i : i + 2] = 0  # erased
    painted[20, 20, 20:24] = 1  # added
    painted[2, 2:5, 2] = 4  # a label without an object
    controller.painted(painted)
    np.testing.assert_array_equal(controller.labels, painted)
    assert [entry.id for entry in controller.state.objects] == [1, 4]
    controller.edit(lambda s: s.undo())
    controller.edit(lambda s: s.undo())
    assert controller.session.labels[k, j, i] == 1 and not (controller.labels == 4).any()


def test_what_is_painted_over_belongs_to_no_object_below(tmp_path):
    controller = started(ball(tmp_path))
    for number in (1, 2):
        controller.edit(lambda s, number=number: s.add(Point(BALL_IJK), number))
    i, j, k = BALL_IJK
    assert controller.session.mask_of(1)[k, j, i] and controller.session.mask_of(2)[k, j, i]
    painted = controller.labels.copy()
    painted[k, j, i] = 0
    controller.painted(painted)
    assert not (controller.session.mask_of(1)[k, j, i] or controller.session.mask_of(2)[k, j, i])
    np.testing.assert_array_equal(controller.labels, painted)


def test_painting_a_whole_object_away_or_a_locked_one_is_refused(tmp_path):
    controller = started(ball(tmp_path))
    messages = refused(controller)
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    before = controller.labels.copy()
    controller.painted(np.zeros_like(before))
    controller.edit(lambda s: s.edit_object(1, locked=True))
    controller.painted(np.where(before, before, np.eye(*before.shape[1:], dtype=np.uint8)))
    assert ["no voxel left" in messages[0], "locked" in messages[1], len(messages)] == [True, True, 2]
    np.testing.assert_array_equal(controller.labels, before)


def test_what_is_refused_says_why_and_changes_nothing(tmp_path):
    controller = started(ball(tmp_path))
    messages, seen, numbers = refused(controller), [], []
    controller.on_change.append(seen.append)
    controller.edit(lambda s: s.add(Point((500, 0, 0)), 1), numbers.append)
    assert numbers == [0] and "inside the volume" in messages[0]
    assert seen[0].region.is_empty and seen[0].objects == ()  # the layers are told to show what there is
    controller.session.export = lambda path, format: 1 / 0  # type: ignore[assignment, return-value]
    controller.save(str(tmp_path / "a.nii.gz"), "nifti")
    assert "our fault: ZeroDivisionError" in messages[1]


def test_a_session_that_goes_on_is_shown_with_its_prompts_in_voxels(tmp_path):
    volume = ball(tmp_path)
    session = Session(volume, BrightnessModel((16, 16, 16)))
    session.add(Point(volume.grid.ijk_to_ras_mm(BALL_IJK), space="ras"))
    low, high = volume.grid.ijk_to_ras_mm((9, 10, 8)), volume.grid.ijk_to_ras_mm((17, 19, 15))
    session.add(Box(tuple(np.minimum(low, high)), tuple(np.maximum(low, high)), space="ras"))
    controller = Controller(session)
    controller.start()
    point, box = map(controller.in_voxels, controller.state.objects[0].prompts)
    assert point.space == box.space == "ijk"
    assert point_in_grid(point, volume.grid) == pytest.approx(BALL_IJK)
    assert box.min == pytest.approx((9, 10, 8)) and box.max == pytest.approx((17, 19, 15))
    np.testing.assert_array_equal(controller.labels, session.labels)


def test_saving_writes_masks_or_the_session(tmp_path):
    volume = ball(tmp_path)
    controller = started(volume)
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    written: list[bool] = []
    controller.save(str(tmp_path / "mask.nii.gz"), "nifti", lambda: written.append(True))
    controller.save(str(tmp_path / "work.json"), "", lambda: written.append(True))
    assert written == [True, True]
    saved = read_volume(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(saved.array, controller.labels)
    np.testing.assert_allclose(saved.grid.affine_ras, volume.grid.affine_ras, atol=1e-5)
    again = Session.load(tmp_path / "work.json", model=BrightnessModel((16, 16, 16)))
    np.testing.assert_array_equal(again.labels, controller.labels)


def test_the_suggested_click_is_given_in_voxels(tmp_path):
    controller = started(ball(tmp_path))
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    found = []
    controller.suggest_click(lambda zyx, positive: found.append((zyx, positive)))
    expected = controller.session.suggest_click()
    assert found == [(expected.at[::-1], expected.positive)]


def test_a_session_on_a_server_is_the_same(tmp_path):
    volume = ball(tmp_path)
    here = started(volume)
    with ServerProcess(tmp_path / "server") as server:
        there = Controller(open_remote(volume, server.url))
        array_only = Controller(open_remote(Volume(volume.array, volume.grid, "layer"), server.url))
        for controller in (there, array_only):
            controller.start()
        for controller in (here, there, array_only):
            controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
            controller.edit(lambda s: s.add(Box((20, 3, 3), (26, 9, 7)), 2))
            controller.edit(lambda s: s.undo())
            controller.edit(lambda s: s.redo())
            painted = controller.labels.copy()
            painted[1:3, 1:3, 1:3] = 5
            controller.painted(painted)
        assert there.is_remote and not here.is_remote
        for number in (1, 2, 5):
            np.testing.assert_array_equal(there.session.mask_of(number), here.session.mask_of(number))
            np.testing.assert_array_equal(array_only.session.mask_of(number), here.session.mask_of(number))
        np.testing.assert_array_equal(there.labels > 0, here.labels > 0)
        assert [list(e.numbered) for e in there.state.objects] == [
            [1],
            [2],
            [],
        ]  # of a given mask a server shows no outline
        there.save(str(tmp_path / "there.nii.gz"), "nifti")
        np.testing.assert_array_equal(read_volume(tmp_path / "there.nii.gz").array, here.session.labels)
        # Somebody else's edit is seen, not overwritten.
        other = Client(server.url).resume(there.session.id)
        other.add(Point((5, 20, 20)), 3)
        there.edit(lambda s: s.add(Point((6, 20, 20)), 1))
        assert "changed elsewhere" in there.state.note and [e.id for e in there.state.objects] == [1, 2, 3, 5]
        messages = refused(there)
        there.save(str(tmp_path / "there.json"), "")
        assert "kept there" in messages[0]


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    volume = ball(tmp_path)
    with ServerProcess(tmp_path / "server") as server:
        controller = Controller(Client(server.url).open(volume.source))
    messages = refused(controller)
    controller.edit(lambda s: s.add(Point(BALL_IJK), 1))
    assert "does not answer" in messages[0]

"""The napari plugin without napari and without a window: where layers are, what is drawn, sessions in this process and on a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from samed3d.apps.client import Client
from samed3d.apps.napari_plugin.controller import Controller
from samed3d.apps.napari_plugin.frames import Frame, affine_for, volume_of
from samed3d.apps.napari_plugin.layer_prompts import Drawn, compared, depth_of, moved_shape, point_at, prompt_to_shape, shape_to_prompt
from samed3d.apps.napari_plugin.opening import open_remote, resume_remote
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, MaskPrior, Point, Scribble, point_in_grid
from samed3d.volume import Volume, read_volume, write_volume
from tests.brightness_model import BrightnessModel
from tests.clicked_model import ClickedModel
from tests.conftest import oblique_grid
from tests.server_tools import BALL_IJK, ServerProcess, write_ball


class Layer:
    """What is asked of a napari layer: data, and a map to the world."""

    def __init__(self, data: np.ndarray, matrix: np.ndarray | None = None, path: str | None = None, units: object = None) -> None:
        self.data, self.ndim, self.name = data, data.ndim, "layer"
        self.matrix = np.eye(4) if matrix is None else matrix
        self.source = SimpleNamespace(path=path)
        self.units = units

    def data_to_world(self, at: tuple[float, ...]) -> tuple[float, ...]:
        return tuple((self.matrix @ [*at, 1.0])[:3])


def placed(scale: tuple[float, float, float], translate: tuple[float, float, float], turn_degrees: float = 0.0) -> np.ndarray:
    """Scale, then a turn about z (the first axis), then a shift; zyx."""
    c, s = np.cos(np.radians(turn_degrees)), np.sin(np.radians(turn_degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.diag(scale)
    matrix[:3, 3] = translate
    return matrix


IMAGE = np.random.default_rng(3).integers(0, 100, (6, 7, 8)).astype(np.int16)


# Where layers are


def test_positions_of_one_layer_are_found_on_another_by_hand():
    """Image: 2 x 0.5 x 0.5 mm, shifted by (10, 20, 30), turned a quarter about z. World (14, 19, 31.5) is then voxel (2, 3, 2)."""
    image = Frame.of(Layer(IMAGE, placed((2.0, 0.5, 0.5), (10.0, 20.0, 30.0), 90.0)))
    clicks = Frame.of(Layer(IMAGE))
    # z: 10 + 2 * 2 = 14; y: 20 - 0.5 * x = 19 -> x = 2; x: 30 + 0.5 * y = 31.5 -> y = 3
    np.testing.assert_allclose(clicks.to(image, np.array([[14.0, 19.0, 31.5]])), [[2.0, 3.0, 2.0]], atol=1e-12)
    np.testing.assert_allclose(
        image.to(clicks, np.array([[2.0, 3.0, 2.0], [0, 0, 0]])), [[14.0, 19.0, 31.5], [10.0, 20.0, 30.0]], atol=1e-12
    )


def test_a_layers_scale_is_the_grids_spacing():
    grid = Frame.of(Layer(IMAGE, placed((2.5, 0.8, 0.7), (1.0, 2.0, 3.0)))).grid((6, 7, 8))
    assert grid.spacing_xyz_mm == pytest.approx((0.7, 0.8, 2.5))
    assert grid.origin_lps_mm == pytest.approx((3.0, 2.0, 1.0))
    assert grid.direction_lps == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_a_turned_layer_gives_a_turned_grid():
    """A quarter about z takes the layer's y axis to the world's x, and its x axis to minus y."""
    grid = Frame.of(Layer(IMAGE, placed((2.0, 0.5, 0.6), (0.0, 0.0, 0.0), 90.0))).grid((6, 7, 8))
    direction = np.array(grid.direction_lps).reshape(3, 3)
    np.testing.assert_allclose(direction[:, 0], [0, -1, 0], atol=1e-12)  # i
    np.testing.assert_allclose(direction[:, 1], [1, 0, 0], atol=1e-12)  # j
    assert grid.spacing_xyz_mm == pytest.approx((0.6, 0.5, 2.0))


def test_any_oblique_grid_comes_back_from_the_layer_that_has_its_matrix():
    grid = oblique_grid((6, 7, 8), left_handed=True)
    reverse = np.eye(4)[[2, 1, 0, 3]]
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    found = Frame.of(Layer(IMAGE, reverse @ flip @ grid.affine_ras @ reverse)).grid((6, 7, 8))
    np.testing.assert_allclose(found.affine_ras, grid.affine_ras, atol=1e-9)


def test_units_of_length_become_millimetres():
    class Micrometre:
        def __rmul__(self, one: int) -> Micrometre:
            return self

        def to(self, _unit: str) -> SimpleNamespace:
            return SimpleNamespace(magnitude=1e-3)

    grid = Frame.of(Layer(IMAGE, placed((300.0, 200.0, 100.0), (0, 0, 0)), units=(Micrometre(),) * 3)).grid((6, 7, 8))
    assert grid.spacing_xyz_mm == pytest.approx((0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("direction", "step"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), (3.0, 2.0, 1.0)),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (3.0, -2.0, -1.0)),
        ((0, 0, 1, 1, 0, 0, 0, 1, 0), (3.0, 2.0, 1.0)),  # permuted: in its own planes
    ],
)
def test_a_file_is_shown_where_it_is_or_in_its_own_planes(direction, step):
    affine = affine_for(Grid((4, 5, 6), (1.0, 2.0, 3.0), (7.0, 8.0, 9.0), tuple(map(float, direction))))
    np.testing.assert_array_equal(np.diag(affine)[:3], step)
    assert np.count_nonzero(affine[:3, :3]) == 3
    assert tuple(affine[:3, 3]) == ((9.0, 8.0, 7.0) if direction[0] else (0.0, 0.0, 0.0))


def test_an_oblique_file_is_shown_in_its_own_planes():
    np.testing.assert_array_equal(affine_for(oblique_grid()), np.diag([2.5, 0.8, 0.7, 1.0]))


def test_a_layer_that_was_read_from_a_file_has_the_files_grid(tmp_path):
    grid = oblique_grid((6, 7, 8))
    path = tmp_path / "a.nrrd"
    write_volume(path, IMAGE, grid)
    assert volume_of(Layer(IMAGE, path=str(path))).grid == read_volume(path).grid
    assert volume_of(Layer(IMAGE, placed((2.5, 0.8, 0.7), (0, 0, 0)), str(path))).source == str(path)


@pytest.mark.parametrize(
    "name", ["tptbox_ct_vert/imagesTr/tptbox_ct_vert_0000.nii.gz", "sct_gray_matter_mr/imagesTr/sct_t2s_gm_0000.nii.gz"]
)
def test_real_permuted_and_oblique_files_are_shown_and_saved_in_place(data_dir, name, tmp_path):
    """Opened by the plugin, the layer has the file's own voxels: a click in it is that voxel, and the mask lies where the file does."""
    path = data_dir / name
    if not path.exists():
        pytest.skip(f"no real data: {path} does not exist")
    volume = read_volume(path)
    layer = Layer(volume.array, affine_for(volume.grid), str(path))
    assert volume_of(layer).grid == volume.grid
    centre = tuple(n // 2 for n in volume.grid.size_ijk)
    world = layer.data_to_world(centre[::-1])
    assert world == pytest.approx(np.multiply(centre[::-1], volume.grid.spacing_zyx_mm))
    controller = started(volume)
    (at,) = Frame.of(Layer(IMAGE)).to(Frame.of(layer), np.array([world]))
    controller.add(point_at(at, True), 1)
    assert controller.labels[centre[::-1]] == 1
    controller.save(str(tmp_path / "mask.nii.gz"), "nifti")
    saved = read_volume(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(saved.grid.affine_ras, volume.grid.affine_ras, atol=1e-4)
    np.testing.assert_array_equal(saved.array, controller.labels)


def test_a_layer_that_says_otherwise_than_its_file_is_believed(tmp_path):
    path = tmp_path / "a.nrrd"
    write_volume(path, IMAGE, oblique_grid((6, 7, 8)))
    rescaled = volume_of(Layer(IMAGE, placed((5.0, 0.8, 0.7), (0, 0, 0)), str(path)))
    assert rescaled.grid.spacing_zyx_mm == pytest.approx((5.0, 0.8, 0.7))
    changed = IMAGE.copy()
    changed[0, 0, 0] += 1
    assert volume_of(Layer(changed, path=str(path))).grid.spacing_xyz_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGE[0], "must be 3D"),
        (IMAGE[None], "must be 3D, got 4D"),
        (np.full((3, 3, 3), 7), "constant"),
        (np.where(IMAGE == IMAGE[0, 0, 0], np.nan, 1.0), "NaN"),
        (IMAGE.astype(complex), "numbers"),
        (IMAGE[:1], "stack of slices"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        volume_of(Layer(data))


def test_a_sheared_layer_is_refused():
    matrix = np.eye(4)
    matrix[1, 2] = 0.3
    with pytest.raises(InputError, match="perpendicular"):
        volume_of(Layer(IMAGE, matrix))


# What is drawn


def rectangle(z: float, low: tuple[float, float], high: tuple[float, float]) -> Drawn:
    (a, b), (c, d) = low, high
    return Drawn("rectangle", np.array([[z, a, b], [z, a, d], [z, c, d], [z, c, b]]))


def test_a_rectangle_holds_the_voxels_whose_centres_lie_in_it():
    assert shape_to_prompt(rectangle(4.2, (1.6, 2.4), (5.4, 6.6)), True) == Box((3, 2, 4), (6, 5, 4))


def test_a_rectangle_has_the_depth_that_is_asked_for():
    assert shape_to_prompt(rectangle(4, (2, 2), (5, 6)), True, depth=4) == Box((2, 2, 3), (6, 5, 6))
    assert shape_to_prompt(rectangle(0, (2, 2), (5, 6)), True, depth=3) == Box((2, 2, 0), (6, 5, 1))


def test_a_rectangle_smaller_than_a_voxel_is_the_voxel():
    assert shape_to_prompt(rectangle(4, (2.2, 2.3), (2.4, 2.4)), True) == Box((2, 2, 4), (2, 2, 4))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_box_is_drawn_as_it_is_read(depth, across):
    corners = np.roll(rectangle(7, (1.5, 2.5), (5.5, 6.5)).vertices_zyx, across, axis=1)
    box = shape_to_prompt(Drawn("rectangle", corners), True, depth)
    shape = prompt_to_shape(box, across)
    np.testing.assert_allclose(np.sort(shape.vertices_zyx, axis=0), np.sort(corners, axis=0))
    assert moved_shape(box, shape, depth_of(box, across)) == box


@pytest.mark.parametrize(
    "prompt",
    [
        Scribble(((1, 2, 3), (4, 5, 3)), False, 2.0),
        Lasso(((1, 2, 3), (4, 2, 3), (4, 6, 3)), False),
        Lasso(((1, 2, 3), (4, 2, 3), (4, 6, 3))),
    ],
)
def test_strokes_are_drawn_as_they_are_read(prompt):
    assert moved_shape(prompt, prompt_to_shape(prompt), 1) == prompt


def test_a_scribble_of_one_position_can_be_drawn():
    assert prompt_to_shape(Scribble(((1, 2, 3),))).vertices_zyx.tolist() == [[3, 2, 1], [3, 2, 1]]


def test_points_and_masks_are_no_shapes():
    assert prompt_to_shape(Point((1, 2, 3))) is None
    assert prompt_to_shape(MaskPrior(np.ones((2, 2, 2)))) is None


def test_an_ellipse_is_a_lasso_along_it():
    lasso = shape_to_prompt(Drawn("ellipse", rectangle(3, (2, 2), (6, 10)).vertices_zyx), True)
    at = np.array(lasso.outline)
    np.testing.assert_allclose(((at[:, 0] - 6) / 4) ** 2 + ((at[:, 1] - 4) / 2) ** 2, 1)
    assert (at[:, 2] == 3).all()


def test_a_negative_box_is_refused():
    with pytest.raises(InputError, match="cannot be negative"):
        shape_to_prompt(rectangle(1, (2, 2), (3, 3)), False)


def test_rows_tell_what_was_done():
    assert compared([5, 6, 7], [5, 7, 0]) == ([2], [0, 1], [6])
    assert compared([5], [5, 5]) == ([1], [0], [])  # pasted
    assert compared([5], [5, -1]) == ([], [0], [])  # on its way
    assert compared([], [9]) == ([0], [], [])  # a number that another layer gave


# Sessions


def ball(tmp_path: Path) -> Volume:
    write_ball(tmp_path / "ball.nii.gz")
    return read_volume(tmp_path / "ball.nii.gz")


def started(volume: Volume, model=None) -> Controller:
    controller = Controller(Session(volume, model or BrightnessModel((16, 16, 16))))
    controller.start()
    return controller


def refused(controller: Controller) -> list[str]:
    messages: list[str] = []
    controller.on_error.append(messages.append)
    return messages


def test_a_click_changes_its_part_of_the_label_map(tmp_path):
    controller = started(ball(tmp_path))
    seen = []
    controller.on_change.append(seen.append)
    numbers: list[int] = []
    controller.add(Point(BALL_IJK), 1, numbers.append)
    (change,) = seen
    assert numbers == [1] and change.current == 1 and change.can_undo and change.seconds > 0
    assert 0 < change.labels.sum() and change.labels.shape == change.region.shape_zyx
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    assert change.objects[0].prompts == {1: Point(BALL_IJK)}


def test_undo_and_redo_bring_masks_and_prompts_back_exactly(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    steps = [controller.labels.copy()]
    for at in (BALL_IJK, (20, 8, 16), (10, 20, 6)):
        controller.add(Point(at), 1)
        steps.append(controller.labels.copy())
    assert len({step.tobytes() for step in steps}) == 4
    for step in steps[-2::-1]:
        controller.undo()
        np.testing.assert_array_equal(controller.labels, step)
    controller.undo()  # nothing left: nothing happens
    assert not controller.state.can_undo and controller.state.objects == ()
    for step in steps[1:]:
        controller.redo()
        np.testing.assert_array_equal(controller.labels, step)


def test_moving_and_removing_prompts_changes_the_mask(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    controller.add(Point(BALL_IJK), 1)
    one = controller.labels.copy()
    controller.add(Point((20, 8, 16)), 1)
    two = controller.labels.copy()
    controller.move(2, Point((21, 20, 16)))
    assert not np.array_equal(controller.labels, two)
    controller.remove(2)
    np.testing.assert_array_equal(controller.labels, one)


def test_several_objects_share_the_label_map_as_the_session_says(tmp_path):
    controller = started(ball(tmp_path), ClickedModel())
    for number, at in ((1, BALL_IJK), (2, (17, 15, 11)), (3, (5, 5, 5))):
        controller.add(Point(at), number)
    assert set(np.unique(controller.labels)) == {0, 1, 2, 3}
    assert (controller.session.mask_of(1) & controller.session.mask_of(2)).any()  # so that there is something to settle
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.edit_object(2, locked=True)
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.edit_object(2, visible=False)
    assert 2 not in controller.labels
    np.testing.assert_array_equal(controller.labels > 0, controller.session.mask_of(1) | controller.session.mask_of(3))
    controller.undo()
    controller.undo()
    np.testing.assert_array_equal(controller.labels, controller.session.labels)
    controller.remove_object(3)
    assert 3 not in controller.labels
    controller.undo()
    np.testing.assert_array_equal(controller.labels, controller.session.labels)


def test_painting_is_a_mask_to_start_from(tmp_path):
    controller = started(ball(tmp_path))
    controller.add(Point(BALL_IJK), 1)
    painted = controller.labels.copy()
    i, j, k = BALL_IJK
    painted[k, j, i : i + 2] = 0  # erased
    painted[20, 20, 20:24] = 1  # added
    painted[2, 2:5, 2] = 4  # a label without an object
    controller.painted(painted)
    np.testing.assert_array_equal(controller.labels, painted)
    assert [entry.id for entry in controller.state.objects] == [1, 4]
    controller.undo()
    controller.undo()
    assert controller.session.labels[k, j, i] == 1 and not (controller.labels == 4).any()


def test_what_is_painted_over_belongs_to_no_object_below(tmp_path):
    controller = started(ball(tmp_path))
    for number in (1, 2):
        controller.add(Point(BALL_IJK), number)
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
    controller.add(Point(BALL_IJK), 1)
    before = controller.labels.copy()
    controller.painted(np.zeros_like(before))
    controller.edit_object(1, locked=True)
    controller.painted(np.where(before, before, np.eye(*before.shape[1:], dtype=np.uint8)))
    assert ["no voxel left" in messages[0], "locked" in messages[1], len(messages)] == [True, True, 2]
    np.testing.assert_array_equal(controller.labels, before)


def test_what_is_refused_says_why_and_changes_nothing(tmp_path):
    controller = started(ball(tmp_path))
    messages, seen, numbers = refused(controller), [], []
    controller.on_change.append(seen.append)
    controller.add(Point((500, 0, 0)), 1, numbers.append)
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
    point, box = controller.state.objects[0].prompts.values()
    assert point.space == box.space == "ijk"
    assert point_in_grid(point, volume.grid) == pytest.approx(BALL_IJK)
    assert box.min == pytest.approx((9, 10, 8)) and box.max == pytest.approx((17, 19, 15))
    np.testing.assert_array_equal(controller.labels, session.labels)


def test_saving_writes_masks_or_the_session(tmp_path):
    volume = ball(tmp_path)
    controller = started(volume)
    controller.add(Point(BALL_IJK), 1)
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
    controller.add(Point(BALL_IJK), 1)
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
            controller.add(Point(BALL_IJK), 1)
            controller.add(Box((20, 3, 3), (26, 9, 7)), 2)
            controller.undo()
            controller.redo()
            painted = controller.labels.copy()
            painted[1:3, 1:3, 1:3] = 5
            controller.painted(painted)
        assert there.is_remote and not here.is_remote
        for number in (1, 2, 5):
            np.testing.assert_array_equal(there.session.mask_of(number), here.session.mask_of(number))
            np.testing.assert_array_equal(array_only.session.mask_of(number), here.session.mask_of(number))
        np.testing.assert_array_equal(there.labels > 0, here.labels > 0)
        assert [list(e.prompts) for e in there.state.objects] == [[1], [2], []]  # of a given mask a server shows no outline
        there.save(str(tmp_path / "there.nii.gz"), "nifti")
        np.testing.assert_array_equal(read_volume(tmp_path / "there.nii.gz").array, here.session.labels)
        # Somebody else's edit is seen, not overwritten.
        other = resume_remote(there.session.id, server.url)
        other.add(Point((5, 20, 20)), 3)
        there.add(Point((6, 20, 20)), 1)
        assert "changed elsewhere" in there.state.note and [e.id for e in there.state.objects] == [1, 2, 3, 5]
        messages = refused(there)
        there.save(str(tmp_path / "there.json"), "")
        assert "kept there" in messages[0]


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    volume = ball(tmp_path)
    with ServerProcess(tmp_path / "server") as server:
        controller = Controller(Client(server.url).open(volume.source))
    messages = refused(controller)
    controller.add(Point(BALL_IJK), 1)
    assert "does not answer" in messages[0]

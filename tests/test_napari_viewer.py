"""The napari plugin on napari's own layers, on a ``ViewerModel`` without a window."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from samed3d.apps.napari_plugin.controller import Controller, error_message
from samed3d.apps.napari_plugin.coordinates import Frame, affine_for, volume_of
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, Point, Scribble
from samed3d.volume import read_volume, write_volume
from tests.brightness_model import BrightnessModel
from tests.clicked_model import ClickedModel
from tests.conftest import oblique_grid
from tests.server_tools import BALL_IJK, write_ball

pytestmark = [pytest.mark.napari, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _napari_is_here() -> None:
    pytest.importorskip("napari", reason="napari is not installed: pip install 'samed3d[napari]' and a Qt binding")
    pytest.importorskip("qtpy.QtWidgets", reason="no Qt binding is installed: pip install PySide6")


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    """A viewer model with the ball under an affine that is scaled and shifted, and its session's layers."""
    from napari.components import ViewerModel

    from samed3d.apps.napari_plugin.layers import SessionLayers

    write_ball(tmp_path / "ball.nii.gz")
    volume = read_volume(tmp_path / "ball.nii.gz")
    viewer = ViewerModel()
    image = viewer.add_image(volume.array, affine=affine_for(volume.grid), units=("mm",) * 3)
    controller = Controller(Session(volume, ClickedModel()))
    said: list[str] = []

    def say(error: Exception) -> None:
        said.append(error_message(error))

    controller.on_error.append(say)
    layers = SessionLayers(viewer, image, controller, say)
    return SimpleNamespace(
        viewer=viewer, image=image, controller=controller, layers=layers, said=said, session=controller.session
    )


def clicked(scene: Any, ijk: tuple[float, float, float]) -> None:
    scene.layers.points.add(np.array([ijk[::-1]], dtype=float))


def prompts(scene: Any, number: int = 1) -> dict[int, Any]:
    return next(o for o in scene.session.objects() if o.id == number).numbered


def test_a_point_on_the_layer_is_a_click(scene):
    clicked(scene, BALL_IJK)
    assert prompts(scene) == {1: Point(BALL_IJK)}
    np.testing.assert_array_equal(scene.layers.masks.data, scene.session.labels)
    assert scene.layers.masks.data.any() and scene.said == []


def test_layers_lie_where_the_image_lies(scene):
    image = Frame.of(scene.image)
    for layer in scene.layers.layers:
        np.testing.assert_allclose(Frame.of(layer).matrix, image.matrix)
    # write_ball: 1.0 x 1.2 x 1.5 mm along i, j, k, first voxel at LPS (3, -4, 5), i and j run against LPS
    np.testing.assert_allclose(
        image.matrix @ [11, 15, 13, 1], [5 + 11 * 1.5, -4 - 15 * 1.2, 3 - 13 * 1.0, 1], atol=1e-5
    )


def test_world_positions_become_the_right_voxels(scene):
    """A point of the user's own layer, in world coordinates, found by hand."""
    world = [5 + 11 * 1.5, -4 - 15 * 1.2, 3 - 13 * 1.0]
    scene.layers.use(scene.viewer.add_points(np.array([world]), ndim=3, units=("mm",) * 3))
    assert prompts(scene)[1].at == pytest.approx((13, 15, 11), abs=1e-4)


def test_points_of_a_turned_and_scaled_layer_are_found_in_a_turned_image(tmp_path):
    """Image: turned by a quarter about z, 2 x 0.5 x 0.5. Points: 10 world units per unit, shifted by one. By hand,
    both."""
    from napari.components import ViewerModel

    from samed3d.apps.napari_plugin.layers import SessionLayers

    write_ball(tmp_path / "ball.nii.gz")
    array = read_volume(tmp_path / "ball.nii.gz").array
    viewer = ViewerModel()
    image = viewer.add_image(
        array, scale=(2.0, 0.5, 0.5), rotate=[[1, 0, 0], [0, 0, -1], [0, 1, 0]], translate=(0.0, 20.0, 0.0)
    )
    volume = volume_of(image)
    assert volume.grid.spacing_zyx_mm == pytest.approx((2.0, 0.5, 0.5))
    controller = Controller(Session(volume, BrightnessModel()))
    layers = SessionLayers(viewer, image, controller, pytest.fail)
    # voxel zyx (11, 15, 13): z = 22, y = 20 - 0.5 * 13 = 13.5, x = 0.5 * 15 = 7.5; the points' layer holds (world - 1)
    # / 10
    own = viewer.add_points(np.array([[2.1, 1.25, 0.65]]), scale=(10, 10, 10), translate=(1, 1, 1))
    layers.use(own)
    (point,) = controller.session.objects()[0].prompts
    assert point.at == pytest.approx((13, 15, 11), abs=1e-9)
    shown = layers.points.data_to_world(layers.points.data[0])
    np.testing.assert_allclose(shown, [22.0, 13.5, 7.5], atol=1e-9)
    outline = np.array([[22.0, 20 - 0.5 * a, 0.5 * b] for b, a in ((12, 10), (18, 10), (18, 17), (12, 17))])
    layers.use(viewer.add_shapes([outline], shape_type="rectangle"))
    (_, box) = controller.session.objects()[0].prompts
    assert box == Box((10, 12, 11), (17, 18, 11))


def test_ctrl_and_the_sign_make_clicks_off_the_object(scene):
    clicked(scene, BALL_IJK)
    press = scene.layers.points.mouse_drag_callbacks[-1]
    gesture = press(scene.layers.points, SimpleNamespace(modifiers=("Control",), type="mouse_press"))
    next(gesture)
    clicked(scene, (20, 8, 16))
    scene.layers.choose(positive=False)
    clicked(scene, (20, 20, 16))
    assert [p.positive for p in prompts(scene).values()] == [True, False, False]
    assert scene.layers.points.face_color[0].tolist() != scene.layers.points.face_color[1].tolist()


def test_dragging_a_point_moves_the_click_and_deleting_it_removes_it(scene):
    clicked(scene, BALL_IJK)
    clicked(scene, (20, 8, 16))
    points = scene.layers.points
    points.mode = "select"
    points.selected_data = {1}
    before = scene.session.labels
    points.events.data(value=points.data, action="changing", data_indices=(1,), vertex_indices=((),))
    points.data[1] = (18.0, 20.0, 21.0)
    points.events.data(value=points.data, action="changed", data_indices=(1,), vertex_indices=((),))
    assert prompts(scene)[2].at == (21.0, 20.0, 18.0)
    assert not np.array_equal(scene.session.labels, before)
    points.selected_data = {0}
    points.remove_selected()
    assert list(prompts(scene)) == [2] and len(points.data) == 1
    scene.controller.edit(lambda s: s.undo())
    scene.controller.edit(lambda s: s.undo())
    assert {number: p.at for number, p in prompts(scene).items()} == {1: BALL_IJK, 2: (20, 8, 16)}
    assert sorted(points.data.tolist()) == sorted([list(map(float, BALL_IJK[::-1])), [16.0, 8.0, 20.0]])
    np.testing.assert_array_equal(scene.layers.masks.data, before)


def test_shapes_are_boxes_lassos_and_scribbles_and_come_back(scene):
    shapes = scene.layers.shapes
    scene.layers.depth = 5
    shapes.add(np.array([[11, 9.5, 7.5], [11, 9.5, 18.5], [11, 20.5, 18.5], [11, 20.5, 7.5]]), shape_type="rectangle")
    scene.layers.radius_vox = 2.0
    shapes.add(np.array([[11, 14, 12], [11, 15, 15]]), shape_type="path")
    scene.layers.choose(positive=False)
    shapes.add(np.array([[16, 2, 2], [16, 2, 6], [16, 6, 6], [16, 6, 2]]), shape_type="polygon")
    kinds = list(prompts(scene).values())
    assert kinds[0] == Box((8, 10, 9), (18, 20, 13))
    assert kinds[1] == Scribble(((12, 14, 11), (15, 15, 11)), True, 2.0)
    assert isinstance(kinds[2], Lasso) and not kinds[2].positive and scene.said == []
    assert shapes.shape_type == ["rectangle", "path", "polygon"]
    for expected in (2, 1, 0):
        scene.controller.edit(lambda s: s.undo())
        assert len(shapes.data) == expected
    for _ in range(3):
        scene.controller.edit(lambda s: s.redo())
    assert list(prompts(scene).values()) == kinds and len(shapes.data) == 3
    shapes.selected_data = {2}
    shapes.remove_selected()
    assert list(prompts(scene).values()) == kinds[:2]


def test_a_reshaped_box_keeps_its_depth(scene):
    shapes = scene.layers.shapes
    scene.layers.depth = 5
    corners = np.array([[11, 9.5, 7.5], [11, 9.5, 18.5], [11, 20.5, 18.5], [11, 20.5, 7.5]])
    shapes.add(corners, shape_type="rectangle")
    scene.layers.depth = 1
    shapes._data_view.edit(0, corners + [2, 0, 1])
    shapes.events.data(value=shapes.data, action="changed", data_indices=(0,), vertex_indices=((),))
    assert prompts(scene)[1] == Box((9, 10, 11), (19, 20, 15))


def test_what_is_refused_leaves_the_layer(scene):
    clicked(scene, BALL_IJK)
    clicked(scene, (500, 8, 16))
    assert "inside the volume" in scene.said[0]
    assert len(scene.layers.points.data) == 1 and list(prompts(scene)) == [1]
    scene.layers.choose(positive=False)
    scene.layers.shapes.add(np.array([[11, 9, 7], [11, 9, 18], [11, 20, 18], [11, 20, 7]]), shape_type="rectangle")
    assert "cannot be negative" in scene.said[1] and len(scene.layers.shapes.data) == 0


def test_several_objects_have_their_colours_and_can_be_hidden(scene):
    clicked(scene, BALL_IJK)
    scene.layers.choose(object_id=2)
    clicked(scene, (20, 8, 16))
    masks = scene.layers.masks
    assert {1, 2} <= set(np.unique(masks.data))
    scene.controller.edit(lambda s: s.edit_object(2, colour="#102030"))
    np.testing.assert_allclose(masks.colormap.color_dict[2][:3], np.array([0x10, 0x20, 0x30]) / 255, atol=1e-6)
    scene.controller.edit(lambda s: s.edit_object(2, visible=False))
    assert 2 not in masks.data and len(scene.layers.points.data) == 1
    scene.controller.edit(lambda s: s.undo())
    assert 2 in masks.data and len(scene.layers.points.data) == 2


def test_a_brush_on_the_masks_is_a_mask_to_start_from(scene):
    clicked(scene, BALL_IJK)
    masks = scene.layers.masks
    masks.selected_label, masks.brush_size, masks.mode = 1, 3, "paint"
    assert masks.data[20, 4, 4] == 0
    with masks.block_history():  # as one stroke of the mouse
        masks.paint((20, 4, 4), 1)
    assert scene.said == [] and scene.session.mask_of(1)[20, 4, 4] == 1
    np.testing.assert_array_equal(masks.data, scene.session.labels)
    scene.controller.edit(lambda s: s.edit_object(1, locked=True))
    with masks.block_history():
        masks.paint((20, 20, 20), 1)
    assert "locked" in scene.said[0] and masks.data[20, 20, 20] == 0


def test_a_label_of_another_layer_becomes_the_mask_to_start_from(scene):
    """The layer has voxels twice as large, in the image's place in the world: each of the image's takes the nearest."""
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[3:6, 4:8, 5:9] = 7
    matrix = Frame.of(scene.image).matrix @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])
    own = scene.viewer.add_labels(labels, affine=matrix, units=("mm",) * 3)
    own.selected_label = 7
    scene.layers.use(own)
    expected = np.zeros((24, 28, 32), np.uint8)
    expected[6:12, 8:16, 10:18] = 1
    np.testing.assert_array_equal(scene.session.mask_of(1), expected)


def test_other_layers_are_refused(scene):
    with pytest.raises(InputError, match="points, shapes or labels"):
        scene.layers.use(scene.image)
    with pytest.raises(InputError, match="must be 3D"):
        scene.layers.use(scene.viewer.add_points(np.zeros((1, 2))))


def test_an_oblique_layer_keeps_its_place_through_napari(scene, tmp_path):
    grid = oblique_grid((6, 7, 8))
    reverse, flip = np.eye(4)[[2, 1, 0, 3]], np.diag([-1.0, -1.0, 1.0, 1.0])
    image = scene.viewer.add_image(
        np.random.default_rng(0).random((6, 7, 8)), affine=reverse @ flip @ grid.affine_ras @ reverse
    )
    volume = volume_of(image)
    np.testing.assert_allclose(volume.grid.affine_ras, grid.affine_ras, atol=1e-9)
    write_volume(tmp_path / "a.nii.gz", volume.array, volume.grid)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").grid.affine_ras, grid.affine_ras, atol=1e-4)


def test_an_image_in_micrometres_has_its_spacing_in_millimetres(scene):
    image = scene.viewer.add_image(np.random.default_rng(0).random((6, 7, 8)), scale=(300, 200, 100), units=("um",) * 3)
    assert volume_of(image).grid.spacing_xyz_mm == pytest.approx((0.1, 0.2, 0.3))


def test_colours_and_four_dimensions_are_refused(scene):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="one channel"):
        volume_of(scene.viewer.add_image(rng.random((6, 7, 8, 3)), rgb=True))
    with pytest.raises(InputError, match="must be 3D, got 4D"):
        volume_of(scene.viewer.add_image(rng.random((2, 6, 7, 8))))


def test_the_finest_level_of_a_multiscale_image_is_used(scene):
    fine = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        volume_of(scene.viewer.add_image([fine, fine[::2, ::2, ::2]], multiscale=True)).array, fine
    )


def test_the_manifest_is_valid_and_finds_the_widget():
    from npe2 import PluginManifest

    import samed3d.apps.napari_plugin

    path = Path(samed3d.apps.napari_plugin.__file__).with_name("napari.yaml")
    manifest = PluginManifest.from_file(path)
    manifest.validate_imports()
    assert [w.display_name for w in manifest.contributions.widgets] == ["Segment from clicks"]
    assert PluginManifest.from_distribution("samed3d").name == "samed3d"

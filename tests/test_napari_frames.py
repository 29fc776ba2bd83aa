"""The napari plugin without napari: where a layer's voxels are, and what is drawn on one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from samed3d.apps.napari_plugin.controller import Controller
from samed3d.apps.napari_plugin.coordinates import (
    Drawn,
    Frame,
    affine_for,
    compared,
    moved_shape,
    point_at,
    prompt_to_shape,
    shape_to_prompt,
    volume_of,
)
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, Mask, Point, Scribble
from samed3d.volume import read_volume, write_volume
from tests.brightness_model import BrightnessModel
from tests.conftest import oblique_grid


class Layer:
    """What is asked of a napari layer: data, and a map to the world."""

    def __init__(
        self, data: np.ndarray, matrix: np.ndarray | None = None, path: str | None = None, units: object = None
    ) -> None:
        self.data, self.ndim, self.name = data, data.ndim, "layer"
        self.matrix = np.eye(4) if matrix is None else matrix
        self.source = SimpleNamespace(path=path)
        self.units = units

    def data_to_world(self, at: tuple[float, ...]) -> tuple[float, ...]:
        return tuple((self.matrix @ [*at, 1.0])[:3])


def placed(
    scale: tuple[float, float, float], translate: tuple[float, float, float], turn_degrees: float = 0.0
) -> np.ndarray:
    """Scale, then a turn about z (the first axis), then a shift; zyx."""
    c, s = np.cos(np.radians(turn_degrees)), np.sin(np.radians(turn_degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.diag(scale)
    matrix[:3, 3] = translate
    return matrix


IMAGE = np.random.default_rng(3).integers(0, 100, (6, 7, 8)).astype(np.int16)


# Where layers are


def test_positions_of_one_layer_are_found_on_another_by_hand():
    """Image: 2 x 0.5 x 0.5 mm, shifted by (10, 20, 30), turned a quarter about z. World (14, 19, 31.5) is then voxel
    (2, 3, 2)."""
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
    """Opened by the plugin, the layer has the file's own voxels: a click in it is that voxel, and the mask lies where
    the file does."""
    path = data_dir / name
    if not path.exists():
        pytest.skip(f"no real data: {path} does not exist")
    volume = read_volume(path)
    layer = Layer(volume.array, affine_for(volume.grid), str(path))
    assert volume_of(layer).grid == volume.grid
    centre = tuple(n // 2 for n in volume.grid.size_ijk)
    world = layer.data_to_world(centre[::-1])
    assert world == pytest.approx(np.multiply(centre[::-1], volume.grid.spacing_zyx_mm))
    controller = Controller(Session(volume, BrightnessModel((16, 16, 16))))
    (at,) = Frame.of(Layer(IMAGE)).to(Frame.of(layer), np.array([world]))
    controller.edit(lambda s: s.add(point_at(at, True), 1))
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
    assert moved_shape(box, shape, across) == box


@pytest.mark.parametrize(
    "prompt",
    [
        Scribble(((1, 2, 3), (4, 5, 3)), False, 2.0),
        Lasso(((1, 2, 3), (4, 2, 3), (4, 6, 3)), False),
        Lasso(((1, 2, 3), (4, 2, 3), (4, 6, 3))),
    ],
)
def test_strokes_are_drawn_as_they_are_read(prompt):
    assert moved_shape(prompt, prompt_to_shape(prompt), 0) == prompt


def test_a_scribble_of_one_position_can_be_drawn():
    assert prompt_to_shape(Scribble(((1, 2, 3),))).vertices_zyx.tolist() == [[3, 2, 1], [3, 2, 1]]


def test_points_and_masks_are_no_shapes():
    assert prompt_to_shape(Point((1, 2, 3))) is None
    assert prompt_to_shape(Mask(np.ones((2, 2, 2)))) is None


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

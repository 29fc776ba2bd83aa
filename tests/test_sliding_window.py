"""Whole volumes by windows: every voxel is seen, answers land where they belong, what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import oblique_grid
from torch import Tensor

from samed3d.data.semantic import Intensities
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.sliding_window import gaussian_weight, segment_volume, window_frames
from samed3d.models import MODELS, create_model
from samed3d.models.base import ModelSpec, SemanticModel
from samed3d.volume import Volume


class Brighter(SemanticModel):
    """Class 1 where the image is above its mean, class 2 where it is far above; notes what it was shown."""

    def __init__(self, window, spacing=None, channels=1):
        super().__init__()
        self.config = {"class_names": ("above", "far above"), "spacing_zyx_mm": spacing}
        self.spec = ModelSpec("brighter", window, classes=3, in_channels=channels)
        self.shown: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shown.append(tuple(image.shape))
        x = image[:, :1]
        return torch.cat([-x, x, 3 * x - 4], 1) * 10


def volume(shape, rng, grid=None) -> Volume:
    coarse = rng.normal(size=[n // 3 + 2 for n in shape])
    array = np.kron(coarse, np.ones((3, 3, 3)))[: shape[0], : shape[1], : shape[2]].astype(np.float32)
    return Volume(array, grid or Grid(shape), "made")


def expected(v: Volume) -> np.ndarray:
    known = Intensities.of(v.view.to_canonical(v.array))
    z = (v.array.clip(known.low, known.high) - known.mean) / known.deviation
    return np.where(z > 2, 2, np.where(z > 0, 1, 0))


@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [
        ((20, 17, 25), (8, 12, 12), 0.5),
        ((5, 6, 7), (8, 8, 16), 0.5),
        ((19, 9, 9), (8, 8, 8), 0.0),
        ((11, 20, 33), (5, 16, 16), 0.8),
    ],
)
def test_every_voxel_gets_its_own_class(rng, shape, window, overlap):
    v, model = volume(shape, rng), Brighter(window)
    np.testing.assert_array_equal(segment_volume(v, model, overlap=overlap), expected(v))
    assert set(model.shown) == {(1, 1, *window)}


def test_the_answer_lies_in_the_files_own_order(rng):
    v = volume((9, 12, 10), rng, oblique_grid((9, 12, 10), left_handed=True))
    np.testing.assert_array_equal(segment_volume(v, Brighter((6, 6, 6))), expected(v))


def test_mirroring_changes_nothing_for_a_model_that_sees_single_voxels(rng):
    v = volume((10, 9, 8), rng)
    np.testing.assert_array_equal(segment_volume(v, Brighter((6, 6, 6)), mirror=True), expected(v))


@pytest.mark.parametrize("spacing", [(1.7, 0.6, 1.0), (0.37, 2.9, 1.3)])
def test_windows_of_another_spacing_reach_every_face(spacing):
    shape = (21, 18, 15)
    rows = window_frames(shape, spacing, (6, 8, 8), 0.5)
    seen = np.zeros(shape, bool)
    for frame in (f for row in rows for f in row):
        seen[frame.region().clip(shape).slices] = True
    assert seen.all()


def test_a_model_of_another_spacing_sees_the_same_object():
    shape = (30, 30, 30)
    array = np.zeros(shape, np.float32)
    array[4:26, 3:27, 3:27] = 1  # about half, so that the mean is the middle of the edge
    v = Volume(array, Grid(shape, (0.8, 0.8, 2.0)), "made")
    found = segment_volume(v, Brighter((8, 8, 8), spacing=(1.0, 1.0, 1.0))) > 0
    assert 2 * (found & (array > 0)).sum() / (found.sum() + (array > 0).sum()) > 0.93
    assert found[15, 15, 15] and not found[0].any() and not found[:, :, -1].any()


def test_a_real_system_on_a_volume_smaller_and_larger_than_its_crop(rng):
    model = create_model("sam3d", **MODELS["sam3d"].tiny)
    for shape in ((4, 20, 20), (9, 40, 33)):
        labels = segment_volume(volume(shape, rng), model)
        assert labels.shape == shape and labels.dtype == np.uint8 and labels.max() <= 2


def test_two_channels_need_two_images_of_one_shape(rng):
    model = Brighter((6, 6, 6), channels=2)
    one, other = volume((8, 8, 8), rng), volume((8, 8, 9), rng)
    assert segment_volume([one, one], model).shape == (8, 8, 8) and model.shown[0] == (1, 2, 6, 6, 6)
    with pytest.raises(InputError, match=r"brighter takes 2 images per case, got 1"):
        segment_volume(one, model)
    with pytest.raises(InputError, match=r"images of one case must have one shape"):
        segment_volume([one, other], model)


def test_what_does_not_fit_is_refused(rng):
    v = volume((8, 8, 8), rng)
    with pytest.raises(InputError, match=r"must be a semantic segmentation model, got .*, which needs prompts"):
        segment_volume(v, create_model("samed3d_unet", **MODELS["samed3d_unet"].tiny))
    with pytest.raises(InputError, match=r"overlap must be from 0 to below 1, got 1"):
        segment_volume(v, Brighter((6, 6, 6)), overlap=1)


def test_the_weight_falls_from_the_middle_and_is_never_zero():
    weight = gaussian_weight((5, 16, 17))
    assert weight[2, 7, 8] == weight.max()
    assert weight.min() >= 1e-3 and weight[0, 0, 0] < weight[1, 4, 4] < weight[2, 7, 8]

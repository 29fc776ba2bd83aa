"""Where crops go: the mask is followed to its ends, by zooming or by tiling, and no ground truth is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samed3d.crops import paste_crop, sample_crop
from samed3d.geometry import CropFrame, Region, bounding_region
from samed3d.inference.crop_search import SMALL_FILL, predict_object, touched_faces
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import Canvas, CropMask, CropPredictor
from tests.brightness_model import BrightnessModel


def bar(shape=(60, 20, 20), span=(5, 55)) -> np.ndarray:
    """A long bright bar along z on a dark ground."""
    array = np.zeros(shape, dtype=np.float32)
    array[span[0] : span[1], 7:13, 7:13] = 1.0
    return array


def predictor(array: np.ndarray, model: BrightnessModel, spacing=(1.0, 1.0, 1.0)) -> CropPredictor:
    return CropPredictor(model, torch.device("cpu"), array, spacing)


def full_mask(canvas: Canvas, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[canvas.region.slices] = (canvas.logits > 0).numpy()
    return mask


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("spacing_mm", [None, 1.0])
def test_an_object_larger_than_the_crop_is_followed_to_its_ends(spacing_mm):
    array = bar()
    model = BrightnessModel((16, 16, 16), spacing_mm=spacing_mm)
    placed = predict_object(predictor(array, model), ModelPrompts([((30.0, 10.0, 10.0), True)]), None)
    mask = full_mask(placed.canvas, array.shape)
    # Zooming out costs resolution (a bar of six voxels is under two crop voxels wide there), tiling does not.
    assert dice(mask, array > 0.5) > (0.55 if spacing_mm is None else 0.95)
    assert mask[7].any() and mask[52].any()
    assert model.encoded > 1


def test_an_object_smaller_than_the_crop_needs_one_tile():
    array = bar(span=(26, 34))
    model = BrightnessModel((32, 32, 32), spacing_mm=1.0)
    placed = predict_object(predictor(array, model), ModelPrompts([((30.0, 10.0, 10.0), True)]), None)
    assert model.encoded == 1
    assert dice(full_mask(placed.canvas, array.shape), array > 0.5) > 0.95


def test_a_small_mask_is_looked_at_closer():
    array = bar(shape=(60, 60, 60), span=(28, 34))
    array[28:34] = 0
    array[28:33, 28:33, 28:33] = 1.0
    model = BrightnessModel((48, 48, 48))
    placed = predict_object(predictor(array, model), ModelPrompts([((30.0, 30.0, 30.0), True)]), None)
    fill = max(bounding_region((placed.crop.logits > 0).numpy()).shape_zyx) / 48
    assert fill >= SMALL_FILL


def test_a_far_second_click_is_inside_the_next_crop():
    array = bar(shape=(60, 60, 60), span=(20, 28))
    model = BrightnessModel((16, 16, 16))
    session = predictor(array, model)
    first = predict_object(session, ModelPrompts([((24.0, 10.0, 10.0), True)]), None)
    prompts = ModelPrompts([((24.0, 10.0, 10.0), True), ((50.0, 50.0, 50.0), True)])
    second = predict_object(session, prompts, first)
    assert not first.crop.frame.contains((50.0, 50.0, 50.0))
    assert all(second.crop.frame.contains(at) for at, _ in prompts.points)


def test_faces_outside_the_volume_do_not_count():
    frame = CropFrame((-8.0, 0.0, 0.0), (1.0, 1.0, 1.0), (16, 16, 16))
    logits = torch.ones(16, 16, 16)
    inside = torch.zeros(16, 16, 16, dtype=torch.bool)
    inside[8:] = True
    faces = touched_faces(CropMask(frame, logits, inside, 1.0, logits))
    assert (0, -1) not in faces and (0, 1) in faces and len(faces) == 5


def test_tiles_blend_without_a_seam():
    """Two tiles of one structure agree: where they overlap the average equals both."""
    array = bar()
    model = BrightnessModel((24, 24, 24), spacing_mm=1.0)
    placed = predict_object(predictor(array, model), ModelPrompts([((30.0, 10.0, 10.0), True)]), None)
    inside = placed.canvas.logits[[i - placed.canvas.region.start_zyx[0] for i in range(8, 52)]]
    middle = inside[:, 10 - placed.canvas.region.start_zyx[1], 10 - placed.canvas.region.start_zyx[2]]
    assert float(middle.min()) > 0 and float(middle.max() - middle.min()) < float(middle.max())


def test_a_canvas_is_background_where_nothing_was_seen():
    canvas = Canvas(Region((4, 4, 4), (8, 8, 8)), torch.ones(4, 4, 4))
    crop = canvas.on_frame(CropFrame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (12, 12, 12)))
    assert float(crop[5, 5, 5]) == 1.0 and float(crop[0, 0, 0]) < -5 and float(crop[9, 5, 5]) < -5


def test_a_canvas_keeps_voxels_around_the_object_only_and_loses_nothing():
    """A crop of most of a CT was 4 bytes per voxel of it: more than the image."""
    frame, shape = CropFrame((-3.0, 2.0, 4.0), (2.5, 1.0, 0.7), (16, 16, 16)), (30, 24, 20)
    z, y, x = (torch.arange(16.0) - 8 for _ in range(3))
    logits = (4 - z[:, None, None] ** 2 - y[:, None] ** 2 - x**2).clamp(min=-9)
    crop = CropMask(frame, logits, sample_crop(np.zeros(shape), frame)[1], 1.0, torch.zeros(1, 1, 4, 4, 4))
    found = predictor(np.zeros(shape, np.float32), BrightnessModel((16, 16, 16))).paste(crop)
    whole = Canvas(*paste_crop(logits, frame, shape))
    assert found.logits.numel() < whole.logits.numel() / 2
    everything = Region((0, 0, 0), shape)
    torch.testing.assert_close(found.on_region(everything), whole.on_region(everything))
    other = CropFrame((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (12, 12, 10))
    torch.testing.assert_close(found.on_frame(other) > 0, whole.on_frame(other) > 0)
    assert float((found.on_frame(other) - whole.on_frame(other)).abs().max()) < 2.5


@pytest.mark.parametrize("spacing_mm", [None, 1.0])
def test_a_far_click_off_the_object_moves_no_crop(spacing_mm):
    """It used to make the crop grow until it held the click, at the cost of the object's resolution."""
    array = bar(shape=(60, 60, 60), span=(20, 28))
    model = BrightnessModel((16, 16, 16), spacing_mm=spacing_mm)
    session = predictor(array, model)
    first = predict_object(session, ModelPrompts([((24.0, 10.0, 10.0), True)]), None)
    encoded = model.encoded
    far = ModelPrompts([((24.0, 10.0, 10.0), True), ((55.0, 55.0, 55.0), False)], positive=False)
    second = predict_object(session, far, first)
    assert not first.crop.frame.contains((55.0, 55.0, 55.0))
    assert second.crop.frame == first.crop.frame and model.encoded == encoded
    third = predict_object(session, ModelPrompts([*far.points, ((26.0, 10.0, 10.0), True)]), second)
    assert third.crop.frame == first.crop.frame


def test_a_click_off_a_mask_of_many_tiles_is_looked_at_where_it_is():
    array = bar()
    model = BrightnessModel((16, 16, 16), spacing_mm=1.0)
    session = predictor(array, model)
    first = predict_object(session, ModelPrompts([((30.0, 10.0, 10.0), True)]), None)
    assert not first.crop.frame.contains((50.0, 10.0, 10.0))
    off = ModelPrompts([((30.0, 10.0, 10.0), True), ((50.0, 10.0, 10.0), False)], positive=False)
    assert predict_object(session, off, first).crop.frame.contains((50.0, 10.0, 10.0))


def test_a_box_alone_is_enough_for_a_model_of_fixed_spacing():
    array = bar(span=(26, 34))
    model = BrightnessModel((32, 32, 32), spacing_mm=1.0)
    placed = predict_object(predictor(array, model), ModelPrompts(box=((26.0, 7.0, 7.0), (34.0, 13.0, 13.0))), None)
    assert dice(full_mask(placed.canvas, array.shape), array > 0.5) > 0.95

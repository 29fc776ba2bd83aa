"""The rules of every protocol on arrays small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from samed3d.errors import InputError
from samed3d.evaluation.measuring import measurable
from samed3d.evaluation.methods import ModelMethod, method_of
from samed3d.evaluation.protocols import PROTOCOLS, protocol_of
from samed3d.evaluation.protocols.base import EvaluationSettings
from samed3d.evaluation.protocols.click_rules import Radioactive3d, first_click, further_click
from samed3d.evaluation.protocols.sam_med3d import SamMed3dReleased
from samed3d.geometry import Grid
from samed3d.prompts import Box, Point, Scribble
from samed3d.volume import Volume
from tests.brightness_model import BrightnessModel
from tests.known_methods import Fake, Scripted, measured

RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)


def scene(shape: tuple[int, int, int] = (12, 14, 16), spacing: float = 2.0) -> tuple[Volume, np.ndarray]:
    """A bright cuboid of label 1 on a dark ground with some noise."""
    labels = np.zeros(shape, np.uint8)
    labels[3:9, 4:10, 5:12] = 1
    image = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32) + labels
    return Volume(image, Grid(shape, (spacing,) * 3, (0.0, 0.0, 0.0), RAS), "memory"), labels


# All


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "automatic"])
def test_every_protocol_clicks_a_perfect_subject_once_and_repeats(name):
    volume, labels = scene()
    method = Fake(lambda _, truth: Scripted(truth))
    rows = measured(method, volume, labels, name).rows
    assert rows and all(row["protocol"] == name for row in rows)
    assert rows[-1]["click"] == (protocol_of(name).fixed_clicks or 3)
    if name != "cvpr25":
        assert len(method.opened[0].prompts) == 1 and [row["dice"] for row in rows] == [1.0] * len(rows)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "automatic"])
def test_every_protocol_measures_a_network_the_same_twice(name):
    volume, labels = scene()
    rows = [measured(ModelMethod("m", BrightnessModel((16, 16, 16))), volume, labels, name).rows for _ in range(2)]
    one, other = (
        [{k: v for k, v in row.items() if "seconds" not in k and k != "peak_mib"} for row in found] for found in rows
    )
    # The released crop shows the 32 mm scene to a network of 16 voxels for 192 mm.
    assert one == other and one[-1]["dice"] > (0.05 if name == "sam-med3d-released" else 0.5)
    assert 0 <= rows[0][0]["encode_seconds"] <= rows[0][0]["seconds"] and rows[0][0]["peak_mib"] > 0


def test_protocols_state_their_optimistic_bias():
    assert {name for name, kind in PROTOCOLS.items() if kind.optimistic_bias} == {
        "sam-med3d-released",
        "vista3d-points-flattering",
    }
    assert all(PROTOCOLS[name].leaks_truth for name in ("sam-med3d-released", "vista3d-points-flattering"))
    with pytest.raises(InputError, match=r"unknown protocol 'cvpr'; nearest: cvpr25 \(all: samed3d, "):
        protocol_of("cvpr")


def test_a_model_that_needs_what_the_protocol_does_not_give_is_refused():
    boxes_only = method_of("threshold_in_box")
    with pytest.raises(
        InputError, match="model 'threshold_in_box' needs a box first; protocol 'vista3d-points' gives it only: point"
    ):
        protocol_of("vista3d-points").usable_strategies(boxes_only, EvaluationSettings(3))
    ask = EvaluationSettings(3, policies=("centre",), prompts=("click", "box"))
    assert [way.prompt for way in protocol_of("samed3d").usable_strategies(boxes_only, ask)] == ["box"]
    pairs = measurable([boxes_only], [protocol_of("samed3d"), protocol_of("vista3d-points")], ask)
    assert pairs == {("threshold_in_box", "samed3d")}


# samed3d


def test_policies_and_first_prompts():
    volume, labels = scene()
    method = Fake(lambda *_: Scripted(np.zeros(labels.shape)))
    part = measured(
        method, volume, labels, clicks=2, policies=("uniform", "ritm", "noisy"), prompts=("click", "box", "scribble")
    )
    kinds = [[type(p) for p in opened.prompts] for opened in method.opened]
    assert kinds == [[Point, Point]] * 3 + [[Box, Point, Point]] * 3 + [[Scribble, Point, Point]] * 3
    assert [(r["policy"], r["prompt"], r["click"]) for r in part.rows[6:9]] == [
        ("uniform", "box", c) for c in (0, 1, 2)
    ]
    assert "obeyed" not in part.rows[6] and "obeyed" in part.rows[7], "a box is not obeyed at a voxel"
    box = method.opened[3].prompts[0]
    found = np.argwhere(labels == 1)[:, ::-1]
    assert (
        np.abs(np.array(box.min) - found.min(axis=0)).max() <= 1
        and np.abs(np.array(box.max) - found.max(axis=0)).max() <= 1
    )
    assert all(labels[int(k), int(j), int(i)] == 1 for i, j, k in method.opened[6].prompts[0].path)
    with pytest.raises(InputError, match="policy must be one of uniform, centre, ritm, noisy or all, got 'random'"):
        measured(method, volume, labels, policies=("random",))


# SAM-Med3D


def big_scene() -> tuple[Volume, np.ndarray]:
    """A rod of 264 mm along x, more than the cube, on 4 mm voxels."""
    labels = np.zeros((20, 20, 80), np.uint8)
    labels[7:13, 7:13, 4:70] = 1
    image = labels + np.random.default_rng(0).normal(0, 0.05, labels.shape).astype(np.float32)
    return Volume(image.astype(np.float32), Grid(labels.shape, (4.0,) * 3, (0.0, 0.0, 0.0), RAS), "memory"), labels


def test_the_paper_extends_where_the_mask_touches_a_face():
    volume, labels = big_scene()
    model = BrightnessModel((48, 48, 48), spacing_mm=4.0)
    rows = measured(ModelMethod("m", model), volume, labels, "sam-med3d", clicks=1).rows
    assert model.encoded > 1, "the rod leaves the first cube"
    assert rows[0]["dice"] > 0.9, (
        "and the next cubes find the rest: one cube holds 192 of its 264 mm, for a Dice of 0.84 at most"
    )


def test_the_paper_gives_the_newest_click_and_the_logits_before_it():
    volume, labels = scene()
    labels = np.where(labels, 1, 0)
    labels[0, 0, :3] = 1  # never found: there is always a next click
    model = BrightnessModel((16, 16, 16))
    measured(ModelMethod("m", model), volume, labels, "sam-med3d", clicks=3)
    assert [batch.points.shape[1] for batch in model.seen] == [1, 1, 1]
    assert model.seen[0].mask_logits is None and all(batch.mask_logits is not None for batch in model.seen[1:])


def test_the_released_script_forgives_what_lies_outside_its_crop():
    """The rod is longer than the crop, which hides the rest: inside it a model can be right, on the whole image it
    cannot."""
    volume, labels = big_scene()
    inside = measured(ModelMethod("m", BrightnessModel((48, 48, 48))), volume, labels, "sam-med3d-released", clicks=2)
    assert inside.rows[0]["dice"] > 0.8
    found = SamMed3dReleased().own_scores(
        [row | {"dice": value} for row, value in zip(inside.rows, (0.9, 0.4), strict=True)]
    )
    assert [(line["score"], line["value"]) for line in found] == [("best Dice", 0.9)]


def test_the_released_crop_is_centred_on_the_truth_and_its_clicks_lie_in_the_target():
    volume, labels = scene()
    method = Fake(lambda seen, _: Scripted(np.zeros(seen.grid.shape_zyx)))
    part = measured(method, volume, labels, "sam-med3d-released", clicks=3)
    seen = method.opened[0]
    assert len(seen.prompts) == 3 and part.rows[0]["dice"] == 0
    middle = np.array(
        seen.prompts[0].at
    )  # RITM: more than half as deep as the deepest voxel, so near the crop's middle
    assert np.abs(middle - 63.5).max() <= 4.5
    for turn in part.lines[0]["turns"]:  # and as positions of the image they are inside the target
        i, j, k = (round(v) for v in turn["prompts"][0]["at"])
        assert labels[k, j, i] == 1


def test_whatever_is_no_network_gets_the_cube_as_an_image():
    volume, labels = big_scene()
    method = Fake(lambda seen, truth: Scripted(truth))
    rows = measured(method, volume, labels, "sam-med3d", clicks=2).rows
    assert 0.6 < rows[0]["dice"] < 1, "perfect in the cube, and the rod continues beyond it"


# RadioActive


def test_radioactive_stays_in_the_patch_of_the_first_click():
    volume, labels = big_scene()
    model = BrightnessModel((8, 8, 8), spacing_mm=4.0)
    method = Fake(lambda *_: Scripted(np.zeros(labels.shape)))
    method.model = model
    measured(method, volume, labels, "radioactive-3d")
    given = np.array([p.at for p in method.opened[0].prompts])
    assert len(given) == 6 and np.abs(given - given[0]).max() <= 4 and len(np.unique(given, axis=0)) > 1
    free = Fake(lambda *_: Scripted(np.zeros(labels.shape)))
    measured(free, volume, labels, "radioactive-3d")
    assert np.ptp(np.array([p.at for p in free.opened[0].prompts])[:, 0]) > 8, (
        "without a patch clicks fall anywhere in the rod"
    )
    assert Radioactive3d().rng(0, 0).random() != protocol_of("samed3d").rng(0, 0).random()


# VISTA3D


def test_vista_clicks_first_near_the_mean_of_the_eroded_target():
    target = np.zeros((12, 14, 16), bool)
    target[3:8, 4:9, 5:12] = True
    target[0, 0, 0] = True  # eroded away
    assert first_click(target) == (5, 6, 8)
    single = np.zeros((4, 4, 4), bool)
    single[1, 2, 3] = True
    assert first_click(single) == (1, 2, 3)


def test_vista_takes_the_missed_part_where_it_is_as_large(rng):
    target = np.zeros((12, 14, 16), bool)
    target[1:6, 1:6, 1:6] = True
    pred = np.zeros_like(target)
    pred[6:11, 6:11, 6:11] = True  # surplus of the same size
    for _ in range(5):
        (z, y, x), positive = further_click(pred, target, 1, rng)
        assert positive and all(2 <= v <= 4 for v in (z, y, x))
    pred[6:12, 6:12, 6:12] = True
    assert further_click(pred, target, 1, rng)[1] is False


def test_vista_tries_a_flat_kernel_early_and_then_stops(rng):
    target = np.zeros((6, 12, 12), bool)
    target[2, 3:8, 3:8] = True  # one slice: the cube leaves nothing of it
    click = further_click(np.zeros_like(target), target, 9, rng)
    assert click is not None and click[0][0] == 2 and click[1]
    assert further_click(np.zeros_like(target), target, 10, rng) is None
    assert further_click(target, target, 1, rng) is None


def test_the_optimistic_form_forgives_other_slices_and_keeps_the_best():
    volume, labels = scene()
    target = labels == 1
    leaky, worse = target.copy(), np.zeros_like(target)
    leaky[0, :, :] = True  # a slice without target
    worse[3, 4, 5] = True
    honest = measured(Fake(lambda *_: Scripted(leaky, worse)), volume, labels, "vista3d-points", clicks=2).rows
    optimistic = measured(
        Fake(lambda *_: Scripted(leaky, worse)), volume, labels, "vista3d-points-flattering", clicks=2
    ).rows
    assert honest[0]["dice"] < 1 and honest[1]["dice"] < 0.1
    assert [row["dice"] for row in optimistic] == [1.0, 1.0]

"""The CVPR 2025 challenge: its evaluator's rules on cases small enough to follow by hand, and its files."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_metrics import nsd_subvoxel

from samed3d.data.challenge_npz import read_boxes
from samed3d.data.exposure import TrainingHistory
from samed3d.errors import InputError
from samed3d.evaluation.cases import find_cases
from samed3d.evaluation.measuring import measure
from samed3d.evaluation.methods import BaselineMethod
from samed3d.evaluation.protocols import protocol_of
from samed3d.evaluation.protocols.base import EvaluationSettings
from samed3d.evaluation.protocols.cvpr25 import (
    Cvpr25,
    as_prompt,
    challenge_click,
    challenge_nsd,
    joined,
    simulated_boxes,
)
from samed3d.metrics import dice
from samed3d.prompts import Box, Point
from tests.known_methods import Fake

SPACING = (0.5, 1.0, 3.0)


def truth() -> np.ndarray:
    """Labels 2 and 7: two cuboids."""
    labels = np.zeros((10, 16, 20), np.uint8)
    labels[2:7, 2:9, 3:11] = 2
    labels[4:9, 10:15, 12:19] = 7
    return labels


def write_case(path: Path, labels: np.ndarray, boxes: bool = True, truth_inside: bool = True) -> Path:
    image = (labels > 0) * 100 + np.random.default_rng(0).integers(0, 9, labels.shape)
    arrays = {"imgs": image.astype(np.uint8), "spacing": np.array(SPACING)}
    if truth_inside:
        arrays["gts"] = labels
    else:
        (path.parent / "gts").mkdir(exist_ok=True)
        np.savez_compressed(path.parent / "gts" / path.name, gts=labels)
    if boxes:
        listed = np.empty(2, object)
        listed[:] = simulated_boxes(np.select([labels == 2, labels == 7], [1, 2]), 2, np.random.RandomState(0))
        arrays["boxes"] = listed
    np.savez_compressed(path, **arrays)
    return path


class EachRound:
    """Answers each object's n-th prompt with the n-th of its masks."""

    def __init__(self, masks: dict[int, list[np.ndarray]]) -> None:
        self.masks, self.prompts = masks, {}

    def add(self, prompt, object_id=1):
        self.prompts.setdefault(object_id, []).append(prompt)

    def mask_of(self, object_id):
        listed = self.masks[object_id]
        return listed[min(len(self.prompts[object_id]), len(listed)) - 1].astype(np.uint8)


def measured_case(path: Path, method):
    (case,) = find_cases([path.parent], TrainingHistory(), "all").cases
    return case, measure(case, method, protocol_of("cvpr25"), EvaluationSettings(3, min_voxels=1), case.loaded())


# Boxes and clicks


def test_the_box_is_exact_along_z_and_drawn_on_the_middle_slice():
    labels = np.zeros((9, 256, 512), np.uint8)
    labels[[2, 3, 5, 8], 100:120, 300:340] = 1
    labels[5, 90:130, 250:350] = 1  # the middle of the four slices that have it is the third
    boxes = [simulated_boxes(labels, 1, np.random.RandomState(seed))[0] for seed in range(40)]
    assert {(b["z_min"], b["z_max"], b["z_mid"]) for b in boxes} == {(2, 8, 5)}
    shifts = {
        (250 - b["z_mid_x_min"], b["z_mid_x_max"] - 349, 90 - b["z_mid_y_min"], b["z_mid_y_max"] - 129) for b in boxes
    }
    assert shifts == {(2 * s, 2 * s, s, s) for s in range(6)}, "0 to 5 pixels of a 256-pixel image"
    edge = np.zeros((1, 256, 256), np.uint8)
    edge[0, :4, 250:] = 1
    assert all(
        b["z_mid_y_min"] == 0 and b["z_mid_x_max"] == 255 for b in simulated_boxes(edge, 1, np.random.RandomState(1))
    )
    prompt = as_prompt(boxes[0] | {"z_mid_x_min": 3, "z_mid_x_max": 7, "z_mid_y_min": 4, "z_mid_y_max": 6})
    assert prompt == Box((3, 4, 2), (7, 6, 8))


def test_the_click_is_deepest_in_the_largest_part_of_all_error():
    target = np.zeros((9, 15, 25), bool)
    target[2:7, 2:7, 2:7] = True
    pred = np.zeros_like(target)
    assert challenge_click(pred, target) == ((4, 4, 4), True)
    pred[1:8, 4:11, 12:19] = True  # surplus, larger than what is missed
    assert challenge_click(pred, target) == ((4, 7, 15), False)
    assert challenge_click(target, target) is None


def test_missed_and_surplus_voxels_make_one_part_together():
    """A surplus slab beside a missed one: alone each has its middle, joined the deepest voxel lies at their border."""
    target, pred = np.zeros((2, 11, 11, 23), bool)
    target[3:8, 3:8, 2:6] = True
    pred[3:8, 3:8, 6:10] = True
    (z, y, x), positive = challenge_click(pred, target)
    assert (z, y) == (5, 5) and 4 <= x <= 7 and positive == bool(target[z, y, x])


def test_distances_ignore_spacing_and_ties_are_drawn_with_one_seed():
    target = np.zeros((3, 3, 40), bool)
    target[1, 1, 5:35] = True  # every voxel is equally deep
    choice = np.random.RandomState(42).choice(30)
    assert challenge_click(np.zeros_like(target), target) == ((1, 1, 5 + int(choice)), True)
    assert challenge_click(np.zeros_like(target), target) == challenge_click(np.zeros_like(target), target)


def test_large_parts_are_halved_first():
    target = np.zeros((21, 21, 21), bool)
    target[3:18, 3:18, 3:18] = True
    fine, coarse = (
        challenge_click(np.zeros_like(target), target),
        challenge_click(np.zeros_like(target), target, most_voxels=100),
    )
    assert fine[0] == (10, 10, 10) and coarse[1] and max(abs(v - 10) for v in coarse[0]) <= 3


def test_overlaps_go_to_the_higher_label():
    one, two = np.zeros((2, 3, 3, 3), bool)
    one[:2], two[1:] = True, True
    assert joined({2: two, 1: one}, (3, 3, 3))[:, 0, 0].tolist() == [1, 2, 2]


# The loop


def test_six_rounds_of_both_structures_and_the_four_figures(tmp_path):
    labels = truth()
    path = write_case(tmp_path / "CT_a.npz", labels)
    a, b = labels == 2, labels == 7
    half = a & (np.arange(20) < 7)
    nothing = np.zeros_like(a)
    subject = EachRound({1: [nothing, half, half, a], 2: [nothing, nothing, b]})
    case, part = measured_case(path, Fake(lambda *_: subject))
    assert [type(p) for p in subject.prompts[1]] == [Box, Point, Point, Point], (
        "perfect from the third click on: no more are given"
    )
    assert [type(p) for p in subject.prompts[2]] == [Box, Point, Point]
    rows = {(r["label"], r["click"]): r for r in part.rows}
    assert sorted(rows) == [(label, click) for label in (2, 7) for click in range(6)]
    d = dice(half, a)
    assert [rows[2, c]["dice"] for c in range(6)] == pytest.approx([0, d, d, 1, 1, 1], abs=1e-5)
    assert [rows[7, c]["dice"] for c in range(6)] == [0, 0, 1, 1, 1, 1]
    n = nsd_subvoxel(half, a, SPACING, 2.0)
    assert rows[2, 1]["nsd_subvoxel"] == pytest.approx(n, abs=1e-5), "spacing as the file has it, 2 mm"
    means = [d / 2, (d + 1) / 2, 1, 1, 1]
    surfaces = [n / 2, (n + 1) / 2, 1, 1, 1]
    found = {line["score"]: line["value"] for line in Cvpr25().own_scores(part.rows)}
    area = sum((p + q) / 2 for p, q in zip(means, means[1:], strict=False))
    assert found["DSC_AUC"] == pytest.approx(area, abs=1e-4) and found["DSC_Final"] == 1 and found["NSD_Final"] == 1
    area = sum((p + q) / 2 for p, q in zip(surfaces, surfaces[1:], strict=False))
    assert found["NSD_AUC"] == pytest.approx(area, abs=1e-4) and case.modality == "CT"


def test_surface_scores_are_zero_where_dice_is_low():
    assert challenge_nsd([0.9, 0.7], 0.2) == 0.0 and challenge_nsd([0.9, 0.7], 0.2001) == pytest.approx(0.8)


def test_without_boxes_nothing_is_predicted_before_the_first_click(tmp_path):
    labels = truth()
    path = write_case(tmp_path / "CT_a.npz", labels, boxes=False, truth_inside=False)
    subject = EachRound({1: [labels == 2], 2: [labels == 7]})
    _, part = measured_case(path, Fake(lambda *_: subject))
    assert [type(p) for p in subject.prompts[1]] == [Point]
    assert [r["dice"] for r in part.rows if r["label"] == 2] == [0, 1, 1, 1, 1, 1]


def test_click_only_methods_begin_with_the_clicks(tmp_path):
    path = write_case(tmp_path / "CT_a.npz", truth())
    _, part = measured_case(path, BaselineMethod("region_growing", multiplier=1.25))
    assert [r["dice"] for r in part.rows if r["click"] == 0] == [0, 0] and all(
        r["dice"] > 0.3 for r in part.rows if r["click"] == 1
    )


def test_one_object_too_many_for_the_boxes_of_the_file_is_no_box(tmp_path):
    labels = truth()
    labels[0, 0, :3] = 9
    path = write_case(tmp_path / "CT_a.npz", labels)
    subject = EachRound({n: [labels == v] for n, v in ((1, 2), (2, 7), (3, 9))})
    measured_case(path, Fake(lambda *_: subject))
    assert [type(p) for p in subject.prompts[1]] == [Point]


# Files


def test_boxes_are_read_as_they_were_written(tmp_path):
    boxes = simulated_boxes(np.where(truth() == 2, 1, 0), 1, np.random.RandomState(0))
    np.savez_compressed(tmp_path / "in.npz", boxes=np.array(boxes, dtype=object))
    assert read_boxes(tmp_path / "in.npz") == boxes
    np.savez_compressed(tmp_path / "none.npz", imgs=truth())
    assert read_boxes(tmp_path / "none.npz") is None
    np.savez_compressed(tmp_path / "plain.npz", boxes=np.arange(2))
    with pytest.raises(InputError, match="boxes must be dicts with z_min z_max z_mid .*, got 0: "):
        read_boxes(tmp_path / "plain.npz")


class Evil:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_a_file_that_would_run_something_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(tmp_path / "CT_a.npz", "w") as archive:
        archive.writestr("boxes.npy", header.getvalue() + pickle.dumps([Evil()]))
    with pytest.raises(InputError, match=r"npz has no readable 'boxes': .*CT_a.npz \(it names builtins.eval\)"):
        read_boxes(tmp_path / "CT_a.npz")


def test_bad_files_are_named(tmp_path):
    labels = truth()
    path = write_case(tmp_path / "CT_a.npz", labels)
    (case,) = find_cases([tmp_path], TrainingHistory(), "all").cases
    loaded = case.loaded()
    volume, found = loaded.volume, loaded.labels
    assert np.array_equal(found, labels) and volume.grid.spacing_xyz_mm == SPACING
    np.savez_compressed(path, imgs=labels, spacing=[1, 1])
    with pytest.raises(InputError, match="npz must hold gts, or have it in .*gts.CT_a.npz"):
        find_cases([tmp_path], TrainingHistory(), "all").cases[0].loaded()
    np.savez_compressed(path, imgs=labels, gts=labels, spacing=[1, 0, 1])
    with pytest.raises(InputError, match=r"spacing must be three numbers > 0, got \[1.0, 0.0, 1.0\]"):
        find_cases([tmp_path], TrainingHistory(), "all").cases[0].loaded()
    np.savez_compressed(path, imgs=labels, gts=labels[1:], spacing=[1, 1, 1])
    with pytest.raises(InputError, match="image and label must share one grid: imgs is"):
        find_cases([tmp_path], TrainingHistory(), "all").cases[0].loaded()
    listed = np.empty(1, object)
    listed[0] = {"z_min": 1}
    np.savez_compressed(path, imgs=labels, gts=labels, spacing=[1, 1, 1], boxes=listed)
    with pytest.raises(InputError, match="boxes must be dicts with z_min z_max z_mid"):
        find_cases([tmp_path], TrainingHistory(), "all").cases[0].loaded()


def test_without_surface_distances_the_surface_scores_are_missing():
    who = {"source": "a", "case": "c", "seed": 0}
    rows = [who | {"click": click, "dice": 0.5} for click in range(6)]
    scores = {line["score"]: line["value"] for line in protocol_of("cvpr25").own_scores(rows)}
    assert scores["DSC_AUC"] == 2.0 and scores["DSC_Final"] == 0.5
    assert np.isnan(scores["NSD_AUC"]) and np.isnan(scores["NSD_Final"])

"""Measuring: complete rows, the split that a model was kept from, figures that follow from the rows by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samed3d.data.corpus import in_validation
from samed3d.data.exposure import TrainingHistory
from samed3d.errors import InputError
from samed3d.evaluation.baselines import BaselineSession
from samed3d.evaluation.cases import find_cases
from samed3d.evaluation.methods import method_of
from samed3d.evaluation.results import FIELDS
from samed3d.evaluation.run import evaluate
from samed3d.evaluation.statistics import summarise
from samed3d.geometry import Grid
from samed3d.metrics import dice
from samed3d.models import MODELS, create_model
from samed3d.models.weights import save_weights
from samed3d.prompts import Box, Point, prompt_from_json
from samed3d.volume import Volume, write_volume
from tests.known_methods import Fake, Scripted, measured
from tests.nnunet_tree import RAS, scene, write_set

SEEN = next(f"s{i}" for i in range(99) if not in_validation(f"s{i}", 0.2))
UNSEEN = next(f"s{i}" for i in range(99) if in_validation(f"s{i}", 0.2))


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def two_sets(folder: Path) -> Path:
    """Sets ``one`` (an unseen and a trained subject) and ``two`` (a trained one), and one of label maps only."""
    subjects = [{"case": "a", "subject": UNSEEN}, {"case": "b", "subject": SEEN}]
    write_set(folder / "one", {"a": 0, "b": 1}, cases=subjects, modality="CT")
    write_set(folder / "two", {"c": 2}, cases=[{"case": "c", "subject": SEEN}], modality="MR")
    write_set(folder / "maps", {"d": 3}, channels=0)
    return folder


def without_cost(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if k not in ("seconds", "encode_seconds", "peak_mib")}


def tiny_checkpoint(path: Path, **training: Any) -> Path:
    """Random weights of the tiny network, with the header of a training run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("samed3d_unet", **MODELS["samed3d_unet"].tiny)
    data = {"validation_share": 0.2, "split_seed": 0, "hold_out": []} | training
    save_weights(model, path, {"step": 1, "training": {"data": data}})
    return path


# One structure


def one_label() -> tuple[Volume, np.ndarray]:
    image, labels = scene(0)
    return Volume(image, RAS, "memory"), np.where(labels == 1, 1, 0)


def test_a_perfect_mask_gets_no_further_click_and_repeats_its_row():
    volume, labels = one_label()
    method = Fake(lambda *_: Scripted(labels == 1))
    rows = measured(method, volume, labels, clicks=5).rows
    assert len(method.opened[0].prompts) == 1 and [r["click"] for r in rows] == [1, 2, 3, 4, 5]
    assert all(r["dice"] == 1 and r["obeyed"] == 1 and r["hd95_mm"] == 0 for r in rows)
    assert [r["seconds"] for r in rows[1:]] == [0.0] * 4 and [r["added_voxels"] for r in rows] == [
        int(labels.sum()),
        0,
        0,
        0,
        0,
    ]


def test_clicks_are_in_ijk_first_inside_then_at_the_centre_of_the_error():
    volume, labels = one_label()
    target, nothing = labels == 1, np.zeros(labels.shape, bool)
    method = Fake(lambda *_: Scripted(nothing, nothing, target))
    rows = measured(method, volume, labels, clicks=4).rows
    given = method.opened[0].prompts
    assert [r["dice"] for r in rows] == [0, 0, 1, 1] and [r["obeyed"] for r in rows] == [0, 0, 1, 1]
    assert all(p.positive and p.space == "ijk" for p in given) and len(given) == 3
    (i, j, k), centre = given[0].at, given[1].at
    assert target[int(k), int(j), int(i)]
    found = np.argwhere(target)[:, ::-1]
    assert np.abs(np.array(centre) - found.mean(axis=0)).max() <= 1.5 and given[2].at == centre
    diagonal = float(np.linalg.norm(np.multiply(labels.shape, RAS.spacing_zyx_mm)))
    assert (
        rows[0]["hd95_mm"] == pytest.approx(diagonal, abs=1e-4)
        and rows[0]["nsd"] == 0
        and rows[0]["volume_error"] == -1
    )


def test_surplus_voxels_get_a_negative_click():
    volume, labels = one_label()
    method = Fake(lambda *_: Scripted(np.ones(labels.shape, bool)))
    rows = measured(method, volume, labels, clicks=2).rows
    assert [p.positive for p in method.opened[0].prompts] == [True, False] and [r["obeyed"] for r in rows] == [1, 0]
    assert [r["positive"] for r in rows] == [1, 0]
    assert rows[0]["dice"] == pytest.approx(dice(np.ones(labels.shape, bool), labels == 1), abs=1e-5)


def test_small_structures_are_passed_over():
    volume, labels = one_label()
    assert measured(Fake(lambda *_: Scripted(labels)), volume, labels, min_voxels=int(labels.sum()) + 1).rows == []


def test_a_mask_of_another_shape_is_refused():
    volume, labels = one_label()
    with pytest.raises(
        InputError, match=r"mask of 'fake' must have the image's shape \(20, 24, 28\) \(D, H, W\), got \(3, 3, 3\)"
    ):
        measured(Fake(lambda *_: Scripted(np.ones((3, 3, 3)))), volume, labels)


def test_every_prompt_can_be_given_again():
    """``prompts.jsonl`` leads to the same masks."""
    volume, labels = one_label()
    part = measured(method_of("region_growing"), volume, labels, clicks=3)
    (line,) = part.lines
    again = BaselineSession("region_growing", volume)
    for row, turn in zip(part.rows, line["turns"], strict=False):
        for entry in turn["prompts"]:
            again.add(prompt_from_json(entry))
        assert row["dice"] == round(dice(again.mask_of(1), labels == 1), 5)
    assert line["label"] == 1 and line["image"] == "image" and [t["click"] for t in line["turns"]] == [1, 2, 3]


# Region growing


def test_region_growing_finds_a_bright_cuboid_and_ignores_negative_clicks():
    image, labels = scene(0)
    grown = BaselineSession("region_growing", Volume(image, RAS, "memory"), multiplier=4.0)
    k, j, i = np.argwhere(labels == 1).mean(axis=0).round()
    grown.add(Point((i, j, k)), object_id=7)
    mask = grown.mask_of(7)
    assert mask.dtype == np.uint8 and dice(mask.astype(bool), labels == 1) > 0.9
    grown.add(Point((0.0, 0.0, 0.0), positive=False), object_id=7)
    assert np.array_equal(grown.mask_of(7), mask)
    with pytest.raises(InputError, match="region_growing takes points only, got a box"):
        grown.add(Box((0, 0, 0), (3, 3, 3)))
    with pytest.raises(InputError, match="point must lie inside the volume"):
        grown.add(Point((99.0, 0.0, 0.0)))


# Cases


def test_groups_of_a_split():
    split = TrainingHistory(0.2, 0, ("held",), frozenset({"free"}))
    assert [
        split.side(*one) for one in (("held", [SEEN]), ("free", [SEEN]), ("free", [UNSEEN]), ("other", [SEEN]))
    ] == [
        "held-out source",
        "trained on",
        "unseen subject",
        "unseen source",
    ]


def test_sides_of_the_split(tmp_path):
    folder = two_sets(tmp_path / "data")
    split = TrainingHistory(0.2, 0, ("two",), frozenset({"one"}))
    sides = {
        which: [(c.source, c.case, c.group) for c in find_cases([folder], split, which).cases]
        for which in ("val", "train", "all")
    }
    assert sides["val"] == [("one", "a", "unseen subject"), ("two", "c", "held-out source")]
    assert sides["train"] == [("one", "b", "trained on")]
    assert len(sides["all"]) == 3, "label maps have no image to click on"
    assert [c.case for c in find_cases([folder / "one", folder / "two"], split, "all", limit=1).cases] == ["a", "c"]
    case = find_cases([folder / "one"], split, "val").cases[0]
    assert (case.subject, case.modality, case.names) == (UNSEEN, "CT", {0: "background", 1: "bright", 2: "dark"})
    loaded = case.loaded()
    volume, labels = loaded.volume, loaded.labels
    assert np.array_equal(volume.array, scene(0)[0]) and np.array_equal(labels, scene(0)[1])


def test_bad_sides_empty_sides_and_other_grids_are_named(tmp_path):
    folder = two_sets(tmp_path / "data")
    with pytest.raises(InputError, match="split must be one of val, train, all, got 'test'"):
        find_cases([folder], TrainingHistory(), "test")
    with pytest.raises(InputError, match="no labelled case on side 'val' of the split in .*two"):
        find_cases([folder / "two"], TrainingHistory(0.2), "val")
    image = folder / "two" / "imagesTr" / "c_0000.nii.gz"
    write_volume(image, scene(2)[0], Grid(RAS.shape_zyx, (1.0, 1.5, 3.0), RAS.origin_lps_mm, RAS.direction_lps))
    with pytest.raises(InputError, match=r"share one grid: .* differ by up to 19 mm: .*c_0000.nii.gz and .*c.nii.gz"):
        find_cases([folder / "two"], TrainingHistory(), "all").cases[0].loaded()


# Whole runs


def test_rows_are_complete_for_a_network_and_a_baseline(tmp_path):
    folder, weights = two_sets(tmp_path / "data"), tiny_checkpoint(tmp_path / "tiny.safetensors", hold_out=["two"])
    out = evaluate([folder], [str(weights), "region_growing"], tmp_path / "out", clicks=(1, 3), seeds=2, split="val")
    rows = rows_of(out)
    assert list(rows[0]) == list(FIELDS)
    keys = [(r["model"], r["source"], r["case"], int(r["label"]), int(r["seed"]), int(r["click"])) for r in rows]
    wanted = {
        (model, source, case, label, seed, click)
        for model in (str(weights), "region_growing")
        for source, case in (("one", "a"), ("two", "c"))
        for label in (1, 2)  # the speck is too small to be measured
        for seed in (0, 1)
        for click in (1, 2, 3)
    }
    assert len(keys) == len(set(keys)) and set(keys) == wanted
    assert {(r["source"], r["group"], r["modality"], r["subject"]) for r in rows} == {
        ("one", "unseen subject", "CT", UNSEEN),
        ("two", "held-out source", "MR", SEEN),
    }
    assert {(r["label"], r["name"]) for r in rows} == {("1", "bright"), ("2", "dark")}
    assert all(int(r["voxels"]) == int((scene({"a": 0, "c": 2}[r["case"]])[1] == int(r["label"])).sum()) for r in rows)
    assert all(0 <= float(r["dice"]) <= 1 for r in rows)
    body = json.loads((out / "results.json").read_text())
    assert body["settings"]["kept_from"] == {"validation_share": 0.2, "seed": 0, "hold_out": ["two"]}
    assert (
        body["settings"]["clicks"] == [1, 3]
        and len(body["settings"]["hash"]) == 16
        and {line["click"] for line in body["summary"]} == {1, 3}
    )
    grown = [
        float(r["dice"]) for r in rows if r["model"] == "region_growing" and r["source"] == "one" and r["click"] == "3"
    ]
    (line,) = [
        s
        for s in body["summary"]
        if (s["model"], s["by"], s["value"], s["click"]) == ("region_growing", "source", "one", 3)
    ]
    assert line["dice"] == pytest.approx(np.mean(grown), abs=1e-4) and (line["subjects"], line["measurements"]) == (
        1,
        4,
    )
    assert sorted(p.name for p in out.iterdir()) == ["cases.csv", "prompts.jsonl", "results.json"]


def test_the_same_seed_gives_the_same_rows(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    weights = tiny_checkpoint(tmp_path / "tiny.safetensors")
    outs = [
        evaluate([tmp_path / "set"], [str(weights)], tmp_path / name, clicks=(3,), split="all") for name in ("x", "y")
    ]
    one, other = ([without_cost(row) for row in rows_of(out)] for out in outs)
    assert one == other and len(one) == 6


def test_limits_choose_structures_the_same_way_each_time(tmp_path):
    write_set(tmp_path / "set", {"a": 0, "b": 1, "c": 2})
    limits = {"clicks": (1,), "split": "all", "limit": 2, "labels_per_case": 1}
    outs = [evaluate([tmp_path / "set"], ["region_growing"], tmp_path / name, **limits) for name in "xy"]
    chosen = [[(r["case"], r["label"]) for r in rows_of(out)] for out in outs]
    assert chosen[0] == chosen[1] and [case for case, _ in chosen[0]] == ["a", "b"]


def test_results_of_another_configuration_are_kept(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    data, out = [tmp_path / "set"], tmp_path / "out"
    evaluate(data, ["region_growing"], out, clicks=(1,), split="all")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        InputError, match=r"holds results of another configuration \(other clicks, ask\): .*out; choose another"
    ):
        evaluate(data, ["region_growing"], out, clicks=(2,), split="all")
    with pytest.raises(InputError, match=r"another configuration \(other models\)"):
        evaluate(data, ["dilated_ball"], out, clicks=(1,), split="all")
    assert evaluate(data, ["region_growing"], out, clicks=(1,), split="all") == out, "the same again: nothing to do"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "results.json").unlink()
    with pytest.raises(InputError, match=r"another configuration \(other .*\)"):
        evaluate(data, ["region_growing"], out, clicks=(1,), split="all")


def test_a_failed_run_leaves_nothing_that_looks_like_results(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    with pytest.raises(InputError, match="no checkpoint or file is called 'nothing'"):
        evaluate([tmp_path / "set"], ["nothing"], tmp_path / "out", split="all")
    with pytest.raises(InputError, match="no labelled case on side 'train'"):
        evaluate([tmp_path], ["region_growing"], tmp_path / "out", split="train", limit=0)
    assert not (tmp_path / "out").exists()


# Summary


def row(subject: str, value: float, *, click: int = 1, source: str = "x", seconds: float = 1.0) -> dict[str, Any]:
    found = {"model": "m", "group": "unseen subject", "source": source, "subject": subject, "click": click}
    found |= {"protocol": "samed3d", "policy": "centre", "prompt": "click"}
    return found | {"dice": value, "obeyed": int(value > 0.5), "seconds": seconds}


def test_summary_by_hand():
    rows = [row("p", 0.2, seconds=3.0), row("p", 0.6), row("q", 1.0, source="y"), row("q", 0.9, click=2)]
    lines = {(s["by"], s["value"], s["click"]): s for s in summarise(rows, (1, 2))}
    group = ("group", "unseen subject")
    assert set(lines) == {(*group, 1), (*group, 2), ("source", "x", 1), ("source", "x", 2), ("source", "y", 1)}
    whole = lines[*group, 1]
    assert (whole["dice"], whole["subjects"], whole["measurements"]) == (0.6, 2, 3)
    assert whole["obeyed"] == pytest.approx(2 / 3, abs=1e-4) and whole["median_seconds"] == 1.0
    assert whole["interval"] == [0.4, 1.0], "all draws of p alone to all draws of q alone"
    assert lines["source", "x", 1]["interval"] is None, "one subject says nothing of others"
    assert lines[*group, 2]["dice"] == 0.9


def test_intervals_are_over_subjects_not_over_structures():
    """Many structures of one subject do not make the figure surer."""
    few = summarise([row(f"p{i}", i / 10) for i in range(10)], (1,))[0]
    many = summarise([row(f"p{i}", i / 10) for i in range(10) for _ in range(50)], (1,))[0]
    assert (
        few["interval"] == many["interval"]
        and few["interval"][0] < few["dice"] - 0.1 < few["dice"] + 0.1 < few["interval"][1]
    )


def test_the_split_of_the_first_trained_checkpoint_counts(tmp_path):
    first = tiny_checkpoint(tmp_path / "a.safetensors", validation_share=0.4, split_seed=7, hold_out=["z"])
    second = tiny_checkpoint(tmp_path / "b.safetensors")
    assert TrainingHistory.of_models(["region_growing", str(second), str(first)]).kept_from["seed"] == 0
    assert TrainingHistory.of_models(["region_growing"]).side("any", [SEEN]) == "unseen source"

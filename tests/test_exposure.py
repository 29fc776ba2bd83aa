"""What a model was trained on: sides by name, images known again by content, and what evaluation says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samed3d.cli import main
from samed3d.data.corpus import image_hash
from samed3d.data.exposure import TrainingHistory
from samed3d.evaluation.cases import find_cases
from samed3d.models import MODELS, create_model
from samed3d.models.weights import find_checkpoint, save_weights
from samed3d.volume import read_volume
from tests.nnunet_tree import write_set

SPLIT = {"data": {"validation_share": 0.2, "split_seed": 0, "hold_out": ["held"]}}
TUNED = {"trained_on": {"own": ["p1"]}, "base": {"history": {"training": SPLIT, "sources": ["known"]}}}


@pytest.mark.parametrize(
    ("header", "source", "sides"),
    [
        ({"training": SPLIT, "sources": ["known"]}, "known", {"trained on", "unseen subject"}),
        ({"training": SPLIT, "sources": ["known"]}, "other", {"unseen source"}),
        ({"training": SPLIT, "sources": ["known"]}, "held", {"held-out source"}),
        ({"training": SPLIT}, "other", {"perhaps trained on", "unseen subject"}),
        ({}, "other", {"unknown"}),
        (TUNED, "own", {"trained on", "unseen subject"}),
        (TUNED, "known", {"trained on", "unseen subject"}),
        (TUNED, "other", {"unseen source"}),
        ({"trained_on": {"own": ["p1"]}, "base": {"history": {}}}, "other", {"unknown"}),
    ],
)
def test_the_side_of_a_case(header, source, sides):
    history = TrainingHistory.of_header(header)
    assert {history.side(source, [f"p{n}"]) for n in range(40)} == sides


def test_of_several_models_the_one_that_knows_the_subject_counts(tmp_path):
    checkpoints = [checkpoint(tmp_path / f"{name}.safetensors", trained_on={name: ["p1"]}) for name in "ab"]
    both = TrainingHistory.of_models([str(path) for path in checkpoints])
    assert [both.side(name, ["p1"]) for name in "abc"] == ["trained on", "trained on", "unseen source"]
    assert TrainingHistory.of_models(["external:x", "region_growing"]).side("a", ["p1"]) == "unknown"
    assert TrainingHistory.of_models(["region_growing", "samed3d_unet"]).side("a", ["p1"]) == "unseen source"


def checkpoint(path: Path, **facts) -> Path:
    save_weights(create_model("samed3d_unet", **MODELS["samed3d_unet"].tiny), path, facts)
    return path


REWRITINGS = {
    "as float32": lambda image: sitk.Cast(image, sitk.sitkFloat32),
    "scaled": lambda image: sitk.Cast(image, sitk.sitkFloat64) * 0.37 - 1024,
    "stored backwards": lambda image: sitk.Flip(image, [True, False, True]),
    "axes exchanged": lambda image: sitk.PermuteAxes(image, [2, 0, 1]),
}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_an_image_is_known_again_after_every_rewriting(rewriting, suffix, tmp_path):
    folder = write_set(tmp_path / "set", {"a": 0})
    path = folder / "imagesTr" / "a_0000.nii.gz"
    rewritten = tmp_path / f"again{suffix}"
    sitk.WriteImage(REWRITINGS[rewriting](sitk.ReadImage(str(path))), str(rewritten))
    assert image_hash(read_volume(rewritten).array) == image_hash(read_volume(path).array) != ""


def test_other_images_have_other_hashes_and_empty_ones_none():
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(16, 26, 40)) for _ in range(20)]
    assert len({image_hash(image) for image in images}) == 20
    noisy = images[0] + rng.normal(scale=0.05, size=images[0].shape)
    assert image_hash(noisy) != image_hash(images[0]) and image_hash(np.zeros((5, 5, 5))) == ""


@pytest.fixture
def known(tmp_path) -> tuple[Path, Path]:
    """Twelve patients under a name that the checkpoint does not know, of two of whom it knows the images."""
    folder = write_set(tmp_path / "renamed", {f"p{n}": n for n in range(12)})
    images = {
        image_hash(read_volume(folder / "imagesTr" / f"p{n}_0000.nii.gz").array): f"first/patient{n}" for n in (3, 7)
    }
    facts = {"training": SPLIT, "sources": ["first"], "training_images": images}
    return folder, checkpoint(tmp_path / "model.safetensors", **facts)


@pytest.mark.parametrize(("split", "cases"), [("val", 10), ("train", 2), ("all", 12)])
def test_unknown_sources_are_measured_whole_but_for_known_images(split, cases, known):
    folder, weights = known
    found = find_cases([folder], TrainingHistory.of_models([str(weights)]), split)
    assert len(found.cases) == cases
    sides = {case.case: case.group for case in found.cases}
    assert {sides.get("p3", "trained on"), sides.get("p7", "trained on")} == {"trained on"}
    assert {side for case, side in sides.items() if case not in ("p3", "p7")} <= {"unseen source"}
    assert sum(map(len, found.left_out.values())) == 12 - cases


def test_what_is_left_out_is_counted_and_named_everywhere(known, tmp_path, capsys):
    folder, weights = known
    out = tmp_path / "out"
    words = ["evaluate", str(folder), "--model", str(weights), "--clicks", "1", "--labels-per-case", "1"]
    assert main([*words, "--no-surfaces", "-o", str(out)]) == 0
    line = "eft out 2 cases, trained on: renamed/p3 (is first/patient3), renamed/p7 (is first/patient7)"
    shown = capsys.readouterr()
    assert line in shown.out and line in shown.err and line in (out / "report.html").read_text()
    body = json.loads((out / "results.json").read_text())
    assert [len(names) for names in body["left_out"].values()] == [2]
    assert "unseen source" in shown.out and "1 click" in shown.out  # the table
    assert (out / "scores.csv").read_text().count("unseen source") >= 2
    assert (out / "per_label.csv").read_text().startswith("model,protocol,policy,prompt,source,label,name,click,dice")
    assert r"\toprule" in (out / "scores.tex").read_text()
    assert "<svg" in (out / "figures" / "dice_samed3d_centre_clicks.svg").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 10 and 0 <= summary["foreground_mean"]["Dice"] <= 1
    for name in ("scores.csv", "per_label.csv", "scores.tex", "summary.json", "dice_samed3d_centre_clicks.svg"):
        assert f'download="{name}"' in (out / "report.html").read_text()


def test_a_folder_in_another_layout_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "plain", {"a": 0, "b": 1})
    (folder / "dataset.json").unlink()
    for path in folder.glob("imagesTr/*"):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    words = ["evaluate", str(folder), "--model", "dilated_ball", "--clicks", "1", "--no-surfaces", "--no-report"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"][0]["subjects"] == 2


def test_the_default_knows_the_images_that_it_was_trained_on(data_dir):
    path = data_dir / "msd_hippocampus" / "imagesTr" / "hippocampus_003_0000.nii.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert find_checkpoint("default") is not None
    history = TrainingHistory.of_models(["default"])
    known_as = history.known_image(image_hash(read_volume(path).array))
    assert known_as == "msd_hippocampus/hippocampus_003"

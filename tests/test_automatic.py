"""Automatic models from the command line: an image in, all classes out, and one line where something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.inference.sliding_window import is_semantic, segment_file, segment_volume
from samed3d.models import MODELS, create_model
from samed3d.models.weights import save_weights
from samed3d.volume import read_volume
from tests.corpus_sources import make_source


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("sam3d", **{**MODELS["sam3d"].tiny, "class_names": ("liver", "kidney")})
    save_weights(model, tmp_path / "auto.safetensors", {})
    return tmp_path / "auto.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "abdomen")


def image_of(source: Path) -> Path:
    return sorted((source / "imagesTr").iterdir())[0]


def test_segment_writes_a_label_map_on_the_images_grid(tmp_path, weights, source, capsys):
    image, out = image_of(source), tmp_path / "labels.nii.gz"
    assert (
        main(["segment", str(image), "--model", str(weights), "-o", str(out), "--report", str(tmp_path / "r.json")])
        == 0
    )
    volume, labels = read_volume(image), read_volume(out)
    assert labels.grid == volume.grid
    from samed3d.models import load

    np.testing.assert_array_equal(labels.array, segment_volume(volume, load(weights)))
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(o["name"], o["voxels"]) for o in report["objects"]] == [
        (name, int((labels.array == n).sum())) for n, name in enumerate(("liver", "kidney"), start=1)
    ]
    assert "liver: " in capsys.readouterr().out


def test_classes_keep_their_names_as_segments(tmp_path, weights, source):
    summary = segment_file(image_of(source), weights, tmp_path / "labels.seg.nrrd")
    text = (tmp_path / "labels.seg.nrrd").read_bytes()[:4000]
    found = [o["name"] for o in summary["objects"] if o["voxels"]]
    assert found and all(name.encode() in text for name in found)


def test_an_automatic_model_is_told_from_others_by_its_header(weights, tmp_path):
    assert is_semantic(weights) and not is_semantic("default") and not is_semantic("region_growing")


def test_prompts_for_an_automatic_model_are_refused_in_one_line(tmp_path, weights, source, capsys):
    out = tmp_path / "labels.nii.gz"
    assert main(["segment", str(image_of(source)), "--model", str(weights), "-o", str(out), "--point", "1,1,1"]) == 2
    assert "is automatic and takes no prompts, got a prompt" in capsys.readouterr().err and not out.exists()
    with pytest.raises(InputError, match=r"sam3d takes 1 images per case, got 2"):
        segment_file([image_of(source)] * 2, weights, out)


def test_evaluate_measures_its_classes(tmp_path, weights, source, capsys):
    out = tmp_path / "eval"
    assert (
        main(["evaluate", str(source), "--model", str(weights), "-o", str(out), "--split", "all", "--limit", "2"]) == 0
    )
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert {line["value"] for line in summary if line["by"] == "name"} == {"liver", "kidney"}
    assert (out / "report.html").exists()
    both = ["--model", str(weights), "--model", "region_growing"]
    assert main(["evaluate", str(source), *both, "-o", str(tmp_path / "both")]) == 2
    assert "semantic segmentation models are measured apart from others" in capsys.readouterr().err

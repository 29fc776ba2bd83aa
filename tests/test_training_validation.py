"""Validation during a run: which volumes, by which clicks, the best checkpoint, and that training does not
notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samed3d.config import TrainConfig, load_config
from samed3d.data.corpus import CaseRecord, Corpus, in_validation
from samed3d.errors import InputError
from samed3d.evaluation.cases import corpus_volume
from samed3d.evaluation.measuring import dice_by_click
from samed3d.geometry import Grid
from samed3d.models import load
from samed3d.models.weights import read_header
from samed3d.training import validation
from samed3d.training.loop import train
from samed3d.training.start import make_accelerator
from samed3d.training.validation import Validation, held_cases
from samed3d.volume import Volume
from tests.corpus_sources import store_case, store_corpus
from tests.test_training import SMALL, metrics, narrow_model

SHAPE = (20, 24, 28)
SUBJECTS = [f"p{i}" for i in range(8)]
SHARE = 0.4
HELD = [s for s in SUBJECTS if in_validation(s, SHARE)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources ``a`` and ``b`` of the same subjects, each image with a bright block, a dark one and a speck."""
    folder = tmp_path_factory.mktemp("corpus")
    for source in "ab":
        for number, subject in enumerate(SUBJECTS):
            labels = np.zeros(SHAPE, np.uint8)
            labels[2:9, 3:12, 4:13] = 1
            labels[12:18, 10:20, 12:24] = 2
            labels[1, 1, 1:4] = 3
            noise = np.random.default_rng(number).normal(0, 5, SHAPE)
            store_case(folder, source, subject, (noise + np.choose(labels, [0, 90, -90, 40])).astype(np.int16), labels)
    return store_corpus(folder)


def config_of(corpus: Path, folder: Path, *more: str) -> TrainConfig:
    data = [
        f"data.corpus=[{corpus}]",
        "data.synthetic_share=0",
        f"data.validation_share={SHARE}",
        "data.fill=[0.4,0.9]",
    ]
    checks = [
        "validation.every=2",
        "validation.cases=3",
        "validation.clicks=2",
        "optim.steps=4",
        "validation.images=false",
    ]
    return load_config(TrainConfig, None, [*SMALL, *data, *checks, f"run.folder={folder}", *more])


def test_the_held_back_subjects_are_measured_spread_over_sources(corpus, tmp_path):
    assert 1 < len(HELD) < len(SUBJECTS), "the split must divide the subjects of this test"
    held = held_cases(config_of(corpus, tmp_path, "validation.cases=4"))
    assert {h.case.subject for h in held} <= set(HELD) and len(held) == 4
    assert sorted(h.case.source for h in held) == ["a", "a", "b", "b"]
    assert all(label.voxels >= validation.MIN_VOXELS for h in held for label in h.labels), "a speck is not measured"
    again = held_cases(config_of(corpus, tmp_path, "validation.cases=4"))
    assert [h.case.id for h in again] == [h.case.id for h in held]
    everything = held_cases(config_of(corpus, tmp_path, "validation.cases=99"))
    assert sorted(h.case.id for h in everything) == sorted(f"{s}.{p}" for s in "ab" for p in HELD)
    assert {h.case.id for h in held_cases(config_of(corpus, tmp_path, "validation.cases=2", "validation.seed=5"))} != {
        h.case.id for h in held_cases(config_of(corpus, tmp_path, "validation.cases=2"))
    } or len(HELD) == 1


def test_held_out_sources_are_measured_only_when_asked_for(corpus, tmp_path):
    settings = ["data.hold_out=[b]", "validation.cases=99"]
    assert {h.case.source for h in held_cases(config_of(corpus, tmp_path, *settings))} == {"a"}
    both = held_cases(config_of(corpus, tmp_path, *settings, "validation.hold_out=true"))
    assert {h.case.source for h in both} == {"a", "b"}
    assert {h.case.subject for h in both if h.case.source == "b"} == set(SUBJECTS), "nobody of it is trained on"


def test_a_volume_is_the_stored_image_in_its_own_axes(corpus, tmp_path):
    held = held_cases(config_of(corpus, tmp_path))[0]
    volume = corpus_volume(held.corpus, held.case)
    assert np.array_equal(volume.view.to_canonical(volume.array), Corpus(corpus).image(held.case)[:])
    assert volume.grid.shape_zyx == SHAPE and volume.view.flips == (False, False, False)


class Painter:
    """A session that paints a half of the target at each click and keeps the clicks."""

    def __init__(self, target: np.ndarray) -> None:
        self.target, self.mask, self.clicks = target, np.zeros(target.shape, np.uint8), []

    def add(self, prompt: Any, object_id: int) -> None:
        self.clicks.append(prompt)
        part = slice(0, SHAPE[0] // 2) if len(self.clicks) == 1 else slice(0, SHAPE[0])
        self.mask[part] = self.target[part]

    def mask_of(self, object_id: int) -> np.ndarray:
        return self.mask


def test_clicks_follow_the_error_and_a_perfect_mask_keeps_its_dice():
    target = np.zeros(SHAPE, bool)
    target[6:14, 4:12, 4:12] = True  # 4 of 8 slices lie in the lower half
    painter = Painter(target)
    volume = Volume(np.zeros(SHAPE, np.float32), Grid(SHAPE), "memory")
    found = dice_by_click(painter, volume, target, 4, np.random.default_rng(0))
    assert found == pytest.approx([2 / 3, 1.0, 1.0, 1.0]) and len(painter.clicks) == 2
    first, second = (tuple(int(v) for v in reversed(p.at)) for p in painter.clicks)
    assert target[first] and target[second] and second[0] >= 10, "the second click is in what was missed"


def test_the_best_is_chosen_by_the_last_click_and_pictures_are_written(corpus, tmp_path, monkeypatch):
    dice = iter([[0.5, 0.6], [0.9, 0.5]])
    monkeypatch.setattr(
        Validation, "measure", lambda self, model, step, stopped: validation.ValidationResult(next(dice), 3, 0.1)
    )
    folder = train(config_of(corpus, tmp_path / "run"), quiet=True)
    rows = [r for r in metrics(folder) if "validation_dice" in r]
    assert [(r["step"], r["validation_dice"], r["structures"]) for r in rows] == [
        (2, [0.5, 0.6], 3),
        (4, [0.9, 0.5], 3),
    ]
    header = read_header(folder / "best.safetensors")
    assert (header["step"], header["validation_dice"]) == (2, 0.6)
    assert torch.load(folder / "last.pt", weights_only=True)["best"] == 0.6
    assert read_header(folder / "model.safetensors")["step"] == 4
    assert "Dice on held-out volumes" in (folder / "curves.svg").read_text()


def test_a_whole_run_measures_the_running_mean_and_training_does_not_notice(corpus, tmp_path):
    """The validated numbers are those of the saved mean weights, and the losses are those of a run without
    validation."""
    shown = ["run.ema=0.5", "validation.images=true", "validation.structures=1", "run.save_every=2"]
    folder = train(config_of(corpus, tmp_path / "run", *shown), quiet=True)
    plain = train(config_of(corpus, tmp_path / "plain", "run.ema=0.5", "validation.every=0"), quiet=True)
    assert [r["loss"] for r in metrics(folder) if "loss" in r] == [r["loss"] for r in metrics(plain)]
    row = [r for r in metrics(folder) if "validation_dice" in r][-1]
    config = config_of(corpus, tmp_path / "again", *shown)
    found = Validation(config, make_accelerator(config), tmp_path).measure(
        load(folder / "model.safetensors"), 9, lambda: False
    )
    assert row["validation_dice"] == [round(v, 4) for v in found.dice] and row["structures"] == found.structures == 3
    assert len(list((folder / "validation").glob("step_000004_*.png"))) == 3
    assert found.dice != [0.0, 0.0]


def test_a_stop_ends_a_validation_and_its_numbers_do_not_count(corpus, tmp_path):
    config = config_of(corpus, tmp_path)
    measure = Validation(config, make_accelerator(config), tmp_path).measure
    assert measure(narrow_model().eval(), 1, lambda: True) is None
    assert not list(tmp_path.iterdir())


def test_a_damaged_case_is_passed_over(corpus, tmp_path, monkeypatch, caplog):
    config = config_of(corpus, tmp_path)
    whole = Validation(config, make_accelerator(config), tmp_path)
    bad = whole.held[0].case.id
    read = validation.corpus_volume

    def damaged(corpus: Corpus, case: CaseRecord) -> Volume:
        if case.id == bad:
            raise OSError("cut off")
        return read(corpus, case)

    monkeypatch.setattr(validation, "corpus_volume", damaged)
    found = whole.measure(narrow_model().eval(), 1, lambda: False)
    assert found.structures == 2 * 2 and f"leaves out a damaged case: {bad} (cut off)" in caplog.text


def test_nothing_to_measure_is_refused_before_the_run(corpus, tmp_path):
    with pytest.raises(
        InputError,
        match=r"validation\.every is 2, but no labelled image of .* is held out; raise data\.validation_share",
    ):
        train(config_of(corpus, tmp_path / "run", "data.validation_share=0"), quiet=True)
    with pytest.raises(InputError, match=r"no labelled image of data\.corpus \(empty\) is held out"):
        train(
            load_config(TrainConfig, None, [*SMALL, "validation.every=1", f"run.folder={tmp_path / 'b'}"]), quiet=True
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_on_real_images_a_mask_comes_back_on_the_stored_grid(data_dir, tmp_path):
    """Three hippocampi through preparation, split and click loop."""
    from samed3d.volume import read_volume
    from samed3d.volume.label_maps import read_label_map

    for path in sorted((data_dir / "msd_hippocampus" / "labelsTr").glob("*.nii.gz"))[:3]:
        labels, grid = read_label_map(path)
        volume = read_volume(next((data_dir / "msd_hippocampus" / "imagesTr").glob(f"{path.name[:-7]}_0000.nii.gz")))
        view = volume.view
        assert isinstance(grid, Grid)
        store_case(
            tmp_path / "c", "hippocampus", path.name[:-7], view.to_canonical(volume.array), view.to_canonical(labels)
        )
    corpus = store_corpus(tmp_path / "c")
    config = config_of(
        corpus, tmp_path / "run", "data.validation_share=0.99", "validation.cases=1", "validation.images=true"
    )
    checked = Validation(config, make_accelerator(config), tmp_path)
    found = checked.measure(narrow_model().eval(), 1, lambda: False)
    assert found.structures == 2 and all(0 < v < 1 for v in found.dice)
    assert len(list((tmp_path / "validation").glob("*.png"))) == 1

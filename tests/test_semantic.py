"""Automatic models from data to rows: crops with all classes, the loss, a run in the loop, classes measured on whole
volumes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.categories import categorise
from data_prep.pipeline import prepare
from samed3d.config import DataConfig, LossConfig, TrainConfig, load_config
from samed3d.data.corpus import Corpus
from samed3d.data.exposure import TrainingHistory
from samed3d.data.semantic import (
    FOREGROUND_SHARE,
    Intensities,
    SemanticDataset,
    class_map,
    class_names,
    median_spacing_mm,
    target_spacing,
    training_cases,
)
from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, find_cases
from samed3d.evaluation.measuring import measure
from samed3d.evaluation.methods import SemanticMethod
from samed3d.evaluation.protocols.base import EvaluationSettings
from samed3d.evaluation.protocols.semantic import SemanticProtocol, class_values
from samed3d.evaluation.report import write_report
from samed3d.evaluation.results import FIELDS, TEXT, Row, read_rows
from samed3d.evaluation.run import evaluate
from samed3d.evaluation.statistics import summarise
from samed3d.geometry import CropFrame
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import ModelSpec, SemanticModel
from samed3d.training.loop import train
from samed3d.training.semantic import SemanticStep, class_dice, class_dice_loss, semantic_overrides
from tests.corpus_sources import EVERYTHING, store_case, store_corpus


def cuboids(shape: tuple[int, int, int]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[1 : shape[0] // 2, 2:-2, 2:-2] = 1
    labels[shape[0] // 2 : -1, 2:-2, 2:-2] = 2
    return labels


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four cases of two structures that can be told by their brightness, slices of 16 x 16."""
    for number in range(4):
        labels = cuboids((8, 16, 16))
        image = np.random.default_rng(number).normal(0, 5, labels.shape) + 50.0 * labels
        store_case(tmp_path / "corpus", "s", f"case{number}", image.astype(np.int16), labels)
    return store_corpus(tmp_path / "corpus")


def data(corpus: Path, **changes: Any) -> DataConfig:
    return DataConfig(**({"corpus": [str(corpus)], "synthetic_share": 0.0, "validation_share": 0.0} | changes))


def dataset(corpus: Path, length: int = 4, **changes: Any) -> SemanticDataset:
    own = {
        "classes": ("s1", "s2"),
        "shape_zyx": (4, 16, 16),
        "spacing_zyx_mm": None,
        "channels": 1,
        "seed": 3,
        "length": length,
    }
    config = {k: v for k, v in changes.items() if k not in own and k != "start"}
    return SemanticDataset(
        data(corpus, **config), **{**own, **{k: v for k, v in changes.items() if k in own or k == "start"}}
    )


class Bright(SemanticModel):
    """Tells the classes of the made corpus by brightness, in units of the image's deviation."""

    def __init__(self, window: tuple[int, int, int] = (4, 16, 16), names: tuple[str, ...] = ("s1", "s2")) -> None:
        super().__init__()
        self.config = {"class_names": names, "spacing_zyx_mm": None}
        self.spec = ModelSpec("bright", window, classes=3)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return -self.gain * 20 * torch.cat([(image - level).square() for level in (-0.78, 0.45, 1.69)], 1)


# Data


def test_classes_are_named_as_the_one_source_names_them(corpus):
    assert class_names(data(corpus)) == ("s1", "s2")
    assert median_spacing_mm(data(corpus)) == (1.0, 1.0, 1.0)


def test_a_sample_is_the_same_for_the_same_seed_and_number(corpus):
    first, again, later = dataset(corpus), dataset(corpus), dataset(corpus, start=2, length=2)
    for one, other in ((first[2], again[2]), (first[3], later[1])):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["target"], other["target"])
        assert one["index"] == other["index"] and one["case"] == other["case"]
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert first[0]["image"].shape == (1, 4, 16, 16) and first[0]["target"].shape == (1, 4, 16, 16)
    assert first[0]["image"].dtype == torch.float32 and first[0]["target"].dtype == torch.uint8


def test_target_and_image_stay_together_under_flips(corpus):
    samples = dataset(corpus, length=24, augment="flips")
    for sample in (samples[i] for i in range(24)):
        means = [float(sample["image"][sample["target"] == value].mean()) for value in torch.unique(sample["target"])]
        assert means == sorted(means)
        assert all(b - a > 0.5 for a, b in zip(means[:-1], means[1:], strict=True))


def test_a_third_of_the_crops_lies_on_a_class(tmp_path):
    labels = np.zeros((20, 20, 200), np.uint8)
    labels[8:12, 8:12, 100:104] = 1
    store_case(tmp_path, "s", "a", np.random.default_rng(0).integers(0, 99, labels.shape).astype(np.int16), labels)
    corpus = store_corpus(tmp_path)
    samples = dataset(corpus, 150, classes=("s1",), shape_zyx=(8, 8, 8), augment="flips")
    hit = np.mean([bool(samples[i]["target"].any()) for i in range(150)])
    assert FOREGROUND_SHARE - 0.12 < hit < FOREGROUND_SHARE + 0.15


def test_a_class_of_a_later_layer_and_of_another_spacing_is_drawn(corpus):
    case = training_cases(data(corpus))[0][1]
    coarse = class_map(case, {"s2": 7}, CropFrame((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (4, 8, 8)))
    expected = np.where(cuboids((8, 16, 16)) == 2, 7, 0)[1::2, 1::2, 1::2]
    np.testing.assert_array_equal(coarse, expected)
    outside = class_map(case, {"s1": 1}, CropFrame((-6.0, 0.0, 0.0), (1.0, 1.0, 1.0), (8, 16, 16)))
    assert not outside[:6].any() and outside[7].any()


def test_intensities_are_scaled_by_the_whole_image():
    array = np.concatenate([np.zeros((10, 10, 10)), np.full((10, 10, 10), 100.0)]).astype(np.float32)
    known = Intensities.of(array)
    assert (known.low, known.high, known.mean, known.deviation) == (0, 100, 50, 50)
    crop = known.scale(torch.tensor([[[0.0, 100.0, 500.0]]]), torch.tensor([[[True, True, False]]]))
    assert crop.flatten().tolist() == [-1, 1, 0]
    constant = Intensities.of(np.full((3, 3, 3), 7.0))
    assert torch.isfinite(constant.scale(torch.tensor([[[7.0]]]), torch.tensor([[[True]]]))).all()


def test_what_no_case_holds_is_refused(corpus):
    with pytest.raises(
        InputError, match=r"class_names must be categories of the training cases, got liver; .* holds none of them"
    ):
        dataset(corpus, classes=("liver",))
    with pytest.raises(
        InputError, match=r"in_channels must be the number of images per case, got 2; the corpus has \[1\]"
    ):
        dataset(corpus, channels=2)
    with pytest.raises(InputError, match=r"data.corpus must hold labelled images for a semantic segmentation model"):
        class_names(data(corpus, hold_out=["s"]))


def test_a_damaged_case_is_passed_over_and_named(corpus, caplog):
    samples = dataset(corpus, 12)
    bad = next((corpus / "arrays" / "s").glob("case1.image*"))
    bad.write_bytes(b"no array")
    with caplog.at_level(logging.WARNING):
        drawn = [samples[i] for i in range(12)]
    assert all("case1" not in str(s["case"]) for s in drawn) and any("case1" in str(s["skipped"]) for s in drawn)
    assert caplog.text.count("skipping a damaged case") == 1


def test_structures_that_preparation_dropped_are_spoken_of(tmp_path, data_dir, caplog):
    source = data_dir / "msd_hippocampus"
    few = tmp_path / "msd_hippocampus"
    for kind in ("imagesTr", "labelsTr"):
        (few / kind).mkdir(parents=True)
        for file in sorted((source / kind).iterdir())[:3]:
            (few / kind / file.name).symlink_to(file)
    (few / "dataset.json").symlink_to(source / "dataset.json")
    strict = prepare([few], tmp_path / "strict").folder
    lenient = prepare([few], tmp_path / "lenient", EVERYTHING).folder
    with caplog.at_level(logging.WARNING):
        dataset(lenient, classes=("anterior", "posterior"))
        assert not caplog.text
        dataset(strict, classes=("anterior", "posterior"))
    assert "structures of these classes were dropped" in caplog.text and "--rules lenient" in caplog.text


def test_images_of_one_case_are_one_sample(tmp_path, data_dir):
    source = data_dir / "ms_lesions_mni"
    corpus = Corpus(prepare([source], tmp_path / "out", EVERYTHING).folder)
    cases = [case for _, case in training_cases(data(corpus.folder))]
    channels = len(cases[0].images)
    assert channels > 1
    samples = dataset(
        corpus.folder, 1, classes=class_names(data(corpus.folder)), shape_zyx=(4, 16, 16), channels=channels
    )
    assert samples[0]["image"].shape == (channels, 4, 16, 16)


# Step


def test_a_right_answer_costs_nothing_and_a_wrong_one_much():
    numbers = torch.from_numpy(cuboids((8, 16, 16))).long()[None]
    right = 40.0 * torch.nn.functional.one_hot(numbers, 3).movedim(-1, 1)
    assert class_dice_loss(right, numbers) < 1e-4 and class_dice_loss(right.roll(1, 1), numbers) > 0.99
    assert class_dice(right.argmax(1), numbers, 3).tolist() == [[1, 1]]
    half = numbers.where(numbers != 2, 0)
    assert class_dice(half, numbers, 4).tolist() == [[1, 0, 1]]  # class 3 is in neither


def test_coarser_outputs_are_weighed_and_compared_with_a_coarser_truth():
    model = create_model("sam3d", **MODELS["sam3d"].tiny)
    step = SemanticStep(model, LossConfig(dice=0.5, ce=2.0, dice_smooth=1e-5))
    image = torch.randn(2, 1, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (2, 1, 6, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    out = step(image, target, 0)
    expected = 0.0
    for (weight, logits), stride in zip(model.forward_supervised(image), (1, 2, 4), strict=True):
        # nearest-exact takes the voxel at the centre's upper neighbour
        truth = target[:, 0, :, stride // 2 :: stride, stride // 2 :: stride].long()
        expected += weight * (
            0.5 * class_dice_loss(logits, truth) + 2.0 * torch.nn.functional.cross_entropy(logits, truth)
        )
    torch.testing.assert_close(out.loss, expected)
    assert out.dice.shape == (2, 2) and not out.dice.requires_grad


@pytest.mark.parametrize("name", ["sam3d", "ma_sam_b", "sam3d_adapter_auto"])
def test_each_system_fits_one_batch(name, corpus):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = (8, 16, 16) if name == "sam3d_adapter_auto" else (4, 16, 16)
        more = {"input_shape": shape, "class_names": ("s1", "s2")} | (
            {"fact_dropout": 0.0} if name == "ma_sam_b" else {}
        )
        model = create_model(name, **{**MODELS[name].tiny, **more})
    samples = dataset(corpus, 2, shape_zyx=shape, augment="flips")
    batch = [samples[0], samples[1]]
    image, target = (torch.stack([s[key] for s in batch]) for key in ("image", "target"))
    step = SemanticStep(model, LossConfig())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        out = step(image, target, 0)
        out.loss.backward()
        optimiser.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


# Run


def run_config(folder: Path, corpus: Path, *more: str) -> TrainConfig:
    own = [
        *(
            "model.name=sam3d",
            "model.overrides={backbone: sam_vit_tiny, input_shape: [4, 16, 16], widths: [8, 8, 8, 8]}",
        ),
        *(f"data.corpus=[{corpus}]", "data.synthetic_share=0", "data.validation_share=0.3", "data.split_seed=1"),
        *("optim.steps=4", "optim.batch=2", "run.log_every=2", "run.precision=fp32", f"run.folder={folder}"),
    ]
    return load_config(TrainConfig, None, [*own, *more])


def test_a_run_learns_classes_from_the_corpus_and_goes_on_where_it_stopped(tmp_path, corpus):
    more = ("validation.every=2", "validation.cases=1", "validation.images=false")
    whole = train(run_config(tmp_path / "whole", corpus, *more), quiet=True)
    first = train(run_config(tmp_path / "parts", corpus, *more, "optim.schedule=constant", "optim.steps=2"), quiet=True)
    assert json.loads((first / "metrics.jsonl").read_text().splitlines()[0])["step"] == 2
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [len(row["dice"]) for row in rows if "dice" in row] == [2, 2]
    validated = [row["validation_dice"] for row in rows if "validation_dice" in row]
    assert len(validated) == 2 and all(len(v) == 1 and 0 <= v[0] <= 1 for v in validated)
    model: Any = load(whole / "model.safetensors")
    assert model.config["class_names"] == ("s1", "s2") and tuple(model.config["spacing_zyx_mm"]) == (1.0, 1.0, 1.0)
    assert target_spacing(model) == (1.0, 1.0, 1.0)
    assert not any(key.startswith("image_encoder.") for key in model.state_dict())


def test_a_resumed_run_is_the_unbroken_one(tmp_path, corpus):
    whole = train(run_config(tmp_path / "whole", corpus, "optim.schedule=constant"), quiet=True)
    parts = train(run_config(tmp_path / "parts", corpus, "optim.schedule=constant", "optim.steps=2"), quiet=True)
    train(run_config(parts, corpus, "optim.schedule=constant"), resume=True, quiet=True)
    one, other = (load(folder / "model.safetensors").state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("file", ["sam3d.yaml", "ma_sam.yaml", "sam3d_adapter.yaml", "sam3d_tiny.yaml"])
def test_presets_are_models_that_can_be_built(file):
    config = load_config(TrainConfig, Path(__file__).resolve().parents[1] / "configs" / file)
    with torch.device("meta"):
        model = create_model(config.model.name, **config.model.overrides)
    assert f"--config configs/{file}" in (Path(__file__).resolve().parents[1] / "configs" / file).read_text()
    assert config.data.synthetic_share == 0 and model.config["backbone"] == config.model.overrides["backbone"]
    if not isinstance(model, SemanticModel):
        assert config.data.crop == model.spec.input_shape_zyx and config.data.spacing_mm == model.spec.spacing_mm
        assert "box" in model.spec.prompts or config.clicks.box_probability == 0


def test_an_automatic_model_needs_a_corpus(tmp_path, corpus):
    with pytest.raises(
        InputError, match=r"sam3d is trained on a corpus alone; name one in data.corpus and set data.synthetic_share=0"
    ):
        train(load_config(TrainConfig, None, ["model.name=sam3d", f"run.folder={tmp_path / 'run'}"]))
    given = {"class_names": ["s2"], "spacing_zyx_mm": None}
    assert semantic_overrides(run_config(tmp_path, corpus), given)["class_names"] == ["s2"]
    assert semantic_overrides(run_config(tmp_path, corpus, "data.spacing_mm=2"), {})["spacing_zyx_mm"] == (
        2.0,
        2.0,
        2.0,
    )
    assert semantic_overrides(run_config(tmp_path, corpus, "model.name=samed3d_unet", "model.overrides={}"), {}) == {}


# Evaluation


def measured(corpus: Path, model: SemanticModel, **settings: object) -> list[Row]:
    case = find_cases([corpus], TrainingHistory(), "all").cases[0]
    method = SemanticMethod("bright", model)
    return measure(case, method, SemanticProtocol(), EvaluationSettings(5, **settings), case.loaded()).rows


def test_rows_say_how_good_each_class_is(corpus):
    rows = measured(corpus, Bright())
    assert [(r["name"], r["label"], r["protocol"], r["click"]) for r in rows] == [
        ("s1", 1, "automatic", 0),
        ("s2", 2, "automatic", 0),
    ]
    assert all(
        r["dice"] > 0.99 and r["nsd"] > 0.99 and r["hd95_mm"] < 1 and abs(r["volume_error"]) < 0.02 for r in rows
    )
    assert rows[0]["seconds"] == rows[1]["seconds"] > 0 and (rows[0]["policy"], rows[0]["prompt"]) == ("none", "none")
    wrong = measured(corpus, Bright(names=("s2", "s1")))
    assert [r["dice"] for r in wrong] == [0.0, 0.0] and wrong[0]["hd95_mm"] > 1
    (one,) = measured(corpus, Bright(), labels_per_case=1, surfaces=False)
    assert one["dice"] > 0.99 and "nsd" not in one


def test_classes_are_found_by_name_or_category(corpus):
    case = find_cases([corpus], TrainingHistory(), "all").cases[0]
    assert class_values(case, ("s2", "S1")) == {2: [1], 1: [2]}
    names = {1: "Left_Kidney", 2: "air", 0: "background"}
    named = LabelledCase("set", "c", "c", "CT", "", corpus, corpus, names)
    category = categorise("Left_Kidney", "set").name
    assert class_values(named, (category,)) == {}
    categories = {value: categorise(name, "set").name for value, name in names.items()}
    assert class_values(replace(named, categories=categories), (category,)) == {1: [1]}
    assert measured(corpus, Bright(names=("liver", "spleen"))) == []


def test_a_weights_file_is_measured_on_the_side_it_was_kept_from(tmp_path, corpus):
    folder = train(run_config(tmp_path / "run", corpus), quiet=True)
    weights = str(folder / "model.safetensors")
    out = evaluate([corpus], [weights], tmp_path / "out", processes=2)
    rows = read_rows(out / "cases.csv")
    held = {case.subject for case in find_cases([corpus], TrainingHistory(0.3, 1), "val").cases}
    assert held and {row["subject"] for row in rows} == held and {row["group"] for row in rows} == {"unseen subject"}
    body = json.loads((out / "results.json").read_text())
    by_class = [line for line in body["summary"] if line["by"] == "name"]
    assert [line["value"] for line in by_class] == ["s1", "s2"] and all(0 <= line["dice"] <= 1 for line in by_class)
    assert body["scores"] == [] and "Evaluation" in write_report(out).read_text()
    (out / "cases.csv").unlink()
    evaluate([corpus], [weights], out)  # finished: nothing is measured again
    assert not (out / "cases.csv").exists()
    with pytest.raises(InputError, match=r"output folder already holds results of another configuration"):
        evaluate([corpus], [weights], out, split="all")


def test_a_class_in_neither_mask_is_in_no_mean():
    row = (
        dict.fromkeys(FIELDS)
        | dict.fromkeys(TEXT, "")
        | {"protocol": "automatic", "click": 0, "seconds": 1.0, "nsd": 1.0, "hd95_mm": 0.0}
    )
    rows = [row | {"name": "a", "subject": str(n), "dice": d} for n, d in enumerate((0.2, 0.4, None))]
    line = next(line for line in summarise(rows, (1,)) if line["by"] == "name")
    assert line["dice"] == 0.3 and line["interval"][0] >= 0.2 and line["hd95_mm"] == 0.0 and line["measurements"] == 2


def test_prompts_and_semantic_models_do_not_mix(tmp_path, corpus, monkeypatch):
    with pytest.raises(InputError, match=r"model 'default' needs a .*point.* first; .* by protocol 'automatic'"):
        evaluate([corpus], ["default"], tmp_path / "out", protocols=["automatic"])
    method = SemanticMethod("bright", Bright())
    with pytest.raises(InputError, match="--protocol, --seeds cannot be used with bright: .* take no prompts"):
        evaluate([corpus], [method], tmp_path / "out", protocols=["samed3d"], seeds=2)
    with pytest.raises(InputError, match="measured apart from others, got bright with dilated_ball"):
        evaluate([corpus], [method, "dilated_ball"], tmp_path / "out")
    evaluate([corpus], [method], tmp_path / "out", protocols=["automatic"], quick=True, split="all")
    assert len(read_rows(tmp_path / "out" / "cases.csv")) == 1

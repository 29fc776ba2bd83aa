"""Fine-tuning in one command: which subjects are held out, what is measured, what is written, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.pipeline import cached_corpus
from samed3d.cli import main
from samed3d.cli.train import _weights_of
from samed3d.config import TrainConfig, load_config
from samed3d.data.corpus import Corpus
from samed3d.data.exposure import TrainingHistory
from samed3d.data.sampling import CropDataset
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.weights import read_header, read_weights, save_weights
from samed3d.nn.adapters import adapter_names
from samed3d.training.before_after import choose_targets, compare, measure, split_subjects
from samed3d.training.finetune import TUNED, FinetuneOptions, finetune, recipe
from samed3d.training.loop import StopRequest
from samed3d.training.start import encoder_parameters
from tests import dataset_trees
from tests.corpus_sources import case_arrays, make_source, write_case
from tests.test_training import NARROW

QUICK = ["--steps", "2", "--structures", "2", "--seeds", "2", "--set", "run.precision=fp32"]
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "finetune.yaml"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "base.safetensors"
    save_weights(create_model("samed3d_unet", **NARROW), path, {})
    return path


@pytest.fixture
def five(tmp_path) -> Path:
    return make_source(tmp_path / "five", cases=5)


def tuned(out: Path) -> Path:
    """The fine-tuned model: two steps seldom beat the base, which is then kept as the result."""
    return out / TUNED if (out / TUNED).is_file() else out / "model.safetensors"


def command(base: Path, data: Path, out: Path, *more: str) -> int:
    return main(["train", "--finetune", str(base), "--data", str(data), "-o", str(out), *QUICK, *more])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_five_cases_in_one_command(base, five, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(base, five, out) == 0
    shown = capsys.readouterr().out
    assert "2 structures of 1 held-out subject, 2 seeds of the clicks" in shown
    assert (out / "table.md").read_text() in shown
    lines = json.loads((out / "table.json").read_text())["here"]
    assert [line["click"] for line in lines] == [1, 3, 5]
    for line in lines:
        assert line["change"] == pytest.approx(line["after"] - line["before"])
    rows = (out / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2 * 5  # models, structures, seeds, clicks
    header = read_header(tuned(out))
    assert header["base"]["name"] == str(base) and len(header["before_after"]) == 3
    kept = {row.split(",")[3] for row in rows[1:]}
    trained = set(header["trained_on"]["five"])
    assert len(kept) == 1 and len(trained) == 4 and not kept & trained
    assert not load(tuned(out)).training
    assert not list(out.glob(".*.part"))


def test_the_training_draws_nobody_who_is_measured(base, five, tmp_path):
    out = tmp_path / "run"
    command(base, five, out, "--quiet")
    config = load_config(TrainConfig, out / "config.json")
    drawn = {CropDataset(config.data, 12, seed=0)[i]["case"] for i in range(12)}
    kept = {row.split(",")[3] for row in (out / "scores.csv").read_text().splitlines()[1:]}
    assert len(drawn) == 4 and not {case.rpartition("/")[2] for case in map(str, drawn)} & kept


@pytest.mark.parametrize(
    ("train", "adapter"), [("all", None), ("decoder", None), ("adapters", None), ("adapters", "fact")]
)
def test_what_learns_is_what_was_asked_for(base, five, tmp_path, train, adapter):
    out = tmp_path / "run"
    more = ["--rank", "2", *(["--adapter", adapter] if adapter else [])] if train == "adapters" else []
    assert command(base, five, out, "--train", train, *more, "--quiet") == 0
    before, after = load(base).state_dict(), load(tuned(out)).state_dict()
    encoder = encoder_parameters(load(base))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert bool(changed & encoder) == (train == "all") and changed - encoder
    stored = set(read_weights(tuned(out))[0])
    assert (stored == set(before)) == (train != "adapters")
    if train == "adapters":
        assert read_header(tuned(out))["adapter"]["kind"] == (adapter or "lora")
        assert set(adapter_names(load(tuned(out)))) < stored and not stored & encoder


def test_what_is_forgotten_elsewhere_is_measured_and_not_trained_on(base, five, tmp_path, capsys):
    other = make_source(tmp_path / "other", cases=1, first_seed=50)
    out = tmp_path / "run"
    assert command(base, five, out, "--elsewhere", str(other)) == 0
    assert "Elsewhere, on structures that were not trained on. Mean Dice" in capsys.readouterr().out
    assert set(json.loads((out / "table.json").read_text())) == {"here", "elsewhere"}
    rows = [row.split(",") for row in (out / "scores.csv").read_text().splitlines()[1:]]
    assert {row[2] for row in rows if row[1] == "elsewhere"} == {Corpus(cached_corpus(other)).cases[0].id}
    assert set(read_header(tuned(out))["trained_on"]) == {"five"}


def test_segment_takes_an_adapter_file(base, five, tmp_path):
    out = tmp_path / "run"
    assert command(base, five, out, "--adapter", "lora", "--quiet") == 0
    image = five / "imagesTr" / "case0_0000.nii.gz"
    mask = tmp_path / "mask.nii.gz"
    model = str(tuned(out))
    assert main(["segment", str(image), "--point", "14,12,5", "--model", model, "-o", str(mask), "--quiet"]) == 0
    assert mask.is_file()


def test_a_stopped_run_goes_on_to_the_same_table(base, five, tmp_path, monkeypatch, capsys):
    steps = ["--set", "run.save_every=1", "--quiet"]
    assert command(base, five, tmp_path / "whole", *steps) == 0
    asked = StopRequest.asked.fget
    monkeypatch.setattr(StopRequest, "asked", property(lambda self: setattr(self, "reason", "by SIGTERM") or True))
    out = tmp_path / "stopped"
    assert command(base, five, out, *steps) == 0
    assert not (out / "table.md").exists() and read_header(tuned(out))["step"] == 1
    monkeypatch.setattr(StopRequest, "asked", property(asked))
    other = make_source(tmp_path / "other", cases=9, first_seed=70)
    assert command(base, other, out, "--resume") == 2
    assert "--resume must be given the --finetune and --data that" in error_of(capsys)
    assert command(base, five, out, *steps, "--resume") == 0
    for name in ("table.md", "scores.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_fine_tuned_model_can_be_tuned_again_and_remembers_whom_it_knows(base, five, tmp_path, capsys):
    assert command(base, five, tmp_path / "one", "--quiet") == 0
    assert command(tuned(tmp_path / "one"), five, tmp_path / "two", "--set", "run.seed=5") == 0
    header = read_header(tuned(tmp_path / "two"))
    assert header["base"]["history"]["trained_on"] == read_header(tuned(tmp_path / "one"))["trained_on"]
    known = header["trained_on"]["five"][0]
    assert TrainingHistory.of_header(header).side("five", [known]) == "trained on"
    assert (
        "its Dice before is not that" not in capsys.readouterr().out
    )  # the same split: nobody measured was learned from


@pytest.mark.parametrize("layout", ["msd", "plain", "nnunet"])
def test_raw_folders_of_several_layouts_are_recognised(layout, base, tmp_path):
    folder = tmp_path / layout
    for number in range(2):
        image, labels = case_arrays(number)
        if layout == "nnunet":
            make_source(folder, cases=2)
        elif layout == "plain":
            dataset_trees.put(folder / "images" / f"p{number}.nii.gz", image)
            dataset_trees.put(folder / "labels" / f"p{number}.nii.gz", labels)
        else:
            dataset_trees.put(folder / "imagesTr" / f"p{number}.nii.gz", image)
            dataset_trees.put(folder / "labelsTr" / f"p{number}.nii.gz", labels)
    if layout == "msd":
        pairs = [{"image": f"./imagesTr/p{n}.nii.gz", "label": f"./labelsTr/p{n}.nii.gz"} for n in range(2)]
        body = {
            "name": "x",
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "a", "2": "b"},
            "training": pairs,
        }
        (folder / "dataset.json").write_text(json.dumps(body))
    assert command(base, folder, tmp_path / "run", "--quiet") == 0


def test_minutes_become_a_limit_of_the_training(base, five, tmp_path):
    quick = [a for a in QUICK if a not in ("--steps",)][1:]
    arguments = [
        "train",
        "--finetune",
        str(base),
        "--data",
        str(five),
        "-o",
        str(tmp_path / "run"),
        *quick,
        "--minutes",
        "0.02",
        "-q",
    ]
    assert main(arguments) == 0
    optim = json.loads((tmp_path / "run" / "config.json").read_text())["optim"]
    assert optim["schedule"] == "cosine_minutes" and 0 < optim["max_minutes"] <= 0.02
    assert (tmp_path / "run" / "table.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "everything"], "--train must be one of all, decoder, adapters, got 'everything'"),
        (["--adapter", "dora"], "--adapter must be lora or fact, got 'dora'"),
        (
            ["--train", "decoder", "--adapter", "lora"],
            "--adapter goes with --train adapters, got --train decoder and --adapter lora",
        ),
        (["--adapter", "lora", "--rank", "0"], "--rank must be 1 or more, got 0"),
        (["--rank", "4"], "--rank goes with --train adapters, got --train all"),
        (["--minutes", "1"], "--steps and --minutes exclude each other"),
        (["--structures", "0"], "--structures and --seeds must be 1 or more, got 0 and 2"),
        (
            ["--set", "model.weights=x"],
            "--set model.weights is chosen by --finetune, --data, --train, --steps and --output",
        ),
        (["--set", "optim.rate=1"], "unknown config key 'optim.rate'"),
        (["--config", "configs/finetune.yaml"], "--finetune has its own recipe and cannot be joined with --config"),
        (["--from", "run"], "--finetune has its own recipe and cannot be joined with --from"),
        (["--resume"], "--resume needs a fine-tuning that was stopped, got none"),
    ],
)
def test_options_that_cannot_be_used_are_one_line_and_leave_nothing(arguments, said, base, five, tmp_path, capsys):
    assert command(base, five, tmp_path / "run", *arguments) == 2
    error = error_of(capsys)
    assert said in error and error.startswith("samed3d: error: ")
    assert not (tmp_path / "run").exists()


def test_an_existing_output_is_refused_before_anything_is_prepared(base, five, tmp_path, cache, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    assert command(base, five, tmp_path / "run") == 2
    assert "--output must be a new or empty folder" in error_of(capsys) and not cache.exists()


def test_a_base_that_is_not_there_is_refused_before_anything_is_prepared(five, tmp_path, cache, capsys):
    assert command(Path("nowhere"), five, tmp_path / "run") == 2
    assert "no checkpoint or file is called 'nowhere'" in error_of(capsys) and not cache.exists()


def test_an_adapter_as_base_is_refused_with_the_remedy(base, five, tmp_path, capsys):
    command(base, five, tmp_path / "run", "--adapter", "lora", "--quiet")
    assert command(tuned(tmp_path / "run"), five, tmp_path / "again") == 2
    assert "--finetune needs a whole model" in error_of(capsys)


def test_an_automatic_model_as_base_is_refused(base, five, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("samed3d.training.finetune.load", lambda name: torch.nn.Linear(1, 1))
    assert command(base, five, tmp_path / "run") == 2
    assert "--finetune needs a model that takes prompts" in error_of(capsys)


def test_one_subject_is_not_enough(base, tmp_path, capsys):
    assert command(base, make_source(tmp_path / "one", cases=1), tmp_path / "run") == 2
    assert "labelled images of at least 2 subjects, one to learn from, one to measure on, got 1" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_data_without_labels_or_without_data_are_refused(base, tmp_path, capsys):
    folder = make_source(tmp_path / "empty", cases=0)
    for name in ("a", "b"):
        image, labels = case_arrays(0)
        write_case(folder, name, image, np.zeros_like(labels))
    assert command(base, folder, tmp_path / "run") == 2
    assert "data must hold labelled structures" in error_of(capsys)
    (tmp_path / "nothing").mkdir()
    assert command(base, tmp_path / "nothing", tmp_path / "run") == 2
    assert "no data set recognised" in error_of(capsys)
    assert command(base, tmp_path / "absent", tmp_path / "run") == 2
    assert "data must be a folder of labelled volumes, got nothing there" in error_of(capsys)
    assert main(["train", "--finetune", str(base)]) == 2
    assert "--finetune needs --data FOLDER" in error_of(capsys)


def test_fine_tuning_options_without_finetune_name_the_config_key(capsys):
    assert main(["train", "--train", "decoder"]) == 2
    assert "--train goes with --finetune MODEL; the key of a config is model.train" in error_of(capsys)


def test_a_run_starts_from_another_by_one_flag(base, tmp_path, capsys):
    (tmp_path / "stage1").mkdir()
    assert main(["train", "--from", str(tmp_path / "stage1")]) == 2
    assert "--from needs a run folder with model.safetensors, or a checkpoint" in error_of(capsys)
    (tmp_path / "stage1" / "model.safetensors").write_bytes(base.read_bytes())
    numbers = [
        "data.crop=[16,16,16]",
        "clicks.interactions=1",
        "optim.steps=1",
        "run.precision=fp32",
        f"run.folder={tmp_path / 'stage2'}",
    ]
    changes = [part for number in numbers for part in ("--set", number)]
    assert main(["train", "--from", str(tmp_path / "stage1"), "--model", "samed3d_unet", *changes, "-q"]) == 0
    config = json.loads((tmp_path / "stage2" / "config.json").read_text())
    assert config["model"]["weights"] == str(tmp_path / "stage1" / "model.safetensors")
    (tmp_path / "stage1" / "best.safetensors").write_bytes(base.read_bytes())
    assert _weights_of(tmp_path / "stage1").name == "best.safetensors" and _weights_of(base) == base


def test_the_cache_is_found_again_and_a_changed_folder_is_another(five, cache):
    first = cached_corpus(five)
    stamp = (first / "corpus.json").stat().st_mtime_ns
    assert cached_corpus(five) == first and first.is_relative_to(cache)
    assert cached_corpus(first) == first, "a corpus is taken as it is"
    arrays = next((first / "arrays").rglob("*.b2nd")).stat().st_mtime_ns
    assert cached_corpus(five) == first and next((first / "arrays").rglob("*.b2nd")).stat().st_mtime_ns == arrays
    write_case(five, "case9", *case_arrays(9))
    second = cached_corpus(five)
    assert second != first and len(Corpus(second).cases) == 6 and len(Corpus(first).cases) == 5
    assert stamp <= (first / "corpus.json").stat().st_mtime_ns


def test_the_same_model_measured_twice_does_not_change(base, five):
    corpus = Corpus(cached_corpus(five))
    targets = choose_targets([(corpus, corpus.cases[0])], 2, 0)
    first, second = (measure(load(base), targets, seeds=2, clicks=3) for _ in range(2))
    assert first == second and len(first) == 2 * 2 * 3
    assert [c.change for c in compare(first, second)] == [0.0, 0.0]
    assert not any(c.beyond_noise for c in compare(first, second))


def test_the_recipe_is_the_one_in_configs(base, five, tmp_path):
    corpus = cached_corpus(five)
    split = split_subjects([corpus], 0)
    made = recipe(load(base), str(base), read_header(base), [corpus], tmp_path / "run", split, FinetuneOptions())
    written = load_config(TrainConfig, CONFIG)
    assert (made.clicks, made.loss, made.optim.lr) == (written.clicks, written.loss, written.optim.lr)
    assert (made.data.fill, made.data.synthetic_share, made.run.ema) == (written.data.fill, 0.0, written.run.ema)
    assert made.data.crop == (16, 16, 16) and made.model.overrides["widths"] == [8, 8, 8, 8]


def test_more_data_get_more_steps_up_to_a_limit(base, tmp_path, monkeypatch):
    corpus = cached_corpus(make_source(tmp_path / "set", cases=5))
    split = split_subjects([corpus], 0)

    def steps(options: FinetuneOptions) -> int:
        return recipe(load(base), str(base), read_header(base), [corpus], tmp_path / "run", split, options).optim.steps

    assert steps(FinetuneOptions()) == 200 and steps(FinetuneOptions(steps=7)) == 7
    monkeypatch.setattr("samed3d.training.finetune.STEPS_PER_STRUCTURE", 60)
    assert steps(FinetuneOptions()) == 8 * 60
    monkeypatch.setattr("samed3d.training.finetune.STEPS_PER_STRUCTURE", 600)
    assert steps(FinetuneOptions()) == 1000


def test_options_from_python_are_checked_too():
    with pytest.raises(InputError, match="must be 0 .* or more, got 0 and nan"):
        FinetuneOptions(minutes=math.nan)
    with pytest.raises(InputError, match="--output must be a new or empty folder"):
        finetune("default", [], Path(__file__))


@pytest.mark.slow
def test_the_default_on_five_real_volumes_that_it_never_saw(data_dir, tmp_path, capsys):
    folder = data_dir / "mouse_brain_fvb_mr"
    if not folder.is_dir():
        pytest.skip(f"no such data set: {folder}")
    out = tmp_path / "run"
    arguments = ["--steps", "3", "--structures", "2", "--seeds", "1", "--adapter", "lora"]
    assert main(["train", "--finetune", "default", "--data", str(folder), "-o", str(out), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "2 structures of 1 held-out subject, 1 seed of the clicks" in shown
    assert "was trained on" not in shown  # the default held this source out
    assert len(read_header(tuned(out))["trained_on"]["mouse_brain_fvb_mr"]) == 4
    assert tuned(out).stat().st_size < 8 << 20  # LoRA and decoder, not the base

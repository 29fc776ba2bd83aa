"""Published recipes and ours as configs: epochs, turns without a click, crops of one spacing, two stages end
to end."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samed3d.config import ClickConfig, DataConfig, LossConfig, OptimConfig, TrainConfig, load_config
from samed3d.crops import normalise, sample_crop
from samed3d.data.sampling import CropDataset, has_enough_voxels, object_frame, sample_mask
from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.weights import read_header
from samed3d.training.loop import train, with_steps
from samed3d.training.optimiser import learning_rate
from samed3d.training.start import make_accelerator, start_model
from samed3d.training.step import InteractiveStep
from tests.corpus_sources import store_case, store_corpus
from tests.test_training import Recorder, metrics, samples, tiny_config

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (20, 24, 28)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects, CT in Hounsfield units from air to metal, one large and one small structure; 2 mm slices."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        labels = np.zeros(SHAPE, np.uint8)
        labels[4:12, 5:15, 6:18] = 1
        labels[14:19, 17:22, 19:24] = 2
        image = np.random.default_rng(number).normal(0, 5, SHAPE) + np.choose(labels, [-2000, 60, 3000])
        store_case(folder, "s", f"p{number}", image.astype(np.int16), labels, (2.0, 1.0, 1.0))
    return store_corpus(folder)


def data_of(corpus: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **({"corpus": [str(corpus)], "synthetic_share": 0.0, "crop": (16, 16, 16), "validation_share": 0.0} | changes)
    )


# Steps


def test_epochs_are_passes_over_the_structures():
    config = TrainConfig(optim=OptimConfig(epochs=3, steps=1))
    assert with_steps(config, 10, 4).optim.steps == 8 and with_steps(config, 1, 400).optim.steps == 1
    assert with_steps(TrainConfig(), 0, 4).optim.steps == TrainConfig().optim.steps
    with pytest.raises(InputError, match=r"optim\.epochs must be 0 without a corpus to pass over, got 3"):
        with_steps(config, 0, 4)
    rates = [learning_rate(replace(TrainConfig().optim, steps=8, warmup_steps=1000), done) for done in range(8)]
    assert max(rates) == TrainConfig().optim.lr, "a run that one key shortens warms up within its first half"


# Turns and losses


def turns_of(interactions: int, seed: int, **settings: Any) -> set[int]:
    clicks = ClickConfig(interactions=interactions, **({"mask_only_probability": 0.0} | settings))
    return InteractiveStep(Recorder(), clicks, LossConfig())._mask_only_turns(torch.Generator().manual_seed(seed))


def test_published_turns_without_a_click_are_the_last_and_one_of_the_third_to_ninth():
    drawn = [turns_of(11, seed, mask_only_turns=["last", "random"]) for seed in range(200)]
    assert all(10 in turns and len(turns) == 2 for turns in drawn)
    assert {min(turns) for turns in drawn} == {2, 3, 4, 5, 6, 7, 8}
    assert turns_of(1, 0, mask_only_turns=["last", "random"]) == set() and turns_of(
        2, 0, mask_only_turns=["last", "random"]
    ) == {1}
    assert all(turns_of(4, seed, mask_only_turns=["random"]) == {2} for seed in range(5))
    assert turns_of(4, 0) == set() and turns_of(4, 0, mask_only_probability=1.0) == {1, 2, 3}


def test_the_last_turn_gives_the_mask_alone():
    model = Recorder(click_memory="newest", prompts=frozenset({"point", "mask"}))
    clicks = ClickConfig(interactions=4, mask_only_probability=0.0, mask_only_turns=["last"])
    InteractiveStep(model, clicks, LossConfig())(*samples(2), 0)
    assert [p.points.shape[1] for p in model.seen] == [1, 1, 1, 0] and model.seen[-1].mask_logits is not None


def test_losses_of_turns_are_averaged_or_added_up():
    image, target = samples()
    clicks = ClickConfig(interactions=3, box_probability=0, mask_only_probability=0)
    mean, total = (
        InteractiveStep(Recorder(), clicks, LossConfig(turns=turns))(image, target, 0) for turns in ("mean", "sum")
    )
    assert float(total.loss.detach()) == pytest.approx(3 * float(mean.loss.detach()), rel=1e-6)
    smooth = InteractiveStep(Recorder(), clicks, LossConfig(dice_smooth=1e-5))(image, target, 0)
    assert float(smooth.loss.detach()) > float(mean.loss.detach()) + 1e-5


def test_a_sample_is_clicked_alike_whatever_batch_it_is_in():
    """So that two processes click as one with the doubled batch."""
    image, target = samples(3)
    clicks = ClickConfig(interactions=3, box_probability=0.5, mask_only_probability=0.3)

    def seen(chosen: slice) -> list[Any]:
        model = Recorder()
        InteractiveStep(model, clicks, LossConfig())(image[chosen], target[chosen], 7, torch.arange(40, 43)[chosen])
        return model.seen

    together = seen(slice(0, 3))
    some_box = False
    for number in range(3):
        for one, all_of_them in zip(seen(slice(number, number + 1)), together, strict=True):
            assert torch.equal(one.points[0], all_of_them.points[number])
            assert torch.equal(one.point_labels[0], all_of_them.point_labels[number])
            drawn = one.box_valid is not None and bool(one.box_valid[0])
            assert drawn == (all_of_them.box_valid is not None and bool(all_of_them.box_valid[number]))
            if drawn:
                assert torch.equal(one.boxes[0], all_of_them.boxes[number])
            some_box |= drawn
    assert some_box, "the seed must give a box to a sample"


# Crops of one spacing


def test_a_crop_of_fixed_spacing_is_centred_on_the_objects_box(corpus):
    dataset = CropDataset(data_of(corpus, spacing_mm=1.5, placement="centred"), 1, seed=0)
    _, case, label = next(choice for choice in dataset.real if choice[2].value == 1)
    frame = object_frame(case, label, dataset.config, np.random.default_rng(0))
    assert frame.step_zyx_vox == pytest.approx((0.75, 1.5, 1.5))
    assert frame.to_crop((7.5, 9.5, 11.5)) == pytest.approx((7.5, 7.5, 7.5))
    jittered = data_of(corpus, spacing_mm=1.5)
    frames = [object_frame(case, label, jittered, np.random.default_rng(seed)) for seed in range(5)]
    assert {f.step_zyx_vox for f in frames} == {frame.step_zyx_vox} and len({f.origin_zyx_vox for f in frames}) == 5


def test_a_structure_too_small_for_a_click_at_that_spacing_is_never_drawn(corpus):
    at_one = {label.value for _, _, label in CropDataset(data_of(corpus), 1, seed=0).real}
    dataset = CropDataset(data_of(corpus, spacing_mm=3.0), 1, seed=0)
    assert at_one == {1, 2} and {label.value for _, _, label in dataset.real} == {1}
    _, case, label = dataset.real[0]
    assert has_enough_voxels(case, label, 0.0) and not has_enough_voxels(case, replace(label, voxels=33), 1.5)
    assert has_enough_voxels(case, replace(label, voxels=34), 1.5), "34 voxels of 2 mm3 make 20.1 of 3.375 mm3"
    with pytest.raises(InputError, match=r"data\.spacing_mm, at which a structure needs 20 voxels"):
        CropDataset(data_of(corpus, spacing_mm=20.0), 1, seed=0)


def test_a_model_of_x_first_tensors_gets_its_crops_so(corpus):
    settings = data_of(corpus, spacing_mm=1.5, placement="centred", augment="flips", crop=(16, 20, 24))
    zyx, xyz = (
        CropDataset(settings, 4, 0, normalisation="zscore_positive", tensor_axes=axes) for axes in ("zyx", "xyz")
    )
    for index in range(4):
        one, other = zyx[index], xyz[index]
        assert one["image"].shape == (1, 16, 20, 24) and other["image"].shape == (1, 24, 20, 16)
        assert torch.equal(one["image"], other["image"].permute(0, 3, 2, 1)) and torch.equal(
            one["target"][0], other["target"][0].permute(2, 1, 0)
        )


def test_flips_alone_change_nothing_else_and_ct_is_clamped(corpus):
    settings = data_of(corpus, spacing_mm=1.5, placement="centred", augment="flips")
    dataset = CropDataset(settings, 12, 0, normalisation="zscore_positive", ct_clamp_hu=(-1000.0, 1000.0))
    corpus_read, case, label = next(choice for choice in dataset.real if choice[1].subject == "p1")
    frame = object_frame(case, label, settings, np.random.default_rng(0))
    crop, inside = sample_crop(corpus_read.image(case), frame)
    plain = normalise(crop, inside, "zscore_positive", (-1000.0, 1000.0))
    mask = sample_mask(corpus_read.labels(case), [1], frame) & inside
    flips = set()
    for index in range(12):
        sample = dataset[index]
        if sample["case"] != case.id or int(sample["target"].sum()) != int(mask.sum()):
            continue
        axes = [
            a
            for a in range(8)
            if torch.allclose(sample["image"], plain.flip([1 + i for i in range(3) if a >> i & 1]), atol=1e-5)
        ]
        assert len(axes) == 1
        flips.add(axes[0])
    assert len(flips) >= 2
    assert not torch.allclose(normalise(crop, inside, "zscore_positive"), plain)


# Starting from weights, and the machine


def test_weights_of_another_model_are_named_and_their_numbers_are_taken(tmp_path):
    train(tiny_config(tmp_path / "first", "optim.steps=1"), quiet=True)
    file = tmp_path / "first" / "model.safetensors"
    with pytest.raises(
        InputError, match=r"must hold a 'samed3d_tiny', got a 'samed3d_unet' in .*; set model\.name=samed3d_unet"
    ):
        start_model(tiny_config(tmp_path, f"model.weights={file}", "model.name=samed3d_tiny"))
    second = start_model(tiny_config(tmp_path, f"model.weights={file}", "model.overrides={}", "data.crop=[24,24,24]"))
    assert list(second.config["widths"]) == read_header(file)["config"]["widths"]
    assert second.spec.input_shape_zyx == (24, 24, 24)


def test_cuda_that_is_not_there_is_refused_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"run\.device cuda was asked for but this machine has no CUDA GPU"):
        train(tiny_config(tmp_path / "run", "run.device=cuda"), quiet=True)
    with pytest.raises(InputError, match=r"run\.precision fp16 needs a CUDA GPU; use fp32 on cpu"):
        make_accelerator(tiny_config(tmp_path / "run", "run.precision=fp16"))
    with pytest.raises(InputError, match=r"run\.device mps was asked for but this machine has no Apple GPU"):
        make_accelerator(tiny_config(tmp_path / "run", "run.device=mps"))
    assert make_accelerator(tiny_config(tmp_path / "run", "run.device=cpu")).device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"accelerate must share batches, not weights, between processes"):
        make_accelerator(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_step_larger_than_the_data_goes_on_and_says_so(corpus, tmp_path, caplog):
    data = [
        f"data.corpus=[{corpus}]",
        "data.synthetic_share=0",
        "data.validation_share=0",
        "optim.batch=5",
        "optim.accumulate=2",
    ]
    with caplog.at_level(logging.WARNING, logger="samed3d"):
        train(tiny_config(tmp_path, *data, "optim.steps=1"), quiet=True)
    assert "a step takes 10 samples of 8 structures: some come twice, in other crops" in caplog.text
    assert metrics(tmp_path)[0]["step"] == 1


def test_a_corpus_that_changed_is_not_gone_on_with(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 5:15, 6:18] = 1
    image = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
    store_case(tmp_path / "c", "s", "p", image, labels)
    store_corpus(tmp_path / "c")
    data = [f"data.corpus=[{tmp_path / 'c'}]", "data.synthetic_share=0", "data.validation_share=0", "optim.batch=1"]
    train(tiny_config(tmp_path / "run", *data, "optim.steps=1"), quiet=True)
    store_case(tmp_path / "c", "s", "q", image, labels)
    store_corpus(tmp_path / "c")
    with pytest.raises(
        InputError, match=r"the corpus has changed since the run began: .*; bring the old one back, or start a new run"
    ):
        train(tiny_config(tmp_path / "run", *data, "optim.steps=2"), resume=True, quiet=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_cases_are_skipped_counted_and_named(workers, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 5:15, 6:18] = 1
    for name in "abc":
        store_case(tmp_path / "c", "s", name, np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16), labels)
    store_corpus(tmp_path / "c")
    for name in "ab":
        next((tmp_path / "c" / "arrays" / "s").glob(f"{name}.image.*")).write_bytes(b"")
    data = [
        f"data.corpus=[{tmp_path / 'c'}]",
        "data.synthetic_share=0",
        "data.validation_share=0",
        f"data.workers={workers}",
    ]
    train(tiny_config(tmp_path / "run", *data, "optim.steps=4"), quiet=True)
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert set(skipped) == {"s.a", "s.b"} and all("damaged" in reason for reason in skipped.values())
    assert metrics(tmp_path / "run")[-1]["skipped_cases"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_damaged_cases_ends_in_one_line(workers, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:12, 5:15, 6:18] = 1
    store_case(tmp_path / "c", "s", "a", np.ones(SHAPE, np.int16), labels)
    store_corpus(tmp_path / "c")
    next((tmp_path / "c" / "arrays" / "s").glob("a.image.*")).write_bytes(b"")
    data = [
        f"data.corpus=[{tmp_path / 'c'}]",
        "data.synthetic_share=0",
        "data.validation_share=0",
        f"data.workers={workers}",
    ]
    with pytest.raises(
        InputError, match=r"^no target of 20 voxels in 20 attempts at sample [01]; .*1 cases are damaged"
    ) as caught:
        train(tiny_config(tmp_path / "run", *data, "optim.steps=2"), quiet=True)
    assert "\n" not in str(caught.value)


# Two stages


def test_two_tiny_stages_of_sam_med3d_as_published(corpus, tmp_path):
    """The presets themselves with a tiny network: the second stage takes the first's weights, and its numbers, by one
    flag."""
    tiny = json.dumps(MODELS["sam_med3d_b"].tiny)
    small = [
        f"data.corpus=[{corpus}]",
        "data.crop=[16,16,16]",
        "data.validation_share=0.3",
        "data.workers=0",
        "optim.epochs=0",
        "optim.steps=2",
    ]
    small += [
        "optim.batch=1",
        "optim.accumulate=2",
        "run.precision=fp32",
        "run.log_every=1",
        "validation.every=2",
        "validation.cases=1",
    ]
    small += ["validation.images=false", "validation.structures=1", "validation.clicks=2"]
    one = [*small, f"model.overrides={tiny}", f"run.folder={tmp_path / 'stage1'}"]
    first = train(load_config(TrainConfig, ROOT / "configs" / "stage1.yaml", one), quiet=True)
    two = [*small, f"model.weights={first / 'model.safetensors'}", f"run.folder={tmp_path / 'stage2'}"]
    second = train(load_config(TrainConfig, ROOT / "configs" / "stage2.yaml", two), quiet=True)
    before, after = load(first / "model.safetensors").state_dict(), load(second / "best.safetensors").state_dict()
    assert before.keys() == after.keys() and not all(torch.equal(before[k], after[k]) for k in before)
    rows = [row for row in metrics(second) if "loss" in row]
    assert len(rows[-1]["dice"]) == 11 and len([r for r in metrics(second) if "validation_dice" in r]) == 1
    groups = torch.load(second / "last.pt", weights_only=True)["optimiser"]["param_groups"]
    assert sorted({round(g["lr"] / max(g["lr"] for g in groups), 6) for g in groups if g["params"]}) == [0.1, 1.0]


# Memory and compilation


def test_forgetting_activations_leaves_the_gradients_equal(tmp_path):
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for forget in (False, True):
        torch.manual_seed(0)
        config = tiny_config(
            tmp_path, "model.name=sam_med3d_b", f"model.overrides={json.dumps(MODELS['sam_med3d_b'].tiny)}"
        )
        model = start_model(replace(config, run=replace(config.run, activation_checkpointing=forget)))
        saved: list[int] = []

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.encode(image)["image"].square().sum()
        loss.backward()
        found.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(saved)))
    (plain, kept), (forgetful, fewer) = found
    assert plain.keys() == forgetful.keys() and all(torch.equal(plain[k], forgetful[k]) for k in plain)
    assert fewer < 0.8 * kept, "parameters are kept anyway"


def test_a_model_that_cannot_forget_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"run\.activation_checkpointing must be false for \w+, which has no transformer"
    ):
        start_model(tiny_config(tmp_path, "run.activation_checkpointing=true"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_encoder_gives_the_same_loss():
    target = samples()[1]
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    clicks = ClickConfig(interactions=2)
    model = create_model("sam_med3d_b", **(MODELS["sam_med3d_b"].tiny | {"depth": 1, "global_blocks": (0,)}))
    plain, compiled = (
        InteractiveStep(model, clicks, LossConfig(), compiled=flag)(image, target, 0).loss for flag in (False, True)
    )
    assert float(compiled.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)


def test_the_seed_of_dropout_follows_from_the_step(tmp_path, monkeypatch):
    """A model with dropout resumes exactly as well, with no random state in the checkpoint."""
    decode = Recorder.decode

    def dropping(self: Recorder, features: Any, prompts: Any) -> Any:
        output = decode(self, features, prompts)
        output.logits = nn.functional.dropout(output.logits, 0.5, self.training)
        return output

    monkeypatch.setattr(Recorder, "decode", dropping)
    monkeypatch.setattr("samed3d.training.start.create_model", lambda name, **_: Recorder(normalisation="zscore"))
    settings = ["optim.steps=4", "run.save_every=2"]
    train(tiny_config(tmp_path / "whole", *settings), quiet=True)
    train(tiny_config(tmp_path / "parts", *settings, "optim.schedule=constant"), quiet=True)
    (tmp_path / "parts" / "last.pt").write_bytes((tmp_path / "parts" / "step_000002.pt").read_bytes())
    torch.manual_seed(12345)
    before = [r["loss"] for r in metrics(tmp_path / "parts")]
    train(tiny_config(tmp_path / "parts", *settings, "optim.schedule=constant"), resume=True, quiet=True)
    assert [r["loss"] for r in metrics(tmp_path / "parts")] == before and len(before) == 4

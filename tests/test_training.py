"""The click loop in one forward, and the run around it: what is learned, what is written, and that a resumed run is the
unbroken one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samed3d.config import ClickConfig, LossConfig, OptimConfig, TrainConfig, load_config
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch
from samed3d.models.weights import read_header
from samed3d.training import loop, start
from samed3d.training.loop import train
from samed3d.training.optimiser import parameter_groups
from samed3d.training.step import InteractiveStep, seed_of

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny_cpu.yaml"
NARROW: dict[str, Any] = {
    "input_shape": (16, 16, 16),
    "widths": (8, 8, 8, 8),
    "decoder_widths": (8, 8, 8, 8),
    "encoder_blocks": (1, 1, 1, 1),
    "joint_blocks": 1,
    "similarity_heads": (0, 2, 2),
}
SMALL = [
    "data.crop=[16,16,16]",
    "model.overrides={widths: [8,8,8,8], decoder_widths: [8,8,8,8], encoder_blocks: [1,1,1,1], joint_blocks: 1, similarity_heads: [0,2,2]}",
    "clicks.interactions=2",
    "optim.batch=2",
    "optim.warmup_steps=1",
    "run.precision=fp32",
    "run.log_every=1",
]


def narrow_model(seed: int = 0) -> PromptableModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("samed3d_unet", **NARROW)


def samples(count: int = 2) -> tuple[Tensor, Tensor]:
    """Fixed images (count, 2, 16, 16, 16) that show their target, a cuboid."""
    target = torch.zeros(count, 1, 16, 16, 16, dtype=torch.bool)
    for index in range(count):
        target[index, 0, 3 : 9 + index, 4 : 12 - index, 5:13] = True
    noise = torch.randn(count, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return noise * 0.3 + target.float() * 2 - 0.5, target


def tiny_config(folder: Path, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIG, [*SMALL, f"run.folder={folder}", *overrides])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Recorder(PromptableModel):
    """A model of one number that keeps what it was asked; its mask is the image shifted by that number."""

    def __init__(self, **spec: Any) -> None:
        super().__init__()
        self.spec = ModelSpec("recorder", (16, 16, 16), **spec)
        self.config = {}
        self.bias = nn.Parameter(torch.tensor(0.3))
        self.encoded, self.seen = 0, []

    def encode(self, image: Tensor) -> Features:
        self.encoded += 1
        return {"image": image[:, :1]}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        self.seen.append(prompts)
        earlier = 0.0 if prompts.mask_logits is None else prompts.mask_logits
        logits = features["image"] * 0.1 + self.bias + 0.5 * earlier
        return MaskOutput(logits, logits.mean(dim=(2, 3, 4)).sigmoid(), logits)


def session(turns: int = 4, **spec: Any) -> Callable[..., Recorder]:
    """Run one recorded session."""

    def run(seed: int = 0, target: Tensor | None = None, **clicks: Any) -> Recorder:
        model = Recorder(**spec)
        settings = {"interactions": turns, "box_probability": 0.0, "mask_only_probability": 0.0} | clicks
        image, given = samples(3)
        InteractiveStep(model, ClickConfig(**settings), LossConfig())(image, given if target is None else target, seed)
        return model

    return run


# The step


def test_one_encode_and_as_many_decodes_as_interactions():
    for turns in (1, 4):
        model = session(turns)()
        assert model.encoded == 1 and len(model.seen) == turns


def test_all_clicks_are_kept_and_each_lies_in_the_error_before_it():
    image, target = samples(3)
    model = session()()
    assert [p.points.shape[1] for p in model.seen] == [1, 2, 3, 4]
    assert torch.equal(model.seen[3].points[:, :3], model.seen[2].points)
    mask = torch.zeros_like(target)
    for prompts in model.seen:
        for sample in range(3):
            z, y, x = prompts.points[sample, -1].long().tolist()
            assert mask[sample, 0, z, y, x] != target[sample, 0, z, y, x]
            assert prompts.point_labels[sample, -1] == int(target[sample, 0, z, y, x])
        earlier = 0.0 if prompts.mask_logits is None else prompts.mask_logits
        mask = image[:, :1] * 0.1 + 0.3 + 0.5 * earlier > 0
    assert model.seen[0].mask_logits is None and model.seen[1].mask_logits is not None


@pytest.mark.parametrize(
    ("spec", "memory", "kept"), [("newest", "spec", 1), ("all", "spec", 4), ("newest", "all", 4), ("all", "newest", 1)]
)
def test_memory_is_the_config_or_else_the_spec(spec, memory, kept):
    model = session(click_memory=spec)(memory=memory)
    assert model.seen[-1].points.shape[1] == kept
    assert model.seen[-1].mask_logits is not None


def test_mask_only_turns_bring_no_new_click():
    every = session()(mask_only_probability=1.0)
    assert [p.points.shape[1] for p in every.seen] == [1, 1, 1, 1], "all clicks: the earlier one stays"
    newest = session()(mask_only_probability=1.0, memory="newest")
    assert [p.points.shape[1] for p in newest.seen] == [1, 0, 0, 0]
    assert all(p.mask_logits is not None for p in newest.seen[1:])
    some = {
        p.points.shape[1]
        for seed in range(6)
        for p in session()(seed, mask_only_probability=0.5, memory="newest").seen[1:]
    }
    assert some == {0, 1}


def test_a_box_first_has_no_click_beside_it_and_stays():
    model = session()(box_probability=1.0)
    assert (model.seen[0].point_labels == -1).all() and (model.seen[1].point_labels[:, 1] >= 0).all()
    for prompts in model.seen:
        assert prompts.box_valid.all() and torch.equal(prompts.boxes, model.seen[0].boxes)
    low, high = model.seen[0].boxes[0]
    assert (low - torch.tensor([3.0, 4.0, 5.0])).abs().max() <= 0.8 and (
        high - torch.tensor([9.0, 12.0, 13.0])
    ).abs().max() <= 0.8


def test_some_samples_get_boxes_others_clicks():
    both = 0
    for seed in range(8):
        first = session(1)(seed, box_probability=0.5).seen[0]
        if first.boxes is not None:
            assert torch.equal(first.point_labels[:, 0] == -1, first.box_valid)
            both += 0 < int(first.box_valid.sum()) < 3
    assert both >= 2


def test_a_model_without_boxes_never_gets_one():
    model = session(prompts=frozenset({"point", "mask"}))(box_probability=1.0)
    assert all(p.boxes is None and p.box_valid is None for p in model.seen) and (model.seen[0].point_labels == 1).all()


def test_an_empty_target_and_a_perfect_mask_are_survived():
    empty = torch.zeros(3, 1, 16, 16, 16, dtype=torch.bool)
    model = session()(target=empty, box_probability=1.0)
    assert not model.seen[0].box_valid.any() and (model.seen[0].point_labels == -1).all()
    full = session()(target=~empty)
    assert (full.seen[0].point_labels == 1).all() and (full.seen[-1].point_labels[:, -1] == -1).any()


def test_same_seed_same_clicks():
    first, second, other = (session()(seed, box_probability=0.5, mask_only_probability=0.3) for seed in (5, 5, 6))
    for a, b in zip(first.seen, second.seen, strict=True):
        assert torch.equal(a.points, b.points) and torch.equal(a.point_labels, b.point_labels)
    assert not torch.equal(first.seen[0].points, other.seen[0].points)


def test_detaching_cuts_the_gradient_through_the_earlier_mask():
    image, target = samples()
    found = []
    for detach in (True, False):
        model = Recorder()
        clicks = ClickConfig(interactions=3, box_probability=0, mask_only_probability=0, detach=detach)
        output = InteractiveStep(model, clicks, LossConfig())(image, target, 0)
        output.loss.backward()
        assert model.seen[1].mask_logits.requires_grad == (not detach)
        found.append((float(output.loss.detach()), float(model.bias.grad)))
    assert found[0][0] == found[1][0], "the same loss"
    assert found[0][1] != pytest.approx(found[1][1], rel=1e-3), "another gradient"


def test_loss_is_the_mean_over_turns_of_the_weighted_terms():
    image, target = samples()
    clicks = ClickConfig(interactions=2, box_probability=0, mask_only_probability=0)

    def loss_of(*weights: float) -> float:
        return float(InteractiveStep(Recorder(), clicks, LossConfig(*weights))(image, target, 0).loss.detach())

    parts = [loss_of(1, 0, 0), loss_of(0, 1, 0), loss_of(0, 1, 1)]
    whole = InteractiveStep(Recorder(), clicks, LossConfig(0.5, 2.0, 3.0))(image, target, 0)
    assert float(whole.loss.detach()) == pytest.approx(
        0.5 * parts[0] + 2 * parts[1] + 3 * (parts[2] - parts[1]), rel=1e-5
    )
    assert whole.dice.shape == (2, 2) and not whole.dice.requires_grad
    logits = [image[:, :1] * 0.1 + 0.3]
    logits.append(image[:, :1] * 0.1 + 0.3 + 0.5 * logits[0])
    by_hand = sum(float(nn.functional.binary_cross_entropy_with_logits(x, target.float())) for x in logits) / 2
    assert parts[1] == pytest.approx(by_hand, rel=1e-5)


def test_a_few_steps_on_two_samples_learn_them():
    image, target = samples()
    step = InteractiveStep(
        narrow_model(), ClickConfig(interactions=2, box_probability=0.3, mask_only_probability=0.1), LossConfig()
    )
    optimiser = torch.optim.AdamW(parameter_groups(step.model, OptimConfig(weight_decay=0.01)), lr=1e-2)
    history = []
    for number in range(30):
        output = step(image, target, number)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        history.append(float(output.loss.detach()))
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert float(output.dice.mean()) > 0.8


# Parts of the run


def test_step_seeds_differ_between_seeds_batches_and_ranks():
    assert len({seed_of(s, b, r) for s in range(4) for b in range(40) for r in range(4)}) == 4 * 40 * 4


# Whole runs


def test_the_tiny_config_trains_and_its_checkpoint_loads(tmp_path):
    shorter = ["optim.steps=2", "optim.warmup_steps=1", "optim.batch=1", "clicks.interactions=2"]
    config = load_config(TrainConfig, CONFIG, [f"run.folder={tmp_path / 'run'}", *shorter])
    assert train(config, quiet=True) == tmp_path / "run"
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "model.safetensors",
        "last.pt",
        "config.json",
        "metrics.jsonl",
    }
    (row,) = metrics(tmp_path / "run")
    assert row["step"] == 2 and math.isfinite(row["loss"]) and len(row["dice"]) == 2 and row["samples_per_s"] > 0
    model = load(tmp_path / "run" / "model.safetensors")
    assert model.spec.input_shape_zyx == (32, 32, 32) and not model.training
    header = read_header(tmp_path / "run" / "model.safetensors")
    assert header["step"] == 2 and header["training"]["data"]["split_seed"] == 0
    assert load_config(TrainConfig, tmp_path / "run" / "config.json") == config


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if the process were killed in the step after a checkpoint."""
    write = loop.RunLog.step

    def stop(self: Any, done: int, lr: float) -> None:
        write(self, done, lr)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.RunLog, "step", stop)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_goes_on_as_if_unbroken(workers, tmp_path, monkeypatch):
    settings = [
        "optim.steps=6",
        "run.save_every=3",
        "run.ema=0.9",
        "optim.accumulate=2",
        "optim.batch=1",
        f"data.workers={workers}",
    ]
    train(tiny_config(tmp_path / "whole", *settings), quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        train(tiny_config(tmp_path / "broken", *settings), quiet=True)
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [1, 2, 3, 4]
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line cut off
    train(tiny_config(tmp_path / "broken", *settings), resume=True, quiet=True)
    shown = [
        [(r["step"], r["loss"], r["dice"], r["lr"]) for r in metrics(tmp_path / name)] for name in ("whole", "broken")
    ]
    assert shown[0] == shown[1] and [row[0] for row in shown[0]] == [1, 2, 3, 4, 5, 6]
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "broken"))
    assert one["step"] == other["step"] == 6 and one["average_count"] == other["average_count"] == 6
    for part in ("model", "average"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part])
    assert not all(torch.equal(one["model"][k], one["average"][k]) for k in one["model"])
    saved = load(tmp_path / "broken" / "model.safetensors").state_dict()
    assert all(torch.equal(saved[k], one["average"][k]) for k in saved)


def test_the_same_seed_repeats_a_run_and_another_does_not(tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(tmp_path / name, "optim.steps=2", f"run.seed={seed}"), quiet=True)
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


def test_a_run_is_not_overwritten_nor_resumed_with_another_config(tmp_path):
    with pytest.raises(InputError, match=r"nothing to resume: .*last.pt does not exist"):
        train(tiny_config(tmp_path, "optim.steps=2"), resume=True, quiet=True)
    train(tiny_config(tmp_path, "optim.steps=2"), quiet=True)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match="run.folder already holds a run: .*--resume"):
        train(tiny_config(tmp_path, "optim.steps=2"), quiet=True)
    with pytest.raises(
        InputError,
        match=r"must keep its config; changed: clicks\.policy 'uniform' -> 'centre'; optim\.lr 0\.001 -> 0\.1$",
    ):
        train(
            tiny_config(tmp_path, "optim.steps=4", "optim.lr=0.1", "clicks.policy=centre", "run.log_every=7"),
            resume=True,
            quiet=True,
        )
    with pytest.raises(InputError, match=r"changed: run\.ema 0\.0 -> 0\.5; run\.seed 0 -> 1$"):
        train(tiny_config(tmp_path, "optim.steps=4", "run.seed=1", "run.ema=0.5"), resume=True, quiet=True)
    with pytest.raises(InputError, match="optim.steps must be above the 2 steps already done, got 2"):
        train(tiny_config(tmp_path, "optim.steps=2"), resume=True, quiet=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    train(tiny_config(tmp_path, "optim.steps=3", "data.workers=1"), resume=True, quiet=True)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_names_the_cases(tmp_path, monkeypatch):
    monkeypatch.setattr("samed3d.losses.dice_loss", lambda logits, target, *form: logits.sum() * math.nan)
    with pytest.raises(RuntimeError, match="loss is nan at step 0; cases: generated, generated"):
        train(tiny_config(tmp_path, "optim.steps=2"), quiet=True)
    assert not (tmp_path / "last.pt").exists()


def test_the_time_limit_saves_and_ends(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samed3d"):
        train(tiny_config(tmp_path, "optim.steps=500", "optim.max_minutes=0.0001"), quiet=True)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert 1 <= saved["step"] < 500 and (tmp_path / "model.safetensors").exists()
    assert "minutes are over" in caplog.text


def test_a_run_starts_from_given_weights(tmp_path):
    train(tiny_config(tmp_path / "first", "optim.steps=1"), quiet=True)
    file = tmp_path / "first" / "model.safetensors"
    started = start.start_model(tiny_config(tmp_path / "second", f"model.weights={file}"))
    saved = load(file).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in started.state_dict().items())
    with pytest.raises(InputError, match="model.weights must be a checkpoint's name or file, got 'nowhere'"):
        start.start_model(tiny_config(tmp_path, "model.weights=nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_write_their_own_logs_without_a_network(tracker, tmp_path, monkeypatch):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tiny_config(tmp_path / "run", "optim.steps=2", f"run.trackers=[{tracker}]"), quiet=True)
    pattern = "wandb/offline-run-*/*.wandb" if tracker == "wandb" else "**/events.out.tfevents.*"
    written = list((tmp_path / "run").glob(pattern))
    assert written and all(path.stat().st_size > 0 for path in written)

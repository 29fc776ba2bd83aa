"""Optimisers, schedules, rates and decay by part, and the forms of Dice that published recipes ask for, against values
worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from samed3d.config import LossConfig, OptimConfig, TrainConfig, load_config
from samed3d.errors import InputError
from samed3d.losses import dice_loss
from samed3d.models import MODELS, create_model
from samed3d.training.loop import train
from samed3d.training.optimiser import EmaWeights, learning_rate, make_optimiser, parameter_groups, set_learning_rate
from samed3d.training.semantic import SemanticStep, class_dice_loss
from tests.test_training import narrow_model
from tests.two_processes import SMALL

ROOT = Path(__file__).resolve().parents[1]


class OneNumber(nn.Module):
    """A single weight matrix of one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), value))


def steps_of(optim: OptimConfig, gradients: list[float]) -> list[float]:
    """The number after each step, from 1, its gradients given."""
    model = OneNumber(1.0)
    optimiser = make_optimiser(model, optim)
    found = []
    for done, gradient in enumerate(gradients):
        set_learning_rate(optimiser, optim, done)
        model.weight.grad = torch.full((1, 1), gradient)
        optimiser.step()
        found.append(model.weight.item())
    return found


# Optimisers


def test_sgd_steps_with_nesterov_momentum():
    optim = OptimConfig(name="sgd", lr=0.1, momentum=0.5, weight_decay=0, schedule="constant")
    # velocity 2, then 0.5 * 2 + 1 = 2; the step is rate * (gradient + 0.5 * velocity)
    first = 1 - 0.1 * (2 + 0.5 * 2)
    assert steps_of(optim, [2.0, 1.0]) == pytest.approx([first, first - 0.1 * (1 + 0.5 * 2)])


def test_sgd_without_momentum_adds_the_decay_to_the_gradient():
    optim = OptimConfig(name="sgd", lr=0.1, momentum=0, weight_decay=0.5, schedule="constant")
    assert steps_of(optim, [2.0]) == pytest.approx([1 - 0.1 * (2 + 0.5 * 1)])


def test_adamw_stays_the_preset():
    assert isinstance(make_optimiser(OneNumber(1.0), OptimConfig()), torch.optim.AdamW)
    optim = OptimConfig(lr=0.1, weight_decay=0.5, schedule="constant")
    assert steps_of(optim, [2.0]) == pytest.approx(
        [1 - 0.1 * 0.5 - 0.1]
    )  # a first step has the rate's length, whatever the gradient


def test_a_run_with_momentum_goes_on_bit_for_bit(tmp_path):
    settings = [
        *SMALL,
        "optim.name=sgd",
        "optim.lr=0.01",
        "optim.momentum=0.9",
        "optim.schedule=constant",
        "run.save_every=0",
    ]

    def run(name: str, steps: int, resume: bool = False) -> None:
        train(
            load_config(TrainConfig, None, [*settings, f"optim.steps={steps}", f"run.folder={tmp_path / name}"]),
            resume=resume,
            quiet=True,
        )

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, resume=True)
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert whole["optimiser"]["state"][0]["momentum_buffer"].any()
    with pytest.raises(InputError, match=r"changed: optim\.name 'sgd' -> 'adamw'"):
        settings.remove("optim.name=sgd")
        run("parts", 6, resume=True)


# Schedules and parts


def test_learning_rate_warms_up_then_follows_half_a_cosine():
    optim = OptimConfig(lr=2.0, warmup_steps=4, steps=12)
    rates = [learning_rate(optim, done) for done in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[8] == pytest.approx(1.0) and rates[6] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.1
    assert learning_rate(optim, 12) == pytest.approx(0.0) == learning_rate(optim, 99)
    flat = OptimConfig(lr=2.0, warmup_steps=4, steps=12, schedule="constant")
    assert [learning_rate(flat, done) for done in (0, 3, 4, 11)] == [0.5, 2.0, 2.0, 2.0]


def test_multistep_falls_at_its_milestones_and_starts_again_in_each_cycle():
    optim = OptimConfig(lr=1.0, schedule="multistep", milestones=[0.6, 0.8, 0.95], gamma=0.1, cycles=4, steps=800)
    rates = [learning_rate(optim, done) for done in range(800)]
    falls = [done for done in range(1, 800) if rates[done] != rates[done - 1]]
    assert falls == [120, 160, 190, 200, 320, 360, 390, 400, 520, 560, 590, 600, 720, 760, 790]
    assert (
        (rates[0], rates[119], rates[120]) == (1.0, 1.0, 0.1)
        and rates[199] == pytest.approx(1e-3)
        and rates[200] == 1.0
    )
    once = OptimConfig(lr=2.0, schedule="multistep", steps=200, warmup_steps=0)
    assert [learning_rate(once, done) for done in (0, 119, 120, 179)] == [2.0, 2.0, 0.2, 0.2]
    assert learning_rate(once, 180) == pytest.approx(0.02) == learning_rate(once, 200)


def test_cosine_in_cycles_starts_again():
    optim = OptimConfig(lr=1.0, cycles=2, steps=20)
    rates = [learning_rate(optim, done) for done in range(20)]
    assert rates[0] == rates[10] == 1.0 and rates[5] == pytest.approx(0.5) == rates[15]
    assert learning_rate(optim, 20) == pytest.approx(0.0)


def test_norms_biases_and_tokens_do_not_decay():
    model = narrow_model()
    decayed, kept = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    name_of = {id(p): n for n, p in model.named_parameters()}
    kept_names = {name_of[id(p)] for p in kept["params"]}
    assert {n for n in name_of.values() if n.endswith("bias") or "norm" in n or n == "iou_token"} <= kept_names
    assert {"stem.weight", "out.weight", "joint.0.qkv.weight", "iou_head.0.weight"} <= {
        name_of[id(p)] for p in decayed["params"]
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(name_of)


def test_parts_have_their_own_rate_and_a_longer_name_wins():
    model = create_model("sam_med3d_b", **MODELS["sam_med3d_b"].tiny)
    optim = OptimConfig(lr=2.0, lr_scale={"mask_decoder": 0.1, "mask_decoder.iou": 0.5}, steps=10, schedule="constant")
    optimiser = make_optimiser(model, optim)
    set_learning_rate(optimiser, optim, 0)
    rate_of = {id(p): g["lr"] for g in optimiser.param_groups for p in g["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == len(list(model.parameters()))
    assert rates["image_encoder.pos_embed"] == rates["prompt_encoder.no_mask_embed.weight"] == 2.0
    assert rates["mask_decoder.mask_tokens.weight"] == 0.2 and rates["mask_decoder.iou_token.weight"] == 1.0
    with pytest.raises(
        InputError, match=r"optim\.lr_scale must name parts of the model, got decoder; it has image_encoder, mask"
    ):
        parameter_groups(model, OptimConfig(lr_scale={"decoder": 0.1}))


def test_decay_all_decays_all_and_what_is_frozen_is_left_out():
    model = narrow_model()
    every = parameter_groups(model, OptimConfig(weight_decay=0.3, decay_all=True))
    assert {g["weight_decay"] for g in every if g["params"]} == {0.3}
    model.stem.requires_grad_(False)  # type: ignore[union-attr]
    left = {id(p) for g in parameter_groups(model, OptimConfig()) for p in g["params"]}
    assert left == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(InputError, match=r"leaves no parameter that learns"):
        make_optimiser(model.requires_grad_(False), OptimConfig())


def test_the_ema_follows_slowly_and_starts_fast():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EmaWeights(model, 0.9)
    nn.init.ones_(model.weight)
    expected = 0.0
    for count in range(1, 200):
        ema.update(model)
        decay = min(0.9, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay)
        assert float(ema.shadow["weight"]) == pytest.approx(expected, abs=1e-5)
    assert expected > 0.99 and float(model.weight.detach()) == 1
    off = EmaWeights(model, 0.0)
    off.update(model)
    with off.applied(model):
        assert float(model.weight.detach()) == 1 and not off.shadow


# The power schedule


def test_the_rate_is_a_power_of_what_is_left():
    optim = OptimConfig(lr=2.0, schedule="power", exponent=2.0, steps=10)
    assert [learning_rate(optim, done) for done in (0, 5, 9, 10, 99)] == pytest.approx([2.0, 0.5, 0.02, 0.0, 0.0])
    after = OptimConfig(lr=2.0, schedule="power", exponent=1.0, warmup_steps=2, steps=12)
    assert [learning_rate(after, done) for done in (0, 1, 2, 7, 11)] == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.2])
    line = OptimConfig(lr=2.0, schedule="power", exponent=1.0, cycles=2, steps=8)
    assert [learning_rate(line, done) for done in (0, 2, 4, 6)] == pytest.approx([2.0, 1.0, 2.0, 1.0])


def test_a_schedule_may_be_longer_than_the_run():
    line = OptimConfig(lr=4.0, schedule="power", exponent=1.0, schedule_length=2.0, steps=10)
    assert [learning_rate(line, done) for done in (0, 5, 10)] == pytest.approx([4.0, 3.0, 2.0])
    assert learning_rate(OptimConfig(lr=1.0, schedule_length=2.0, steps=10), 10) == pytest.approx(0.5)
    falls = OptimConfig(lr=1.0, schedule="multistep", milestones=[0.4, 0.6], schedule_length=2.0, steps=10)
    assert [learning_rate(falls, done) for done in (7, 8, 10)] == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"momentum": 1.0}, r"optim\.momentum must be from 0 \(none\) to below 1, got 1\.0"),
        ({"exponent": 0.0}, r"optim\.exponent must be above 0, got 0\.0"),
        ({"schedule_length": 0.5}, r"optim\.schedule_length must be 1 \(ends with the run\) or more, got 0\.5"),
    ],
)
def test_bad_values_are_refused(change, rule):
    with pytest.raises(InputError, match=rule):
        OptimConfig(**change)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(InputError, match=r"'optim\.name' must be one of adamw, sgd, muon, got 'adam'"):
        load_config(TrainConfig, None, ["optim.name=adam"])


# Dice


def test_plain_dice_of_a_click_is_not_squared():
    logits = torch.tensor([math.log(3.0), -math.log(3.0), 0.0, math.log(3.0)])[None, None, None, None]
    target = torch.tensor([1, 1, 0, 0]).bool()[None, None, None, None]
    # p = 3/4 1/4 1/2 3/4: sum p t = 1, sum p = 9/4, sum t = 2
    assert float(dice_loss(logits, target, 1.0, squared=False)) == pytest.approx(1 - (2 + 1) / (9 / 4 + 2 + 1))


def two_crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops of two voxels and two classes; of class 1 the probabilities are 3/4 1/4 and 1/2 1/2, its mask is 1 0
    and 0 0."""
    one = torch.tensor([[3.0, 1 / 3], [1.0, 1.0]]).log()  # logit of class 1 above that of class 0
    logits = torch.stack([torch.zeros_like(one), one], 1)[:, :, None, None]
    return logits, torch.tensor([[1, 0], [0, 0]])[:, None, None]


def test_dice_of_classes_by_hand():
    logits, numbers = two_crops()
    plain = [(1.5 + 1) / (1 + 1 + 1), (0 + 1) / (1 + 0 + 1)]  # (2 sum p t + 1) / (sum p + sum t + 1) of each crop
    assert float(class_dice_loss(logits, numbers, 1.0)) == pytest.approx(1 - sum(plain) / 2)
    squared = [(1.5 + 1) / (10 / 16 + 1 + 1), 1 / (1 / 2 + 0 + 1)]
    assert float(class_dice_loss(logits, numbers, 1.0, squared=True)) == pytest.approx(1 - sum(squared) / 2)
    together = (1.5 + 1) / (10 / 16 + 1 / 2 + 1 + 1)
    assert float(class_dice_loss(logits, numbers, 1.0, squared=True, batch=True)) == pytest.approx(1 - together)
    # class 0: probabilities 1/4 3/4 and 1/2 1/2, its mask 0 1 and 1 1
    background = (2 * (0.75 + 1) + 1) / (10 / 16 + 1 / 2 + 3 + 1)
    found = class_dice_loss(logits, numbers, 1.0, squared=True, background=True, batch=True)
    assert float(found) == pytest.approx(1 - (together + background) / 2)


def test_the_step_takes_the_form_of_dice_from_its_config():
    model = create_model("sam3d", **MODELS["sam3d"].tiny)
    image = torch.randn(2, 1, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (2, 1, 6, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    loss = LossConfig(ce=0, dice_form="squared", dice_background=True, dice_batch=True)
    found = SemanticStep(model, loss)(image, target, 0).loss
    expected = torch.zeros(())
    for (weight, logits), stride in zip(model.forward_supervised(image), (1, 2, 4), strict=True):
        numbers = target[:, 0, :, stride // 2 :: stride, stride // 2 :: stride].long()
        expected = expected + weight * class_dice_loss(logits, numbers, 1.0, squared=True, background=True, batch=True)
    torch.testing.assert_close(found, expected)


# Recipes as published


def recipe(name: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml")


def test_sam_med3d_as_published_has_two_rates_and_decays_everything():
    config = load_config(TrainConfig, ROOT / "configs" / "stage1.yaml")
    with torch.device("meta"):
        groups = parameter_groups(create_model("sam_med3d_b"), config.optim)
    counted: Counter[tuple[float, float]] = Counter()
    for group in groups:
        counted[group["scale"], group["weight_decay"]] += sum(p.numel() for p in group["params"])
    assert counted == {(1.0, 0.1): 92_924_928, (0.1, 0.1): 8_668 + 7_575_636}
    clicks = config.clicks
    assert (clicks.interactions, clicks.memory, clicks.detach, clicks.mask_only_turns) == (
        11,
        "newest",
        False,
        ["last", "random"],
    )
    assert (
        config.optim.batch * config.optim.accumulate * 2 == 240 and config.loss.iou == 0 and config.loss.turns == "sum"
    )


def test_sam3d_as_published():
    config = recipe("sam3d")
    assert (config.optim.name, config.optim.momentum, config.optim.lr, config.optim.weight_decay) == (
        "sgd",
        0.99,
        0.01,
        3e-5,
    )
    assert learning_rate(config.optim, 125_000) == pytest.approx(0.01 * 0.5**0.9)
    assert config.loss == LossConfig(dice=1, ce=1, dice_smooth=1e-5)  # plain, without background, crop by crop


def test_ma_sam_as_published():
    config = recipe("ma_sam")
    assert learning_rate(config.optim, 249) == pytest.approx(8e-4)
    # 300 of 400 epochs: a quarter is left at the end
    assert learning_rate(config.optim, config.optim.steps) == pytest.approx(8e-4 * 0.25**7, rel=1e-3)
    assert (config.loss.dice_form, config.loss.dice_background, config.loss.dice_batch) == ("squared", True, True)


def test_sam3d_adapter_as_published():
    config = recipe("sam3d_adapter")
    run = OptimConfig(**{**vars(config.optim), "steps": 200, "epochs": 0.0})
    for epoch in (0, 100, 200):  # a line from 1 to 0.01 over 500 epochs
        assert learning_rate(run, epoch) == pytest.approx(4e-4 * (1 - 0.99 * epoch / 500), rel=1e-4)
    assert config.loss.dice_form == "plain"


def test_a_cosine_over_minutes_follows_the_clock_and_not_the_steps():
    optim = OptimConfig(lr=2.0, warmup_steps=4, steps=100_000, schedule="cosine_minutes", max_minutes=10)
    assert [learning_rate(optim, 50, passed) for passed in (0, 0.5, 1, 1.2)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert learning_rate(optim, 1, 0.5) == pytest.approx(0.5)
    with pytest.raises(InputError, match=r"optim\.max_minutes must be above 0 with optim\.schedule=cosine_minutes"):
        OptimConfig(schedule="cosine_minutes")

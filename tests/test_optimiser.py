"""Optimisers, the power schedule and the forms of Dice that published recipes ask for, against values worked out by
hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from samed3d.config import LossConfig, OptimConfig, TrainConfig, load_config
from samed3d.errors import InputError
from samed3d.losses import dice_loss
from samed3d.models import MODELS, create_model
from samed3d.training.loop import train
from samed3d.training.optimiser import learning_rate, make_optimiser, set_learning_rate
from samed3d.training.semantic import SemanticStep, soft_dice_loss
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
    assert float(soft_dice_loss(logits, numbers, 1.0)) == pytest.approx(1 - sum(plain) / 2)
    squared = [(1.5 + 1) / (10 / 16 + 1 + 1), 1 / (1 / 2 + 0 + 1)]
    assert float(soft_dice_loss(logits, numbers, 1.0, squared=True)) == pytest.approx(1 - sum(squared) / 2)
    together = (1.5 + 1) / (10 / 16 + 1 / 2 + 1 + 1)
    assert float(soft_dice_loss(logits, numbers, 1.0, squared=True, batch=True)) == pytest.approx(1 - together)
    # class 0: probabilities 1/4 3/4 and 1/2 1/2, its mask 0 1 and 1 1
    background = (2 * (0.75 + 1) + 1) / (10 / 16 + 1 / 2 + 3 + 1)
    found = soft_dice_loss(logits, numbers, 1.0, squared=True, background=True, batch=True)
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
        expected = expected + weight * soft_dice_loss(logits, numbers, 1.0, squared=True, background=True, batch=True)
    torch.testing.assert_close(found, expected)


# Recipes as published


def recipe(name: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml")


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

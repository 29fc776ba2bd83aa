"""What only a GPU can show: ``pytest -m gpu``. Needs torch, numpy and accelerate, and none of the packages that read
files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_clicks import blobs, one_each
from test_training import samples, tiny_config

from samed3d.clicks import largest_components_by_torch, sample_clicks, squared_depths_by_torch
from samed3d.config import ClickConfig, LossConfig
from samed3d.crops import image_channels
from samed3d.geometry import CropFrame
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import CropPredictor
from samed3d.models import MODELS, create_model, load
from samed3d.training.loop import train
from samed3d.training.step import InteractiveStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DETERMINED = ClickConfig(interactions=3, policy="centre", box_probability=0.0, mask_only_probability=0.0)


def loss_of(
    device: str, *, bf16: bool = False, compiled: bool = False, name: str = "samed3d_unet", **overrides: Any
) -> tuple[float, float]:
    """Loss and length of the gradient of one step on fixed crops."""
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    step = InteractiveStep(model, DETERMINED, LossConfig(), compiled=compiled).to(device)
    image, target = (tensor.repeat(1, 1, 2, 2, 2).to(device) for tensor in samples())
    image = image[:, : image_channels(model.spec.normalisation)]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = step(image, target, 0).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in step.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.cat(gradients).norm())


def test_a_step_has_the_loss_and_gradient_of_a_cpu():
    assert loss_of("cuda") == pytest.approx(loss_of("cpu"), rel=5e-3)  # TF32 convolutions


def test_bf16_has_nearly_the_loss_of_fp32():
    single, half = loss_of("cuda"), loss_of("cuda", bf16=True)
    assert half[0] == pytest.approx(single[0], rel=0.02) and half[1] == pytest.approx(single[1], rel=0.1)


def test_a_compiled_encoder_has_the_loss_of_a_plain_one():
    tiny = {**MODELS["samed3d_tiny"].tiny, "input_shape": (32, 32, 32)}
    plain = loss_of("cuda", name="samed3d_tiny", **tiny)
    assert loss_of("cuda", name="samed3d_tiny", compiled=True, **tiny) == pytest.approx(plain, rel=5e-3)


def test_bf16_takes_less_memory():
    peaks = []
    model = create_model("samed3d_unet").cuda()
    for bf16 in (False, True):
        step = InteractiveStep(model, ClickConfig(interactions=4), LossConfig())
        image, target = (
            torch.randn(8, 2, 64, 64, 64, device="cuda"),
            torch.zeros(8, 1, 64, 64, 64, dtype=torch.bool, device="cuda"),
        )
        target[..., 20:40, 20:40, 20:40] = True
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            step(image, target, 0).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
        model.zero_grad()
    print(f"peak MiB of a step of 8 crops of 64^3, four clicks: fp32 {peaks[0]:.0f}, bf16 {peaks[1]:.0f}")
    assert peaks[1] < 0.9 * peaks[0]


def test_checkpointed_activations_take_less_memory_and_give_the_same_gradient():
    lengths, peaks = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = create_model("samed3d_tiny").cuda()
        for module in model.modules():
            if hasattr(module, "checkpoint_blocks"):
                module.checkpoint_blocks = checkpointed
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        d, h, w = model.spec.input_shape_zyx
        features = model.train().encode(torch.randn(2, 1, d, h, w, generator=torch.Generator().manual_seed(0)).cuda())
        sum(f.square().mean() for f in features.values()).backward()  # type: ignore[union-attr]
        peaks.append(torch.cuda.max_memory_allocated() - base)
        lengths.append(float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()))
    assert peaks[1] < 0.8 * peaks[0] and lengths[1] == pytest.approx(lengths[0], rel=1e-3)


@pytest.mark.parametrize("policy", ["uniform", "centre", "ritm", "mixed"])
def test_one_seed_draws_the_clicks_of_a_cpu(policy):
    pred, target = blobs(8, (24, 30, 28), 0.2, 1), blobs(8, (24, 30, 28), 0.0, 2)
    assert torch.equal(squared_depths_by_torch(target.cuda()).cpu(), squared_depths_by_torch(target))
    assert torch.equal(largest_components_by_torch(target.cuda()).cpu(), largest_components_by_torch(target))
    points, labels = sample_clicks(pred[:, None].cuda(), target[:, None].cuda(), policy, one_each(8))
    expected = sample_clicks(pred[:, None], target[:, None], policy, one_each(8))
    assert torch.equal(points.cpu(), expected[0]) and torch.equal(labels.cpu(), expected[1])


def test_a_run_learns_is_resumed_and_its_weights_load_on_a_cpu(tmp_path: Path):
    settings = [
        "run.device=cuda",
        "run.precision=bf16",
        "optim.name=muon",
        "clicks.policy=mixed",
        "optim.lr=0.002",
        "run.save_every=20",
    ]
    train(tiny_config(tmp_path / "run", *settings, "optim.steps=40", "optim.batch=16"), quiet=True)
    train(tiny_config(tmp_path / "run", *settings, "optim.steps=60", "optim.batch=16"), resume=True, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60 and np.mean([r["loss"] for r in rows[-10:]]) < 0.97 * np.mean(
        [r["loss"] for r in rows[:5]]
    )
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(starts) == 2 and "NVIDIA" in starts[0]["device"]
    assert next(load(str(tmp_path / "run" / "model.safetensors")).parameters()).device.type == "cpu"


def test_the_default_model_gives_the_mask_of_a_cpu():
    volume = np.random.default_rng(0).normal(0, 20, (70, 80, 60)).astype(np.float32)
    z, y, x = np.ogrid[:70, :80, :60]
    volume += 100 * (((z - 30) / 15) ** 2 + ((y - 40) / 12) ** 2 + ((x - 30) / 14) ** 2 < 1)
    frame = CropFrame.centred((30.0, 40.0, 30.0), (0.9, 0.9, 0.9), (64, 64, 64))
    prompts = ModelPrompts([((30.0, 40.0, 30.0), True), ((10.0, 10.0, 10.0), False)])
    masks = [
        CropPredictor(load("default"), torch.device(device), volume, (1.0, 1.0, 1.0)).decode(frame, prompts).logits > 0
        for device in ("cpu", "cuda")
    ]
    both = int((masks[0] & masks[1]).sum())
    assert 2 * both / int(masks[0].sum() + masks[1].sum()) > 0.98 and int(masks[0].sum()) > 1000

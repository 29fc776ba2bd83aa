"""Every file of ``configs/``, with a tiny network and tiny crops, lowers its loss in a few real steps; the smallest one
learns in full."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samed3d.config import TrainConfig, load_config
from samed3d.models import MODELS, create_model
from samed3d.models.weights import save_weights
from samed3d.training.loop import train
from samed3d.training.moe import gate_config
from samed3d.training.optimiser import make_optimiser, set_learning_rate
from samed3d.training.start import data_of, start_model, step_of
from tests.corpus_sources import case_arrays, store_case, store_corpus
from tests.test_moe import base_and_experts
from tests.test_training import metrics

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bright structures on noise, of four subjects."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        store_case(folder, "s", f"case{number}", *case_arrays(number))
    return store_corpus(folder)


def tiny(path: Path, corpus: Path, folder: Path) -> TrainConfig:
    """A config with its own loss, clicks, optimiser and schedule, but a tiny network, few samples and few steps."""
    given = load_config(TrainConfig, path)
    numbers = dict(MODELS[given.model.name].tiny)
    semantic = "class_names" in numbers
    if semantic:
        numbers |= {"class_names": ("s1", "s2"), "input_shape": (4, 32, 32)}
    changes = {
        "model.overrides": numbers,
        "model.weights": "",
        "data.corpus": [] if given.data.synthetic_share == 1 else [str(corpus)],
        "data.crop": [16, 16, 16] if semantic else numbers["input_shape"],
        "data.spacing_mm": 2.0 if given.data.spacing_mm else 0.0,
        "clicks.interactions": min(given.clicks.interactions, 3),
        **{"optim.batch": 2, "optim.warmup_steps": 0, "optim.epochs": 0, "optim.steps": STEPS},
        "run.folder": str(folder / "run"),
    }
    if given.loss.distill:
        torch.manual_seed(1)
        save_weights(create_model(given.model.name, **numbers), folder / "teacher.safetensors", {})
        changes |= {"loss.teacher": str(folder / "teacher.safetensors"), "loss.distill_layers": [[0, 0], [-1, -1]]}
    config = load_config(TrainConfig, path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    if path.stem == "moe":
        base, experts = base_and_experts(folder)
        config = gate_config(base, experts, replace(config, data=replace(config.data, crop=(32, 32, 32))))
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_few_steps_of_every_config_lower_its_loss(path, corpus, tmp_path):
    config = tiny(path, corpus, tmp_path)
    torch.manual_seed(0)
    model = start_model(config)
    step, optimiser, dataset = step_of(config, model), make_optimiser(model, config.optim), data_of(config, model)
    dataset.length = 2
    image, target = (torch.stack([dataset[n][key] for n in range(2)]) for key in ("image", "target"))
    losses = []
    for done in range(STEPS):
        set_learning_rate(optimiser, config.optim, done)
        output = step(image, target, 0)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(output.loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-4, losses


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smallest_config_learns_as_its_header_says(tmp_path):
    path = next(path for path in CONFIGS if path.stem == "tiny_cpu")
    assert "Dice rises from 0 to above 0.2" in path.read_text()
    train(load_config(TrainConfig, path, [f"run.folder={tmp_path / 'run'}"]), quiet=True)
    rows = metrics(tmp_path / "run")
    assert rows[0]["dice"][-1] < 0.1 and np.mean([row["dice"][-1] for row in rows[-3:]]) > 0.2

"""Learning from a frozen teacher: what is compared, what it costs, and that the teacher stays outside of everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from samed3d.config import ClickConfig, LossConfig, TrainConfig, load_config
from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptableModel
from samed3d.models.weights import save_weights
from samed3d.training.loop import train
from samed3d.training.step import InteractiveStep, Teacher
from tests.test_training import SMALL, metrics, narrow_model

TINY = MODELS["sam_med3d_b"].tiny


def model(seed: int, **changes: Any) -> PromptableModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("sam_med3d_b", **(TINY | changes))


def crops() -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.zeros(2, 1, 16, 16, 16, dtype=torch.bool)
    target[:, :, 3:9, 4:12, 5:13] = True
    return torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) + target, target


def step_of(student: PromptableModel, teacher: Teacher | None, weight: float = 2.0) -> InteractiveStep:
    clicks = ClickConfig(interactions=2, mask_only_probability=0.0)
    return InteractiveStep(
        student, clicks, LossConfig(distill=weight if teacher else 0.0, teacher="t" if teacher else ""), teacher
    )


def test_the_loss_is_the_clicks_loss_and_the_weighted_distance():
    image, target = crops()
    student, teacher = model(0), model(1, depth=4, global_blocks=(1, 3))
    plain = float(step_of(student, None)(image, target, 3).loss.detach())
    with torch.no_grad():
        own, taught = student.layer_features(image), teacher.layer_features(image)
    whole = step_of(student, Teacher(teacher))(image, target, 3)
    assert float(whole.loss.detach()) == pytest.approx(plain + 2 * float(F.mse_loss(own[-1], taught[-1])), rel=1e-5)
    pairs = [(0, 1), (1, 3)]  # student block i, teacher block 2i, from one
    whole = step_of(student, Teacher(teacher, pairs))(image, target, 3)
    expected = sum(float(F.mse_loss(own[i], taught[j])) for i, j in pairs) / 2
    assert float(whole.loss.detach()) == pytest.approx(plain + 2 * expected, rel=1e-5) and expected > 0.01


def test_the_encoder_runs_once_and_the_teacher_is_outside():
    image, target = crops()
    student, teacher = model(0), model(1)
    calls = []
    student.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    step = step_of(student, Teacher(teacher))
    names = {n for n, _ in step.named_parameters()}
    assert names == {f"model.{n}" for n, _ in student.named_parameters()} and len(step.state_dict()) == len(
        student.state_dict()
    )
    step.train()
    assert not teacher.training and student.training
    optimiser = torch.optim.AdamW(step.parameters(), lr=1e-2)
    step(image, target, 0).loss.backward()
    optimiser.step()
    assert len(calls) == 1
    assert all(p.grad is None for p in teacher.parameters()) and all(
        torch.equal(before[k], v) for k, v in teacher.state_dict().items()
    )
    assert student.get_parameter("image_encoder.pos_embed").grad is not None


def test_a_student_comes_nearer_to_its_teacher():
    image, target = crops()
    teacher = Teacher(model(1))
    student = model(0)
    step = step_of(student, teacher, weight=10.0)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    first = float(teacher.distance(student.layer_features(image), image).detach())
    for number in range(40):
        optimiser.zero_grad()
        step(image, target, number).loss.backward()
        optimiser.step()
    assert float(teacher.distance(student.layer_features(image), image).detach()) < 0.5 * first


def test_wrong_teachers_and_layers_are_named():
    image, _ = crops()
    student = model(0)
    with pytest.raises(InputError, match=r"distill_layers must be pairs from -1 to 2 and -1 to 2, got \[3, 0\]"):
        Teacher(model(1), [(3, 0)]).distance(student.layer_features(image), image)
    with pytest.raises(
        InputError, match=r"must name blocks of one shape, got \(2, 2, 2, 24\) and \(2, 2, 2, 32\) for \[0, 0\]"
    ):
        Teacher(model(1, dim=32), [(0, 0)]).distance(student.layer_features(image), image)
    with pytest.raises(
        InputError, match=r"loss\.teacher must be a model that hands out its layers' features .*, got 'samed3d_unet'"
    ):
        Teacher(narrow_model())
    with pytest.raises(
        InputError, match=r"model\.name with loss\.distill must be a model that hands out .*, got 'samed3d_unet'"
    ):
        InteractiveStep(narrow_model(), ClickConfig(), LossConfig(distill=1.0, teacher="t"), Teacher(model(1)))


def test_a_run_with_a_teacher_saves_the_student_alone(tmp_path: Path):
    teacher = tmp_path / "teacher.safetensors"
    save_weights(model(1), teacher, {})
    network = ["model.name=sam_med3d_b", f"model.overrides={json.dumps(TINY)}", f"run.folder={tmp_path / 'run'}"]
    loss = [f"loss.teacher={teacher}", "loss.distill=1", "loss.distill_layers=[[0,0],[-1,-1]]", "optim.steps=2"]
    config = load_config(TrainConfig, None, [SMALL[0], *SMALL[2:], *network, *loss])
    folder = train(config, quiet=True)
    assert load(folder / "model.safetensors").state_dict().keys() == model(0).state_dict().keys()
    assert len(metrics(folder)) == 2 and config.loss.distill_layers == [(0, 0), (-1, -1)]

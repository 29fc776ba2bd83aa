"""Muon: orthogonal steps for matrices and kernels, AdamW for the rest, resumable."""

from __future__ import annotations

import pytest
import torch
from test_training import narrow_model, samples

from samed3d.config import ClickConfig, LossConfig, OptimConfig
from samed3d.training.optimiser import ADAMW_RMS, Muon, make_optimiser, orthogonalised
from samed3d.training.step import InteractiveStep

OPTIM = OptimConfig(name="muon", lr=0.01, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (20, 20)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape and 0.6 < float(values.min()) and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = torch.linalg.diagonal(u.T @ found @ v.T)
    assert float(diagonal.min()) > 0.6  # the nearest orthogonal matrix is u v, here up to a factor per direction


def test_matrices_and_kernels_take_orthogonal_steps_and_the_rest_adamws():
    kernel, bias = torch.nn.Parameter(torch.zeros(4, 2, 3, 3, 3)), torch.nn.Parameter(torch.ones(4))
    groups = [
        {"params": [kernel], "matrices": True, "weight_decay": 0.0},
        {"params": [bias], "matrices": False, "weight_decay": 0.0},
    ]
    optimiser = Muon(groups, lr=0.1)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    bias.grad = torch.tensor([1.0, -2.0, 0.5, 3.0])
    optimiser.step()
    step = kernel.detach().flatten(1)
    values = torch.linalg.svdvals(step) / (0.1 * ADAMW_RMS * 54**0.5)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    assert float((step * kernel.grad.flatten(1)).sum()) < 0  # downhill
    assert torch.allclose(
        bias.detach(), 1 - 0.1 * bias.grad.sign(), atol=1e-5
    )  # AdamW's first step has the size of the rate


def test_only_what_decays_decays():
    optimiser = make_optimiser(narrow_model(), OPTIM)
    decays = {group["matrices"]: group["weight_decay"] for group in optimiser.param_groups}
    assert isinstance(optimiser, Muon) and decays == {True: 0.1, False: 0.0}


def losses_of(steps: int, interrupted_at: int | None = None) -> list[float]:
    model, (image, target) = narrow_model(), samples()
    optimiser = make_optimiser(model, OPTIM)
    step, found = InteractiveStep(model, ClickConfig(interactions=2), LossConfig()), []
    for number in range(steps):
        if number == interrupted_at:
            state = optimiser.state_dict()
            optimiser = make_optimiser(model, OPTIM)
            optimiser.load_state_dict(state)
        loss = step(image, target, seed=number).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


def test_it_learns_and_a_resumed_run_is_the_unbroken_one():
    losses = losses_of(12)
    assert losses[-1] < 0.9 * losses[0]
    assert losses_of(12, interrupted_at=6) == losses

"""Muon: steps of weight matrices and kernels are made orthogonal, so that every direction of a matrix moves alike; the rest takes AdamW.

One rate serves both: an orthogonal step is scaled to the size that AdamW's would have. Which parameters are matrices is decided in
``optimiser.py``.

Source: K. Jordan et al., Muon (2024), the update and the coefficients of its Newton-Schulz iteration; the scale is Moonlight's
(arXiv 2502.16982). Kernels are taken as matrices of output channels by everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2
"""Typical root mean square of AdamW's step before its rate."""
EPS = 1e-8


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``matrices: True``, AdamW for the others.

    Args:
        groups: With ``params``, ``matrices`` and ``weight_decay``, which is decoupled from the gradient in both.
        lr: Rate of both.
        momentum: Of Muon, Nesterov's.
        betas: Of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure`` computes the loss anew where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = _orthogonal_step if group["matrices"] else _adamw_step
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(move(parameter.grad, self.state[parameter], group), alpha=-group["lr"])
        return loss


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix (m, n) with all singular values one: after five iterations they lie between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def _orthogonal_step(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    mean: Tensor = state["momentum"].lerp_(gradient, 1 - group["momentum"])
    matrix = gradient.lerp(mean, group["momentum"]).flatten(1)
    return (orthogonalised(matrix) * (ADAMW_RMS * max(matrix.shape) ** 0.5)).view_as(gradient)


def _adamw_step(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not state:
        state.update(step=torch.zeros(()), first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
    state["step"] += 1
    first, second = group["betas"]
    state["first"].lerp_(gradient, 1 - first)
    state["second"].lerp_(gradient.square(), 1 - second)
    count = float(state["step"])
    return state["first"] / (1 - first**count) / ((state["second"] / (1 - second**count)).sqrt() + EPS)

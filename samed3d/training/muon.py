"""Muon: steps of weight matrices and kernels are made orthogonal, so that every direction of a matrix moves alike; the rest takes AdamW.

One rate serves both: an orthogonal step is scaled to the size that AdamW's would have. Which parameters are matrices is decided in
``optimiser.py``.

Source: K. Jordan et al., Muon (2024), the update and the coefficients of its Newton-Schulz iteration; the scale is Moonlight's
(arXiv 2502.16982). Kernels are taken as matrices of output channels by everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            steps = self._orthogonal_steps(with_gradient, group) if group["matrices"] else self._adamw_steps(with_gradient, group)
            for parameter, move in steps:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(move, alpha=-group["lr"])
        return loss

    def _orthogonal_steps(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault(parameter.flatten(1).shape, []).append(parameter)
        for shape, same in alike.items():  # together: for a GPU, many small products are slow
            matrices = torch.stack([_with_momentum(p.grad, self.state[p], group["momentum"]).flatten(1) for p in same])  # type: ignore[arg-type]
            moves = orthogonalised(matrices) * (ADAMW_RMS * max(shape) ** 0.5)
            yield from ((parameter, move.view_as(parameter)) for parameter, move in zip(same, moves, strict=True))

    def _adamw_steps(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in parameters:
            assert parameter.grad is not None
            yield parameter, _adamw_step(parameter.grad, self.state[parameter], group)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest matrices (..., m, n) with all singular values one: after five iterations they lie between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _with_momentum(gradient: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    mean: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
    return gradient.lerp(mean, momentum)


def _adamw_step(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not state:
        state.update(step=torch.zeros(()), first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
    state["step"] += 1
    first, second = group["betas"]
    state["first"].lerp_(gradient, 1 - first)
    state["second"].lerp_(gradient.square(), 1 - second)
    count = float(state["step"])
    return state["first"] / (1 - first**count) / ((state["second"] / (1 - second**count)).sqrt() + EPS)

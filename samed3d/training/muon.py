"""Muon: steps of weight matrices and kernels are made orthogonal, so that every direction of a matrix moves alike; the
rest takes AdamW.

One rate serves both: an orthogonal step is scaled to the size that AdamW's would have. Which parameters are matrices is
decided in
``optimiser.py``.

Source: K. Jordan et al., Muon (2024), the update and the coefficients of its Newton-Schulz iteration; the scale is
Moonlight's (arXiv 2502.16982). Kernels are taken as matrices of output channels by everything else.
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

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95)
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "matrices": False}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure`` computes the loss anew where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            moves = (
                self._orthogonal_moves(parameters, group) if group["matrices"] else self._adamw_moves(parameters, group)
            )
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, moves, alpha=-group["lr"])
        return loss

    def _orthogonal_moves(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        gradients = _gradients(parameters)
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
        means = [state["momentum"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, means, group["momentum"])
        alike: dict[torch.Size, list[int]] = {}
        for number, parameter in enumerate(parameters):
            alike.setdefault(parameter.flatten(1).shape, []).append(number)
        moves = list(parameters)
        for shape, numbers in alike.items():  # together: to a GPU, many small products are slow
            matrices = orthogonalised(torch.stack([steps[number].flatten(1) for number in numbers]))
            for number, matrix in zip(numbers, matrices * (ADAMW_RMS * max(shape) ** 0.5), strict=True):
                moves[number] = matrix.view_as(parameters[number])
        return moves

    def _adamw_moves(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        gradients = _gradients(parameters)
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state.update(step=torch.zeros(()), first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
            state["step"] += 1
        first, second = group["betas"]
        means, squares = [state["first"] for state in states], [state["second"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        counts = [float(state["step"]) for state in states]
        scales = torch._foreach_div(squares, [1 - second**count for count in counts])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, EPS)
        moves = torch._foreach_div(means, [1 - first**count for count in counts])
        torch._foreach_div_(moves, scales)
        return list(moves)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest matrices (..., m, n) with all singular values one: after five iterations they lie between about
    0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)

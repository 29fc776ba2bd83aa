"""Optimisers (AdamW, SGD, Muon), parameter groups, learning-rate schedules, and the EMA of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samed3d.config import OptimConfig
from samed3d.errors import InputError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2
"""Typical root mean square of AdamW's step before the learning rate."""
EPS = 1e-8


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, Muon, or SGD with Nesterov's momentum, over every trainable parameter.

    Raises:
        InputError: if nothing is trainable, or ``optim.lr_scale`` names a part that the model does not have.
    """
    groups = parameter_groups(model, optim)
    if not any(group["params"] for group in groups):
        raise InputError("model.train leaves no parameter that learns; choose another value, or train all")
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0, foreach=True)
    if optim.name == "muon":
        return Muon(groups, optim.lr, optim.momentum, optim.betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, foreach=True)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters by kind and by ``scale``, the factor on their learning rate.

    Weight matrices and kernels (``matrices``) decay; norms, biases, positions, embeddings and learned tokens do not,
    unless ``decay_all``.

    Raises:
        InputError: if ``optim.lr_scale`` names a part that the model does not have.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    unused = set(optim.lr_scale)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = [p for p in optim.lr_scale if f"{module_name}.{name}".lstrip(".").startswith(p)]
            unused.difference_update(parts)
            if not parameter.requires_grad:
                continue
            is_input = (
                isinstance(module, nn.Embedding) or name.startswith("rel_pos") or name.endswith(("_embed", "_token"))
            )
            scale = float(optim.lr_scale[max(parts, key=len)]) if parts else 1.0
            groups.setdefault((scale, parameter.ndim >= 2 and not is_input), []).append(parameter)
    if unused:
        known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise InputError(
            f"optim.lr_scale must name parts of the model, got {', '.join(sorted(unused))}; it has {', '.join(known)}"
        )
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if matrices or optim.decay_all else 0.0,
            "scale": scale,
            "matrices": matrices,
        }
        for (scale, matrices), parameters in groups.items()
        if parameters or scale == 1.0
    ]


def set_learning_rate(optimiser: Any, optim: OptimConfig, done: int, passed: float = 0.0) -> None:
    """Give every group the learning rate of the next optimiser step."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(optim, done, passed) * group.get("scale", 1.0)


def learning_rate(optim: OptimConfig, done: int, passed: float = 0.0) -> float:
    """The learning rate after ``done`` steps: linear warm-up, then ``optim.schedule``, ``optim.cycles`` times over.

    ``passed`` is the share of ``optim.max_minutes`` that is over, for ``cosine_minutes``, which falls during the
    warm-up too.
    """
    warmup_steps = min(optim.warmup_steps, optim.steps // 2)  # of a run that was shortened by one key
    warmup = min(1.0, (done + 1) / max(1, warmup_steps))
    if optim.schedule == "cosine_minutes":
        return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))
    if done < warmup_steps:
        return optim.lr * warmup
    if optim.schedule == "constant":
        return optim.lr
    after, span = done - warmup_steps, max(1, optim.steps - warmup_steps)
    position = after * optim.cycles % span / span if after < span else 1.0  # in integers, so milestones are met exactly
    position /= optim.schedule_length
    if optim.schedule == "multistep":
        return optim.lr * optim.gamma ** sum(position >= milestone for milestone in optim.milestones)
    if optim.schedule == "power":
        return optim.lr * (1 - position) ** optim.exponent
    return optim.lr * 0.5 * (1 + math.cos(math.pi * position))


class EmaWeights:
    """Exponential moving average (EMA) of the weights; with decay 0 it is the weights themselves."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the current weights; the decay starts low so that the random start is soon forgotten."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        state = model.state_dict()
        keys = [key for key, mean in self.shadow.items() if mean.is_floating_point()]
        if keys:
            current = [state[key].to(self.shadow[key].device) for key in keys]
            torch._foreach_lerp_([self.shadow[key] for key in keys], current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the EMA within the block, and its own weights again after it."""
        if not self.shadow:
            yield
            return
        own = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``matrices: True``, AdamW for the others, at one learning rate.

    Muon makes the step of a weight matrix orthogonal, so that all its directions move alike, and scales it to the size
    of AdamW's. A kernel is taken as a matrix of output channels by everything else. Weight decay is decoupled in both.
    ``momentum`` is Muon's, Nesterov's; ``betas`` are AdamW's.

    Source: K. Jordan et al., Muon (2024), the update and its Newton-Schulz coefficients; the scale is Moonlight's
    (arXiv 2502.16982).
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95)
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "matrices": False}
        super().__init__(groups, defaults)

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
            gradients = [parameter.grad for parameter in parameters]
            states = [self.state[parameter] for parameter in parameters]
            moves = (self._orthogonal_moves if group["matrices"] else self._adamw_moves)(gradients, states, group)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, moves, alpha=-group["lr"])
        return loss

    def _orthogonal_moves(
        self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> list[Tensor]:
        for state, gradient in zip(states, gradients, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
        means = [state["momentum"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, means, group["momentum"])
        of_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, gradient in enumerate(gradients):
            of_shape[gradient.flatten(1).shape].append(number)
        moves = list(gradients)
        for shape, numbers in of_shape.items():  # in one batch: many small products are slow on a GPU
            matrices = orthogonalised(torch.stack([steps[number].flatten(1) for number in numbers]))
            for number, matrix in zip(numbers, matrices * (ADAMW_RMS * max(shape) ** 0.5), strict=True):
                moves[number] = matrix.view_as(gradients[number])
        return moves

    def _adamw_moves(
        self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> list[Tensor]:
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


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximately the nearest orthogonal matrices to (..., m, n): singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)

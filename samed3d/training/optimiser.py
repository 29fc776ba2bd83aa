"""The optimiser, its parameter groups, the course of the learning rate, and the running mean of the weights.

No loop and no file here; read ``training/loop.py`` next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from samed3d.config import OptimConfig
from samed3d.errors import InputError
from samed3d.training.muon import Muon


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, Muon, or SGD with Nesterov's momentum, over every parameter that learns.

    Raises:
        InputError: if nothing learns, or ``optim.lr_scale`` names a part that the model does not have.
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
    """The parameters that learn, by kind and by ``scale``, the factor on their rate; ``matrices`` marks weight matrices
    and kernels.

    Weight matrices and kernels decay; norms, biases, positions, embeddings and learned tokens keep their size, unless
    ``decay_all``.

    Raises:
        InputError: if ``optim.lr_scale`` names a part that the model does not have.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (1.0, True): [],
        (1.0, False): [],
    }  # by (scale, whether matrices)
    unused = set(optim.lr_scale)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = [p for p in optim.lr_scale if f"{module_name}.{name}".lstrip(".").startswith(p)]
            unused.difference_update(parts)
            if not parameter.requires_grad:
                continue
            learned_input = (
                isinstance(module, nn.Embedding) or name.startswith("rel_pos") or name.endswith(("_embed", "_token"))
            )
            matrix = parameter.ndim >= 2 and not learned_input
            scale = float(optim.lr_scale[max(parts, key=len)]) if parts else 1.0
            groups.setdefault((scale, matrix), []).append(parameter)
    if unused:
        known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise InputError(
            f"optim.lr_scale must name parts of the model, got {', '.join(sorted(unused))}; it has {', '.join(known)}"
        )
    found = [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if matrices or optim.decay_all else 0.0,
            "scale": scale,
            "matrices": matrices,
        }
        for (scale, matrices), parameters in groups.items()
    ]
    return [group for group in found if group["params"] or group["scale"] == 1.0]


def set_learning_rate(optimiser: Any, optim: OptimConfig, done: int, passed: float = 0.0) -> None:
    """Give every group the rate of the next optimiser step."""
    rate = learning_rate(optim, done, passed)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def learning_rate(optim: OptimConfig, done: int, passed: float = 0.0) -> float:
    """The rate of the next optimiser step: linear warm-up, then as ``optim.schedule`` says, ``optim.cycles`` times
    over.

    ``passed`` is the share of ``optim.max_minutes`` that is over, for ``cosine_minutes``, which falls during the
    warm-up too.
    """
    if optim.schedule == "cosine_minutes":
        return (
            optim.lr
            * min(1.0, (done + 1) / max(1, optim.warmup_steps))
            * 0.5
            * (1 + math.cos(math.pi * min(1.0, passed)))
        )
    if done < optim.warmup_steps:
        return optim.lr * (done + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    passed, span = done - optim.warmup_steps, max(1, optim.steps - optim.warmup_steps)
    position = (
        passed * optim.cycles % span / span if passed < span else 1.0
    )  # whole numbers: a milestone is met exactly
    position /= optim.schedule_length
    if optim.schedule == "multistep":
        return optim.lr * optim.gamma ** sum(position >= milestone for milestone in optim.milestones)
    if optim.schedule == "power":
        return optim.lr * (1 - position) ** optim.exponent
    return optim.lr * 0.5 * (1 + math.cos(math.pi * position))


class AveragedWeights:
    """Exponential running mean of the weights; with decay 0 it is the weights themselves."""

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
            torch._foreach_lerp_(
                [self.shadow[key] for key in keys], [state[key].to(self.shadow[key].device) for key in keys], 1 - decay
            )

    def state_of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The mean, or the model's own weights where there is none."""
        return self.shadow or model.state_dict()

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the mean within the block, and its own weights again after it."""
        if not self.shadow:
            yield
            return
        live = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(live)

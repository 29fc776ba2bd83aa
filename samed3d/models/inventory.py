"""What an architecture holds and costs: parameters by part and floating-point operations, without weights or data.

Everything happens on torch's meta device, where tensors have shapes and no values. A deep encoder is many equal blocks
on equal shapes: each is counted once, which makes ``samed3d models`` several times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from samed3d.models.base import AnyModel, PromptableModel, PromptBatch


@dataclass(frozen=True)
class Inventory:
    """Exact counts of one architecture.

    Attributes:
        total: Parameters, frozen ones included; ``trained`` are those that learn by default.
        encoder: Parameters that ``encode`` uses (all but the decoder of a semantic model).
        prompts: Parameters that read prompts; ``decoder`` are the rest.
        encode_flops: Operations of one crop's ``encode``, two per multiply-add; of the whole forward for a semantic
            model.
        decode_flops: Operations of one ``decode`` with one click; 0 for a semantic model.
    """

    total: int
    trained: int
    encoder: int
    prompts: int
    decoder: int
    encode_flops: int
    decode_flops: int


def take_inventory(model: AnyModel) -> Inventory:
    """Count a model that was built under ``torch.device("meta")``."""
    parameters = list(model.named_parameters())

    def size_below(names: tuple[str, ...]) -> int:
        prefixes = tuple(f"{name}." for name in names)
        return sum(parameter.numel() for name, parameter in parameters if f"{name}.".startswith(prefixes))

    encoder, prompts = size_below(getattr(model, "encoder_parts", ())), size_below(getattr(model, "prompt_parts", ()))
    total = sum(p.numel() for _, p in parameters)
    trained = sum(p.numel() for _, p in parameters if p.requires_grad)
    return Inventory(total, trained, encoder, prompts, total - encoder - prompts, *count_flops(model))


def count_flops(model: AnyModel) -> tuple[int, int]:
    """Operations of ``encode`` and ``decode`` on one crop (convolutions, matrix products, attention)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # the counter follows gradients where there are any
    try:
        with torch.device("meta"), _repeats_counted_once(model) as tally:
            image = torch.empty(1, *model.spec.image_shape)
            if not isinstance(model, PromptableModel):
                model(image)
                return tally.total(), 0
            features = model.encode(image)
            encode = tally.total()
            model.decode(features, PromptBatch(torch.empty(1, 1, 3), torch.empty(1, 1, dtype=torch.int64)))
            return encode, tally.total() - encode
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Tally:
    """Operations that ran under ``counter``, and those of modules that were known already and did not run."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.known = 0
        self.answers: dict[Hashable, tuple[int, list[Any], Any]] = {}

    def total(self) -> int:
        """All so far."""
        return self.counter.get_total_flops() + self.known

    def remembering(self, forward: Callable[..., Any], likeness: Hashable) -> Callable[..., Any]:
        """A forward that runs once for equal modules and equal shapes, and returns empty tensors of its shapes then."""

        def call(*arguments: Any, **named: Any) -> Any:
            leaves, form = tree_flatten((arguments, named))
            key = (likeness, str(form), tuple(map(_shape, leaves)))
            if key in self.answers:
                operations, outputs, output_form = self.answers[key]
                self.known += operations
                fresh = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in outputs]
                return tree_unflatten(fresh, output_form)
            before = self.total()
            output = forward(*arguments, **named)
            self.answers[key] = (self.total() - before, *tree_flatten(output))
            return output

        return call


@contextmanager
def _repeats_counted_once(model: nn.Module) -> Iterator[_Tally]:
    """Within it, a submodule that equals an earlier one and gets the same shapes is not run.

    Exact, as on the meta device shapes are all that follows from a call; what cannot be compared is run.
    """
    own = [
        m for m in model.modules() if m is not model and "forward" not in vars(m) and any(True for _ in m.children())
    ]
    tally = _Tally()
    for module in own:
        module.forward = tally.remembering(module.forward, _likeness(module))
    try:
        with tally.counter:
            yield tally
    finally:
        for module in own:
            del module.__dict__["forward"]  # the class's own comes back


def _shape(leaf: Any) -> Hashable:
    """What an argument is on the meta device; one that is neither a tensor nor a plain value equals no other."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, int | float | str | None) else object()


_MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "forward"}) - {"training"}


def _likeness(module: nn.Module) -> Hashable:
    """Equal for modules of one class with the same numbers and shapes, all the way down."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (n, _shape(t)) for n, t in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
            ),
            repr([(key, value) for key, value in vars(part).items() if key not in _MODULE_ATTRIBUTES]),
        )
        for name, part in module.named_modules()
    )

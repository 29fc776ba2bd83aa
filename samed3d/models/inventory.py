"""What an architecture holds and costs: parameters by part and floating-point operations, counted without weights or
data.

Everything happens on torch's meta device, where tensors have shapes and no numbers. A deep encoder is many equal blocks
on equal shapes: each is counted once (``_repeats_counted_once``). ``samed3d models`` prints it; time and memory are
measured by
``benchmarks/compare_systems.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from samed3d.crops import image_channels
from samed3d.models.base import AnyModel, PromptableModel
from samed3d.nn.prompt_batch import PromptBatch


@dataclass(frozen=True)
class Inventory:
    """Exact counts of one architecture.

    Attributes:
        total: Parameters, frozen ones included.
        trained: Those that learn by default.
        encoder: Parameters that ``encode`` uses (all but the decoder of a semantic model).
        prompts: Parameters that read prompts.
        decoder: The rest.
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
    """Count a model that was built under ``torch.device("meta")``.

    Args:
        model: Its parameters must be on the meta device.
    """
    parameters = list(model.named_parameters())
    encoder = _size_below(parameters, getattr(model, "encoder_parts", ()))
    prompts = _size_below(parameters, getattr(model, "prompt_parts", ()))
    total = sum(p.numel() for _, p in parameters)
    trained = sum(p.numel() for _, p in parameters if p.requires_grad)
    encode_flops, decode_flops = count_flops(model)
    return Inventory(total, trained, encoder, prompts, total - encoder - prompts, encode_flops, decode_flops)


def count_flops(model: AnyModel) -> tuple[int, int]:
    """Operations of ``encode`` and of ``decode`` on one crop of the spec's shape; convolutions, matrix products and
    attention count.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # the counter follows gradients where there are any
    try:
        return _count_flops(model)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _count_flops(model: AnyModel) -> tuple[int, int]:
    spec = model.spec
    channels = image_channels(spec.normalisation) if isinstance(model, PromptableModel) else spec.in_channels
    with torch.device("meta"), _repeats_counted_once(model) as tally:
        image = torch.empty(1, channels, *spec.input_shape_zyx)
        features = model.encode(image) if isinstance(model, PromptableModel) else model(image)
        encode = tally.total()
        if isinstance(model, PromptableModel):
            model.decode(features, PromptBatch(torch.empty(1, 1, 3), torch.empty(1, 1, dtype=torch.int64)))
    return encode, tally.total() - encode


class Tally:
    """Operations that ran under ``counter``, and those of calls that were known already and did not run."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.known = 0

    def total(self) -> int:
        """All so far."""
        return self.counter.get_total_flops() + self.known


@contextmanager
def _repeats_counted_once(model: nn.Module) -> Iterator[Tally]:
    """Within it, a submodule that is equal to one before it and gets the same shapes is not run: shapes and operations
    are those of before.

    Exact, as on the meta device nothing else can follow from a call; what cannot be compared is run.
    """
    inside = [
        m for m in model.modules() if m is not model and "forward" not in vars(m) and any(True for _ in m.children())
    ]
    answers: dict[Hashable, tuple[int, list[Any], Any]] = {}
    tally = Tally()
    for module in inside:
        module.forward = _remembered(module.forward, _likeness(module), answers, tally)
    try:
        with tally.counter:
            yield tally
    finally:
        for module in inside:
            del module.__dict__["forward"]  # the class's own comes back


def _remembered(
    forward: Callable[..., Any], likeness: Hashable, answers: dict[Hashable, tuple[int, list[Any], Any]], tally: Tally
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        leaves, form = tree_flatten((arguments, named))
        key = (likeness, str(form), tuple(map(_shape, leaves)))
        if key in answers:
            operations, outputs, output_form = answers[key]
            tally.known += operations
            return tree_unflatten([torch.empty_like(x) if isinstance(x, Tensor) else x for x in outputs], output_form)
        before = tally.total()
        output = forward(*arguments, **named)
        answers[key] = (tally.total() - before, *tree_flatten(output))
        return output

    return call


def _shape(leaf: Any) -> Hashable:
    """What an argument is on the meta device; one that is no tensor and no plain value is equal to nothing."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, int | float | str | None) else object()


def _likeness(module: nn.Module) -> Hashable:
    """Equal for modules of the same class, numbers and shapes, all the way down."""
    tensors = [
        (name, _shape(t)) for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    numbers = [(name, _plain(value)) for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES]
    children = [(name, _likeness(child)) for name, child in module.named_children()]
    return type(module), tuple(tensors), tuple(numbers), tuple(children)


_MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "forward"}) - {"training"}


def _plain(value: Any) -> Hashable:
    """A value that can be compared; anything but numbers, words and containers of them is only equal to itself."""
    if isinstance(value, int | float | str | None):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_plain(getattr(value, f.name)) for f in dataclasses.fields(value))
    return type(value), id(value)


def _size_below(parameters: Iterable[tuple[str, nn.Parameter]], names: Iterable[str]) -> int:
    """Elements of the parameters that are, or are below, one of the dotted names."""
    prefixes = tuple(f"{name}." for name in names)
    return sum(parameter.numel() for name, parameter in parameters if f"{name}.".startswith(prefixes))

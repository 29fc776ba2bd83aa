"""What an architecture holds and costs: parameters by part and floating-point operations, counted without weights or data.

Everything happens on torch's meta device, where tensors have shapes and no numbers. ``samed3d models`` prints it; time and memory are
measured by ``benchmarks/compare_systems.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
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
        encode_flops: Operations of one crop's ``encode``, two per multiply-add; of the whole forward for a semantic model.
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
    """Operations of ``encode`` and of ``decode`` on one crop of the spec's shape; convolutions, matrix products and attention count."""
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
    with torch.device("meta"):
        image = torch.empty(1, channels, *spec.input_shape_zyx)
        with FlopCounterMode(display=False) as first:
            features = model.encode(image) if isinstance(model, PromptableModel) else model(image)
        if not isinstance(model, PromptableModel):
            return first.get_total_flops(), 0
        click = PromptBatch(torch.empty(1, 1, 3), torch.empty(1, 1, dtype=torch.int64))
        with FlopCounterMode(display=False) as second:
            model.decode(features, click)
    return first.get_total_flops(), second.get_total_flops()


def _size_below(parameters: Iterable[tuple[str, nn.Parameter]], names: Iterable[str]) -> int:
    """Elements of the parameters that are, or are below, one of the dotted names."""
    prefixes = tuple(f"{name}." for name in names)
    return sum(parameter.numel() for name, parameter in parameters if f"{name}.".startswith(prefixes))

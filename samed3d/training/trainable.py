"""What learns and what stays: everything, all but the image encoder, or adapters on a frozen image encoder together
with the decoder.

``adapters`` trains the prompt encoder and the mask decoder too, as SAMed and MA-SAM do. What is frozen stays the same
bit for bit: it has no gradient, so that neither the optimiser nor its weight decay touches it. Read
``training/loop.py`` next.
"""

from __future__ import annotations

import logging

from torch import nn

from samed3d.config import ModelConfig
from samed3d.errors import InputError
from samed3d.models.base import Adaptation
from samed3d.models.weights import tensors_sha256
from samed3d.nn.adapters import adapter_names, add_adapters

logger = logging.getLogger(__name__)


def choose_trainable(model: nn.Module, config: ModelConfig) -> None:
    """Freeze what shall not learn and put adapters on, in place; to be called once, with the start weights loaded.

    Args:
        model: A model that names its ``encoder_parts``. With ``train: all`` any model, and what it froze itself stays
            frozen.
        config: ``train``, ``adapter`` and ``rank``; ``weights`` is what an adapter's file names as its base.

    Raises:
        InputError: if the keys contradict each other, or the model has no image encoder that could be frozen.
    """
    if config.train != "adapters" and config.adapter != "none":
        raise InputError(
            f"model.adapter needs model.train adapters, got {config.adapter!r} with train {config.train!r}"
        )
    if config.train == "all":
        return
    if config.train == "adapters" and config.adapter == "none":
        raise InputError("model.adapter must be lora or fact when model.train is adapters, got 'none'")
    if config.train == "adapters" and not config.weights:
        raise InputError("model.weights must name the trained model that adapters are put on, got ''")
    if config.train == "adapters" and config.rank < 1:
        raise InputError(f"model.rank must be 1 or more, got {config.rank}")
    frozen = encoder_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if config.train == "adapters":
        base = tensors_sha256(model.state_dict())
        add_adapters(model, config.adapter, config.rank)
        model.adaptation = Adaptation(config.adapter, config.rank, config.weights, base)  # type: ignore[assignment]
    logger.info("%s", describe(model))


def encoder_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the image encoder.

    Raises:
        InputError: if the model does not say which they are.
    """
    parts: tuple[str, ...] = getattr(model, "encoder_parts", ())
    names = {name for name, _ in model.named_parameters() if any(name == p or name.startswith(f"{p}.") for p in parts)}
    if not names:
        raise InputError(f"model {type(model).__name__} has no image encoder that could be frozen; use model.train all")
    return names


def describe(model: nn.Module) -> str:
    """One line: how much learns."""
    total = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = set(adapter_names(model))
    adapters = sum(p.numel() for n, p in model.named_parameters() if n in names)
    return f"{learns:,} of {total:,} parameters learn" + (f", {adapters:,} of them adapters" if adapters else "")

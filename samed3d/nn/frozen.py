"""Frozen encoders: built once, never trained, never stored; a checkpoint names the file they come from and the hash of
its tensors.

A model that keeps frozen tensors inherits ``FrozenParts``: they are parameters like others (``.to()`` moves them, a
count of all parameters sees them) but the state dict leaves them out. Read ``models/sam3d.py`` next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.nn.vit2d import SamEncoder2d, TimmEncoder2d, build_encoder, encoder_state

logger = logging.getLogger(__name__)

ReadState = Callable[[str | Path], dict[str, Tensor]]
HashState = Callable[[Mapping[str, Tensor]], str]


class FrozenParts(nn.Module):
    """A module whose frozen parameters stay out of ``state_dict`` and keep their values in ``load_state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen_names: frozenset[str] = frozenset()

    def freeze(self, names: Iterable[str]) -> None:
        """Stop training these parameters (names as in ``named_parameters``), for good."""
        self.frozen_names = frozenset(names)
        for name in self.frozen_names:
            self.get_parameter(name).requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.state_dict``, without the frozen parameters."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in self.frozen_names:
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Runs before the children are loaded: they find the frozen tensors that they already hold.
        for name in self.frozen_names:
            state_dict.setdefault(prefix + name, self.get_parameter(name).detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def open_encoder(
    name: str, weights: str, sha256: str, read: ReadState, hash_of: HashState, seed: int = 0
) -> tuple[SamEncoder2d | TimmEncoder2d, str, dict[str, Tensor]]:
    """A pretrained 2D encoder, checked.

    Args:
        name: As ``vit2d.build_encoder``.
        weights: File with its weights, or ``""`` for random ones (a warning says so).
        sha256: What the hash of its tensors must be, or ``""`` for anything.
        read: From a file to a state dict (``models.weights.read_state``).
        hash_of: The hash (``models.weights.tensors_sha256``).
        seed: Of the random weights.

    Returns:
        The encoder, the hash of its tensors (``""`` on the meta device) and the file's whole state dict (empty without
        a file).

    Raises:
        InputError: if the file does not hold that encoder, or the hash differs.
    """
    encoder = build_encoder(name, seed)
    if next(encoder.parameters()).is_meta:
        return encoder, "", {}
    state: dict[str, Tensor] = {}
    if weights:
        state = read(weights)
        _load(encoder, encoder_state(state, name), f"{weights} does not hold the encoder {name}")
    else:
        logger.warning("the frozen encoder %s has random weights; name its file in backbone_weights", name)
    actual = hash_of(encoder.state_dict())
    if sha256 and actual != sha256:
        raise InputError(
            f"backbone_weights must be the file that this model was trained on (sha256 of its tensors {sha256[:16]}...), "
            f"got {weights or 'random weights'} ({actual[:16]}...); give the right file"
        )
    return encoder, actual, state


def _load(encoder: nn.Module, state: Mapping[str, Tensor], problem: str) -> None:
    own = encoder.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = (("missing", missing), ("unexpected", extra), ("mis-shaped", shapes))
        listed = "; ".join(f"{kind} ({len(keys)}): {', '.join(keys[:4])}" for kind, keys in parts if keys)
        raise InputError(f"{problem}; {listed}")
    encoder.load_state_dict(dict(state))

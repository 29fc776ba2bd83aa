"""Cost of a prompt: seconds, the encoder's part of them, and peak memory.

Policies, seeds and protocols often encode the very same crop. On a CPU its features are then taken from the first time
and the time that they took is added again, so that neither masks nor times depend on what was measured before.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samed3d.models.base import PromptableModel

KEPT_MIB = 128
"""Limit of the features that are kept beside those of the session; they are part of the peak memory."""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Cost:
    """Cost of one prompt; ``encode_seconds`` is None where there is no encoder, ``peak_mib`` where it is unknown."""

    seconds: float = 0.0
    encode_seconds: float | None = None
    peak_mib: float | None = None


class Meter:
    """Measures the prompts that are given inside ``running``."""

    def __init__(self, model: Any = None) -> None:
        """``model`` has an ``encode`` method, whose time is measured apart; None or any other object has none."""
        self._model = model if callable(getattr(model, "encode", None)) else None
        self._remembers = isinstance(model, PromptableModel)  # its contract: features follow from the crop alone
        self._encoding, self._remembered = 0.0, 0.0
        self._known: OrderedDict[bytes, tuple[Any, float]] = OrderedDict()

    @contextmanager
    def running(self) -> Iterator[Cost]:
        """The cost of what happens in the block, filled in when the block ends."""
        cost = Cost()
        self._encoding = self._remembered = 0.0
        _reset_peak()
        began = time.perf_counter()
        with self._encoder_timed():
            yield cost
        _wait_for_gpu()
        cost.seconds = time.perf_counter() - began + self._remembered
        cost.encode_seconds = None if self._model is None else self._encoding
        cost.peak_mib = _peak_mib()

    @contextmanager
    def _encoder_timed(self) -> Iterator[None]:
        """Replace the model's ``encode`` by a timed one, and put the model back as it was."""
        if self._model is None:
            yield
            return
        before = vars(self._model).get("encode")
        encode = self._model.encode
        self._model.encode = lambda image: self._encode(encode, image)
        try:
            yield
        finally:
            del self._model.encode
            if before is not None:
                self._model.encode = before

    def _encode(self, encode: Callable[[Any], Any], image: Any) -> Any:
        key = _fingerprint(image) if self._remembers else b""
        if key in self._known:
            self._known.move_to_end(key)
            features, seconds = self._known[key]
            self._encoding += seconds
            self._remembered += seconds
            return features
        _wait_for_gpu()
        began = time.perf_counter()
        features = encode(image)
        _wait_for_gpu()
        seconds = time.perf_counter() - began
        self._encoding += seconds
        if key and isinstance(features, dict):
            self._known[key] = (features, seconds)
            each = sum(tensor.numel() * tensor.element_size() for tensor in features.values())
            while len(self._known) * each > KEPT_MIB * 2**20:
                self._known.popitem(last=False)
        return features


def _fingerprint(image: Any) -> bytes:
    """A hash of a crop on a CPU; empty for anything else, which is not remembered."""
    if not isinstance(image, torch.Tensor) or image.device.type != "cpu":
        return b""
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest() + repr(tuple(image.shape)).encode()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")  # Linux: the peak of the resident set is now what it is
    except OSError:
        return


def _peak_mib() -> float | None:
    """Peak since the last reset; since the start of the process where the system cannot reset it; None on Windows."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)

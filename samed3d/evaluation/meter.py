"""What a prompt costs: seconds, the encoder's part of them, and peak memory. Read ``protocols/base.py`` for who is
metered.

Several users, seeds and protocols often look at the very same crop. On a CPU its features are then taken from the first
time, and what that took is charged again, so that no answer and no latency depends on what was measured before.
"""

from __future__ import annotations

import hashlib
import resource
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
"""Features that are kept beside those of the session itself; they are part of the peak memory that is told."""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Cost:
    """Of one prompt; ``encode_seconds`` is None where there is no encoder."""

    seconds: float = 0.0
    encode_seconds: float | None = None
    peak_mib: float | None = None


class Meter:
    """Measures what runs inside ``running``; the encoder's time comes from the model's own ``encode``, which it
    wraps.
    """

    def __init__(self, model: Any = None) -> None:
        """For a model with ``encode``, or None."""
        self._has_encoder = model is not None and callable(getattr(model, "encode", None))
        self._remembers = isinstance(model, PromptableModel)  # its contract: features follow from the crop alone
        self._encoding, self._remembered = 0.0, 0.0
        self._known: OrderedDict[bytes, tuple[Any, float]] = OrderedDict()
        if self._has_encoder:
            setattr(model, "encode", self._timed(model.encode))  # noqa: B010  a method of an instance is replaced on purpose

    @contextmanager
    def running(self) -> Iterator[Cost]:
        """Fills the cost when the block ends."""
        cost = Cost()
        self._encoding = self._remembered = 0.0
        _reset_peak()
        began = time.perf_counter()
        yield cost
        _wait_for_gpu()
        cost.seconds = time.perf_counter() - began + self._remembered
        cost.encode_seconds = self._encoding if self._has_encoder else None
        cost.peak_mib = _peak_mib()

    def _timed(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def timed(image: Any) -> Any:
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
            self._keep(key, features, seconds)
            return features

        return timed

    def _keep(self, key: bytes, features: Any, seconds: float) -> None:
        if not key or not isinstance(features, dict):
            return
        self._known[key] = (features, seconds)
        each = sum(tensor.numel() * tensor.element_size() for tensor in features.values())
        while len(self._known) * each > KEPT_MIB * 2**20:
            self._known.popitem(last=False)


def _fingerprint(image: Any) -> bytes:
    """Of a crop on a CPU; empty for what is not remembered."""
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


def _peak_mib() -> float:
    """Peak since the last reset; where the system cannot reset it, since the process began."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)

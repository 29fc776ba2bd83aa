"""Computing devices: which ones this machine has, which one a run uses, and whether it is fast in bf16."""

from __future__ import annotations

import os

import torch

from samed3d.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
"""What ``--device`` takes: ``auto`` is the first of CUDA, MPS (Apple's GPU) and the CPU that is available."""

_MISSING = {
    "cuda": "this machine has no CUDA GPU that torch can use",
    "mps": "this machine has no Apple GPU that torch can use",
}


def available_devices() -> list[str]:
    """The devices of this machine, fastest first; the last one is always ``"cpu"``."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


def pick_device(name: str) -> torch.device:
    """The device of a name; one that is not available is refused and never replaced.

    Args:
        name: One of ``DEVICES``.

    Raises:
        InputError: for another name, or for a device that this machine does not have.
    """
    if name not in DEVICES:
        raise InputError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(
            f"device {name} was asked for but {_MISSING[name]}; leave it out or choose from: {', '.join(available)}"
        )
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 numbers faster than float32 ones; ``SAMED3D_FP32=1`` says no."""
    if os.environ.get("SAMED3D_FP32") == "1":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(known.get("amx_tile") or known.get("avx512_bf16"))

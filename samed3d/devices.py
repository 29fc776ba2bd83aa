"""Computing devices: which ones this machine has, which one a run uses, and whether it is fast in bf16."""

from __future__ import annotations

import os

import torch

from samed3d.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
"""What ``--device`` takes: ``auto`` is the first of CUDA, MPS (Apple's GPU) and the CPU that is available."""

_MISSING = {
    name: f"this machine has no {kind} GPU that torch can use" for name, kind in (("cuda", "CUDA"), ("mps", "Apple"))
}


def available_devices() -> list[str]:
    """The devices of this machine, fastest first; the last one is always ``"cpu"``."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


def pick_device(name: str, option: str = "device") -> torch.device:
    """The device of a name in ``DEVICES``; one that is not available is refused and never replaced.

    Raises:
        InputError: for another name, or for a device that this machine does not have; it begins with ``option``.
    """
    if name not in DEVICES:
        raise InputError(f"{option} must be auto, cpu, cuda or mps, got {name!r}")
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        remedy = f"leave it out or choose from: {', '.join(available)}"
        raise InputError(f"{option} {name} was asked for but {_MISSING[name]}; {remedy}")
    return torch.device(name)


def widest_float(device: torch.device | str) -> torch.dtype:
    """The widest floating-point type of a device: float64 everywhere but on Apple's GPU, which has float32 at most."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 numbers faster than float32 ones; ``SAMED3D_FP32=1`` says no."""
    if os.environ.get("SAMED3D_FP32") == "1":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(known.get("amx_tile") or known.get("avx512_bf16"))

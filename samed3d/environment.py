"""What a run ran on: git revision, versions, processor and devices, as results and run folders store them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import samed3d

PACKAGES = ("torch", "numpy", "SimpleITK", "einops", "safetensors", "accelerate", "torchio")


def git_revision() -> str:
    """The abbreviated commit of this source tree, with ``+`` where files differ from it; empty outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return ""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions, system, processor, cores, threads and GPU of this process."""
    import torch

    return {
        "command": sys.argv,
        "samed3d": samed3d.__version__,
        "revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    """The processor's name as its maker writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""

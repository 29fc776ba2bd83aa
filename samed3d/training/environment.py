"""What a run ran on and what it must explain later: ``environment.json`` and, after a loss that is not finite,
``nonfinite.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samed3d import __version__
from samed3d.config import TrainConfig
from samed3d.data.sampling import split_weight
from samed3d.training.checkpoints import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = "torch accelerate numpy einops safetensors".split()
MANIFEST = ("corpus.json", "cases.csv", "labels.csv")


def manifest_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 over the manifest files of each corpus: what could be drawn, and from what."""
    found = {}
    for entry in config.data.corpus:
        digest = hashlib.sha256()
        for name in MANIFEST:
            path = Path(split_weight(entry)[0]) / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        found[entry] = digest.hexdigest()
    return found


def write_environment(
    folder: Path, config: TrainConfig, accelerator: Accelerator, corpora: dict[str, str], done: int
) -> None:
    """Add this start of the run to ``environment.json``, a list with one entry per start."""
    path = folder / "environment.json"
    starts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    device = accelerator.device
    starts.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": done,
            "command": sys.argv,
            "seed": config.run.seed,
            "samed3d": __version__,
            "revision": revision(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "corpora": corpora,
        }
    )
    write_text(path, json.dumps(starts, indent=1))


def revision() -> str:
    """The git revision of this source tree, with ``+`` where files differ from it; empty outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def write_nonfinite(
    folder: Path, step: int, loss: float, batch: dict[str, Any], seed: int, config: TrainConfig, rank: int
) -> Path:
    """Write what is needed to draw the batch of a loss that is not finite again: cases, sample numbers, seeds."""
    path = folder / "nonfinite.json"
    samples = batch["index"].tolist() if "index" in batch else []
    body = {
        "step": step,
        "loss": str(loss),
        "cases": list(batch["case"]),
        "samples": samples,
        "seed": config.run.seed,
        "rank": rank,
    }
    write_text(path, json.dumps(body | {"click_seed": seed}, indent=1))
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""

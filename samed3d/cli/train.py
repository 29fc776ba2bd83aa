"""``samed3d train``: its options. The work is in ``training/loop.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from samed3d.cli.options import Quiet


def train(
    config: Annotated[Path | None, typer.Option(help="YAML file; without it, the defaults of samed3d/config.py.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. optim.lr=1e-4.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of run.folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a promptable model with simulated clicks."""
    from samed3d.config import TrainConfig, load_config

    settings = load_config(TrainConfig, config, set_ or [])
    from samed3d.training.loop import train as run

    folder = run(settings, resume=resume, quiet=quiet)
    if not quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(f"run in {folder}")

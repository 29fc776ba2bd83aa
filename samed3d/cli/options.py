"""What several commands share: option types, and checks of paths before any work begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.errors import InputError

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda.")]
Model = Annotated[str, typer.Option(help="Shipped checkpoint, or a .safetensors file.")]


def check_exists(path: Path, what: str) -> None:
    """That an input is there."""
    if not path.exists():
        raise InputError(f"{what} does not exist: {path}")


def check_distinct(paths: dict[str, Path | None]) -> None:
    """That no output overwrites the image or another output."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        other = seen.setdefault(path.resolve(), name) if path is not None else name
        if other != name:
            raise InputError(f"{other} and {name} must be different files, got {path} for both")


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"--report cannot be written to {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)

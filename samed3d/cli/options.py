"""Option types that several commands share, and the check that an input exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samed3d.errors import InputError

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or mps.")]
Model = Annotated[str, typer.Option(help="Shipped checkpoint, .safetensors file, or hf://OWNER/NAME.")]
Texts = list[str] | None
Paths = list[Path] | None


def check_exists(path: Path, what: str) -> None:
    """Refuse an input that does not exist; ``what`` names it in the message."""
    if not path.exists():
        raise InputError(f"{what} does not exist: {path}")

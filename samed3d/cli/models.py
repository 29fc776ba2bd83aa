"""``samed3d models`` and ``samed3d import-weights``: what there is, and how foreign weights come in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import Quiet


def models() -> None:
    """List the architectures and the shipped checkpoints."""
    from rich.console import Console
    from rich.table import Table

    from samed3d.models import list_models
    from samed3d.models.weights import list_checkpoints

    table = Table("architecture", "parameters", "crop (zyx)", "spacing", "prompts", "clicks kept", box=None)
    for name in list_models():
        parameters, spec = _measure_model(name)
        spacing = "any" if spec.spacing_mm is None else f"{spec.spacing_mm:g} mm"
        crop = "x".join(str(n) for n in spec.input_shape_zyx)
        table.add_row(name, f"{parameters / 1e6:,.1f} M", crop, spacing, ", ".join(sorted(spec.prompts)), spec.click_memory)
    Console().print(table)
    typer.echo(f"checkpoints: {', '.join(list_checkpoints()) or 'none shipped'}")


def import_weights(
    source: Annotated[Path, typer.Argument(help="Upstream checkpoint (.pth). Nothing in it is executed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    model: Annotated[str, typer.Option(help="The architecture it belongs to.")] = "sam_med3d_b",
    quiet: Quiet = False,
) -> None:
    """Convert a SAM-Med3D training checkpoint to our format."""
    from samed3d.models import create_model
    from samed3d.models.weights import import_upstream, load_state_strict, save_weights
    from samed3d.volume import check_output

    check_output(output, suffixes=(".safetensors",))
    state = import_upstream(source)
    network = create_model(model)
    load_state_strict(network, state)
    save_weights(network, output, {"imported_from": source.name})
    if not quiet:
        typer.echo(f"{len(state)} tensors of {model} written to {output}")


def _measure_model(name: str) -> tuple[int, Any]:
    """Parameter count and spec, without the memory of the weights."""
    import torch

    from samed3d.models import create_model

    with torch.device("meta"):
        network = create_model(name)
    return sum(p.numel() for p in network.parameters()), network.spec

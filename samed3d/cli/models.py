"""``samed3d models``, ``import-weights`` and ``export``: architectures, published weights, and other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samed3d.cli.options import Quiet

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree
    from torch import nn

    from samed3d.models.base import AnyModel

WIDTH_OF_A_FILE = 320
"""Columns where the output is no terminal: no row is broken then."""


def models(
    name: Annotated[
        str | None, typer.Argument(help="An architecture, to see its modules; all are listed without it.")
    ] = None,
) -> None:
    """List the architectures and the shipped checkpoints, or the modules of one architecture. Nothing is allocated."""
    from rich.console import Console

    from samed3d.models.weights import list_checkpoints

    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    if name is not None:
        model = _on_meta(name)
        console.print(_facts(model), _tree(model, f"[bold]{name}[/bold]", _size(model)))
        return
    console.print(_table())
    typer.echo(f"checkpoints: {', '.join(list_checkpoints()) or 'none shipped'}")


def import_weights(
    source: Annotated[Path, typer.Argument(help="Upstream checkpoint (.pth). Nothing in it is executed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    model: Annotated[str, typer.Option(help="The architecture it belongs to.")] = "sam_med3d_b",
    quiet: Quiet = False,
) -> None:
    """Convert a published checkpoint: SAM-Med3D's, SAM's 2D encoders, or a teacher's as the start of a student."""
    from samed3d.models import create_model
    from samed3d.models.sam_backbone import import_sam
    from samed3d.models.sam_med3d import from_teacher, variant_of
    from samed3d.models.weights import import_upstream, load_state_strict, save_weights
    from samed3d.output import check_output

    check_output(output, suffixes=(".safetensors",))
    if model.startswith("sam_vit_"):
        count = import_sam(source, output, model)
    else:
        state = import_upstream(source)
        network = create_model(model, **(variant_of(state) if model.startswith("sam_med3d_") else {}))
        load_state_strict(network, from_teacher(network.state_dict(), state) if model == "fast_sam3d" else state)
        save_weights(network, output, {"imported_from": source.name})
        count = len(state)
    if not quiet:
        typer.echo(f"{count} tensors of {source.name} read as {model}, written to {output}")


def export(
    model: Annotated[
        str, typer.Argument(help="Checkpoint (name or file), or an architecture, with random weights then.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new.")],
    format_: Annotated[str, typer.Option("--format", help="onnx, torchscript, hf or monai.")] = "onnx",
    quiet: Quiet = False,
) -> None:
    """Write a model for other programs: ONNX graphs, TorchScript files, a Hugging Face folder or a MONAI bundle."""
    from samed3d.inference.export import export as run

    files = run(model, format_, output)
    if not quiet:
        for file in files:
            typer.echo(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)")


def _on_meta(name: str) -> AnyModel:
    import torch

    from samed3d.models import create_model

    with torch.device("meta"):
        return create_model(name)


def _table() -> Table:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from samed3d.models import list_models
    from samed3d.models.inventory import take_inventory

    numbers = ("parameters", "trained", "encoder", "prompts", "decoder", "GFLOP encode", "GFLOP decode")
    table = Table("architecture", box=None)
    for heading in numbers:
        table.add_column(heading, justify="right")
    for heading in ("crop (zyx)", "spacing", "understands", "clicks", "source"):
        table.add_column(heading)
    quiet = not sys.stderr.isatty()
    for name in track(list_models(), "counting", console=Console(stderr=True), transient=True, disable=quiet):
        model = _on_meta(name)
        counts = take_inventory(model)
        row = [f"{n:,}" for n in (counts.total, counts.trained, counts.encoder, counts.prompts, counts.decoder)]
        row += [f"{flops / 1e9:,.1f}" if flops else "-" for flops in (counts.encode_flops, counts.decode_flops)]
        table.add_row(name, *row, *_input(model), model.spec.source)
    return table


def _input(model: AnyModel) -> tuple[str, str, str, str]:
    """Crop, spacing, prompts and memory of clicks, as shown."""
    spec = model.spec
    crop = "x".join(str(n) for n in spec.input_shape_zyx)
    spacing = "any" if spec.spacing_mm is None else f"{spec.spacing_mm:g} mm"
    if spec.classes:
        return crop, spacing, f"nothing: {spec.classes} classes", "-"
    return crop, spacing, ", ".join(sorted(spec.prompts)), spec.click_memory


def _facts(model: AnyModel) -> Table:
    from rich.table import Table

    from samed3d.models.inventory import take_inventory

    counts, spec = take_inventory(model), model.spec
    crop, spacing, understands, clicks = _input(model)
    parts = f"encoder {counts.encoder:,}, prompts {counts.prompts:,}, decoder {counts.decoder:,}"
    encode, decode = counts.encode_flops / 1e9, counts.decode_flops / 1e9
    lines = {
        "source": spec.source,
        "parameters": f"{counts.total:,} ({parts})",
        "trained": f"{counts.trained:,}",
        "operations": f"{encode:,.2f} GFLOP to encode a crop, {decode:,.2f} to decode a click",
        "input": f"{crop} voxels of {spacing}, {spec.normalisation}",
        "understands": f"{understands}; clicks kept: {clicks}",
    }
    table = Table.grid(padding=(0, 2))
    for line in lines.items():
        table.add_row(*line)
    return table


def _tree(module: nn.Module, label: str, size: int) -> Tree:
    """The modules with their parameters; neighbours alike in class and size are one line."""
    from rich.tree import Tree

    tree = Tree(f"{label} {type(module).__name__} [dim]{size:,}[/dim]")
    for first, last, child, child_size in _runs(module):
        name = first if first == last else f"{first} to {last}, each"
        tree.add(_tree(child, name, child_size))
    return tree


def _runs(module: nn.Module) -> list[tuple[str, str, nn.Module, int]]:
    """Children that hold parameters: first and last name of each run of equal ones, one of them, its size."""
    runs: list[tuple[str, str, nn.Module, int]] = []
    for name, child in module.named_children():
        size = _size(child)
        if size and runs and (type(runs[-1][2]), runs[-1][3]) == (type(child), size):
            runs[-1] = (runs[-1][0], name, child, size)
        elif size:
            runs.append((name, name, child, size))
    return runs


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""``samed3d train``: its options. The work is in ``training/loop.py`` and ``training/finetune.py``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from samed3d.cli.options import Paths, Quiet, Texts
from samed3d.errors import InputError


def _finetuning(help: str, *names: str, metavar: str | None = None) -> Any:
    """An option of the help's panel on fine-tuning."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Fine-tuning")


def train(
    config: Annotated[Path | None, typer.Option(help="YAML file; without it, the defaults of samed3d/config.")] = None,
    set_: Annotated[Texts, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. optim.lr=1e-4.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture; the same as --set model.name=NAME.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Start from this run folder or checkpoint.")] = None,
    moe: Annotated[Texts, typer.Option(help="Train the gate of a mixture of these experts; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint of run.folder.")] = False,
    finetune: Annotated[str | None, _finetuning("Start from this checkpoint; needs --data.", metavar="MODEL")] = None,
    data: Annotated[Paths, _finetuning("Folder of labelled volumes or corpus; repeatable.")] = None,
    elsewhere: Annotated[Paths, _finetuning("Evaluated as well, not trained on: what is forgotten.")] = None,
    output: Annotated[Path | None, _finetuning("Run folder.", "--output", "-o")] = None,
    train_: Annotated[str | None, _finetuning("What learns: all (default), decoder or adapters.", "--train")] = None,
    adapter: Annotated[str | None, _finetuning("lora (default with --train adapters) or fact.")] = None,
    rank: Annotated[int | None, _finetuning("Rank of the adapter. [default: 8]")] = None,
    steps: Annotated[int | None, _finetuning("Optimiser steps. [default: by the data]")] = None,
    minutes: Annotated[
        float | None, _finetuning("How long everything may take, measuring included, instead of --steps.")
    ] = None,
    structures: Annotated[int | None, _finetuning("Structures evaluated before and after. [default: 8]")] = None,
    seeds: Annotated[int | None, _finetuning("Click seeds of that evaluation. [default: 3]")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a promptable model with simulated clicks, or fine-tune one on a folder of labelled volumes."""
    options: dict[str, Any] = dict(train=train_, adapter=adapter, rank=rank, steps=steps)
    options |= dict(minutes=minutes, structures=structures, seeds=seeds)
    given = {name: value for name, value in options.items() if value is not None}
    if finetune is not None:
        others = {"--config": config, "--model": model, "--from": from_, "--moe": moe}
        if joined := next((name for name, value in others.items() if value), None):
            remedy = "use --set, or train with --config configs/finetune.yaml on a prepared corpus"
            raise InputError(f"--finetune has its own recipe and cannot be joined with {joined}; {remedy}")
        _finetune(finetune, data or [], elsewhere or [], output, given, tuple(set_ or ()), resume, quiet)
        return
    given |= {k: v for k, v in {"data": data, "elsewhere": elsewhere, "output": output}.items() if v}
    if given:
        first = next(iter(given))
        raise InputError(f"--{first} goes with --finetune MODEL; the key of a config is {_CONFIG_KEYS[first]}")
    from samed3d.config import TrainConfig, load_config

    short = [
        *([f"model.name={model}"] if model else []),
        *([f"model.weights={json.dumps(str(_weights_of(from_)))}"] if from_ else []),
    ]
    changes = [*short, *(set_ or [])]
    if any(c.startswith("optim.steps=") for c in changes) and not any(c.startswith("optim.epochs=") for c in changes):
        changes.append("optim.epochs=0")  # steps that are asked for count, whatever the file says
    settings = load_config(TrainConfig, config, changes)
    if moe:
        from samed3d.training.moe import gate_config

        settings = gate_config(settings.model.weights or "default", moe, settings, resume=resume)
    from samed3d.training.loop import train as run

    folder = run(settings, resume=resume, quiet=quiet)
    if not quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(f"run in {folder}")


def _weights_of(run: Path) -> Path:
    """A run folder's best model where there was a validation, else its last; a file as it is."""
    from samed3d.models.weights import find_checkpoint

    found = find_checkpoint(run) if run.is_dir() else run
    if found is None:
        raise InputError(f"--from needs a run folder with model.safetensors, or a checkpoint, got {run}")
    return found


_CONFIG_KEYS = {
    "train": "model.train",
    "adapter": "model.adapter",
    "rank": "model.rank",
    "steps": "optim.steps",
    "minutes": "optim.max_minutes",
    "structures": "validation.structures",
    "seeds": "validation.seed",
    "elsewhere": "validation.hold_out",
    "data": "data.corpus",
    "output": "run.folder",
}


def _finetune(
    base: str,
    data: list[Path],
    elsewhere: list[Path],
    output: Path | None,
    given: dict[str, Any],
    changes: tuple[str, ...],
    resume: bool,
    quiet: bool,
) -> None:
    began = time.monotonic()
    if not data:
        raise InputError("--finetune needs --data FOLDER, a folder of labelled volumes")
    if "adapter" in given:
        given.setdefault("train", "adapters")
    if given.get("train") == "adapters":
        given.setdefault("adapter", "lora")
    if "rank" in given and given.get("train") != "adapters":
        raise InputError(f"--rank goes with --train adapters, got --train {given.get('train', 'all')}")
    from samed3d.training.finetune import FinetuneOptions, check_output, load_base
    from samed3d.training.finetune import finetune as run

    options = FinetuneOptions(**given, changes=changes, began=began)
    folder = output or Path("runs") / f"finetune_{data[0].resolve().name}"
    if not resume:
        check_output(folder)
    load_base(base)  # a wrong name is said before the data are prepared
    from data_prep.pipeline import cached_corpus

    shown = not quiet and sys.stderr.isatty()
    corpora, others = (
        [cached_corpus(one, jobs=os.cpu_count() or 1, progress=shown) for one in folders]
        for folders in (data, elsewhere)
    )
    result = run(base, corpora, folder, options, elsewhere=others, resume=resume, quiet=quiet)
    if not quiet and result.table:
        typer.echo(result.table)
        weights = folder / "model.safetensors"
        typer.echo(f"model in {weights}; use it with: samed3d segment IMAGE --model {weights}")

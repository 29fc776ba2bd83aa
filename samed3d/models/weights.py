"""Weights on disk: one ``.safetensors`` file whose JSON header names the model, its numbers and where they come from.

Also reads upstream training checkpoints (``.pth``) without running what they contain, puts adapters on their base, and
finds checkpoints by name, shipped or on Hugging Face. Building a model from a file is ``samed3d.models.load``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samed3d.errors import InputError
from samed3d.models.base import Adaptation, AnyModel, ModelSpec, PromptableModel
from samed3d.nn.adapters import add_adapters
from samed3d.output import check_input, replacing, write_json

RUN_MODELS = ("best.safetensors", "model.safetensors")  # the first that a run folder has is its model
HEADER_KEY = "samed3d"
HEADER_VERSION = 1
OWN_KEYS = ("version", "model", "config", "spec")
"""Header fields that every file has."""
ADAPTER_KEY = "adapter"
"""Header field of a file that holds what was trained beside a base, and not a whole model."""
CHECKPOINT_FOLDER_VARIABLE = "SAMED3D_CHECKPOINTS"
HUB, PRETRAINED = "hf://", "model.safetensors"
"""Beginning of the address of a model on Hugging Face, and its weights file there."""
_MAX_LISTED = 12


def save_weights(
    model: AnyModel, path: str | Path, metadata: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write a model to one ``.safetensors`` file, whole or not at all; its ``spec`` and ``config`` go to the header.

    Of a model with adapters (``model.adaptation``) only what was trained is written, with the name and hash of its base
    in the header; ``put_on_base`` makes it whole again. ``metadata`` are free JSON fields of the header (data, licence,
    metrics, revision); a ``dtype`` such as ``torch.float16``, which halves the file, is that of stored numbers.

    Raises:
        InputError: if the file cannot be written or ``metadata`` uses a key of the header.
    """
    header = header_of(model.spec, model.config)
    state = model.state_dict()
    if adaptation := getattr(model, "adaptation", None):
        header[ADAPTER_KEY] = asdict(adaptation)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name in trained}
    if taken := sorted(set(header) & set(metadata)):
        raise InputError(f"metadata must not use the header's own keys, got {', '.join(taken)}; rename them")
    write_tensors({name: _to_stored(tensor, dtype) for name, tensor in state.items()}, path, {**header, **metadata})


def header_of(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The header fields that make a file loadable."""
    return {"version": HEADER_VERSION, "model": spec.name, "config": config, "spec": spec_to_json(spec)}


def write_tensors(tensors: dict[str, Tensor], path: str | Path, header: Mapping[str, Any]) -> None:
    """Write CPU tensors and a header (see ``header_of``) to a ``.safetensors`` file, whole or not at all.

    Raises:
        InputError: if the file cannot be written.
    """
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors makes files that only their owner may read
        try:
            save_file(tensors, partial, metadata={HEADER_KEY: json.dumps(header)})
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error
        partial.chmod(mode)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ``save_weights``.

    Returns:
        The state dict on the CPU (half-precision tensors as float32) and the header.

    Raises:
        InputError: if the file is missing, is not safetensors or has no samed3d header.
    """
    path = Path(path)
    header = read_header(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        state = {name: _to_float32(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return state, header


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a weights file, without reading its tensors.

    Raises:
        InputError: as ``read_weights``.
    """
    path = Path(path)
    check_input(path, "checkpoint", folder=False)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (OSError, SafetensorError) as error:
        rule = "checkpoint must be a .safetensors file written by samed3d"
        remedy = "convert an upstream checkpoint with: samed3d import-weights"
        raise InputError(f"{rule}, got {path} ({error}); {remedy}") from error
    if text is None:
        raise InputError(f"checkpoint has no samed3d header, so its architecture is unknown: {path}")
    header = json.loads(text)
    version = header.get("version")
    if version != HEADER_VERSION:
        rule = f"checkpoint header must have version {HEADER_VERSION}"
        raise InputError(f"{rule}, got {version!r} in {path}; update samed3d")
    if not set(OWN_KEYS) <= header.keys():
        raise InputError(f"checkpoint header must name model, config and spec, got {', '.join(header)} in {path}")
    return header


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values (as float32), which does not depend on how a file stores them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = _to_stored(state[name], torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def amend_header(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Add fields to the header of a weights file, or replace them, in place.

    Raises:
        InputError: as ``read_weights``, or if a fact would replace what makes the file loadable.
    """
    if taken := sorted({*OWN_KEYS, ADAPTER_KEY} & set(facts)):
        raise InputError(f"facts must not use the header's own keys, got {', '.join(taken)}; rename them")
    header = {**read_header(path), **facts}
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    write_tensors(tensors, path, header)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that has not exactly the names and shapes of ``own``, which may be on the meta device.

    Raises:
        InputError: that lists missing, unexpected and mis-shaped keys.
    """
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "mis-shaped": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind} ({len(names)}): {_shorten(names)}" for kind, names in problems.items() if names)
        raise InputError(f"weights do not fit the model; {listed}")


def load_state_strict(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict into a model; every key and shape must agree, otherwise nothing is copied.

    Raises:
        InputError: as ``check_state``.
    """
    check_state(model.state_dict(), state)
    model.load_state_dict(dict(state), strict=True)


def put_on_base(
    model: PromptableModel, trained: Mapping[str, Tensor], header: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """The whole state dict of a file of adapters, which are added to the freshly built ``model``; all else is frozen.

    The base is found by the name in the file's header, or beside the file at ``path``.

    Raises:
        InputError: if the base is not found or is not the one that the adapters were trained on.
    """
    try:
        adaptation = Adaptation(**header[ADAPTER_KEY])
    except TypeError as error:
        rule = f"header of {path} must name kind, rank, base and base_sha256 of its adapter"
        raise InputError(f"{rule} ({error}); update samed3d") from error
    found = find_checkpoint(adaptation.base) or find_checkpoint(path.with_name(Path(adaptation.base).name))
    if found is None:
        raise InputError(f"{path} is an adapter of {adaptation.base!r}, which is not there; put that file beside it")
    base, base_header = read_weights(found)
    if ADAPTER_KEY in base_header:
        remedy = "merge that one into its base first"
        raise InputError(f"{path} is an adapter of {found}, which is an adapter itself; {remedy}")
    actual, expected = tensors_sha256(base), adaptation.base_sha256
    if actual != expected:
        remedy = "find the weights that it was trained on, or train the adapter again"
        raise InputError(
            f"{path} was trained on weights with tensors {expected[:12]}, {found} has {actual[:12]}; {remedy}"
        )
    add_adapters(model, adaptation.kind, adaptation.rank)
    model.adaptation = adaptation
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return {**base, **trained}


def import_upstream(path: str | Path) -> dict[str, Tensor]:
    """The model's state dict from an upstream SAM-Med3D checkpoint (``.pth``), as its released ``train.py`` writes it.

    Takes a training checkpoint (``model_state_dict`` beside optimiser state and an ``argparse.Namespace``) or a bare
    state dict, with or without ``module.`` before the keys. Nothing in the file is executed: apart from tensors and
    plain containers, only ``argparse.Namespace`` is allowed.

    Raises:
        InputError: if the file is missing, damaged, holds any other Python object, or holds no state dict.
    """
    path = Path(path)
    check_input(path, "checkpoint", folder=False)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            body = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        held = f"the Python object {refused.group(1)}" if refused else "something other than tensors"
        rule = "checkpoint must hold only tensors and argparse.Namespace"
        raise InputError(f"{rule}, but {path} holds {held}; it was not opened") from error
    except Exception as error:  # torch.load raises many types for a damaged archive
        raise InputError(f"checkpoint is not a readable PyTorch file: {path} ({str(error).splitlines()[0]})") from error
    state = body.get("model_state_dict", body) if isinstance(body, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"checkpoint must hold a state dict or one under 'model_state_dict', got neither in {path}")
    return {str(name).removeprefix("module."): _to_float32(tensor) for name, tensor in state.items()}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of any weights file: ours (``.safetensors``) or a foreign one (``.pth``, see ``import_upstream``).

    A file that is not at ``path`` is looked for under its name in the folder of ``SAMED3D_CHECKPOINTS``.

    Raises:
        InputError: as ``read_weights`` and ``import_upstream``.
    """
    path = Path(path)
    folder = os.environ.get(CHECKPOINT_FOLDER_VARIABLE)
    if not path.is_file() and folder and (Path(folder) / path.name).is_file():
        path = Path(folder) / path.name
    return read_weights(path)[0] if path.suffix == ".safetensors" else import_upstream(path)


def fetch(address: str) -> Path:
    """The weights file of ``hf://OWNER/NAME`` or ``hf://OWNER/NAME@REVISION``, from Hugging Face or its cache.

    Raises:
        InputError: if the address is wrong, the file cannot be had or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(f"{address} needs huggingface_hub; run: pip install 'samed3d[export]'") from error
    repository, _, revision = address.removeprefix(HUB).partition("@")
    if repository.count("/") != 1:
        raise InputError(f"a model on Hugging Face must be {HUB}OWNER/NAME, with @REVISION if wanted, got {address!r}")
    try:
        return Path(hf_hub_download(repository, PRETRAINED, revision=revision or None))
    except Exception as error:  # the hub's own types, the network's and the file system's
        raise InputError(f"{address} cannot be fetched ({str(error).strip().splitlines()[0]})") from error


def find_checkpoint(name_or_path: str | Path) -> Path | None:
    """The weights file of that path or run folder, of that name in the manifest, or of ``hf://OWNER/NAME``; else None.

    Raises:
        InputError: if the manifest's file is missing or another one, or Hugging Face has no such model.
    """
    if str(name_or_path).startswith(HUB):
        return fetch(str(name_or_path))
    for path in (Path(name_or_path), *(Path(name_or_path) / name for name in RUN_MODELS)):
        if path.is_file():
            return path
    if (found := manifest_entries().get(str(name_or_path))) is None:
        return None
    folder, entry = found
    path = folder / entry["file"]
    if not path.is_file():
        listed = folder / "manifest.json"
        raise InputError(f"checkpoint {str(name_or_path)!r} is in {listed} but its file is missing: {path}")
    if (actual := _sha256(path)) != entry["sha256"]:
        raise InputError(f"checkpoint {path} must have sha256 {entry['sha256']}, got {actual}; fetch it again")
    return path


def publish(weights: str | Path, name: str, folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Give a weights file a name: a half-precision copy in ``folder`` and its entry in that folder's ``manifest.json``.

    Args:
        weights: A file of ``save_weights``, such as a run's ``model.safetensors``.
        name: What ``load`` and ``--model`` will take; an entry of that name is replaced.
        folder: ``checkpoints`` in the repository, or the folder named by SAMED3D_CHECKPOINTS.
        facts: Free JSON fields of the entry: licence, data, command, revision.

    Raises:
        InputError: if the file cannot be read or the folder cannot be written.
    """
    folder = Path(folder)
    state, header = read_weights(weights)
    path = folder / f"{name}.safetensors"
    tensors = {key: _to_stored(tensor, torch.float16) for key, tensor in state.items()}
    write_tensors(tensors, path, header)
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text()) if manifest.is_file() else {"checkpoints": {}}
    parameters = sum(tensor.numel() for tensor in state.values())
    entry = {"file": path.name, "sha256": _sha256(path), "model": header["model"], "parameters": parameters, **facts}
    body["checkpoints"][name] = entry
    write_json(manifest, body)
    return path


def list_checkpoints() -> list[str]:
    """Names of the shipped checkpoints, sorted."""
    return sorted(manifest_entries())


def licence_of(name_or_path: str | Path) -> str:
    """What weights may be used for, as their manifest or their header says; ``"not stated"`` where neither does."""
    found = manifest_entries().get(str(name_or_path))
    if found is not None:
        return str(found[1].get("licence", "not stated"))
    return str(read_header(find_checkpoint(name_or_path) or name_or_path).get("licence", "not stated"))


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """A spec as plain JSON values."""
    return {**asdict(spec), "prompts": sorted(spec.prompts)}


def spec_from_json(body: Mapping[str, Any]) -> ModelSpec:
    """The spec of ``spec_to_json``.

    Raises:
        InputError: if a field is unknown (a header of a newer version).
    """
    if unknown := sorted(set(body) - {f.name for f in fields(ModelSpec)}):
        raise InputError(f"checkpoint header has unknown spec fields: {', '.join(unknown)}; update samed3d")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
    return ModelSpec(**{**values, "prompts": frozenset(body["prompts"])})


def manifest_entries() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name to (folder, entry) over all checkpoint folders; of folders with the same name the first counts."""
    folders = [
        Path(__file__).resolve().parents[1] / "checkpoints",  # an installed package
        Path(__file__).resolve().parents[2] / "checkpoints",  # the source tree
    ]
    if chosen := os.environ.get(CHECKPOINT_FOLDER_VARIABLE):
        folders.insert(0, Path(chosen))
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            continue
        try:
            listed = json.loads(manifest.read_text())["checkpoints"]
        except (ValueError, KeyError, TypeError) as error:
            rule = "checkpoint manifest must be JSON with a 'checkpoints' object"
            raise InputError(f"{rule}: {manifest} ({error})") from error
        for name, entry in listed.items():
            entries.setdefault(name, (folder, entry))
    return entries


def _to_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
    return kept.contiguous()


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _shorten(names: list[str]) -> str:
    rest = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

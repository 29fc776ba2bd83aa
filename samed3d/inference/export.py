"""Models for other programs: ONNX graphs, TorchScript files, a Hugging Face folder, a MONAI bundle.

A promptable model becomes two graphs, as its contract has two calls: the encoder runs once per crop, the decoder once
per prompt. Beside them lies ``model.json``, which says what crop they take and in which order the tensors go. Where to
cut a crop and how to paste the answer back is not in a graph: see ``crop_search.py`` and ``crops.py``. The Hugging
Face folder holds weights and numbers, not code; so does the MONAI bundle, whose inference is a ``Session``.
``docs/export.md`` shows a program that needs no samed3d.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samed3d import __version__
from samed3d.errors import InputError, check_choice
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import AnyModel, PromptableModel, PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import (
    PRETRAINED,
    find_checkpoint,
    list_checkpoints,
    read_header,
    save_weights,
    spec_to_json,
)
from samed3d.output import replacing_folder, write_json, write_text

FORMATS = ("onnx", "torchscript", "hf", "monai")
OUTPUTS = ["logits", "iou", "lowres_logits"]
MOST_CLICKS = 4096
OPSET = 18
LARGEST_ONNX_FILE = 3 << 29
"""Bytes of weights beyond which they lie beside the graph: an ONNX file ends at 2 GiB."""


class EncoderGraph(nn.Module):
    """``encode`` with a tuple of features as its output."""

    def __init__(self, model: PromptableModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(1, C, D, H, W) to the named features."""
        features = self.model.encode(image)
        return tuple(features[name] for name in self.names)


class DecoderGraph(nn.Module):
    """``decode`` with tensors only, in the order of ``decoder_inputs``."""

    def __init__(self, model: PromptableModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self,
        features: list[Tensor],
        points: Tensor,
        labels: Tensor,
        mask_logits: Tensor | None = None,
        mask_valid: Tensor | None = None,
        boxes: Tensor | None = None,
        box_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features and prompts (see ``PromptBatch``, batch 1) to the tensors of ``MaskOutput``."""
        prompts = PromptBatch(points, labels, boxes, box_valid, mask_logits, mask_valid)
        out = self.model.decode(dict(zip(self.names, features, strict=True)), prompts)
        return out.logits, out.iou, out.lowres_logits


def export(name: str, file_format: str, folder: str | Path) -> list[Path]:
    """Write a model for use elsewhere, whole or not at all.

    Args:
        name: Checkpoint (name or file), or an architecture: its weights are random then.
        file_format: One of ``FORMATS``.
        folder: New folder.

    Returns:
        The files.

    Raises:
        InputError: for an unknown format or model, an existing folder, a missing package, or a model that is no fixed
            graph.
    """
    check_choice("--format", file_format, FORMATS)
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"--output must be a new folder, got {folder}, which exists")
    model = model_of(name)
    if file_format in ("onnx", "torchscript") and isinstance(model, MixtureOfExperts):
        rule = "a mixture of experts chooses its decoder as it runs and is no fixed graph"
        raise InputError(f"{rule}; export its base and experts one by one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), replacing_folder(folder) as partial:
        if file_format in ("hf", "monai"):
            found = find_checkpoint(name)
            page = None if found is None else found.with_name("README.md")
            shipped = name in list_checkpoints() and page is not None and page.is_file()
            card = page.read_text(encoding="utf-8").replace("../docs/", "docs/") if shipped and page else ""
            header = {} if found is None else read_header(found)
            (_write_pretrained if file_format == "hf" else _write_bundle)(model, partial, header, card)
        elif file_format == "onnx":
            _check_packages("onnx", "onnxscript")
            _write_graphs(model, partial, ".onnx", _write_onnx)
        else:
            _write_graphs(model, partial, ".pt", _write_torchscript)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def model_of(name: str) -> AnyModel:
    """The model in eval mode; a bare architecture has random weights."""
    model = create_model(name).eval() if name in MODELS and find_checkpoint(name) is None else load(name)
    return model.requires_grad_(False)


def image_example(model: AnyModel) -> Tensor:
    """A seeded crop (1, C, D, H, W) of the model's shape."""
    return torch.randn(1, *model.spec.image_shape, generator=torch.Generator().manual_seed(0))


def feature_names(model: PromptableModel) -> list[str]:
    """What ``encode`` returns, in order; found on the meta device."""
    with torch.device("meta"):
        twin = create_model(model.spec.name, **model.config)
        assert isinstance(twin, PromptableModel)  # as the model
        return list(twin.encode(torch.empty(1, *model.spec.image_shape)))


def decoder_inputs(model: PromptableModel) -> list[str]:
    """Names of the decoder's inputs, in order; which of them there are depends on what the model understands."""
    names = [*_tensor_names(feature_names(model)), "points", "point_labels"]
    for kind, flag in (("mask", ["mask_logits", "mask_valid"]), ("box", ["boxes", "box_valid"])):
        names += flag if kind in model.spec.prompts else []
    return names


def decoder_example(model: PromptableModel, features: list[Tensor], names: list[str]) -> tuple[Any, ...]:
    """Two clicks, and a mask and a box where they are understood, in the order of ``decoder_inputs``."""
    points, labels = torch.tensor([[[3.0, 4.0, 5.0], [6.0, 2.0, 7.0]]]), torch.tensor([[1, 0]])
    out = model.decode(dict(zip(names, features, strict=True)), PromptBatch(points, labels))
    rest: list[Tensor] = []
    if "mask" in model.spec.prompts:
        rest += [out.lowres_logits, torch.tensor([True])]
    if "box" in model.spec.prompts:
        rest += [torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]]), torch.tensor([True])]
    return (features, points, labels, *rest)


def save_pretrained(model: AnyModel | str, folder: str | Path) -> list[Path]:
    """Write a model as a Hugging Face folder: weights with their header, ``config.json`` and the model card.

    ``hf upload OWNER/NAME FOLDER`` publishes it; ``samed3d.load("hf://OWNER/NAME")`` and ``samed3d.from_pretrained``
    read it. The card of a shipped checkpoint is its own; of another model, one that states what its header says.

    Args:
        model: A model, or a name or file that ``load`` takes.
        folder: New folder.

    Returns:
        The files.

    Raises:
        InputError: for an unknown model or an existing folder.
    """
    if isinstance(model, str):
        return export(model, "hf", folder)
    with replacing_folder(folder) as partial:
        _write_pretrained(model, partial, {}, "")
    return sorted(Path(folder).iterdir())


def _write_pretrained(model: AnyModel, folder: Path, header: dict[str, Any], card: str) -> None:
    facts = {
        key: value for key, value in header.items() if key not in ("version", "model", "config", "spec", "adapter")
    }
    save_weights(model, folder / PRETRAINED, facts)
    about = {"architecture": model.spec.name, "numbers": model.config, "spec": spec_to_json(model.spec)}
    write_json(folder / "config.json", {"library_name": "samed3d", **about})
    licence = str(facts.get("licence", "other")).lower()
    head = (
        f"---\nlibrary_name: samed3d\npipeline_tag: image-segmentation\nlicense: {licence}\ntags: [medical, 3d]\n---\n"
    )
    write_text(folder / "README.md", card or head + _plain_card(model))


def _plain_card(model: AnyModel) -> str:
    return f"# {model.spec.name}\n\nSource: {model.spec.source}\n\nNo figures were measured for this model.\n"


def _write_bundle(model: AnyModel, folder: Path, header: dict[str, Any], card: str) -> None:
    """A MONAI bundle: weights, metadata, and an inference configuration that needs samed3d and runs a whole volume.

    Source: MONAI's bundle specification (``configs/metadata.json``, ``configs/inference.json``, ``models/model.pt``).
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    write_json(folder / "configs/metadata.json", _bundle_metadata(model, str(header.get("licence", "not stated"))))
    write_json(folder / "configs/inference.json", _bundle_inference(model))
    torch.save(model.state_dict(), folder / "models/model.pt")
    write_text(folder / "docs/README.md", card or _plain_card(model))


def _bundle_metadata(model: AnyModel, licence: str) -> dict[str, Any]:
    spec = model.spec
    patch: dict[str, Any] = {
        "type": "image",
        "modality": "any",
        "dtype": "float32",
        "spatial_shape": list(spec.input_shape_zyx),
    }
    patch |= {"value_range": [], "is_patch_data": True}
    channels, classes = ["image"] * spec.image_shape[0], list(model.config.get("class_names", ["object"]))

    def tensor(kind: str, names: list[str]) -> dict[str, Any]:
        defined = {str(n): name for n, name in enumerate(names)}
        return patch | {"format": kind, "num_channels": len(names), "channel_def": defined}

    outputs = tensor("segmentation", ["background", *classes] if spec.classes else classes)
    return {
        "version": __version__,
        "changelog": {__version__: "exported by samed3d"},
        "monai_version": "1.3.0",
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"samed3d": __version__},
        "name": f"samed3d {spec.name}",
        "task": "semantic segmentation" if spec.classes else "promptable segmentation of volumes by points and boxes",
        "description": f"{spec.name}: {spec.source}",
        "authors": "The samed3d contributors",
        "copyright": f"Licence of the weights: {licence}",
        "intended_use": "Research. Not a medical device.",
        "data_type": "one volume of any format that samed3d reads",
        "network_data_format": {"inputs": {"image": tensor("magnitude", channels)}, "outputs": {"pred": outputs}},
    }


def _bundle_inference(model: AnyModel) -> dict[str, Any]:
    """What ``monai.bundle`` runs: a session with the given prompts, or a sliding window."""
    load_weights = ["$@network_def.load_state_dict(@weights)", "$@network_def.eval()"]
    modules = ("samed3d.volume", "samed3d.inference.sliding_window", "samed3d.prompts.schema")
    shared = {
        "imports": [f"$import {name}" for name in ("torch", "samed3d", *modules)],
        "bundle_root": ".",
        "output": "mask.nii.gz",
        "architecture": {"name": model.spec.name, **model.config},
        "network_def": "$samed3d.create_model(**@architecture)",
        "weights": "$torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True)",
    }
    if model.spec.classes:
        return shared | {
            "images": ["image.nii.gz"],
            "volumes": "$[samed3d.read_volume(image) for image in @images]",
            "labels": "$samed3d.inference.sliding_window.segment_volume(@volumes, @network_def)",
            "run": [*load_weights, "$samed3d.volume.write_mask(@output, @labels, @volumes[0].grid)"],
        }
    example = {"id": 1, "prompts": [{"type": "point", "at": [0, 0, 0]}]}
    return shared | {
        "image": "image.nii.gz",
        "prompts": {"version": 1, "space": "ijk", "objects": [example]},
        "device": "auto",
        "session": "$samed3d.Session.open(@image, model=@network_def, device=@device)",
        "objects": "$samed3d.prompts.schema.objects_from_json(@prompts, 'prompts')",
        "run": [*load_weights, "$@session.add_all(@objects)", "$@session.save(@output)"],
    }


def _tensor_names(features: list[str]) -> list[str]:
    """Features as inputs and outputs of a graph, where ``image`` is the crop."""
    return [f"feature_{name}" for name in features]


def _write_graphs(model: AnyModel, folder: Path, suffix: str, write: Any) -> None:
    """Encoder and decoder, or the one graph of a semantic model, and ``model.json``."""
    image = image_example(model)
    if isinstance(model, PromptableModel):
        names = feature_names(model)
        encoder, decoder = EncoderGraph(model, names), DecoderGraph(model, names)
        example = decoder_example(model, list(encoder(image)), names)
        graphs = {
            "encoder": (encoder, (image,), ["image"], _tensor_names(names)),
            "decoder": (decoder, example, decoder_inputs(model), OUTPUTS),
        }
    else:
        graphs = {"model": (model, (image,), ["image"], ["logits"])}
    files = {}
    for name, (graph, inputs, input_names, output_names) in graphs.items():
        with _quiet():
            write(graph.eval(), inputs, folder / f"{name}{suffix}", input_names, output_names)
        if suffix == ".pt" and name == "decoder":  # TorchScript takes the features as one list
            listed = len(names)
            input_names = ["a list of " + ", ".join(input_names[:listed]), *input_names[listed:]]
        files[f"{name}{suffix}"] = {"inputs": input_names, "outputs": output_names}
    write_json(folder / "model.json", {"model": model.spec.name, "spec": spec_to_json(model.spec), "files": files})


def _write_onnx(graph: nn.Module, example: tuple[Any, ...], path: Path, inputs: list[str], outputs: list[str]) -> None:
    shapes: Any = None
    if isinstance(graph, DecoderGraph):
        clicks = {1: torch.export.Dim("clicks", min=1, max=MOST_CLICKS)}
        shapes = ([None] * len(graph.names), clicks, clicks, *(None for _ in example[3:]))
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=shapes,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    program.save(path, external_data=size > LARGEST_ONNX_FILE)


def _write_torchscript(graph: nn.Module, example: tuple[Any, ...], path: Path, *_names: list[str]) -> None:
    torch.jit.trace(graph, example, check_trace=False).save(path)


def _check_packages(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = "run: pip install 'samed3d[export]'"
            raise InputError(f"this export needs the package {name}, which is not installed; {remedy}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, whose warnings concern their own future versions and nothing that a user could change."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)

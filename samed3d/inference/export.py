"""Models for other programs: ONNX graphs, TorchScript files, a Hugging Face folder.

A promptable model becomes two graphs, as its contract has two calls: the encoder runs once per crop, the decoder once
per prompt. Beside them lies ``model.json``, which says what crop they want and in which order the tensors go. Where to
cut a crop and how to paste the answer back is not in a graph: that is ``crop_search.py`` and ``crops.py``. The Hugging
Face folder holds weights and numbers, not code. The page with a program that needs no samed3d is ``docs/export.md``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samed3d.crops import image_channels
from samed3d.errors import InputError
from samed3d.models import create_model, load
from samed3d.models.base import AnyModel, PromptableModel, PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import spec_from_json, spec_to_json

FORMATS = ("onnx", "torchscript", "hf")
OUTPUTS = ("logits", "iou", "lowres_logits")
MOST_CLICKS = 4096
OPSET = 18
LARGEST_ONNX_FILE = 3 << 29
"""Bytes of weights beyond which they lie beside the graph: an ONNX file ends at 2 GiB."""


class EncoderGraph(nn.Module):
    """``encode`` with a tuple for an answer."""

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
        """Features, clicks (1, N, 3), labels (1, N), then what the model understands of masks and boxes, each with its
        flag.
        """
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
    if file_format not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"--output must be a new folder, got {folder}, which exists")
    model = model_of(name)
    if file_format != "hf" and isinstance(model, MixtureOfExperts):
        raise InputError(
            "a mixture of experts chooses its decoder as it runs and is no fixed graph; export its base and experts one by one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with torch.no_grad():
            {"onnx": _write_onnx, "torchscript": _write_torchscript, "hf": _write_hub}[file_format](model, partial)
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(folder.iterdir())


def decoder_inputs(model: PromptableModel) -> list[str]:
    """Names of the decoder's inputs, in order; which of them there are depends on what the model understands."""
    names = [*_tensor_names(feature_names(model)), "points", "point_labels"]
    for kind, flag in (("mask", ["mask_logits", "mask_valid"]), ("box", ["boxes", "box_valid"])):
        names += flag if kind in model.spec.prompts else []
    return names


def _tensor_names(features: list[str]) -> list[str]:
    """Features as inputs and outputs of a graph, where ``image`` is the crop."""
    return [f"feature_{name}" for name in features]


def model_of(name: str) -> AnyModel:
    """The model in eval mode; a bare architecture has random weights."""
    from samed3d.models import MODELS
    from samed3d.models.weights import find_checkpoint

    model = create_model(name).eval() if name in MODELS and find_checkpoint(name) is None else load(name)
    return model.requires_grad_(False)


def image_example(model: AnyModel) -> Tensor:
    """A seeded crop (1, C, D, H, W) of the model's shape."""
    spec = model.spec
    channels = image_channels(spec.normalisation) if isinstance(model, PromptableModel) else spec.in_channels
    return torch.randn(1, channels, *spec.input_shape_zyx, generator=torch.Generator().manual_seed(0))


def feature_names(model: PromptableModel) -> list[str]:
    """What ``encode`` returns, in order; found on the meta device."""
    with torch.device("meta"):
        twin = create_model(model.spec.name, **model.config)
        assert isinstance(twin, PromptableModel)  # as the model
        return list(twin.encode(_meta_crop(model)))


def _meta_crop(model: PromptableModel) -> Tensor:
    return torch.empty(1, image_channels(model.spec.normalisation), *model.spec.input_shape_zyx, device="meta")


def decoder_example(model: PromptableModel, features: list[Tensor], names: list[str]) -> tuple[Any, ...]:
    """Two clicks, and a mask and a box where they are understood."""
    points, labels = torch.tensor([[[3.0, 4.0, 5.0], [6.0, 2.0, 7.0]]]), torch.tensor([[1, 0]])
    out = model.decode(dict(zip(names, features, strict=True)), PromptBatch(points, labels))
    rest: list[Tensor] = []
    if "mask" in model.spec.prompts:
        rest += [out.lowres_logits, torch.tensor([True])]
    if "box" in model.spec.prompts:
        rest += [torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]]), torch.tensor([True])]
    return (features, points, labels, *rest)


def _write_onnx(model: AnyModel, folder: Path) -> None:
    _check_packages(("onnx", "onnxscript"))
    image = image_example(model)
    if not isinstance(model, PromptableModel):
        _onnx(model, (image,), folder / "model.onnx", ["image"], ["logits"], None)
        _write_about(model, folder, {"model.onnx": {"inputs": ["image"], "outputs": ["logits"]}})
        return
    names = feature_names(model)
    encoder, decoder = EncoderGraph(model, names), DecoderGraph(model, names)
    _onnx(encoder, (image,), folder / "encoder.onnx", ["image"], _tensor_names(names), None)
    example = decoder_example(model, list(encoder(image)), names)
    inputs = decoder_inputs(model)
    clicks = torch.export.Dim("clicks", min=1, max=MOST_CLICKS)
    shapes = ([None] * len(names), {1: clicks}, {1: clicks}, *(None for _ in example[3:]))
    _onnx(decoder, example, folder / "decoder.onnx", inputs, list(OUTPUTS), shapes)
    about = {
        "encoder.onnx": {"inputs": ["image"], "outputs": _tensor_names(names)},
        "decoder.onnx": {"inputs": inputs, "outputs": list(OUTPUTS)},
    }
    _write_about(model, folder, about)


def _onnx(
    module: nn.Module, example: tuple[Any, ...], path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        program.save(path, external_data=size > LARGEST_ONNX_FILE)


def _write_torchscript(model: AnyModel, folder: Path) -> None:
    image = image_example(model)
    with _quiet():
        if not isinstance(model, PromptableModel):
            torch.jit.trace(model, image, check_trace=False).save(folder / "model.pt")
            _write_about(model, folder, {"model.pt": {"inputs": ["image"], "outputs": ["logits"]}})
            return
        names = feature_names(model)
        encoder = EncoderGraph(model, names)
        torch.jit.trace(encoder, image, check_trace=False).save(folder / "encoder.pt")
        example = decoder_example(model, list(encoder(image)), names)
        torch.jit.trace(DecoderGraph(model, names), example, check_trace=False).save(folder / "decoder.pt")
    inputs = {
        "inputs": ["a list of " + ", ".join(_tensor_names(names)), *decoder_inputs(model)[len(names) :]],
        "outputs": list(OUTPUTS),
    }
    _write_about(
        model, folder, {"encoder.pt": {"inputs": ["image"], "outputs": _tensor_names(names)}, "decoder.pt": inputs}
    )


def _write_hub(model: AnyModel, folder: Path) -> None:
    hub_model_class()(model.spec.name, model.config, spec_to_json(model.spec), model).save_pretrained(folder)


def hub_model_class() -> Any:
    """``HubModel``: our models behind Hugging Face's ``save_pretrained`` and ``from_pretrained``; ``.network`` is the
    model itself.

    Raises:
        InputError: if huggingface_hub is not installed.
    """
    _check_packages(("huggingface_hub",))
    from huggingface_hub import PyTorchModelHubMixin

    class HubModel(
        nn.Module, PyTorchModelHubMixin, library_name="samed3d", tags=["image-segmentation", "medical", "3d"]
    ):
        """See ``hub_model_class``."""

        def __init__(
            self, architecture: str, numbers: dict[str, Any], spec: dict[str, Any], network: Any = None
        ) -> None:
            super().__init__()
            self.network = create_model(architecture, **numbers) if network is None else network
            self.network.spec = spec_from_json(spec)

        def forward(self, *arguments: Any) -> Any:
            return self.network(*arguments)

    return HubModel


def _write_about(model: AnyModel, folder: Path, files: dict[str, Any]) -> None:
    about = {"model": model.spec.name, "spec": spec_to_json(model.spec), "files": files}
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def _check_packages(names: tuple[str, ...]) -> None:
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise InputError(
                f"this export needs the package {name}, which is not installed; run: pip install 'samed3d[export]'"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters talk of their own future; nothing of it is the user's to mend."""
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

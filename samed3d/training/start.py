"""What a run starts with: the process group, the network, the training step and its data.

``step_of`` and ``data_of`` are the seam between kinds of models: a promptable one is trained with clicks, a semantic
one with all classes at once. Read ``loop.py`` next.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samed3d.config import TrainConfig
from samed3d.data.sampling import CropDataset
from samed3d.data.semantic import SemanticDataset
from samed3d.errors import InputError
from samed3d.models import create_model, load_promptable
from samed3d.models.base import AnyModel, SemanticModel
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import find_checkpoint, load_state_strict, read_header, read_weights
from samed3d.training.distill import Teacher
from samed3d.training.gate import GateStep
from samed3d.training.semantic import SemanticStep, semantic_data, semantic_overrides
from samed3d.training.step import InteractiveStep
from samed3d.training.trainable import choose_trainable

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this machine, with bf16 where ``run.precision`` says so or, on auto, where it is faster.

    Raises:
        InputError: if ``run.device`` is cuda and there is none, or the precision needs a GPU.
    """
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "run.device cuda was asked for but this machine has no CUDA GPU that torch can use; set run.device=cpu or auto"
        )
    on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state()  # it outlives a run, and another run of this process may want another precision
    atexit.unregister(_end_process_group)
    atexit.register(_end_process_group)  # not at the end of a run: a second one of this process needs the group as well
    precision = config.run.precision
    if precision == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch only
        fast = torch.cuda.is_bf16_supported() if on_gpu else capabilities.get("amx_tile", False)
        precision = "bf16" if fast else "fp32"
    if precision == "fp16" and not on_gpu:
        raise InputError("run.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise InputError(
            "accelerate must share batches, not weights, between processes; run accelerate config without FSDP and DeepSpeed"
        )
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=config.run.device == "cpu",
        gradient_accumulation_steps=config.optim.accumulate,
        log_with=list(config.run.trackers) or None,
        project_dir=config.run.folder,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # the loader pins its batches on a GPU machine
        # A batch without boxes leaves the box weights without gradient on that rank.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _end_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_model(config: TrainConfig) -> AnyModel:
    """The network at the start of a run: random, or from ``model.weights``, whose numbers it takes where
    ``model.overrides`` is empty.

    Raises:
        InputError: if the weights are not there or of another model.
    """
    overrides, path = dict(config.model.overrides), None
    if config.model.weights:
        path = find_checkpoint(config.model.weights)
        if path is None:
            raise InputError(f"model.weights must be a checkpoint's name or file, got {config.model.weights!r}")
        header = read_header(path)
        if header["model"] != config.model.name:
            remedy = f"set model.name={header['model']}"
            raise InputError(
                f"model.weights must hold a {config.model.name!r}, got a {header['model']!r} in {path}; {remedy}"
            )
        overrides = overrides or dict(header["config"])
    if config.model.name.startswith("samed3d_") and "input_shape" not in config.model.overrides:
        overrides["input_shape"] = config.data.crop
    model: AnyModel = create_model(config.model.name, **semantic_overrides(config, overrides))
    for module in model.modules():  # not the whole model at once, which may hold 2D kernels too
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if path is not None:
        load_state_strict(model, read_weights(path)[0])
    choose_trainable(model, config.model)
    if config.run.activation_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Have every part that can do so forget its activations.

    Raises:
        InputError: if no part can.
    """
    parts = [module for module in model.modules() if hasattr(module, "checkpoint_blocks")]
    if not parts:
        raise InputError(
            f"run.activation_checkpointing must be false for {type(model).__name__}, which has no transformer encoder"
        )
    for part in parts:
        part.checkpoint_blocks = True  # type: ignore[assignment]


def step_of(config: TrainConfig, model: AnyModel) -> nn.Module:
    """The training step of a model: ``forward(image, target, seed, samples) -> StepOutput``, the module that Accelerate
    wraps.

    Raises:
        InputError: if the loss asks for a teacher that is not there.
    """
    if isinstance(model, MixtureOfExperts):
        return GateStep(model, config.clicks)
    if isinstance(model, SemanticModel):
        return SemanticStep(model, config.loss)
    teacher = Teacher(load_promptable(config.loss.teacher), config.loss.distill_layers) if config.loss.distill else None
    return InteractiveStep(model, config.clicks, config.loss, teacher, config.run.compile)


def data_of(config: TrainConfig, model: AnyModel) -> CropDataset | SemanticDataset:
    """The training samples of a model, of length 0: the loop sets ``start`` and ``length`` once it knows how far the
    run is.
    """
    if isinstance(model, SemanticModel):
        return semantic_data(config, model)
    spec = model.spec
    return CropDataset(
        config.data,
        0,
        config.run.seed,
        normalisation=spec.normalisation,
        tensor_axes=spec.tensor_axes,
        ct_clamp_hu=spec.ct_clamp_hu,
    )


def unwrapped(accelerator: Accelerator, step: Any) -> Any:
    """The network inside the prepared step."""
    return accelerator.unwrap_model(step).model

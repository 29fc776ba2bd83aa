"""Set-up of a run: Accelerate, the network with its trainable parameters, the training step and the dataset.

A promptable model is trained with clicks, a semantic segmentation model with all classes at once, a mixture of experts
by its gate; ``step_of`` and ``data_of`` choose.
"""

from __future__ import annotations

import atexit
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from samed3d.config import ModelConfig, TrainConfig
from samed3d.data.sampling import CropDataset
from samed3d.data.semantic import SemanticDataset
from samed3d.devices import pick_device
from samed3d.errors import InputError
from samed3d.models import create_model, load_promptable
from samed3d.models.base import Adaptation, AnyModel, SemanticModel
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import find_checkpoint, load_state_strict, read_header, read_weights, tensors_sha256
from samed3d.nn.adapters import adapter_names, add_adapters
from samed3d.training.moe import GateStep
from samed3d.training.semantic import SemanticStep, semantic_data, semantic_overrides
from samed3d.training.step import InteractiveStep, Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this machine; ``run.precision: auto`` takes bf16 where the hardware computes in it.

    Raises:
        InputError: if this machine lacks ``run.device``, the precision needs a GPU, or Accelerate is configured to
            share the weights between processes.
    """
    device = pick_device(config.run.device, "run.device")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state()  # it outlives a run, and a later run of this process may want another precision
    atexit.unregister(_end_process_group)
    atexit.register(_end_process_group)  # not at the end of a run: a second one of this process needs the group as well
    precision = config.run.precision
    if precision == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch only
        on_cpu = device.type == "cpu" and capabilities.get("amx_tile", False)
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else on_cpu
        precision = "bf16" if fast else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"run.precision fp16 needs a CUDA GPU; use fp32 on {device.type}, or bf16 on a CPU")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise InputError(
            "accelerate must share batches, not weights, between processes; "
            "run accelerate-config without FSDP and DeepSpeed"
        )
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=config.run.device == "cpu",
        gradient_accumulation_steps=config.optim.accumulate,
        log_with=list(config.run.trackers) or None,
        project_dir=config.run.folder,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # the loader pins its batches on a GPU machine
        # A batch without boxes leaves the box weights without gradient in that process.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _end_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_model(config: TrainConfig) -> AnyModel:
    """The network at the start of a run, with random weights or those of ``model.weights``.

    Where ``model.overrides`` is empty, the weights file sets the network's size.

    Raises:
        InputError: if the weights are missing or of another model, or as ``choose_trainable``.
    """
    overrides, path = dict(config.model.overrides), None
    if config.model.weights:
        path = find_checkpoint(config.model.weights)
        if path is None:
            raise InputError(f"model.weights must be a checkpoint's name or file, got {config.model.weights!r}")
        header = read_header(path)
        if header["model"] != config.model.name:
            raise InputError(
                f"model.weights must hold a {config.model.name!r}, got a {header['model']!r} in {path}; "
                f"set model.name={header['model']}"
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
        parts = [module for module in model.modules() if hasattr(module, "checkpoint_blocks")]
        if not parts:
            raise InputError(
                f"run.activation_checkpointing must be false for {type(model).__name__}, "
                "which has no transformer encoder"
            )
        for part in parts:
            part.checkpoint_blocks = True  # type: ignore[assignment]
    return model


def choose_trainable(model: nn.Module, config: ModelConfig) -> None:
    """Freeze the parameters that are not trained and add adapters, in place, after the start weights are loaded.

    ``train: adapters`` also trains the prompt encoder and the mask decoder, as SAMed and MA-SAM do. Frozen parameters
    have no gradient, so that neither the optimiser nor its weight decay changes them.

    Raises:
        InputError: if the keys contradict each other, or the model has no image encoder to freeze.
    """
    adapters = config.train == "adapters"
    if not adapters and config.adapter != "none":
        raise InputError(
            f"model.adapter needs model.train adapters, got {config.adapter!r} with train {config.train!r}"
        )
    if config.train == "all":
        return
    if adapters and config.adapter == "none":
        raise InputError("model.adapter must be lora or fact when model.train is adapters, got 'none'")
    if adapters and not config.weights:
        raise InputError("model.weights must name the trained model that adapters are put on, got ''")
    if adapters and config.rank < 1:
        raise InputError(f"model.rank must be 1 or more, got {config.rank}")
    frozen = encoder_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if adapters:
        base = tensors_sha256(model.state_dict())
        add_adapters(model, config.adapter, config.rank)
        model.adaptation = Adaptation(config.adapter, config.rank, config.weights, base)  # type: ignore[assignment]
    logger.info("%s", describe(model))


def encoder_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the image encoder.

    Raises:
        InputError: if the model does not name its encoder.
    """
    parts: tuple[str, ...] = getattr(model, "encoder_parts", ())
    names = {name for name, _ in model.named_parameters() if any(name == p or name.startswith(f"{p}.") for p in parts)}
    if not names:
        raise InputError(f"model {type(model).__name__} has no image encoder that could be frozen; use model.train all")
    return names


def describe(model: nn.Module) -> str:
    """One line: how many parameters are trained."""
    total = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = set(adapter_names(model))
    adapters = sum(p.numel() for n, p in model.named_parameters() if n in names)
    return f"{learns:,} of {total:,} parameters learn" + (f", {adapters:,} of them adapters" if adapters else "")


def step_of(config: TrainConfig, model: AnyModel) -> nn.Module:
    """The training step of a model, ``forward(image, target, seed, samples) -> StepOutput``, which Accelerate wraps.

    Raises:
        InputError: if the teacher that the loss needs is missing.
    """
    if isinstance(model, MixtureOfExperts):
        return GateStep(model, config.clicks)
    if isinstance(model, SemanticModel):
        return SemanticStep(model, config.loss)
    teacher = Teacher(load_promptable(config.loss.teacher), config.loss.distill_layers) if config.loss.distill else None
    return InteractiveStep(model, config.clicks, config.loss, teacher, config.run.compile)


def data_of(config: TrainConfig, model: AnyModel) -> CropDataset | SemanticDataset:
    """The training samples of a model, of length 0: the loop sets ``start`` and ``length``."""
    if isinstance(model, SemanticModel):
        return semantic_data(config, model)
    intensities = {key: getattr(model.spec, key) for key in ("normalisation", "tensor_axes", "ct_clamp_hu")}
    return CropDataset(config.data, 0, config.run.seed, **intensities)

"""All classes of a whole volume by a semantic segmentation model, in a sliding window.

Windows are sampled from the volume one at a time, in rows along the first canonical axis, and pasted back on its own
voxels; only the slices that a later row can still change are held in memory.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samed3d.crops import TileSum, paste_crop, sample_crop
from samed3d.data.semantic import Intensities, target_spacing
from samed3d.devices import pick_device
from samed3d.drawing import colour_of
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, IntTriple, Region, Triple, as_triple
from samed3d.inference.mask_files import LABEL_MAP_FORMATS, checked_format, export_segments
from samed3d.models import load
from samed3d.models.base import SemanticModel
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.output import check_spares
from samed3d.prompts import PackedMask
from samed3d.volume import Volume, read_volume, write_mask
from samed3d.volume.writing import Segment

logger = logging.getLogger(__name__)

OVERLAP = 0.5
SIGMA = 1 / 8
"""Deviation of a window's weight as a share of its edge (nnU-Net)."""
LEAST_WEIGHT = 1e-3


@torch.inference_mode()
def segment_volume(
    volume: Volume | Sequence[Volume],
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    overlap: float = OVERLAP,
    mirror: bool = False,
) -> NDArray[np.uint8]:
    """Class numbers of a volume, in the order of ``model.config["class_names"]`` from 1; 0 is background.

    There is one image per channel of the model, all on one grid. The model is moved to ``device`` and put in eval mode.
    Neighbouring windows overlap by a share of their edge, 0 to below 1 (MA-SAM's stacks slide by one slice: 0.8 of
    five). ``mirror`` averages over the eight mirrorings of each window; eight times as slow.

    Returns:
        (D, H, W) in the image's own grid and order.

    Raises:
        InputError: if the model needs prompts, or the number or shapes of the volumes or ``overlap`` do not fit.
    """
    volumes = [volume] if isinstance(volume, Volume) else list(volume)
    if not isinstance(model, SemanticModel):
        found = f"got {type(model).__name__}, which needs prompts; give --point or --box"
        raise InputError(f"model must be a semantic segmentation model, {found}")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must be from 0 to below 1, got {overlap}")
    if len(volumes) != model.spec.in_channels:
        raise InputError(f"{model.spec.name} takes {model.spec.in_channels} images per case, got {len(volumes)}")
    if len({v.grid.shape_zyx for v in volumes}) > 1:
        shapes = [v.grid.shape_zyx for v in volumes]
        raise InputError(f"images of one case must have one shape, got {shapes}; register and resample them")
    model, view, shape = model.to(device).eval(), volumes[0].view, volumes[0].view.shape_zyx
    arrays = [v.view.to_canonical(v.array) for v in volumes]
    images = [(array, Intensities.of(array)) for array in arrays]
    spacing = target_spacing(model) or view.spacing_zyx_mm
    steps = as_triple([wanted / s for wanted, s in zip(spacing, view.spacing_zyx_mm, strict=True)])
    rows = window_frames(shape, steps, model.spec.input_shape_zyx, overlap)
    logger.info("%d windows of %s voxels", sum(map(len, rows)), " x ".join(map(str, model.spec.input_shape_zyx)))
    weight = gaussian_weight(model.spec.input_shape_zyx)
    labels = np.zeros(shape, np.uint8)
    total = TileSum((model.spec.classes,))  # of weighted probabilities; all classes of a voxel have one sum of weights
    for row, following in itertools.zip_longest(rows, rows[1:]):
        slab = row[0].region().clip(shape)
        total.grow(Region((slab.start_zyx[0], 0, 0), (slab.stop_zyx[0], *shape[1:])))
        for frame in row:
            image = torch.stack([statistics.scale(*sample_crop(array, frame)) for array, statistics in images])
            probabilities = _probabilities(model, image[None].to(device), mirror)[0].float().cpu()
            region, values = paste_crop(probabilities * weight, frame, shape)
            if not region.is_empty:
                total.add(region, values)
        start = total.region.start_zyx[0]
        stop = shape[0] if following is None else following[0].region().clip(shape).start_zyx[0]
        labels[start:stop] = total.values[:, : stop - start].argmax(0).numpy()
        total.region = Region((stop, 0, 0), total.region.stop_zyx)
        total.values = total.values[:, stop - start :].clone()
    return np.ascontiguousarray(view.to_stored(labels))


def window_frames(
    shape_zyx: IntTriple, step_zyx_vox: Triple, window_zyx: IntTriple, overlap: float
) -> list[list[CropFrame]]:
    """Windows that cover a volume, in rows of one place along z, from low to high.

    A volume that is smaller than a window gets one in its middle; otherwise the first and the last end at the volume's
    faces.
    """
    places: list[list[float]] = []
    for size, step, count in zip(shape_zyx, step_zyx_vox, window_zyx, strict=True):
        extent = step * count
        if extent >= size:
            starts = [(size - extent) / 2]
        else:
            number = 1 + math.ceil((size - extent) / (extent * (1 - overlap)) - 1e-9)
            starts = [i * (size - extent) / (number - 1) for i in range(number)]
        # Whole voxels at step 1: nothing is interpolated. Elsewhere a move could leave the last voxels out.
        places.append([float(math.floor(s + 0.5)) if step == 1 else s for s in starts])
    return [
        [CropFrame((z, y, x), step_zyx_vox, window_zyx) for y, x in itertools.product(places[1], places[2])]
        for z in places[0]
    ]


def gaussian_weight(shape_zyx: IntTriple) -> Tensor:
    """(D, H, W) weight of a window's voxels, 1 in the middle, never below ``LEAST_WEIGHT``."""
    axes = []
    for count in shape_zyx:
        at = (torch.arange(count) - (count - 1) / 2) / max(1e-6, SIGMA * count)
        axes.append(torch.exp(-0.5 * at.square()))
    return (axes[0][:, None, None] * axes[1][:, None] * axes[2]).clamp(min=LEAST_WEIGHT)


def _probabilities(model: SemanticModel, image: Tensor, mirror: bool) -> Tensor:
    """(1, K, D, H, W) softmax; with ``mirror`` the mean over all mirrorings."""
    axes = [[axis for axis in (2, 3, 4) if number >> (4 - axis) & 1] for number in range(8 if mirror else 1)]
    total = model(image).softmax(1)
    for flipped in axes[1:]:
        total = total + model(image.flip(flipped)).softmax(1).flip(flipped)
    return total / len(axes) if mirror else total


def is_semantic(model: str | Path) -> bool:
    """Whether a checkpoint (name or file) is of a semantic segmentation model; False if it is not found."""
    path = find_checkpoint(model)
    return path is not None and path.suffix == ".safetensors" and bool(read_header(path)["spec"].get("classes"))


def segment_file(
    images: Path | Sequence[Path],
    model: str | Path,
    output: Path,
    *,
    format: str | None = None,
    device: str = "auto",
    **reading: Any,
) -> dict[str, Any]:
    """Segment an image file and write all classes, as a label map or as named segments, whichever the format holds.

    There is one image per channel of the model, in the order of training; the output has the first one's grid, and the
    format of ``mask_files.checked_format``. ``reading`` are ``channel``, ``series`` and ``untilt`` of ``read_volume``.

    Returns:
        ``objects`` (id, name, voxels, mm3 of each class), ``notes`` of the images, ``device``, ``seconds``, ``model``.

    Raises:
        InputError: as ``read_volume``, ``load``, ``segment_volume`` and the writers; also if no class was found and
            the format holds segments.
    """
    kind = checked_format(output, format)
    began = time.perf_counter()
    paths = [images] if isinstance(images, Path) else images
    for path in paths:
        check_spares(output, path)
    volumes = [read_volume(path, **reading) for path in paths]
    network: Any = load(model)
    chosen = pick_device(device)
    labels = segment_volume(volumes, network, device=chosen)
    volume, names = volumes[0], network.config["class_names"]
    if kind in LABEL_MAP_FORMATS:
        write_mask(output, labels, volume.grid)
    else:
        found = [n for n in range(1, len(names) + 1) if (labels == n).any()]
        if not found:
            lacking = f"nothing was found in {volume.source}, and {kind} needs a segment"
            raise InputError(f"{lacking}; write a label map (.nii.gz) instead")
        segments = [Segment(n, names[n - 1], colour_of(n), PackedMask.of(labels == n)) for n in found]
        export_segments(output, kind, segments, volume, reading.get("series"))
    counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
    voxel_mm3 = float(np.prod(volume.grid.spacing_xyz_mm))
    objects = [
        {"id": n, "name": name, "voxels": int(counts[n]), "mm3": round(int(counts[n]) * voxel_mm3, 3)}
        for n, name in enumerate(names, start=1)
    ]
    return {
        "model": str(model),
        "objects": objects,
        "notes": [note for v in volumes for note in v.notes],
        "device": str(chosen),
        "seconds": round(time.perf_counter() - began, 3),
    }

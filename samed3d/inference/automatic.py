"""A whole image by an automatic model, from file to file: what ``samed3d segment`` does where no prompt is given.

The windows are in ``sliding_window.py``, the formats in ``mask_files.py``. For prompts, see ``session.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samed3d.drawing import colour_of
from samed3d.errors import InputError
from samed3d.inference.mask_files import LABEL_MAP_FORMATS, checked_format, export_segments
from samed3d.inference.results import pick_device
from samed3d.inference.sliding_window import OVERLAP, segment_volume
from samed3d.models import load
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.prompts import PackedMask
from samed3d.volume import read_volume, write_mask
from samed3d.volume.writing import Segment


def is_automatic(model: str | Path) -> bool:
    """Whether a checkpoint (name or file) is of an automatic model; only its header is read. False for anything that is
    no checkpoint.
    """
    path = find_checkpoint(model)
    return path is not None and path.suffix == ".safetensors" and bool(read_header(path)["spec"].get("classes"))


def segment_file(
    images: Path | Sequence[Path],
    model: str | Path,
    output: Path,
    *,
    format: str | None = None,
    device: str = "auto",
    channel: int | None = None,
    series: str | None = None,
    overlap: float = OVERLAP,
    mirror: bool = False,
) -> dict[str, Any]:
    """Segment an image and write all classes: a label map, or named segments where the format has them.

    Args:
        images: The image, or one per channel of the model in the order of training.
        model: Checkpoint of an automatic model.
        output: File to write, in the (first) image's own grid.
        format: As ``mask_files.checked_format``.
        device: ``auto``, ``cpu`` or ``cuda``.
        channel: As ``read_volume``.
        series: As ``read_volume``.
        overlap: See ``segment_volume``.
        mirror: See ``segment_volume``.

    Returns:
        ``objects`` (id, name, voxels, mm3 of each class), ``device``, ``seconds``, ``model``.

    Raises:
        InputError: as ``read_volume``, ``load``, ``segment_volume`` and the writers; also where nothing is found to
            write as segments.
    """
    kind = checked_format(output, format)
    began = time.perf_counter()
    volumes = [
        read_volume(path, channel=channel, series=series) for path in ([images] if isinstance(images, Path) else images)
    ]
    network: Any = load(model)
    chosen = pick_device(device)
    labels = segment_volume(volumes, network, device=chosen, overlap=overlap, mirror=mirror)
    volume, names = volumes[0], network.config["class_names"]
    if kind in LABEL_MAP_FORMATS:
        write_mask(output, labels, volume.grid)
    else:
        found = [n for n in range(1, len(names) + 1) if (labels == n).any()]
        if not found:
            raise InputError(
                f"nothing was found in {volume.source}, and {kind} needs a segment; write a label map (.nii.gz) instead"
            )
        segments = [Segment(n, names[n - 1], colour_of(n), PackedMask.of(labels == n)) for n in found]
        export_segments(output, kind, segments, volume, series)
    counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
    voxel_mm3 = float(np.prod(volume.grid.spacing_xyz_mm))
    objects = [
        {"id": n, "name": name, "voxels": int(counts[n]), "mm3": round(int(counts[n]) * voxel_mm3, 3)}
        for n, name in enumerate(names, start=1)
    ]
    return {
        "model": str(model),
        "objects": objects,
        "device": str(chosen),
        "seconds": round(time.perf_counter() - began, 3),
    }

"""Tiny labelled folders in nnU-Net layout, stored in any axis order, for the tests of preparation and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samed3d.geometry import Grid
from samed3d.volume import write_mask, write_volume

RAS = Grid((20, 24, 28), (1.0, 1.5, 2.0), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
"""Canonical: i, j, k run to right, anterior, superior (LPS directions -1, -1, 1)."""


def scene(seed: int, shape_zyx: tuple[int, int, int] = RAS.shape_zyx) -> tuple[np.ndarray, np.ndarray]:
    """Image (int16) and labels (uint8), canonical: a bright cuboid 1, a dark cuboid 2 and a speck 3 of eight voxels,
    all off centre."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape_zyx, np.uint8)
    shift = int(rng.integers(0, 3))
    labels[2 + shift : 10 + shift, 3:13, 4:12] = 1
    labels[9:17, 14:22, 15 + shift : 25 + shift] = 2
    labels[17:19, 2:4, 20:22] = 3
    image = rng.normal(100, 6, shape_zyx) + np.choose(labels, [0, 120, -90, 60])
    return image.astype(np.int16), labels


def stored_as(canonical: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> tuple[np.ndarray, Grid]:
    """The same volume in another storage order: stored zyx axis ``a`` is canonical axis ``axes[a]``, reversed where
    ``flips[a]``."""
    array = np.transpose(canonical, axes)[tuple(slice(None, None, -1 if f else 1) for f in flips)]
    spacing = [RAS.spacing_zyx_mm[a] for a in axes]
    directions = np.asarray(RAS.direction_lps).reshape(3, 3)
    columns, origin = [], np.asarray(RAS.origin_lps_mm, float)
    for stored, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        unit = directions[:, 2 - axis]
        if flip:
            origin = origin + unit * (array.shape[stored] - 1) * spacing[stored]
        columns.append(-unit if flip else unit)
    direction = np.stack(columns[::-1], axis=1)
    grid = Grid(array.shape, tuple(spacing[::-1]), tuple(map(float, origin)), tuple(map(float, direction.ravel())))
    return np.ascontiguousarray(array), grid


def write_set(
    folder: Path,
    scenes: dict[str, int],
    *,
    channels: int = 1,
    axes: Sequence[int] = (0, 1, 2),
    flips: Sequence[bool] = (False, False, False),
    **about: Any,
) -> Path:
    """One dataset: case name to seed of its scene; further keywords go into ``dataset.json``."""
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "imagesTr").mkdir()
    body = {"modality": "CT", "labels": {"background": 0, "bright": 1, "dark": 2}, "licence": "CC0", **about}
    (folder / "dataset.json").write_text(json.dumps(body))
    for name, seed in scenes.items():
        image, labels = scene(seed)
        array, grid = stored_as(labels, axes, flips)
        write_mask(folder / "labelsTr" / f"{name}.nii.gz", array, grid)
        for channel in range(channels):
            write_volume(
                folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz",
                stored_as(image + 1000 * channel, axes, flips)[0],
                grid,
            )
    return folder

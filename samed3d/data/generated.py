"""Whole generated cases by kind and seed, as numpy arrays: what ``samed3d prepare synthetic`` stores and benchmarks
measure.

Training draws its generated samples on the fly (``sampling.py``); both paint with ``synthesis.py``. The same kind, seed
and shape give the same case on the CPU, whatever else was made before.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.data.phantom import anatomical_phantom
from samed3d.data.random_shapes import KINDS
from samed3d.data.synthesis import synthetic_case
from samed3d.errors import InputError
from samed3d.geometry import Grid, IntTriple

GENERATED_KINDS = ("phantom", "shapes", *KINDS, "labelmaps")
"""A torso, any random shapes, one kind of random shapes, or a real label map painted anew."""
_TOP = 4000


def generated_case(
    kind: str, seed: list[int], shape_zyx: IntTriple, label_map: NDArray | None = None, device: str = "cpu"
) -> tuple[NDArray[np.int16], NDArray, Grid, dict[int, str]]:
    """One case.

    Args:
        kind: One of ``GENERATED_KINDS``.
        seed: Of all randomness.
        shape_zyx: Voxels; a phantom keeps its own grid, a label map its own shape.
        label_map: (D, H, W) labels in canonical axes that ``"labelmaps"`` bends and paints.
        device: Where random shapes and label maps are made; the cases of one seed differ between devices.

    Returns:
        Image, labels (D, H, W), their grid (1 mm in axes R, A, S for all but phantoms), and the names of the labels
        (empty for a label map: the caller knows them).

    Raises:
        InputError: for an unknown kind, or a label map that is missing or not wanted.
    """
    if kind not in GENERATED_KINDS:
        raise InputError(f"--kind must be one of {', '.join(GENERATED_KINDS)}, got {kind!r}")
    if (kind == "labelmaps") != (label_map is not None):
        raise InputError(
            f"a label map is needed for kind labelmaps and for no other, got kind {kind!r}; see --label-maps"
        )
    rng = np.random.default_rng(seed)
    if kind == "phantom":
        return anatomical_phantom(rng)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    if label_map is not None:
        given = torch.from_numpy(np.ascontiguousarray(label_map, dtype=np.int16))
        image, labels = synthetic_case(shape_zyx, generator, given, deform=True)
    elif kind == "shapes":
        image, labels = synthetic_case(shape_zyx, generator)
    else:
        painted = torch.zeros(shape_zyx, dtype=torch.int16, device=device)
        KINDS[kind](painted, generator)
        image, labels = synthetic_case(shape_zyx, generator, painted)
    array = labels.cpu().numpy()
    shape = (array.shape[0], array.shape[1], array.shape[2])
    grid = Grid(shape, direction_lps=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    names = {} if label_map is not None else {int(v): f"{kind} {v}" for v in np.unique(array) if v}
    return _as_int16(image.cpu().numpy()), array, grid, names


def _as_int16(image: NDArray) -> NDArray[np.int16]:
    """Stretched to 0.._TOP: generated intensities have no unit, and integers compress."""
    low, high = float(image.min()), float(image.max())
    return np.round((image - low) * (_TOP / max(high - low, 1e-12))).astype(np.int16)

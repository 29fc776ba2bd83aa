"""Generated images with random contrast from label maps, in the manner of SynthSeg and anatomix.

A model trained on every contrast, blur and noise must find objects by their borders. ``sampling.py`` draws generated
samples during training; ``generated_case`` makes whole cases for ``samed3d prepare synthetic``.

Source: Billot et al. 2023 (SynthSeg) and Dey et al. 2025 (anatomix): training on images with random contrast.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from samed3d.data.random_shapes import (
    KINDS,
    integer,
    log_uniform,
    noise_field,
    random_labels,
    random_numbers,
    uniform,
)
from samed3d.errors import InputError, check_choice
from samed3d.geometry import RAS_DIRECTION, Grid, IntTriple

GENERATED_KINDS = ("phantom", "shapes", *KINDS, "labelmaps")
"""A torso, any random shapes, one kind of random shapes, or a real label map with generated intensities."""
_TOP = 4000
"""Generated intensities are stretched to 0 to this: they have no unit, and integers compress."""


def synthetic_case(
    shape_zyx: IntTriple, generator: Generator, labels: Tensor | None = None, *, deform: bool = False
) -> tuple[Tensor, Tensor]:
    """One training case, made on the generator's device; on a CPU the same for the same seed.

    ``labels`` (D, H, W), integers >= 0, are painted instead of random ones, flipped and bent first with ``deform``.

    Returns:
        ``(image, labels)``: float32 of no particular scale, and int16, both (D, H, W).
    """
    if labels is None:
        labels, _ = random_labels(shape_zyx, generator)
    else:
        labels = labels.to(device=generator.device, dtype=torch.int16)
        labels = deform_labels(labels, generator) if deform else labels
    return render(labels, generator), labels


def generated_case(
    kind: str, seed: list[int], shape_zyx: IntTriple, label_map: NDArray | None = None, device: str = "cpu"
) -> tuple[NDArray[np.int16], NDArray, Grid, dict[int, str]]:
    """One whole case of one of ``GENERATED_KINDS``, the same for the same kind, seed and shape on a CPU.

    A phantom keeps its own grid. ``label_map``, (D, H, W) labels in canonical axes that ``"labelmaps"`` bends and
    paints, keeps its shape. Random shapes and label maps are made on ``device``, and differ between devices.

    Returns:
        Image, labels (D, H, W), their grid (1 mm in axes R, A, S for all but phantoms), and the names of the labels
        (empty for a label map: the caller knows them).

    Raises:
        InputError: for an unknown kind, or a label map that is missing or not wanted.
    """
    check_choice("--kind", kind, GENERATED_KINDS)
    if (kind == "labelmaps") != (label_map is not None):
        rule = "a label map is needed for kind labelmaps and for no other"
        raise InputError(f"{rule}, got kind {kind!r}; see --label-maps")
    rng = np.random.default_rng(seed)
    if kind == "phantom":
        from samed3d.data.phantom import anatomical_phantom  # needs scipy, which a bare GPU machine may lack

        return anatomical_phantom(rng)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    given: Tensor | None = None
    if label_map is not None:
        given = torch.from_numpy(np.ascontiguousarray(label_map, dtype=np.int16))
    elif kind != "shapes":
        given = torch.zeros(shape_zyx, dtype=torch.int16, device=device)
        KINDS[kind](given, generator)
    image, labels = synthetic_case(shape_zyx, generator, given, deform=label_map is not None)
    values, array = image.cpu().numpy(), labels.cpu().numpy()
    low, high = float(values.min()), float(values.max())
    stretched = np.round((values - low) * (_TOP / max(high - low, 1e-12))).astype(np.int16)
    grid = Grid((array.shape[0], array.shape[1], array.shape[2]), direction_lps=RAS_DIRECTION)
    names = {} if label_map is not None else {int(v): f"{kind} {v}" for v in np.unique(array) if v}
    return stretched, array, grid, names


def deform_labels(labels: Tensor, generator: Generator, *, strength: float = 0.12) -> Tensor:
    """Labels (D, H, W) flipped at random along each axis and bent by about ``strength`` of an edge, nearest voxel."""
    cells = uniform(generator, 1.0, 4.0)
    field = noise_field(3, labels.shape, cells, generator).mul_(uniform(generator) * strength / cells)
    index = torch.zeros((), dtype=torch.int64, device=generator.device)
    for axis, n in enumerate(labels.shape):
        line = torch.arange(n, device=generator.device, dtype=torch.float32)
        line = line.flip(0) if integer(generator, 0, 1) else line
        place = field[axis].mul_(n).add_(line.view([-1 if a == axis else 1 for a in range(3)]))
        index = index * n + place.round_().clamp_(0, n - 1).long()
    return labels.reshape(-1).take(index)


def render(labels: Tensor, generator: Generator) -> Tensor:
    """Paint a label map (D, H, W) with random intensities, float32 of no particular scale, on the generator's device.

    0 is whatever is not labelled, which may show structures of its own.
    """
    shape = labels.shape
    index = labels.to(device=generator.device, dtype=torch.int64)
    index, count = _with_background_parts(index, int(index.max()) + 1, generator)
    means, spreads = _palette(count, generator)
    image = means.take(index)
    if uniform(generator) < 0.1:
        image.mul_(0.3).sub_(_borders(index), alpha=uniform(generator, 0.3, 1.0))
    fine = min(shape) / log_uniform(generator, 2.5, 16.0)
    image.addcmul_(spreads.take(index), noise_field(1, shape, fine, generator)[0])
    for axis, n in enumerate(shape):
        image = _along(axis, _blur_matrix(n, log_uniform(generator, 0.3, 1.2), generator.device), image)
    if uniform(generator) < 0.7:
        bias = noise_field(1, shape, uniform(generator, 0.6, 2.0), generator)[0]
        image.mul_(bias.mul_(uniform(generator, 0.0, 0.35)).exp_())
    low, high = torch.aminmax(image)
    image = image.sub_(low).div_((high - low).clamp_min(1e-6))
    if uniform(generator) < 0.5:
        image = image.pow_(log_uniform(generator, 0.5, 2.0))
    image = _with_noise(image, generator)
    if uniform(generator) < 0.35:
        axis = integer(generator, 0, 2)
        image = _along(axis, _thick_slices(shape[axis], generator), image)
    return image


def _with_background_parts(index: Tensor, count: int, generator: Generator) -> tuple[Tensor, int]:
    """Split label 0 into one to four parts that look different but are not labelled."""
    parts = integer(generator, 1, 4)
    if parts == 1:
        return index, count
    field = noise_field(1, index.shape, log_uniform(generator, 1.0, 8.0), generator)[0]
    part = torch.zeros(index.shape, dtype=torch.int16, device=index.device)
    for cut in random_numbers(generator, parts - 1).mul_(2.4).sub_(1.2).tolist():
        part += field > cut
    extra = (part + (count - 1)).mul_(part > 0).mul_(index == 0)
    return index + extra, count + parts - 1


def _palette(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mean and texture amplitude per label; labels often share a tissue, so that no threshold separates them."""
    means = random_numbers(generator, count)
    if uniform(generator) < 0.4:
        tissues = random_numbers(generator, integer(generator, 2, 4))
        which = torch.randint(0, len(tissues), (count,), generator=generator, device=generator.device)
        jitter = torch.randn(count, generator=generator, device=generator.device) * uniform(generator, 0.04, 0.2)
        means = tissues[which] + jitter
    spreads = random_numbers(generator, count) * log_uniform(generator, 0.01, 0.15)
    if uniform(generator) < 0.3:  # air around: flat and dark
        means[0], spreads[0] = uniform(generator, -0.5, 0.0), 0.0
    return means, spreads


def _borders(index: Tensor) -> Tensor:
    """(D, H, W) float, 1 on voxels whose next neighbour along any axis has another label: membranes."""
    edge = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
    edge[:-1] |= index[1:] != index[:-1]
    edge[:, :-1] |= index[:, 1:] != index[:, :-1]
    edge[:, :, :-1] |= index[:, :, 1:] != index[:, :, :-1]
    return edge.float()


def _with_noise(image: Tensor, generator: Generator) -> Tensor:
    """Add white or correlated noise; sometimes as the magnitude of a complex signal (Rician)."""
    amplitude = log_uniform(generator, 0.005, 0.16)
    if uniform(generator) < 0.6:
        noise = torch.randn(image.shape, generator=generator, device=image.device)
    else:  # coarse grain hides more
        cells = min(image.shape) / log_uniform(generator, 1.5, 4.0)
        noise = noise_field(1, image.shape, cells, generator)[0].mul_(0.5)
    image = image.add_(noise, alpha=amplitude)
    if uniform(generator) < 0.2:
        other = torch.randn(image.shape, generator=generator, device=image.device).mul_(amplitude)
        image = torch.hypot(image, other)
    return image


def _blur_matrix(size: int, sigma_vox: float, device: torch.device) -> Tensor:
    """(size, size) Gaussian blur along one axis as a matrix whose rows sum to one."""
    line = torch.arange(size, device=device, dtype=torch.float32)
    weights = (-0.5 * ((line[:, None] - line[None, :]) / sigma_vox).square()).exp_()
    weights.masked_fill_(weights < 1e-6, 0.0)  # denormal tails would make the products ten times slower
    return weights / weights.sum(1, keepdim=True)


def _thick_slices(size: int, generator: Generator) -> Tensor:
    """(size, size) matrix that averages into slices 1.5 to 6 voxels thick and interpolates back."""
    slices = max(3, round(size / log_uniform(generator, 1.5, 6.0)))
    thick = F.adaptive_avg_pool1d(torch.eye(size, device=generator.device)[None], slices)
    if uniform(generator) < 0.7:
        return F.interpolate(thick, size=size, mode="linear", align_corners=False)[0].T
    return F.interpolate(thick, size=size, mode="nearest")[0].T


def _along(axis: int, matrix: Tensor, image: Tensor) -> Tensor:
    """Apply an (n, n) matrix along one axis of (D, H, W)."""
    d, h, w = image.shape
    if axis == 0:
        return (matrix @ image.reshape(d, h * w)).view(d, h, w)
    return matrix @ image if axis == 1 else (image.reshape(d * h, w) @ matrix.T).view(d, h, w)

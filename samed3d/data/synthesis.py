"""Generated images with random contrast from label maps, in the manner of SynthSeg and anatomix.

A model that has seen every contrast, blur and noise must find objects by their borders. Each effect costs a few passes
over the volume: one look-up for the contrast, one matrix product per axis for blur, thick slices and resampling.
``random_shapes.py`` makes label maps without data, ``sampling.py`` draws generated samples during training, and
``generated_case`` makes whole cases for ``samed3d prepare synthetic``.

Source: Billot et al. 2023 (SynthSeg) and Dey et al. 2025 (anatomix) for the idea of training on images with drawn
contrast.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from samed3d.data.random_shapes import KINDS, integer, log_uniform, noise_field, random_labels, uniform
from samed3d.errors import InputError
from samed3d.geometry import RAS_DIRECTION, Grid, IntTriple

GENERATED_KINDS = ("phantom", "shapes", *KINDS, "labelmaps")
"""A torso, any random shapes, one kind of random shapes, or a real label map with generated intensities."""
_TOP = 4000


def synthetic_case(
    shape_zyx: IntTriple, generator: Generator, labels: Tensor | None = None, *, deform: bool = False
) -> tuple[Tensor, Tensor]:
    """One training case.

    Args:
        shape_zyx: Voxels.
        generator: Source of all randomness; the case is made on its device. Same seed, same case on the CPU.
        labels: A label map (D, H, W) of any integer type to paint instead of a random one, such as a crop of a real
            one; negative values are not allowed.
        deform: Whether to flip and bend ``labels`` first.

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
    """One whole case, the same for the same kind, seed and shape on a CPU.

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
        from samed3d.data.phantom import anatomical_phantom  # needs scipy, which a bare GPU machine may lack

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
    grid = Grid(shape, direction_lps=RAS_DIRECTION)
    names = {} if label_map is not None else {int(v): f"{kind} {v}" for v in np.unique(array) if v}
    return _as_int16(image.cpu().numpy()), array, grid, names


def _as_int16(image: NDArray) -> NDArray[np.int16]:
    """Stretched to 0.._TOP: generated intensities have no unit, and integers compress."""
    low, high = float(image.min()), float(image.max())
    return np.round((image - low) * (_TOP / max(high - low, 1e-12))).astype(np.int16)


def deform_labels(labels: Tensor, generator: Generator, *, strength: float = 0.12) -> Tensor:
    """Labels (D, H, W), flipped at random along each axis and bent smoothly by about ``strength`` of an edge; nearest
    neighbour.
    """
    shape: IntTriple = (labels.shape[0], labels.shape[1], labels.shape[2])
    cells = uniform(generator, 1.0, 4.0)
    field = noise_field(3, shape, cells, generator).mul_(uniform(generator) * strength / cells)
    index: Tensor | None = None
    for axis, n in enumerate(shape):
        line = torch.arange(n, device=generator.device, dtype=torch.float32)
        line = line.flip(0) if integer(generator, 0, 1) else line
        place = field[axis].mul_(n).add_(line.view([-1 if a == axis else 1 for a in range(3)]))
        whole = place.round_().clamp_(0, n - 1).long()
        index = whole if index is None else index.mul_(n).add_(whole)
    assert index is not None
    return labels.reshape(-1).take(index)


def render(labels: Tensor, generator: Generator, *, device: torch.device | str | None = None) -> Tensor:
    """Paint a label map with random intensities.

    Args:
        labels: (D, H, W) non-negative integers, 0 for whatever is not labelled (which may show structures of its own).
        generator: Source of all randomness; the work is done on its device.
        device: Where the image goes; the generator's device if None.

    Returns:
        float32 (D, H, W) of no particular scale; training normalises.
    """
    shape: IntTriple = (labels.shape[0], labels.shape[1], labels.shape[2])
    index = labels.to(device=generator.device, dtype=torch.int64)
    index, count = _with_background_parts(index, int(index.max()) + 1, generator)
    means, spreads = _palette(count, generator)
    image = means.take(index)
    if uniform(generator) < 0.1:
        image.mul_(0.3).sub_(_borders(index), alpha=uniform(generator, 0.3, 1.0))
    fine = min(shape) / log_uniform(generator, 2.5, 16.0)
    image.addcmul_(spreads.take(index), noise_field(1, shape, fine, generator)[0])
    image = _through_matrices(
        image, [_blur_matrix(n, log_uniform(generator, 0.3, 1.2), generator.device) for n in shape]
    )
    if uniform(generator) < 0.7:
        image.mul_(
            noise_field(1, shape, uniform(generator, 0.6, 2.0), generator)[0].mul_(uniform(generator, 0.0, 0.35)).exp_()
        )
    image = _curve(image, generator)
    image = _with_noise(image, generator)
    if uniform(generator) < 0.35:
        image = _through_matrices(image, _thick_slices(shape, generator))
    return image if device is None else image.to(device)


def _with_background_parts(index: Tensor, count: int, generator: Generator) -> tuple[Tensor, int]:
    """Split label 0 into one to four parts, which look different but are nobody's label."""
    parts = integer(generator, 1, 4)
    if parts == 1:
        return index, count
    shape: IntTriple = (index.shape[0], index.shape[1], index.shape[2])
    field = noise_field(1, shape, log_uniform(generator, 1.0, 8.0), generator)[0]
    cuts = torch.rand(parts - 1, generator=generator, device=generator.device).mul_(2.4).sub_(1.2).tolist()
    part = torch.zeros(shape, dtype=torch.int16, device=index.device)
    for cut in cuts:
        part += field > cut
    extra = (part + (count - 1)).mul_(part > 0).mul_(index == 0)
    return index + extra, count + parts - 1


def _palette(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mean and texture amplitude per label; often several labels share a tissue, so that no threshold tells them
    apart.
    """
    device = generator.device
    means = torch.rand(count, generator=generator, device=device)
    if uniform(generator) < 0.4:
        tissues = torch.rand(integer(generator, 2, 4), generator=generator, device=device)
        which = torch.randint(0, len(tissues), (count,), generator=generator, device=device)
        jitter = torch.randn(count, generator=generator, device=device) * uniform(generator, 0.04, 0.2)
        means = tissues[which] + jitter
    spreads = torch.rand(count, generator=generator, device=device) * log_uniform(generator, 0.01, 0.15)
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


def _curve(image: Tensor, generator: Generator) -> Tensor:
    """Rescale to 0..1, bend by a random gamma."""
    low, high = torch.aminmax(image)
    image = image.sub_(low).div_((high - low).clamp_min(1e-6))
    if uniform(generator) < 0.5:
        image = image.pow_(log_uniform(generator, 0.5, 2.0))
    return image


def _with_noise(image: Tensor, generator: Generator) -> Tensor:
    """Add white or correlated noise; sometimes as the magnitude of a complex signal (Rician)."""
    shape: IntTriple = (image.shape[0], image.shape[1], image.shape[2])
    amplitude = log_uniform(generator, 0.005, 0.16)
    if uniform(generator) < 0.6:
        noise = torch.randn(shape, generator=generator, device=image.device)
    else:
        noise = noise_field(1, shape, min(shape) / log_uniform(generator, 1.5, 4.0), generator)[0].mul_(
            0.5
        )  # coarse grain hides more
    image = image.add_(noise, alpha=amplitude)
    if uniform(generator) < 0.2:
        other = torch.randn(shape, generator=generator, device=image.device).mul_(amplitude)
        image = torch.hypot(image, other)
    return image


def _blur_matrix(size: int, sigma_vox: float, device: torch.device) -> Tensor:
    """(size, size) Gaussian blur along one axis as a matrix whose rows sum to one."""
    line = torch.arange(size, device=device, dtype=torch.float32)
    weights = (-0.5 * ((line[:, None] - line[None, :]) / sigma_vox).square()).exp_()
    weights.masked_fill_(weights < 1e-6, 0.0)  # denormal tails would make the products ten times slower
    return weights / weights.sum(1, keepdim=True)


def _thick_slices(shape_zyx: IntTriple, generator: Generator) -> list[Tensor | None]:
    """Along one axis: average into slices 2 to 6 voxels thick and interpolate back; as one matrix. None leaves an axis
    alone.
    """
    axis = integer(generator, 0, 2)
    size = shape_zyx[axis]
    slices = max(3, round(size / log_uniform(generator, 1.5, 6.0)))
    eye = torch.eye(size, device=generator.device)[None]
    thick = torch.nn.functional.adaptive_avg_pool1d(eye, slices)
    mode = "linear" if uniform(generator) < 0.7 else "nearest"
    back = torch.nn.functional.interpolate(
        thick, size=size, mode=mode, **({"align_corners": False} if mode == "linear" else {})
    )[0]
    return [back.T if a == axis else None for a in range(3)]


def _through_matrices(image: Tensor, matrices: list[Tensor] | list[Tensor | None]) -> Tensor:
    """Apply one (n, n) matrix along each of z, y, x."""
    d, h, w = image.shape
    mz, my, mx = matrices
    if mz is not None:
        image = (mz @ image.reshape(d, h * w)).view(d, h, w)
    if my is not None:
        image = my @ image
    if mx is not None:
        image = (image.reshape(d * h, w) @ mx.T).view(d, h, w)
    return image

"""How well a mask agrees with a reference: Dice, surface Dice (NSD) and the 95th percentile Hausdorff distance, in
millimetres.

Surfaces are sets of voxels: a mask's voxels that touch background by a face, or the border of the array. Distances run
from voxel centre to voxel centre. Only numpy is needed at import; distances use ``edt`` where it is installed, else
SciPy. Not here: surface elements with areas (``elements.py``), metrics over several clicks (``curves.py``).

Rules for empty masks, so that no case drops out of an average unseen:

==================  ======  ======  ==================
masks               Dice    NSD     HD95
==================  ======  ======  ==================
both empty          nan     nan     nan
one empty           0       0       the image diagonal
==================  ======  ======  ==================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import Region, Triple, bounding_region

DISTANCE_SLACK_MM = 1e-5
"""Distances are single precision: one that equals the tolerance must count as within it."""


def dice(pred: NDArray, target: NDArray) -> float:
    """Twice the overlap over the sum of the sizes, in [0, 1].

    Args:
        pred: (D, H, W) mask; non-zero is inside.
        target: (D, H, W) reference.

    Returns:
        The coefficient; nan where both are empty, 0 where one is.

    Raises:
        ValueError: if the shapes differ.
    """
    a, b = as_masks(pred, target)
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2.0 * int(np.count_nonzero(a & b)) / total if total else float("nan")


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, in mm.

    Attributes:
        pred_to_target_mm: For each surface voxel of the prediction, the distance to the target's nearest surface voxel.
        target_to_pred_mm: The other way round.
    """

    pred_to_target_mm: NDArray[np.float32]
    target_to_pred_mm: NDArray[np.float32]

    def share_within(self, tolerance_mm: float) -> float:
        """The part of all surface voxels whose distance is at most the tolerance."""
        both = np.concatenate([self.pred_to_target_mm, self.target_to_pred_mm])
        return float(np.mean(both <= tolerance_mm + DISTANCE_SLACK_MM))

    def percentile(self, percent: float) -> float:
        """The larger of the two directed percentiles, in mm."""
        return float(
            max(np.percentile(self.pred_to_target_mm, percent), np.percentile(self.target_to_pred_mm, percent))
        )


def surface_distances(pred: NDArray, target: NDArray, spacing_zyx_mm: Triple) -> SurfaceDistances | None:
    """Distances between the surfaces of two (D, H, W) masks, or None where either is empty."""
    a, b = as_masks(pred, target)
    region_a, region_b = bounding_region(a), bounding_region(b)
    if region_a.is_empty or region_b.is_empty:
        return None
    # Nothing outside both masks can be a surface; one more voxel keeps the background beside them.
    region = region_a.union(region_b).expand(1)
    surface_a, surface_b = _surface(cut(a, region)), _surface(cut(b, region))
    return SurfaceDistances(
        pred_to_target_mm=distance_to(surface_b, spacing_zyx_mm)[surface_a],
        target_to_pred_mm=distance_to(surface_a, spacing_zyx_mm)[surface_b],
    )


def nsd(pred: NDArray, target: NDArray, spacing_zyx_mm: Triple, tolerance_mm: float) -> float:
    """Normalised surface Dice: the part of both surfaces that lies within ``tolerance_mm`` of the other one.

    Args:
        pred: (D, H, W) mask.
        target: (D, H, W) reference.
        spacing_zyx_mm: Voxel edge along z, y, x.
        tolerance_mm: Distance that counts as agreement, >= 0.

    Returns:
        A value in [0, 1]; nan where both masks are empty, 0 where one is.

    Raises:
        ValueError: if the shapes differ or the tolerance is negative.

    Source:
        Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
        radiotherapy (2018); surface voxels are counted here, where they weigh surface elements by area.
    """
    if tolerance_mm < 0:
        raise ValueError(f"tolerance_mm must be >= 0, got {tolerance_mm}")
    distances = surface_distances(pred, target, spacing_zyx_mm)
    if distances is None:
        return 0.0 if np.any(pred) or np.any(target) else float("nan")
    return distances.share_within(tolerance_mm)


def hd95(pred: NDArray, target: NDArray, spacing_zyx_mm: Triple) -> float:
    """The larger of the two directed 95th percentile surface distances, in mm.

    Returns:
        A distance >= 0; nan where both masks are empty, the diagonal of the whole array where one is.

    Raises:
        ValueError: if the shapes differ.
    """
    distances = surface_distances(pred, target, spacing_zyx_mm)
    if distances is None:
        return image_diagonal_mm(pred.shape, spacing_zyx_mm) if np.any(pred) or np.any(target) else float("nan")
    return distances.percentile(95)


def image_diagonal_mm(shape_zyx: tuple[int, ...], spacing_zyx_mm: Triple) -> float:
    """The diagonal of a whole array: what HD95 is where one mask is missing."""
    return float(np.linalg.norm(np.multiply(shape_zyx, spacing_zyx_mm)))


def volume_error(pred: NDArray, target: NDArray) -> float:
    """(Predicted - true) / true volume: -1 for an empty prediction, 0 for the right size, inf or nan without a
    target.
    """
    a, b = as_masks(pred, target)
    size, wanted = int(np.count_nonzero(a)), int(np.count_nonzero(b))
    return (size - wanted) / wanted if wanted else float("inf" if size else "nan")


def as_masks(pred: NDArray, target: NDArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both as bool, (D, H, W) of one shape."""
    if pred.shape != target.shape or pred.ndim != 3:
        raise ValueError(f"pred and target must be (D, H, W) of one shape, got {pred.shape} and {target.shape}")
    return pred.astype(bool, copy=False), target.astype(bool, copy=False)


def cut(mask: NDArray[np.bool_], region: Region) -> NDArray[np.bool_]:
    """The mask in a region that may reach one voxel outside it, where there is background."""
    inside = region.clip((mask.shape[0], mask.shape[1], mask.shape[2]))
    pad = [
        (a - o, p - b)
        for o, p, a, b in zip(region.start_zyx, region.stop_zyx, inside.start_zyx, inside.stop_zyx, strict=True)
    ]
    return np.pad(mask[inside.slices], pad)


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's voxels of which a face neighbour is background; the outermost layer of ``mask`` must be background."""
    inner = mask.copy()
    for axis in range(3):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask & ~inner


def distance_to(surface: NDArray[np.bool_], spacing_zyx_mm: Triple) -> NDArray[np.float32]:
    """For every voxel, the distance in mm to the nearest True one."""
    try:
        import edt
    except ImportError:
        from scipy.ndimage import distance_transform_edt

        return distance_transform_edt(~surface, sampling=spacing_zyx_mm).astype(np.float32)
    # black_border=False: the edge of the array is no surface.
    return edt.edt(np.ascontiguousarray(~surface), anisotropy=spacing_zyx_mm, black_border=False, parallel=1)

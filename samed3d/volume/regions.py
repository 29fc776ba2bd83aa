"""Fast marching, gradient magnitude and region growing by SimpleITK, for the baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import IntTriple, Triple


def travel_time(
    speed: NDArray[np.floating], spacing_zyx_mm: Triple, seeds_zyx: Sequence[IntTriple], until: float = 1e6
) -> NDArray[np.float32]:
    """ITK's fast marching: the time at which a front that starts at the seeds at time 0 reaches each voxel.

    Args:
        speed: (D, H, W) of the front in mm per unit of time, > 0.
        spacing_zyx_mm: Voxel edges.
        seeds_zyx: Voxels where the front starts, at least one.
        until: Time at which it stops; voxels that it has not reached by then have a later time.

    Returns:
        (D, H, W) float32 times.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(speed.astype(np.float32, copy=False))
    image.SetSpacing(spacing_zyx_mm[::-1])
    trials = [(int(x), int(y), int(z)) for z, y, x in seeds_zyx]
    times = sitk.GetArrayFromImage(sitk.FastMarching(image, trials, normalizationFactor=1.0, stoppingValue=until))
    return np.minimum(times, 1e30).astype(np.float32)  # voxels that are not reached have the largest double


def smoothed_gradient(array: NDArray, spacing_zyx_mm: Triple, sigma_mm: float) -> NDArray[np.float32]:
    """The magnitude of the gradient per mm after smoothing with a Gaussian of ``sigma_mm``, (D, H, W) float32."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.astype(np.float32, copy=False))
    image.SetSpacing(spacing_zyx_mm[::-1])
    if min(image.GetSize()) < 4:  # ITK's recursive filter needs four voxels along each axis
        image = sitk.GradientMagnitude(image)
    else:
        image = sitk.GradientMagnitudeRecursiveGaussian(image, sigma_mm)
    return sitk.GetArrayFromImage(image).astype(np.float32)


def grow_region(array: NDArray, seeds_zyx: Sequence[tuple[int, int, int]], multiplier: float) -> NDArray[np.uint8]:
    """ITK's confidence-connected region growing.

    Args:
        array: (D, H, W) intensities.
        seeds_zyx: Voxels inside the structure.
        multiplier: Largest distance from the region's mean, in standard deviations.

    Returns:
        (D, H, W) uint8, 0 or 1: the voxels that are connected to the seeds and within that distance.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.astype(np.float32, copy=False))
    seeds = [(int(x), int(y), int(z)) for z, y, x in seeds_zyx]
    grown = sitk.ConfidenceConnected(
        image, seeds, numberOfIterations=2, multiplier=multiplier, initialNeighborhoodRadius=2, replaceValue=1
    )
    return sitk.GetArrayFromImage(grown).astype(np.uint8)

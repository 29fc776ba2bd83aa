"""How well a mask agrees with a reference, and how well a series of clicks went. Distances in mm, rules for empty masks
stated.

``masks.py``: Dice, surface Dice over voxels, HD95, volume error. ``elements.py``: surface Dice over surface elements.
``curves.py``: the area under a click curve, clicks to a quality, failures. Only numpy is needed at import.
"""

from __future__ import annotations

from samed3d.metrics.curves import area_under_curve, clicks_to, monotone_share, trapezoid
from samed3d.metrics.elements import element_areas, nsd_subvoxel, surface_scores
from samed3d.metrics.masks import SurfaceDistances, dice, hd95, image_diagonal_mm, nsd, surface_distances, volume_error

__all__ = [
    "SurfaceDistances",
    "area_under_curve",
    "clicks_to",
    "dice",
    "element_areas",
    "hd95",
    "image_diagonal_mm",
    "monotone_share",
    "nsd",
    "nsd_subvoxel",
    "surface_distances",
    "surface_scores",
    "trapezoid",
    "volume_error",
]

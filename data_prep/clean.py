"""Which structures of a label map a corpus keeps: the published rules, each an option, and the reason for each drop.

SAM-Med3D's corpus keeps a mask of at least 1 cm3 with every side at least 1.5 cm, drops cases of more than 99 %
background (counted here over the whole label map; the paper does not say), keeps the five largest pieces of each mask
and splits what lies on both sides into left and right. A dropped mask stays in the stored label map.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.categories import Category, categorise
from samed3d.data.corpus import POINTS
from samed3d.errors import InputError, check_choice
from samed3d.geometry import Triple, bounding_region

LARGEST_VALUE = 32767
# Two pieces are left and right if the smaller has this share of the larger's voxels ...
_BOTH_SIDES = 0.2
# ... and each has this share of its voxels on its own side of the middle between them.
_OWN_SIDE = 0.9


@dataclass(frozen=True)
class Rules:
    """When a mask is kept; the defaults are the published rules."""

    min_volume_mm3: float = 1000.0  # 0 switches it off
    min_side_mm: float = 15.0  # least extent of its box along every axis; 0 switches it off
    min_voxels: int = 30  # fewer cannot be clicked on
    max_background: float = 0.99  # share of unlabelled voxels in the case; 1 switches it off
    keep_components: int = 5  # its largest pieces; 0 keeps all
    split_sides: bool = True  # a paired structure (kidneys, lungs) with one label for both sides

    def reason_to_drop(self, voxels: int, region_shape: tuple[int, ...], spacing: Triple, background: float) -> str:
        """The first rule that a mask breaks, in words; empty for a mask that is kept."""
        volume = voxels * float(np.prod(spacing))
        side = min(n * s for n, s in zip(region_shape, spacing, strict=True))
        if voxels < self.min_voxels:
            return f"{voxels} voxels, under {self.min_voxels}"
        if volume < self.min_volume_mm3:
            return f"{volume:.4g} mm3, under {self.min_volume_mm3:g}"
        if side < self.min_side_mm:
            return f"side of {side:.3g} mm, under {self.min_side_mm:g}"
        if background > self.max_background:
            return f"background is {100 * background:.2f} % of the case, over {100 * self.max_background:g}"
        return ""


PRESETS = {"published": Rules(), "lenient": Rules(0.0, 0.0, 30, 1.0, 0, False)}
"""``lenient`` keeps all that can be clicked on."""


def rules_from(preset: str, changes: list[str]) -> Rules:
    """A preset with ``name=value`` changes.

    Raises:
        InputError: for an unknown preset or rule, or a value that does not fit.
    """
    check_choice("--rules", preset, PRESETS)
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Rules)}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in kinds:
            raise InputError(f"--rule must be NAME=VALUE with a name of {', '.join(kinds)}, got {change!r}")
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (KeyError, ValueError) as error:
            raise InputError(f"--rule {name} must be a {kinds[name].__name__}, got {text!r}") from error
        if values[name] < 0 or (name == "max_background" and values[name] > 1):
            range_ = "from 0 to 1" if name == "max_background" else "0 or more"
            raise InputError(f"--rule {name} must be {range_}, got {text}")
    return replace(PRESETS[preset], **values)


@dataclass(frozen=True)
class Structure:
    """One label of one case, measured; the record of the case holds its fields as they are here."""

    value: int  # in the label map
    name: str  # as the source calls it
    category: str  # normalised, as ``anatomy`` and ``side``
    anatomy: str
    side: str
    voxels: int  # left after cleaning, as ``mm3`` and the box
    mm3: float
    start_zyx: tuple[int, ...]
    stop_zyx: tuple[int, ...]
    components: int  # pieces before cleaning (26 neighbours)
    reason: str  # why it was dropped; empty for a kept one
    points: list[list[int]]  # ``POINTS`` random voxels inside it, zyx; the same for the same case and label


def compact_layer(array: NDArray, names: dict[int, str]) -> tuple[NDArray, dict[int, str]]:
    """A layer of whole numbers from 0 as uint8 or uint16 in C order; values above ``LARGEST_VALUE`` (instance ids) make
    it renumber them 1, 2, 3 ..., and the names with them.

    Raises:
        InputError: if it holds more structures than fit.
    """
    high = int(array.max()) if array.size else 0
    if high <= LARGEST_VALUE:
        return np.ascontiguousarray(array, dtype=np.uint8 if high < 256 else np.uint16), names
    values, index = np.unique(array, return_inverse=True)
    if len(values) > LARGEST_VALUE:
        raise InputError(f"a label map must hold at most {LARGEST_VALUE} structures, got {len(values)}")
    shift = 0 if values[0] == 0 else 1
    compact = (index.reshape(array.shape) + shift).astype(np.uint16)
    return compact, {i + shift: names.get(int(v), f"label_{int(v)}") for i, v in enumerate(values) if v != 0}


def clean_layer(
    array: NDArray,
    names: dict[int, str],
    spacing_zyx_mm: Triple,
    rules: Rules,
    *,
    instances: bool = False,
    source: str = "",
    seed: str = "",
) -> tuple[NDArray, list[Structure]]:
    """Apply the rules to one layer and measure what is there.

    The (D, H, W) unsigned, canonical array (x runs to the right) is changed in place: small pieces become 0, right
    halves get a new value. With ``instances`` every value is one object of the same category. The data set's name
    (``source``) is the category of instances, and a hint for names that say little; ``seed`` is that of the points.

    Returns:
        The layer (a wider copy where new values need it) and its structures.
    """
    from scipy.ndimage import find_objects

    boxes, voxel_mm3 = find_objects(array), float(np.prod(spacing_zyx_mm))
    background = 1.0 - sum(int(np.count_nonzero(plane)) for plane in array) / array.size
    found: list[Structure] = []
    free = max([len(boxes), *names]) + 1
    if rules.split_sides and free + len(boxes) > np.iinfo(array.dtype).max:
        array = array.astype(np.uint16)
    for value, box in enumerate(boxes, start=1):
        if box is None:
            continue
        name = names.get(value, f"label_{value}")
        category = categorise("" if instances else name, source)
        parts = {value: (name, category)}
        pieces, sizes = _pieces(array[box] == value)
        if rules.keep_components and len(sizes) > rules.keep_components:
            gone = np.argsort(-sizes, kind="stable")[rules.keep_components :] + 1
            array[box][np.isin(pieces, gone)] = 0
        right = _right_half(pieces, sizes) if rules.split_sides and category.paired and free <= LARGEST_VALUE else None
        if right is not None:
            array[box][right & (array[box] == value)] = free
            sides = {side: Category(f"{side} {category.name}", category.group, side) for side in ("left", "right")}
            parts = {value: (f"{name} (left)", sides["left"]), free: (f"{name} (right)", sides["right"])}
            free += 1
        unnamed = "" if value in names or instances else f"value {value} has no name in the source"
        for part, (called, kind) in parts.items():
            mask, corner = array[box] == part, np.array([s.start for s in box])
            tight, voxels = bounding_region(mask), int(np.count_nonzero(mask))
            reason = unnamed or rules.reason_to_drop(voxels, tight.shape_zyx, spacing_zyx_mm, background)
            start, stop = (tuple((corner + end).tolist()) for end in (tight.start_zyx, tight.stop_zyx))
            digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
            points = _random_points(mask, np.random.default_rng(int.from_bytes(digest[:8], "big"))) + corner
            about = (part, called, kind.name, kind.group, kind.side, voxels, round(voxels * voxel_mm3, 3))
            found.append(Structure(*about, start, stop, len(sizes), reason, points.tolist()))
    return array, found


def _pieces(mask: NDArray) -> tuple[NDArray, NDArray]:
    """Connected pieces (26 neighbours) numbered from 1, and their sizes."""
    import cc3d

    pieces = cc3d.connected_components(mask, connectivity=26)
    sizes = np.zeros(int(pieces.max()) + 1, np.int64)
    for plane in pieces:  # bincount widens its input: one plane at a time
        sizes += np.bincount(plane.ravel(), minlength=len(sizes))
    return pieces, sizes[1:]


def _right_half(pieces: NDArray, sizes: NDArray) -> NDArray | None:
    """The pieces on the right of a structure of two halves, or None where it has no two halves side by side.

    The two largest pieces must be of like size and lie beside each other along x; every other piece goes to the nearer
    one.
    """
    if len(sizes) < 2:
        return None
    first, second = (np.argsort(-sizes, kind="stable")[:2] + 1).tolist()
    if sizes[second - 1] < _BOTH_SIDES * sizes[first - 1]:
        return None
    profiles = np.stack(
        [np.bincount(plane.ravel(), minlength=len(sizes) + 1) for plane in np.moveaxis(pieces, 2, 0)], 1
    )
    centres = profiles @ np.arange(pieces.shape[2]) / np.maximum(profiles.sum(axis=1), 1)
    left, right = sorted((first, second), key=lambda piece: centres[piece])
    middle = (centres[left] + centres[right]) / 2
    cut = int(np.ceil(middle))
    own = profiles[left, :cut].sum() / sizes[left - 1], profiles[right, cut:].sum() / sizes[right - 1]
    if min(own) < _OWN_SIDE:
        return None
    chosen = centres > middle
    chosen[0] = False
    return chosen[pieces]


def _random_points(mask: NDArray, rng: np.random.Generator) -> NDArray[np.int64]:
    """``POINTS`` voxels of a mask, (n, 3), uniform with repetition; finds them plane by plane."""
    counts = mask.sum(axis=(1, 2))
    ranks = np.sort(rng.integers(int(counts.sum()), size=POINTS))
    ends = np.cumsum(counts)
    planes = np.searchsorted(ends, ranks, side="right")
    points = []
    for z in np.unique(planes):
        inside = np.flatnonzero(mask[z])
        for rank in ranks[planes == z] - (ends[z] - counts[z]):
            points.append([int(z), *map(int, divmod(int(inside[rank]), mask.shape[2]))])
    return np.array(points)

"""What is kept of a label map: the published rules, each an option, each dropped mask with its reason.

SAM-Med3D's corpus keeps a mask of at least 1 cm3 with every side at least 1.5 cm, drops cases of more than 99 %
background, keeps the five largest pieces of each mask and splits what lies on both sides into left and right. The paper
does not say of what the background is counted; here it is the whole label map. Those rules are ``RULES["published"]``;
``RULES["lenient"]`` keeps all that can be clicked on.

A dropped mask stays in the stored label map, so that nothing is lost; it is only never a target. Read ``pipeline.py``
next.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from data_prep.categories import Category, categorise
from samed3d.data.corpus import POINTS
from samed3d.errors import InputError
from samed3d.geometry import Region, Triple

LARGEST_VALUE = 32767
_OWN_SIDE = 0.9
_BOTH_SIDES = 0.2


@dataclass(frozen=True)
class Rules:
    """When a mask is kept; the defaults are the published rules.

    Attributes:
        min_volume_mm3: Least volume of a mask, mm3; 0 switches it off.
        min_side_mm: Least extent of its box along every axis, mm; 0 switches it off.
        min_voxels: Fewer voxels than this cannot be clicked on.
        max_background: Greatest share of unlabelled voxels in a case, 0 to 1; 1 switches it off.
        keep_components: How many of its largest pieces a mask keeps; 0 keeps all.
        split_sides: Split a paired structure (kidneys, lungs) that has one label for both sides into left and right.
    """

    min_volume_mm3: float = 1000.0
    min_side_mm: float = 15.0
    min_voxels: int = 30
    max_background: float = 0.99
    keep_components: int = 5
    split_sides: bool = True


def rules_from(preset: str, changes: list[str]) -> Rules:
    """A preset with ``name=value`` changes.

    Raises:
        InputError: for an unknown preset or rule, or a value that does not fit.
    """
    presets = {"published": Rules(), "lenient": Rules(0.0, 0.0, 30, 1.0, 0, False)}
    if preset not in presets:
        raise InputError(f"--rules must be one of {', '.join(presets)}, got {preset!r}")
    kinds = {field.name: type(getattr(Rules(), field.name)) for field in fields(Rules)}
    values: dict[str, float | int | bool] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in kinds:
            raise InputError(f"--rule must be NAME=VALUE with a name of {', '.join(kinds)}, got {change!r}")
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (KeyError, ValueError) as error:
            raise InputError(f"--rule {name} must be a {kinds[name].__name__}, got {text!r}") from error
        if values[name] < 0 or (name == "max_background" and values[name] > 1):
            raise InputError(
                f"--rule {name} must be {'from 0 to 1' if name == 'max_background' else '0 or more'}, got {text}"
            )
    return replace(presets[preset], **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Structure:
    """One label of one case, measured, with the verdict.

    Attributes:
        value: In the label map.
        name: As the source calls it.
        category: Normalised.
        voxels: Left after cleaning.
        region: Tight box of those.
        components: Pieces it had before cleaning (26 neighbours).
        reason: Why it was dropped; empty for a kept one.
        points: ``POINTS`` voxel positions inside it, zyx, drawn at random; the same for the same case and label.
    """

    value: int
    name: str
    category: Category
    voxels: int
    region: Region
    components: int
    reason: str
    points: list[list[int]]


def tidy_layer(array: NDArray) -> NDArray:
    """A label layer as the smallest unsigned type, C order, values compacted where they would not fit.

    Raises:
        InputError: for values that are not whole numbers from 0.
    """
    if array.dtype.kind == "f":
        if not np.array_equal(array, np.round(array)):
            raise InputError(
                "labels must be whole numbers, got fractions; was the label map resampled with interpolation?"
            )
        array = array.astype(np.int64)
    if array.dtype.kind not in "biu":
        raise InputError(f"labels must be whole numbers, got {array.dtype}")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0:
        raise InputError(f"label values must be 0 or more, got {low}")
    return np.ascontiguousarray(
        array, dtype=np.uint8 if high < 256 else np.uint16 if high <= LARGEST_VALUE else np.int64
    )


def compact_values(array: NDArray, names: dict[int, str]) -> tuple[NDArray, dict[int, str]]:
    """The layer with values 1, 2, 3 ... where they exceed ``LARGEST_VALUE`` (instance ids do), and the names moved
    along.
    """
    if array.dtype != np.int64:
        return array, names
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

    Args:
        array: (D, H, W) unsigned, canonical (x runs to the right); changed in place: small pieces become 0, right
            halves get a new value.
        names: Name of each value.
        spacing_zyx_mm: Voxel edges.
        rules: What to keep.
        instances: Whether every value is one object of the same category.
        source: Name of the dataset: the category of instances, and a hint for names that say little.
        seed: Of the remembered points (the case's id).

    Returns:
        The layer (a wider copy where new values need it) and its structures.
    """
    from scipy.ndimage import find_objects

    boxes = find_objects(array)
    background = 1.0 - _labelled(array) / array.size
    found: list[Structure] = []
    free = max([len(boxes), *names]) + 1
    if rules.split_sides and free + len(boxes) > np.iinfo(array.dtype).max:
        array = array.astype(np.uint16)
    for value, box in enumerate(boxes, start=1):
        if box is None:
            continue
        named = value in names
        name = names.get(value, f"label_{value}")
        category = categorise("" if instances else name, source)
        parts = {value: (name, category)}
        mask = array[box] == value
        pieces, sizes = _pieces(mask)
        if rules.keep_components and len(sizes) > rules.keep_components:
            _remove_small(array[box], pieces, sizes, rules.keep_components)
        if (
            rules.split_sides
            and category.paired
            and free <= LARGEST_VALUE
            and (right := _right_half(pieces, sizes)) is not None
        ):
            array[box][right & (array[box] == value)] = free
            parts = {
                value: (f"{name} (left)", _on_side(category, "left")),
                free: (f"{name} (right)", _on_side(category, "right")),
            }
            free += 1
        for part, (called, kind) in parts.items():
            reason = "" if named or instances else f"value {value} has no name in the source"
            found.append(
                _measured(array, box, part, called, kind, len(sizes), spacing_zyx_mm, rules, background, reason, seed)
            )
    return array, found


def _measured(
    array: NDArray,
    box: tuple[slice, ...],
    value: int,
    name: str,
    category: Category,
    components: int,
    spacing: Triple,
    rules: Rules,
    background: float,
    reason: str,
    seed: str,
) -> Structure:
    mask = array[box] == value
    corner = [s.start for s in box]
    lines = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    start = [int(c + line[0]) for c, line in zip(corner, lines, strict=True)]
    stop = [int(c + line[-1] + 1) for c, line in zip(corner, lines, strict=True)]
    region = Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    voxels = int(np.count_nonzero(mask))
    reason = reason or _verdict(voxels, region, spacing, rules, background)
    digest = hashlib.sha256(f"{seed}:{value}".encode()).digest()
    points = _random_points(mask, np.random.default_rng(int.from_bytes(digest[:8], "big"))) + np.array(corner)
    return Structure(value, name, category, voxels, region, components, reason, points.tolist())


def _verdict(voxels: int, region: Region, spacing: Triple, rules: Rules, background: float) -> str:
    volume = voxels * float(np.prod(spacing))
    side = min(n * s for n, s in zip(region.shape_zyx, spacing, strict=True))
    if voxels < rules.min_voxels:
        return f"{voxels} voxels, under {rules.min_voxels}"
    if volume < rules.min_volume_mm3:
        return f"{volume:.4g} mm3, under {rules.min_volume_mm3:g}"
    if side < rules.min_side_mm:
        return f"side of {side:.3g} mm, under {rules.min_side_mm:g}"
    if background > rules.max_background:
        return f"background is {100 * background:.2f} % of the case, over {100 * rules.max_background:g}"
    return ""


def _labelled(array: NDArray) -> int:
    """Voxels that are not 0, slice by slice."""
    return sum(int(np.count_nonzero(plane)) for plane in array)


def _pieces(mask: NDArray) -> tuple[NDArray, NDArray]:
    """Connected pieces (26 neighbours) numbered from 1, and their sizes."""
    import cc3d

    pieces = cc3d.connected_components(mask, connectivity=26)
    sizes = np.zeros(int(pieces.max()) + 1, np.int64)
    for plane in pieces:  # bincount widens its input: one plane at a time
        sizes += np.bincount(plane.ravel(), minlength=len(sizes))
    return pieces, sizes[1:]


def _remove_small(block: NDArray, pieces: NDArray, sizes: NDArray, keep: int) -> None:
    largest = np.argsort(-sizes, kind="stable")[:keep] + 1
    gone = np.ones(len(sizes) + 1, bool)
    gone[[0, *largest]] = False
    block[gone[pieces]] = 0


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
    profiles = np.zeros((len(sizes) + 1, pieces.shape[2]))
    for x in range(pieces.shape[2]):
        profiles[:, x] = np.bincount(pieces[:, :, x].ravel(), minlength=len(sizes) + 1)
    centres = profiles @ np.arange(pieces.shape[2]) / np.maximum(profiles.sum(axis=1), 1)
    left, right = sorted((first, second), key=lambda piece: centres[piece])
    middle = (centres[left] + centres[right]) / 2
    cut = int(np.ceil(middle))
    if (
        profiles[left, :cut].sum() < _OWN_SIDE * sizes[left - 1]
        or profiles[right, cut:].sum() < _OWN_SIDE * sizes[right - 1]
    ):
        return None
    chosen = centres > middle
    chosen[0] = False
    return chosen[pieces]


def _on_side(category: Category, side: str) -> Category:
    return Category(f"{side} {category.name}", category.group, side)


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

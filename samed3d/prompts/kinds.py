"""The kinds of prompt, as a user gives them, and their positions as voxels of one image.

Their JSON form is in ``schema.py``; what a model is given for each is in ``inference/model_prompts.py``.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError, check_choice, whole_number
from samed3d.geometry import Grid, Triple, as_triple
from samed3d.prompts.packed import PackedMask

SPACES = ("ijk", "ras")
MASK_LOGIT_THRESHOLD = 0.0
"""The one threshold of the package: a voxel belongs to the mask when its logit is greater (probability greater than one
half)."""
MAX_BRUSH_VOX = 50
MAX_PATH = 10_000
MAX_NAME = 200


@dataclass(frozen=True)
class Point:
    """A click at voxel indices i, j, k (0-based, x first) or, in the space ``"ras"``, RAS millimetres.

    A positive one marks the object, a negative one the background.
    """

    at: Triple
    positive: bool = True
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _position(self.at, "point"))
        object.__setattr__(self, "positive", checked_flag(self.positive, "positive"))
        check_choice("space", self.space, SPACES)


@dataclass(frozen=True)
class Box:
    """A box around the object, from its lowest to its highest corner; both belong to it.

    A box that is one voxel thick along exactly one axis is a 2D box: it bounds the object in that slice and says
    nothing of the others.
    """

    min: Triple
    max: Triple
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "min", _position(self.min, "box min"))
        object.__setattr__(self, "max", _position(self.max, "box max"))
        check_choice("space", self.space, SPACES)
        if any(a > b for a, b in zip(self.min, self.max, strict=True)):
            found = f"min {_show(self.min)} and max {_show(self.max)}"
            raise InputError(f"box min must not exceed box max on any axis, got {found}; swap them")


@dataclass(frozen=True)
class Scribble:
    """A stroke of a brush: every voxel under it is labelled.

    Args:
        path: At least one position; consecutive ones are joined by straight lines. It may leave the slice.
        positive: True marks the object, False marks background.
        radius_vox: Of the brush, in voxels of the image; 0 marks the voxels under the line only.
        space: ``"ijk"`` or ``"ras"``.
    """

    path: tuple[Triple, ...]
    positive: bool = True
    radius_vox: float = 1.0
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _positions(self.path, "scribble", least=1))
        object.__setattr__(self, "positive", checked_flag(self.positive, "positive"))
        check_choice("space", self.space, SPACES)
        radius = self.radius_vox
        if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 <= radius <= MAX_BRUSH_VOX:
            raise InputError(f"scribble radius_vox must be a number from 0 to {MAX_BRUSH_VOX}, got {radius!r}")
        object.__setattr__(self, "radius_vox", float(self.radius_vox))


@dataclass(frozen=True)
class Lasso:
    """A closed outline of at least three positions, drawn by hand in one slice of any of the three axes.

    A positive one is drawn around the object's part in that slice: the deeper half of what it holds belongs to the
    object. Nothing inside a negative one does.
    """

    outline: tuple[Triple, ...]
    positive: bool = True
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "outline", _positions(self.outline, "lasso", least=3))
        object.__setattr__(self, "positive", checked_flag(self.positive, "positive"))
        check_choice("space", self.space, SPACES)


@dataclass(frozen=True)
class Mask:
    """A mask to start from: the object is this mask until the next prompt corrects it. It replaces what was said
    before.

    Args:
        mask: A (D, H, W) array of the image's shape, anything but zero being the object; or the path of a mask file,
            which is resampled where it lies on another grid. Kept as ``PackedMask`` or path.
    """

    mask: PackedMask | str

    def __init__(self, mask: PackedMask | NDArray | str | Path) -> None:
        """Pack an array; keep a path as it is."""
        if hasattr(mask, "__array__"):
            array = np.asarray(mask)
            if array.ndim != 3:
                raise InputError(f"mask must be 3D (D, H, W), got shape {array.shape}")
            if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
                raise InputError(f"mask must hold finite numbers, got {array.dtype}; 0 is the background")
            mask = PackedMask.of(array)
        elif not isinstance(mask, PackedMask | str | Path):
            raise InputError(f"mask must be an array or the path of a file, got {mask!r:.80}")
        object.__setattr__(self, "mask", mask if isinstance(mask, PackedMask) else str(mask))

    @property
    def space(self) -> str:
        """A mask lies on voxels."""
        return "ijk"


Prompt = Point | Box | Scribble | Lasso | Mask


def is_positive(prompt: Prompt) -> bool:
    """Whether a prompt says where the object is (boxes and masks always do).

    Raises:
        InputError: if it is no prompt.
    """
    if not isinstance(prompt, Prompt):
        raise InputError(f"prompt must be a Point, Box, Scribble, Lasso or Mask, got {prompt!r:.80}")
    return isinstance(prompt, Box | Mask) or prompt.positive


def point_in_grid(point: Point, grid: Grid) -> Triple:
    """The click's fractional ijk voxel position in ``grid``.

    Raises:
        InputError: if it lies outside the volume; the message names the bounds.
    """
    return _inside(point.at, point.space, grid, "point")


def path_in_grid(stroke: Scribble | Lasso, grid: Grid) -> list[Triple]:
    """The fractional ijk positions of a scribble's path or a lasso's outline in ``grid``.

    Raises:
        InputError: if one of a scribble's lies outside the volume, or none of a lasso's does not; the message names the
            bounds.
    """
    if isinstance(stroke, Scribble):
        return [_inside(at, stroke.space, grid, "scribble") for at in stroke.path]
    path = [at if stroke.space == "ijk" else grid.ras_mm_to_ijk(at) for at in stroke.outline]
    if not any(grid.contains_ijk(ijk) for ijk in path):
        _inside(stroke.outline[0], stroke.space, grid, "lasso")
    return path


def _inside(at: Triple, space: str, grid: Grid, what: str) -> Triple:
    ijk = at if space == "ijk" else grid.ras_mm_to_ijk(at)
    if not grid.contains_ijk(ijk):
        where = f"{_show(at)}" + ("" if space == "ijk" else f" mm RAS (= voxel {_show(ijk)})")
        top = tuple(n - 1 for n in grid.size_ijk)
        raise InputError(
            f"{what} must lie inside the volume, ijk (0, 0, 0) to {top}, got {where}; check --space and the axis order"
        )
    return ijk


def box_in_grid(box: Box, grid: Grid) -> tuple[Triple, Triple]:
    """The box's lowest and highest ijk voxel (inclusive), clipped to the volume.

    A box in RAS becomes the voxel-axis box around its eight corners.

    Raises:
        InputError: if no voxel of the volume lies inside it.
    """
    corners = np.array([box.min, box.max])
    if box.space != "ijk":
        corners = np.array([grid.ras_mm_to_ijk(as_triple(c)) for c in itertools.product(*corners.T)])
    low, high, top = corners.min(0), corners.max(0), np.array(grid.size_ijk) - 1
    if (high < -0.5).any() or (low >= top + 0.5).any():
        found = f"{_show(box.min)} to {_show(box.max)} ({box.space})"
        raise InputError(f"box must meet the volume, ijk (0, 0, 0) to {tuple(top.tolist())}, got {found}")
    return as_triple(low.clip(0, top)), as_triple(high.clip(0, top))


@dataclass
class ObjectPrompts:
    """The prompts of one object, oldest first; ``code`` is what it is for DICOM, SCHEME:VALUE:MEANING or empty."""

    id: int = 1
    name: str = "object"
    prompts: list[Prompt] = field(default_factory=list)
    code: str = ""

    def __post_init__(self) -> None:
        self.id = whole_number(self.id, "object id")
        self.name = checked_name(self.name)

    def check_positive(self, where: str = "") -> None:
        """Refuse an object without a prompt that marks it (a positive point or stroke, a box, a mask)."""
        if not any(map(is_positive, self.prompts)):
            found = f"object {self.id} ({self.name}){where} needs a positive point or a box"
            raise InputError(f"{found}, got {len(self.prompts)} negative only; add one on the object")


def checked_name(name: Any) -> str:
    """The name of an object.

    Raises:
        InputError: if it is no text that every file format can hold.
    """
    if (
        not isinstance(name, str)
        or len(name) > MAX_NAME
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    ):
        rule = f"name must be text of at most {MAX_NAME} characters, none of them control or broken characters"
        raise InputError(f"{rule}, got {repr(name)[:80]}")
    return name


def checked_flag(value: Any, what: str) -> bool:
    """A truth value, which no number and no text is.

    Raises:
        InputError: if it is of another type.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{what} must be true or false, got {value!r}")
    return bool(value)


def _position(value: Sequence[float], what: str) -> Triple:
    try:
        listed = list(value)
        if isinstance(value, bytes | set | dict) or any(isinstance(v, str | bytes | bool | np.bool_) for v in listed):
            raise TypeError("no number")
        triple = as_triple(listed)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} must be three numbers, got {repr(value)[:80]}") from error
    if not all(abs(v) < float("inf") for v in triple):
        raise InputError(f"{what} must be finite, got {value!r}")
    return triple


def _positions(values: Sequence[Sequence[float]], what: str, least: int) -> tuple[Triple, ...]:
    try:
        listed = list(values)
    except TypeError as error:
        raise InputError(f"{what} must be a list of positions, got {values!r}") from error
    if not least <= len(listed) <= MAX_PATH:
        raise InputError(f"{what} must have {least} to {MAX_PATH} positions, got {len(listed)}")
    return tuple(_position(value, what) for value in listed)


def _show(values: Triple) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"

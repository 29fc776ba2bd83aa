"""What a user says about an object: points and boxes, as an ordered list, and their JSON form.

Positions are kept exactly as given, each with its space (``ijk`` voxels or ``ras`` millimetres); ``in_grid`` turns them into voxels of
one image. This file knows no model and no array. Read ``inference/session.py`` next.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samed3d.errors import InputError
from samed3d.geometry import Grid, Triple, as_triple

SPACES = ("ijk", "ras")
SCHEMA_VERSION = 1
MASK_LOGIT_THRESHOLD = 0.0
"""The one threshold of the package: a voxel belongs to the mask when its logit is greater (probability greater than one half)."""


@dataclass(frozen=True)
class Point:
    """A click.

    Args:
        at: Position, three numbers: voxel indices i, j, k (0-based, x first) or RAS millimetres.
        positive: True marks the object, False marks background.
        space: ``"ijk"`` or ``"ras"``.
    """

    at: Triple
    positive: bool = True
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _position(self.at, "point"))
        _check_space(self.space)


@dataclass(frozen=True)
class Box:
    """A 3D box around the object; both corners belong to it.

    Args:
        min: Lowest corner, i, j, k or RAS mm.
        max: Highest corner, same space; ``min <= max`` on each axis.
        space: ``"ijk"`` or ``"ras"``.
    """

    min: Triple
    max: Triple
    space: str = "ijk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "min", _position(self.min, "box min"))
        object.__setattr__(self, "max", _position(self.max, "box max"))
        _check_space(self.space)
        if any(a > b for a, b in zip(self.min, self.max, strict=True)):
            raise InputError(f"box min must not exceed box max on any axis, got min {_show(self.min)} and max {_show(self.max)}; swap them")


Prompt = Point | Box


def point_in_grid(point: Point, grid: Grid) -> Triple:
    """The click's fractional ijk voxel position in ``grid``.

    Raises:
        InputError: if it lies outside the volume; the message names the bounds.
    """
    ijk = point.at if point.space == "ijk" else grid.ras_mm_to_ijk(point.at)
    if not grid.contains_ijk(ijk):
        where = f"{_show(point.at)}" + ("" if point.space == "ijk" else f" mm RAS (= voxel {_show(ijk)})")
        top = tuple(n - 1 for n in grid.size_ijk)
        raise InputError(f"point must lie inside the volume, ijk (0, 0, 0) to {top}, got {where}; check --space and the axis order")
    return ijk


def box_in_grid(box: Box, grid: Grid) -> tuple[Triple, Triple]:
    """The box's lowest and highest ijk voxel (inclusive), clipped to the volume.

    A box in RAS becomes the voxel-axis box around its eight corners.

    Raises:
        InputError: if no voxel of the volume lies inside it.
    """
    if box.space == "ijk":
        low, high = box.min, box.max
    else:
        corners = [grid.ras_mm_to_ijk(as_triple(corner)) for corner in itertools.product(*zip(box.min, box.max, strict=True))]
        low = as_triple([min(c[a] for c in corners) for a in range(3)])
        high = as_triple([max(c[a] for c in corners) for a in range(3)])
    top = as_triple([n - 1 for n in grid.size_ijk])
    if any(h < -0.5 or lo >= t + 0.5 for lo, h, t in zip(low, high, top, strict=True)):
        shown = tuple(int(t) for t in top)
        raise InputError(f"box must meet the volume, ijk (0, 0, 0) to {shown}, got {_show(box.min)} to {_show(box.max)} ({box.space})")
    low, high = (as_triple([min(max(0.0, v), t) for v, t in zip(corner, top, strict=True)]) for corner in (low, high))
    return low, high


@dataclass
class ObjectPrompts:
    """The prompts of one object, oldest first."""

    id: int = 1
    name: str = "object"
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def has_positive(self) -> bool:
        """Whether anything says where the object is (a positive point or a box)."""
        return any(isinstance(p, Box) or p.positive for p in self.prompts)


def parse_numbers(text: str, count: int, flag: str) -> tuple[float, ...]:
    """``"1,2,3"`` as numbers, for command-line values.

    Raises:
        InputError: if there are not ``count`` finite numbers.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(abs(v) < float("inf") for v in values):
        raise InputError(f"{flag} needs {count} numbers separated by commas, got {text!r}")
    return values


def dump_prompts(objects: Iterable[ObjectPrompts], path: Path) -> None:
    """Write objects to a prompt file; all positions must be of one space."""
    listed = list(objects)
    spaces = {p.space for o in listed for p in o.prompts}
    if len(spaces) > 1:
        raise InputError("prompts of one file must share one space, got both ijk and ras")
    body = {
        "version": SCHEMA_VERSION,
        "space": spaces.pop() if spaces else "ijk",
        "objects": [{"id": o.id, "name": o.name, "prompts": [_prompt_to_json(p) for p in o.prompts]} for o in listed],
    }
    path.write_text(json.dumps(body, indent=1))


def load_prompts(path: Path) -> list[ObjectPrompts]:
    """Read a prompt file (the schema is in ``docs/click.md``).

    Raises:
        InputError: if the file is missing, is not JSON or breaks the schema; the message says where.
    """
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"prompt file cannot be read: {path} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"prompt file is not JSON: {path} ({error})") from error
    if not isinstance(body, dict) or body.get("version") != SCHEMA_VERSION:
        raise InputError(f'prompt file must be an object with "version": {SCHEMA_VERSION}: {path}')
    space = body.get("space", "ijk")
    _check_space(space)
    objects: list[ObjectPrompts] = []
    for number, entry in enumerate(_listed(body, "objects", str(path)), start=1):
        where = f"{path}: object {number}"
        prompts = [_prompt_from_json(p, space, where) for p in _listed(entry, "prompts", where)]
        object_id = entry.get("id", number)
        if type(object_id) is not int or object_id < 1:
            raise InputError(f"{where}: id must be a whole number > 0, got {object_id!r}")
        if any(object_id == o.id for o in objects):
            raise InputError(f"{where}: id must differ from those of the objects before it, got {object_id} again")
        objects.append(ObjectPrompts(id=object_id, name=str(entry.get("name", f"object {number}")), prompts=prompts))
    return objects


def _prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Point):
        return {"type": "point", "at": list(prompt.at), "positive": prompt.positive}
    return {"type": "box", "min": list(prompt.min), "max": list(prompt.max)}


def _prompt_from_json(entry: Any, space: str, where: str) -> Prompt:
    kind = entry.get("type") if isinstance(entry, dict) else None
    try:
        if kind == "point":
            positive = entry.get("positive", True)
            if not isinstance(positive, bool):
                raise InputError(f"{where}: positive must be true or false, got {positive!r}")
            return Point(entry["at"], positive, space)
        if kind == "box":
            return Box(entry["min"], entry["max"], space)
    except KeyError as error:
        raise InputError(f"{where}: a {kind} needs {error.args[0]!r}") from error
    raise InputError(f'{where}: prompt type must be "point" or "box", got {kind!r}')


def _listed(entry: Any, key: str, where: str) -> list[Any]:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} must be a list that is not empty")
    return value


def _check_space(space: str) -> None:
    if space not in SPACES:
        raise InputError(f"space must be one of {', '.join(SPACES)}, got {space!r}")


def _position(value: Sequence[float], what: str) -> Triple:
    try:
        triple = as_triple(list(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be three numbers, got {value!r}") from error
    if not all(abs(v) < float("inf") for v in triple):
        raise InputError(f"{what} must be finite, got {value!r}")
    return triple


def _show(values: Triple) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"

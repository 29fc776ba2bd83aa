"""Prompts as JSON and as text: one schema for the API, the command line, the server and files.

A prompt file holds objects with their prompts in one space; a journal or a request holds single prompts, each with its
space. ``docs/click.md`` has an example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samed3d.errors import InputError, nearest_name
from samed3d.geometry import as_triple
from samed3d.output import write_json
from samed3d.prompts.kinds import SPACES, Box, Lasso, Mask, ObjectPrompts, Point, Prompt, Scribble
from samed3d.prompts.packed import PackedMask

SCHEMA_VERSION = 1
PromptReader = Callable[[Any, str, str], Prompt]
"""Reads a prompt from JSON; arguments as ``prompt_from_json``."""
KEYS = {
    "point": ("at", "positive"),
    "box": ("min", "max"),
    "scribble": ("path", "positive", "radius_vox"),
    "lasso": ("outline", "positive"),
    "mask": ("path", "size", "start", "stop", "bits"),
}
"""Keys of each kind of prompt; ``type``, ``space`` and ``id`` are keys of all."""


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


def parse_prompts(texts: Mapping[str, Sequence[str]], space: str = "ijk", dashes: str = "") -> list[Prompt]:
    """Prompts from numbers as text: boxes first, then positive points and scribbles, then negative ones.

    Args:
        texts: By ``box``, ``point``, ``negative_point``, ``scribble`` or ``negative_scribble``: numbers separated by
            commas, the positions of a scribble by semicolons.
        space: Of all positions.
        dashes: ``"--"`` if messages should name command-line options.

    Raises:
        InputError: if a text is not the numbers of its prompt.
    """

    def parsed(key: str, text: str, count: int = 3) -> tuple[float, ...]:
        return parse_numbers(text, count, dashes + (key.replace("_", "-") if dashes else key))

    prompts: list[Prompt] = []
    for text in texts.get("box", ()):
        numbers = parsed("box", text, 6)
        prompts.append(Box(as_triple(numbers[:3]), as_triple(numbers[3:]), space))
    for positive, point, scribble in ((True, "point", "scribble"), (False, "negative_point", "negative_scribble")):
        prompts += [Point(as_triple(parsed(point, text)), positive, space) for text in texts.get(point, ())]
        for text in texts.get(scribble, ()):
            path = tuple(as_triple(parsed(scribble, at)) for at in text.split(";") if at)
            prompts.append(Scribble(path, positive, space=space))
    return prompts


def dump_prompts(objects: Iterable[ObjectPrompts], path: Path) -> None:
    """Write objects to a prompt file; all positions must be of one space."""
    listed = list(objects)
    spaces = {p.space for o in listed for p in o.prompts if not isinstance(p, Mask)}
    if len(spaces) > 1:
        raise InputError("prompts of one file must share one space, got both ijk and ras")
    entries = [{"id": o.id, "name": o.name, "prompts": [prompt_to_json(p) for p in o.prompts]} for o in listed]
    write_json(path, {"version": SCHEMA_VERSION, "space": spaces.pop() if spaces else "ijk", "objects": entries})


def load_prompts(path: Path) -> list[ObjectPrompts]:
    """Read a prompt file; the path of a mask is relative to it.

    Raises:
        InputError: if the file is missing, is not JSON or breaks the schema; the message says where.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"prompt file cannot be read: {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"prompt file is not JSON: {path} ({error})") from error
    return objects_from_json(body, str(path), lambda *entry: _beside(prompt_from_json(*entry), path))


def objects_from_json(body: Any, where: str, read: PromptReader | None = None) -> list[ObjectPrompts]:
    """The objects of a prompt file's content.

    Args:
        body: The content, as JSON gives it.
        where: What messages begin with.
        read: Reads one prompt; ``prompt_from_json`` by default.

    Raises:
        InputError: if it breaks the schema.
    """
    if not isinstance(body, dict) or body.get("version") != SCHEMA_VERSION:
        raise InputError(f'{where}: prompts must be an object with "version": {SCHEMA_VERSION}')
    _check_keys(body, ("version", "space", "objects"), where)
    space = body.get("space", "ijk")
    if space not in SPACES:
        raise InputError(f"{where}: space must be one of {', '.join(SPACES)}, got {space!r}")
    objects: list[ObjectPrompts] = []
    for number, entry in enumerate(_listed(body, "objects", where), start=1):
        place = f"{where}: object {number}"
        prompts = [(read or prompt_from_json)(p, space, place) for p in _listed(entry, "prompts", place)]
        _check_keys(entry, ("id", "name", "prompts"), place)
        object_id = entry.get("id", number)
        if type(object_id) is not int or object_id < 1:
            raise InputError(f"{place}: id must be a whole number > 0, got {object_id!r}")
        if any(object_id == o.id for o in objects):
            raise InputError(f"{place}: id must differ from those of the objects before it, got {object_id} again")
        objects.append(ObjectPrompts(object_id, checked_name(entry.get("name", f"object {number}"), place), prompts))
    return objects


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """One prompt as a JSON object, without its space (``prompt.space``)."""
    match prompt:
        case Point():
            return {"type": "point", "at": list(prompt.at), "positive": prompt.positive}
        case Box():
            return {"type": "box", "min": list(prompt.min), "max": list(prompt.max)}
        case Scribble():
            path = [list(at) for at in prompt.path]
            return {"type": "scribble", "path": path, "positive": prompt.positive, "radius_vox": prompt.radius_vox}
        case Lasso():
            return {"type": "lasso", "outline": [list(at) for at in prompt.outline], "positive": prompt.positive}
        case Mask():
            return {
                "type": "mask",
                **({"path": prompt.mask} if isinstance(prompt.mask, str) else prompt.mask.to_json()),
            }


def prompt_from_json(entry: Any, space: str = "ijk", where: str = "prompt") -> Prompt:
    """The prompt of a JSON object.

    Args:
        entry: What ``prompt_to_json`` returns; its own ``"space"``, if it has one, wins over ``space``.
        space: Of positions.
        where: What messages begin with.

    Raises:
        InputError: if it breaks the schema.
    """
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind not in KEYS:
        raise InputError(f"{where}: prompt type must be one of {', '.join(KEYS)}, got {kind!r}")
    _check_keys(entry, (*KEYS[kind], "type", "space", "id"), f"{where}: a {kind}")
    positive, space = entry.get("positive", True), entry.get("space", space)
    if not isinstance(positive, bool):
        raise InputError(f"{where}: positive must be true or false, got {positive!r}")
    if space not in SPACES:
        raise InputError(f"{where}: space must be one of {', '.join(SPACES)}, got {space!r}")
    try:
        if kind == "point":
            return Point(entry["at"], positive, space)
        if kind == "box":
            return Box(entry["min"], entry["max"], space)
        if kind == "scribble":
            radius = entry.get("radius_vox", 1.0)
            if isinstance(radius, bool) or not isinstance(radius, int | float):
                raise InputError(f"{where}: radius_vox must be a number, got {radius!r}")
            return Scribble(entry["path"], positive, float(radius), space)
        if kind == "lasso":
            return Lasso(entry["outline"], positive, space)
        if "path" not in entry:
            return Mask(PackedMask.from_json(entry))
        if not isinstance(entry["path"], str) or not entry["path"]:
            raise InputError(f"{where}: the path of a mask must be a file name, got {entry['path']!r}")
        return Mask(entry["path"])
    except KeyError as error:
        raise InputError(f"{where}: a {kind} needs {error.args[0]!r}") from error


def _beside(prompt: Prompt, file: Path) -> Prompt:
    """The path of a mask is relative to the prompt file."""
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        return Mask(file.parent / prompt.mask)
    return prompt


def checked_name(name: Any, where: str) -> str:
    """The name of an object.

    Raises:
        InputError: if it is no text that can be written to a file.
    """
    if not isinstance(name, str) or any("\ud800" <= character <= "\udfff" for character in name):
        raise InputError(f"{where}: name must be text without broken characters, got {name!r}")
    return name


def _check_keys(entry: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in entry:
        if key not in known:
            raise InputError(f"{where} has no key {key!r}; {nearest_name(key, known)}")


def _listed(entry: Any, key: str, where: str) -> list[Any]:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} must be a list that is not empty")
    return value

"""Prompts as JSON and as text: one schema for the API, the command line, the server and files.

A prompt file holds objects with their prompts in one space; a journal or a request holds single prompts, each with its
space. ``docs/click.md`` has an example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from samed3d.errors import InputError, check_choice, check_keys
from samed3d.geometry import as_triple
from samed3d.output import write_json
from samed3d.prompts.kinds import SPACES, Box, Lasso, Mask, ObjectPrompts, Point, Prompt, Scribble
from samed3d.prompts.packed import PackedMask

T = TypeVar("T")

SCHEMA_VERSION = 1
PromptReader = Callable[[Any, str, str], Prompt]
"""Reads a prompt from JSON; arguments as ``prompt_from_json``."""
KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Point, Box, Scribble, Lasso, Mask)}
"""Kinds of prompt by their ``type`` in JSON; the other keys are the fields of the kind, but for a mask."""
_MASK_KEYS = ("path", "size", "start", "stop", "bits")


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

    ``texts`` are by ``box``, ``point``, ``negative_point``, ``scribble`` or ``negative_scribble``: numbers separated by
    commas, the positions of a scribble by semicolons. With ``dashes`` ``"--"`` messages name command-line options.

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
    entries = [
        {"id": o.id, "name": o.name, "prompts": [prompt_to_json(p) for p in o.prompts]}
        | ({"code": o.code} if o.code else {})
        for o in listed
    ]
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
    """The objects of a prompt file's content; messages begin with ``where``, and ``read`` reads one prompt.

    Raises:
        InputError: if it breaks the schema.
    """
    if not isinstance(body, dict) or body.get("version") != SCHEMA_VERSION:
        raise InputError(f'{where}: prompts must be an object with "version": {SCHEMA_VERSION}')
    check_keys(body, ("version", "space", "objects"), where)
    space = body.get("space", "ijk")
    check_choice(f"{where}: space", space, SPACES)
    objects: list[ObjectPrompts] = []
    for number, entry in enumerate(_listed(body, "objects", where), start=1):
        place = f"{where}: object {number}"
        prompts = [(read or prompt_from_json)(p, space, place) for p in _listed(entry, "prompts", place)]
        check_keys(entry, ("id", "name", "code", "prompts"), place)
        code = checked_code(entry.get("code", ""), place)
        found = _made(
            place, ObjectPrompts, entry.get("id", number), entry.get("name", f"object {number}"), prompts, code
        )
        if any(found.id == o.id for o in objects):
            raise InputError(f"{place}: id must differ from those of the objects before it, got {found.id} again")
        objects.append(found)
    return objects


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """One prompt as a JSON object, without its space (``prompt.space``)."""
    kind = type(prompt).__name__.lower()
    if isinstance(prompt, Mask):
        return {"type": kind, **({"path": prompt.mask} if isinstance(prompt.mask, str) else prompt.mask.to_json())}
    values = {each.name: getattr(prompt, each.name) for each in fields(prompt) if each.name != "space"}
    return {"type": kind, **{key: _as_lists(value) for key, value in values.items()}}


def _as_lists(value: Any) -> Any:
    return [_as_lists(one) for one in value] if isinstance(value, tuple) else value


def prompt_from_json(entry: Any, space: str = "ijk", where: str = "prompt") -> Prompt:
    """The prompt of a JSON object; messages begin with ``where``.

    Its own ``"space"``, if it has one, wins over ``space``.

    Raises:
        InputError: if it breaks the schema.
    """
    name = entry.get("type") if isinstance(entry, dict) else None
    check_choice(f"{where}: prompt type", name, KINDS)
    kind, space = KINDS[str(name)], entry.get("space", space)
    own = [each for each in fields(kind) if each.name != "space"]
    known = _MASK_KEYS if kind is Mask else [each.name for each in own]
    check_keys(entry, (*known, "type", "space", "id"), f"{where}: a {name}")
    check_choice(f"{where}: space", space, SPACES)
    if kind is not Mask:
        for each in own:
            if each.default is MISSING and each.name not in entry:
                raise InputError(f"{where}: a {name} needs {each.name!r}")
        return _made(where, kind, **{key: entry[key] for key in known if key in entry}, space=space)
    if "path" not in entry:
        return Mask(PackedMask.from_json(entry))
    if not isinstance(entry["path"], str) or not entry["path"]:
        raise InputError(f"{where}: the path of a mask must be a file name, got {entry['path']!r}")
    return Mask(entry["path"])


def _made(where: str, kind: Callable[..., T], *values: Any, **fields: Any) -> T:
    """What ``kind`` makes; its errors begin with ``where``."""
    try:
        return kind(*values, **fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _beside(prompt: Prompt, file: Path) -> Prompt:
    """The path of a mask is relative to the prompt file."""
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        return Mask(file.parent / prompt.mask)
    return prompt


def checked_code(code: Any, where: str) -> str:
    """The coded type of an object for DICOM; empty for none.

    Raises:
        InputError: if it is not SCHEME:VALUE:MEANING in the lengths that DICOM allows.
    """
    parts = code.split(":", 2) if isinstance(code, str) else []
    fits = len(parts) == 3 and all(0 < len(p.strip()) == len(p) <= n for p, n in zip(parts, (16, 64, 64), strict=True))
    if code != "" and not (fits and code.isprintable() and "\\" not in code):
        raise InputError(f"{where}: code must be SCHEME:VALUE:MEANING as SCT:10200004:Liver, got {code!r}")
    return code


def _listed(entry: Any, key: str, where: str) -> list[Any]:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key!r} must be a list that is not empty")
    return value

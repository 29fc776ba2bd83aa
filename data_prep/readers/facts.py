"""What is known of a dataset beside its voxels: from its own ``dataset.json``, and from a ``source.json`` that the user
may add.

``source.json`` lies in the source's folder and may state ``licence``, ``licence_flag``, ``attribution``, ``url``,
``modality``,
``label_kind``, ``labels`` (name to value, for layouts that carry no names), ``subject_pattern`` (a regular expression
whose first group is the person in a case's name) and ``spacing_order`` (CVPR npz). It has the last word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.cases import SourceFacts
from data_prep.readers.names import safe_name, subject_of
from samed3d.errors import InputError

_KEYS = {
    "licence",
    "licence_flag",
    "attribution",
    "url",
    "modality",
    "label_kind",
    "labels",
    "spacing_order",
    "subject_pattern",
}
_CHOICES = {"licence_flag": ("ok", "unclear"), "label_kind": ("semantic", "instance"), "spacing_order": ("xyz", "zyx")}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: if it is missing, damaged, or not an object.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {path} ({error})") from error
    if not isinstance(body, dict):
        raise InputError(f"must hold a JSON object, got {type(body).__name__}: {path}")
    return body


def read_source_json(folder: Path) -> dict[str, Any]:
    """What the user states in ``source.json``; empty where there is none.

    Raises:
        InputError: if a key or a value is not one of those known.
    """
    path = folder / "source.json"
    if not path.is_file():
        return {}
    body = read_json(path)
    if unknown := sorted(set(body) - _KEYS):
        raise InputError(f"source.json knows {', '.join(sorted(_KEYS))}; got {unknown[0]!r}: {path}")
    for key, choices in _CHOICES.items():
        if key in body and body[key] not in choices:
            raise InputError(f"{key} must be {' or '.join(choices)}, got {body[key]!r}: {path}")
    return body


def facts_of(folder: Path, reader: str, about: dict[str, Any] | None = None, *, modality: str = "") -> SourceFacts:
    """The facts of a source.

    Args:
        folder: Its folder, which names it.
        reader: The reader that recognised it.
        about: Its ``dataset.json``, if it has one.
        modality: What its layout tells of the modality; ``source.json`` may say otherwise.
    """
    known = {**(about or {}), **read_source_json(folder)}

    def text(*keys: str) -> str:
        return next((str(known[k]) for k in keys if isinstance(known.get(k), str) and known[k]), "")

    licence = text("licence", "license")
    return SourceFacts(
        name=safe_name(folder.resolve().name),
        format=reader,
        modality=text("modality") or modality,
        licence=licence,
        licence_flag=text("licence_flag") or ("ok" if licence else "unclear"),
        attribution=text("attribution", "citation", "reference"),
        label_kind=text("label_kind") or "semantic",
        url=text("url", "source_repo"),
    )


def subject_rule(folder: Path) -> Callable[[str], str]:
    """How to tell the person from a case's name: by ``subject_pattern`` of ``source.json``, else by the patterns of
    ``names.subject_of``.

    Raises:
        InputError: if the pattern is no regular expression with a group.
    """
    pattern = read_source_json(folder).get("subject_pattern")
    if pattern is None:
        return subject_of
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(
            f"subject_pattern must be a regular expression, got {pattern!r} ({error}): {folder / 'source.json'}"
        ) from error
    if regex.groups < 1:
        raise InputError(
            f"subject_pattern must have a group that is the person, as in '^(\\d+)_', got {pattern!r}: {folder / 'source.json'}"
        )

    def subject(case_name: str) -> str:
        match = regex.search(case_name)
        return match.group(1) if match else subject_of(case_name)

    return subject


def source_json_path(folder: Path) -> dict[str, str]:
    """The path of a folder's ``source.json`` for ``RawCase.paths``, where loading a case depends on it and it is
    there.
    """
    path = folder / "source.json"
    return {"source_json": str(path)} if path.is_file() else {}


def value_names(paths: dict[str, str]) -> dict[int, str]:
    """Names of label values from the ``labels`` of a case's ``source.json`` (name to value); empty where it states
    none.

    Raises:
        InputError: if they are not a table of name to whole number.
    """
    if "source_json" not in paths:
        return {}
    path = Path(paths["source_json"])
    labels = read_source_json(path.parent).get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(value, int) and value > 0 for value in labels.values()):
        raise InputError(f'labels must be a table of name to value, as in {{"liver": 1}}, got {labels!r}: {path}')
    return {value: str(name) for name, value in labels.items()}

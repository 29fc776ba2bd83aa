"""What is known of a data set beside its voxels: from file names, its own ``dataset.json``, and the user's
``source.json``.

``source.json`` lies in the folder of the data set and may state ``licence``, ``licence_flag``, ``attribution``,
``url``, ``modality``, ``label_kind``, ``labels`` (name to value, for layouts that carry no names), ``subject_pattern``
(a regular expression whose first group is the person in a case's name) and ``spacing_order`` (challenge npz). It
overrides ``dataset.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.cases import SourceFacts
from samed3d.errors import InputError, check_keys
from samed3d.volume import SUFFIXES

_KEYS = "attribution label_kind labels licence licence_flag modality spacing_order subject_pattern url".split()
_CHOICES = {"licence_flag": ("ok", "unclear"), "label_kind": ("semantic", "instance"), "spacing_order": ("xyz", "zyx")}
_MODALITIES = {
    **{"ct": "CT", "mr": "MR", "mri": "MR", "pet": "PET", "us": "US"},
    **{"microscopy": "microscopy", "microscope": "microscopy"},
}
# Names by which widely used data sets mark several images of one person. Each has one group: the person.
_SUBJECT_PATTERNS = (
    re.compile(r"(?:^|_)(sub-[A-Za-z0-9]+)(?=_|$)"),  # BIDS: sub-01_ses-02_T1w
    re.compile(r"(?:^|_)(TCGA-\w{2}-\w{4})"),  # TCGA barcode: TCGA-DU-7294_1998.01.04
    re.compile(r"(?:^|_)(BraTS-[A-Za-z]+-\d{5})-\d{3}(?=_|$)"),  # BraTS from 2023: person-timepoint
    re.compile(r"(?:^|_)(patient\d+)_(?:frame|4d)"),  # ACDC: patient001_frame12
    re.compile(r"(?:^|_)(patient\d+)_(?:ES|ED)(?=_|$)"),  # CAMUS, and ACDC by phase
)


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
    check_keys(body, _KEYS, str(path))
    for key, choices in _CHOICES.items():
        if key in body and body[key] not in choices:
            raise InputError(f"{key} must be {' or '.join(choices)}, got {body[key]!r}: {path}")
    return body


def facts_of(folder: Path, reader: str, about: dict[str, Any] | None = None, *, modality: str = "") -> SourceFacts:
    """The facts of a data set, which its folder names, from ``dataset.json`` (``about``) and ``source.json``.

    ``modality`` is what its layout implies; ``source.json`` may state another.
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


def modality_of_name(name: str) -> str:
    """The modality that a name begins with, as in ``ct_liver``; empty for other words."""
    return _MODALITIES.get(name.split("_")[0].lower(), "")


def common_modality(kinds: set[str]) -> str:
    """The modality that all images of a data set share, or empty."""
    return next(iter(kinds)) if len(kinds) == 1 else ""


def channel_names(about: dict[str, Any]) -> list[str]:
    """The channels that a ``dataset.json`` names, in order: ``channel_names`` (nnU-Net 2) or ``modality`` (nnU-Net 1,
    Decathlon); empty where neither is a table.
    """
    for key in ("channel_names", "modality"):
        table = about.get(key)
        if isinstance(table, dict) and all(str(k).isdigit() for k in table):
            return [str(table[k]) for k in sorted(table, key=int)]
    return []


def subject_rule(folder: Path) -> Callable[[str], str]:
    """How to find the person in a case's name: ``subject_pattern`` of ``source.json``, else ``subject_of``.

    Raises:
        InputError: if the pattern is no regular expression with a group.
    """
    pattern, path = read_source_json(folder).get("subject_pattern"), folder / "source.json"
    if pattern is None:
        return subject_of
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"subject_pattern must be a regular expression, got {pattern!r} ({error}): {path}") from error
    if regex.groups < 1:
        raise InputError(
            f"subject_pattern must have a group that is the person, as in '^(\\d+)_', got {pattern!r}: {path}"
        )

    def subject(case_name: str) -> str:
        match = regex.search(case_name)
        return match.group(1) if match else subject_of(case_name)

    return subject


def subject_of(case_name: str) -> str:
    """The person or animal that a case's name states; the name itself where it follows no known pattern."""
    for pattern in _SUBJECT_PATTERNS:
        if match := pattern.search(case_name):
            return match.group(1)
    return case_name


def safe_name(text: str) -> str:
    """``text`` as a file name on every system; unchanged where it already is one.

    Other characters are replaced, and a short hash of the original keeps two such names apart ("a/b" and "a b").
    """
    text = unicodedata.normalize("NFC", text)
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text) and not text.endswith("."):
        return text
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")
    return f"{plain or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def without_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """A file's name without its image suffix."""
    name = path.name
    return next((name[: -len(s)] for s in suffixes if name.lower().endswith(s)), path.stem)


def image_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Image files directly in a folder, sorted, without hidden ones (macOS leaves such in archives); none where there
    is no folder.
    """
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in inside if p.is_file() and p.name.lower().endswith(suffixes) and p.name[0] != ".")


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []

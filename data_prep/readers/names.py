"""Names from files: safe case ids, and the subject behind a case."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from samed3d.volume import SUFFIXES

# Names by which widely used datasets mark several images of one person. Each has one group: the person.
_SUBJECT_PATTERNS = (
    re.compile(r"(?:^|_)(sub-[A-Za-z0-9]+)(?=_|$)"),  # BIDS: sub-01_ses-02_T1w
    re.compile(r"(?:^|_)(TCGA-\w{2}-\w{4})"),  # TCGA barcode: TCGA-DU-7294_1998.01.04
    re.compile(r"(?:^|_)(BraTS-[A-Za-z]+-\d{5})-\d{3}(?=_|$)"),  # BraTS from 2023: person-timepoint
    re.compile(r"(?:^|_)(patient\d+)_(?:frame|4d)"),  # ACDC: patient001_frame12
    re.compile(r"(?:^|_)(patient\d+)_(?:ES|ED)(?=_|$)"),  # CAMUS, and ACDC by phase
)


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


def subject_of(case_name: str) -> str:
    """The person or animal that a case's name points at; the name itself where it follows no known pattern."""
    for pattern in _SUBJECT_PATTERNS:
        if match := pattern.search(case_name):
            return match.group(1)
    return case_name


def without_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """A file's name without its image suffix."""
    name = path.name
    return next((name[: -len(s)] for s in suffixes if name.lower().endswith(s)), path.stem)


def image_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Image files directly in a folder, sorted; hidden files (as macOS leaves in archives) do not count. Empty where
    there is no folder.
    """
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(suffixes) and not p.name.startswith(".")
    )


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []

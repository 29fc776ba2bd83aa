"""What a segment is, as DICOM codes it: a category, a type, a side and a site, from the segment's name or its own code.

``dicom_codes.csv`` holds common anatomy and lesions of SNOMED CT with their synonyms. A name is looked up by its words
in any order, whole first, then without its side (``kidney_left``) and its number, then as a lesion of a site
(``liver tumour``).
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Code:
    """A concept of a coding scheme."""

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Coding:
    """The codes of a segment.

    Attributes:
        category: Such as "Anatomical Structure".
        kind: What it is; "Tissue" where nothing is known.
        side: "Left", "Right" or "Bilateral" where the name says so and ``kind`` does not.
        site: The organ of a lesion.
        interpreted: RT ROI Interpreted Type, empty where nothing is known.
    """

    category: Code
    kind: Code
    side: Code | None = None
    site: Code | None = None
    interpreted: str = ""


_CATEGORIES = {
    "Anatomical Structure": "91723000",
    "Tissue": "85756007",
    "Morphologically Abnormal Structure": "49755003",
    "Body Substance": "91720002",
    "Physical object": "260787004",
    "Spatial and Relational Concept": "309825002",
}
_SIDES = {
    **dict.fromkeys(("left", "lt", "l"), Code("SCT", "7771000", "Left")),
    **dict.fromkeys(("right", "rt", "r"), Code("SCT", "24028007", "Right")),
    **dict.fromkeys(("bilateral", "both"), Code("SCT", "51440002", "Bilateral")),
}
_UNKNOWN = Coding(Code("SCT", "85756007", "Tissue"), Code("SCT", "85756007", "Tissue"))
_INTERPRETED = {"228791009": "GTV", "228792002": "CTV", "228793007": "PTV", "38266002": "EXTERNAL"}
_OF_SITES = ("", "GTV", "CTV", "PTV")
_FILLERS = frozenset("the of in and mask seg segmentation label roi object structure predicted".split())


def coding_of(name: str, code: str = "") -> Coding:
    """The codes of a segment.

    Args:
        name: Of the segment, in any writing (``kidney_left``, ``LeftKidney``, ``lt. kidney``).
        code: Its type as SCHEME:VALUE:MEANING, if somebody stated one; side and site come from the name nevertheless.
    """
    words = _words(name)
    found = _looked_up(words) or _lesion_of_a_site(words) or _UNKNOWN
    if not code:
        return found
    kind = Code(*code.split(":", 2))
    known = next((row for row in _table().values() if row.kind.value == kind.value), found)
    return Coding(known.category, kind, found.side or _without_side(words)[1], found.site, found.interpreted)


@cache
def _table() -> dict[frozenset[str], Coding]:
    """The rows of ``dicom_codes.csv`` by the words of each of their names."""
    found: dict[frozenset[str], Coding] = {}
    with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            category = Code("SCT", _CATEGORIES[row["category"]], row["category"])
            organ = "ORGAN" if row["category"] in ("Anatomical Structure", "Tissue") else ""
            interpreted = _INTERPRETED.get(row["value"], organ)
            coding = Coding(category, Code("SCT", row["value"], row["meaning"]), interpreted=interpreted)
            for name in (row["meaning"], *row["synonyms"].split("|")):
                found.setdefault(frozenset(_words(name)), coding)
    found.pop(frozenset(), None)
    return found


def _words(name: str) -> list[str]:
    """The words of a name: lower case, singular, American spelling, without fillers."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.sub(r"[\W_]+", " ", spaced.lower()).split() if word not in _FILLERS]
    words = [re.sub("(?<=[a-z]{3})s$", "", word) for word in words]
    return [word.replace("oe", "e").replace("ae", "e").replace("our", "or") for word in words]


def _without_side(words: list[str]) -> tuple[list[str], Code | None]:
    """The words without the one that tells a side; a lone letter tells it at either end only."""
    for place, word in enumerate(words):
        if word in _SIDES and (len(word) > 1 or place in (0, len(words) - 1)):
            return words[:place] + words[place + 1 :], _SIDES[word]
    return words, None


def _looked_up(words: list[str]) -> Coding | None:
    """The row of a name, with its side unless the row itself tells it; numbers that no row knows are left out."""
    for known in (words, [word for word in words if not word.isdigit()]):
        rest, side = _without_side(known)
        for candidate, said in ((known, None), (rest, side)):
            if row := _table().get(frozenset(candidate)):
                return Coding(row.category, row.kind, said, interpreted=row.interpreted)
    return None


def _lesion_of_a_site(words: list[str]) -> Coding | None:
    """The longest lesion among the words, at the site that the other words name if they name one."""
    lesions = [(key, row) for key, row in _table().items() if row.interpreted in _OF_SITES and key <= set(words)]
    if not lesions:
        return None
    key, row = max(lesions, key=lambda lesion: len(lesion[0]))
    rest = [word for word in words if word not in key]
    site = _looked_up(rest)
    side = site.side if site else _without_side(rest)[1]
    return Coding(row.category, row.kind, side, site.kind if site else None, row.interpreted)

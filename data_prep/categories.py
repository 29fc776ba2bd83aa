"""One name per structure: ``kidney_right``, ``Right Kidney`` and ``rt. kidney`` are all "right kidney" (abdomen).

A name is split into side and rest, and the rest is looked up in ``categories.txt``. A name that is not in that table
keeps its own words and gets a group by words in it or, failing that, in the source's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GROUPS = (
    *("brain", "head and neck", "thorax", "heart", "vessel", "abdomen", "pelvis", "bone", "muscle", "lesion", "cell"),
    "other",
)
_SIDES = dict.fromkeys(("left", "lt", "l", "lh"), "left") | dict.fromkeys(("right", "rt", "r", "rh"), "right")
# Names that say where in something: the something is in the source's name.
_PLACES = (
    "",
    *("anterior", "posterior", "superior", "inferior", "body", "head", "tail", "core", "whole"),
    *("foreground", "mask", "target", "other"),
)


@dataclass(frozen=True)
class Category:
    """What a label is called everywhere."""

    name: str  # with the side in front, e.g. "right kidney"
    group: str  # one of ``GROUPS``
    side: str = ""  # or "left" or "right"
    paired: bool = False  # whether the body has one on each side and this name says neither


def categorise(name: str, context: str = "") -> Category:
    """The category of a label by its name in the source.

    ``context`` is the source's own name, for the group of a name that says nothing ("anterior" in "msd_hippocampus").
    """
    table, whole, source = _by_name(), _plain(name), _plain(context)
    if re.fullmatch(r"(label|structure|class|value|object|roi|) ?\d*", whole):
        whole = f"{source} {whole}".strip()  # a number means something only within its source
        return Category(whole or "unnamed", _group_by_words(whole) or "other")
    if whole in table and "*" not in table[whole][0]:
        return Category(*table[whole])
    side, rest = _side_of(whole)
    # Vertebrae and ribs go by number: "vertebra L4", "left rib 7".
    vertebra = r"(?:vertebrae?|vert) ?([ctls]) ?(\d{1,2})|([ctls]) ?(\d{1,2})(?: vertebrae?)"
    if found := re.fullmatch(vertebra, whole):
        return Category(f"vertebra {(found[1] or found[3]).upper()}{int(found[2] or found[4])}", "bone")
    if found := re.fullmatch(r"ribs? ?(\d{1,2})", rest):
        return Category(f"{side} rib {int(found[1])}".strip(), "bone", side)
    singular = re.sub(r"(?<=[a-z]{3})s$", "", rest)
    for form in (rest, singular):
        if form in table:
            category, group = table[form]
            bare = category.removesuffix("*")
            return Category(f"{side} {bare}".strip(), group, side, category != bare and not side)
    if rest in _PLACES:
        rest = f"{source} {rest}".strip()
    group = _group_by_words(rest) or _group_by_words(source) or "other"
    return Category(f"{side} {rest}".strip(), group, side)


@cache
def _sections() -> dict[str, list[tuple[str, str]]]:
    """The lines of each section of ``categories.txt``, before and after the colon."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in Path(__file__).with_name("categories.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            name, _, rest = line.partition(":")
            lines.append((name, rest.strip()))
    return found


@cache
def _by_name() -> dict[str, tuple[str, str]]:
    """Every listed name to (category with its star, group)."""
    listed = [(group, category, others) for group in GROUPS for category, others in _sections().get(group, ())]
    return {
        _plain(name): (category, group)
        for group, category, others in listed
        for name in (category.removesuffix("*"), *filter(None, others.split(",")))
    }


def _plain(name: str) -> str:
    """Lower case, single spaces, camel case taken apart, no punctuation."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    spaced = re.sub(r"[\W_]+", " ", spaced)
    return " ".join(spaced.lower().split())


def _side_of(plain: str) -> tuple[str, str]:
    """The side a name says, and the name without it; a lone letter counts only at an end ("kidney l", not "l 4")."""
    words = plain.split()
    for place in [i for i, w in enumerate(words) if w in ("left", "right")] + [len(words) - 1, 0]:
        word = words[place] if words else ""
        if word in _SIDES and len(words) > 1:
            return _SIDES[word], " ".join(words[:place] + words[place + 1 :])
    return "", plain


def _group_by_words(plain: str) -> str:
    return next((group for group, pattern in _sections()["words"] if re.search(rf"\b(?:{pattern})", plain)), "")


def modality_family(modality: str) -> str:
    """CT, MR, PET, ultrasound, microscopy ... of what a source says ("MR (T2, fat-suppressed)"); its own words where
    none fits.
    """
    families = (family for family, pattern in _sections()["modalities"] if re.search(pattern, modality.lower()))
    return next(families, modality or "not stated")

"""One name per structure: ``kidney_right``, ``Right Kidney`` and ``rt. kidney`` are all "right kidney" (abdomen).

A name is split into side and rest, and the rest is looked up in ``categories.txt``. A name that is not in that table
keeps its own words and gets a group by words in it or, failing that, in the source's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Words that tell the group of a name that is not in the table, in order: the first match decides.
_WORDS = (
    (
        "lesion",
        "tumou?r|lesion|sarcoma|metasta|cancer|carcinoma|glioma|nodule|cyst|polyp|infarct|stroke|ptv|gtv|ctv|plaque"
        "|aneurysm",
    ),
    ("cell", "cells?|nuclei|mitochondri|organoid|ovule|plantseg"),
    ("heart", "ventricular myocard|myocard|atri(um|al)|cardiac|heart|aortic valve"),
    ("vessel", "arter(y|ial|ies)|veins?|vena|venous|vessels?|aort|sinus of"),
    (
        "muscle",
        "muscle|musculus|gluteus|psoas|masseter|pterygoid|rectus|oblique|constrictor|scalenus|capitis|palatoglossus"
        "|buccinator",
    ),
    (
        "bone",
        "bone|vertebra|spine|skull|rib|costal|articular|spinosus|process|cartilage|menisc|knee|teeth|tooth|joint|disc",
    ),
    (
        "brain",
        "brain|cerebr|cerebell|cort(ex|ical)|gyrus|sulcus|lobule|thalam|hypothal|hippocamp|amygdal|putamen|pallid"
        "|caudate|capsule|callos|ventricle|matter|nucleus|nuclei|colliculus|pons|medulla|commissure|fornix|insula"
        "|hemisphere|midbrain|septum|crus|dentate|csf",
    ),
    ("head and neck", "nerve|gland|orbit|eye|larynx|pharynx|tongue|palat|uvula|nasal|sinus|ear|jaw|neck|head"),
    ("thorax", "lung|pulmon|bronch|pleura|chest|thora"),
    ("abdomen", "abdom|liver|hepat|renal|kidney|bowel|intestin|gastr|fat"),
    ("pelvis", "prostat|uter|bladder|pelvi|rect(um|al)|ovar|vagin|penis"),
)
_FAMILIES = (
    ("label map only", "label map|labels? only"),
    ("CT", r"\bct|computed tomography|cbct"),
    ("PET", r"\bpet|\bpt\b|fdg"),
    ("ultrasound", r"ultraso|\bus\b|\btrus\b"),
    ("microscopy", r"microscop|confocal|fluoresc|\bem\b"),
    ("MR", r"\bmr|magnetic|t1|t2|flair|dwi|adc|ssfp|swi|\bpd\b"),
)
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
    """What a label is called everywhere.

    Attributes:
        name: With the side in front, e.g. "right kidney".
        group: Anatomy group, one of ``GROUPS``.
        side: "left", "right" or empty.
        paired: Whether the body has one on each side and this name says neither.
    """

    name: str
    group: str
    side: str = ""
    paired: bool = False


def categorise(name: str, context: str = "") -> Category:
    """The category of a label.

    Args:
        name: As the source calls it.
        context: Name of the source, for the group of a name that says nothing ("anterior" in "msd_hippocampus").
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
def _by_name() -> dict[str, tuple[str, str]]:
    """Every name of ``categories.txt`` to (category with its star, group)."""
    found: dict[str, tuple[str, str]] = {}
    group = ""
    for line in Path(__file__).with_name("categories.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = line.strip("[]")
        elif line and not line.startswith("#"):
            category, _, others = line.partition(":")
            for name in [category.removesuffix("*"), *(o for o in others.split(",") if o)]:
                found[_plain(name)] = (category, group)
    return found


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
    return next((group for group, pattern in _WORDS if re.search(rf"\b(?:{pattern})", plain)), "")


def modality_family(modality: str) -> str:
    """CT, MR, PET, ultrasound, microscopy ... of what a source says ("MR (T2, fat-suppressed)"); its own words where
    none fits.
    """
    lower = modality.lower()
    return next((family for family, pattern in _FAMILIES if re.search(pattern, lower)), modality or "not stated")

"""One name per structure: ``kidney_right``, ``Right Kidney`` and ``rt. kidney`` are all "right kidney", in group
"abdomen".

A name is lowered and taken apart into side and rest; the rest is looked up in a table of categories and their other
names, and what the table does not know keeps its own words, with a group by telling words in the name or, failing that,
in the source's name. Nothing is ever merged that only sounds alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# Group -> categories; after a colon the other names it goes by (side and plural removed). A star marks what comes as a
# left and right pair.
_TABLE = {
    "brain": (
        "brain: whole brain, cerebrum",
        "brainstem: brain stem, truncus cerebri",
        "cerebellum",
        "cerebellum white matter: white matter of hemisphere of cerebellum",
        "cerebellum cortex",
        "white matter: cerebral white matter, wm, white matter of cerebral hemisphere",
        "gray matter: cerebral cortex, grey matter, gm, cortical gray matter, neocortex",
        "deep gray matter",
        "cerebrospinal fluid: csf, extra axial cerebrospinal fluid, external cerebrospinal fluid",
        "lateral ventricle*",
        "inferior lateral ventricle*: inf lat vent, temporal horn, temporal horn of lateral ventricle",
        "ventricle: ventricular system",
        "third ventricle: 3rd ventricle",
        "fourth ventricle: 4th ventricle",
        "hippocampus*: anterior hippocampus and posterior hippocampus",
        "amygdala*",
        "thalamus*: thalamus proper",
        "caudate*: caudate nucleus",
        "putamen*",
        "pallidum*: globus pallidus",
        "accumbens*: accumbens area, nucleus accumbens",
        "ventral diencephalon*: ventraldc, ventral dc",
        "caudate putamen*",
        "corpus callosum",
        "internal capsule*",
        "external capsule*",
        "optic chiasm: chiasm",
        "spinal cord: spinalcord, cord, medulla spinalis",
        "spinal canal",
        "pituitary: pituitary gland, hypophysis",
        "hypothalamus",
        "olfactory bulb*",
    ),
    "head and neck": (
        "eye*: eyeball, globe",
        "lens*: eye lens",
        "optic nerve*: opticnerve",
        "lacrimal gland*",
        "parotid*: parotid gland",
        "submandibular gland*: submandibular",
        "thyroid: thyroid gland",
        "larynx: glottis, supraglottic larynx",
        "pharynx",
        "oral cavity: oralcavity",
        "cochlea*",
        "face",
    ),
    "thorax": (
        "lung*",
        "lung upper lobe: superior lobe, upper lobe, lung superior lobe",
        "lung middle lobe: middle lobe",
        "lung lower lobe: inferior lobe, lower lobe, lung inferior lobe",
        "trachea",
        "airway: airways, bronchi, bronchial tree",
        "esophagus: oesophagus",
        "breast*",
        "thymus",
    ),
    "heart": (
        "heart: whole heart",
        "left ventricle: lv, lv cavity, left ventricle cavity, left ventricular cavity, heart left ventricle, heart ventricle left",
        "right ventricle: rv, rv cavity, right ventricle cavity, right ventricular cavity, heart right ventricle, heart ventricle right",
        "myocardium: myo, left ventricular myocardium, heart myocardium",
        "left atrium: la, heart left atrium, heart atrium left",
        "right atrium: ra, heart right atrium, heart atrium right",
        "pericardium",
    ),
    "vessel": (
        "aorta",
        "inferior vena cava: postcava, ivc, vena cava",
        "superior vena cava: svc",
        "portal vein and splenic vein: portal vein and splenic vein, portal and splenic vein",
        "portal vein",
        "hepatic vessel",
        "pulmonary artery",
        "pulmonary vein",
        "carotid artery*: common carotid artery, carotid",
        "subclavian artery*",
        "iliac artery*: common iliac artery, iliac artery",
        "iliac vein*: common iliac vein, iliac vena",
        "brachiocephalic trunk",
        "brachiocephalic vein*",
        "vessel: blood vessel, vasculature",
    ),
    "abdomen": (
        "liver: hepar",
        "spleen: lien",
        "kidney*: ren",
        "gallbladder: gall bladder",
        "stomach",
        "pancreas",
        "duodenum",
        "adrenal gland*: adrenal, suprarenal gland",
        "small bowel: small intestine, small bowels",
        "colon: large bowel, large intestine",
        "bowel: intestine, bowel bag",
        "torso fat: visceral fat",
        "subcutaneous fat",
        "body",
    ),
    "pelvis": (
        "bladder: urinary bladder, bladder urinary",
        "prostate: prostate gland, whole prostate",
        "prostate or uterus: prostate/uterus, prostate uterus",
        "peripheral zone: prostate peripheral zone, pz",
        "transition zone: prostate transition zone, transitional zone, tz, central gland",
        "uterus",
        "rectum",
        "seminal vesicle*",
        "ovary*",
    ),
    "bone": (
        "vertebra: vertebrae, vertebral body, vertebra corpus",
        "rib",
        "sternum",
        "clavicle*: clavicula",
        "scapula*",
        "humerus*",
        "femur*: femoral head, thigh bone",
        "tibia*",
        "fibula*",
        "patella*",
        "hip*: hip bone, pelvis bone",
        "sacrum: vertebra s1",
        "mandible: lower jaw, lower jawbone",
        "skull: cranium",
        "costal cartilage: costal cartilages",
        "femoral cartilage",
        "tibial cartilage",
        "intervertebral disc: disc, ivd",
    ),
    "muscle": (
        "autochthon*: autochthonous back muscle, erector spinae",
        "iliopsoas*: psoas, psoas muscle, iliopsoas muscle",
        "gluteus maximus*",
        "gluteus medius*",
        "gluteus minimus*",
        "skeletal muscle: muscle",
    ),
    "lesion": (
        "tumor: tumour, neoplasm, gross tumor volume, gtv, cancer",
        "lesion",
        "white matter lesion: wmh, white matter hyperintensity, ms lesion",
        "edema: oedema, peritumoral edema, peritumoural oedema",
        "enhancing tumor: enhancing tumour, et",
        "necrosis: necrotic core, necrosis / non enhancing tumour",
        "soft tissue sarcoma: soft tissue sarcoma gtv",
        "nodule: lung nodule",
        "cyst",
        "covid lesion: infection, covid",
        "hematoma: haematoma, hemorrhage, haemorrhage",
    ),
    "cell": ("cell", "nucleus: nuclei, cell nucleus", "mitochondrion: mitochondria"),
}

# Telling words for names that are not in the table, in order: the first match decides.
_WORDS = (
    (
        "lesion",
        "tumou?r|lesion|sarcoma|metasta|cancer|carcinoma|glioma|nodule|cyst|polyp|infarct|stroke|ptv|gtv|ctv|plaque|aneurysm",
    ),
    ("cell", "cells?|nuclei|mitochondri|organoid|ovule|plantseg"),
    ("heart", "ventricular myocard|myocard|atri(um|al)|cardiac|heart|aortic valve"),
    ("vessel", "arter(y|ial|ies)|veins?|vena|venous|vessels?|aort|sinus of"),
    (
        "muscle",
        "muscle|musculus|gluteus|psoas|masseter|pterygoid|rectus|oblique|constrictor|scalenus|capitis|palatoglossus|buccinator",
    ),
    (
        "bone",
        "bone|vertebra|spine|skull|rib|costal|articular|spinosus|process|cartilage|menisc|knee|teeth|tooth|joint|disc",
    ),
    (
        "brain",
        "brain|cerebr|cerebell|cort(ex|ical)|gyrus|sulcus|lobule|thalam|hypothal|hippocamp|amygdal|putamen|pallid|caudate|capsule|callos"
        "|ventricle|matter|nucleus|nuclei|colliculus|pons|medulla|commissure|fornix|insula|hemisphere|midbrain|septum|crus|dentate|csf",
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
GROUPS = (*_TABLE, "other")
_SIDES = {
    "left": "left",
    "lt": "left",
    "l": "left",
    "lh": "left",
    "right": "right",
    "rt": "right",
    "r": "right",
    "rh": "right",
}
# Names that say where in something: the something is in the source's name.
_PLACES = (
    "",
    "anterior",
    "posterior",
    "superior",
    "inferior",
    "body",
    "head",
    "tail",
    "core",
    "whole",
    "foreground",
    "mask",
    "target",
    "other",
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
    whole = _plain(name)
    if re.fullmatch(
        r"(label|structure|class|value|object|roi|) ?\d*", whole
    ):  # a number means something only within its source
        whole = f"{_plain(context)} {whole}".strip()
        return Category(whole or "unnamed", _group_by_words(whole) or "other")
    table = _by_name()
    if whole in table and "*" not in table[whole][0]:
        category, group = table[whole]
        return Category(category, group)
    if numbered := _numbered(whole):
        return numbered
    side, rest = _side_of(whole)
    for form in (rest, _singular(rest)):
        if form in table:
            category, group = table[form]
            bare = category.removesuffix("*")
            sided = f"{side} {bare}" if side else bare
            return Category(sided, group, side, category.endswith("*") and not side)
    if rest in _PLACES:
        rest = f"{_plain(context)} {rest}".strip()
    group = _group_by_words(rest) or _group_by_words(_plain(context)) or "other"
    return Category(f"{side} {rest}".strip(), group, side)


@cache
def _by_name() -> dict[str, tuple[str, str]]:
    """Every known name to (category with its star, group)."""
    found = {}
    for group, entries in _TABLE.items():
        for entry in entries:
            category, _, others = entry.partition(":")
            for alias in [category.removesuffix("*"), *(o for o in others.split(",") if o)]:
                found[_plain(alias)] = (category, group)
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


def _numbered(plain: str) -> Category | None:
    """Vertebrae and ribs, which go by number: "vertebra L4", "left rib 7"."""
    if found := re.fullmatch(r"(?:vertebrae?|vert) ?([ctls]) ?(\d{1,2})|([ctls]) ?(\d{1,2})(?: vertebrae?)", plain):
        letter, number = (found[1], found[2]) if found[1] else (found[3], found[4])
        return Category(f"vertebra {letter.upper()}{int(number)}", "bone")
    side, rest = _side_of(plain)
    if found := re.fullmatch(r"ribs? ?(\d{1,2})", rest):
        return Category(f"{side} rib {int(found[1])}".strip(), "bone", side)
    return None


def _singular(plain: str) -> str:
    return re.sub(r"(?<=[a-z]{3})s$", "", plain)


def _group_by_words(plain: str) -> str:
    return next((group for group, pattern in _WORDS if re.search(rf"\b(?:{pattern})", plain)), "")


def modality_family(modality: str) -> str:
    """CT, MR, PET, ultrasound, microscopy ... of what a source says ("MR (T2, fat-suppressed)"); its own words where
    none fits.
    """
    lower = modality.lower()
    return next((family for family, pattern in _FAMILIES if re.search(pattern, lower)), modality or "not stated")

"""The ``dataset.json`` of nnU-Net (version 1 and 2) and the Medical Segmentation Decathlon: labels, regions, channels,
lists of files.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import LabelLayer
from data_prep.readers.assembly import check_named, present_values
from samed3d.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelTable:
    """What the values of a label map mean.

    Attributes:
        structures: Name to the values it is made of; more than one value for a region of nnU-Net version 2.
        ignored: Values of voxels that nobody labelled ("ignore" in nnU-Net version 2).
    """

    structures: dict[str, frozenset[int]]
    ignored: frozenset[int] = frozenset()

    @property
    def has_regions(self) -> bool:
        """Whether some structure is made of several values."""
        return any(len(values) > 1 for values in self.structures.values())

    def layers(self, array: NDArray, label: str, *, open_ended: bool = False) -> list[LabelLayer]:
        """A label map as layers: itself where each value is one structure, else structures by regions, overlapping ones
        apart.

        Args:
            array: (D, H, W) unsigned integers.
            label: The label map, for messages.
            open_ended: Take values without a name as further objects (instance maps) instead of refusing them.

        Raises:
            InputError: if a value has no name, or nothing but ignored voxels is there.
        """
        values = present_values(array)
        named = frozenset[int]().union(*self.structures.values()) if self.structures else frozenset()
        if not open_ended:
            check_named(values, named | self.ignored, label, "dataset.json")
        if not set(values) - self.ignored:
            raise InputError(f"label is empty, nothing but ignored voxels: {label}; leave the case out")
        if not self.has_regions:
            names = {value: name for name, group in self.structures.items() for value in group}
            names = {value: names.get(value, f"object {value}") for value in values if value not in self.ignored}
            return [LabelLayer(_mapped(array, {value: 0 for value in self.ignored & set(values)}), names)]
        numbered = [(number, name, group) for number, (name, group) in enumerate(self.structures.items(), start=1)]
        layers = []
        for together in _disjoint(numbered):
            mapping = dict.fromkeys(values, 0) | {value: number for number, _, group in together for value in group}
            names = {number: name for number, name, group in together if group & set(values)}
            if names:
                layers.append(LabelLayer(_mapped(array, mapping), names))
        return layers


def _mapped(array: NDArray, mapping: dict[int, int]) -> NDArray:
    """Values replaced by a table; unchanged where there is nothing to replace."""
    if not mapping:
        return array
    if array.dtype.itemsize > 2:
        result = array.copy()
        for value, replacement in mapping.items():
            result[array == value] = replacement
        return result
    table = np.arange(np.iinfo(array.dtype).max + 1, dtype=array.dtype)
    for value, replacement in mapping.items():
        if value < table.size:
            table[value] = replacement
    result = np.empty_like(array)
    for plane, target in zip(array, result, strict=True):  # indexing makes a temporary of eight bytes per voxel
        target[...] = table[plane]
    return result


def _disjoint(numbered: list[tuple[int, str, frozenset[int]]]) -> list[list[tuple[int, str, frozenset[int]]]]:
    """Structures grouped so that none in a group shares a value with another."""
    groups: list[list[tuple[int, str, frozenset[int]]]] = []
    for entry in numbered:
        group = next((g for g in groups if all(not entry[2] & other[2] for other in g)), None)
        if group is None:
            groups.append([entry])
        else:
            group.append(entry)
    return groups


def label_table(about: dict[str, Any], path: Path) -> LabelTable:
    """The labels of a ``dataset.json``: ``{"1": "liver"}`` (version 1, Decathlon) or ``{"liver": 1, "tumour": [2, 3]}``
    (version 2).

    Raises:
        InputError: if there are none, they follow neither version, or two names share a value.
    """
    labels = about.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"dataset.json must name its labels, got {type(labels).__name__}: {path}")
    structures: dict[str, frozenset[int]] = {}
    ignored: frozenset[int] = frozenset()
    for key, entry in labels.items():
        name, values = (entry, key) if isinstance(entry, str) and str(key).isdigit() else (key, entry)
        try:
            group = frozenset(int(v) for v in (values if isinstance(values, list | tuple) else [values]))
        except (TypeError, ValueError) as error:
            raise InputError(f"labels must be value: name or name: value(s), got {key!r}: {entry!r}: {path}") from error
        if name.lower() == "background" or group == {0}:
            continue
        if not group or min(group) < 0:
            raise InputError(f"labels must have values from 1, got {key!r}: {entry!r}: {path}")
        if name.lower() == "ignore":
            ignored = group
            continue
        while name in structures:  # version 1 may name two values alike
            name = f"{name} {min(group)}"
        structures[name] = group - {0}
    single = [value for group in structures.values() if len(group) == 1 for value in group]
    if twice := sorted({value for value in single if single.count(value) > 1}):
        raise InputError(f"labels must not share a value, got {twice[0]} for two names: {path}")
    return LabelTable(structures, ignored)


def channel_names(about: dict[str, Any]) -> list[str]:
    """Names of the channels in order: ``channel_names`` of version 2, ``modality`` of version 1; empty where neither is
    a table.
    """
    for key in ("channel_names", "modality"):
        table = about.get(key)
        if isinstance(table, dict) and all(str(k).isdigit() for k in table):
            return [str(table[k]) for k in sorted(table, key=int)]
    return []


def stated_modality(about: dict[str, Any]) -> str:
    """The modality that a ``dataset.json`` states as a word, else its channels in one line."""
    modality = about.get("modality")
    return modality if isinstance(modality, str) else ", ".join(channel_names(about))

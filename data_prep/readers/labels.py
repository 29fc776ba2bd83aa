"""Label maps as layers of named structures: what their values mean, and structures that overlap kept apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import LabelLayer
from data_prep.readers.facts import read_json, read_source_json
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, bounding_region
from samed3d.volume.label_maps import EmptyLabelError


@dataclass(frozen=True)
class LabelTable:
    """What the values of a label map mean."""

    structures: dict[str, frozenset[int]] = field(default_factory=dict)  # several values: a region of nnU-Net version 2
    ignored: frozenset[int] = frozenset()  # voxels that nobody labelled ("ignore" in nnU-Net version 2)
    where: str = "dataset.json"  # the file that names the values, for messages
    unnamed: str = ""  # what values without a name are called, before their number; empty to refuse them

    def layers(self, array: NDArray, label: str) -> list[LabelLayer]:
        """A label map as layers: itself where each value is one structure, else regions, overlapping ones apart.

        Raises:
            InputError: if a value has no name and ``unnamed`` is empty, or nothing but ignored voxels is there.
        """
        values = set(present_values(array))
        named = frozenset[int]().union(*self.structures.values(), self.ignored)
        if values - named and not self.unnamed:
            raise InputError(
                f"label holds values that {self.where} does not name: {_listed(values - named)}: {label}; "
                "add them to its labels"
            )
        if not values - self.ignored:
            raise InputError(f"label is empty, nothing but ignored voxels: {label}; leave the case out")
        if all(len(group) == 1 for group in self.structures.values()):
            names = {value: name for name, group in self.structures.items() for value in group}
            names = {value: names.get(value, f"{self.unnamed} {value}") for value in sorted(values - self.ignored)}
            return [LabelLayer(_mapped(array, dict.fromkeys(self.ignored & values, 0)), names)]
        numbered = [(number, name, group) for number, (name, group) in enumerate(self.structures.items(), start=1)]
        layers = []
        for together in _disjoint(numbered):
            mapping = dict.fromkeys(values, 0) | {value: number for number, _, group in together for value in group}
            names = {number: name for number, name, group in together if group & values}
            if names:
                layers.append(LabelLayer(_mapped(array, mapping), names))
        return layers


def table_of_dataset_json(about: dict[str, Any], path: Path) -> LabelTable:
    """The labels of a ``dataset.json``: ``{"1": "liver"}`` (nnU-Net 1, Decathlon) or ``{"liver": 1, "tumour": [2, 3]}``
    (nnU-Net 2).

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
    instances = {**about, **read_source_json(path.parent)}.get("label_kind") == "instance"
    return LabelTable(structures, ignored, unnamed="object" if instances else "")


def label_table(extra: dict[str, str]) -> LabelTable:
    """The label values of a case: named by its ``dataset_json``, or by ``labels`` (name to value) of its
    ``source_json``, both paths in ``RawCase.extra``, or numbered where neither names any.

    Raises:
        InputError: if the labels are not a table of names and values.
    """
    if "dataset_json" in extra:
        path = Path(extra["dataset_json"])
        return table_of_dataset_json(read_json(path), path)
    path = Path(extra.get("source_json", ""))
    labels = read_source_json(path.parent).get("labels", {}) if "source_json" in extra else {}
    if not isinstance(labels, dict) or not all(isinstance(value, int) and value > 0 for value in labels.values()):
        raise InputError(f'labels must be a table of name to value, as in {{"liver": 1}}, got {labels!r}: {path}')
    structures = {str(name): frozenset([value]) for name, value in labels.items()}
    return LabelTable(structures, where="source.json", unnamed="" if structures else "label")


def single_structure(array: NDArray, label: str) -> NDArray[np.bool_]:
    """A label map that must hold one structure, as a mask.

    Raises:
        InputError: if it holds several values beside 0.
    """
    values = present_values(array)
    if len(values) > 1:
        raise InputError(f"label of one structure must hold one value beside 0, got {_listed(values)}: {label}")
    return array != 0


def pack_layers(masks: Iterable[tuple[str, NDArray[np.bool_]]], shape_zyx: IntTriple, source: str) -> list[LabelLayer]:
    """Masks as label layers: each goes into the first layer where it overlaps nothing. Holds one mask at a time beside
    the layers. Each of ``masks`` has a name and ``shape_zyx``; a name that comes twice is one structure.

    Raises:
        EmptyLabelError: if there is no voxel in any of them.
    """
    layers: list[LabelLayer] = []
    value_of: dict[str, int] = {}
    for name, mask in masks:
        box = bounding_region(mask).slices
        voxels = mask[box]
        if not voxels.size:
            continue
        value = value_of.setdefault(name, len(value_of) + 1)
        for layer in layers:
            held = layer.array[box][voxels]
            if not ((held != 0) & (held != value)).any():
                break
        else:
            layer = LabelLayer(np.zeros(shape_zyx, np.uint8), {})
            layers.append(layer)
        if value > np.iinfo(layer.array.dtype).max:
            layer.array = layer.array.astype(np.uint16)
        np.copyto(layer.array[box], value, where=voxels, casting="unsafe")
        layer.names[value] = name
    if not layers:
        raise EmptyLabelError(f"label is empty, no structure has a voxel; leave the case out: {source}")
    return layers


def present_values(array: NDArray) -> list[int]:
    """The values in an integer label map, ascending, without 0; slice by slice, so that no large temporary is made."""
    found: set[int] = set()
    for plane in array:
        if array.dtype.itemsize <= 2:
            found.update(np.flatnonzero(np.bincount(plane.reshape(-1))).tolist())
        else:
            found.update(np.unique(plane).tolist())
    return sorted(found - {0})


def _mapped(array: NDArray, mapping: dict[int, int]) -> NDArray:
    """Values replaced by a table; the array itself where there is nothing to replace."""
    if not mapping:
        return array
    result = array.copy()
    if array.dtype.itemsize > 2:
        for value, replacement in mapping.items():
            result[array == value] = replacement
        return result
    table = np.arange(np.iinfo(array.dtype).max + 1, dtype=array.dtype)
    for value, replacement in mapping.items():
        if value < table.size:
            table[value] = replacement
    for plane in result:  # indexing makes a temporary of eight bytes per voxel
        plane[...] = table[plane]
    return result


def _disjoint(numbered: list[tuple[int, str, frozenset[int]]]) -> list[list[tuple[int, str, frozenset[int]]]]:
    """Structures grouped so that none in a group shares a value with another."""
    groups: list[list[tuple[int, str, frozenset[int]]]] = []
    for entry in numbered:
        for group in groups:
            if all(not entry[2] & other[2] for other in group):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _listed(values: Iterable[int]) -> str:
    first, more = sorted(values)[:8], len(set(values)) - 8
    return ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")

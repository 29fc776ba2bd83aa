"""One case from its files: images on one grid, labels brought onto it or refused. The base of all readers of files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import LabelLayer, RawArrays, RawCase, Reader, SourceFacts
from data_prep.readers.facts import facts_of, safe_name
from data_prep.readers.labels import LabelTable, label_table, pack_layers, single_structure
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.output import check_input
from samed3d.volume import Volume, read_volume
from samed3d.volume.files import count_volumes
from samed3d.volume.label_maps import (
    EmptyLabelError,
    grid_difference,
    read_label_map,
    read_label_on,
    same_axes,
    segment_names,
)

logger = logging.getLogger(__name__)

Named = Iterable[tuple[str, str]]
"""(channel or structure, path) of each file; a label map of several structures has no name."""


class FileReader(Reader):
    """A layout whose cases are image files and label files, which are loaded alike whatever the layout."""

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``."""
        return facts_of(folder, self.name)

    def case(self, facts: SourceFacts, name: str, subject: str, images: Named, labels: Named, **more: Any) -> RawCase:
        """A case of the data set; its modality is that of the data set unless ``more`` has another."""
        about: dict[str, Any] = {"modality": facts.modality, "split": None, "reader": self.name, **more}
        return RawCase(safe_name(name), facts.name, subject, images=tuple(images), labels=tuple(labels), **about)

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The channels of a case, and its label map or its files of one structure each; empty structures are left out.

        Raises:
            InputError: if a file cannot be used, grids differ, a value has no name, or nothing is labelled.
        """
        images = read_images(case.images, case.modality, repair_geometry=repair_geometry)
        if [name for name, _ in case.labels] == [""]:
            path = case.labels[0][1]
            layers, grid = _layers(path, images[0][1] if images else None, repair_geometry, label_table(case.extra))
            return RawArrays(images, grid, layers)
        image = images[0][1]
        more = f" and {len(case.labels) - 1} more" if len(case.labels) > 1 else ""
        masks = _structures(case.labels, image, repair=repair_geometry)
        layers = pack_layers(masks, image.grid.shape_zyx, f"{case.labels[0][1]}{more}")
        return RawArrays(images, image.grid, layers)


def read_images(
    named: Sequence[tuple[str, str]], modality: str = "", *, repair_geometry: bool = False
) -> list[tuple[str, Volume]]:
    """The channels of one case by name; one without a name is called ``modality``.

    Channels with one path are the volumes of one 4D file. ``repair_geometry`` gives a channel of the same size the
    first one's grid where their headers differ.

    Raises:
        InputError: if a channel cannot be read, a file holds another number of volumes, or the grids differ.
    """
    paths = [path for _, path in named]
    images: list[tuple[str, Volume]] = []
    for position, (name, path) in enumerate(named):
        wanted = paths.count(path)
        _check_volumes(path, wanted)
        volume = read_volume(path, channel=paths[:position].count(path) if wanted > 1 else None)
        images.append((name or modality, _on_grid_of(images[0][1], volume, repair_geometry) if images else volume))
    return images


def _check_volumes(path: str, wanted: int) -> None:
    check_input(path, "image", folder=False)
    volumes = count_volumes(path)
    if volumes != wanted == 1:
        raise InputError(
            f"image must be 3D, got 4D with {volumes} volumes: {path}; save each as its own file (CASE_0000), "
            "or use --format msd with a dataset.json that names each modality"
        )
    if volumes != wanted:
        raise InputError(f"image must hold one volume per modality of dataset.json ({wanted}), got {volumes}: {path}")


def _on_grid_of(first: Volume, volume: Volume, repair: bool) -> Volume:
    """A channel whose grid is the first one's, or takes it if it may be repaired."""
    difference = grid_difference(first.grid, volume.grid)
    if not difference:
        return volume
    repairable = first.grid.shape_zyx == volume.grid.shape_zyx and same_axes(first.grid, volume.grid)
    if not (repair and repairable):
        remedy = "resample it, or give --repair-geometry" if repairable else "resample it"
        raise InputError(f"channels must share one grid: {difference}: {first.source} and {volume.source}; {remedy}")
    logger.warning("%s takes the grid of %s", volume.source, first.source)
    return replace(volume, grid=first.grid)


def _read_label(path: str, image: Volume | None, repair: bool, layer: int | None = None) -> tuple[NDArray, Grid]:
    if image is None:
        return read_label_map(path, layer)
    mismatch: Literal["repair", "refuse"] = "repair" if repair else "refuse"
    return read_label_on(path, image.grid, image.source, mismatch=mismatch, layer=layer), image.grid


def _layers(path: str, image: Volume | None, repair: bool, table: LabelTable) -> tuple[list[LabelLayer], Grid]:
    """The layers of a label map, named by ``table``, and its grid; a 3D Slicer segmentation has layers and names."""
    segments = segment_names(path)
    if not segments:
        array, grid = _read_label(path, image, repair)
        return table.layers(array, path), grid
    found: list[LabelLayer] = []
    for layer, names in enumerate(segments):
        values = {name: frozenset(v for v, other in names.items() if other == name) for name in names.values()}
        try:
            array, grid = _read_label(path, image, repair, layer)
        except EmptyLabelError:
            continue
        found += LabelTable(values, where="the segmentation").layers(array, path)
    if not found:
        raise EmptyLabelError(f"label is empty, no segment has a voxel: {path}; leave the case out")
    return found, grid


def _structures(
    labels: Sequence[tuple[str, str]], image: Volume, *, repair: bool
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The masks of files that hold one structure each, one at a time; empty ones are left out."""
    for name, path in labels:
        try:
            array, _ = _read_label(path, image, repair)
        except EmptyLabelError:
            continue
        yield name, single_structure(array, path)

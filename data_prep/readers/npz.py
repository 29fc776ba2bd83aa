"""The npz files of the CVPR 2025 challenge for interactive 3D segmentation: ``imgs``, ``gts`` and ``spacing`` of one
case per file.

Files carry no position and no names of their labels. ``spacing`` is taken as x, y, z, as the challenge's preparation
wrote it from SimpleITK; for files written otherwise, ``source.json`` may say ``"spacing_order": "zyx"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import FileReader
from data_prep.readers.facts import (
    common_modality,
    facts_of,
    image_files,
    modality_of_name,
    read_source_json,
    subject_rule,
)
from data_prep.readers.labels import label_table
from samed3d.data.challenge_npz import members, read_case
from samed3d.geometry import Grid, as_triple
from samed3d.volume import Volume

_SUFFIX = (".npz",)


class NpzReader(FileReader):
    """Challenge npz files; see the module."""

    name = "npz"
    looks_for = "*.npz with imgs and gts (CVPR 2025)"

    def recognises(self, folder: Path) -> bool:
        """Whether the folder's first npz file has ``imgs``."""
        files = image_files(folder, _SUFFIX)
        return bool(files) and "imgs" in members(files[0])

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``; the modality where all file names share it."""
        kinds = {modality_of_name(path.name) for path in image_files(folder, _SUFFIX)}
        return facts_of(folder, self.name, modality=common_modality(kinds))

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """Every npz file with an image and labels; files that hold only the one or the other are problems."""
        facts, person, source_json = self.source(folder), subject_rule(folder), folder / "source.json"
        extra = {"source_json": str(source_json)} if source_json.is_file() else {}
        for path in image_files(folder, _SUFFIX):
            found = members(path)
            if {"imgs", "gts"} <= found:
                modality = modality_of_name(path.name) or facts.modality
                images = [(modality, str(path))]
                yield self.case(facts, path.stem, person(path.stem), images, (), modality=modality, extra=extra)
                continue
            reason = "label has no image: imgs is missing" if "gts" in found else "image has no label: gts is missing"
            yield Problem(str(path), reason if found else "not a readable npz file")

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """Image and labels of a file; values without a name are numbered.

        Raises:
            InputError: as ``read_case``.
        """
        [(modality, path)] = case.images
        image, labels, spacing = read_case(Path(path))
        if read_source_json(Path(path).parent).get("spacing_order") == "zyx":
            spacing = as_triple(spacing[::-1])
        grid = Grid((image.shape[0], image.shape[1], image.shape[2]), spacing)
        layers = replace(label_table(case.extra), unnamed="label").layers(labels, path)
        return RawArrays([(modality, Volume(image, grid, path))], grid, layers)

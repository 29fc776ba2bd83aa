"""Medical Segmentation Decathlon: ``dataset.json`` lists image and label of each case, and several modalities are one
4D image.

nnU-Net's version 1 has the same ``dataset.json``, but a channel number in its file names: a list whose first image
exists under the listed name is the Decathlon's.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import read_label_on
from data_prep.readers.dataset_json import channel_names, label_table, stated_modality
from data_prep.readers.facts import facts_of, read_json, subject_rule
from data_prep.readers.names import image_files, safe_name, without_suffix
from samed3d.errors import InputError
from samed3d.volume import read_volume
from samed3d.volume.label_maps import count_volumes


class MsdReader:
    """Tasks of the Decathlon; see the module."""

    name = "msd"
    looks_for = "dataset.json that lists its files in training (Decathlon)"

    def recognises(self, folder: Path) -> bool:
        """Whether ``dataset.json`` lists cases whose image has the listed name."""
        try:
            training = read_json(folder / "dataset.json").get("training")
        except InputError:
            return False
        if not isinstance(training, list):
            return False
        listed = [folder / e["image"] for e in training if isinstance(e, dict) and isinstance(e.get("image"), str)]
        return any(path.is_file() for path in listed)

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``dataset.json`` and ``source.json``."""
        about = read_json(folder / "dataset.json")
        return facts_of(folder, self.name, about, modality=stated_modality(about))

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every entry of ``training``, and of ``validation`` as in AMOS; ``test`` has no labels.

        Raises:
            InputError: if ``dataset.json`` is damaged or names no labels.
        """
        path = folder / "dataset.json"
        about = read_json(path)
        label_table(about, path)
        facts, person = self.source(folder), subject_rule(folder)
        cases: dict[str, RawCase] = {}
        problems = []
        listed: set[Path] = set()
        for entry in [*about["training"], *about.get("validation", ())]:
            if not (
                isinstance(entry, dict) and isinstance(entry.get("image"), str) and isinstance(entry.get("label"), str)
            ):
                problems.append(Problem(str(path), f"training entry must name image and label, got {entry!r}"))
                continue
            image, label = folder / entry["image"], folder / entry["label"]
            listed |= {image.resolve(), label.resolve()}
            name = without_suffix(image)
            case_id = safe_name(name)
            absent = [p for p in (image, label) if not p.is_file()]
            if absent:
                problems.append(Problem(str(absent[0]), "listed in dataset.json but not there"))
                continue
            if case_id in cases:
                problems.append(
                    Problem(str(image), f"two cases have the id {case_id}; this one is left out, rename it")
                )
                continue
            paths = {"image": str(image), "label": str(label), "dataset_json": str(path)}
            cases[case_id] = RawCase(case_id, facts.name, person(name), facts.modality, None, self.name, paths)
        for part, what in (("imagesTr", "image"), ("labelsTr", "label")):
            spare = [p for p in image_files(folder / part) if p.resolve() not in listed]
            problems += [Problem(str(p), f"{what} is not listed in dataset.json") for p in spare]
        return list(cases.values()), problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The modalities of a case, one 3D image each, and its label.

        Raises:
            InputError: if a file cannot be used, grids differ, a label value is not in ``dataset.json``, or the image
                does not hold as many volumes as ``dataset.json`` names modalities.
        """
        path = Path(case.paths["dataset_json"])
        about = read_json(path)
        table, names = label_table(about, path), channel_names(about) or [case.modality or "image"]
        image = case.paths["image"]
        volumes = count_volumes(image)
        if volumes != len(names):
            raise InputError(
                f"image must hold one volume per modality of dataset.json ({len(names)}), got {volumes}: {image}"
            )
        images = [(name, read_volume(image, channel=n if volumes > 1 else None)) for n, name in enumerate(names)]
        grid = images[0][1].grid
        array = read_label_on(grid, case.paths["label"], image, repair_geometry=repair_geometry)
        return RawArrays(images, grid, table.layers(array, case.paths["label"]))

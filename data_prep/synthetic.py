"""Generated cases as a source like any other: listed by number, loaded by making them. Same seed, same corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.cases import LabelLayer, Problem, RawArrays, RawCase, Reader, SourceFacts
from data_prep.readers import find_sources, load_case
from samed3d.data.synthesis import GENERATED_KINDS, generated_case
from samed3d.errors import InputError, check_choice
from samed3d.geometry import CanonicalView, Grid, as_triple
from samed3d.resample import resize_labels, target_shape
from samed3d.volume import Volume

NAME = "synthetic"


@dataclass(frozen=True)
class SyntheticReader(Reader):
    """Generated cases. Case ``i`` depends on the seed and ``i`` alone: a larger count adds cases and changes none."""

    kind: str = "shapes"  # one of ``GENERATED_KINDS``
    count: int = 100
    seed: int = 0
    size: int = 128  # edge of random shapes in voxels, and the longest side of label maps
    label_maps: list[Path] = field(default_factory=list)  # sources (any layout) of kind "labelmaps"
    name: str = NAME

    def __post_init__(self) -> None:
        check_choice("--kind", self.kind, GENERATED_KINDS)
        if (self.kind == "labelmaps") != bool(self.label_maps):
            raise InputError(
                f"--label-maps must be given with --kind labelmaps and with no other, got --kind {self.kind}"
            )

    def source(self, folder: Path) -> SourceFacts:
        """A source of its own for every kind and seed."""
        name = f"{NAME}_{self.kind}_{self.seed}"
        licence = "as the label maps" if self.label_maps else "generated, no terms"
        return SourceFacts(
            name, NAME, "generated", licence, "unclear" if self.label_maps else "ok", "samed3d prepare synthetic"
        )

    def entries(self, folder: Path) -> Iterator[RawCase | Problem]:
        """As many as were asked for. A painted label map keeps its subject, so that splits keep people apart here as
        well.
        """
        source = self.source(folder).name
        found = find_sources(self.label_maps) if self.label_maps else []
        maps = [case for reader, place in found for case in reader.cases(place)[0]]
        if self.label_maps and not maps:
            raise InputError(
                f"--label-maps must hold labelled cases, got none in {', '.join(map(str, self.label_maps))}"
            )
        for number in range(self.count):
            extra = {"kind": self.kind, "seed": f"{self.seed} {number}", "size": str(self.size)}
            case = RawCase(f"{self.kind}_{number:06d}", source, f"{source}_{number:06d}", "generated", None, NAME)
            if maps:
                chosen = maps[int(np.random.default_rng([self.seed, number, 1]).integers(len(maps)))]
                extra |= {**chosen.extra, "painted": chosen.reader}
                case = replace(case, subject=chosen.subject, images=chosen.images, labels=chosen.labels)
            yield replace(case, extra=extra)

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """Make the case that ``cases`` described."""
        size = int(case.extra["size"])
        seed = [int(n) for n in case.extra["seed"].split()]
        if "painted" in case.extra:
            real = load_case(replace(case, reader=case.extra["painted"]), repair_geometry=repair_geometry)
            return _painted(case.id, real, seed, size)
        image, labels, grid, names = generated_case(case.extra["kind"], seed, (size, size, size))
        return RawArrays([("generated", Volume(image, grid, case.id))], grid, [LabelLayer(labels, names)])


def _painted(name: str, real: RawArrays, seed: list[int], size: int) -> RawArrays:
    """A generated image of a real label map."""
    view = CanonicalView.of(real.grid)
    shape = target_shape(view.shape_zyx, view.spacing_zyx_mm, None, size)
    spacing = as_triple([s * n / m for s, n, m in zip(view.spacing_zyx_mm, view.shape_zyx, shape, strict=True)])
    layer = real.layers[0]
    given = resize_labels(np.ascontiguousarray(view.to_canonical(layer.array)), shape)
    values = np.unique(given[given > 0])  # as 1, 2, 3 ...: painting counts in 16 bits
    image, labels, unit, _ = generated_case(
        "labelmaps", seed, shape, np.searchsorted(values, given, side="left") + (given > 0)
    )
    names = {number: layer.names.get(int(value), f"label_{value}") for number, value in enumerate(values, start=1)}
    grid = Grid(unit.shape_zyx, (spacing[2], spacing[1], spacing[0]), direction_lps=unit.direction_lps)
    return RawArrays([("generated", Volume(image, grid, name))], grid, [LabelLayer(labels, names)])

"""Overview of a corpus: tables of its contents, and a page with pictures of every category.

Each picture shows image and mask through a voxel of the structure, so that a wrong name, a shifted mask or a swapped
side is seen. Template: ``samed3d/templates/overview.html``.
"""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_prep.categories import GROUPS, modality_family
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.drawing import OBJECT_COLOURS, PLANES, Plane, SlicePicture, grey_range
from samed3d.errors import InputError
from samed3d.output import write_text
from samed3d.pages import Table, render

if TYPE_CHECKING:
    from PIL import Image

_PIXELS = 150
_MARGIN = 0.6
_MIN_MARGIN_MM = 10.0


def show(folder: Path, examples: int, *, quiet: bool = False) -> None:
    """Print the tables of a corpus and write its page, ``overview.html`` (none for 0 examples)."""
    from rich.console import Console
    from rich.table import Table as ConsoleTable

    corpus = Corpus(folder)
    count = write_page(corpus, folder / "overview.html", examples) if examples else 0
    console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 140)
    for section in summarise(corpus):
        console.print(section.title, style="bold", highlight=False)
        table = ConsoleTable(*section.head, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in section.rows:
            table.add_row(*map(str, row))
        console.print(table, "")
    if examples:
        console.print(f"{count} categories with pictures in {folder / 'overview.html'}")


def summarise(corpus: Corpus) -> list[Table]:
    """The tables: totals, by modality, by anatomy, by source, most frequent categories, dropped masks, problems."""
    cases, labels = corpus.case_table, corpus.label_table
    stored, kept = cases.where(stored="1"), labels.where(kept="1")
    images = stored.where(has_image="1")
    counts = corpus.about["counts"]
    total = [
        ("volumes", len(images)),
        ("label maps without image", len(stored) - len(images)),
        ("masks", len(kept)),
        ("masks dropped", len(labels) - len(kept)),
        ("categories", len(set(kept["category"].tolist()))),
        ("modalities", len({modality_family(m) for m in images["modality"].tolist()})),
        ("subjects", counts["subjects"]),
        ("sources", len(corpus.sources)),
        ("duplicate images", counts["duplicate_images"]),
        ("inputs refused", counts["problems"]),
        ("warnings", counts.get("warnings", 0)),
    ]
    family = [modality_family(m) for m in stored["modality"].tolist()]
    mask_family = [modality_family(m) for m in kept["modality"].tolist()]
    sections = [
        Table(("", "count"), [(name, f"{value:,}") for name, value in total], "corpus"),
        Table(("split", "volumes", "masks"), _counted(stored["split"].tolist(), kept["split"].tolist()), "split"),
        Table(("modality", "volumes", "masks"), _counted(family, mask_family), "modality"),
        _by_anatomy(kept["anatomy"].tolist(), kept["category"].tolist(), kept["case"].tolist()),
        _by_source(corpus),
    ]
    frequent = Counter(kept["category"].tolist()).most_common(15)
    sections.append(Table(("category", "masks"), [(n, f"{m:,}") for n, m in frequent], "most frequent categories"))
    dropped = Counter(kind_of_reason(r) for r in labels.where(kept="0")["reason"].tolist()).most_common()
    if dropped:
        rows = [(reason, f"{n:,}") for reason, n in dropped]
        sections.append(Table(("reason", "masks"), rows, "dropped masks (labels.csv has each)"))
    pairs = zip(cases["id"].tolist(), cases["duplicate_of"].tolist(), strict=True)
    if twins := [(image, first) for image, first in pairs if first]:
        sections.append(Table(("image", "same as"), twins, "same image twice (kept on one side of the split)"))
    return sections


def kind_of_reason(reason: str) -> str:
    """A reason without the case's own numbers: the rule that was not met."""
    measured, _, limit = reason.replace(" over ", " under ").partition(" under ")
    kinds = {
        " voxels": "fewer voxels than",
        " mm3": "volume in mm3 under",
        "side ": "side in mm under",
        "background": "background in % over",
    }
    return next(
        (f"{kind} {limit}" for word, kind in kinds.items() if limit and word in measured),
        "value without a name in its source",
    )


def write_page(corpus: Corpus, path: Path, examples: int = 2) -> int:
    """Write the HTML page.

    Args:
        corpus: What to show.
        path: File to write.
        examples: Pictures per category, from different sources where there are.

    Returns:
        The number of categories shown.
    """
    found = _examples(corpus, examples)
    masks = Counter(corpus.label_table.where(kept="1")["category"].tolist())
    group_of = dict(zip(corpus.label_table["category"].tolist(), corpus.label_table["anatomy"].tolist(), strict=True))
    groups = []
    for group in GROUPS:
        categories = [
            {
                "name": name,
                "masks": f"{masks[name]:,} masks; {', '.join(sorted({case.source for case, _ in found[name]}))}",
                "pictures": [_picture(corpus, case, label) for case, label in found[name]],
            }
            for name in sorted(name for name in found if group_of[name] == group)
        ]
        if categories:
            groups.append((group, categories))
    write_text(path, render("overview.html", title=corpus.folder.name, tables=summarise(corpus), groups=groups))
    return len(found)


def _counted(volumes: list[str], masks: list[str]) -> list[tuple[str, ...]]:
    by_volume, by_mask = Counter(volumes), Counter(masks)
    names = sorted(set(by_volume) | set(by_mask), key=lambda n: (-by_mask[n], n))
    return [(name, f"{by_volume[name]:,}", f"{by_mask[name]:,}") for name in names]


def _by_anatomy(groups: list[str], categories: list[str], cases: list[str]) -> Table:
    held: dict[str, tuple[Counter[str], set[str]]] = defaultdict(lambda: (Counter(), set()))
    for group, category, case in zip(groups, categories, cases, strict=True):
        held[group][0][category] += 1
        held[group][1].add(case)
    order = [g for g in GROUPS if g in held]
    rows = [(g, f"{len(held[g][0]):,}", f"{sum(held[g][0].values()):,}", f"{len(held[g][1]):,}") for g in order]
    return Table(("group", "categories", "masks", "cases"), rows, "anatomy")


def _by_source(corpus: Corpus) -> Table:
    stored = Counter(corpus.case_table.where(stored="1")["source"].tolist())
    kept = Counter(corpus.label_table.where(kept="1")["source"].tolist())
    dropped = Counter(corpus.label_table.where(kept="0")["source"].tolist())
    rows: list[tuple[str, ...]] = []
    for name, facts in sorted(corpus.sources.items()):
        licence = facts["licence"] or "not stated"
        flag = "" if facts["licence_flag"] == "ok" else " (unclear)"
        numbers = (f"{stored[name]:,}", f"{kept[name]:,}", f"{dropped[name]:,}")
        rows.append((name, *numbers, facts["modality"][:32], licence[:40] + flag))
    return Table(("source", "volumes", "masks", "dropped", "modality", "licence"), rows, "source")


def _examples(corpus: Corpus, count: int) -> dict[str, list[tuple[CaseRecord, LabelRecord]]]:
    """Category to a few structures: with image first, then of middling size, one per source before any second."""
    held: dict[str, list[tuple[CaseRecord, LabelRecord]]] = defaultdict(list)
    for case in corpus.cases:
        if not case.channel or case.channel.endswith("_0000"):
            for label in case.labels:
                held[label.category].append((case, label))
    chosen = {}
    for category, entries in held.items():
        sizes = np.log([label.voxels * float(np.prod(case.spacing_zyx_mm)) for case, label in entries])
        far = np.abs(sizes - np.median(sizes))
        order = sorted(range(len(entries)), key=lambda n: (not entries[n][0].has_image, far[n]))
        of_source: dict[str, list[int]] = defaultdict(list)
        for n in order:
            of_source[entries[n][0].source].append(n)
        turn = {n: number for numbers in of_source.values() for number, n in enumerate(numbers)}
        chosen[category] = [entries[n] for n in sorted(order, key=lambda n: turn[n])[:count]]
    return chosen


def _picture(corpus: Corpus, case: CaseRecord, label: LabelRecord) -> dict[str, str]:
    """An axial and a coronal plane through the structure as ``jpeg_base64``; a damaged array as ``note``."""
    from PIL import Image

    assert label.points is not None
    points = label.points.astype(np.int64)
    voxel = points[int(np.argmin(np.abs(points - points.mean(axis=0)).sum(axis=1)))]
    strip, file = Image.new("RGB", (2 * _PIXELS, _PIXELS)), io.BytesIO()
    try:
        for number, plane in enumerate(PLANES[:2]):
            strip.paste(_slice(corpus, case, label, plane, voxel), (number * _PIXELS, 0))
    except InputError as error:
        return {"note": str(error)}
    strip.save(file, "JPEG", quality=80)
    return {"title": f"{case.id}: {label.name}", "jpeg_base64": base64.b64encode(file.getvalue()).decode()}


def _slice(corpus: Corpus, case: CaseRecord, label: LabelRecord, plane: Plane, voxel: NDArray) -> Image.Image:
    """A square picture of the structure and its surroundings in one plane; only these voxels are read."""
    axes = [plane.down, plane.across]
    start, stop = (np.array(ends)[axes] for ends in (label.region.start_zyx, label.region.stop_zyx))
    spacing, shape = np.array(case.spacing_zyx_mm)[axes], np.array(case.shape_zyx)[axes]
    margin = np.ceil(np.maximum(_MARGIN * (stop - start), _MIN_MARGIN_MM / spacing)).astype(int)
    low, high = np.maximum(start - margin, 0), np.minimum(stop + margin, shape)
    index: list[slice] = [slice(int(v), int(v) + 1) for v in voxel]
    for axis, first, last in zip(axes, low, high, strict=True):
        index[axis] = slice(int(first), int(last))
    labels = corpus.labels(case, label.layer)[tuple(index)].squeeze(plane.normal)
    values = corpus.image(case)[tuple(index)].squeeze(plane.normal) if case.has_image else _shaded(labels)
    mask = labels == label.value
    half = max((high - low) * spacing) / spacing / 2  # a square around what was read
    shown = ((high - low) / 2 - half, (high - low) / 2 + half)
    pixels_per_mm = _PIXELS / float(max((high - low) * spacing))
    picture = SlicePicture(values, spacing, pixels_per_mm, grey_range(values, values[mask]), shown)
    picture.outline(mask, OBJECT_COLOURS[0], tint=0.2)
    return picture.finish()


def _shaded(labels: NDArray) -> NDArray[np.float32]:
    """Grey values that tell neighbouring labels apart, for a label map without image."""
    return np.where(labels > 0, 60.0 + labels.astype(np.int64) * 37 % 120, 0.0).astype(np.float32)

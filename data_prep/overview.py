"""Overview of a corpus: tables of its contents, and a page with pictures of every category.

Each picture shows image and mask through a voxel of the structure, so that a wrong name, a shifted mask or a swapped
side is seen. Template: ``samed3d/templates/overview.html``.
"""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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

    corpus = Corpus(folder)
    count = write_page(corpus, folder / "overview.html", examples) if examples else 0
    console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 140)
    for section in summarise(corpus):
        console.print(section.title, style="bold", highlight=False)
        console.print(section.as_text(), end="\n\n", highlight=False, markup=False)
    if examples:
        console.print(f"{count} categories with pictures in {folder / 'overview.html'}")


def summarise(corpus: Corpus) -> list[Table]:
    """The tables: totals, by modality, by anatomy, by source, most frequent categories, dropped masks, problems."""
    cases, labels = corpus.case_table, corpus.label_table
    stored, kept = cases.where(stored="1"), labels.where(kept="1")
    images = stored.where(has_image="1")
    counts, both = corpus.about["counts"], {"volumes": stored, "masks": kept}
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
    pairs = (set(zip(kept["anatomy"], kept[name], strict=True)) for name in ("category", "case"))
    in_categories, in_cases = ([group for group, _ in found] for found in pairs)
    sections = [
        Table(("", "count"), [(name, f"{value:,}") for name, value in total], "corpus"),
        _tally("split", "split", {"volumes": stored["split"], "masks": kept["split"]}),
        _tally("modality", "modality", {head: map(modality_family, t["modality"]) for head, t in both.items()}),
        _tally("anatomy", "group", {"categories": in_categories, "masks": kept["anatomy"], "cases": in_cases}, GROUPS),
        _by_source(corpus),
        _tally("most frequent categories", "category", {"masks": kept["category"]}, most=15),
    ]
    if dropped := [kind_of_reason(reason) for reason in labels.where(kept="0")["reason"]]:
        sections.append(_tally("dropped masks (labels.csv has each)", "reason", {"masks": dropped}))
    if twins := [pair for pair in zip(cases["id"], cases["duplicate_of"], strict=True) if pair[1]]:
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
    """Write the HTML page, with so many pictures per category, from different sources where there are.

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


def _tally(
    title: str, word: str, columns: Mapping[str, Iterable[str]], order: Sequence[str] = (), most: int | None = None
) -> Table:
    """How often each column holds each name: in a given ``order``, or the most frequent of the last column first."""
    counts = {head: Counter(names) for head, names in columns.items()}
    last = list(counts.values())[-1]
    names = sorted(set().union(*counts.values()), key=lambda n: (order.index(n) if order else -last[n], n))
    return Table((word, *counts), [(n, *(f"{c[n]:,}" for c in counts.values())) for n in names[:most]], title)


def _by_source(corpus: Corpus) -> Table:
    kept, dropped = (corpus.label_table.where(kept=flag) for flag in ("1", "0"))
    counts = [Counter(table["source"]) for table in (corpus.case_table.where(stored="1"), kept, dropped)]
    rows: list[tuple[str, ...]] = []
    for name, facts in sorted(corpus.sources.items()):
        licence = facts["licence"] or "not stated"
        flag = "" if facts["licence_flag"] == "ok" else " (unclear)"
        rows.append((name, *(f"{c[name]:,}" for c in counts), facts["modality"][:32], licence[:40] + flag))
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

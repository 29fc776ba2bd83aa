"""What is in a corpus, for people: the table that a paper would print, and a page with pictures of every category.

The page is one HTML file with its pictures inside; each shows image and mask through a voxel of the structure, so that
a wrong name, a shifted mask or a swapped side catches the eye. Reads a corpus, changes nothing in it but the page.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.categories import GROUPS, modality_family
from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.errors import InputError
from samed3d.output import write_text

_PIXELS = 150
_MARGIN = 0.6
_MIN_MARGIN_MM = 10.0
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; background: #16181c; color: #dde }
h1, h2 { font-weight: 600 }
table { border-collapse: collapse; margin: 0 24px 16px 0; display: inline-table; vertical-align: top }
td, th { padding: 2px 12px 2px 0; text-align: right; border-bottom: 1px solid #333 }
td:first-child, th:first-child, caption { text-align: left }
caption { font-weight: 600; padding: 8px 0 }
.card { display: inline-block; vertical-align: top; margin: 0 14px 14px 0; max-width: 640px }
.card b { display: block }
.card small { color: #99a }
img { margin: 3px 3px 0 0; background: #000 }
"""


@dataclass(frozen=True)
class Section:
    """One table: title, column names, rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def show(folder: Path, examples: int, *, quiet: bool = False) -> None:
    """Print the tables of a corpus and write its page, ``overview.html`` (none for 0 examples)."""
    from rich.console import Console
    from rich.table import Table

    corpus = Corpus(folder)
    count = write_page(corpus, folder / "overview.html", examples) if examples else 0
    console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 140)
    for section in summarise(corpus):
        console.print(section.title, style="bold", highlight=False)
        table = Table(*section.columns, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in section.rows:
            table.add_row(*row)
        console.print(table, "")
    if examples:
        console.print(f"{count} categories with pictures in {folder / 'overview.html'}")


def summarise(corpus: Corpus) -> list[Section]:
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
    ]
    family = [modality_family(m) for m in stored["modality"].tolist()]
    mask_family = [modality_family(m) for m in kept["modality"].tolist()]
    sections = [
        Section("corpus", ("", "count"), [(name, f"{value:,}") for name, value in total]),
        Section("split", ("split", "volumes", "masks"), _counted(stored["split"].tolist(), kept["split"].tolist())),
        Section("modality", ("modality", "volumes", "masks"), _counted(family, mask_family)),
        _by_anatomy(kept["anatomy"].tolist(), kept["category"].tolist(), kept["case"].tolist()),
        _by_source(corpus),
    ]
    frequent = Counter(kept["category"].tolist()).most_common(15)
    sections.append(
        Section("most frequent categories", ("category", "masks"), [(name, f"{n:,}") for name, n in frequent])
    )
    dropped = Counter(kind_of_reason(r) for r in labels.where(kept="0")["reason"].tolist()).most_common()
    if dropped:
        sections.append(
            Section(
                "dropped masks (labels.csv has each)",
                ("reason", "masks"),
                [(reason, f"{n:,}") for reason, n in dropped],
            )
        )
    twins = [
        (row, first) for row, first in zip(cases["id"].tolist(), cases["duplicate_of"].tolist(), strict=True) if first
    ]
    if twins:
        sections.append(Section("same image twice (kept on one side of the split)", ("image", "same as"), twins))
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
    parts = [f"<!doctype html><meta charset=utf-8><title>{_safe(corpus.folder.name)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{_safe(corpus.folder.name)}</h1>")
    parts += [_html_table(section) for section in summarise(corpus)]
    for group in GROUPS:
        names = sorted(name for name in found if group_of[name] == group)
        if names:
            parts.append(f"<h2>{_safe(group)} <small>({len(names)} categories)</small></h2>")
        for name in names:
            pictures = "".join(_picture(corpus, case, label) for case, label in found[name])
            sources = ", ".join(sorted({case.source for case, _ in found[name]}))
            parts.append(
                f"<div class=card><b>{_safe(name)}</b><small>{masks[name]:,} masks; {_safe(sources)}</small><br>{pictures}</div>"
            )
    write_text(path, "\n".join(parts) + "\n")
    return len(found)


def _counted(volumes: list[str], masks: list[str]) -> list[tuple[str, ...]]:
    by_volume, by_mask = Counter(volumes), Counter(masks)
    names = sorted(set(by_volume) | set(by_mask), key=lambda n: (-by_mask[n], n))
    return [(name, f"{by_volume[name]:,}", f"{by_mask[name]:,}") for name in names]


def _by_anatomy(groups: list[str], categories: list[str], cases: list[str]) -> Section:
    held: dict[str, tuple[Counter[str], set[str]]] = defaultdict(lambda: (Counter(), set()))
    for group, category, case in zip(groups, categories, cases, strict=True):
        held[group][0][category] += 1
        held[group][1].add(case)
    order = [g for g in GROUPS if g in held]
    rows = [(g, f"{len(held[g][0]):,}", f"{sum(held[g][0].values()):,}", f"{len(held[g][1]):,}") for g in order]
    return Section("anatomy", ("group", "categories", "masks", "cases"), rows)


def _by_source(corpus: Corpus) -> Section:
    stored = Counter(corpus.case_table.where(stored="1")["source"].tolist())
    kept = Counter(corpus.label_table.where(kept="1")["source"].tolist())
    dropped = Counter(corpus.label_table.where(kept="0")["source"].tolist())
    rows: list[tuple[str, ...]] = []
    for name, facts in sorted(corpus.sources.items()):
        licence = facts["licence"] or "not stated"
        flag = "" if facts["licence_flag"] == "ok" else " (unclear)"
        numbers = (f"{stored[name]:,}", f"{kept[name]:,}", f"{dropped[name]:,}")
        rows.append((name, *numbers, facts["modality"][:32], licence[:40] + flag))
    return Section("source", ("source", "volumes", "masks", "dropped", "modality", "licence"), rows)


def _examples(corpus: Corpus, count: int) -> dict[str, list[tuple[CaseRecord, LabelRecord]]]:
    """Category to a few structures of middling size, with image before without, one per source first."""
    held: dict[str, list[tuple[CaseRecord, LabelRecord]]] = defaultdict(list)
    for case in corpus.cases:
        if not case.channel or case.channel.endswith("_0000"):
            for label in case.labels:
                held[label.category].append((case, label))
    return {category: _middling(entries)[:count] for category, entries in held.items()}


def _middling(entries: list[tuple[CaseRecord, LabelRecord]]) -> list[tuple[CaseRecord, LabelRecord]]:
    """Those of middling size first, with image before without, and one of each source before any second."""
    sizes = np.log([label.voxels * float(np.prod(case.spacing_zyx_mm)) for case, label in entries])
    far = np.abs(sizes - np.median(sizes))
    order = sorted(range(len(entries)), key=lambda n: (not entries[n][0].has_image, far[n]))
    seen: Counter[str] = Counter()
    turn = {}
    for n in order:
        turn[n] = seen[entries[n][0].source]
        seen[entries[n][0].source] += 1
    return [entries[n] for n in sorted(order, key=lambda n: turn[n])]


def _picture(corpus: Corpus, case: CaseRecord, label: LabelRecord) -> str:
    """An axial and a coronal plane through the structure, as an HTML image; a damaged array as a note."""
    assert label.points is not None
    points = label.points.astype(np.int64)
    voxel = points[int(np.argmin(np.abs(points - points.mean(axis=0)).sum(axis=1)))]
    try:
        views = [_view(corpus, case, label, axis, voxel) for axis in (0, 1)]
    except InputError as error:
        return f"<small>{_safe(str(error))}</small>"
    strip = np.concatenate(views, axis=1)
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(strip).save(file, "JPEG", quality=80)
    text = base64.b64encode(file.getvalue()).decode()
    return f'<img title="{_safe(case.id)}: {_safe(label.name)}" src="data:image/jpeg;base64,{text}">'


def _view(corpus: Corpus, case: CaseRecord, label: LabelRecord, axis: int, voxel: NDArray) -> NDArray[np.uint8]:
    """(pixels, pixels, 3): the plane across ``axis`` around the structure, seen from the feet or the front (right is on
    the left).
    """
    from PIL import Image

    index: list[slice] = []
    extents = []
    for a in range(3):
        start, stop, spacing = label.region.start_zyx[a], label.region.stop_zyx[a], case.spacing_zyx_mm[a]
        margin = int(np.ceil(max(_MARGIN * (stop - start), _MIN_MARGIN_MM / spacing if a != axis else 0)))
        low, high = max(0, start - margin), min(case.shape_zyx[a], stop + margin)
        index.append(slice(int(voxel[a]), int(voxel[a]) + 1) if a == axis else slice(low, high))
        if a != axis:
            extents.append((high - low) * spacing)
    labels = corpus.labels(case, label.layer)[tuple(index)].squeeze(axis)
    plane = corpus.image(case)[tuple(index)].squeeze(axis).astype(np.float32) if case.has_image else _shaded(labels)
    low, high = np.percentile(plane, (1, 99))
    grey = np.clip((plane - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    scale = _PIXELS / max(extents)
    size = (max(1, round(extents[1] * scale)), max(1, round(extents[0] * scale)))
    # Canonical axes run to the right, the front and the head; radiologists look from the feet and from the front.
    turned = [np.ascontiguousarray(a[::-1, ::-1]) for a in (grey, (labels == label.value).astype(np.uint8))]
    picture = np.asarray(Image.fromarray(turned[0]).resize(size, Image.Resampling.BILINEAR))
    mask = np.asarray(Image.fromarray(turned[1]).resize(size, Image.Resampling.NEAREST)).astype(bool)
    colour = np.repeat(picture[..., None], 3, axis=2)
    colour[mask] = (0.8 * colour[mask] + 0.2 * np.array([255, 140, 0])).astype(np.uint8)
    colour[mask & ~_eroded(mask)] = (255, 140, 0)
    canvas = np.zeros((_PIXELS, _PIXELS, 3), np.uint8)
    top, left = (_PIXELS - size[1]) // 2, (_PIXELS - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = colour
    return canvas


def _shaded(labels: NDArray) -> NDArray[np.float32]:
    """Grey values that tell neighbouring labels apart, for a label map without image."""
    return np.where(labels > 0, 60.0 + labels.astype(np.int64) * 37 % 120, 0.0).astype(np.float32)


def _eroded(mask: NDArray) -> NDArray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & mask


def _html_table(section: Section) -> str:
    head = "".join(f"<th>{_safe(c)}</th>" for c in section.columns)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
    return f"<table><caption>{_safe(section.title)}</caption><tr>{head}</tr>{body}</table>"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)

"""``samed3d evaluate``: the click loop on whole volumes at their native grid, no ground truth in the crop, no best-of-clicks.

First click uniform in the structure, each next one at the centre of the largest error component of the full mask. Every click of every
structure is a row of ``cases.csv``; ``results.json`` holds means with bootstrap intervals over subjects. Read ``clicks.py`` for the rules.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES, RegionGrowing
from samed3d.evaluation.cases import LabelledCase, Split, find_cases
from samed3d.evaluation.clicking import Clickable, click_through
from samed3d.inference.session import Session
from samed3d.models import load
from samed3d.models.base import PromptableModel
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)

FIELDS = tuple("model group source case subject modality label name voxels seed click dice obeyed seconds".split())
MIN_VOXELS = 100
BOOTSTRAP = 1000


def evaluate(
    data: list[Path],
    models: list[str],
    out: Path,
    *,
    clicks: tuple[int, ...] = (1, 3, 5),
    seeds: int = 1,
    split: str = "val",
    limit: int | None = None,
    labels_per_case: int | None = None,
    progress: bool = False,
) -> Path:
    """Measure models on labelled volumes.

    Args:
        data: nnU-Net folders, or folders of them.
        models: Checkpoint names or files, or baselines (``"region_growing"``).
        out: Folder for ``results.json`` and ``cases.csv``; must not hold results yet.
        clicks: Click counts to report.
        seeds: Repetitions with other clicks.
        split: ``"val"``, ``"train"`` or ``"all"``; the split is the one stored in the first checkpoint that has one.
        limit: Cases per source.
        labels_per_case: Structures per case, drawn with the seed; None takes all.
        progress: Show a progress bar.

    Returns:
        ``out``.

    Raises:
        InputError: if nothing can be measured, or ``out`` already holds results.
    """
    if (out / "cases.csv").exists():
        raise InputError(f"output folder already holds results: {out}; choose another")
    networks: dict[str, PromptableModel | None] = {name: None if name in BASELINES else load(name) for name in models}
    kept_from = _split_of(models)
    cases = find_cases(data, kept_from, split, limit)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    partial = out / "cases.csv.part"
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for case in _shown(cases, progress):
            fresh = _measure_case(case, networks, max(clicks), seeds, labels_per_case)
            writer.writerows(fresh)
            file.flush()
            rows += fresh
    os.replace(partial, out / "cases.csv")
    settings = {"models": models, "clicks": clicks, "seeds": seeds, "split": split, "limit": limit, "labels_per_case": labels_per_case}
    body = {
        "settings": settings | {"kept_from": asdict(kept_from)},
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()},
        "summary": summarise(rows, clicks),
    }
    (out / "results.json").write_text(json.dumps(body, indent=1))
    return out


def _measure_case(
    case: LabelledCase, networks: dict[str, PromptableModel | None], clicks: int, seeds: int, labels_per_case: int | None
) -> list[dict[str, Any]]:
    try:
        volume, labels = case.read()
    except EmptyLabelError as error:
        logger.warning("passed over %s: %s", case.case, error)
        return []
    counts = {int(v): int(n) for v, n in zip(*np.unique(labels, return_counts=True), strict=True) if v != 0 and n >= MIN_VOXELS}
    values = sorted(counts)
    if labels_per_case is not None and len(values) > labels_per_case:
        values = sorted(int(v) for v in np.random.default_rng(0).permutation(values)[:labels_per_case])
    about = {"group": case.group, "source": case.source, "case": case.case, "subject": case.subject, "modality": case.modality}
    rows = []
    for name, network in networks.items():
        subject: Clickable = RegionGrowing(volume) if network is None else Session(volume, network)
        for number, value in enumerate(values):
            target = labels == value
            structure = {"label": value, "name": case.names.get(value, ""), "voxels": counts[value]}
            for seed in range(seeds):
                rng = np.random.default_rng([seed, number])
                clicked = click_through(subject, volume, target, clicks, rng, object_id=1 + seed + seeds * number)
                rows += [{"model": name, **about, **structure, "seed": seed, **row} for row in clicked]
    return rows


def summarise(rows: list[dict[str, Any]], clicks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Mean Dice per model, group and click, and per source; with 95 % bootstrap intervals over subjects, structures weighted equally."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        for key in ("group", "source"):
            for value in sorted({r[key] for r in mine}):
                for click in clicks:
                    chosen = [r for r in mine if r[key] == value and r["click"] == click]
                    if chosen:
                        lines.append({"model": model, "by": key, "value": value, "click": click, **_mean_with_interval(chosen)})
    return lines


def _mean_with_interval(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_subject: dict[str, list[float]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row["dice"])
    sums = np.array([[sum(v), len(v)] for v in by_subject.values()])
    draws = np.random.default_rng(0).integers(len(sums), size=(BOOTSTRAP, len(sums)))
    means = sums[draws].sum(axis=1)
    low, high = np.percentile(means[:, 0] / means[:, 1], [2.5, 97.5])
    return {
        "dice": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "subjects": len(sums),
        "measurements": int(sums[:, 1].sum()),
        "obeyed": round(float(np.mean([r["obeyed"] for r in rows])), 4),
        "median_seconds": round(float(np.median([r["seconds"] for r in rows])), 3),
    }


def _split_of(models: list[str]) -> Split:
    """The split stored in the first checkpoint that was trained by this project; the default split where there is none."""
    for name in models:
        path = find_checkpoint(name)
        stored = read_header(path).get("training", {}).get("data") if path else None
        if stored:
            return Split(stored["validation_share"], stored["split_seed"], tuple(stored["hold_out"]))
    return Split()


def _shown(cases: list[LabelledCase], progress: bool) -> Iterable[LabelledCase]:
    if not progress:
        return cases
    from rich.progress import track

    return track(cases, description="measuring")

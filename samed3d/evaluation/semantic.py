"""How good an automatic model is: Dice, surface Dice and HD95 of each class, on whole volumes at their native grid.

Rows have the columns of ``rows.py`` (protocol ``automatic``, no clicks), one per case and class that the source labels,
so that reports and comparisons read them as they read clicked ones. The windows are in ``inference/sliding_window.py``;
read that next.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, Split, find_cases
from samed3d.evaluation.results import CASES_CSV, RESULTS_JSON, Row, write_rows
from samed3d.evaluation.statistics import mean_with_interval
from samed3d.inference.sliding_window import OVERLAP, segment_volume
from samed3d.metrics import dice, surface_scores, volume_error
from samed3d.models import load
from samed3d.models.base import SemanticModel
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.output import write_json
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)

PROTOCOL = "automatic"
CategoryOf = Callable[[str, str], str]


def automatic_rows(
    case: LabelledCase,
    model: SemanticModel,
    model_name: str,
    *,
    tolerance_mm: float = 2.0,
    device: torch.device | str = "cpu",
    overlap: float = OVERLAP,
    category_of: CategoryOf | None = None,
) -> list[Row]:
    """Measure a model on one case.

    Args:
        case: What is measured; one image per case.
        model: In any mode.
        model_name: For the rows.
        tolerance_mm: Of the surface Dice.
        device: Where the model runs.
        overlap: Of the windows.
        category_of: From a source's label name and the source's name to the category that training used, for a model of
            several sources.

    Returns:
        A row per class that the source labels: nan where a class is in neither mask, the rules of ``metrics`` where it
        is in one. Empty where the case is unlabelled or the model knows none of its labels.
    """
    try:
        loaded = case.loaded()
    except EmptyLabelError as error:
        logger.warning("passed over %s: %s", case.case, error)
        return []
    values = class_values(case, tuple(model.config["class_names"]), category_of)
    if not values:
        logger.warning("passed over %s: %s labels none of the classes", case.case, case.source)
        return []
    began = time.perf_counter()
    predicted = segment_volume(loaded.volume, model, device=device, overlap=overlap)
    seconds = round(time.perf_counter() - began, 4)
    spacing = loaded.volume.grid.spacing_zyx_mm
    about: Row = {
        "model": model_name,
        "protocol": PROTOCOL,
        "group": case.group,
        "source": case.source,
        "case": case.case,
    }
    about |= {
        "subject": case.subject,
        "modality": case.modality,
        "seed": 0,
        "policy": "none",
        "prompt": "none",
        "click": 0,
    }
    rows = []
    for number, theirs in values.items():
        mask, truth = predicted == number, np.isin(loaded.labels, theirs)
        voxels = int(np.count_nonzero(truth))
        row: Row = about | {"label": theirs[0], "name": case.names[theirs[0]], "voxels": voxels}
        row |= {
            "volume_ml": round(voxels * float(np.prod(spacing)) / 1000, 4),
            "dice": round(dice(mask, truth), 5),
            "seconds": seconds,
        }
        row |= {key: round(value, 5) for key, value in surface_scores(mask, truth, spacing, tolerance_mm).items()}
        rows.append(row | {"volume_error": round(volume_error(mask, truth), 5) if voxels else None})
    return rows


def class_values(
    case: LabelledCase, classes: tuple[str, ...], category_of: CategoryOf | None = None
) -> dict[int, list[int]]:
    """Which label values of a case belong to each class number, by name, or by category where no name fits."""
    numbers = {name.casefold(): number for number, name in enumerate(classes, start=1)}
    found: dict[int, list[int]] = {}
    for value, name in sorted(case.names.items()):
        number = numbers.get(name.casefold())
        if number is None and category_of is not None:
            number = numbers.get(category_of(name, case.source).casefold())
        if number is not None and value:
            found.setdefault(number, []).append(value)
    return found


def evaluate_automatic(
    data: Sequence[Path],
    model_name: str,
    out: Path,
    *,
    split: str = "val",
    limit: int | None = None,
    tolerance_mm: float = 2.0,
    device: torch.device | str = "cpu",
    overlap: float = OVERLAP,
    category_of: CategoryOf | None = None,
) -> Path:
    """Measure an automatic model's weights file on labelled volumes.

    Args:
        data: As ``find_cases``.
        model_name: A weights file.
        out: Folder for ``cases.csv`` and ``results.json``; must not hold results yet.
        split: Side of the split that the file itself was trained with.
        limit: Cases per source.
        tolerance_mm: See ``automatic_rows``.
        device: See ``automatic_rows``.
        overlap: See ``automatic_rows``.
        category_of: See ``automatic_rows``.

    Returns:
        ``out``.

    Raises:
        InputError: if the model needs prompts, nothing can be measured, or ``out`` already holds results.
    """
    if (out / CASES_CSV).exists():
        raise InputError(f"output folder already holds results: {out}; choose another")
    model: Any = load(model_name)
    if not isinstance(model, SemanticModel):
        raise InputError(
            f"model must be an automatic one for the protocol {PROTOCOL}, got {model_name!r}, which needs prompts"
        )
    path = find_checkpoint(model_name)
    stored = read_header(path).get("training", {}).get("data") if path else None
    kept_from = (
        Split(stored["validation_share"], stored["split_seed"], tuple(stored["hold_out"])) if stored else Split()
    )
    rows: list[Row] = []
    for case in find_cases(list(data), kept_from, split, limit):
        options: dict[str, Any] = {
            "tolerance_mm": tolerance_mm,
            "device": device,
            "overlap": overlap,
            "category_of": category_of,
        }
        rows += automatic_rows(case, model, model_name, **options)
    if not rows:
        classes = ", ".join(model.config["class_names"])
        raise InputError(
            f"no case in {', '.join(map(str, data))} labels a class of {model_name} ({classes}); give data that do"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / CASES_CSV, rows)
    settings = {
        "data": [str(d) for d in data],
        "model": model_name,
        "split": split,
        "limit": limit,
        "tolerance_mm": tolerance_mm,
    }
    body = {"settings": settings | {"protocol": PROTOCOL, "overlap": overlap}, "summary": summarise_classes(rows)}
    write_json(out / RESULTS_JSON, body)
    return out


def summarise_classes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means per model, source and class with 95 % bootstrap intervals over subjects; a class in neither mask is in no
    mean.
    """
    summary = []
    for key in dict.fromkeys((row["model"], row["source"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["source"], row["name"]) == key]
        line: dict[str, Any] = dict(zip(("model", "source", "name"), key, strict=True))
        for metric in ("dice", "nsd", "hd95_mm"):
            found = mean_with_interval([row[metric] for row in mine], [row["subject"] for row in mine])
            line[metric] = _or_none(found.mean)
            line[f"{metric}_interval"] = [_or_none(found.low), _or_none(found.high)]
            line |= {"subjects": found.subjects, "measurements": found.measurements}
        summary.append(line)
    return summary


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)

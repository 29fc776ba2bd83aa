"""``curves.svg`` of a run folder: loss, Dice by turn and validation Dice by click over the steps, from
``metrics.jsonl``.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from samed3d.errors import InputError
from samed3d.output import write_text
from samed3d.pages import SERIES_COLOURS, chart, svg_of

logger = logging.getLogger(__name__)


def write_curves(folder: Path) -> Path | None:
    """Draw ``metrics.jsonl``; returns the file, or None where there is nothing to draw or matplotlib is missing.

    Args:
        folder: A run folder.
    """
    rows = read_metrics(folder)
    trained, validated = ([row for row in rows if key in row] for key in ("loss", "validation_dice"))
    if not trained:
        return None
    panels = [("loss", [{**row, "loss": [row["loss"]]} for row in trained], "loss", "")]
    panels.append(("Dice on training crops", trained, "dice", "turn"))
    if validated:
        panels.append(("Dice on held-out volumes", validated, "validation_dice", "click"))
    try:
        with chart(900, 310 * len(panels), left=70, right=150) as (figure, axes):
            axes.remove()
            figure.subplots_adjust(left=0.08, right=0.84, hspace=0.3)
            for panel, contents in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
                _draw(panel, *contents)
            path = folder / "curves.svg"
            write_text(path, svg_of(figure))
    except InputError as error:
        logger.warning("no curves.svg: %s", error)
        return None
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; none where it is missing."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _draw(panel: Any, title: str, rows: list[dict[str, Any]], key: str, word: str) -> None:
    """One line for each number that ``key`` holds: of each turn, or of each click."""
    for i in range(max(len(row[key]) for row in rows)):
        points = [(row["step"], row[key][i]) for row in rows if len(row[key]) > i and math.isfinite(row[key][i])]
        colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
        panel.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, label=f"{word} {i + 1}" if word else title
        )
    panel.set(title=title, xlabel="step")
    if word:
        panel.set_ylim(0, 1)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))

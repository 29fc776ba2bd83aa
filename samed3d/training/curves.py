"""``curves.svg`` of a run folder: loss, Dice by turn and validation Dice by click over the steps, drawn from
``metrics.jsonl``.

Plain SVG, which every browser shows; needs nothing. Read ``progress.py`` for what the file holds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from samed3d.training.checkpoints import write_text

Line = tuple[str, list[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, TOP, GAP = 900, 240, 70, 40, 70
COLOURS = ("#1b6ac9", "#d1495b", "#2e8b57", "#b8860b", "#7b4ea3", "#007f8c", "#8c564b", "#555555")


def write_curves(folder: Path) -> Path | None:
    """Draw ``metrics.jsonl``; returns the file, or None where there is nothing to draw.

    Args:
        folder: A run folder.
    """
    rows = read_metrics(folder)
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return None
    panels: list[tuple[str, list[Line]]] = [("loss", [("loss", [(r["step"], r["loss"]) for r in trained])])]
    panels.append(("Dice on training crops", _by_number(trained, "dice", "turn")))
    if validated := [row for row in rows if "validation_dice" in row]:
        panels.append(("Dice on held-back volumes", _by_number(validated, "validation_dice", "click")))
    last = max(row["step"] for row in rows)
    body = "".join(_panel(title, lines, index, last) for index, (title, lines) in enumerate(panels))
    height = len(panels) * (HEIGHT + GAP) + TOP
    path = folder / "curves.svg"
    style = 'font-family="sans-serif" font-size="13"'
    write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {style}>'
        f'<rect width="100%" height="100%" fill="white"/>{body}</svg>\n',
    )
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; none where it is missing."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _by_number(rows: list[dict[str, Any]], key: str, word: str) -> list[Line]:
    count = max(len(row[key]) for row in rows)
    return [
        (f"{word} {i + 1}", [(row["step"], row[key][i]) for row in rows if len(row[key]) > i]) for i in range(count)
    ]


def _panel(title: str, lines: list[Line], index: int, last: float) -> str:
    """One plot with axes, ticks and the names of its lines."""
    values = [y for _, points in lines for _, y in points if math.isfinite(y)]
    low, high = (0.0, 1.0) if title.startswith("Dice") else (min(0.0, *values, 0.0), max([*values, 1e-6]))
    top = TOP + index * (HEIGHT + GAP)
    right = WIDTH - 150

    def at(step: float, value: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * step / max(1, last), top + HEIGHT * (1 - (value - low) / (high - low))

    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        x, y = at(share * last, value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{share * last:.0f}</text>')
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points if math.isfinite(p[1])))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{right + 12}" y="{top + 14 + 17 * number}" fill="{colour}">{name}</text>')
    return "".join(parts)

"""The ten worst and ten typical cases of a run as pictures: the saved prompts are given to the model again, in bounded
time.

Which cases is decided from ``cases.csv`` alone; the prompts come from ``prompts.jsonl``, image and label from the files
it names. What cannot be made again (a file that is gone, a protocol that does not look at the whole volume, time that
is up) is said in a line. The Dice of the mask that is drawn is compared with the saved one, and told where the two
differ.
"""

from __future__ import annotations

import base64
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.drawing import (
    BACKGROUND,
    PLANES,
    PREDICTION,
    TRUTH,
    ThreePlanes,
    grey_range,
    png_bytes,
    prompt_positions,
)
from samed3d.errors import InputError
from samed3d.evaluation.page import paragraph
from samed3d.evaluation.replay import REPLAYED, Answers, Replayed, replay
from samed3d.evaluation.results import Row, SavedRun, curves, prompt_key, score, untrained
from samed3d.geometry import bounding_region
from samed3d.metrics import dice
from samed3d.prompts import Prompt
from samed3d.volume import Volume

logger = logging.getLogger(__name__)

CASES = 10
CASE_EDGE = 250
"""Pixels of each of the three square panels of ``case_png``."""
PER_IMAGE = 2
_SAME_DICE = 0.005
_INTRO = f"""Blue: the label. Orange: the prediction. Green plus: a click on the object, red cross: off it; faint marks lie in other slices.
Each structure once, with its worst seed; at most {PER_IMAGE} of one image in each list."""


@dataclass(frozen=True)
class Chosen:
    """One structure of one model: its first row and its Dice after each click."""

    row: Row
    scores: tuple[float, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What finds its line of ``prompts.jsonl``."""
        return prompt_key(self.row)


def worst_and_typical(rows: Sequence[Row], count: int = CASES) -> tuple[list[Chosen], list[Chosen]]:
    """The structures with the lowest Dice after the last click, and those of the others that are nearest to the median.

    Args:
        rows: Of one model and one prompt strategy.
        count: How many of each, fewer where there are not twice as many structures; a structure appears once, with its
            worst seed, an image at most twice in each list.
    """
    every = [Chosen(curve[0], tuple(score(row, "dice") for row in curve)) for curve in curves(rows)]
    known = [one for one in every if not math.isnan(one.scores[-1])]
    ordered = sorted(known, key=lambda c: (c.scores[-1], str(c.key)))
    count = min(count, (len({_structure(c) for c in known}) + 1) // 2)
    worst = _spread(ordered, count)
    median = float(np.median([c.scores[-1] for c in known])) if known else math.nan
    taken = {_structure(c) for c in worst}
    rest = [c for c in ordered if _structure(c) not in taken]
    return worst, _spread(sorted(rest, key=lambda c: abs(c.scores[-1] - median)), count)


def picture_section(run: SavedRun, seconds: float) -> str:
    """The section of a report with both kinds of cases, of the run's first model and first prompt strategy.

    Args:
        run: The results.
        seconds: When this much time is up, no further picture is begun.
    """
    model, strategy = run.models[0], run.strategies[0]
    rows = [r for r in untrained(run.of(strategy)) if r["model"] == model]
    lines = {prompt_key(line): line for line in run.prompt_lines()}
    if not lines:
        return paragraph("No pictures: the run has no prompts.jsonl to make the masks from.", "faint")
    if strategy.protocol not in REPLAYED:
        told = f"No pictures: protocol {strategy.protocol} does not answer on the whole volume; pictures are made for {', '.join(REPLAYED)}."
        return paragraph(told, "faint")
    worst, typical = worst_and_typical(rows)
    ordered = [*_by_image(worst), *_by_image(typical)]  # the worst first: time may be up
    made, left_out = _pictures(ordered, lines, time.monotonic() + seconds)
    parts = [paragraph(f"Model {model}, {strategy}: after the last click. {_INTRO}", "faint")]
    for title, chosen in (
        (f"The {len(worst)} worst", worst),
        (f"{len(typical)} typical, nearest to the median", typical),
    ):
        if figures := "".join(made[c.key] for c in chosen if c.key in made):
            parts.append(f'<h3>{title}</h3><div class="cases">{figures}</div>')
    parts += [paragraph(f"Not shown: {told} ({n})", "faint") for told, n in Counter(left_out).items()]
    return "".join(parts)


def _pictures(
    chosen: Sequence[Chosen], lines: dict[tuple[Any, ...], dict[str, Any]], until: float
) -> tuple[dict[tuple, str], list[str]]:
    """A figure for each case that could be drawn, and why not for the others."""
    made: dict[tuple, str] = {}
    left_out: list[str] = []
    answers = Answers()
    for one in chosen:
        line = lines.get(one.key)
        if line is None:
            left_out.append("prompts.jsonl has no line for it")
        elif time.monotonic() > until:
            left_out.append("the time for pictures was up")
        else:
            try:
                made[one.key] = _figure(one, replay(line, answers))
            except (InputError, OSError) as error:
                left_out.append(str(error))
    return made, left_out


def _figure(one: Chosen, again: Replayed) -> str:
    png = case_png(again.volume, again.truth, again.mask, again.prompts)
    row, drawn = one.row, dice(again.mask, again.truth)
    name = str(row["name"]) or f"label {row['label']}"
    path = " \u2192 ".join(f"{s:.2f}" for s in one.scores)
    size = "" if row.get("volume_ml") is None else f", {row['volume_ml']:.3g} ml"
    note = (
        ""
        if abs(drawn - one.scores[-1]) <= _SAME_DICE
        else f" Not made again exactly: the mask drawn here has Dice {drawn:.2f}."
    )
    where = escape(f"{row['source']} / {row['case']}{size}, seed {row['seed']}.{note}")
    alt = escape(f"{name} of {row['case']}: three planes with label, prediction and prompts", quote=True)
    caption = f"<b>{escape(name)}</b>, Dice {path}<br><span>{where}</span>"
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{caption}</figcaption></figure>'


def case_png(
    volume: Volume, truth: NDArray[np.bool_], prediction: NDArray[np.bool_], prompts: Sequence[Prompt]
) -> bytes:
    """A PNG of three square panels around a structure, with the outlines of label and prediction and all prompts.

    Each slice is the one in which the label is largest; prompts in other slices are drawn fainter.

    Args:
        volume: The image.
        truth: (D, H, W) bool in the file's own order, with at least one voxel.
        prediction: The predicted mask, same shape.
        prompts: In the order they were given.
    """
    from PIL import Image

    view, spacing = volume.view, volume.view.spacing_zyx_mm
    image, target, predicted = (view.to_canonical(a) for a in (volume.array, truth, prediction))
    region = bounding_region(target)
    start, stop = np.array(region.start_zyx), np.array(region.stop_zyx)
    extent = float(max((stop - start) * spacing))
    middle, reach = (start + stop) / 2, 0.75 * extent
    if predicted.any():  # show as much of the prediction as fits into twice the usual cube
        other = bounding_region(predicted)
        beyond = np.maximum(middle - other.start_zyx, np.array(other.stop_zyx) - middle) * spacing
        reach = max(reach, min(1.5 * extent, float(beyond.max())))
    half = max(1.05 * reach, 5 * max(spacing)) / np.asarray(spacing)
    scene = ThreePlanes(
        image,
        spacing,
        centre_zyx=[int(target.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)],
        shown=(middle - half, middle + half),
        outlined=[(target, lambda _: TRUTH), (predicted, lambda _: PREDICTION)],
        marks=prompt_positions(volume, prompts),
        greys=grey_range(image, image[target]),
        pixels_per_mm=CASE_EDGE / float(2 * half[0] * spacing[0]),
    )
    sheet = Image.new("RGB", (3 * CASE_EDGE + 8, CASE_EDGE), BACKGROUND)
    for number, plane in enumerate(PLANES):
        sheet.paste(scene.draw(plane, tint=0.0, text_px=12, far_marks=True), (number * (CASE_EDGE + 4), 0))
    return png_bytes(sheet)


def _spread(ordered: Sequence[Chosen], count: int) -> list[Chosen]:
    """The first so many, a structure once and an image at most ``PER_IMAGE`` times."""
    images: Counter = Counter()
    structures: set = set()
    found: list[Chosen] = []
    for one in ordered:
        image, structure = _structure(one)[:2], _structure(one)
        if structure not in structures and images[image] < PER_IMAGE and len(found) < count:
            found.append(one)
            structures.add(structure)
            images[image] += 1
    return found


def _by_image(chosen: Sequence[Chosen]) -> list[Chosen]:
    """Cases of one image after each other, so that it is read once."""
    images = list(dict.fromkeys(_structure(c)[:2] for c in chosen))
    return sorted(chosen, key=lambda c: images.index(_structure(c)[:2]))


def _structure(one: Chosen) -> tuple[Any, ...]:
    return (one.row["source"], one.row["case"], one.row["label"])

"""Pictures of the worst and of typical cases of a run, for which the method gets the saved prompts again.

Where a mask cannot be made again (a missing file, a protocol that does not predict on the whole volume, time that is
up), the report states the reason; where the new mask has another Dice than the saved one, it states both.
"""

from __future__ import annotations

import base64
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d import drawing
from samed3d.data.exposure import TrainingHistory
from samed3d.errors import InputError
from samed3d.evaluation.cases import LoadedCase, find_cases
from samed3d.evaluation.methods import RANDOM_WEIGHTS, Method, MethodSession, method_of
from samed3d.evaluation.protocols import PROTOCOLS
from samed3d.evaluation.results import Row, SavedRun, curves, prompt_key, score, untrained
from samed3d.geometry import as_triple, bounding_region
from samed3d.metrics import dice
from samed3d.prompts import Prompt, prompt_from_json
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import read_label_on

CASES = 10
PER_IMAGE = 2
EDGE = 250
"""Pixels of each of the three square panels of ``case_png``."""
_SAME_DICE = 0.005
REPLAYABLE = tuple(name for name, protocol in PROTOCOLS.items() if protocol.replayable)
"""Protocols whose masks can be made again: those that give prompts on the whole volume through a session."""
Curve = list[Row]
"""The rows of one structure and seed, by click."""
_INTRO = (
    "Blue: the label. Orange: the prediction. Green plus: a click on the object, red cross: off it; smaller marks lie "
    f"in other slices. Each structure once, with its worst seed; at most {PER_IMAGE} of one image in each list."
)


@dataclass(frozen=True)
class Replayed:
    """A mask that was made again: image, label and mask (D, H, W) bool, and all prompts in order."""

    volume: Volume
    truth: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    prompts: list[Prompt]


class Replay:
    """Gives a method the prompts of a line of ``prompts.jsonl`` again; keeps the methods, and the image of the last."""

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}
        self.sessions: dict[str, MethodSession] = {}
        self.case: tuple[str, str] | None = None
        self.object_ids = itertools.count(1)

    def __call__(self, line: dict[str, Any]) -> Replayed:
        """Make the mask of one line.

        Raises:
            InputError: if the image, the label or the model does not exist any more, or there was no prompt.
        """
        if self.case != (line["image"], line["case"]):
            self.loaded, self.sessions = _read(line), {}
            self.case = (line["image"], line["case"])
        volume, truth = self.loaded.volume, self.loaded.labels == int(line["label"])
        prompts = [prompt_from_json(entry) for turn in line["turns"] for entry in turn["prompts"]]
        if not prompts:
            raise InputError("no prompt was given")
        model = line["model"]
        if model not in self.methods:
            self.methods[model] = method_of(model.removesuffix(RANDOM_WEIGHTS))
        if model not in self.sessions or self.methods[model].knows_truth:  # told the truth: a session per structure
            self.sessions[model] = self.methods[model].open(volume, truth)
        session, object_id = self.sessions[model], next(self.object_ids)
        for prompt in prompts:
            session.add(prompt, object_id=object_id)
        return Replayed(volume, truth, session.mask_of(object_id).astype(bool), prompts)


def _read(line: dict[str, Any]) -> LoadedCase:
    """The case: an nnU-Net folder's by its files, a corpus's or a challenge folder's by its name."""
    image, labels = Path(line["image"]), Path(line["labels_file"])
    for path in (image, labels):
        if not path.exists():
            raise InputError(f"the file is not there any more: {path}")
    if image.is_file() and image.suffix != ".npz":
        volume = read_volume(image, modality=line.get("modality"))
        return LoadedCase(volume, read_label_on(labels, volume.grid, str(image)))
    folder = image if image.is_dir() else image.parent
    for case in find_cases([folder], TrainingHistory(), "all").cases:
        if (case.source, case.case) == (line["source"], line["case"]):
            return case.loaded()
    raise InputError(f"the case is not there any more: {line['case']} in {folder}")


@dataclass
class CasePictures:
    """What a report shows of single cases: titles, each with its figures, and how often a reason left a case out.

    A figure has ``name``, ``scores``, ``where``, ``alt`` and ``png_base64``. ``intro`` says what the pictures show, or
    why there are none.
    """

    intro: str
    lists: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def worst_and_typical(rows: Sequence[Row], count: int = CASES) -> tuple[list[Curve], list[Curve]]:
    """The click curves with the lowest Dice after the last click, and those of the others nearest to the median.

    The rows are of one model and one prompt strategy. There are ``count`` of each, fewer where there are not twice as
    many structures; a structure appears once, with its worst seed, an image at most ``PER_IMAGE`` times in each list.
    """
    known = [curve for curve in curves(rows) if not math.isnan(score(curve[-1], "dice"))]
    ordered = sorted(known, key=lambda curve: (curve[-1]["dice"], str(prompt_key(curve[0]))))
    count = min(count, (len({_structure(curve) for curve in known}) + 1) // 2)
    worst = _first(ordered, count)
    median = float(np.median([curve[-1]["dice"] for curve in known])) if known else math.nan
    taken = {_structure(curve) for curve in worst}
    rest = [curve for curve in ordered if _structure(curve) not in taken]
    return worst, _first(sorted(rest, key=lambda curve: abs(curve[-1]["dice"] - median)), count)


def _structure(curve: Curve) -> tuple[Any, ...]:
    return (curve[0]["source"], curve[0]["case"], curve[0]["label"])


def _first(ordered: Sequence[Curve], count: int) -> list[Curve]:
    """The first so many, a structure once and an image at most ``PER_IMAGE`` times; those of an image in a row."""
    found: dict[tuple[Any, ...], list[Curve]] = {}
    structures: set[tuple[Any, ...]] = set()
    for curve in ordered:
        of_image = found.setdefault(_structure(curve)[:2], [])
        if len(structures) < count and len(of_image) < PER_IMAGE and _structure(curve) not in structures:
            of_image.append(curve)
            structures.add(_structure(curve))
    return [curve for of_image in found.values() for curve in of_image]


def case_pictures(run: SavedRun, seconds: float) -> CasePictures:
    """Both kinds of cases of the run's first model and first prompt strategy; none is begun after the seconds."""
    model, strategy = run.models[0], run.strategies[0]
    lines = {prompt_key(line): line for line in run.prompt_lines()}
    if not lines:
        return CasePictures("No pictures: the run has no prompts.jsonl to make the masks from.")
    if strategy.protocol not in REPLAYABLE:
        why = f"protocol {strategy.protocol} does not predict on the whole volume"
        return CasePictures(f"No pictures: {why}; pictures are made for {', '.join(REPLAYABLE)}.")
    worst, typical = worst_and_typical([r for r in untrained(run.of(strategy)) if r["model"] == model])
    found = CasePictures(f"Model {model}, {strategy}: after the last click. {_INTRO}")
    made: dict[tuple[Any, ...], dict[str, str]] = {}
    replay, until = Replay(), time.monotonic() + seconds
    for curve in (*worst, *typical):  # the worst first: time may be up
        line = lines.get(prompt_key(curve[0]))
        if line is None:
            found.left_out["prompts.jsonl has no line for it"] += 1
        elif time.monotonic() > until:
            found.left_out["the time for pictures was up"] += 1
        else:
            try:
                made[prompt_key(curve[0])] = _figure(curve, replay(line))
            except (InputError, OSError) as error:
                found.left_out[str(error)] += 1
    titles = (f"The {len(worst)} worst", f"{len(typical)} typical, nearest to the median")
    for title, chosen in zip(titles, (worst, typical), strict=True):
        keys = [prompt_key(curve[0]) for curve in chosen]
        found.lists.append((title, [made[key] for key in keys if key in made]))
    return found


def _figure(curve: Curve, again: Replayed) -> dict[str, str]:
    row, drawn = curve[0], dice(again.mask, again.truth)
    name = str(row["name"]) or f"label {row['label']}"
    size = "" if row.get("volume_ml") is None else f", {row['volume_ml']:.3g} ml"
    same = abs(drawn - curve[-1]["dice"]) <= _SAME_DICE
    note = "" if same else f" Not made again exactly: the mask drawn here has Dice {drawn:.2f}."
    return {
        "name": name,
        "scores": " \u2192 ".join(f"{r['dice']:.2f}" for r in curve),
        "where": f"{row['source']} / {row['case']}{size}, seed {row['seed']}.{note}",
        "alt": f"{name} of {row['case']}: three planes with label, prediction and prompts",
        "png_base64": base64.b64encode(case_png(again.volume, again.truth, again.mask, again.prompts)).decode(),
    }


def case_png(
    volume: Volume, truth: NDArray[np.bool_], prediction: NDArray[np.bool_], prompts: Sequence[Prompt]
) -> bytes:
    """A PNG of three square panels around a structure, with the outlines of label and prediction and all prompts.

    Each slice is the one in which the label is largest; prompts in other slices are drawn fainter. ``truth`` and
    ``prediction`` are (D, H, W) bool in the file's own order, the former with at least one voxel.
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
    scene = drawing.ThreePlanes(
        image,
        spacing,
        centre_zyx=as_triple([int(target.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]),
        shown=(middle - half, middle + half),
        outlined=[(target, lambda _: drawing.TRUTH), (predicted, lambda _: drawing.PREDICTION)],
        marks=drawing.prompt_positions(volume, prompts),
        greys=drawing.grey_range(image, image[target]),
        pixels_per_mm=EDGE / float(2 * half[0] * spacing[0]),
    )
    sheet = Image.new("RGB", (3 * EDGE + 8, EDGE), drawing.BACKGROUND)
    for number, plane in enumerate(drawing.PLANES):
        sheet.paste(scene.draw(plane, tint=0.0, text_px=12, far_marks=True), (number * (EDGE + 4), 0))
    return drawing.png_bytes(sheet)

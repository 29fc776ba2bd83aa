"""The interactive track of the CVPR 2025 challenge for foundation models in 3D: a box, then five clicks, all structures
of a case together.

Round 0 gives a box; rounds 1 to 5 give each structure one click, in the largest part of its error. Details that are
easily missed:

- labels are renumbered in ascending order; boxes come in that order; a case file without ``boxes`` gets no round 0:
  nothing is predicted and its score is 0;
- the box is the exact extent along z and a rectangle on the middle slice that has the structure (``unique z[len //
  2]``), enlarged by
  ``s`` pixels of a 256-pixel image, ``s`` drawn from 0 to 5;
- error is missed and surplus voxels **together**; the largest 26-connected part by voxels; distances in voxels,
  **spacing ignored**, with background padded on by a quarter of the part's size, at least 1; one voxel of greatest
  distance, drawn with seed 42 afresh;
- a part whose padded box has more than 60 million voxels is halved in resolution first;
- the click is foreground where the label is the structure; a perfect structure gets none;
- Dice is the mean over labels; NSD is DeepMind's at 2 mm, its mean **set to 0 where the mean Dice is at most 0.2**;
- ``DSC_AUC`` and ``NSD_AUC`` are areas under the **five** clicks, so up to 4; ``*_Final`` is after the fifth.

Differences from the challenge: boxes are drawn with seed 2025 per case (the script: once for all files in a row, so
that a box depends on the files before); where masks overlap the higher label wins; a model gets the box as a 3D box
over the extent along z; time is not limited.

Source: ``CVPR25_iter_eval.py`` and ``get_boxes.py`` of JunMa11/CVPR-MedSegFMCompetition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import largest_component
from samed3d.data.challenge_npz import ChallengeBox
from samed3d.evaluation.cases import LabelledCase, LoadedCase
from samed3d.evaluation.meter import Cost
from samed3d.evaluation.methods import MeteredSession, Method
from samed3d.evaluation.protocols.base import (
    Click,
    EvaluationProtocol,
    EvaluationSettings,
    StructureRun,
    Turn,
    box_around,
    point_at,
    structures,
)
from samed3d.evaluation.results import PromptStrategy, Row, group_by
from samed3d.geometry import bounding_region
from samed3d.metrics import trapezoid
from samed3d.prompts import Box, Prompt

CLICKS = 5
BOX_SEED, CLICK_SEED = 2025, 42
MAX_PADDED_VOXELS = 60_000_000
DSC_FLOOR = 0.2


class Cvpr25(EvaluationProtocol):
    """See the module."""

    name = "cvpr25"
    title = "CVPR 2025 interactive track: box, then five clicks, all structures together"
    fixed_clicks = CLICKS
    tolerance_mm = 2.0

    def strategies(self, settings: EvaluationSettings) -> list[PromptStrategy]:
        """A box first."""
        return [PromptStrategy(self.name, "own", "box")]

    def can_start(self, method: Method, strategy: PromptStrategy) -> bool:
        """A method that cannot take the box begins with the clicks."""
        return bool({"box", "point"} & method.takes)

    def run(
        self, method: Method, case: LabelledCase, loaded: LoadedCase, settings: EvaluationSettings
    ) -> Iterator[StructureRun]:
        """All structures of a case, whose masks compete for the voxels of one label map."""
        (strategy,) = self.usable_strategies(method, settings)
        values = structures(case, loaded, settings)
        for seed in range(settings.seeds if values else 0):
            rounds = list(self._rounds(method, loaded, values, seed))
            for number, value in enumerate(values):
                turns = [turns[number] for turns in rounds]
                yield StructureRun(value, loaded.labels == value, seed, strategy, turns)

    def _rounds(self, method: Method, loaded: LoadedCase, values: Sequence[int], seed: int) -> Iterator[list[Turn]]:
        """Six rounds, each with one turn per structure."""
        numbers = range(1, len(values) + 1)
        truth = np.zeros(loaded.labels.shape, np.int32)
        for number, value in zip(numbers, values, strict=True):
            truth[loaded.labels == value] = number
        boxes: list[ChallengeBox] | None = simulated_boxes(truth, len(values), np.random.RandomState(BOX_SEED + seed))
        if loaded.is_challenge_file:
            boxes = loaded.boxes if loaded.boxes is None or len(loaded.boxes) == len(values) else None
        sessions = _sessions(method, loaded, values)
        masks: dict[int, NDArray[np.bool_]] = {}
        costs = dict.fromkeys(numbers, Cost())
        given: dict[int, list[Prompt]] = {number: [] for number in numbers}
        if boxes is not None and "box" in method.takes:
            for number, box in zip(numbers, boxes, strict=True):
                given[number] = [as_prompt(box)]
                masks[number], costs[number] = sessions[number].give(given[number], number)
        segs = joined(masks, truth.shape)
        spacing = loaded.challenge_spacing  # the challenge scores with the numbers in the order of the file
        yield [Turn(0, given[n], segs == n, costs[n], spacing_zyx_mm=spacing) for n in numbers]
        for turn in range(1, CLICKS + 1):
            found = {n: challenge_click(segs == n, truth == n) for n in numbers}
            for n, click in found.items():
                costs[n] = Cost()
                if click is not None and (click[1] or n in masks):
                    masks[n], costs[n] = sessions[n].give([point_at(click)], n)
            segs = joined(masks, truth.shape)
            yield [
                Turn(turn, [point_at(click)] if click else [], segs == n, costs[n], click, spacing_zyx_mm=spacing)
                for n, click in found.items()
            ]

    def own_scores(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The challenge's four scores per case and seed."""
        lines = []
        for mine in group_by(rows, lambda row: (row["source"], row["case"], row["seed"])).values():
            by_click = group_by(mine, lambda row: int(row["click"]))
            dsc = [float(np.mean([row["dice"] for row in by_click[click]])) for click in range(1, CLICKS + 1)]
            per_label = [[row.get("nsd_subvoxel") for row in by_click[click]] for click in range(1, CLICKS + 1)]
            nsd = [challenge_nsd(values, mean) for values, mean in zip(per_label, dsc, strict=True)]
            scores = {"DSC_AUC": trapezoid(dsc), "NSD_AUC": trapezoid(nsd), "DSC_Final": dsc[-1], "NSD_Final": nsd[-1]}
            lines += [mine[0] | {"score": score, "value": value} for score, value in scores.items()]
        return lines


def _sessions(method: Method, loaded: LoadedCase, values: Sequence[int]) -> dict[int, MeteredSession]:
    """One session for all structures; for a bound one each, because it is told the structure that it must return."""
    numbered = enumerate(values, start=1)
    if method.knows_truth:
        return {n: MeteredSession.open(method, loaded.volume, loaded.labels == value) for n, value in numbered}
    shared = MeteredSession.open(method, loaded.volume, np.isin(loaded.labels, values))
    return {n: shared for n, _ in numbered}


def challenge_nsd(per_label: Sequence[float | None], mean_dsc: float) -> float:
    """A case's NSD: the mean over labels, 0 where the mean Dice is at most 0.2; nan where it was not measured."""
    if mean_dsc <= DSC_FLOOR:
        return 0.0
    return float(np.mean([np.nan if value is None else value for value in per_label]))


def simulated_boxes(truth: NDArray[np.integer], count: int, rng: np.random.RandomState) -> list[ChallengeBox]:
    """A box per structure of labels 1 to ``count``, (D, H, W)."""
    boxes: list[ChallengeBox] = []
    _, height, width = truth.shape
    for number in range(1, count + 1):
        mask = truth == number
        slices = np.flatnonzero(mask.any(axis=(1, 2)))
        middle = int(slices[len(slices) // 2])
        ys, xs = np.nonzero(mask[middle])
        shift = int(rng.randint(0, 6))
        by_x, by_y = int(shift * width / 256), int(shift * height / 256)
        boxes.append(
            {
                "z_min": int(slices[0]),
                "z_max": int(slices[-1]),
                "z_mid": middle,
                "z_mid_x_min": max(0, int(xs.min()) - by_x),
                "z_mid_y_min": max(0, int(ys.min()) - by_y),
                "z_mid_x_max": min(width - 1, int(xs.max()) + by_x),
                "z_mid_y_max": min(height - 1, int(ys.max()) + by_y),
            }
        )
    return boxes


def as_prompt(box: ChallengeBox) -> Box:
    """The 3D box over the extent along z."""
    low = (box["z_min"], box["z_mid_y_min"], box["z_mid_x_min"])
    high = (box["z_max"] + 1, box["z_mid_y_max"] + 1, box["z_mid_x_max"] + 1)
    return box_around(low, high)


def joined(masks: dict[int, NDArray[np.bool_]], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """One label map; where masks overlap the higher number stays."""
    segs = np.zeros(shape, np.int32)
    for number in sorted(masks):
        segs[masks[number]] = number
    return segs


def challenge_click(
    pred: NDArray[np.bool_], target: NDArray[np.bool_], most_voxels: int = MAX_PADDED_VOXELS
) -> Click | None:
    """The next click on one structure (D, H, W); None where nothing is wrong.

    Where the padded box has more than ``most_voxels``, distances are taken at half the resolution.
    """
    whole = bounding_region(pred ^ target)
    if whole.is_empty:
        return None
    component = largest_component((pred ^ target)[whole.slices])  # of equally large ones the first found
    inner = bounding_region(component)
    component = component[inner.slices]
    start = [a + b for a, b in zip(whole.start_zyx, inner.start_zyx, strict=True)]
    pads = [max(1, int(0.25 * n)) for n in component.shape]
    padded = np.pad(component, [(p, p) for p in pads])
    depth = _voxel_distance(padded) if padded.size <= most_voxels else _coarse_distance(padded)
    depth = depth * padded
    if depth.max() == 0:
        depth = padded.astype(np.float32)
    deepest = np.argwhere(depth == depth.max())
    at = deepest[np.random.RandomState(CLICK_SEED).choice(len(deepest))]
    z, y, x = (int(v) - p + s for v, p, s in zip(at, pads, start, strict=True))
    return (z, y, x), bool(target[z, y, x])


def _voxel_distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(mask).astype(np.float32)


def _coarse_distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distances of the mask reduced by 2 x 2 x 2 maxima, each repeated over its block."""
    even = np.pad(mask, [(0, n % 2) for n in mask.shape])
    d, h, w = (n // 2 for n in even.shape)
    small = np.asarray(even.reshape(d, 2, h, 2, w, 2).any(axis=(1, 3, 5)))
    depth = _voxel_distance(small)
    for axis in range(3):
        depth = np.repeat(depth, 2, axis=axis)
    return depth[: mask.shape[0], : mask.shape[1], : mask.shape[2]]

"""Evaluate one method on one case under one protocol: one result row per prompt, and one line that can be replayed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, LoadedCase
from samed3d.evaluation.methods import MeteredSession, Method, MethodSession
from samed3d.evaluation.protocols.base import EvaluationProtocol, EvaluationSettings, StructureRun, StructureTask, Turn
from samed3d.evaluation.protocols.samed3d import prompt_structure
from samed3d.evaluation.results import PROMPT_KEY, Row, rounded
from samed3d.geometry import Triple
from samed3d.metrics import dice, surface_scores, volume_error
from samed3d.prompts import prompt_to_json
from samed3d.volume import Volume

logger = logging.getLogger(__name__)


@dataclass
class CaseResults:
    """Results of one case: rows of ``cases.csv``, lines of ``prompts.jsonl`` and notes on how its image was read."""

    rows: list[Row] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure(
    case: LabelledCase,
    method: Method,
    protocol: EvaluationProtocol,
    settings: EvaluationSettings,
    loaded: LoadedCase,
) -> CaseResults:
    """Evaluate a method on all structures of a case that is in memory.

    Raises:
        InputError: if a mask of the method cannot be used.
    """
    results, spacing = CaseResults(), loaded.volume.grid.spacing_zyx_mm
    tolerance_mm = settings.tolerance_mm if protocol.tolerance_mm is None else protocol.tolerance_mm
    for run in protocol.run(method, case, loaded, settings):
        about = _about(case, loaded, method, run)
        rows, turns, before = [], [], 0
        for turn in run.turns:
            size = int(np.count_nonzero(turn.mask))
            scores = _scores(turn, run, spacing, tolerance_mm, settings.surfaces)
            rows.append(about | {"click": turn.click, "added_voxels": size - before} | scores)
            turns.append({"click": turn.click, "prompts": [prompt_to_json(p) for p in turn.prompts]})
            before = size
        if rows:  # a series that ends early repeats its last row
            for click in range(rows[-1]["click"] + 1, protocol.clicks(settings) + 1):
                rows.append(rows[-1] | {"click": click, "seconds": 0.0, "encode_seconds": 0.0, "added_voxels": 0})
        results.rows += rows
        files = {"image": str(case.image_path), "labels_file": str(case.label_path), "modality": case.modality}
        results.lines.append({key: about[key] for key in PROMPT_KEY} | files | {"turns": turns})
    return results


def dice_by_click(
    session: MethodSession,
    volume: Volume,
    target: NDArray[np.bool_],
    clicks: int,
    rng: np.random.Generator,
    object_id: int = 1,
) -> list[float]:
    """Dice of a structure's whole mask after each click of protocol ``samed3d``; a perfect mask keeps its Dice.

    ``target`` is (D, H, W) bool and not empty, ``object_id`` was not used before on the session of the volume.
    """
    task = StructureTask(volume, target, rng, clicks)
    turns = prompt_structure(MeteredSession(session, volume, "model"), task, object_id)
    found = [dice(turn.mask, target) for turn in turns]
    return found + found[-1:] * (clicks - len(found))


def measurable(
    methods: Sequence[Method], protocols: Sequence[EvaluationProtocol], settings: EvaluationSettings
) -> frozenset[tuple[str, str]]:
    """(method, protocol) by name where the protocol gives a first prompt that the method takes; logs what is left out.

    Raises:
        InputError: if no protocol suits a method.
    """
    pairs = set()
    for method in methods:
        reasons = []
        for protocol in protocols:
            try:
                fit = protocol.usable_strategies(method, settings)
            except InputError as error:
                reasons.append(error)
                continue
            pairs.add((method.name, protocol.name))
            if missing := dict.fromkeys(s.prompt for s in protocol.strategies(settings) if s not in fit):
                first = " or a ".join(missing)
                logger.warning("left out: %s under %s with a %s first", method.name, protocol.name, first)
        if len(reasons) == len(protocols):
            raise reasons[0]
        for reason in reasons:
            logger.warning("left out: %s", reason)
    return frozenset(pairs)


def _about(case: LabelledCase, loaded: LoadedCase, method: Method, run: StructureRun) -> Row:
    """The columns that are the same at every click."""
    voxels = int(np.count_nonzero(run.target))
    millilitres = round(voxels * float(np.prod(loaded.volume.grid.spacing_xyz_mm)) / 1000, 4)
    row = {"model": method.name, "label": run.label, "name": case.names.get(run.label, ""), "seed": run.seed}
    row |= {key: getattr(case, key) for key in ("group", "source", "case", "subject", "modality")}
    return row | asdict(run.strategy) | {"voxels": voxels, "volume_ml": millilitres}


def _scores(turn: Turn, run: StructureRun, spacing_zyx_mm: Triple, tolerance_mm: float, surfaces: bool) -> Row:
    """The measured columns of one turn, without ``added_voxels``."""
    target: NDArray[np.bool_] = run.target if turn.target is None else turn.target
    found: dict[str, float | None] = {"dice": dice(turn.mask, target)}
    if surfaces:
        found |= surface_scores(turn.mask, target, turn.spacing_zyx_mm or spacing_zyx_mm, tolerance_mm)
    found["volume_error"] = volume_error(turn.mask, target)
    row: Row = {key: rounded(value, 5) for key, value in found.items()}
    if turn.clicked is not None:
        at, positive = turn.clicked
        row |= {"obeyed": int(bool(turn.mask[at]) == positive), "positive": int(positive)}
    row |= {"seconds": rounded(turn.cost.seconds, 4), "encode_seconds": rounded(turn.cost.encode_seconds, 4)}
    return row | {"peak_mib": rounded(turn.cost.peak_mib, 1)}

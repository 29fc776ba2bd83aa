"""One case, one method, one protocol: walk its structures and turn every prompt into a row and a line that can be
replayed.

Read ``rows.py`` for the columns, ``protocols/base.py`` for who is walking, ``run.py`` next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, Loaded
from samed3d.evaluation.methods import Method
from samed3d.evaluation.protocols import AnyProtocol
from samed3d.evaluation.protocols.base import FIRST, CaseProtocol, StructureProtocol, Task, Turn
from samed3d.evaluation.results import PromptStrategy, Row
from samed3d.metrics import dice, surface_scores, volume_error
from samed3d.prompts import prompt_to_json
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)

MIN_VOXELS = 100


@dataclass(frozen=True)
class Ask:
    """What every case is measured with.

    Attributes:
        clicks: How many, where the protocol does not say.
        seeds: Repetitions.
        policies: Of the ``samed3d`` protocol.
        prompts: Of the ``samed3d`` protocol: what comes first.
        labels_per_case: Structures per case, drawn with a fixed seed; None takes all.
        min_voxels: Smaller structures are passed over.
        tolerance_mm: Of the surface Dice, where the protocol does not say.
        surfaces: Whether surface Dice and HD95 are measured; they take longer than small models do.
    """

    clicks: int
    seeds: int = 1
    policies: tuple[str, ...] = ("centre",)
    prompts: tuple[str, ...] = ("click",)
    labels_per_case: int | None = None
    min_voxels: int = MIN_VOXELS
    tolerance_mm: float = 2.0
    surfaces: bool = True


@dataclass
class Part:
    """What one case left: rows of ``cases.csv`` and lines of ``prompts.jsonl``."""

    rows: list[Row] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


def usable_strategies(method: Method, protocol: AnyProtocol, ask: Ask) -> list[PromptStrategy]:
    """The strategies of a protocol whose first prompt the method takes.

    Raises:
        InputError: if there is none.
    """
    strategies = protocol.strategies(ask.policies, ask.prompts)
    if isinstance(protocol, CaseProtocol):  # what cannot take its box begins with its clicks
        fit = strategies if {"box", "point"} & method.takes else []
    else:
        fit = [strategy for strategy in strategies if FIRST[strategy.prompt] in method.takes]
    if not fit:
        given = ", ".join(dict.fromkeys(FIRST[strategy.prompt] for strategy in strategies))
        needs = " or a ".join(sorted(method.takes))
        raise InputError(
            f"model {method.name!r} needs a {needs} first; protocol {protocol.name!r} gives it only: {given}"
        )
    return fit


def measure(case: LabelledCase, method: Method, protocol: AnyProtocol, ask: Ask, loaded: Loaded | None = None) -> Part:
    """Measure a method on all structures of a case.

    Args:
        case: The case.
        method: What is measured.
        protocol: Who clicks.
        ask: How often and how much.
        loaded: The case where it is in memory already.

    Raises:
        InputError: if the case or an answer cannot be used.
    """
    part = Part()
    try:
        loaded = loaded or case.loaded()
    except EmptyLabelError as error:
        logger.warning("passed over %s: %s", case.case, error)
        return part
    values = _structures(loaded, ask)
    if not values:
        logger.warning("passed over %s: no structure of at least %d voxels", case.case, ask.min_voxels)
        return part
    turns = _structure_turns if isinstance(protocol, StructureProtocol) else _case_turns
    for value, seed, strategy, series in turns(method, protocol, loaded, values, ask):  # type: ignore[arg-type]
        _note(part, case, loaded, method, protocol, ask, (value, seed, strategy), series)
    return part


def _structures(loaded: Loaded, ask: Ask) -> list[int]:
    found = zip(*np.unique(loaded.labels, return_counts=True), strict=True)
    values = sorted(int(v) for v, n in found if v != 0 and n >= ask.min_voxels)
    if ask.labels_per_case is not None and len(values) > ask.labels_per_case:
        values = sorted(int(v) for v in np.random.default_rng(0).permutation(values)[: ask.labels_per_case])
    return values


Series = Iterator[Turn] | list[Turn]
_Found = Iterator[tuple[int, int, PromptStrategy, Series]]


def _structure_turns(
    method: Method, protocol: StructureProtocol, loaded: Loaded, values: list[int], ask: Ask
) -> _Found:
    clicks = protocol.fixed_clicks or ask.clicks
    for number, value in enumerate(values):
        target = loaded.labels == value
        for seed in range(ask.seeds):
            for strategy in usable_strategies(method, protocol, ask):
                task = Task(loaded.volume, target, protocol.rng(seed, number), clicks, strategy)
                yield value, seed, strategy, protocol.walk(method, task)


def _case_turns(method: Method, protocol: CaseProtocol, loaded: Loaded, values: list[int], ask: Ask) -> _Found:
    clicks = protocol.fixed_clicks or ask.clicks
    for seed in range(ask.seeds):
        for strategy in usable_strategies(method, protocol, ask):
            series: list[list[Turn]] = [[] for _ in values]
            for turns in protocol.walk_case(method, loaded, values, clicks, seed):
                for number, turn in enumerate(turns):
                    series[number].append(turn)
            for value, own in zip(values, series, strict=True):
                yield value, seed, strategy, own


def _note(
    part: Part,
    case: LabelledCase,
    loaded: Loaded,
    method: Method,
    protocol: AnyProtocol,
    ask: Ask,
    which: tuple[int, int, PromptStrategy],
    series: Series,
) -> None:
    """Score a series of turns; a series that ends early repeats its last row."""
    value, seed, strategy = which
    target = loaded.labels == value
    voxels = int(np.count_nonzero(target))
    about: Row = {
        "model": method.name,
        "protocol": protocol.name,
        "group": case.group,
        "source": case.source,
        "case": case.case,
    }
    about |= {
        "subject": case.subject,
        "modality": case.modality,
        "label": value,
        "name": case.names.get(value, ""),
        "voxels": voxels,
    }
    about["volume_ml"] = round(voxels * float(np.prod(loaded.volume.grid.spacing_xyz_mm)) / 1000, 4)
    about |= {"seed": seed, "policy": strategy.policy, "prompt": strategy.prompt}
    scorer = _Scorer(target, loaded, protocol, ask)
    rows, turns = [], []
    for turn in series:
        rows.append(about | {"click": turn.click} | scorer.score(turn))
        turns.append({"click": turn.click, "prompts": [prompt_to_json(p) for p in turn.prompts]})
    clicks = protocol.fixed_clicks or ask.clicks
    for click in range(rows[-1]["click"] + 1 if rows else clicks + 1, clicks + 1):
        rows.append(rows[-1] | {"click": click, "seconds": 0.0, "encode_seconds": 0.0, "added_voxels": 0})
    part.rows += rows
    about = {key: about[key] for key in ("model", "protocol", "source", "case", "label", "seed", "policy", "prompt")}
    part.lines.append(about | {"image": str(case.image_path), "labels_file": str(case.label_path), "turns": turns})


class _Scorer:
    """Scores the turns of one structure in order."""

    def __init__(self, target: NDArray[np.bool_], loaded: Loaded, protocol: AnyProtocol, ask: Ask) -> None:
        self._target, self._spacing = target, loaded.volume.grid.spacing_zyx_mm
        if loaded.challenge_spacing is not None and isinstance(protocol, CaseProtocol):
            self._spacing = (
                loaded.challenge_spacing
            )  # the challenge's evaluator takes the numbers in the order of the file
        self._tolerance = protocol.tolerance_mm if protocol.tolerance_mm is not None else ask.tolerance_mm
        self._surfaces, self._before = ask.surfaces, 0

    def score(self, turn: Turn) -> Row:
        target = self._target if turn.target is None else turn.target
        spacing = turn.spacing_zyx_mm or self._spacing
        size = int(np.count_nonzero(turn.mask))
        row: Row = {"dice": round(dice(turn.mask, target), 5)}
        if self._surfaces:
            row |= {
                key: round(value, 5)
                for key, value in surface_scores(turn.mask, target, spacing, self._tolerance).items()
            }
        row["volume_error"] = round(volume_error(turn.mask, target), 5)
        if turn.clicked is not None:
            at, positive = turn.clicked
            row |= {"obeyed": int(bool(turn.mask[at]) == positive), "positive": int(positive)}
        row["added_voxels"], self._before = size - self._before, size
        row["seconds"] = round(turn.cost.seconds, 4)
        row["encode_seconds"] = None if turn.cost.encode_seconds is None else round(turn.cost.encode_seconds, 4)
        row["peak_mib"] = None if turn.cost.peak_mib is None else round(turn.cost.peak_mib, 1)
        return row


def fits(method: Method, protocols: Sequence[AnyProtocol], ask: Ask) -> bool:
    """Whether a method takes the first prompt of any of the protocols; says so where it does not."""
    reasons = []
    for protocol in protocols:
        try:
            return bool(usable_strategies(method, protocol, ask))
        except InputError as error:
            reasons.append(error)
    logger.warning("left out: %s", reasons[0])
    return False


def measurable(methods: Sequence[Method], protocols: Sequence[AnyProtocol], ask: Ask) -> frozenset[tuple[str, str]]:
    """(method, protocol) by name where the protocol gives a prompt that the method takes; what is left out is
    logged.

    Raises:
        InputError: if a method can be clicked under none of the protocols.
    """
    pairs = set()
    for method in methods:
        reasons = []
        for protocol in protocols:
            try:
                fit = usable_strategies(method, protocol, ask)
            except InputError as error:
                reasons.append(error)
                continue
            pairs.add((method.name, protocol.name))
            if missing := dict.fromkeys(
                strategy.prompt for strategy in protocol.strategies(ask.policies, ask.prompts) if strategy not in fit
            ):
                first = " or a ".join(missing)
                logger.warning(
                    "%s does not take a %s first; under %s it is left out there", method.name, first, protocol.name
                )
        if len(reasons) == len(protocols):
            raise reasons[0]
        for reason in reasons:
            logger.warning("left out: %s", reason)
    return frozenset(pairs)

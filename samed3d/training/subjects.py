"""Who is kept back of a fine-tuning, and whom the start already knew.

A split is a share and a seed of ``in_validation``, as everywhere: the file of the result names both, so that ``samed3d
evaluate`` keeps the same subjects back. Read ``finetune.py`` next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samed3d.data.corpus import GROUP_SEPARATOR, CaseRecord, Corpus, in_validation
from samed3d.errors import InputError

KNOWLEDGE = ("trained on", "unknown", "kept back", "never")
"""What a model may have been told of a subject, worst first."""
KEPT_BACK = 0.2
"""Share of subjects that are measured and never trained on; at least one."""
_SPLIT_SEEDS = 20_000


@dataclass(frozen=True)
class Split:
    """Who is kept back: the subjects that ``in_validation`` picks with this share and seed."""

    share: float
    seed: int
    kept: list[tuple[Corpus, CaseRecord]]
    trained: list[tuple[Corpus, CaseRecord]]


def split_subjects(corpora: Sequence[Path], seed: int) -> Split:
    """Keep a fifth of the subjects back, at least one; found as the first seed of ``in_validation`` that gives that
    number.

    Raises:
        InputError: if fewer than two subjects have a labelled image.
    """
    cases = [(corpus, case) for corpus in map(Corpus, corpora) for case in corpus.cases if _usable(case)]
    groups = {case.split_group or case.subject for _, case in cases}
    if len(groups) < 2:
        where = ", ".join(map(str, corpora))
        raise InputError(
            f"data must have labelled images of at least 2 subjects, one to learn from, one to measure on, got {len(groups)}: {where}"
        )
    wanted = max(1, round(KEPT_BACK * len(groups)))
    share = wanted / len(groups)
    offset = seed * _SPLIT_SEEDS
    for candidate in range(offset, offset + _SPLIT_SEEDS):
        kept = {group for group in groups if _is_kept(group, share, candidate)}
        if abs(len(kept) - wanted) <= wanted // 10:
            sides: tuple[list, list] = ([], [])
            for corpus, case in cases:
                sides[(case.split_group or case.subject) not in kept].append((corpus, case))
            return Split(share, candidate, *sides)
    raise InputError(f"no split of {len(groups)} groups of subjects keeps {wanted} back; join fewer images by subject")


def _usable(case: CaseRecord) -> bool:
    return case.has_image and bool(case.labels) and case.split != "test"


def _is_kept(group: str, share: float, seed: int) -> bool:
    """As the sampling decides it: any member keeps the whole group back."""
    return any(in_validation(name, share, seed) for name in group.split(GROUP_SEPARATOR))


def seen_by(header: Mapping[str, Any], source: str, subject: str) -> str:
    """What a model's training knew of a subject: ``"trained on"``, ``"unknown"``, ``"kept back"`` or ``"never"``; the
    worst of its history.

    A header names the sources that were held out and how subjects were split. Where it names neither its subjects
    (``trained_on``, of a fine-tuned model) nor its ``sources``, a subject on the training side may be known or not.
    """
    data, sources = header.get("training", {}).get("data"), header.get("sources")
    if subject in header.get("trained_on", {}).get(source, ()):
        known = "trained on"
    elif not data:
        known = "unknown"
    elif (
        source in data.get("hold_out", ()) or "trained_on" in header or (sources is not None and source not in sources)
    ):
        known = "never"
    elif in_validation(subject, data["validation_share"], data["split_seed"]):
        known = "kept back"
    else:
        known = "unknown" if sources is None else "trained on"
    earlier = header.get("base", {}).get("history")
    return known if earlier is None else min(known, seen_by(earlier, source, subject), key=KNOWLEDGE.index)


def history_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the header of a fine-tuned model keeps of its base's."""
    return {key: header[key] for key in ("training", "trained_on", "sources", "base") if key in header}

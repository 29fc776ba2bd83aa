"""Whether a training helped: the same clicks on the same structures of held-out subjects, before and after.

Each structure is clicked on its whole volume with several seeds of the first click, the same for both models. The
spread of the change over the seeds says how much of it is chance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from samed3d.data.corpus import GROUP_SEPARATOR, CaseRecord, Corpus, LabelRecord, in_validation
from samed3d.data.exposure import PERHAPS_TRAINED_ON, TRAINED_ON, UNKNOWN
from samed3d.errors import InputError
from samed3d.evaluation.cases import corpus_volume, only_warnings
from samed3d.evaluation.measuring import dice_by_click
from samed3d.evaluation.results import group_by
from samed3d.evaluation.statistics import paired_difference
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel
from samed3d.pages import count
from samed3d.volume import Volume

REPORTED_CLICKS = (1, 3, 5)
HELD_OUT = 0.2
"""Share of subjects that are measured and never trained on; at least one."""
_SPLIT_SEEDS = 20_000
NOISE_WIDTH = 2.0
"""A change counts as more than chance when it exceeds this many standard deviations of the seeds' changes."""


@dataclass(frozen=True)
class Split:
    """Held-out cases, whose subjects ``in_validation`` picks with this share and seed, and trained ones."""

    share: float
    seed: int
    held_out: list[tuple[Corpus, CaseRecord]]
    trained: list[tuple[Corpus, CaseRecord]]


@dataclass(frozen=True)
class Target:
    """One structure of one image of a held-out subject."""

    corpus: Corpus
    case: CaseRecord
    label: LabelRecord

    @property
    def name(self) -> str:
        """The structure, unique in the image."""
        return f"{self.label.layer}/{self.label.value} {self.label.name}".rstrip()


@dataclass(frozen=True)
class ClickScore:
    """Dice of one structure after one click; ``structure`` is unique in an image, names need not be."""

    case: str
    subject: str
    structure: str
    seed: int
    click: int
    dice: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What the same measurement of another model has as well."""
        return (self.case, self.structure, self.seed, self.click)


@dataclass(frozen=True)
class DiceChange:
    """One line of the table: mean Dice of both models after so many clicks.

    ``noise`` is the standard deviation of the change over the seeds, nan for one seed; ``low`` to ``high`` its 95 %
    interval over subjects, nan for one subject; ``improved`` the share of measurements that rose.
    """

    click: int
    before: float
    after: float
    noise: float
    low: float
    high: float
    improved: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def beyond_noise(self) -> bool:
        """Whether the change is more than the seeds explain; False where the noise is unknown."""
        return abs(self.change) > NOISE_WIDTH * self.noise


def split_subjects(corpora: Sequence[Path], seed: int) -> Split:
    """Hold a fifth of the subjects out, at least one: by the first seed of ``in_validation`` that gives that number.

    The model's header names share and seed, so that ``samed3d evaluate`` holds the same subjects out.

    Raises:
        InputError: if fewer than two subjects have a labelled image.
    """
    cases = [
        (corpus, case)
        for corpus in map(Corpus, corpora)
        for case in corpus.cases
        if case.has_image and case.labels and case.split != "test"
    ]
    groups = {case.split_group or case.subject for _, case in cases}
    if len(groups) < 2:
        where = ", ".join(map(str, corpora))
        raise InputError(
            "data must have labelled images of at least 2 subjects, one to learn from, one to measure on, "
            f"got {len(groups)}: {where}"
        )
    wanted = max(1, round(HELD_OUT * len(groups)))
    share = wanted / len(groups)
    offset = seed * _SPLIT_SEEDS
    for candidate in range(offset, offset + _SPLIT_SEEDS):
        # any member keeps the whole group back, as in data/sampling.py
        kept = {g for g in groups if any(in_validation(name, share, candidate) for name in g.split(GROUP_SEPARATOR))}
        if abs(len(kept) - wanted) <= wanted // 10:
            sides: tuple[list, list] = ([], [])
            for corpus, case in cases:
                sides[(case.split_group or case.subject) not in kept].append((corpus, case))
            return Split(share, candidate, *sides)
    raise InputError(f"no split of {len(groups)} groups of subjects holds {wanted} out; join fewer images by subject")


def choose_targets(cases: Sequence[tuple[Corpus, CaseRecord]], count: int, seed: int) -> list[Target]:
    """Up to ``count`` structures, one of each subject in turn, in an order drawn with the seed."""
    rng = np.random.default_rng(seed)
    every = [Target(corpus, case, label) for corpus, case in cases for label in case.labels]
    by_subject = group_by(every, lambda target: target.case.subject)
    drawn = [[by_subject[s][i] for i in rng.permutation(len(by_subject[s]))] for s in sorted(by_subject)]
    return [target for turn in zip_longest(*drawn) for target in turn if target is not None][:count]


def measure(
    model: PromptableModel,
    targets: Sequence[Target],
    seeds: int,
    clicks: int = max(REPORTED_CLICKS),
    seconds: float = math.inf,
) -> list[ClickScore]:
    """Click every structure on its whole volume, with all seeds; none but the first is begun when the time is up.

    Without a limit of time each image is read once; with one the order of the targets stays.
    """
    if math.isinf(seconds):
        targets = [target for image in group_by(targets, lambda target: target.case.id).values() for target in image]
    until, slowest = time.monotonic() + seconds, 0.0
    found: list[ClickScore] = []
    opened: tuple[str, Volume] | None = None
    with only_warnings("samed3d.inference"):
        for target in targets:
            began = time.monotonic()
            if found and began + slowest > until:
                break
            if opened is None or opened[0] != target.case.id:
                opened = target.case.id, corpus_volume(target.corpus, target.case)
            found += _measure_target(model, opened[1], target, seeds, clicks)
            slowest = max(slowest, time.monotonic() - began)
    return found


def _measure_target(
    model: PromptableModel, volume: Volume, target: Target, seeds: int, clicks: int
) -> Iterator[ClickScore]:
    label, case, session = target.label, target.case, Session(volume, model)
    mask = np.asarray(target.corpus.labels(case, label.layer)[:]) == label.value
    for seed in range(seeds):
        rng = np.random.default_rng([seed, label.layer, label.value])
        for click, dice in enumerate(dice_by_click(session, volume, mask, clicks, rng, 1 + seed), start=1):
            yield ClickScore(case.id, case.subject, target.name, seed, click, round(dice, 5))


def compare(
    before: Iterable[ClickScore], after: Iterable[ClickScore], clicks: Sequence[int] = REPORTED_CLICKS
) -> list[DiceChange]:
    """One line per number of clicks, over the measurements that both have."""
    by_click = group_by(_pairs(before, after), lambda pair: pair[0].click)
    return [_change(click, by_click[click]) for click in clicks if click in by_click]


def _pairs(before: Iterable[ClickScore], after: Iterable[ClickScore]) -> list[tuple[ClickScore, float]]:
    """The scores of which there is an earlier Dice, with it."""
    earlier = {score.key: score.dice for score in before}
    return [(score, earlier[score.key]) for score in after if score.key in earlier]


def _mean_changes(parts: Iterable[list[tuple[ClickScore, float]]]) -> list[float]:
    return [float(np.mean([score.dice - dice for score, dice in part])) for part in parts]


def _change(click: int, pairs: list[tuple[ClickScore, float]]) -> DiceChange:
    changes = _mean_changes(group_by(pairs, lambda pair: pair[0].seed).values())
    noise = float(np.std(changes, ddof=1)) if len(changes) > 1 else math.nan
    after: dict[Hashable, float] = {s.key: s.dice for s, _ in pairs}
    before: dict[Hashable, float] = {s.key: dice for s, dice in pairs}
    paired = paired_difference(after, before, {s.key: s.subject for s, _ in pairs})
    old, new = (float(np.mean(list(side.values()))) for side in (before, after))
    low, high = paired.difference.low, paired.difference.high
    return DiceChange(click, old, new, noise, low, high, paired.better / len(pairs))


def is_better(before: Iterable[ClickScore], after: Iterable[ClickScore]) -> bool:
    """Whether the mean Dice over the reported clicks rose by more than the chance of the clicks.

    The chance is the spread of the change over the seeds; with one seed over the structures.
    """
    pairs = _pairs(before, (score for score in after if score.click in REPORTED_CLICKS))
    by_seed = group_by(pairs, lambda pair: pair[0].seed)
    parts = by_seed if len(by_seed) > 1 else group_by(pairs, lambda pair: (pair[0].case, pair[0].structure))
    means = _mean_changes(parts.values())
    if len(means) < 2:
        return False
    spread = float(np.std(means, ddof=1)) / (1.0 if len(by_seed) > 1 else math.sqrt(len(means)))
    return float(np.mean(means)) > NOISE_WIDTH * spread


def to_markdown(
    changes: Sequence[DiceChange], measured: Sequence[ClickScore], base: str, known: Iterable[tuple[str, str]]
) -> str:
    """The table as a user reads it.

    ``measured`` are the scores of one of the models; ``known`` pairs each subject with its side of the base model's
    training.
    """
    structures, seeds = len({(s.case, s.structure) for s in measured}), len({s.seed for s in measured})
    subjects = len({s.subject for s in measured})
    lines = [
        f"Mean Dice on whole volumes: {count(structures, 'structure')} of {count(subjects, 'held-out subject')}, "
        f"{count(seeds, 'seed')} of the clicks. Before: `{base}`.",
        "",
        "| clicks | before | after | change | 95 % interval | chance of the clicks | more than chance | rose |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in changes:
        interval = "one subject" if np.isnan(c.low) else f"{c.low:+.3f} to {c.high:+.3f}"
        noise = "one seed" if np.isnan(c.noise) else f"± {NOISE_WIDTH * c.noise:.3f}"
        verdict = "unknown" if np.isnan(c.noise) else "yes" if c.beyond_noise else "no"
        lines.append(
            f"| {c.click} | {c.before:.3f} | {c.after:.3f} | {c.change:+.3f} | {interval} | {noise} | {verdict} "
            f"| {c.improved:.0%} |"
        )
    lines.append("")
    by_answer = group_by(sorted(set(known)), lambda pair: pair[1])
    for answer, text in _OVERLAP.items():
        if subjects_of := ", ".join(subject for subject, _ in by_answer.get(answer, [])):
            lines.append(text.format(base=base, subjects=subjects_of))
    return "\n".join(lines).rstrip() + "\n"


_OVERLAP = {
    TRAINED_ON: "`{base}` was trained on {subjects}: its Dice before is not that of an unseen subject.",
    PERHAPS_TRAINED_ON: "`{base}` may have been trained on {subjects}: its file does not name its sources.",
    UNKNOWN: "Whether `{base}` was trained on {subjects} is unknown: its file does not say what it was trained on.",
}
"""What the table says of subjects that the base model may have been trained on."""

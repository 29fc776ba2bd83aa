"""Whether a training helped: the same clicks on the same structures of held-out subjects, before and after.

Each structure is clicked on its whole volume with several seeds of the first click, the same for both models. The
spread of the change over the seeds says how much of it is chance.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.evaluation.cases import corpus_volume
from samed3d.evaluation.measuring import dice_by_click
from samed3d.evaluation.results import group_by
from samed3d.evaluation.statistics import paired_difference
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel

REPORTED_CLICKS = (1, 3, 5)
NOISE_WIDTH = 2.0
"""A change counts as more than chance when it exceeds this many standard deviations of the seeds' changes."""


@dataclass(frozen=True)
class Target:
    """One structure of one image of a held-out subject."""

    corpus: Corpus
    case: CaseRecord
    label: LabelRecord


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
    """One line of the table.

    Attributes:
        click: After how many clicks.
        before: Mean Dice of the base model.
        after: Mean Dice of the trained model.
        noise: Standard deviation of the change over the seeds; nan for one seed.
        low: Lower end of the change's 95 % interval over subjects; nan for one subject.
        high: Upper end.
        improved: Share of measurements that rose.
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


def choose_targets(cases: Sequence[tuple[Corpus, CaseRecord]], count: int, seed: int) -> list[Target]:
    """Up to ``count`` structures, one of each subject in turn, in an order drawn with the seed."""
    rng = np.random.default_rng(seed)
    every = [Target(corpus, case, label) for corpus, case in cases for label in case.labels]
    by_subject = group_by(every, lambda target: target.case.subject)
    drawn = [[by_subject[s][i] for i in rng.permutation(len(by_subject[s]))] for s in sorted(by_subject)]
    return [target for turn in zip_longest(*drawn) for target in turn if target is not None][:count]


def measure(
    model: PromptableModel, targets: Sequence[Target], seeds: int, clicks: int = max(REPORTED_CLICKS)
) -> list[ClickScore]:
    """Click every structure on its whole volume; each image is read once."""
    images = group_by(targets, lambda target: target.case.id).values()
    with _only_warnings("samed3d.inference"):
        return [score for image in images for score in _measure_image(model, image, seeds, clicks)]


@contextmanager
def _only_warnings(name: str) -> Iterator[None]:
    """Without the messages of a session about its crops."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _measure_image(model: PromptableModel, targets: list[Target], seeds: int, clicks: int) -> Iterator[ClickScore]:
    corpus, case = targets[0].corpus, targets[0].case
    volume = corpus_volume(corpus, case)
    for target in targets:
        label = target.label
        mask = np.asarray(corpus.labels(case, label.layer)[:]) == label.value
        name = f"{label.layer}/{label.value} {label.name}".rstrip()
        session = Session(volume, model)
        for seed in range(seeds):
            rng = np.random.default_rng([seed, label.layer, label.value])
            for click, dice in enumerate(dice_by_click(session, volume, mask, clicks, rng, 1 + seed), start=1):
                yield ClickScore(case.id, case.subject, name, seed, click, round(dice, 5))


def compare(
    before: Iterable[ClickScore], after: Iterable[ClickScore], clicks: Sequence[int] = REPORTED_CLICKS
) -> list[DiceChange]:
    """One line per number of clicks, over the measurements that both have."""
    earlier = {score.key: score.dice for score in before}
    pairs = [(score, earlier[score.key]) for score in after if score.key in earlier]
    by_click = group_by(pairs, lambda pair: pair[0].click)
    return [_change(click, by_click[click]) for click in clicks if click in by_click]


def _change(click: int, pairs: list[tuple[ClickScore, float]]) -> DiceChange:
    by_seed = group_by(pairs, lambda pair: pair[0].seed).values()
    changes = [np.mean([score.dice - dice for score, dice in mine]) for mine in by_seed]
    first: dict[Hashable, float] = {s.key: s.dice for s, _ in pairs}
    second: dict[Hashable, float] = {s.key: dice for s, dice in pairs}
    paired = paired_difference(first, second, {s.key: s.subject for s, _ in pairs})
    return DiceChange(
        click=click,
        before=float(np.mean(list(second.values()))),
        after=float(np.mean(list(first.values()))),
        noise=float(np.std(changes, ddof=1)) if len(changes) > 1 else float("nan"),
        low=paired.difference.low,
        high=paired.difference.high,
        improved=paired.better / len(pairs),
    )


def to_markdown(
    changes: Sequence[DiceChange], measured: Sequence[ClickScore], base: str, known: Iterable[tuple[str, str]]
) -> str:
    """The table as a user reads it.

    Args:
        changes: Its lines.
        measured: The scores of one of the models.
        base: Name of the base model.
        known: (subject, what the base model's own training used of it) as ``finetune.exposure_of`` says.
    """
    structures, seeds = len({(s.case, s.structure) for s in measured}), len({s.seed for s in measured})
    subjects = len({s.subject for s in measured})
    lines = [
        f"Mean Dice on whole volumes: {_count(structures, 'structure')} of {_count(subjects, 'held-out subject')}, "
        f"{_count(seeds, 'seed')} of the clicks. Before: `{base}`.",
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
    "trained on": "`{base}` was trained on {subjects}: its Dice before is not that of an unseen subject.",
    "unknown": "Whether `{base}` was trained on {subjects} is unknown: its file does not name all of its sources.",
}
"""What the table says of subjects that the base model may have been trained on."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

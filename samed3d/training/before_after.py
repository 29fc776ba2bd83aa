"""Whether a training helped: the same clicks on the same structures of kept-back subjects, before and after, on whole
volumes.

Each structure is clicked from several seeds of the first click, both models from the same; how much the change differs
from seed to seed says how far it moves by chance of the clicks alone. Not here: what is trained (``finetune.py``),
tables of many models (``evaluation/report.py``).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord
from samed3d.evaluation.statistics import paired_difference
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel
from samed3d.training.validation import Held, click_through

logger = logging.getLogger(__name__)

REPORTED_CLICKS = (1, 3, 5)
NOISE_WIDTH = 2.0
"""A change counts as more than chance of the clicks when it exceeds this many standard deviations of it."""


@dataclass(frozen=True)
class Target:
    """One structure of one image that nobody was trained on."""

    corpus: Corpus
    case: CaseRecord
    label: LabelRecord


@dataclass(frozen=True)
class Score:
    """Dice of one structure after one click; ``structure`` tells those of one image apart, names alone need not."""

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
class Change:
    """One line of the table.

    Attributes:
        click: After how many clicks.
        before: Mean Dice of the start.
        after: Mean Dice of the result.
        noise: Standard deviation of the change over the seeds of the clicks, which both models got alike; nan for one
            seed.
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
        """Whether the change is more than the clicks' seed explains; False where the noise is unknown."""
        return abs(self.change) > NOISE_WIDTH * self.noise


def choose_targets(cases: Sequence[tuple[Corpus, CaseRecord]], count: int, seed: int) -> list[Target]:
    """Up to ``count`` structures, spread evenly over subjects: each gives one in turn, in an order drawn with the
    seed.
    """
    rng = np.random.default_rng(seed)
    of_subject: dict[str, list[Target]] = defaultdict(list)
    for corpus, case in cases:
        of_subject[case.subject] += [Target(corpus, case, label) for label in case.labels]
    drawn = [[targets[i] for i in rng.permutation(len(targets))] for _, targets in sorted(of_subject.items())]
    turns = [
        targets[turn] for turn in range(max(map(len, drawn), default=0)) for targets in drawn if turn < len(targets)
    ]
    return turns[:count]


def measure(
    model: PromptableModel, targets: Sequence[Target], seeds: int, clicks: int = max(REPORTED_CLICKS)
) -> list[Score]:
    """Click every structure on its whole volume; structures of one image are measured together, so that it is read
    once.
    """
    by_case: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        by_case[target.case.id].append(target)
    with _silence("samed3d.inference"):
        return [score for one in by_case.values() for score in _measure_image(model, one, seeds, clicks)]


@contextmanager
def _silence(name: str) -> Iterator[None]:
    """A session tells of every crop that it looks at; here nobody waits for one."""
    talker = logging.getLogger(name)
    level = talker.level
    talker.setLevel(logging.WARNING)
    try:
        yield
    finally:
        talker.setLevel(level)


def _measure_image(model: PromptableModel, targets: list[Target], seeds: int, clicks: int) -> Iterator[Score]:
    corpus, case = targets[0].corpus, targets[0].case
    volume = Held(corpus, case, case.labels).read()
    layers = {layer: np.asarray(corpus.labels(case, layer)[:]) for layer in {t.label.layer for t in targets}}
    for target in targets:
        mask = layers[target.label.layer] == target.label.value
        name = f"{target.label.layer}/{target.label.value} {target.label.name}".rstrip()
        session = Session(volume, model)
        for seed in range(seeds):
            rng = np.random.default_rng([seed, target.label.layer, target.label.value])
            for turn, dice in enumerate(click_through(session, mask, clicks, rng, object_id=1 + seed)):
                yield Score(case.id, case.subject, name, seed, turn + 1, round(dice, 5))


def compare(before: Iterable[Score], after: Iterable[Score], clicks: Sequence[int] = REPORTED_CLICKS) -> list[Change]:
    """One line per number of clicks, over the measurements that both have."""
    first, second = ({s.key: s for s in scores} for scores in (before, after))
    lines = []
    for click in clicks:
        keys = [k for k in first if k in second and k[3] == click]
        if keys:
            lines.append(_change(click, {k: first[k].dice for k in keys}, {k: second[k] for k in keys}))
    return lines


def _change(click: int, before: dict[tuple, float], after: dict[tuple, Score]) -> Change:
    seeds = sorted({key[2] for key in before})
    of_seed = [np.mean([after[k].dice - before[k] for k in before if k[2] == seed]) for seed in seeds]
    noise = float(np.std(of_seed, ddof=1)) if len(seeds) > 1 else float("nan")
    paired = paired_difference(
        {k: s.dice for k, s in after.items()}, dict(before), {k: s.subject for k, s in after.items()}
    )
    return Change(
        click=click,
        before=float(np.mean(list(before.values()))),
        after=float(np.mean([s.dice for s in after.values()])),
        noise=noise,
        low=paired.difference.low,
        high=paired.difference.high,
        improved=paired.better / len(before),
    )


def to_markdown(
    changes: Sequence[Change], measured: Sequence[Score], base: str, known: Iterable[tuple[str, str]]
) -> str:
    """The table as a user reads it.

    Args:
        changes: Its lines.
        measured: The scores of one of the models.
        base: What the start is called.
        known: (subject, what the start's own training knew of it) as ``finetune.exposure_of`` says.
    """
    structures, seeds = len({(s.case, s.structure) for s in measured}), len({s.seed for s in measured})
    subjects = len({s.subject for s in measured})
    lines = [
        f"Mean Dice on whole volumes: {_count(structures, 'structure')} of {_count(subjects, 'kept-back subject')}, "
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
            f"| {c.click} | {c.before:.3f} | {c.after:.3f} | {c.change:+.3f} | {interval} | {noise} | {verdict} | {c.improved:.0%} |"
        )
    lines += ["", *_overlap(base, known)]
    return "\n".join(lines).rstrip() + "\n"


def _overlap(base: str, known: Iterable[tuple[str, str]]) -> list[str]:
    """What must be said of subjects that the start may have learned from: its "before" is too good there."""
    by_answer: dict[str, set[str]] = defaultdict(set)
    for subject, answer in known:
        by_answer[answer].add(subject)
    lines = []
    if trained := sorted(by_answer["trained on"]):
        lines.append(f"`{base}` was trained on {', '.join(trained)}: its Dice before is not that of an unseen subject.")
    if unknown := sorted(by_answer["unknown"]):
        lines.append(
            f"Whether `{base}` was trained on {', '.join(unknown)} is unknown: its file does not name all of its sources."
        )
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

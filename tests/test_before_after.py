"""Which subjects a fine-tuning holds out, and what the table of before and after may claim."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from data_prep.pipeline import cached_corpus
from samed3d.data.corpus import Corpus
from samed3d.training.before_after import ClickScore, choose_targets, compare, is_better, split_subjects, to_markdown
from tests.corpus_sources import make_source


def scores(values: dict[tuple[str, int], float]) -> list[ClickScore]:
    return [ClickScore(f"case of {who}", who, "0/1 a", seed, 1, dice) for (who, seed), dice in values.items()]


def test_the_split_keeps_a_fifth_and_at_least_one_by_subject(tmp_path):
    for cases, kept in ((2, 1), (5, 1), (9, 2)):
        corpus = cached_corpus(make_source(tmp_path / f"set{cases}", cases=cases, first_seed=100 * cases))
        split = split_subjects([corpus], seed=0)
        assert len({c.subject for _, c in split.held_out}) == kept
        assert {c.subject for _, c in split.held_out} & {c.subject for _, c in split.trained} == set()
        assert len(split.held_out) + len(split.trained) == cases
    assert split_subjects([corpus], seed=1).seed != split.seed


def test_targets_are_spread_over_subjects(tmp_path):
    corpus = Corpus(cached_corpus(make_source(tmp_path / "set", cases=3)))
    cases = [(corpus, case) for case in corpus.cases]
    assert [len({t.case.subject for t in choose_targets(cases, n, 0)}) for n in (1, 2, 3)] == [1, 2, 3]
    every = choose_targets(cases, 100, 0)
    assert len(every) == 6 == len({(t.case.id, t.label.value) for t in every})
    assert [t.label.value for t in every] != [t.label.value for t in choose_targets(cases, 100, 3)]


def test_the_table_compares_with_the_chance_of_the_clicks():
    before = scores({("p", 0): 0.4, ("p", 1): 0.5, ("q", 0): 0.2, ("q", 1): 0.3})
    [line] = compare(before, [replace(s, dice=s.dice + (0.35 if s.seed else 0.25)) for s in before])
    assert line.before == pytest.approx(0.35) and line.after == pytest.approx(0.65) and line.improved == 1.0
    assert line.noise == pytest.approx(0.1 / math.sqrt(2))  # the change is 0.25 from one seed, 0.35 from the other
    assert line.beyond_noise and line.low == pytest.approx(0.3) and line.high == pytest.approx(0.3)
    [unsure] = compare(before, [replace(s, dice=s.dice + (0.35 if s.seed else -0.05)) for s in before])
    assert unsure.change == pytest.approx(0.15) and not unsure.beyond_noise
    text = to_markdown([line, unsure], before, "default", [("p", "trained on"), ("q", "unseen source")])
    assert "2 structures of 2 held-out subjects, 2 seeds of the clicks" in text
    assert "| 1 | 0.350 | 0.650 | +0.300 | +0.300 to +0.300 | ± 0.141 | yes | 100% |" in text
    assert (
        "`default` was trained on p: its Dice before is not that of an unseen subject" in text
        and "q" not in text.split("trained on")[1]
    )


def test_one_seed_and_one_subject_claim_nothing():
    before = scores({("p", 0): 0.4})
    [line] = compare(before, [replace(s, dice=0.9) for s in before])
    assert math.isnan(line.noise) and math.isnan(line.low) and not line.beyond_noise
    text = to_markdown([line], before, "default", [("p", "unknown")])
    assert "one subject | one seed | unknown" in text and "Whether `default` was trained on p is unknown" in text


@pytest.mark.parametrize(
    ("rises", "better"),
    [((0.25, 0.35), True), ((0.35, -0.05), False), ((-0.2, -0.2), False), ((0.0, 0.0), False), ((0.3,), False)],
)
def test_the_base_is_beaten_by_more_than_the_chance_of_the_clicks_only(rises, better):
    before = scores({("p", seed): 0.4 for seed in range(len(rises))})
    assert is_better(before, [replace(s, dice=s.dice + rises[s.seed]) for s in before]) == better


def test_one_seed_is_judged_by_the_spread_over_structures():
    before = scores({(who, 0): 0.4 for who in "pqrs"})
    assert is_better(before, [replace(s, dice=s.dice + 0.1 + 0.01 * n) for n, s in enumerate(before)])
    assert not is_better(before, [replace(s, dice=s.dice + (0.2 if n else -0.3)) for n, s in enumerate(before)])

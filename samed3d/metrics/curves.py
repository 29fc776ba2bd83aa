"""What a series of scores, one per click, says as a whole. No mask here: read ``masks.py`` for what a score is."""

from __future__ import annotations

from collections.abc import Sequence


def trapezoid(scores: Sequence[float]) -> float:
    """Area under scores one click apart, in score x clicks: five scores of 1 give 4 (the CVPR 2025 challenge's AUC).

    Raises:
        ValueError: for fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"an area needs at least two scores, got {len(scores)}")
    return float(sum((a + b) / 2 for a, b in zip(scores[:-1], scores[1:], strict=True)))


def area_under_curve(scores: Sequence[float]) -> float:
    """The mean height of the curve: ``trapezoid`` over its width, in the unit of the scores; a single score is its own
    mean.
    """
    return trapezoid(scores) / (len(scores) - 1) if len(scores) > 1 else float(scores[0])


def clicks_to(scores: Sequence[float], quality: float, first_click: int = 1) -> int | None:
    """After how many clicks a score of at least ``quality`` was reached first; None where it never was (a failure).

    Args:
        scores: One per click, in order.
        quality: In the unit of the scores.
        first_click: The number of clicks that the first score stands for: 0 where a box came first.
    """
    return next((number for number, score in enumerate(scores, start=first_click) if score >= quality), None)


def monotone_share(scores: Sequence[float], slack: float = 0.0) -> float | None:
    """The share of further clicks that did not make the score worse by more than ``slack``; None without a further
    click.
    """
    steps = [b >= a - slack for a, b in zip(scores[:-1], scores[1:], strict=True)]
    return sum(steps) / len(steps) if steps else None

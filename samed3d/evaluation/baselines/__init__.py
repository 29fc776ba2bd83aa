"""Methods without training behind the same two calls as ``Session``: what any model must beat, and bounds that no model
can.

``region_growing``, ``fast_marching`` and ``random_walker`` are the classical interactive methods; ``dilated_ball`` and
``threshold_in_box`` controls that hardly look at the image; ``oracle_bound`` knows the truth and loses only what a
coarse output grid loses. Read ``base.py`` for what they share.
"""

from __future__ import annotations

from samed3d.evaluation.baselines.base import ClassicalMethod
from samed3d.evaluation.baselines.controls import DilatedBall, OracleBound, ThresholdInBox
from samed3d.evaluation.baselines.random_walker import RandomWalker
from samed3d.evaluation.baselines.regions import FastMarching, RegionGrowing

__all__ = [
    "BASELINES",
    "ClassicalMethod",
    "DilatedBall",
    "FastMarching",
    "OracleBound",
    "RandomWalker",
    "RegionGrowing",
    "ThresholdInBox",
]

BASELINES: dict[str, type[ClassicalMethod]] = {
    "region_growing": RegionGrowing,
    "fast_marching": FastMarching,
    "random_walker": RandomWalker,
    "dilated_ball": DilatedBall,
    "threshold_in_box": ThresholdInBox,
    "oracle_bound": OracleBound,
}

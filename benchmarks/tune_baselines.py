"""Chooses the constants of the baselines on training subjects: mean Dice after 1 and 3 clicks for every setting.

    python benchmarks/tune_baselines.py --data DATA --out out/tune

Training subjects are those of the default checkpoint's split, so that nothing here was measured on what the baselines
are later compared on. The table that the constants in ``samed3d/evaluation/baselines.py`` follow from is in
``docs/measure.md``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samed3d.evaluation.methods import BaselineMethod  # noqa: E402
from samed3d.evaluation.results import CASES_CSV, read_rows  # noqa: E402
from samed3d.evaluation.run import evaluate  # noqa: E402

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "region_growing": {"multiplier": (0.75, 1.0, 1.25, 1.5, 2.0)},
    "fast_marching": {"reach": (0.1, 0.2, 0.3), "sharpness": (0.1, 0.5)},
    "random_walker": {"reach": (0.1, 0.2, 0.3), "beta": (30.0, 130.0)},
}
CLICKS = (1, 3)


def main() -> None:
    """Measure every setting, best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--limit", type=int, default=1, help="cases per source")
    parser.add_argument("--labels-per-case", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/tune"))
    options = parser.parse_args()
    print("| method | setting | 1 click | 3 clicks | mean |\n|---|---|---|---|---|")
    for method in options.methods:
        names, values = list(GRIDS[method]), itertools.product(*GRIDS[method].values())
        settings = [dict(zip(names, each, strict=True)) for each in values]
        variants = [BaselineMethod(f"{method}@{n}", **setting) for n, setting in enumerate(settings)]
        limits = {"limit": options.limit, "labels_per_case": options.labels_per_case, "surfaces": False}
        rows = read_rows(
            evaluate(
                [options.data], ["default", *variants], options.out / method, clicks=CLICKS, split="train", **limits
            )
            / CASES_CSV
        )
        found = []
        for variant, setting in zip(variants, settings, strict=True):
            means = [
                statistics.fmean(r["dice"] for r in rows if r["model"] == variant.name and r["click"] == c)
                for c in CLICKS
            ]
            found.append((statistics.fmean(means), means, setting))
        for mean, means, setting in sorted(found, key=lambda f: -f[0]):
            shown = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            print(f"| {method} | {shown} | {means[0]:.3f} | {means[1]:.3f} | {mean:.3f} |", flush=True)


if __name__ == "__main__":
    main()

"""Measure how many generated volumes one thread makes per second of processor time. Prints one JSON.

    python benchmarks/synthesis.py --repeats 30

The ratio to a plain elementwise pass of the same volume is given beside the times, so that machines can be compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch

from samed3d.data.random_shapes import KINDS, random_labels
from samed3d.data.synthesis import render, synthetic_case


def seconds_each(make: Callable[[], object], repeats: int) -> float:
    """Mean processor seconds of ``repeats`` calls after one to warm up; other programs on the machine do not count."""
    make()
    start = time.process_time()
    for _ in range(repeats):
        make()
    return (time.process_time() - start) / repeats


def measure(edge: int, repeats: int) -> dict[str, float]:
    """Milliseconds per step for one cube of that edge."""
    shape = (edge, edge, edge)
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=generator)
    pass_s = seconds_each(lambda: plain.mul(1.5).add_(plain), repeats)
    case_s = seconds_each(lambda: synthetic_case(shape, generator), repeats)
    labels, _ = random_labels(shape, generator)
    result = {
        "case_ms": 1e3 * case_s,
        "cases_per_s": 1 / case_s,
        "elementwise_passes_per_case": case_s / pass_s,
        "render_ms": 1e3 * seconds_each(lambda: render(labels, generator), repeats),
        "deform_and_render_ms": 1e3
        * seconds_each(lambda: synthetic_case(shape, generator, labels, deform=True), repeats),
    }
    for kind in KINDS:
        result[f"labels_{kind}_ms"] = 1e3 * seconds_each(partial(random_labels, shape, generator, kind=kind), repeats)
    return {name: round(value, 2) for name, value in result.items()}


def main() -> None:
    """Run for each edge and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {str(edge): measure(edge, options.repeats) for edge in options.edges}
    print(json.dumps({"torch": torch.__version__, "threads": 1, "edges": sizes}, indent=1))


if __name__ == "__main__":
    main()

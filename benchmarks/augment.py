"""Measure augmentation: crops per second of one thread, ours beside torchio's transforms of the same kinds and chances.

    python benchmarks/augment.py --out benchmarks/results/augment.json

Ours and torchio's take the same generated crop and its mask in turns, in processor time, so that other load on the
machine falls on both. Scale and place cost us nothing, since a crop is cut at a fractional step anyway; torchio's
affine is given apart. ``cut`` is that cutting, the work that every sample needs before. Where torchio is not installed,
ours is measured alone and a line says so.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.latency import describe_machine, write_result  # noqa: E402
from samed3d.crops import CropFrame, sample_crop  # noqa: E402
from samed3d.data.augment import augment_intensity, orient  # noqa: E402
from samed3d.data.synthesis import synthetic_case  # noqa: E402

logger = logging.getLogger("augment")

BLUR = 0.2
Way = Callable[[int], object]


def ours(image: torch.Tensor, mask: torch.Tensor, blur: float) -> Way:
    """What ``data/sampling.py`` does to a crop, from a number."""

    def run(number: int) -> object:
        rng, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
        turned, inside, _target = orient([image, torch.ones_like(mask), mask], rng)
        return augment_intensity(turned, inside, generator, blur)

    return run


def torchio_kinds(image: torch.Tensor) -> dict[str, tuple[float, Any]]:
    """torchio's transforms that match ours, each with our chance; made to happen always. Axis order has no match."""
    import torchio

    spread = float(image.std())
    return {
        "flip": (1.0, torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5)),
        "gamma": (0.5, torchio.RandomGamma(log_gamma=(-0.5, 0.5))),
        "inversion": (0.15, torchio.Lambda(lambda x: x.min() + x.max() - x, types_to_apply=[torchio.INTENSITY])),
        "bias": (0.3, torchio.RandomBiasField(coefficients=0.3, order=3)),
        "blur": (BLUR, torchio.RandomBlur(std=(0.5, 1.5))),
        "low_resolution": (0.25, torchio.RandomAnisotropy(downsampling=(1.2, 3.0))),
        "noise": (0.4, torchio.RandomNoise(std=(0.0, 0.3 * spread))),
        "affine": (0.2, torchio.RandomAffine(scales=(0.7, 1.4), degrees=30)),
    }


def torchio_ways(image: torch.Tensor, mask: torch.Tensor) -> dict[str, Way]:
    """Every kind alone, and all of them with their chances, without and with the affine; none where torchio is not
    installed.
    """
    try:
        import torchio
    except ImportError:
        logger.warning("torchio is not installed: ours is measured alone (pip install torchio)")
        return {}

    def way(transform: Any) -> Way:
        def run(number: int) -> object:
            torch.manual_seed(number)  # torchio draws from torch's own generator
            return transform(
                torchio.Subject(
                    image=torchio.ScalarImage(tensor=image[None]), mask=torchio.LabelMap(tensor=mask[None].byte())
                )
            )

        return run

    kinds = torchio_kinds(image)
    chances = [
        torchio.OneOf({kind: chance, torchio.Lambda(lambda x: x): 1 - chance}) for chance, kind in kinds.values()
    ]
    ways = {f"torchio_{name}": way(kind) for name, (_, kind) in kinds.items()}
    return ways | {"torchio": way(torchio.Compose(chances[:-1])), "torchio_with_affine": way(torchio.Compose(chances))}


def measure(edge: int, samples: int) -> dict[str, Any]:
    """Milliseconds of one crop for every way, and ratios to ours with the blur."""
    image, labels = synthetic_case((edge, edge, edge), torch.Generator().manual_seed(0))
    mask = labels > 0
    volume = np.ascontiguousarray(np.pad(image.numpy(), 8).astype(np.float32))
    frame = CropFrame.centred(((edge + 15) / 2,) * 3, (1.07, 0.97, 1.03), (edge, edge, edge))
    ways: dict[str, Way] = {"cut": lambda _number: sample_crop(volume, frame), "ours": ours(image, mask, 0.0)}
    ways |= {"ours_with_blur": ours(image, mask, BLUR)} | torchio_ways(image, mask)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, samples):
        for name, run in ways.items():
            start = time.process_time()
            run(max(number, 0))
            if number >= 0:  # the first warms up
                spent[name].append(time.process_time() - start)
    seconds = {name: statistics.fmean(times) for name, times in spent.items()}
    result: dict[str, Any] = {
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "samples_per_s": {n: 1 / s for n, s in seconds.items()},
    }
    if "torchio" in seconds:
        names = ("torchio", "torchio_with_affine")
        result["ours_times_as_fast_as"] = {name: seconds[name] / seconds["ours_with_blur"] for name in names}
        cut = seconds["cut"]
        result["cut_and_ours_times_as_fast_as_cut_and"] = {
            n: (cut + seconds[n]) / (cut + seconds["ours_with_blur"]) for n in names
        }
    return result


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "augment.json", help="JSON file to write"
    )
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 128], help="edges of the crops in voxels")
    parser.add_argument("--samples", type=int, default=60, help="crops per way")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    result = {
        "machine": describe_machine(),
        "samples": options.samples,
        "crops": {f"{edge}^3": measure(edge, options.samples) for edge in options.edges},
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()

"""All systems, the same budget, the same data, the same judge: one table of size, work, speed, memory and Dice.

    samed3d prepare DATA -o corpus --rules lenient
    python benchmarks/compare_systems.py --corpus corpus --minutes 30 --out out/compare

Each promptable system starts from random weights, is trained through the ordinary trainer for ``--minutes`` (or
``--samples``) on crops of one size around one structure, with one policy of clicks, and then clicks through the same
structures of the same held-back subjects by
``samed3d evaluate``'s click loop. Architectures keep their widths; ViTs of 128^3 are built for the crop of the run,
with smaller patches, so that all see the same voxels (``SMALLER``). ``--samples`` is fair to slow systems,
``--minutes`` to fast ones: say which. Automatic systems answer another question (all classes, no click) and are
measured by ``samed3d evaluate`` on their own. Finished systems are not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samed3d.config import TrainConfig, load_config  # noqa: E402
from samed3d.crops import image_channels  # noqa: E402
from samed3d.data.corpus import GROUP_SEPARATOR, Corpus, in_validation  # noqa: E402
from samed3d.models import create_model, load  # noqa: E402
from samed3d.models.base import PromptableModel, PromptBatch  # noqa: E402
from samed3d.models.inventory import take_inventory  # noqa: E402
from samed3d.training.before_after import REPORTED_CLICKS, choose_targets, measure  # noqa: E402

SMALLER: dict[str, dict[str, Any]] = {
    "sam_med3d_b": {"patch": 8},
    "fast_sam3d": {"patch": 8},
    "samed3d_base": {"patch": 8},
    "samu": {},
    "samu_no_prompt": {"prompt_levels": "none"},
    "samu_bottom": {"prompt_levels": "bottom"},
    "samu_extended": {},
    "samed3d_unet": {},
    "samed3d_tiny": {},
    "samed3d_small": {},
}
"""What is changed beside the input shape; the two ``samu_*`` controls are switches of ``samu``."""
DEFAULT_SYSTEMS = (
    "sam_med3d_b",
    "fast_sam3d",
    "samu",
    "samu_no_prompt",
    "samu_extended",
    "samed3d_unet",
    "samed3d_small",
)
VALIDATION_SHARE = 0.2
REPEATS = 5


def main() -> None:
    """Train and measure what is not there yet, then write the table."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for system in options.systems:
        done = options.out / f"{system}.json"
        if not done.exists():
            # A process of its own, so that its peak of memory is its own.
            worker = multiprocessing.get_context("spawn").Process(
                target=run_system, args=(system, options), daemon=True
            )
            worker.start()
            worker.join()
            if worker.exitcode:
                raise SystemExit(
                    f"{system} failed with exit code {worker.exitcode}; what is finished stays in {options.out}"
                )
        rows.append(json.loads(done.read_text()))
    table = write_table(rows, options)
    (options.out / "table.md").write_text(table)
    sys.stdout.write(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, help="prepared corpora")
    parser.add_argument("--systems", nargs="+", default=list(DEFAULT_SYSTEMS), choices=sorted(SMALLER), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=0.0, help="training time of each system")
    parser.add_argument("--samples", type=int, default=0, help="training samples of each system, instead of --minutes")
    parser.add_argument("--crop", type=int, default=48, help="edge of the crops in voxels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cases", type=int, default=12, help="held-back images to click through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    options = parser.parse_args()
    if (options.minutes > 0) == (options.samples > 0):
        parser.error("give one of --minutes and --samples, above 0")
    if options.crop < 16 or options.crop % 16:
        parser.error(f"--crop must be a multiple of 16, got {options.crop}")
    return options


def run_system(system: str, options: argparse.Namespace) -> None:
    """Train one system, measure it and write its row."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_of(system, options)
    model = create_model(config.model.name, **config.model.overrides)
    assert isinstance(model, PromptableModel)
    with torch.device("meta"):
        inventory = take_inventory(create_model(config.model.name, **config.model.overrides))
    row: dict[str, Any] = {"system": system, "trained": inventory.trained}
    row |= {"gflop_encode": inventory.encode_flops / 1e9, "gflop_decode": inventory.decode_flops / 1e9}
    row["encode_ms"], row["decode_ms"] = click_times(model)
    del model
    from samed3d.training.loop import train

    began = time.monotonic()
    folder = train(config, quiet=True)
    row["minutes"] = (time.monotonic() - began) / 60
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "samples_per_s" in line]
    row["samples"] = options.batch * (steps[-1]["step"] if steps else 0)
    row["s_per_sample"] = 1 / statistics.median(line["samples_per_s"] for line in steps) if steps else None
    row |= judge(load(folder / "model.safetensors"), options)
    partial = options.out / f"{system}.json.part"
    partial.write_text(json.dumps(row, indent=1) + "\n")
    partial.rename(options.out / f"{system}.json")


def config_of(system: str, options: argparse.Namespace) -> TrainConfig:
    """The same run for all but for the network; ``--minutes`` is a limit on a long flat run."""
    name = "samu" if system in ("samu_no_prompt", "samu_bottom") else system
    overrides = {"input_shape": [options.crop] * 3, **SMALLER[system]}
    steps = options.samples // options.batch if options.samples else 1_000_000
    settings = {
        "model.name": name,
        "model.overrides": json.dumps(overrides),
        "data.corpus": json.dumps(options.corpus),
        "data.synthetic_share": 0,
        "data.crop": json.dumps([options.crop] * 3),
        "data.validation_share": VALIDATION_SHARE,
        "clicks.interactions": 3,
        "clicks.box_probability": 0,
        "clicks.mask_only_probability": 0,
        "loss.iou": 0,
        "optim.lr": options.lr,
        "optim.batch": options.batch,
        "optim.schedule": "constant",
        "optim.warmup_steps": 10,
        "optim.steps": max(steps, 10),
        "optim.max_minutes": options.minutes,
        "run.folder": str(options.out / "runs" / system),
        "run.seed": options.seed,
        "run.log_every": 5,
        "run.ema": 0.98,
        "run.save_every": 0,
    }
    return load_config(TrainConfig, None, [f"{key}={value}" for key, value in settings.items()])


@torch.inference_mode()
def click_times(model: PromptableModel) -> tuple[float, float]:
    """Median milliseconds to encode a crop and to decode a click, in this process, on the CPU."""
    model = model.eval()
    image = torch.randn(1, image_channels(model.spec.normalisation), *model.spec.input_shape_zyx)
    click = PromptBatch(torch.full((1, 1, 3), 8.0), torch.ones(1, 1, dtype=torch.int64))
    seconds: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        features = model.encode(image)
        middle = time.perf_counter()
        model.decode(features, click)
        seconds.append((middle - start, time.perf_counter() - middle))
    encode, decode = zip(*seconds[1:], strict=True)
    return 1e3 * statistics.median(encode), 1e3 * statistics.median(decode)


def judge(model: PromptableModel, options: argparse.Namespace) -> dict[str, Any]:
    """Mean Dice on whole volumes of held-back subjects after 1, 3 and 5 clicks; the same structures and first clicks
    for every system.
    """
    held = []
    for folder in options.corpus:
        corpus = Corpus(Path(folder))
        for case in corpus.cases:
            names = {case.subject, *filter(None, case.split_group.split(GROUP_SEPARATOR))}
            if case.has_image and any(in_validation(name, VALIDATION_SHARE, 0) for name in names):
                held.append((corpus, case))
    scores = measure(model, choose_targets(held, options.cases, options.seed), seeds=1)
    dice = {click: [s.dice for s in scores if s.click == click] for click in REPORTED_CLICKS}
    return {
        "dice": {click: statistics.fmean(values) for click, values in dice.items() if values},
        "structures": len({(s.case, s.structure) for s in scores}),
        "subjects": len({s.subject for s in scores}),
    }


def write_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: one line per system."""
    budget = f"{options.samples} samples" if options.samples else f"{options.minutes:g} minutes"
    heads = [
        "system",
        "trained parameters",
        "encode GFLOP",
        "decode GFLOP",
        "encode ms",
        "decode ms",
        "s per sample",
        "peak MiB",
    ]
    heads += ["samples", *(f"Dice, {click} click{'s' if click > 1 else ''}" for click in REPORTED_CLICKS)]
    first = rows[0]
    lines = [
        f"From random weights, {budget} each, crops of {options.crop}^3, batch {options.batch}, rate {options.lr:g}, seed {options.seed}; "
        f"judged on {first['structures']} structures of {first['subjects']} held-back subjects. {torch.get_num_threads()} threads.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        step = "-" if row["s_per_sample"] is None else f"{row['s_per_sample']:.2f}"
        cells = [row["system"], f"{row['trained']:,}", f"{row['gflop_encode']:.1f}", f"{row['gflop_decode']:.1f}"]
        cells += [
            f"{row['encode_ms']:.0f}",
            f"{row['decode_ms']:.0f}",
            step,
            f"{row['peak_mib']:.0f}",
            str(row["samples"]),
        ]
        cells += [f"{row['dice'][str(click)]:.3f}" for click in REPORTED_CLICKS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

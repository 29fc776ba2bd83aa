"""What each part of the default checkpoint's recipe is worth: one change at a time, the same samples, the same judge.

    samed3d prepare DATA -o corpus --rules lenient
    python benchmarks/ablate.py --corpus corpus --data DATA --samples 3000 --out out/ablate

Every row of ``ROWS`` is a run of the ordinary trainer from random weights, then ``samed3d evaluate``'s protocol on
whole volumes: unseen subjects of the sources that were trained on, and whole sources that were left out. Small budgets
say what learns faster, not what is best in the end; the row with another seed says how much of a difference is chance.
Finished rows are not done again; ``table.md`` is made anew after each.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samed3d.config import TrainConfig, load_config  # noqa: E402
from samed3d.evaluation.run import evaluate  # noqa: E402
from samed3d.training.loop import train  # noqa: E402

GROUPS = ("unseen subject", "held-out source")
CLICKS = (1, 3, 5)


def unet(**overrides: Any) -> dict[str, Any]:
    """Overrides of the default architecture, beside the run's crop."""
    return {"model.overrides": overrides}


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": (
        "the recipe: U-Net, real and a quarter generated, crops that follow the object, all clicks, boxes, Muon",
        {},
    ),
    "seed": ("the same with another seed (chance)", {"run.seed": 1}),
    "real": ("real volumes only", {"data.synthetic_share": 0}),
    "generated": ("generated volumes only", {"data.synthetic_share": 1, "data.corpus": []}),
    "half_generated": ("half of the samples generated", {"data.synthetic_share": 0.5}),
    "spacing": ("crops of 2 mm voxels instead of the object's scale", unet(spacing_mm=2.0) | {"data.spacing_mm": 2.0}),
    "newest": ("only the newest click and the earlier mask", unet(click_memory="newest")),
    "no_boxes": ("no boxes in training", {"clicks.box_probability": 0}),
    "mixed_clicks": ("later clicks at the middle of errors too, masks known in windows", {}),
    "no_similarity": ("nothing sampled under the clicks on fine grids", unet(similarity_heads=[0, 0, 0])),
    "similarity_fine": ("what lies under the clicks compared on the finest grid too", unet(similarity_heads=[8, 8, 8])),
    "no_joint": ("no attention between prompts and voxels", unet(joint_blocks=0)),
    "coarse_mask": ("mask logits at half resolution, interpolated", unet(mask_stride=2)),
    "samu": ("SAMU's multi-scale prompt attention (samu_extended)", {"model.name": "samu_extended"}),
    "vit": ("a ViT (samed3d_small), half the rate", {"model.name": "samed3d_small", "optim.lr": 5e-4}),
    "adamw": ("AdamW instead of Muon", {"optim.name": "adamw", "optim.lr": 1e-3, "optim.betas": [0.9, 0.999]}),
}
"""Name to what it is and what it changes."""
ROWS["mixed_clicks"][1].update(
    {"clicks.policy": "mixed", "clicks.mask_only_probability": 0.2, "clicks.window_probability": 0.7}
)


def main() -> None:
    """Train and judge what is not there yet, then write the table."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        done = options.out / f"{name}.json"
        if done.exists():
            continue
        logging.info("%s: %s", name, ROWS[name][0])
        body = json.dumps(run_row(name, options), indent=1)
        partial = done.with_suffix(".json.part")
        partial.write_text(body + "\n")
        partial.rename(done)
        (options.out / "table.md").write_text(write_table(options))
    sys.stdout.write(write_table(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a prepared corpus")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of labelled volumes to judge on: the corpus or its sources"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=3000, help="training samples of each row")
    parser.add_argument("--crop", type=int, default=32, help="edge of the crops in voxels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, default=2, help="cases per source to judge on")
    parser.add_argument("--labels-per-case", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    return parser.parse_args()


def run_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row and judge it: its settings, its time, and mean Dice by group and click."""
    config = config_of(name, options)
    began = time.monotonic()
    folder = train(config, quiet=True)
    minutes = (time.monotonic() - began) / 60
    limits = {"limit": options.limit, "labels_per_case": options.labels_per_case, "surfaces": False}
    judged = evaluate(
        [options.data], [str(folder / "model.safetensors")], options.out / "judged" / name, clicks=CLICKS, **limits
    )
    results = json.loads((judged / "results.json").read_text())
    lines = [line for line in results["summary"] if line["by"] == "group"]
    dice = {line["value"]: [one["dice"] for one in lines if one["value"] == line["value"]] for line in lines}
    counts = {line["value"]: [line["subjects"], line["measurements"]] for line in lines}
    samples = config.optim.batch * config.optim.steps
    return {
        "row": name,
        "changed": ROWS[name][1],
        "samples": samples,
        "minutes": minutes,
        "dice": dice,
        "counts": counts,
    }


def config_of(name: str, options: argparse.Namespace) -> TrainConfig:
    """``configs/default.yaml`` at the size of this run, without what ``mixed_clicks`` adds, changed as the row says."""
    changed = dict(ROWS[name][1])
    overrides = {"input_shape": [options.crop] * 3, **changed.pop("model.overrides", {})}
    settings: dict[str, Any] = {
        "model.overrides": overrides,
        "data.corpus": [options.corpus],
        "data.crop": [options.crop] * 3,
        "data.workers": 0,
        "clicks.interactions": 3,
        "clicks.policy": "uniform",
        "clicks.mask_only_probability": 0.1,
        "clicks.window_probability": 0,
        "optim.lr": options.lr,
        "optim.batch": options.batch,
        "optim.steps": options.samples // options.batch,
        "run.folder": str(options.out / "runs" / name),
        "run.ema": 0.98,
        "run.save_every": 0,
    }
    written = [f"{key}={json.dumps(value)}" for key, value in (settings | changed).items()]
    return load_config(TrainConfig, ROOT / "configs/default.yaml", written)


def write_table(options: argparse.Namespace) -> str:
    """Markdown: one line per finished row, with the difference from the base."""
    rows = [json.loads(path.read_text()) for name in options.rows if (path := options.out / f"{name}.json").exists()]
    heads = ["changed", "minutes", *(f"{group}, {click}" for group in GROUPS for click in CLICKS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            ROWS[row["row"]][0],
            f"{row['minutes']:.1f}",
            *(f"{value:.3f}" for group in GROUPS for value in row["dice"][group]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

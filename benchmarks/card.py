"""Tables and pictures of the default checkpoint's card, from saved runs of ``samed3d evaluate``.

    python benchmarks/card.py --clicks out/clicks --box out/box --controls out/controls
    python benchmarks/card.py --page
    python benchmarks/card.py --images ../shared/data

The card names the commands that made the three folders. Writes ``benchmarks/results/default_evaluation.json``, the
head and the measured blocks of ``checkpoints/README.md``, and ``docs/images/default_{typical,worst}.png``, for which
the model gets the saved prompts again. ``--page`` makes head and blocks from the JSON that is there. ``--images``
writes the hashes of the images that ``default`` was trained on into ``checkpoints/manifest.json``, by which they are
known again under any name.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from collect import ROOT, parser_of
from tables import Body, markdown, origin, replace_blocks

from samed3d.data.corpus import image_hash
from samed3d.data.exposure import TrainingHistory
from samed3d.drawing import BACKGROUND, png_bytes
from samed3d.evaluation.cases import find_cases
from samed3d.evaluation.pictures import Replay, case_png
from samed3d.evaluation.results import (
    Row,
    SavedRun,
    by_model,
    curves,
    grouped,
    modality_class,
    prompt_key,
    read_run,
    size_class,
    size_order,
    untrained,
)
from samed3d.evaluation.statistics import FALL, Estimate, click_curve, estimate
from samed3d.metrics import dice
from samed3d.models.weights import read_header
from samed3d.output import write_bytes, write_json, write_text
from samed3d.pages import count
from samed3d.volume import read_volume

MANIFEST = ROOT / "checkpoints/manifest.json"
CARD, RESULT = ROOT / "checkpoints/README.md", ROOT / "benchmarks/results/default_evaluation.json"
IMAGES = ROOT / "docs/images"
CLICKS = (1, 3, 5, 10)
AIMS = {"unseen subject": (0.75, None, 0.85, 0.88), "held-out source": (0.55, None, 0.72, 0.80)}
BOX_AIM = 0.78
BLOCKS = ("aims", "behaviour", "controls", "modalities", "sizes", "sources")
SHOWN = 5  # data sets in each picture


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--clicks", type=Path, help="results folder: default, clicks only, several seeds")
    parser.add_argument("--box", type=Path, help="results folder: default, a box first")
    parser.add_argument("--controls", type=Path, help="results folder: default, control without a prompt, baselines")
    parser.add_argument("--page", action="store_true", help="only make the card's blocks from the JSON that is there")
    parser.add_argument("--images", type=Path, help="folder of the data sets that default was trained on")
    options = parser.parse_args()
    if options.images:
        manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
        manifest["checkpoints"]["default"]["training_images"] = training_images(options.images)
        write_json(MANIFEST, manifest)
        return
    if not options.page:
        if None in (options.clicks, options.box, options.controls):
            parser.error("give --clicks, --box and --controls, or --page")
        runs = {name: read_run(getattr(options, name)) for name in ("clicks", "box", "controls")}
        write_json(RESULT, body_of(runs))
        draw(runs["clicks"])
    write_text(CARD, card_with_blocks(CARD.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8"))))


def training_images(data: Path) -> dict[str, str]:
    """Hash to ``SOURCE/SUBJECT`` of the training images of ``default``, without those it held out under other names."""
    history = TrainingHistory.of_header(read_header(ROOT / "checkpoints/default.safetensors"))
    trained, others = (find_cases([data], history, side).cases for side in ("train", "val"))
    held = {image_hash(read_volume(case.image_path).array) for case in others}
    found = {image_hash(read_volume(case.image_path).array): f"{case.source}/{case.subject}" for case in trained}
    return {image: name for image, name in sorted(found.items(), key=lambda item: item[1]) if image not in {*held, ""}}


# Numbers


def body_of(runs: dict[str, SavedRun]) -> Body:
    """Everything that the card shows, and how it was measured."""
    rows = untrained(runs["clicks"].rows)
    box = [row for row in untrained(runs["box"].rows) if row["click"] == 0]
    controls = [r for r in untrained(runs["controls"].rows) if (r["protocol"], r["prompt"]) == ("samed3d", "click")]

    def group(row: Row) -> str:
        return str(row["group"])

    def source(row: Row) -> str:
        return row["source"] + (" (held out)" if row["group"] == "held-out source" else "")

    def curves_by(part: Callable[[Row], str], order: Callable[[str], Any] | None = None) -> Body:
        return {key: curve_of(mine) for key, mine in grouped(rows, part, order).items()}

    return {
        "commands": {name: without_paths(run.results.get("command", "")) for name, run in runs.items()},
        "revisions": {name: run.results["revision"] for name, run in runs.items()},
        "environment": runs["clicks"].results["environment"],
        "group": curves_by(group),
        "modality": curves_by(modality_class),
        "size": curves_by(size_class, size_order),
        "source": curves_by(source),
        "seeds": len({row["seed"] for row in rows}),
        "by_seed": {key: seed_means(mine) for key, mine in grouped(rows, group).items()},
        "behaviour": behaviour(rows),
        "box": {key: number_of(estimate(mine, "dice")) for key, mine in grouped(box, group).items()},
        "controls": {
            key: {model: curve_of(own) for model, own in by_model(mine).items()}
            for key, mine in grouped(controls, group).items()
        },
    }


def without_paths(command: str) -> str:
    """A command with DATA for the folders that it reads."""
    words = command.split()
    writes = {"-o", "--output"}
    shown = ["DATA" if Path(word).is_dir() and before not in writes else word for before, word in pairwise(words)]
    return " ".join(words[:1] + shown)


def curve_of(rows: Sequence[Row]) -> Body:
    """Structures, subjects and Dice after each reported click."""
    curve = {click: found for click, found in click_curve(rows).items() if click in (0, *CLICKS)}
    return {
        "structures": len({(row["source"], row["case"], row["label"]) for row in rows}),
        "subjects": next(iter(curve.values())).subjects if curve else 0,
        "dice": {str(click): number_of(found) for click, found in curve.items()},
    }


def seed_means(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Mean Dice after each reported click, one number per seed."""
    by_seed = [click_curve([row for row in rows if row["seed"] == n]) for n in sorted({row["seed"] for row in rows})]
    clicks = [click for click in CLICKS if all(click in curve for curve in by_seed)]
    return {str(click): [round(curve[click].mean, 4) for curve in by_seed] for click in clicks}


def number_of(found: Estimate) -> Body:
    """A mean with its interval over subjects; null for one subject alone."""
    ends = None if math.isnan(found.low) else [round(found.low, 4), round(found.high, 4)]
    counts = {"subjects": found.subjects, "measurements": found.measurements}
    return {"mean": round(found.mean, 4), "interval": ends} | counts


def behaviour(rows: Sequence[Row]) -> Body:
    """Whether clicks are obeyed, what negative ones do, and how often a click makes things worse."""
    given = [row for row in rows if row.get("obeyed") is not None and row["seconds"]]
    negative = [row for row in given if row["positive"] == 0]
    steps = [b["dice"] - a["dice"] for curve in curves(rows) for a, b in pairwise(curve)]
    return {
        "clicks": len(given),
        "obeyed": sum(row["obeyed"] for row in given) / len(given),
        "negative clicks": len(negative),
        "negative clicks that added volume": sum(row["added_voxels"] > 0 for row in negative),
        "steps": len(steps),
        "steps that lowered Dice by more than 0.01": sum(step < -FALL for step in steps),
    }


# The card


def card_with_blocks(card: str, body: Body) -> str:
    """The card with its head and each block made again."""
    text = replace_blocks(card.partition("\n---\n")[2] or card, BLOCKS, lambda name: block(name, body))
    return f"---\n{head(card, body)}---\n{text}"


def head(card: str, body: Body) -> str:
    """What Hugging Face reads: library, task, licence, the sources of the card's table, and the measured Dice."""
    results = []
    for group in AIMS:
        means = {count(n, "click"): body["group"][group]["dice"][str(n)]["mean"] for n in CLICKS}
        metrics = [{"type": "dice", "name": f"Dice after {name}", "value": mean} for name, mean in means.items()]
        task = {"type": "image-segmentation", "name": "interactive 3D segmentation"}
        results.append({"task": task, "dataset": {"type": "volumes", "name": group}, "metrics": metrics})
    about = {
        "library_name": "samed3d",
        "pipeline_tag": "image-segmentation",
        "license": "apache-2.0",
        "tags": ["medical", "segmentation", "3d", "interactive", "promptable"],
        "datasets": re.findall(r"^\| `(\w+)` \|", card.partition("| source | licence |")[2], flags=re.MULTILINE),
        "model-index": [{"name": "samed3d default", "results": results}],
    }
    return str(yaml.safe_dump(about, sort_keys=False))


def block(name: str, body: Body) -> str:
    """One block of the card."""
    return markdown(name, body, AIMS=AIMS, BOX_AIM=BOX_AIM, CLICKS=CLICKS, origin_of=origin_of)


def origin_of(body: Body, *names: str) -> str:
    """The commands of some of the runs, and the machine."""
    commands, revisions = ([body[key][name] for name in names] for key in ("commands", "revisions"))
    return origin(commands, revisions, body["environment"])


# Pictures


def draw(run: SavedRun) -> None:
    """Typical and worst structures of several data sets, after 1 and after 5 clicks."""
    structures = [curve[0] | {"last": curve[:5][-1]["dice"]} for curve in curves(untrained(run.rows))]
    structures.sort(key=lambda row: row["last"])
    by_source = list(grouped(structures, lambda row: str(row["source"])).values())
    largest = sorted(by_source, key=lambda rows: -len({row["subject"] for row in rows}))
    chosen = {
        "typical": [rows[len(rows) // 2] for rows in largest[:SHOWN]],
        "worst": sorted((rows[0] for rows in by_source), key=lambda row: row["last"])[:SHOWN],
    }
    lines = {prompt_key(line): line for line in run.prompt_lines()}
    for name, rows in chosen.items():
        write_bytes(IMAGES / f"default_{name}.png", _sheet([lines[prompt_key(row)] | {"row": row} for row in rows]))


def _sheet(lines: Sequence[Body]) -> bytes:
    """One row per structure: three planes after 1 click, three after 5, with names and Dice."""
    from PIL import Image, ImageDraw

    replay, panels = Replay(), []
    for line in lines:
        name = f"{line['source']}, {line['row']['name'] or line['label']}"
        for clicks in (1, 5):
            again = replay(line | {"turns": [turn for turn in line["turns"] if turn["click"] <= clicks]})
            picture = Image.open(io.BytesIO(case_png(again.volume, again.truth, again.mask, again.prompts)))
            panels.append((f"{name}: {count(clicks, 'click')}, Dice {dice(again.mask, again.truth):.2f}", picture))
    width, height = panels[0][1].size
    sheet = Image.new("RGB", (2 * width + 12, (len(panels) // 2) * (height + 22)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, (title, panel) in enumerate(panels):
        x, y = number % 2 * (width + 12), number // 2 * (height + 22)
        pen.text((x + 4, y + 4), title, fill=(220, 220, 220))
        sheet.paste(panel, (x, y + 20))
    return png_bytes(sheet.quantize(192))


if __name__ == "__main__":
    main()

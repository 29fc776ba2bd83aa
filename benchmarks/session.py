"""Measure what a session costs on a real volume: prompts, undo, redo, opening after a kill. Prints one JSON and writes
it to a file.

    SAMED3D_DATA=DIR python benchmarks/session.py --out benchmarks/results/session.json

Times are medians in one run; the ratios are to a later click in the same place, which is one decode and one write to
the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samed3d.clicks import next_click  # noqa: E402
from samed3d.geometry import zyx_to_ijk  # noqa: E402
from samed3d.inference.session import Session  # noqa: E402
from samed3d.models import load  # noqa: E402
from samed3d.prompts import Point, Scribble  # noqa: E402
from samed3d.volume import read_volume  # noqa: E402
from samed3d.volume.label_maps import read_label_map  # noqa: E402

CASES = ("chaos_ct_liver", "totalseg_mr_example", "itksnap_mricrop")
CLICKS = 10


def timed(run: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def click(session: Session, target: np.ndarray) -> float | None:
    """The next click of the centre rule; its seconds, or None where the mask is perfect."""
    mask = session.mask_of(1).astype(bool) if session.objects() else np.zeros_like(target)
    found = next_click(mask, target, "centre")
    if found is None:
        return None
    return timed(lambda: session.add(Point(zyx_to_ijk(found[0]), found[1])))


def one_case(folder: Path, network: Any, scratch: Path) -> dict[str, Any]:
    """Figures of one volume: its largest structure, clicked ten times."""
    label = sorted((folder / "labelsTr").glob("*.nii.gz"))[0]
    image = folder / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz")
    labels, _ = read_label_map(label)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    target = labels == counts.argmax()
    volume, journal = read_volume(image), scratch / f"{folder.name}.jsonl"
    session = Session.open(volume, network, "cpu", journal=journal)
    seconds = [s for s in (click(session, target) for _ in range(CLICKS)) if s is not None]
    undo = [timed(session.undo) for _ in range(len(seconds) - 1)]
    redo = [timed(session.redo) for _ in range(len(undo))]
    expected = session.logits_of(1)
    middle = session.objects()[0].prompt_ids[len(seconds) // 2]
    remove = timed(lambda: session.remove(middle))
    session.undo()
    i, j, k = session.objects()[0].prompts[0].at  # type: ignore[union-attr]
    scribble = timed(lambda: session.add(Scribble(((i, j, k), (i + 5, j, k)))))
    session.undo()
    suggest, mask = timed(session.suggest_click), timed(lambda: session.mask)
    session.close()
    opened: list[Session] = []
    replay = timed(lambda: opened.append(Session.open(volume, network, "cpu", journal=journal)))
    same = bool(np.array_equal(opened[0].logits_of(1), expected))
    opened[0].close()
    later = statistics.median(seconds[1:])
    body = {
        "size_ijk": volume.grid.size_ijk,
        "clicks": len(seconds),
        "seconds": {
            "first click": seconds[0],
            "later click": later,
            "undo": statistics.median(undo),
            "redo": statistics.median(redo),
        },
        "same after opening again": same,
    }
    body["seconds"] |= {
        "remove a prompt in the middle": remove,
        "scribble": scribble,
        "suggest_click": suggest,
        "mask": mask,
    }
    body["seconds"] |= {"open again, all prompts replayed": replay}
    body["ratio to a later click"] = {name: round(value / later, 3) for name, value in body["seconds"].items()}
    body["seconds"] = {name: round(value, 4) for name, value in body["seconds"].items()}
    return body


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Path(os.environ.get("SAMED3D_DATA") or ROOT.parent / "shared" / "data")
    network = load(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        cases = {name: one_case(data / name, network, Path(scratch)) for name in CASES if (data / name).is_dir()}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    body = {"model": options.model, "threads": options.threads, "machine": machine, "cases": cases}
    text = json.dumps(body, indent=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

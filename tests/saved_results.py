"""A results folder written by hand, with the columns of ``evaluation/results.py``, small enough to compute on paper."""

import json
from pathlib import Path

from samed3d.evaluation.results import write_lines, write_rows

SCORES = {"ours": (0.3, 0.6, 0.9), "theirs": (0.2, 0.4, 0.6)}
SETTINGS = {
    "split": "val",
    "seeds": 1,
    "clicks": [1, 2, 3],
    "kept_from": {"validation_share": 0.2, "seed": 0, "hold_out": ["b"]},
}


def make_rows(
    scores=SCORES, subjects=8, group="unseen subject", protocol="samed3d", policy="centre", shift=0.0, **more
):
    """Rows of some models on one structure of each subject: subject n scores n hundredths more at every click."""
    rows = []
    for model, curve in scores.items():
        for subject in range(subjects):
            for click, value in enumerate(curve, start=1):
                score = min(1.0, value + shift + 0.01 * subject)
                rows.append(
                    {
                        "model": model,
                        "protocol": protocol,
                        "group": group,
                        "source": "a" if subject % 2 == 0 else "b",
                        "case": f"case{subject}",
                        "subject": f"p{subject}",
                        "modality": "CT (with contrast)" if subject % 2 == 0 else "MR, T1",
                        "label": 1,
                        "name": "liver <left>",
                        "voxels": 10 ** (2 + subject % 3),
                        "volume_ml": 0.5 * 10 ** (subject % 3),
                        "seed": 0,
                        "policy": policy,
                        "prompt": "click",
                        "click": click,
                        "dice": round(score, 6),
                        "nsd": round(score / 2, 6),
                        "hd95_mm": 10.0 - 5 * score,
                        "obeyed": 1,
                        "seconds": 0.5 if click == 1 else 0.05,
                    }
                    | more
                )
    return rows


def save_run(folder: Path, rows, settings=SETTINGS, **results) -> Path:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "cases.csv", rows)
    body = {
        "settings": settings,
        "environment": {"torch": "2.x", "threads": 3},
        "command": "samed3d evaluate DATA -o out",
        "revision": "abc123",
    }
    (folder / "results.json").write_text(json.dumps(body | results))
    return folder


def save_prompts(folder: Path, lines) -> None:
    """Write ``prompts.jsonl``."""
    write_lines(folder / "prompts.jsonl", lines)

"""``samed3d evaluate``: every case by every model under every protocol, in as many processes as asked, picked up again
where it stopped.

Each finished case is a file in ``parts/`` until all are there; then they become ``cases.csv``, ``prompts.jsonl`` and
``results.json`` (``rows.py`` says what is in them). A folder holds one configuration: its hash covers the models'
weights, the protocols, the settings and the cases. Read ``measuring.py`` for what happens to a case.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import samed3d
from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES, longest_edge_mm
from samed3d.evaluation.cases import LabelledCase, Split, find_cases
from samed3d.evaluation.measuring import Ask, fits, measurable
from samed3d.evaluation.methods import Method, method_of
from samed3d.evaluation.protocols import PROTOCOLS, AnyProtocol, protocol_of
from samed3d.evaluation.protocols.samed3d import POLICIES, PROMPTS
from samed3d.evaluation.results import CASES_CSV, FIELDS, PROMPTS_JSONL, RESULTS_JSON, write_lines, write_rows
from samed3d.evaluation.statistics import score_series, summarise
from samed3d.evaluation.workers import Job, measure_cases
from samed3d.models.weights import find_checkpoint, read_header
from samed3d.output import only_writer
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)

QUICK_CASES = 6
PARTS, SETTINGS_JSON = "parts", "settings.json"

__all__ = ["FIELDS", "evaluate", "summarise"]


def evaluate(
    data: Sequence[Path],
    models: Sequence[str | Method],
    out: Path,
    *,
    clicks: Sequence[int] = (1, 3, 5),
    seeds: int = 1,
    split: str = "val",
    limit: int | None = None,
    labels_per_case: int | None = None,
    protocols: Sequence[str] = ("samed3d",),
    policies: Sequence[str] = ("centre",),
    prompts: Sequence[str] = ("click",),
    processes: int = 1,
    device: str = "auto",
    tolerance_mm: float = 2.0,
    surfaces: bool = True,
    quick: bool = False,
    progress: bool = False,
) -> Path:
    """Measure models on labelled volumes.

    Args:
        data: nnU-Net folders, corpora, folders of challenge npz files, or folders of these.
        models: What ``method_of`` understands, ``"baselines"`` for all of them, or methods of your own (one
            process only).
        out: Folder for the results; one that holds a part of this very configuration is continued.
        clicks: Click counts to report; the largest is how many are given where the protocol does not say.
        seeds: Repetitions with other clicks.
        split: ``"val"``, ``"train"`` or ``"all"``; the split is the one stored in the first checkpoint that has one.
        limit: Cases per source.
        labels_per_case: Structures per case, drawn with a fixed seed; None takes all.
        protocols: Names of ``PROTOCOLS``, or ``"all"``.
        policies: Users of the ``samed3d`` protocol, or ``"all"``.
        prompts: First prompts of the ``samed3d`` protocol, or ``"all"``.
        processes: How many at once; GPUs are given to them in turn.
        device: Of networks.
        tolerance_mm: Of the surface Dice.
        surfaces: Whether surface Dice and HD95 are measured.
        quick: Small cases of six sources, one structure each.
        progress: Show a progress bar.

    Returns:
        ``out``.

    Raises:
        InputError: if nothing can be measured, or ``out`` holds results of another configuration.
    """
    names = _each_once(models)
    used = tuple(PROTOCOLS if "all" in protocols else dict.fromkeys(protocols))
    chosen = [tuple(known if "all" in given else given) for given, known in ((policies, POLICIES), (prompts, PROMPTS))]
    ask = Ask(
        max(clicks),
        seeds,
        chosen[0],
        chosen[1],
        1 if quick else labels_per_case,
        tolerance_mm=tolerance_mm,
        surfaces=surfaces,
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    methods = [method_of(name, device) if isinstance(name, str) else name for name in names]
    names, methods = _suited(names, methods, "baselines" in models, [protocol_of(name) for name in used], ask)
    pairs = measurable(methods, [protocol_of(name) for name in used], ask)
    kept_from = _split_of([name for name in names if isinstance(name, str)])
    cases = find_cases(list(data), kept_from, split, limit)
    job = Job(
        tuple(_smallest(cases) if quick else cases),
        tuple(methods),
        tuple(names),
        used,
        pairs,
        ask,
        out / PARTS,
        device,
    )
    _run(job, _settings(job, clicks, split, kept_from), clicks, processes, progress)
    return out


def _run(job: Job, settings: dict[str, Any], clicks: Sequence[int], processes: int, progress: bool) -> None:
    out = job.parts.parent
    if _is_finished(out, settings):
        logger.info("already measured with these settings: %s", out)
        return
    with only_writer(job.parts):
        measure_cases(job, processes, progress)
        _merge(job, settings, clicks, processes)


def _each_once(models: Sequence[str | Method]) -> list[str | Method]:
    """With ``"baselines"`` written out."""
    names = [n for name in models for n in (BASELINES if name == "baselines" else [name])]
    if doubled := {str(n) for n in names if names.count(n) > 1}:
        raise InputError(f"models must be given once each, got {', '.join(sorted(doubled))} twice")
    return names


def _suited(
    names: list[str | Method], methods: list[Method], as_group: bool, protocols: list[AnyProtocol], ask: Ask
) -> tuple[list[str | Method], list[Method]]:
    """Without those baselines that these prompts do not suit, where they were asked for as a group."""
    unsuited = {c.name for c in methods if as_group and c.name in BASELINES and not fits(c, protocols, ask)}
    return [n for n in names if n not in unsuited], [c for c in methods if c.name not in unsuited]


def _settings(job: Job, clicks: Sequence[int], split: str, kept_from: Split) -> dict[str, Any]:
    """What makes results what they are, with its hash."""
    settings: dict[str, Any] = {
        "models": {c.name: c.fingerprint for c in job.methods},
        "protocols": list(job.protocols),
        "clicks": list(clicks),
        "ask": asdict(job.ask),
        "split": split,
        "kept_from": asdict(kept_from),
        "cases": [f"{c.source}/{c.case}" for c in job.cases],
    }
    return settings | {"hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}


def _smallest(cases: list[LabelledCase]) -> list[LabelledCase]:
    """The smallest file of each source, of the ``QUICK_CASES`` sources where it covers least (models with a spacing
    tile what is large).
    """
    size = {id(c): c.image_path.stat().st_size for c in cases}
    per_source: dict[str, LabelledCase] = {}
    for case in sorted(cases, key=lambda c: size[id(c)]):
        per_source.setdefault(case.source, case)
    return sorted(per_source.values(), key=_longest_edge)[:QUICK_CASES]


def _longest_edge(case: LabelledCase) -> float:
    try:
        return longest_edge_mm(case.read()[0])
    except EmptyLabelError:
        return float("inf")


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds the results of these very settings; begins a folder that holds none.

    Raises:
        InputError: if it holds those of others.
    """
    results, begun = out / RESULTS_JSON, out / PARTS / SETTINGS_JSON
    stored: dict[str, Any] | None = None
    for path in (begun, results):
        if path.exists():
            try:
                body = json.loads(path.read_text(encoding="utf-8"))
                stored = body.get("settings", body)
            except ValueError:
                stored = {}
            break
    if stored is None and (out / CASES_CSV).exists():
        stored = {}
    if stored is None:
        begun.parent.mkdir(parents=True, exist_ok=True)
        partial = begun.with_name(f".{begun.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(settings, indent=1))
        os.replace(partial, begun)
        return False
    if stored.get("hash") != settings["hash"]:
        differs = ", ".join(k for k in settings if k != "hash" and json.dumps(stored.get(k)) != json.dumps(settings[k]))
        raise InputError(
            f"output folder already holds results of another configuration (other {differs or 'version'}): {out}; choose another"
        )
    return not begun.exists()


def _merge(job: Job, settings: dict[str, Any], clicks: Sequence[int], processes: int) -> None:
    """Parts in the order of the cases to the three files of the results; ``results.json`` last, then the parts go."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in job.part_files()]
    rows = [row for part in parts for row in part["rows"]]
    if not rows:
        raise InputError(
            f"nothing could be measured: no structure of at least {job.ask.min_voxels} voxels in {len(job.cases)} cases"
        )
    out = job.parts.parent
    write_rows(out / CASES_CSV, rows)
    write_lines(out / PROMPTS_JSONL, [line for part in parts for line in part["lines"]])
    body = {
        "settings": settings,
        "environment": _environment(processes),
        "command": " ".join(["samed3d", *sys.argv[1:]]),
        "revision": _revision(),
        "protocols": {
            name: {"title": PROTOCOLS[name].title, "flattering": PROTOCOLS[name].optimistic_bias}
            for name in job.protocols
        },
        "summary": summarise(rows, clicks),
        "scores": score_series(rows),
    }
    partial = out / f".{RESULTS_JSON}.{os.getpid()}.part"
    partial.write_text(json.dumps(body, indent=1))
    os.replace(partial, out / RESULTS_JSON)
    shutil.rmtree(job.parts)


def _environment(processes: int) -> dict[str, Any]:
    return {
        "samed3d": samed3d.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The commit of the source tree, with ``+`` where it has changes; None where there is no tree."""
    root = Path(samed3d.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _split_of(models: Sequence[str]) -> Split:
    """The split stored in the first checkpoint that was trained by this project; the default split where there is
    none.
    """
    for name in models:
        path = find_checkpoint(name.rpartition(":")[2])
        stored = read_header(path).get("training", {}).get("data") if path else None
        if stored:
            return Split(stored["validation_share"], stored["split_seed"], tuple(stored["hold_out"]))
    return Split()

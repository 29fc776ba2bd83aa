"""``samed3d evaluate``: every case by every method under every protocol, in several processes, resumable.

Each case that is finished for one method and protocol is a file in ``parts/``; when all are there they become
``cases.csv``, ``prompts.jsonl`` and ``results.json`` (``results.py`` says what is in them). A folder holds one
configuration: its hash covers the models' weights, the protocols, the settings and the cases. Results do not depend on
the number of processes, because every structure, seed and prompt strategy has its own generator; only torch rounds
differently with other numbers of threads, which processes share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from samed3d.data.exposure import TrainingHistory
from samed3d.devices import pick_device
from samed3d.environment import environment
from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES
from samed3d.evaluation.cases import CaseSelection, LabelledCase, LoadedCase, find_cases, smallest
from samed3d.evaluation.measuring import CaseResults, measurable, measure
from samed3d.evaluation.methods import Method, SemanticMethod, method_of
from samed3d.evaluation.protocols import PROTOCOLS, protocol_of
from samed3d.evaluation.protocols.base import EvaluationSettings
from samed3d.evaluation.protocols.samed3d import POLICIES, PROMPTS
from samed3d.evaluation.protocols.semantic import SemanticProtocol
from samed3d.evaluation.report import REPORT_HTML
from samed3d.evaluation.results import CASES_CSV, PROMPTS_JSONL, RESULTS_JSON, write_lines, write_rows
from samed3d.evaluation.statistics import score_series, summarise
from samed3d.output import check_results_folder, only_writer, write_json, write_text
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)

QUICK_CASES = 6
PARTS, SETTINGS_JSON = "parts", "settings.json"
DEFAULT_CLICKS = (1, 3, 5)


@dataclass(frozen=True)
class EvaluationPlan:
    """A whole run: cases and methods in the order of the results.

    Other processes make the methods again from ``names``; ``pairs`` are the (method, protocol) by name that are
    evaluated, ``parts`` is the folder of the unfinished run.
    """

    cases: tuple[LabelledCase, ...]
    methods: tuple[Method, ...] = field(repr=False)
    names: tuple[str | Method, ...] = field(repr=False)
    protocols: tuple[str, ...]
    pairs: frozenset[tuple[str, str]]
    settings: EvaluationSettings
    parts: Path
    device: str = "cpu"

    def pieces(self, number: int) -> Iterator[tuple[int, str, Path]]:
        """(number of the method, protocol, file) of the ``number``-th case."""
        case = self.cases[number]
        safe = re.sub(r"[^\w.-]", "_", f"{case.source}.{case.case}")[:80]
        for index, method in enumerate(self.methods):
            for protocol in self.protocols:
                if (method.name, protocol) in self.pairs:
                    yield index, protocol, self.parts / f"{number:05d}.{safe}.{index}.{protocol}.json"

    def files(self) -> list[Path]:
        """Every piece by method, protocol and case: the order of ``cases.csv``."""
        found = [(i, self.protocols.index(p), n, path) for n in range(len(self.cases)) for i, p, path in self.pieces(n)]
        return [path for *_, path in sorted(found)]

    def pending(self) -> list[int]:
        """Cases of which a piece is missing."""
        return [n for n in range(len(self.cases)) if not all(path.exists() for *_, path in self.pieces(n))]


def evaluate(
    data: Sequence[Path],
    models: Sequence[str | Method],
    out: Path,
    *,
    clicks: Sequence[int] | None = None,
    seeds: int | None = None,
    split: str = "val",
    limit: int | None = None,
    labels_per_case: int | None = None,
    protocols: Sequence[str] | None = None,
    policies: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    processes: int = 1,
    device: str = "auto",
    tolerance_mm: float = 2.0,
    surfaces: bool = True,
    quick: bool = False,
    progress: bool = False,
    category_of: Callable[[str, str], str] | None = None,
) -> Path:
    """Evaluate models and other methods on labelled volumes; a folder that holds a part of this run is resumed.

    Args:
        data: nnU-Net folders, corpora, folders of challenge npz files, or folders of these.
        models: Names for ``method_of``, ``"baselines"`` for all of them, or ``Method`` objects (one process only).
        out: Folder for the results, which is returned.
        clicks: Click counts to report, by default 1, 3, 5; the largest is how many are given.
        seeds: Repetitions with other clicks, by default 1.
        split: ``"val"`` (what the checkpoints were not trained on), ``"train"`` or ``"all"``.
        limit: Cases per source.
        labels_per_case: Structures per case, drawn with a fixed seed; None takes all.
        protocols: Names of ``PROTOCOLS`` or ``"all"``; by default ``samed3d``, for semantic models ``automatic``.
        policies: Click policies of protocol ``samed3d`` or ``"all"``; by default ``centre``.
        prompts: First prompts of protocol ``samed3d`` or ``"all"``; by default ``click``.
        processes: How many at once; GPUs are assigned to them in turn.
        device: Where networks run.
        tolerance_mm: Tolerance of the surface Dice.
        surfaces: Whether surface Dice and HD95 are measured.
        quick: Small cases of six sources, one structure each.
        progress: Show a progress bar.
        category_of: The training category of a label's name and source, for semantic models of several sources.

    Raises:
        InputError: if nothing can be measured, an option does not suit a model, or ``out`` holds other results.
    """
    given = {"protocol": protocols, "policy": policies, "prompt": prompts, "clicks": clicks, "seeds": seeds}
    ask = {"labels_per_case": 1 if quick else labels_per_case, "tolerance_mm": tolerance_mm, "surfaces": surfaces}
    plan = _planned(models, given, ask, out, device)
    history = TrainingHistory.of_models(plan.names)
    found = find_cases(list(data), history, split, limit)
    found = smallest(found, QUICK_CASES) if quick else found
    if category_of is not None:
        found.cases = [case.with_categories(category_of) for case in found.cases]
    about = {"split": split, "kept_from": history.kept_from}
    _run(replace(plan, cases=tuple(found.cases)), clicks or DEFAULT_CLICKS, about, found, processes, progress)
    return out


def _planned(
    models: Sequence[str | Method], given: dict[str, Any], ask: dict[str, Any], out: Path, device: str
) -> EvaluationPlan:
    """The plan of a run, still without cases; ``given`` are the options on prompts, ``ask`` the other settings."""
    policies, prompts = given["policy"] or ("centre",), given["prompt"] or ("click",)
    settings = EvaluationSettings(
        max(given["clicks"] or DEFAULT_CLICKS),
        given["seeds"] or 1,
        POLICIES if "all" in policies else tuple(policies),
        PROMPTS if "all" in prompts else tuple(prompts),
        **ask,
    )
    device = pick_device(device).type
    names = [n for name in models for n in (BASELINES if name == "baselines" else [name])]
    if doubled := {str(name) for name in names if names.count(name) > 1}:
        raise InputError(f"models must be given once each, got {', '.join(sorted(doubled))} twice")
    methods = [method_of(name, device) if isinstance(name, str) else name for name in names]
    chosen = _chosen_protocols(methods, {name: value for name, value in given.items() if value is not None})
    protocols = [protocol_of(name) for name in chosen]
    # the group "baselines" leaves out those that no protocol suits; one that is named alone is refused
    optional = [m for m in methods if m.name in BASELINES] if "baselines" in models else []
    if unsuited := [m for m in optional if not any(p.suits(m, settings) for p in protocols)]:
        logger.warning("left out, because no first prompt suits them: %s", ", ".join(m.name for m in unsuited))
    kept = [(name, method) for name, method in zip(names, methods, strict=True) if method not in unsuited]
    names, methods = [name for name, _ in kept], [method for _, method in kept]
    pairs = measurable(methods, protocols, settings)
    return EvaluationPlan((), tuple(methods), tuple(names), chosen, pairs, settings, out / PARTS, device)


def _run(
    plan: EvaluationPlan,
    clicks: Sequence[int],
    about: dict[str, Any],
    found: CaseSelection,
    processes: int,
    progress: bool,
) -> None:
    settings: dict[str, Any] = {
        "models": {method.name: method.fingerprint for method in plan.methods},
        "protocols": list(plan.protocols),
        "clicks": list(clicks),
        "ask": asdict(plan.settings),
        **about,
        "cases": [f"{case.source}/{case.case}" for case in plan.cases],
    }
    settings["hash"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    for line in found.described():
        logger.warning("%s", line)
    if _is_finished(plan.parts.parent, settings):
        logger.info("already measured with these settings: %s", plan.parts.parent)
        return
    with only_writer(plan.parts):
        write_json(plan.parts / SETTINGS_JSON, settings)
        _measure_cases(plan, processes, progress)
        _merge(plan, settings, found, processes)


def _chosen_protocols(methods: Sequence[Method], given: dict[str, Any]) -> tuple[str, ...]:
    """The protocols of a run; refuses options about prompts for models that take none."""
    without_prompts = SemanticProtocol.name
    semantic = [method.name for method in methods if isinstance(method, SemanticMethod)]
    if not semantic:
        protocols = given.get("protocol", ["samed3d"])
        names = [name for name in PROTOCOLS if name != without_prompts] if "all" in protocols else protocols
        return tuple(dict.fromkeys(names))
    if others := [method.name for method in methods if method.name not in semantic]:
        raise InputError(
            f"semantic segmentation models are measured apart from others, got {', '.join(semantic)} "
            f"with {', '.join(others)}; run evaluate once for each"
        )
    if list(given.get("protocol", [])) == [without_prompts]:
        given = {name: value for name, value in given.items() if name != "protocol"}
    if given:
        options = ", ".join(f"--{name}" for name in given)
        raise InputError(f"{options} cannot be used with {semantic[0]}: semantic segmentation models take no prompts")
    return (without_prompts,)


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds the results of these very settings.

    Raises:
        InputError: if it holds those of others.
    """
    begun = out / PARTS / SETTINGS_JSON
    path = next((path for path in (begun, out / RESULTS_JSON) if path.exists()), None)
    if path is None and not (out / CASES_CSV).exists():
        # a run that was stopped before its first result leaves hidden files
        begins = (PROMPTS_JSONL, REPORT_HTML, PARTS)
        check_results_folder(out, begins, lambda parts: all(entry.name.startswith(".") for entry in parts.iterdir()))
        return False
    stored: dict[str, Any] = {}
    if path is not None:
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            stored = body.get("settings", body)
        except (ValueError, AttributeError):
            pass  # written by something else
    if stored.get("hash") != settings["hash"]:
        differs = ", ".join(k for k in settings if k != "hash" and json.dumps(stored.get(k)) != json.dumps(settings[k]))
        raise InputError(
            f"output folder already holds results of another configuration (other {differs or 'version'}): {out}; "
            "choose another"
        )
    return not begun.exists()


def _merge(plan: EvaluationPlan, settings: dict[str, Any], found: CaseSelection, processes: int) -> None:
    """Make the three files of the results from the parts, ``results.json`` last, and delete the parts."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in plan.files()]
    rows = [row for part in parts for row in part["rows"]]
    if not rows:
        lacking = f"no structure of at least {plan.settings.min_voxels} voxels"
        if SemanticProtocol.name in plan.protocols:
            lacking = f"no label of a class of {plan.methods[0].name}"
        raise InputError(f"nothing could be measured: {lacking} in {len(plan.cases)} cases")
    measured = {(row["source"], row["case"]) for row in rows}
    for case in plan.cases:
        if (case.source, case.case) not in measured:
            found.leave_out("nothing in it that could be measured", case)
    out = plan.parts.parent
    write_rows(out / CASES_CSV, rows)
    write_lines(out / PROMPTS_JSONL, [line for part in parts for line in part["lines"]])
    about = environment()
    protocols = {
        name: {"title": PROTOCOLS[name].title, "flattering": PROTOCOLS[name].optimistic_bias} for name in plan.protocols
    }
    body = {
        "settings": settings,
        "command": " ".join(["samed3d", *about.pop("command")[1:]]),
        "revision": about.pop("revision") or None,
        "environment": about | {"processes": processes},
        "protocols": protocols,
        "problems": list(dict.fromkeys(note for part in parts for note in part.get("notes", []))),
        "left_out": found.left_out,
        "trained_as": {f"{case.source}/{case.case}": case.known_as for case in plan.cases if case.known_as},
        "summary": summarise(rows, settings["clicks"]),
        "scores": score_series(rows),
    }
    write_json(out / RESULTS_JSON, body)
    shutil.rmtree(plan.parts, ignore_errors=True)


def _measure_cases(plan: EvaluationPlan, processes: int, progress: bool) -> None:
    """Measure every case that is not finished; finished pieces stay if one fails."""
    pending = plan.pending()
    if len(pending) < len(plan.cases):
        logger.info("%d of %d cases were measured before", len(plan.cases) - len(pending), len(plan.cases))
    if processes == 1 or len(pending) <= 1:
        for number in _shown(pending, len(pending), progress):
            _measure_case(plan, number)
        return
    if any(not isinstance(name, str) for name in plan.names):
        raise InputError(
            f"models given as objects are measured in one process, got processes={processes}; save them to a file, "
            "or use 1"
        )
    context = multiprocessing.get_context("spawn")
    processes = min(processes, len(pending))
    threads = max(1, torch.get_num_threads() // processes)
    arguments = (replace(plan, methods=()), threads, context.Value("i", 0))
    with ProcessPoolExecutor(processes, context, _begin_worker, arguments) as pool:
        futures = [pool.submit(_measure_in_worker, number) for number in pending]
        try:
            for future in _shown(as_completed(futures), len(futures), progress):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_WORKER: dict[str, EvaluationPlan] = {}
"""The plan of a worker process, with methods of its own."""


def _begin_worker(plan: EvaluationPlan, threads: int, counter: Any) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    if plan.device.startswith("cuda"):
        with counter.get_lock():
            rank, counter.value = counter.value, counter.value + 1
        torch.cuda.set_device(rank % torch.cuda.device_count())
    methods = tuple(method_of(name, plan.device) for name in plan.names if isinstance(name, str))
    _WORKER["plan"] = replace(plan, methods=methods)


def _measure_in_worker(number: int) -> None:
    _measure_case(_WORKER["plan"], number)


def end_with_parent() -> None:
    """End this worker when its parent process ends; a parent that was killed cannot stop its workers itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _measure_case(plan: EvaluationPlan, number: int) -> None:
    case = plan.cases[number]
    loaded: LoadedCase | None = None
    try:
        loaded = case.loaded()
    except EmptyLabelError as error:
        logger.warning("left out %s: %s", case.case, error)
    for index, protocol, path in plan.pieces(number):
        if not path.exists():
            results = CaseResults()
            if loaded is not None:
                results = measure(case, plan.methods[index], protocol_of(protocol), plan.settings, loaded)
                results.notes = [f"{case.source}/{case.case}: {note}" for note in loaded.volume.notes]
            write_text(path, json.dumps(asdict(results)))


def _shown(items: Iterable[Any], total: int, progress: bool) -> Iterable[Any]:
    from rich.progress import track

    return track(items, description="measuring", total=total) if progress else items

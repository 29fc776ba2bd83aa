"""From folders of labelled volumes to a corpus: find, check, convert in parallel, list what was kept and dropped.

A run can be killed at any moment and started again: finished cases are recognised by their record, and the result is
the same, byte for byte. A later run with further sources adds them. Nothing outside the target folder is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.cases import Problem, RawCase, Reader, SourceFacts
from data_prep.clean import rules_from
from data_prep.convert import Settings, Task, fingerprint, input_bytes, record_path, run_tasks
from data_prep.manifest import read_problems, write_manifest
from data_prep.readers import find_sources
from data_prep.readers.facts import safe_name
from samed3d.data.corpus import VERSION, check_storage, image_path, labels_path
from samed3d.errors import InputError
from samed3d.output import TEMPORARY_PREFIX, only_writer, write_text

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "XDG_CACHE_HOME"
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Result:
    """What a run did."""

    folder: Path
    done: int  # cases converted by this run
    found: int  # cases that were already finished
    failed: list[Problem]
    counts: dict[str, Any]  # of the whole corpus, as in ``corpus.json``
    min_volume_mm3: float  # of the rules

    def summary(self) -> str:
        """The lines that the command prints at the end."""
        masks, dropped = self.counts["masks"], self.counts["masks_dropped"]
        lines = [f"{self.done} cases prepared, {self.found} were there, {len(self.failed)} inputs refused"]
        lines.append(f"{masks:,} masks of {self.counts['cases']:,} cases in {self.folder}")
        if dropped:
            remedy = "; --rules lenient (into another folder) keeps small ones" if self.min_volume_mm3 else ""
            lines.append(f"{dropped:,} masks dropped by the rules, each with its reason in labels.csv{remedy}")
        if warnings := self.counts["warnings"]:
            lines.append(f"{warnings:,} warnings about prepared cases, in problems.csv")
        if twins := self.counts["duplicate_images"]:
            lines.append(
                f"{twins:,} images are there twice (duplicate_of in cases.csv); they stay on one side of the split"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Source:
    folder: str
    facts: SourceFacts
    cases: list[RawCase]
    problems: list[Problem]


def prepare(
    sources: Sequence[Path],
    out: Path,
    settings: Settings | None = None,
    *,
    source_format: str | None = None,
    patterns: tuple[str | None, str | None] = (None, None),
    generated: Reader | None = None,
    licensed_only: bool = False,
    jobs: int = 1,
    cluster: str | None = None,
    untilt: bool = False,
    progress: bool = False,
) -> Result:
    """Make a corpus, continue one, or add sources to one.

    ``sources`` are folders of labelled volumes, or folders of them, each recognised by itself unless ``source_format``
    names a reader; ``patterns`` are those of ``PlainReader`` and ``generated`` a reader of generated cases. ``out`` is
    new, empty, or a corpus made with the same settings. ``licensed_only`` leaves out sources whose licence is not
    clear; ``untilt`` resamples DICOM series that are tilted or unevenly spaced instead of refusing them. ``jobs`` are
    processes on this machine, ``cluster`` the address of a Dask scheduler instead.

    Raises:
        InputError: if a source is not recognised, the target holds something else, or the disk is too small. Nothing is
            written then.
    """
    settings = settings or Settings()
    check_storage(settings.storage)
    out = out.resolve()
    _check_target(out, settings)
    found_sources = find_sources(sources, source_format, patterns) if sources else []
    listed = _list_sources([(reader, folder.resolve()) for reader, folder in found_sources], out, licensed_only)
    if generated is not None:
        listed += _list_sources([(generated, None)], out, False)
    for case in (c for s in listed for c in s.cases if untilt and c.reader == "dicom"):
        case.extra["untilt"] = "yes"
    with only_writer(out):
        tasks, found = _plan(listed, out, settings)
        _check_space(out, tasks)
        _begin(out, listed, settings)
        failed = [(s.facts.name, p) for s in listed for p in s.problems]
        failed_tasks = _run(tasks, jobs, cluster, progress)
        ours = {s.facts.name for s in listed}
        earlier = [(source, p) for source, p in read_problems(out) if source not in ours]
        counts = write_manifest(out, asdict(settings), earlier + failed + failed_tasks)
    problems = [p for _, p in failed + failed_tasks]
    return Result(out, len(tasks) - len(failed_tasks), found, problems, counts, settings.rules.min_volume_mm3)


def cached_corpus(data: Path, *, jobs: int = 1, progress: bool = False) -> Path:
    """Folder of a corpus in the user's cache (``$XDG_CACHE_HOME/samed3d/corpora``), made anew when a file changed.

    It keeps everything that can be clicked on (the lenient rules), at native resolution. ``data`` is a data set of any
    layout that ``samed3d prepare`` recognises, a folder of them, or a corpus, which is returned as it is.

    Raises:
        InputError: if the folder is missing or not recognised, or holds no labelled image that could be used.
    """
    if not data.is_dir():
        what = "a file" if data.exists() else "nothing there"
        raise InputError(f"data must be a folder of labelled volumes, got {what}: {data}")
    if (data / "corpus.json").is_file():
        return data
    stats = [(p.relative_to(data), p.stat()) for p in sorted(data.rglob("*")) if p.is_file()]
    about = [VERSION, str(data.resolve()), [[str(name), s.st_size, s.st_mtime_ns] for name, s in stats]]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "samed3d" / "corpora"
    out = cache / f"{safe_name(data.resolve().name)}-{key}"
    rules = rules_from("lenient", [])
    result = prepare([data], out, Settings(rules), jobs=jobs, progress=progress)
    reasons = [" ".join(problem.reason.split()) for problem in result.failed]
    for problem, reason in zip(result.failed, reasons, strict=True):
        logger.warning("left out %s: %s", problem.path, reason)
    if not result.counts["masks"]:
        why = f"; the first of {len(reasons)} problems: {reasons[0]}" if reasons else ""
        raise InputError(
            f"data must hold labelled structures of at least {rules.min_voxels} voxels, got none: {data}{why}"
        )
    return out


def _check_target(out: Path, settings: Settings) -> None:
    """Refuse a folder that holds something else than a corpus of this version and these settings."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"output must be a folder, got a file: {out}")
    try:
        body = json.loads((out / "settings.json").read_text(encoding="utf-8"))
        version, stored = body["version"], {**body["settings"], **body["settings"]["rules"]}
    except (OSError, ValueError, KeyError, TypeError):
        if any(p.name != ".lock" and not p.name.startswith(TEMPORARY_PREFIX) for p in out.iterdir()):
            raise InputError(f"output folder is not empty and holds no corpus of ours: {out}; choose another") from None
        return
    if version != VERSION:
        raise InputError(
            f"output holds a corpus of version {version}, this is version {VERSION}: {out}; choose another folder"
        )
    now = asdict(settings) | asdict(settings.rules)
    changed = [
        f"{k} {stored.get(k)} there, {now[k]} now" for k in sorted(now) if k != "rules" and stored.get(k) != now[k]
    ]
    if changed:
        raise InputError(
            f"output holds a corpus made with other settings ({', '.join(changed)}): {out}; choose another folder or "
            "use the same settings"
        )


def _list_sources(found: Sequence[tuple[Reader, Path | None]], out: Path, licensed_only: bool) -> list[_Source]:
    """Every source (a folder, or None for generated cases) with its cases; two of one name are refused."""
    listed: list[_Source] = []
    for reader, folder in found:
        if folder is not None and (out.is_relative_to(folder) or folder.is_relative_to(out)):
            raise InputError(f"output must lie outside its sources, got {out} and {folder}")
        facts = reader.source(folder or Path())
        if licensed_only and facts.licence_flag != "ok":
            logger.warning("left out %s: its licence is %s", facts.name, facts.licence or "not stated")
            continue
        at, stated = record_path(out, facts.name, "source"), str(folder or "")
        if at.exists() and (before := json.loads(at.read_text(encoding="utf-8"))["folder"]) != stated:
            raise InputError(
                f"the corpus has a source called {facts.name!r} already, from {before}, got {folder}; rename the folder"
            )
        listed.append(_Source(stated, facts, *reader.cases(folder or Path())))
    if not listed and found:
        raise InputError(
            "no source is left: none states a clear licence; give --licensed-only up, or state it in source.json"
        )
    return listed


def _plan(listed: list[_Source], out: Path, settings: Settings) -> tuple[list[Task], int]:
    """What is left to do, and how many cases are finished."""
    tasks, found = [], 0
    for source in listed:
        files = [Path(source.folder) / name for name in ("dataset.json", "source.json")] if source.folder else []
        # Their text belongs to the fingerprint of each case: they name the labels.
        about = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file())
        for case in source.cases:
            mark = fingerprint(case, settings, about)
            if _is_finished(out, case, mark, settings.storage):
                found += 1
            else:
                tasks.append(Task(case, source.facts, settings, str(out), mark))
    if found:
        logger.info("%d cases are finished already, %d to do", found, len(tasks))
    return tasks, found


def _is_finished(out: Path, case: RawCase, mark: str, storage: str) -> bool:
    try:
        record = json.loads(record_path(out, case.source, case.id).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    paths = [image_path(out, record["case"], image["channel"], storage) for image in record["images"]]
    paths += [labels_path(out, record["case"], storage)] if record["stored"] else []
    return record["fingerprint"] == mark and all(path.exists() for path in paths)


def _check_space(out: Path, tasks: list[Task]) -> None:
    """Refuse a disk with less room than the sources' own size: both are compressed, and a corpus drops some masks."""
    need = sum(input_bytes(task.case) for task in tasks) + _SPARE_BYTES
    place = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"the corpus needs about {need / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free; make room or choose "
            "another disk"
        )


def _begin(out: Path, listed: list[_Source], settings: Settings) -> None:
    """Write the settings and sources of the run, and delete what an interrupted one left: temporary files, and records
    of cases that are no longer listed.
    """
    write_text(out / "settings.json", json.dumps({"version": VERSION, "settings": asdict(settings)}, indent=1) + "\n")
    for part in out.rglob(f"{TEMPORARY_PREFIX}*"):
        if part.is_file():
            part.unlink(missing_ok=True)
    for source in listed:
        facts = {**asdict(source.facts), "folder": source.folder}
        at = record_path(out, source.facts.name, "source")
        at.parent.mkdir(parents=True, exist_ok=True)
        write_text(at, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        names = {f"{case.id}.json" for case in source.cases} | {at.name}
        for stale in [p for p in at.parent.glob("*.json") if p.name not in names]:
            logger.warning("%s is no longer in %s and leaves the corpus", stale.stem, source.folder)
            stale.unlink()


def _run(tasks: list[Task], jobs: int, cluster: str | None, progress: bool) -> list[tuple[str, Problem]]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    failed = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("cases", total=len(tasks))
        for outcome in run_tasks(tasks, jobs, cluster):
            if outcome.problem and outcome.fatal:
                raise InputError(
                    f"{outcome.problem.reason}; finished cases are kept, run the command again when there is room"
                )
            if outcome.problem:
                failed.append((outcome.source, outcome.problem))
                bar.update(row, description=f"cases ({len(failed)} failed)")
            bar.advance(row)
    return failed

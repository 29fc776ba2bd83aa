"""From folders of labelled volumes to a corpus: find, check, convert in parallel, list what was kept, dropped and
refused.

A run can be killed at any moment and started again: finished cases are recognised by their record and not done twice,
and the result is the same, byte for byte. A later run with further sources adds them. Nothing outside the target folder
is written. The parts: ``readers/`` (what lies where), ``convert.py`` (one case), ``clean.py`` (the rules),
``workers.py`` (processes and clusters), ``manifest.py`` (the tables).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.cases import Problem, RawCase, Reader, SourceFacts
from data_prep.convert import Settings, Task, fingerprint, input_bytes, record_path
from data_prep.manifest import read_problems, write_manifest
from data_prep.readers import find_sources
from data_prep.workers import run_tasks
from samed3d.data.corpus import VERSION, image_path, labels_path
from samed3d.data.storage import check_storage
from samed3d.errors import InputError
from samed3d.output import TEMPORARY_PREFIX, only_writer, write_text

logger = logging.getLogger(__name__)

_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
        folder: The corpus.
        done: Cases converted by this run.
        found: Cases that were already finished.
        failed: Inputs that could not be used, with the reasons.
        counts: Of the whole corpus, as in ``corpus.json``.
        min_volume_mm3: Of the rules.
    """

    folder: Path
    done: int
    found: int
    failed: list[Problem]
    counts: dict[str, Any]
    min_volume_mm3: float

    def summary(self) -> str:
        """What a person wants to know at the end."""
        masks, dropped = self.counts["masks"], self.counts["masks_dropped"]
        lines = [f"{self.done} cases prepared, {self.found} were there, {len(self.failed)} inputs refused"]
        lines.append(f"{masks:,} masks of {self.counts['cases']:,} cases in {self.folder}")
        if dropped:
            remedy = "; --rules lenient (into another folder) keeps small ones" if self.min_volume_mm3 else ""
            lines.append(f"{dropped:,} masks dropped by the rules, each with its reason in labels.csv{remedy}")
        if twins := self.counts["duplicate_images"]:
            lines.append(
                f"{twins:,} images are there twice (duplicate_of in cases.csv); they stay on one side of the split"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Source:
    reader: Reader
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
    progress: bool = False,
) -> Result:
    """Make a corpus, go on with one, or add sources to one.

    Args:
        sources: Folders of labelled volumes, or folders of them.
        out: Folder of the corpus: new, empty, or a corpus made with the same settings.
        settings: How it is made.
        source_format: Name of the reader for all sources; each is recognised by itself without it.
        generated: A reader of generated cases (``synthetic.py``), added to the sources.
        licensed_only: Leave out sources whose licence is not clear.
        patterns: Where images and labels are in plain folders; see ``readers/plain.py``.
        jobs: Processes on this machine.
        cluster: Address of a Dask scheduler instead.
        progress: Show a progress bar with the time left, on stderr.

    Raises:
        InputError: if a source is not recognised, the target is not ours, or the disk is too small. Nothing is written
            then.
    """
    settings = settings or Settings()
    check_storage(settings.storage)
    out = out.resolve()
    known = _existing_settings(out)
    _check_settings(out, known, settings)
    images, labels = patterns
    found_sources = (
        find_sources(list(sources), source_format, image_pattern=images, label_pattern=labels) if sources else []
    )
    listed = _list_sources([(reader, folder.resolve()) for reader, folder in found_sources], out, licensed_only)
    if generated is not None:
        listed += _list_sources([(generated, None)], out, False)
    with only_writer(out):
        tasks, found = _plan(listed, out, settings)
        _check_space(out, tasks)
        _begin(out, listed, settings)
        failed = [(s.facts.name, p) for s in listed for p in s.problems]
        failed += _run(tasks, jobs, cluster, progress)
        ours = {s.facts.name for s in listed}
        earlier = [(source, p) for source, p in read_problems(out) if source not in ours]
        counts = write_manifest(out, _as_json(settings), earlier + failed)
    done = len(tasks) + sum(len(s.problems) for s in listed) - len(failed)
    return Result(out, done, found, [p for _, p in failed], counts, settings.rules.min_volume_mm3)


def _existing_settings(out: Path) -> dict[str, Any] | None:
    """The settings of the corpus that is there, or None for a new or empty folder.

    Raises:
        InputError: if there is something else, or a corpus of another version.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"output must be a folder, got a file: {out}")
    try:
        body = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if any(p.name != ".lock" and not p.name.startswith(TEMPORARY_PREFIX) for p in out.iterdir()):
            raise InputError(f"output folder is not empty and holds no corpus of ours: {out}; choose another") from None
        return None
    if body["version"] != VERSION:
        raise InputError(
            f"output holds a corpus of version {body['version']}, this is version {VERSION}: {out}; choose another folder"
        )
    return dict(body["settings"])


def _check_settings(out: Path, known: dict[str, Any] | None, settings: Settings) -> None:
    wanted = _as_json(settings)
    if known is not None and known != wanted:
        flat = [{**s, **s["rules"]} for s in (known, wanted)]
        changed = sorted(k for k in flat[1] if k != "rules" and flat[0].get(k) != flat[1][k])
        said = ", ".join(f"{k} {flat[0].get(k)} there, {flat[1][k]} now" for k in changed)
        raise InputError(
            f"output holds a corpus made with other settings ({said}): {out}; choose another folder or use the same settings"
        )


def _as_json(settings: Settings) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(settings))))


def _list_sources(found: Sequence[tuple[Reader, Path | None]], out: Path, licensed_only: bool) -> list[_Source]:
    """Every source (a folder, or None for generated cases) with its cases; two of one name are refused."""
    listed: list[_Source] = []
    for reader, folder in found:
        if folder is not None and (out == folder or out.is_relative_to(folder) or folder.is_relative_to(out)):
            raise InputError(f"output must lie outside its sources, got {out} and {folder}")
        facts = reader.source(folder or Path())
        if licensed_only and facts.licence_flag != "ok":
            logger.warning("left out %s: its licence is %s", facts.name, facts.licence or "not stated")
            continue
        at = out / "records" / facts.name / "source.json"
        said = "" if folder is None else str(folder)
        if at.exists() and (before := json.loads(at.read_text(encoding="utf-8"))["folder"]) != said:
            raise InputError(
                f"the corpus has a source called {facts.name!r} already, from {before}, got {folder}; rename the folder"
            )
        cases, problems = reader.cases(folder or Path())
        listed.append(_Source(reader, said, facts, *_distinct(cases, problems)))
    if not listed and found:
        raise InputError(
            "no source is left: none states a clear licence; give --licensed-only up, or state it in source.json"
        )
    return listed


def _distinct(cases: list[RawCase], problems: list[Problem]) -> tuple[list[RawCase], list[Problem]]:
    """Cases of one id become problems, all but the first; so do ids that are no file names."""
    kept: dict[str, RawCase] = {}
    problems = list(problems)
    for case in cases:
        path = case.first_path
        if not case.id or "/" in case.id or "\\" in case.id or case.id.startswith(".") or case.id == "source":
            problems.append(Problem(path, f"case id must be a plain file name, got {case.id!r}; rename the file"))
        elif case.id.lower() in kept:  # lower: some file systems do not tell A from a
            first = kept[case.id.lower()].first_path
            problems.append(
                Problem(
                    path,
                    f"two cases have the id {case.id!r}, the other is {first}; rename one",
                )
            )
        else:
            kept[case.id.lower()] = case
    return list(kept.values()), problems


def _plan(listed: list[_Source], out: Path, settings: Settings) -> tuple[list[Task], int]:
    """What is left to do, and how many cases are finished."""
    tasks, found = [], 0
    for source in listed:
        files = [Path(source.folder) / name for name in ("dataset.json", "source.json")] if source.folder else []
        about = "".join(
            path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()
        )  # they name the labels
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
    if record["fingerprint"] != mark:
        return False
    paths = [image_path(out, record["case"], image["channel"], storage) for image in record["images"]]
    return not record["stored"] or all(p.exists() for p in [labels_path(out, record["case"], storage), *paths])


def _check_space(out: Path, tasks: list[Task]) -> None:
    """The sources' own size is the estimate: they are compressed as well, and masks that are dropped make up for what
    is not.
    """
    need = sum(input_bytes(task.case) for task in tasks) + _SPARE_BYTES
    place = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise InputError(
            f"the corpus needs about {need / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free; make room or choose another disk"
        )


def _begin(out: Path, listed: list[_Source], settings: Settings) -> None:
    """Write what the run is, and clear away what an interrupted one left: half files, and records of cases that are no
    longer listed.
    """
    write_text(out / "settings.json", json.dumps({"version": VERSION, "settings": _as_json(settings)}, indent=1) + "\n")
    for part in out.rglob(f"{TEMPORARY_PREFIX}*"):
        part.unlink(missing_ok=True)
    for source in listed:
        facts = {**asdict(source.facts), "folder": source.folder}
        at = out / "records" / source.facts.name / "source.json"
        at.parent.mkdir(parents=True, exist_ok=True)
        write_text(at, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        names = {f"{case.id}.json" for case in source.cases} | {"source.json"}
        for stale in [p for p in at.parent.glob("*.json") if p.name not in names]:
            logger.warning("%s is no longer in %s and leaves the corpus", stale.stem, source.folder)
            stale.unlink()


def _run(tasks: list[Task], jobs: int, cluster: str | None, progress: bool) -> list[tuple[str, Problem]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    failed = []
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("cases", total=len(tasks))
        for outcome in run_tasks(tasks, jobs, cluster):
            if outcome.fatal:
                raise InputError(f"{outcome.error}; finished cases are kept, run the command again when there is room")
            if outcome.error:
                failed.append((outcome.source, Problem(outcome.path, outcome.error)))
                bar.update(row, description=f"cases ({len(failed)} failed)")
            bar.advance(row)
    return failed

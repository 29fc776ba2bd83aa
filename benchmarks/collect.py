"""Run the benchmarks, keep each result as JSON with a description of the machine, and update ``docs/benchmarks.md``.

    python benchmarks/collect.py                      # all of them, into benchmarks/results (make bench)
    python benchmarks/collect.py --quick              # few repeats, into out/bench; the page stays as it is
    python benchmarks/collect.py --only latency train
    python benchmarks/collect.py --page               # only the page, from the JSON files that are there

A benchmark whose data are missing (``--data``, or ``SAMED3D_DATA``) is skipped with a line. One that fails leaves its
earlier result as it was and makes the exit code 1. Not here: ``gpu.py`` (needs a GPU) and ``card.py`` (the checkpoint).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # behind this folder: every script here imports this file before the package

from tables import BLOCKS, page_with_blocks  # noqa: E402

from samed3d.environment import environment  # noqa: E402
from samed3d.output import write_json, write_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Job:
    """One script of this folder, which writes its JSON to ``--out``."""

    name: str
    quick: tuple[str, ...] | None = ("--quick",)  # further arguments of a quick run; None leaves the script out of it
    data: bool = False  # whether it needs the development data, by --data


JOBS = (
    Job("latency"),
    Job("train", quick=("--repeats", "1")),
    Job("server_load", quick=("--clients", "2", "--seconds", "5", "--sessions", "3")),
    Job("protocols", None, data=True),
    Job("prepare", None, data=True),
)


def parser_of(description: str | None, result: str = "") -> argparse.ArgumentParser:
    """The options of a benchmark; ``--out`` is by default the file ``result`` of ``RESULTS``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if result:
        parser.add_argument("--out", type=Path, default=RESULTS / result, help="JSON file to write")
    return parser


def describe_machine() -> dict[str, Any]:
    """What any time depends on."""
    found = environment()
    kept = {name: found[name] for name in ("processor", "cores", "threads", "gpu", "system", "python")}
    return kept | {"torch": found["packages"]["torch"], "load_before": [round(v, 2) for v in os.getloadavg()]}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Print a result as JSON, and write it to a file."""
    print(json.dumps(result, indent=1))
    write_json(path, result)


def command_of(job: Job, data: Path | None, out: Path, quick: bool) -> list[str] | str:
    """The arguments of a job, or why it cannot run."""
    script = ROOT / "benchmarks" / f"{job.name}.py"
    if not script.is_file():
        return "there is no such script"
    if quick and job.quick is None:
        return "it has no quick form"
    if job.data and data is None:
        return "it needs the development data: --data, or SAMED3D_DATA"
    source = ["--data", str(data)] if job.data else []
    return [str(script.relative_to(ROOT)), *source, "--out", str(out), *(job.quick or () if quick else ())]


def run_job(command: Sequence[str], out: Path, quick: bool, data: Path | None = None) -> str:
    """Run one script and add to its JSON how it was made, with DATA for ``data``; returns why it failed, or nothing."""
    machine, began = describe_machine(), time.perf_counter()
    variables = os.environ | ({"SAMED3D_DATA": str(data)} if data else {})
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    shown = [a.replace(str(data), "DATA") if data else a for a in command]
    shown = [str(Path(a).relative_to(ROOT)) if Path(a).is_relative_to(ROOT) else a for a in shown]
    about = {"command": " ".join(["python", *shown]), "revision": environment()["revision"], "quick": quick}
    about |= {"machine": machine, "seconds": round(time.perf_counter() - began, 1)}
    write_json(out, json.loads(out.read_text()) | {"collected": about})
    return ""


def update_page(results: Path = RESULTS, page: Path = PAGE) -> bool:
    """Make the tables of the page anew; returns whether anything changed."""
    old = page.read_text(encoding="utf-8")
    new = page_with_blocks(old, results)
    if new != old:
        write_text(page, new)
    return new != old


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these benchmarks")
    parser.add_argument("--quick", action="store_true", help="few repeats, not for publishing")
    parser.add_argument("--data", type=Path, help="folder of data sets; else SAMED3D_DATA, else ../shared/data")
    parser.add_argument("--into", type=Path, help="folder of the JSON files")
    parser.add_argument("--page", action="store_true", help="run nothing, only update the page")
    options = parser.parse_args()
    if options.page:
        print(f"docs/benchmarks.md {'was updated' if update_page() else 'is up to date'}")
        return 0
    data = (options.data or Path(os.environ.get("SAMED3D_DATA") or ROOT.parent / "shared" / "data")).resolve()
    into = (options.into or (ROOT / "out" / "bench" if options.quick else RESULTS)).resolve()
    into.mkdir(parents=True, exist_ok=True)
    failed = 0
    for job in [j for j in JOBS if not options.only or j.name in options.only]:
        out = into / f"{job.name}.json"
        command = command_of(job, data if data.is_dir() else None, out, options.quick)
        if isinstance(command, str):
            print(f"{job.name}: skipped, {command}", flush=True)
            continue
        print(f"{job.name}: running {' '.join(command)}", flush=True)
        reason = run_job(command, out, options.quick, data)
        failed += bool(reason)
        print(f"{job.name}: {f'FAILED: {reason}' if reason else 'done'}", flush=True)
    if into == RESULTS.resolve():
        update_page()
        print(f"docs/benchmarks.md holds {len(BLOCKS)} tables")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

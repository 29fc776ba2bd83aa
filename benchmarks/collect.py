"""Run the benchmarks one after another, keep each result as JSON with the machine described, and bring
``docs/benchmarks.md`` up to date.

    python benchmarks/collect.py                      # all of them, into benchmarks/results (make bench)
    python benchmarks/collect.py --quick              # few repeats, into out/bench; the page is left alone
    python benchmarks/collect.py --only latency synthesis
    python benchmarks/collect.py --page               # only the page, from the JSON files that are there

A benchmark that needs data is passed over with a line where there are none (``--data``, or ``SAMED3D_DATA``). One that
fails leaves its earlier result alone and makes the exit code 1. Not here: ``compare_systems.py``, which trains for
hours and wants a corpus, and ``gpu.py``, which is run by itself on a machine with a GPU. How a JSON becomes a table of
the page is in ``result_tables.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_tables import BLOCKS, page_with_blocks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
CT = "chaos_ct_liver"


@dataclass(frozen=True)
class Job:
    """One script of this folder.

    Attributes:
        name: Of the script and of its JSON.
        always: Arguments of every run; ``{data}`` becomes the data folder, ``{out}`` the JSON to write.
        quick: Further arguments of a quick run; None leaves the script out of it.
        prints: What it writes to standard output where it writes no file: ``"json"`` or ``"table"`` (Markdown).
    """

    name: str
    always: tuple[str, ...] = ("--out", "{out}")
    quick: tuple[str, ...] | None = ("--quick",)
    prints: str = ""


JOBS = (
    Job("latency"),
    Job("train", quick=("--repeats", "1")),
    Job("augment", quick=("--edges", "32", "--samples", "5")),
    Job("session", ("--out", "{out}", "--threads", "1"), ()),
    Job("server_load", quick=("--clients", "2", "--seconds", "5", "--sessions", "3")),
    Job("export", ("--out", "{out}"), ("--rounds", "2")),
    Job("synthesis", (), ("--edges", "64", "--repeats", "3"), prints="json"),
    Job(
        "storage",
        (f"{{data}}/{CT}/imagesTr/chaos_ct_sample_0000.nii.gz", f"{{data}}/{CT}/labelsTr/chaos_ct_sample.nii.gz"),
        None,
        "table",
    ),
    Job("protocols", ("--data", "{data}", "--out", "{out}"), None),
    Job("prepare", ("--data", "{data}", "--out", "{out}"), None),
)


def describe_machine() -> dict[str, Any]:
    """What any time depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = int(meminfo.read_text().split()[1]) / 2**20 if meminfo.exists() else None
    code = "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else '', sep='|')"
    torch, _, gpu = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        .stdout.strip()
        .partition("|")
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": None if memory is None else round(memory, 1),
        "gpu": gpu or None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch,
        "load_before": [round(v, 2) for v in os.getloadavg()],
    }


def revision() -> str | None:
    """The commit of this tree, with ``+`` where it has changes."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def command_of(job: Job, data: Path | None, out: Path, quick: bool) -> list[str] | str:
    """The arguments of a job, or why it cannot run."""
    script = ROOT / "benchmarks" / f"{job.name}.py"
    if not script.is_file():
        return "there is no such script"
    if quick and job.quick is None:
        return "it has no quick form"
    if any("{data}" in a for a in job.always) and data is None:
        return "it needs the development data: --data, or SAMED3D_DATA"
    arguments = [a.format(data=data, out=out) for a in job.always]
    if missing := [a for a in arguments if a.endswith(".nii.gz") and not Path(a).is_file()]:
        return f"not in the data folder: {Path(missing[0]).name}"
    return [str(script.relative_to(ROOT)), *arguments, *(job.quick or () if quick else ())]


def run_job(job: Job, command: Sequence[str], out: Path, quick: bool, data: Path | None = None) -> str:
    """Run one script and keep its JSON with what it was made by; returns why it failed, or nothing.

    Args:
        job: What is run.
        command: The script and its arguments.
        out: The JSON.
        quick: Whether it is a quick run.
        data: The data folder, which is called DATA in the command that is kept.
    """
    machine, began = describe_machine(), time.perf_counter()
    environment = os.environ | ({"SAMED3D_DATA": str(data)} if data else {})
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    written = out if not job.prints else None
    body = (
        json.loads(written.read_text())
        if written
        else json.loads(done.stdout)
        if job.prints == "json"
        else parsed_table(done.stdout)
    )
    shown = [a.replace(str(data), "DATA") if data else a for a in command]
    shown = [str(Path(a).relative_to(ROOT)) if Path(a).is_relative_to(ROOT) else a for a in shown]
    about = {"command": " ".join(["python", *shown]), "revision": revision(), "quick": quick, "machine": machine}
    body["collected"] = about | {"seconds": round(time.perf_counter() - began, 1)}
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(part, out)
    return ""


def parsed_table(text: str) -> dict[str, Any]:
    """A Markdown table as JSON."""
    cells = [
        [c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {"columns": cells[0], "rows": cells[2:]}


def write_page(results: Path = RESULTS, page: Path = PAGE) -> bool:
    """Make the page's blocks anew; returns whether anything changed."""
    old = page.read_text(encoding="utf-8")
    new = page_with_blocks(old, results)
    if new != old:
        part = page.with_name(f".{page.name}.part")
        part.write_text(new, encoding="utf-8")
        os.replace(part, page)
    return new != old


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these benchmarks")
    parser.add_argument("--quick", action="store_true", help="few repeats, not for publishing")
    parser.add_argument("--data", type=Path, help="folder of data sets; else SAMED3D_DATA, else ../shared/data")
    parser.add_argument("--into", type=Path, help="folder of the JSON files")
    parser.add_argument("--page", action="store_true", help="run nothing, only bring the page up to date")
    options = parser.parse_args()
    if options.page:
        print(f"docs/benchmarks.md {'brought up to date' if write_page() else 'is up to date'}")
        return 0
    data = (options.data or Path(os.environ.get("SAMED3D_DATA") or ROOT.parent / "shared" / "data")).resolve()
    into = (options.into or (ROOT / "out" / "bench" if options.quick else RESULTS)).resolve()
    into.mkdir(parents=True, exist_ok=True)
    failed = 0
    for job in [j for j in JOBS if not options.only or j.name in options.only]:
        command = command_of(job, data if data.is_dir() else None, into / f"{job.name}.json", options.quick)
        if isinstance(command, str):
            print(f"{job.name}: passed over, {command}", flush=True)
            continue
        print(f"{job.name}: running {' '.join(command)}", flush=True)
        reason = run_job(job, command, into / f"{job.name}.json", options.quick, data)
        failed += bool(reason)
        print(f"{job.name}: {f'FAILED: {reason}' if reason else 'done'}", flush=True)
    if into == RESULTS.resolve():
        write_page()
        print(f"docs/benchmarks.md holds {len(BLOCKS)} tables")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

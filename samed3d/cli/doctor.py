"""``samed3d doctor``: checks of this installation and this machine, each with a remedy where it fails.

A check that fails makes the exit code 1. A note says what is not available here but is not needed for clicking.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from samed3d.cli.options import Device

LEAST_MEMORY_GIB = 4
_TORCHVISION_REMEDY = (
    "install torch and torchvision from the same index, or remove torchvision and timm; until then start several "
    "processes with torchrun or accelerate-launch (with a hyphen): accelerate launch imports timm and fails"
)
DEVELOPER_EXTRAS = {"dev", "test", "e2e", "docs"}
BALL_RADIUS_VOX = 12
LEAST_DICE = 0.8
"""Of the self-test: the shipped model reaches 0.95 on its ball, a model with damaged weights nothing."""


State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        state: ``ok``, ``note`` (nothing that clicking needs is missing) or ``failed``.
        found: One line for a person.
        remedy: What to do about it; empty where there is nothing to do.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def _check(name: str, found: str, remedy: str = "", wrong: State = "note") -> Check:
    """A check that is ok where there is nothing to do, and ``wrong`` where there is."""
    return Check(name, wrong if remedy else "ok", found, remedy)


def doctor(
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> int:
    """Check this installation: versions, devices, memory, ports, weights, extras, and one click on a generated ball."""
    parts = (_python, _packages, _torchvision, _devices, _memory, _sessions, _ports, _weights, _extras)
    checks = [check for part in parts for check in _guarded(part)]
    checks += _guarded(lambda: _self_test(device), "self-test")
    failed = [check for check in checks if check.state == "failed"]
    if json_:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
        return 1 if failed else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{check.state:<6}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            typer.echo(f"{'':<6}  {'':<{width}}  -> {check.remedy}")
    typer.echo(f"{len(failed)} checks failed" if failed else "This installation works.")
    return 1 if failed else 0


def _guarded(part: Callable[[], Iterator[Check]], name: str = "") -> list[Check]:
    """The checks of one part; an exception is a failed check, so that the others still run."""
    try:
        return list(part())
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return [Check(name or part.__name__.strip("_"), "failed", message)]


def _python() -> Iterator[Check]:
    import samed3d
    from samed3d.environment import git_revision, processor_name

    revision = git_revision()
    where = f"{Path(samed3d.__file__).parent}{f', revision {revision}' if revision else ''}"
    yield _check("samed3d", f"{samed3d.__version__} in {where}")
    remedy = "install Python 3.11 or later" if sys.version_info < (3, 11) else ""
    yield _check("Python", f"{platform.python_version()} on {platform.platform()}", remedy, "failed")
    yield _check("processor", f"{processor_name()}, {os.cpu_count()} cores")


def _packages() -> Iterator[Check]:
    """The required packages: present, and recent enough."""
    needed = _requirements().get("", {})
    wrong = " ".join(f"'{line}'" for line in needed.values() if not _satisfied(line))
    listed = ", ".join(f"{name} {_version(name) or 'missing'}" for name in needed)
    yield _check("packages", listed, f"pip install {wrong}" if wrong else "", "failed")


def _torchvision() -> Iterator[Check]:
    """torchvision works with one version of torch only. Only models of timm need it, so it is never a failure."""
    if not (version := _version("torchvision")):
        return
    torch, remedy = _version("torch"), ""
    wanted = [r for r in importlib.metadata.requires("torchvision") or [] if r.split("=")[0].strip() == "torch"]
    if any(not _satisfied(line) for line in wanted):
        found = f"{version} needs {wanted[0]}, but torch is {torch}"
        remedy = f"pip install --upgrade torchvision, with torch {torch} held: -c a file that says torch=={torch}"
    else:
        done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
        found = f"{version} loads"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            found = f"{version} does not load with torch {torch}: {last}"
            remedy = _TORCHVISION_REMEDY
    yield _check("torchvision", found, remedy)


def _devices() -> Iterator[Check]:
    import torch

    from samed3d.devices import available_devices, computes_bf16

    remedy, described = "", []
    for name in available_devices():
        shown = f"cuda ({torch.cuda.get_device_name()})" if name == "cuda" else name
        described.append(f"{shown}{', fast in bf16' if computes_bf16(torch.device(name)) else ''}")
    if "cuda" not in available_devices() and shutil.which("nvidia-smi"):
        remedy = "this machine has an NVIDIA driver; install the CUDA build of torch that pytorch.org names to use it"
    yield _check("devices", "; ".join(described), remedy)
    yield _check("threads", f"{torch.get_num_threads()} for one prediction (OMP_NUM_THREADS sets it)")


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    short = memory.available < LEAST_MEMORY_GIB << 30
    yield _check("memory", found, "close other programs before you open a large volume" if short else "")


def _sessions() -> Iterator[Check]:
    from samed3d.cli.serve import default_sessions

    folder, remedy = default_sessions(), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            found = f"{folder} is writable, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
    except OSError as error:
        found, remedy = f"{folder}: {error.strerror}", "use samed3d app --sessions FOLDER"
    yield _check("sessions", found, remedy, "failed")


def _ports() -> Iterator[Check]:
    from samed3d.cli import serve

    for command, port in (("app", serve.APP_PORT), ("serve", serve.SERVE_PORT)):
        with socket.socket() as probe:
            used = probe.connect_ex(("127.0.0.1", port)) == 0
        remedy = f"another program, or another samed3d, listens there; use samed3d {command} --port N" if used else ""
        yield _check(f"port of {command}", f"{port} {'is in use' if used else 'is free'}", remedy)
    remedy = "" if serve.page_folder() else "in the source tree, with node installed: make viewer"
    yield _check("web page", "not in this installation" if remedy else "installed", remedy)


def _weights() -> Iterator[Check]:
    from samed3d.models.weights import find_checkpoint, licence_of, list_checkpoints

    names = list_checkpoints()
    if "default" not in names:
        found = "the default checkpoint is not installed"
        yield _check("weights", found, "install samed3d again from its wheel", "failed")
    for name in names:
        path = find_checkpoint(name)  # compares the file with the manifest's sha256
        assert path is not None  # listed names are in the manifest
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size / 2**20
        yield _check(f"weights {name}", f"{path}, {size:.1f} MiB, {licence_of(name)}, sha256 {digest[:16]}")


def _extras() -> Iterator[Check]:
    """Optional packages by extra, with the line that installs what is missing."""
    for extra, needed in _requirements().items():
        if not extra or extra in DEVELOPER_EXTRAS:
            continue
        missing = [line for line in needed.values() if not _satisfied(line)]
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        yield _check(f"extra {extra}", found, f"pip install 'samed3d[{extra}]'" if missing else "")


def _self_test(device: str) -> Iterator[Check]:
    """One click in the middle of a generated ball, through a session as a user's click goes."""
    import numpy as np

    from samed3d import Point, Session, Volume
    from samed3d.metrics import dice

    began = time.perf_counter()
    z, y, x = np.indices((64, 64, 64))
    ball = (z - 30) ** 2 + (y - 33) ** 2 + (x - 28) ** 2 < BALL_RADIUS_VOX**2
    image = (100 * ball + np.random.default_rng(0).normal(0, 20, ball.shape)).astype(np.int16)
    session = Session.open(Volume.from_array(image, source="generated"), device=device)
    loaded = time.perf_counter()
    session.add(Point((28, 33, 30)))
    first = time.perf_counter() - loaded
    score = dice(session.mask > 0, ball)
    found = f"Dice {score:.2f} on a generated ball; loaded in {loaded - began:.1f} s, first click {first:.1f} s"
    remedy = "" if score >= LEAST_DICE else "install samed3d again; the model is damaged"
    yield _check("self-test", found, remedy, "failed")


def _requirements() -> dict[str, dict[str, str]]:
    """Extra ("" for what is always needed) to package to requirement, from the installed package's metadata."""
    from packaging.requirements import Requirement

    grouped: dict[str, dict[str, str]] = {}
    for text in importlib.metadata.requires("samed3d") or []:
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip('"') if requirement.marker else ""
        grouped.setdefault(extra, {})[requirement.name] = f"{requirement.name}{requirement.specifier}"
    return grouped


def _satisfied(line: str) -> bool:
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    found = _version(requirement.name)
    return bool(found) and requirement.specifier.contains(found, prereleases=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""

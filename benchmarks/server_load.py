"""Measure the server under load: many clients that click at once, then many sessions opened and deleted.

    python benchmarks/server_load.py --out benchmarks/results/server_load.json

Each client has a session of its own on the same volume and clicks at seeded positions, now and then undoing one.
Afterwards the same edits are run alone, without a server: every prompt that was acknowledged must be in the session and
every mask must be the same, voxel for voxel.
"""

from __future__ import annotations

import argparse
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.collect import describe_machine, write_result  # noqa: E402
from samed3d.apps.client import Client, RemoteError, RemoteSession  # noqa: E402
from samed3d.prompts import Point  # noqa: E402

UNDO_SHARE = 0.1


@dataclass
class Clicking:
    """What one client did: its edits in order (None is an undo), how long each took, and what went wrong."""

    number: int
    session_id: str = ""
    edits: list[Point | None] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    model_seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Server:
    """``samed3d serve`` in a process of its own."""

    def __init__(self, root: Path, sessions: Path, model: str, places: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), "--root", str(root), "--sessions", str(sessions), "--model", model]
        command = [sys.executable, "-m", "samed3d", "serve", "--quiet", "--max-sessions", str(places), *options]
        self.process = subprocess.Popen(command, cwd=ROOT)
        for _ in range(1200):
            if self.process.poll() is not None:
                raise SystemExit("the server did not start")
            try:
                urllib.request.urlopen(f"{self.url}/healthz", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)

    def resident_mb(self) -> float:
        """Its memory now."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            found = re.search(r"^process_resident_memory_bytes (\S+)", answer.read().decode(), re.MULTILINE)
        assert found is not None
        return float(found.group(1)) / 2**20

    def stop(self) -> int:
        """End it in good order; its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def click(
    server: Server, image: str, client_number: int, seconds: float, think: float, centre: tuple[float, ...]
) -> Clicking:
    """One client: open, click until the time is over."""
    done, rng = Clicking(client_number), np.random.default_rng(client_number)
    client = Client(server.url, timeout=300)
    try:
        session = client.open_path(image)
        done.session_id = session.id
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one_edit(session, done, rng, centre)
            time.sleep(float(rng.uniform(0, 2 * think)))
    except RemoteError as error:
        done.errors.append(f"{error.status}: {error}")
    finally:
        client.close()
    return done


def one_edit(session: RemoteSession, done: Clicking, rng: np.random.Generator, centre: tuple[float, ...]) -> None:
    """A click near the structure's middle, or an undo."""
    undo = len(done.acknowledged) > 1 and rng.random() < UNDO_SHARE and session.can_undo
    size = np.array(session.size_ijk)
    at = np.clip(np.array(centre) + (rng.normal(0, 0.04, 3) * size if done.edits else 0), 0, size - 1).round()
    prompt = None if undo else Point(tuple(at.tolist()), positive=bool(not done.edits or rng.random() < 0.7))
    began = time.perf_counter()
    update = session.undo() if prompt is None else session.add(prompt)
    done.seconds.append(time.perf_counter() - began)
    done.edits.append(prompt)
    if prompt is None:
        done.acknowledged.pop()
    else:
        done.acknowledged.append(update.prompt_id)
        done.model_seconds.append(update.seconds)


def check(server: Server, image: Path, model: str, clients: list[Clicking]) -> dict[str, int]:
    """The same edits alone: prompts lost and masks that differ."""
    from samed3d import Session, load

    network, lost, different = load(model), 0, 0
    for done in clients:
        if not done.session_id:
            continue
        remote = Client(server.url, timeout=300).resume(done.session_id)
        kept = [p["id"] for o in remote.objects() for p in o.prompts]
        lost += len(set(done.acknowledged) - set(kept))
        with Session.open(image, network) as alone:
            for prompt in done.edits:
                alone.undo() if prompt is None else alone.add(prompt)
            different += int(not np.array_equal(alone.mask_of(1), remote.mask_of(1)))
    return {"prompts_lost": lost, "masks_that_differ": different}


def churn(server: Server, image: str, sessions: int, centre: tuple[float, ...]) -> list[float]:
    """Resident memory after every tenth of the sessions that are opened, clicked and deleted."""
    memory = [server.resident_mb()]
    for number in range(1, sessions + 1):
        session = Client(server.url, timeout=300).open_path(image)
        session.add(Point(tuple(centre)))
        session.delete()
        if number % max(1, sessions // 10) == 0:
            memory.append(server.resident_mb())
    return [round(m, 1) for m in memory]


def percentile(values: list[float], share: float) -> float:
    return round(float(np.quantile(values, share)), 4) if values else float("nan")


def volume_of(arguments: argparse.Namespace, folder: Path) -> tuple[Path, tuple[float, ...]]:
    """The image to click on, and where."""
    if arguments.image is not None:
        return arguments.image.resolve(), tuple(float(v) for v in arguments.point.split(","))
    from samed3d.data.phantom import anatomical_phantom
    from samed3d.volume import write_volume

    array, labels, grid, _ = anatomical_phantom(np.random.default_rng(0))
    target = folder / "body.nii"
    write_volume(target, array, grid)
    largest = int(np.argmax(np.bincount(labels[labels > 0].ravel())))
    z, y, x = np.argwhere(labels == largest)[np.count_nonzero(labels == largest) // 2]
    return target, (float(x), float(y), float(z))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    image, centre = volume_of(arguments, folder)
    server = Server(image.parent, folder / "sessions", arguments.model, arguments.clients)
    try:
        before = server.resident_mb()
        found: list[Clicking] = []
        threads = [
            threading.Thread(
                target=lambda n=n: found.append(
                    click(server, str(image), n, arguments.seconds, arguments.think, centre)
                )  # type: ignore[misc]
            )
            for n in range(arguments.clients)
        ]
        for thread in threads:
            thread.start()
        peak = before
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            peak = max(peak, server.resident_mb())
        result: dict[str, Any] = summary(found)
        result |= check(server, image, arguments.model, found)
        result["resident_mb"] = {"before": round(before, 1), "peak": round(peak, 1)}
        for done in found:
            if done.session_id:
                Client(server.url).resume(done.session_id).delete()
        result["resident_mb_over_sessions"] = churn(server, str(image), arguments.sessions, centre)
    finally:
        result_code = server.stop()
    return {**result, "exit_code": result_code}


def summary(found: list[Clicking]) -> dict[str, Any]:
    seconds = [s for done in found for s in done.seconds]
    model = [s for done in found for s in done.model_seconds]
    return {
        "clients": len(found),
        "edits": sum(len(done.edits) for done in found),
        "edits_per_client": {"least": min(len(d.edits) for d in found), "most": max(len(d.edits) for d in found)},
        "errors": [error for done in found for error in done.errors],
        "latency_s": {
            "p50": percentile(seconds, 0.5),
            "p95": percentile(seconds, 0.95),
            "most": percentile(seconds, 1.0),
        },
        "prediction_s": {
            "p50": percentile(model, 0.5),
            "p95": percentile(model, 0.95),
            "mean": round(statistics.fmean(model), 4),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long they click")
    parser.add_argument("--think", type=float, default=1.0, help="mean seconds between an answer and the next click")
    parser.add_argument("--sessions", type=int, default=200, help="opened and deleted afterwards, one after the other")
    parser.add_argument("--model", default="default")
    parser.add_argument("--image", type=Path, help="instead of the generated body; with --point")
    parser.add_argument("--point", help="I,J,K inside a structure of --image")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if (arguments.image is None) != (arguments.point is None):
        parser.error("--image and --point belong together")
    with tempfile.TemporaryDirectory() as name:
        result = measure(arguments, Path(name))
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key != "out"
    }
    write_result(arguments.out, {"settings": settings, **result, "machine": describe_machine()})
    return int(bool(result["errors"] or result["prompts_lost"] or result["masks_that_differ"] or result["exit_code"]))


if __name__ == "__main__":
    raise SystemExit(main())

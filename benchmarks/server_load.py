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
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from collect import ROOT, describe_machine, parser_of, write_result

from samed3d.apps.client import Client, RemoteError, RemoteSession
from samed3d.data.phantom import anatomical_phantom
from samed3d.inference.session import Session
from samed3d.models import load
from samed3d.prompts import Point
from samed3d.volume import write_volume

UNDO_SHARE = 0.1


@dataclass
class Clicking:
    """What one client did: its edits in order (None is an undo), how long each took, and what went wrong."""

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


def click(server: Server, image: str, number: int, seconds: float, think: float, centre: tuple[float, ...]) -> Clicking:
    """One client: open the image, then click until the time is over."""
    done, rng = Clicking(), np.random.default_rng(number)
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


def generated_body(folder: Path) -> tuple[Path, tuple[float, ...]]:
    """A generated volume, and a voxel i, j, k of its largest structure."""
    array, labels, grid, _ = anatomical_phantom(np.random.default_rng(0))
    write_volume(folder / "body.nii", array, grid)
    inside = np.argwhere(labels == np.bincount(labels[labels > 0].ravel()).argmax())
    return folder / "body.nii", tuple(float(v) for v in inside[len(inside) // 2][::-1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Clicks of all clients at once, the same clicks alone, and the server's memory over many sessions."""
    image, centre = generated_body(folder)
    server = Server(image.parent, folder / "sessions", options.model, options.clients)
    try:
        before = peak = server.resident_mb()
        found: list[Clicking] = []
        with ThreadPoolExecutor(options.clients) as pool:
            waiting = {
                pool.submit(click, server, str(image), number, options.seconds, options.think, centre)
                for number in range(options.clients)
            }
            while waiting:
                finished, waiting = wait(waiting, timeout=1)
                found += [future.result() for future in finished]
                peak = max(peak, server.resident_mb())
        result = summary(found) | check(server, image, options.model, found)
        result["resident_mb"] = {"before": round(before, 1), "peak": round(peak, 1)}
        for done in found:
            if done.session_id:
                Client(server.url).resume(done.session_id).delete()
        result["resident_mb_over_sessions"] = churn(server, str(image), options.sessions, centre)
    finally:
        exit_code = server.stop()
    return {**result, "exit_code": exit_code}


def summary(found: list[Clicking]) -> dict[str, Any]:
    """Counts of edits and quantiles of their seconds: as a client waits, and of the prediction alone."""
    edits = [len(done.edits) for done in found]
    seconds = np.array([s for done in found for s in done.seconds])
    prediction = np.array([s for done in found for s in done.model_seconds])
    p50, p95, most = (round(float(np.quantile(seconds, share)), 4) for share in (0.5, 0.95, 1))
    model_p50, model_p95 = (round(float(np.quantile(prediction, share)), 4) for share in (0.5, 0.95))
    return {
        "clients": len(found),
        "edits": sum(edits),
        "edits_per_client": {"least": min(edits), "most": max(edits)},
        "errors": [error for done in found for error in done.errors],
        "latency_s": {"p50": p50, "p95": p95, "most": most},
        "prediction_s": {"p50": model_p50, "p95": model_p95, "mean": round(float(prediction.mean()), 4)},
    }


def main() -> int:
    parser = parser_of(__doc__, "server_load.json")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long they click")
    parser.add_argument("--think", type=float, default=1.0, help="mean seconds between an answer and the next click")
    parser.add_argument("--sessions", type=int, default=200, help="opened and deleted afterwards, one after the other")
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        result = measure(options, Path(name))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    write_result(options.out, {"settings": settings, **result, "machine": machine})
    return int(bool(result["errors"] or result["prompts_lost"] or result["masks_that_differ"] or result["exit_code"]))


if __name__ == "__main__":
    raise SystemExit(main())

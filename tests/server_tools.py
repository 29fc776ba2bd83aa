"""Servers for tests: inside the process, and as a process of their own that can be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from samed3d.geometry import Grid
from samed3d.volume import Volume, write_volume
from tests.brightness_model import BrightnessModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parents[1]
BALL_IJK = (13, 15, 11)


def write_ball(path: Path, shape: tuple[int, int, int] = (24, 28, 32), seed: int = 0) -> Volume:
    """A bright ball on noise, as a file; its centre is ``BALL_IJK``."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    i, j, k = BALL_IJK
    ball = (z - k) ** 2 + (y - j) ** 2 + (x - i) ** 2 <= 25
    array = (ball + np.random.default_rng(seed).normal(0, 0.05, shape)).astype(np.float32)
    grid = Grid(shape, (1.0, 1.2, 1.5), (3.0, -4.0, 5.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    write_volume(path, array, grid)
    return Volume(array, grid, str(path))


def tiny_model(_: str = "default") -> BrightnessModel:
    """What servers of tests load for any name."""
    return BrightnessModel((16, 16, 16))


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[TestClient]:
    """A client of an application in this process; ``folder`` holds the sessions and is the only root."""
    from fastapi.testclient import TestClient

    from samed3d.apps.server import create_app
    from samed3d.apps.service import ServerOptions

    options = {"sessions": folder / "sessions", "roots": (folder,), **options}
    with TestClient(create_app(ServerOptions(**options), tiny_model), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A real server in a process of its own, with the tiny model.

    Args:
        folder: Holds the sessions and is the only root.
        port: To listen on.
        **limits: Of ``Limits``.
    """

    def __init__(self, folder: Path, port: int | None = None, **limits: float) -> None:
        self.folder, self.port = folder, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        code = (
            "import sys; from pathlib import Path; from samed3d.apps.server import run_server; "
            "from samed3d.apps.service import ServerOptions; from samed3d.apps.sessions import Limits; "
            "from tests.server_tools import tiny_model; folder = Path(sys.argv[1]); "
            f"options = ServerOptions(folder / 'sessions', (folder,), limits=Limits(**{limits!r})); "
            "run_server(options, '127.0.0.1', int(sys.argv[2]), tiny_model)"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(self.port)], env=environment, cwd=ROOT)
        self._wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As a crash does it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """As an operator does it; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def _wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
            try:
                httpx.get(f"{self.url}/healthz", timeout=1)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not come up")

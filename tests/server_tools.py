"""Servers for tests: inside the process, and as a process of their own that can be killed."""

from __future__ import annotations

import multiprocessing
import socket
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samed3d.apps.client import update_from_json
from samed3d.geometry import Grid
from samed3d.volume import Volume, write_volume
from tests.brightness_model import BrightnessModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi.testclient import TestClient

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
def served(folder: Path, load: Callable[[str], BrightnessModel] = tiny_model, **options: Any) -> Iterator[TestClient]:
    """A client of an application in this process; ``folder`` holds the sessions and is the only root."""
    from fastapi.testclient import TestClient

    from samed3d.apps.server.app import create_app
    from samed3d.apps.server.service import ServerOptions

    options = {"sessions": folder / "sessions", "roots": (folder,), **options}
    with TestClient(
        create_app(ServerOptions(**options), load), base_url="http://localhost", raise_server_exceptions=False
    ) as client:
        yield client


CLICK = {"prompt": {"type": "point", "at": list(BALL_IJK)}}


def opened(client: TestClient, **body: Any) -> str:
    """Open the ball; the session's id."""
    answer = client.post("/api/sessions", json={"path": "ball.nii.gz", **body})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def masks_of(client: TestClient, session_id: str) -> dict[int, np.ndarray]:
    """Every object's whole mask, as a client puts it together."""
    size = tuple(client.get(f"/api/sessions/{session_id}").json()["size_ijk"])
    found = {}
    for entry in client.get(f"/api/sessions/{session_id}/masks").json()["updates"]:
        number, region, part = update_from_json(entry, size)
        found[number] = np.zeros(size[::-1], np.uint8)
        found[number][region.slices] = part
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_tiny_server(folder: Path, port: int, limits: dict[str, float]) -> None:
    """The body of a ``ServerProcess``."""
    from samed3d.apps.server.app import run_server
    from samed3d.apps.server.service import ServerOptions

    run_server(ServerOptions(folder / "sessions", (folder,), **limits), "127.0.0.1", port, tiny_model)  # type: ignore[arg-type]


class ServerProcess:
    """A real server in a process of its own, with the tiny model.

    Processes come from a fork server that has imported everything once, so that a second one starts at once.

    Args:
        folder: Holds the sessions and is the only root.
        port: To listen on.
        **limits: Of ``Limits``.
    """

    def __init__(self, folder: Path, port: int | None = None, **limits: float) -> None:
        self.folder, self.port = folder, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["samed3d.apps.server.app", "uvicorn.lifespan.on", "uvicorn.protocols.http.auto", "tests.server_tools"]
        )
        self.process = context.Process(target=run_tiny_server, args=(folder, self.port, limits), daemon=True)
        self.process.start()
        self._wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As a crash does it."""
        self.process.kill()
        self.process.join(10)

    def stop(self) -> int | None:
        """As an operator does it; returns the exit code."""
        self.process.terminate()
        self.process.join(30)
        return self.process.exitcode

    def _wait(self) -> None:
        for _ in range(1200):
            assert self.process.is_alive(), f"the server ended with {self.process.exitcode}"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not come up")


def sent(address, head: str, body: bytes = b"", length: int | None = None, read: int = 0) -> None:
    """Send a request, read some bytes of its answer, and hang up as a killed program does."""
    head = f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    with socket.create_connection(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(head.replace("\r\nContent", "\r\nContent-Type: application/json\r\nContent", 1).encode() + body)
        time.sleep(0.1)
        while read > 0:
            read -= len(client.recv(read)) or read

"""The client's connection: kept while it is used, opened anew after a pause, so that a click after thinking is not
lost."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from samed3d.apps import connection
from samed3d.apps.connection import Connection, RemoteError

PAUSE = 0.2


class Impatient(http.server.BaseHTTPRequestHandler):
    """A server that closes a kept connection after a pause, as uvicorn does after five seconds."""

    protocol_version = "HTTP/1.1"
    timeout = PAUSE

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Impatient) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_edit_after_a_pause_arrives(url, monkeypatch):
    monkeypatch.setattr(connection, "IDLE_SECONDS", PAUSE / 4)
    client = Connection(url, "", 5.0)
    assert client.call("POST", "/a", {}) == {}
    time.sleep(2 * PAUSE)
    assert client.call("POST", "/a", {}) == {}


def test_an_edit_into_a_closed_connection_is_not_sent_twice(url, monkeypatch):
    monkeypatch.setattr(connection, "IDLE_SECONDS", 60.0)
    client = Connection(url, "", 5.0)
    client.call("POST", "/a", {})
    time.sleep(2 * PAUSE)
    with pytest.raises(RemoteError, match="does not answer"):
        client.call("POST", "/a", {})

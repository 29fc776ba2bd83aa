"""The client's connection: a click after a pause arrives, and an edit is never sent twice."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from samed3d.apps import client as client_module
from samed3d.apps.client import Client, RemoteError
from samed3d.errors import InputError

PAUSE = 0.2


class Impatient(http.server.BaseHTTPRequestHandler):
    """A server that closes a kept connection after a pause, as uvicorn does, and never answers ``/drop`` the first
    time."""

    protocol_version = "HTTP/1.1"
    timeout = PAUSE
    received: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.received.append(f"{self.command} {self.path}")
        if self.path == "/drop" and self.received.count(self.received[-1]) == 1:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Impatient.received = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Impatient) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("idle_seconds", [PAUSE / 4, 60.0])
def test_an_edit_after_a_pause_arrives(url, monkeypatch, idle_seconds):
    monkeypatch.setattr(client_module, "IDLE_SECONDS", idle_seconds)
    client = Client(url, "", 5.0)
    assert client.call("POST", "/a", json={}) == {}
    time.sleep(2 * PAUSE)
    assert client.call("POST", "/a", json={}) == {}
    assert Impatient.received == ["POST /a", "POST /a"]


def test_an_edit_into_a_closed_connection_is_not_sent_twice(url):
    client = Client(url, "", 5.0)
    client.call("POST", "/a", json={})
    with pytest.raises(RemoteError, match="does not answer"):
        client.call("POST", "/drop", json={})
    assert Impatient.received == ["POST /a", "POST /drop"]
    assert client.call("GET", "/drop") == {}  # reading changes nothing, so it is repeated
    assert Impatient.received[2:] == ["GET /drop", "GET /drop"]


@pytest.mark.parametrize("url", ["127.0.0.1:1527", "ftp://a", "http://", ""])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InputError, match="url must be http://HOST:PORT"):
        Client(url)

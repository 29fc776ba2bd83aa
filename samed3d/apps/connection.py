"""HTTP to a server of ours with the standard library: one kept connection, the token, JSON, errors. What is asked is in
``client.py``.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import time
import urllib.parse
from typing import IO, Any

from samed3d.errors import InputError

_SENT_AGAIN = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest)
IDLE_SECONDS = 2.0
"""A connection unused for longer is opened anew; servers keep one for about five seconds."""


class RemoteError(RuntimeError):
    """An answer other than success.

    Attributes:
        status: HTTP status; 409 when the session was changed elsewhere, 401 for a wrong token, 503 when the server is
            full.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """A connection to a server.

    Args:
        url: ``http://host:port`` or ``https://...``.
        token: Where the server demands one; ``SAMED3D_TOKEN`` by default.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str = "http://127.0.0.1:1527", token: str | None = None, timeout: float = 120.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url must be http://HOST:PORT, got {url!r}")
        self._token = os.environ.get("SAMED3D_TOKEN", "") if token is None else token
        self._used = time.monotonic()
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        self._connection.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A request with a JSON body and a JSON answer.

        Raises:
            RemoteError: for an answer other than success, or none.
        """
        sent = None if body is None else json.dumps(body).encode()
        return self.send(method, path, sent, {"Content-Type": "application/json"} if sent is not None else {})

    def fetch(self, path: str, target: IO[bytes]) -> None:
        """Copy a file of the server."""
        with self._request("GET", path, None, {}) as answer:
            shutil.copyfileobj(answer, target)

    def send(self, method: str, path: str, body: bytes | IO[bytes] | None, headers: dict[str, str]) -> Any:
        """A request with any body and a JSON answer; raises ``RemoteError`` as ``call``."""
        with self._request(method, path, body, headers) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def _request(
        self, method: str, path: str, body: bytes | IO[bytes] | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        if self._token:
            headers = {**headers, "Authorization": f"Bearer {self._token}"}
        try:
            answer = self._answer(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise RemoteError(
                0, f"the server at {self._connection.host}:{self._connection.port} does not answer ({error})"
            ) from error
        if answer.status >= 400:
            with answer:
                content = answer.read(1 << 16)
            try:
                detail = json.loads(content)["detail"]
            except (ValueError, KeyError, TypeError):
                detail = f"{answer.status} {answer.reason}"
            raise RemoteError(answer.status, str(detail))
        return answer

    def _answer(
        self, method: str, path: str, body: bytes | IO[bytes] | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        if time.monotonic() - self._used > IDLE_SECONDS:
            self._connection.close()  # the server may be about to close it; an edit that fell into that gap could not be sent again
        self._used = time.monotonic()
        try:
            self._connection.request(method, path, body, headers)
            return self._connection.getresponse()
        except _SENT_AGAIN:
            # A kept connection that the server closed meanwhile. Only what changes nothing may be sent twice.
            self._connection.close()
            if method != "GET":
                raise
            self._connection.request(method, path, body, headers)
            return self._connection.getresponse()

"""Who may ask, from where, and how much: checked before any route sees a request.

A page of another site cannot use the server through the user's browser (Host and Origin are compared), nobody can
without the token where one is set, and no body is read beyond its limit. Files that arrive are judged in
``uploads.py``; paths are confined here.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from samed3d.apps.protocol import ApiError
from samed3d.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Access:
    """What is let in.

    Attributes:
        token: Demanded as ``Authorization: Bearer TOKEN``; empty for none, which only a loopback address may have.
        hosts: Names that a Host header may carry beside loopback and, where a token is set, plain IP addresses.
        largest_json: Bytes of an ordinary request body.
        largest_upload: Bytes of a body on one of ``upload_paths``.
        upload_paths: Endings of paths that take whole volumes.
        open_paths: Paths that need no token (they hold no data).
    """

    token: str = ""
    hosts: frozenset[str] = frozenset()
    largest_json: int = 32 * 2**20
    largest_upload: int = 2 * 2**30
    upload_paths: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset({"/healthz"})
    open_folders: tuple[str, ...] = field(default=())


def check_binding(host: str, token: str) -> None:
    """Refuse to listen beyond this machine without a token, and tokens that could be guessed.

    Raises:
        InputError: in those two cases.
    """
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError(
            f"the token must be at least {SHORTEST_TOKEN} ASCII characters without spaces, got {len(token)}; make a longer one"
        )
    if not token and not _is_loopback(host):
        raise InputError(
            f"--host {host} can be reached by others, so a token is needed: put one into SAMED3D_TOKEN or --token-file"
        )


def confined(path: str, roots: list[Path]) -> Path:
    """A path that a client named, resolved, if it lies in one of the allowed folders; so must what a folder's links
    point at.

    Raises:
        ApiError: 403 if it does not; whether it exists elsewhere is not said.
    """
    if not roots:
        raise ApiError(403, "no folder is open to clients; start the server with --root FOLDER, or upload the file")
    if "\0" in path or len(path) > 4096:
        raise ApiError(400, "path must be a file name, got one with a zero byte or of more than 4096 characters")
    asked = Path(path)
    real_roots = [root.resolve() for root in roots]
    candidates = [asked] if asked.is_absolute() else [root / asked for root in real_roots]
    inside = [
        real for real in (_resolved(c) for c in candidates) if real and any(real.is_relative_to(r) for r in real_roots)
    ]
    for real in sorted(inside, key=lambda p: not p.exists()):
        if not real.exists():
            raise ApiError(404, f"there is no such file in the allowed folders: {path}")
        if real.is_dir():
            for entry in real.iterdir():
                target = _resolved(entry) if entry.is_symlink() else entry
                if target is None or not any(target.is_relative_to(r) for r in real_roots):
                    raise ApiError(403, f"a link in this folder points out of the allowed folders: {path}")
        return real
    raise ApiError(403, f"path must lie in a folder that the server was started with (--root), got {path}")


class Guard:
    """ASGI middleware: Host, Origin, token and body size, in this order."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass or answer it here."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no route speaks websocket; closing the connection is the answer
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["method"], scope["path"], scope.get("query_string", b""), headers)
            limit = self._limit(scope["path"], headers)
        except ApiError as error:
            return await _answer(send, error)
        await self.app(scope, _counted(receive, limit), send)

    def _check(self, method: str, path: str, query: bytes, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._known_host(host):
            raise ApiError(
                421,
                f"this server does not answer for host {host[:100]!r}; use its address, or start it with --allow-host",
            )
        origin = headers.get("origin")
        if origin is not None and not _same_origin(origin, host):
            raise ApiError(403, f"requests from another site are refused, got Origin {origin[:100]!r}")
        if headers.get("sec-fetch-site") == "cross-site" and method not in ("GET", "HEAD"):
            raise ApiError(403, "requests from another site are refused")
        if b"token=" in query:
            raise ApiError(400, "a token does not belong into an address; send it as Authorization: Bearer TOKEN")
        opened = path in self.access.open_paths or (
            method == "GET" and path.startswith(self.access.open_folders or ("\0",))
        )
        if self.access.token and not opened and not _has_token(headers.get("authorization", ""), self.access.token):
            raise ApiError(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")

    def _known_host(self, host: str) -> bool:
        name = _host_name(host)
        if name in LOOPBACK_NAMES or name in self.access.hosts:
            return True
        # DNS rebinding needs a name; with a token, an address may be any of this machine's.
        return bool(self.access.token) and _is_address(name)

    def _limit(self, path: str, headers: dict[str, str]) -> int:
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "a compressed request body is not taken; send it without Content-Encoding")
        upload = path.endswith(self.access.upload_paths) if self.access.upload_paths else False
        limit = self.access.largest_upload if upload else self.access.largest_json
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(400, f"Content-Length must be a number, got {length[:40]!r}")
        if int(length) > limit:
            raise ApiError(413, f"the request body must have at most {limit} bytes, got {length}")
        return limit


def _counted(receive: Receive, limit: int) -> Receive:
    """A body without a length, or with a false one, ends at the limit too."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise ApiError(413, f"the request body must have at most {limit} bytes, got more")
        return message

    return counted


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps({"detail": error.message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _has_token(header: str, token: str) -> bool:
    scheme, _, given = header.partition(" ")
    return (
        hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode()) and scheme.lower() == "bearer"
    )


def _same_origin(origin: str, host: str) -> bool:
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return None

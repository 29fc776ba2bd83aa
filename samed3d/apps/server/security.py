"""Checks of every request before a route sees it: Host, Origin, bearer token and body size.

The Host and Origin checks stop pages of other sites from using the server through the user's browser, including by DNS
rebinding. They are written by hand because Starlette's TrustedHostMiddleware cannot allow any IP address, and FastAPI's
HTTPBearer reads a request's body before it checks the token. Files and paths from clients are checked in
``uploads.py``.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from samed3d.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST_TOKEN = 16


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status, 400 to 599.
        message: One line that says what is wrong and what to do.
        retry_after: Seconds after which the client may try again, or None.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, " ".join(message.split()), retry_after

    def response(self) -> JSONResponse:
        """The answer as JSON, ``{"detail": message}``."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": self.message}, self.status, headers)


@dataclass(frozen=True)
class Access:
    """Which requests the server accepts.

    Attributes:
        token: Required as ``Authorization: Bearer TOKEN``; empty for none, which only a loopback address may have.
        hosts: Names that a Host header may carry besides loopback and, where a token is set, any IP address.
        largest_json: Bytes of an ordinary request body.
        largest_upload: Bytes of a body that holds a volume.
    """

    token: str = ""
    hosts: frozenset[str] = frozenset()
    largest_json: int = 32 * 2**20
    largest_upload: int = 2 * 2**30


def check_binding(host: str, token: str) -> None:
    """Refuse addresses that other machines can reach without a token, and tokens that are easy to guess.

    Raises:
        InputError: in those two cases.
    """
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError(
            f"the token must be at least {SHORTEST_TOKEN} ASCII characters without spaces, got {len(token)}; "
            "make a longer one"
        )
    if not token and host not in LOOPBACK_NAMES and not (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        raise InputError(
            f"other machines can reach --host {host}, so a token is needed: put one into SAMED3D_TOKEN or --token-file"
        )


class Guard:
    """ASGI middleware that checks Host, Origin, token and body size, in this order.

    Args:
        app: The application behind it.
        access: Which requests it accepts.
        upload_paths: Endings of the paths whose bodies may hold a volume.
        open_paths: Paths that need no token.
        open_folder: Start of further paths that can be read without a token, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        upload_paths: tuple[str, ...] = (),
        open_paths: Collection[str] = (),
        open_folder: str | None = None,
    ) -> None:
        self.app, self.access, self.upload_paths = app, access, upload_paths
        self.open_paths, self.open_folder = open_paths, open_folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the error."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no route uses WebSocket; returning closes the connection
        headers = Headers(scope=scope)
        try:
            self._check_site(scope["method"], headers)
            self._check_token(scope, headers)
            limit = self._body_limit(scope["path"], headers)
        except ApiError as error:
            response = error.response()
            response.headers["Connection"] = "close"  # the body was not read
            return await response(scope, receive, send)
        await self.app(scope, _limited(receive, limit), send)

    def _check_site(self, method: str, headers: Headers) -> None:
        """Refuse requests under a foreign host name and from pages of other sites."""
        host = headers.get("host", "")
        name = _host_name(host)
        # DNS rebinding needs a name. With a token, any address of this machine may be used.
        known = name in LOOPBACK_NAMES or name in self.access.hosts or (bool(self.access.token) and _is_address(name))
        if not known:
            raise ApiError(
                421,
                f"this server does not answer for host {host[:100]!r}; use its address, or start it with --allow-host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise ApiError(403, f"requests from another site are refused, got Origin {origin[:100]!r}")
        if headers.get("sec-fetch-site") == "cross-site" and method not in ("GET", "HEAD"):
            raise ApiError(403, "requests from another site are refused")

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        if b"token=" in scope.get("query_string", b""):
            raise ApiError(400, "a token must not be part of an address; send it as Authorization: Bearer TOKEN")
        path, token = scope["path"], self.access.token
        is_page = self.open_folder is not None and scope["method"] == "GET" and path.startswith(self.open_folder)
        if not token or path in self.open_paths or is_page:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
            raise ApiError(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")

    def _body_limit(self, path: str, headers: Headers) -> int:
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "compressed request bodies are not accepted; send it without Content-Encoding")
        # ITK-SNAP's routes end in the session's id.
        is_upload = path.endswith(self.upload_paths) or path.rpartition("/")[0].endswith(self.upload_paths)
        limit = self.access.largest_upload if is_upload else self.access.largest_json
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(400, f"Content-Length must be a number, got {length[:40]!r}")
        if int(length) > limit:
            raise ApiError(413, f"the request body must have at most {limit} bytes, got {length}")
        return limit


def _limited(receive: Receive, limit: int) -> Receive:
    """The same stream, cut off at the limit: a Content-Length may be missing or false."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise ApiError(413, f"the request body must have at most {limit} bytes, got more")
        return message

    return limited


def _host_name(host: str) -> str:
    """The name or address of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

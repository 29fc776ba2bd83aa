"""Checks of every request before a route sees it: Host, Origin, bearer token and body size.

The Host and Origin checks stop pages of other sites from using the server through the user's browser, including by DNS
rebinding. They are written by hand because Starlette's TrustedHostMiddleware cannot allow any IP address, and FastAPI's
HTTPBearer reads a request's body before it checks the token. Files and paths from clients are checked in ``files.py``.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from samed3d.apps.server.service import ServerOptions
from samed3d.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE_FOLDER = "/app/"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST_TOKEN = 16
_UPLOAD_PATHS = ("/api/sessions/upload", "/segment", "/set_image", "/upload_raw", "_interaction")
"""Endings of the paths whose bodies may hold a volume."""


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
    """ASGI middleware that checks Host, Origin, token and body size, in this order."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options = app, options

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
        except HTTPException as error:
            # The body was not read, so the connection cannot be used again.
            answer_headers = {**(error.headers or {}), "Connection": "close"}
            return await JSONResponse({"detail": error.detail}, error.status_code, answer_headers)(scope, receive, send)
        await self.app(scope, _limited(receive, limit), send)

    def _check_site(self, method: str, headers: Headers) -> None:
        """Refuse requests under a foreign host name and from pages of other sites."""
        host = headers.get("host", "")
        name = _host_name(host)
        # DNS rebinding needs a name. With a token, any address of this machine may be used.
        known = name in LOOPBACK_NAMES or name in self.options.hosts or (bool(self.options.token) and _is_address(name))
        if not known:
            raise HTTPException(
                421,
                f"this server does not answer for host {host[:100]!r}; use its address, or start it with --allow-host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise HTTPException(403, f"requests from another site are refused, got Origin {origin[:100]!r}")
        if headers.get("sec-fetch-site") == "cross-site" and method not in ("GET", "HEAD"):
            raise HTTPException(403, "requests from another site are refused")

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        if b"token=" in scope.get("query_string", b""):
            raise HTTPException(400, "a token must not be part of an address; send it as Authorization: Bearer TOKEN")
        path, token = scope["path"], self.options.token
        # The page itself holds no data; its requests need the token like any others.
        is_page = path == "/" or (scope["method"] == "GET" and path.startswith(PAGE_FOLDER))
        if not token or path == "/healthz" or (is_page and self.options.page is not None):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
            message = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    def _body_limit(self, path: str, headers: Headers) -> int:
        if headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "compressed request bodies are not accepted; send it without Content-Encoding")
        # ITK-SNAP's routes end in the session's id.
        is_upload = path.endswith(_UPLOAD_PATHS) or path.rpartition("/")[0].endswith(_UPLOAD_PATHS)
        limit = self.options.largest_upload if is_upload else self.options.largest_json
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise HTTPException(400, f"Content-Length must be a number, got {length[:40]!r}")
        if int(length) > limit:
            raise HTTPException(413, f"the request body must have at most {limit} bytes, got {length}")
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
                raise HTTPException(413, f"the request body must have at most {limit} bytes, got more")
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

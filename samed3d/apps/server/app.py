"""The server as one program: its routes, the answers to errors, metrics, the API's page, start and stop.

The REST API is in ``routes.py``, one-shot segmentation in ``segment.py``, nnInteractive's protocol in
``nninteractive.py``; the checks of each request are in ``security.py``, sessions in ``sessions.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from samed3d.apps.server.itksnap import itksnap
from samed3d.apps.server.nninteractive import nninteractive
from samed3d.apps.server.routes import api
from samed3d.apps.server.security import ApiError, Guard, check_binding
from samed3d.apps.server.segment import one_shot
from samed3d.apps.server.service import ServerOptions, Service
from samed3d.errors import InputError
from samed3d.models import load_promptable
from samed3d.models.base import PromptableModel

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

PAGE_FOLDER = "/app/"
_UPLOAD_PATHS = ("/api/sessions/upload", "/segment", "/set_image", "/upload_raw", "_interaction")
_EXPIRE_EVERY_S = 5.0
_STOP_SECONDS = 20


def create_app(options: ServerOptions, load: Callable[[str], PromptableModel] = load_promptable) -> FastAPI:
    """The server as an ASGI application.

    Args:
        options: How it is set up.
        load: Returns a model by name.

    Raises:
        InputError: if the folder of sessions cannot be used.
    """
    from samed3d import __version__

    service = Service(options, load)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        expiring = asyncio.create_task(_expire(service))
        yield
        expiring.cancel()
        await asyncio.to_thread(service.registry.close)

    app = FastAPI(title="samed3d", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in (api, one_shot, nninteractive, itksnap):
        app.include_router(router)
    _add_server_routes(app, service)
    _add_error_answers(app, options)
    app.add_middleware(_CountAnswers, service=service)
    # The page itself holds no data; its requests need the token like any others.
    has_page = options.page is not None
    app.add_middleware(
        Guard,
        access=options.access,
        upload_paths=_UPLOAD_PATHS,
        open_paths={"/healthz", "/"} if has_page else {"/healthz"},
        open_folder=PAGE_FOLDER if has_page else None,
    )
    return app


def run_server(
    options: ServerOptions,
    host: str,
    port: int,
    load: Callable[[str], PromptableModel] = load_promptable,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until interrupted or terminated; requests under way are finished first.

    Args:
        options: How the server is set up.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        load: Returns a model by name.
        ready: Called with the server's address, ``http://HOST:PORT``, once it accepts connections.

    Raises:
        InputError: if the address needs a token or is in use, or the folder of sessions cannot be used.
    """
    import uvicorn

    check_binding(host, options.access.token)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except OSError as error:
            raise InputError(
                f"cannot listen on port {port} of {host} ({error.strerror}); choose another port: --port"
            ) from error
        app = create_app(options, load)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        ready(address)
        # uvicorn's own log would hold addresses, and proxy headers could forge them.
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        with _signals_are_handled():
            uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _signals_are_handled() -> Iterator[None]:
    """uvicorn stops on a signal and then raises it again; here a requested stop is no error."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _expire(service: Service) -> None:
    """Unload unused sessions, for as long as the server runs."""
    while True:
        await asyncio.sleep(_EXPIRE_EVERY_S)
        try:
            service.registry.expire()
        except ApiError:
            return  # the queue is closed: the server stops


def _add_server_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, bool]:
        """Whether the server answers; needs no token."""
        return {"ok": True}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Counters, as Prometheus text."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_api_page(app.openapi()))

    if service.options.page is not None:
        app.mount(PAGE_FOLDER.rstrip("/"), StaticFiles(directory=service.options.page, html=True), name="page")

        @app.get("/", include_in_schema=False)
        async def root() -> Response:
            return RedirectResponse(PAGE_FOLDER)


def _add_error_answers(app: FastAPI, options: ServerOptions) -> None:
    folders = {str(path) for root in (options.sessions, *options.roots) for path in (root, root.resolve())}
    inside_folders = re.compile("|".join(rf"{re.escape(folder)}/(?:[^\s'\"]*/)?" for folder in sorted(folders)))

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"detail": inside_folders.sub("", " ".join(message.split()))}, status, headers)

    def is_disk_full(cause: BaseException | None) -> bool:
        return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)

    def invalid(error: RequestValidationError) -> str:
        problems = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        return "the request does not fit: " + "; ".join(problems)

    answers: dict[type[Exception], Callable[[Any], Response]] = {
        ApiError: lambda error: error.response(),
        InputError: lambda error: answer(507 if is_disk_full(error.__cause__) else 400, str(error)),
        RequestValidationError: lambda error: answer(422, invalid(error)),
        HTTPException: lambda error: answer(error.status_code, str(error.detail), dict(error.headers or {})),
        # Nobody receives this answer, and nothing is logged.
        ClientDisconnect: lambda error: answer(499, "the client closed the connection"),
        Exception: lambda error: answer(500, f"internal error ({type(error).__name__}); see the server's log"),
    }

    async def answered(request: Request, error: Exception) -> Response:
        found = next(kind for kind in answers if isinstance(error, kind))
        if found is Exception:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answers[found](error)

    for kind in answers:
        app.add_exception_handler(kind, answered)


class _CountAnswers:
    """Counts answers by route, and adds the headers that every answer has."""

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.service.requests.labels(scope["method"], route, message["status"]).inc()
                message["headers"] = [*message.get("headers", []), *self.HEADERS]
            await send(message)

        await self.app(scope, receive, counted)


# The page /docs: every route of the OpenAPI description, without scripts and without anything from another site.

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
background:#14171c;color:#dfe4ea}
h2{margin:1.8rem 0 .4rem;font-size:1.05rem;color:#9fb3c8;text-transform:uppercase;letter-spacing:.06em}
details{border-bottom:1px solid #2a313b;padding:.35rem 0}summary{cursor:pointer}code{color:#8fd3ff}
b{display:inline-block;width:4.2rem}
a{color:#8fd3ff}pre{white-space:pre-wrap;background:#1c2128;padding:.6rem;border-radius:.4rem}
"""


def _api_page(description: dict[str, Any]) -> str:
    """An OpenAPI description as HTML."""
    groups: dict[str, list[str]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            group = groups.setdefault((operation.get("tags") or ["other"])[0], [])
            group.append(_operation(method, path, operation, description))
    title, version = escape(description["info"]["title"]), escape(description["info"]["version"])
    body = "".join(f"<h2>{escape(name)}</h2>{''.join(entries)}" for name, entries in groups.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} API</title><style>{_STYLE}</style>'
        f"<h1>{title} {version}</h1><p>The same for programs: <a href='openapi.json'>openapi.json</a></p>{body}"
    )


def _operation(method: str, path: str, operation: dict[str, Any], description: dict[str, Any]) -> str:
    head = f"<b>{method.upper()}</b><code>{escape(path)}</code> {escape(operation.get('description', ''))}"
    lines = [
        f"{p['name']} ({p['in']}{', required' if p.get('required') else ''})" for p in operation.get("parameters", [])
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        lines.append(f"body {kind}: {_schema(content.get('schema', {}), description)}")
    return f"<details><summary>{head}</summary><pre>{escape(chr(10).join(lines) or 'no parameters')}</pre></details>"


def _schema(schema: dict[str, Any], description: dict[str, Any]) -> str:
    schema = next((choice for choice in schema.get("anyOf", []) if "$ref" in choice), schema)
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    fields, required = schema.get("properties"), schema.get("required", [])
    if not fields:
        return str(schema.get("format") or schema.get("type") or "any")
    return "{" + ", ".join(f"{name}{'' if name in required else '?'}" for name in fields) + "}"

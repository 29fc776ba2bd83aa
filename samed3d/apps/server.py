"""``samed3d serve``: sessions over HTTP, for our page, our client, curl, and programs that speak nnInteractive's
protocol.

Here the parts become one program: what an error is answered with, health, counters, start and stop. Routes are in
``opening.py`` and
``rest.py`` (sessions), ``batch.py`` (one-shot) and ``nninteractive.py``; who is let in is in ``security.py``; sessions
live in
``sessions.py``. Read ``rest.py`` next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from samed3d.apps.api_page import api_page
from samed3d.apps.batch import batch_routes
from samed3d.apps.nninteractive import nninteractive_routes
from samed3d.apps.opening import opening_routes
from samed3d.apps.protocol import ApiError
from samed3d.apps.rest import rest_routes
from samed3d.apps.security import Guard, check_binding
from samed3d.apps.service import ServerOptions, Service
from samed3d.apps.telemetry import resident_bytes
from samed3d.errors import InputError
from samed3d.models import load_promptable as load_model
from samed3d.models.base import PromptableModel

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

PAGE_FOLDER = "/app/"
_REAP_EVERY_S = 5.0
_STOP_SECONDS = 20
_UPLOAD_PATHS = ("/api/sessions/upload", "/segment", "/set_image", "_interaction")


def create_app(options: ServerOptions, load: Callable[[str], PromptableModel] = load_model) -> FastAPI:
    """The server as an ASGI application.

    Args:
        options: How it is set up.
        load: Gives a model by name.

    Raises:
        InputError: if the folder of sessions cannot be used.
    """
    from samed3d import __version__

    service = Service(options, load)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reaper = asyncio.create_task(_reap(service))
        yield
        reaper.cancel()
        await asyncio.to_thread(service.registry.close)

    app = FastAPI(title="samed3d", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(opening_routes(service))
    app.include_router(rest_routes(service))
    app.include_router(batch_routes(service))
    app.include_router(nninteractive_routes(service))
    _add_server_routes(app, service)
    _add_errors(app)
    access = replace(options.access, upload_paths=_UPLOAD_PATHS)
    if options.page is not None:
        _add_page(app, options.page)
        # The page holds no data; what it asks for needs the token like any other request.
        access = replace(access, open_paths=access.open_paths | {"/"}, open_folders=(*access.open_folders, PAGE_FOLDER))
    app.add_middleware(_Counting, service=service)
    app.add_middleware(Guard, access=access)
    return app


def run_server(
    options: ServerOptions, host: str, port: int, load: Callable[[str], PromptableModel] = load_model
) -> None:
    """Serve until interrupted or terminated; requests under way are finished first.

    Args:
        options: How the server is set up.
        host: Address to listen on.
        port: 0 takes a free one, which the log names.
        load: Gives a model by name.

    Raises:
        InputError: if the address is not allowed without a token, or is in use.
    """
    import uvicorn

    check_binding(host, options.access.token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise InputError(
                f"--host {host} --port {port} cannot be listened on ({error.strerror}); choose another port"
            ) from error
        app = create_app(options, load)
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, listener.getsockname()[1])
        # Our own guard sees every request; uvicorn's log would write addresses down, and proxy headers could forge
        # them.
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        with _signals_end_here():
            uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _signals_end_here() -> Iterator[None]:
    """uvicorn stops in good order on a signal and then raises it again; a stop that was asked for is no error."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _add_server_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"], summary="Whether the server answers; needs no token")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/metrics", tags=["server"], summary="Counters, as Prometheus text", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        gauges = {
            "sessions_awake": ("Sessions in memory.", float(len(service.registry.awake()))),
            "sessions_stored": ("Sessions on disk.", float(len(service.registry.stored()))),
            "jobs_waiting": ("Jobs that wait or run.", float(service.registry.queue.depth())),
            "resident_bytes": ("Memory of the process.", float(resident_bytes())),
        }
        return PlainTextResponse(service.telemetry.text(gauges), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
        return JSONResponse({"detail": error.message}, error.status, headers)

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        return JSONResponse({"detail": " ".join(str(error).split())}, 400)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        said = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        return JSONResponse({"detail": "the request does not fit: " + "; ".join(said)}, 422)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": str(error.detail)}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse({"detail": f"internal error ({type(error).__name__}); the server's log has the rest"}, 500)


async def _reap(service: Service) -> None:
    """Put unused sessions to sleep, for as long as the server runs."""
    while True:
        await asyncio.sleep(_REAP_EVERY_S)
        try:
            service.registry.expire()
        except ApiError:
            return  # the queue is closed: the server stops


def _add_page(app: FastAPI, page: Path) -> None:
    app.mount(PAGE_FOLDER.rstrip("/"), StaticFiles(directory=page, html=True), name="page")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(PAGE_FOLDER)


class _Counting:
    """Counts answers per route, and sets the headers that every answer has."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.service.telemetry.request(scope["method"], route, message["status"])
                extra = [
                    (b"x-content-type-options", b"nosniff"),
                    (b"x-frame-options", b"DENY"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self.app(scope, receive, counted)

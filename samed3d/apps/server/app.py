"""The server as one program: its routes, the answers to errors, metrics, the API's page, start and stop.

The REST API is in ``routes.py``, one-shot segmentation in ``segment.py``, nnInteractive's protocol in
``nninteractive.py``; the checks of each request are in ``security.py``, sessions in ``service.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from samed3d.apps.server.itksnap import itksnap
from samed3d.apps.server.nninteractive import nninteractive
from samed3d.apps.server.routes import api
from samed3d.apps.server.security import PAGE_FOLDER, Guard, check_binding
from samed3d.apps.server.segment import one_shot
from samed3d.apps.server.service import ServerOptions, Service, known_query
from samed3d.errors import InputError
from samed3d.models import load_promptable
from samed3d.models.base import PromptableModel
from samed3d.pages import render

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

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
        await service.close()

    # FastAPI's own page of the API loads its scripts from another site.
    app = FastAPI(title="samed3d", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in (api, one_shot, nninteractive, itksnap):
        app.include_router(router, dependencies=[Depends(known_query)])
    _add_server_routes(app, service)
    _add_error_answers(app, options)
    app.add_middleware(_CountAnswers, service=service)
    app.add_middleware(Guard, options=options)
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

    check_binding(host, options.token)
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
        await service.expire()


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
        return HTMLResponse(render("api.html", **app.openapi()))

    if service.options.page is not None:
        app.mount(PAGE_FOLDER.rstrip("/"), StaticFiles(directory=service.options.page, html=True), name="page")

        @app.get("/", include_in_schema=False)
        async def root() -> Response:
            return RedirectResponse(PAGE_FOLDER)


def _add_error_answers(app: FastAPI, options: ServerOptions) -> None:
    """Answer every error with its message, without the server's folders; FastAPI answers an ``HTTPException``."""
    places = (options.sessions, *options.roots, Path(__file__).parents[3], Path(sys.prefix), Path.home())
    folders = {str(path) for place in places for path in (place, place.resolve()) if len(path.parts) > 1}
    longest_first = sorted(folders, key=len, reverse=True)
    inside_folders = re.compile(rf"(?:{'|'.join(map(re.escape, longest_first))})(?:/(?:[^\s'\"]*/)?)?")

    async def answered(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, InputError):
            cause = error.__cause__
            is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            status, message = 507 if is_full else 400, str(error)
        elif isinstance(error, RequestValidationError):
            problems = [
                f"{'.'.join(str(part) for part in e['loc'])}: {e.get('ctx', {}).get('error', e['msg'])}"
                for e in error.errors()[:5]
            ]
            status, message = 422, "the request does not fit: " + "; ".join(problems)
        elif isinstance(error, ClientDisconnect):  # nobody receives this answer, and nothing is logged
            status, message = 499, "the client closed the connection"
        else:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
            status, message = 500, f"internal error ({type(error).__name__}); see the server's log"
        return JSONResponse({"detail": inside_folders.sub(_file_name, " ".join(message.split()))}, status)

    for kind in (InputError, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answered)


def _file_name(found: re.Match[str]) -> str:
    """What an answer shows in place of a folder: nothing before a file's name, else the folder's own name."""
    return "" if found[0].endswith("/") else Path(found[0]).name


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

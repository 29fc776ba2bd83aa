"""How sessions begin: what there is to choose from, images by path, uploads, the example. What is done with a session
is in ``rest.py``.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from samed3d.apps.protocol import API_VERSION, ApiError
from samed3d.apps.security import confined
from samed3d.apps.service import FORMATS, Service
from samed3d.apps.session_files import read_about
from samed3d.apps.uploads import accept, receive, safe_name
from samed3d.volume.untrusted import check_untrusted


class OpenBody(BaseModel):
    """Which image to open: a path in one of the server's folders, or the example."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str | None = None
    example: bool = False
    model: str | None = None
    channel: int | None = Field(None, ge=0)
    series: str | None = None


def opening_routes(service: Service) -> APIRouter:
    """The routes under ``/api`` that need no session yet."""
    routes = APIRouter(prefix="/api")
    _add_lists(routes, service)
    _add_open(routes, service)
    _add_upload(routes, service)
    return routes


def _add_lists(routes: APIRouter, service: Service) -> None:
    @routes.get("/about", tags=["server"], summary="Models, export formats and folders")
    async def about() -> dict[str, Any]:
        from samed3d import __version__

        formats = [{"id": key, "name": name} for key, (_, name) in FORMATS.items()]
        roots = [str(root) for root in service.options.roots]
        return {
            "api": API_VERSION,
            "version": __version__,
            "models": service.models,
            "formats": formats,
            "roots": roots,
            "example": True,
        }

    @routes.get("/sessions", tags=["sessions"], summary="All sessions, the newest first")
    async def sessions() -> list[dict[str, Any]]:
        return await asyncio.to_thread(_stored, service)


def _add_open(routes: APIRouter, service: Service) -> None:
    registry = service.registry

    @routes.post("/sessions", tags=["sessions"], status_code=201, summary="Open an image by path, or the example")
    async def open_session(body: OpenBody, request: Request) -> dict[str, Any]:
        if (body.path is None) == (not body.example):
            raise ApiError(400, "give either path or example: true")
        service.model_name(body.model)
        image = None if body.path is None else await asyncio.to_thread(confined, body.path, list(service.options.roots))
        if image is not None:
            await asyncio.to_thread(check_untrusted, image, service.options.images)
        entry = registry.create()
        if image is None:
            image = await asyncio.to_thread(service.example, entry.folder)
        name = "example" if body.example else image.name
        return await service.opened(entry, service.about(image, name, body.model, body.channel, body.series), request)


def _add_upload(routes: APIRouter, service: Service) -> None:
    registry = service.registry

    @routes.post(
        "/sessions/upload",
        tags=["sessions"],
        status_code=201,
        summary="Open an image that is the body of the request (.nii .nii.gz .nrrd .mha, or .zip of a DICOM folder)",
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"format": "binary"}}}}
        },
    )
    async def upload(
        request: Request,
        name: Annotated[str, Query(max_length=500)],
        model: str | None = None,
        channel: Annotated[int | None, Query(ge=0)] = None,
        series: str | None = None,
    ) -> dict[str, Any]:
        service.model_name(model)
        safe = safe_name(name)
        entry = registry.create()
        try:
            async with service.uploads:
                file = entry.folder / f"upload_{safe}"  # never the name of a file of ours
                await receive(request.stream(), file)
                image = await asyncio.to_thread(
                    accept, file, service.options.images, service.options.access.largest_upload * 4
                )
        except BaseException:
            await service.forget(entry)
            raise
        return await service.opened(entry, service.about(image, name, model, channel, series), request)


def _stored(service: Service) -> list[dict[str, Any]]:
    awake = {entry.id for entry in service.registry.awake()}
    listed = []
    for session_id in service.registry.stored():
        about = read_about(service.options.sessions / session_id)
        if about is not None:
            keys = {"name": about.name, "model": about.model, "kind": about.kind, "created": about.created}
            listed.append({"id": session_id, **keys, "awake": session_id in awake})
    return sorted(listed, key=lambda s: str(s["created"]), reverse=True)

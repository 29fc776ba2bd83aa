"""The REST API of an open session: prompt, undo, look, take the result away. OpenAPI describes it at ``/docs``.

Every change is answered with what it changed (``updates``, masks of the changed boxes) and with the session as it is
then. A request may say which ``revision`` it has seen; when another tab has changed the session since, the answer is
409 and nothing happens. What travels is in ``protocol.py``; how sessions begin is in ``opening.py``.
"""

from __future__ import annotations

import asyncio
import gzip
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from samed3d.apps.protocol import ApiError
from samed3d.apps.service import FORMATS, Service, remove_files, session_to_json, whole_mask_to_json, wire_prompt
from samed3d.apps.sessions import VIEWED, Entry
from samed3d.inference.session import MaskUpdate, Session
from samed3d.volume import write_volume


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EditBody(_Body):
    """Anything that changes a session may say which revision it has seen."""

    revision: int | None = None


class PromptBody(EditBody):
    """A prompt as in a prompt file, with its space (ijk unless said)."""

    prompt: dict[str, Any]
    object_id: int = Field(1, ge=1, le=65535)
    name: str | None = Field(None, max_length=200)


class ChangeBody(EditBody):
    """What a prompt becomes."""

    prompt: dict[str, Any]


class NewObjectBody(EditBody):
    """A new object."""

    name: str | None = Field(None, max_length=200)


class ObjectBody(EditBody):
    """What of an object changes."""

    name: str | None = Field(None, min_length=1, max_length=200)
    colour: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    visible: bool | None = None
    locked: bool | None = None


class RuleBody(EditBody):
    """Whether other objects are background for a prediction."""

    others_are_negative: bool


def rest_routes(service: Service) -> APIRouter:
    """The routes under ``/api``."""
    routes = APIRouter(prefix="/api")
    _add_sessions(routes, service)
    _add_prompts(routes, service)
    _add_objects(routes, service)
    _add_results(routes, service)
    return routes


def _add_sessions(routes: APIRouter, service: Service) -> None:
    registry = service.registry

    @routes.get("/sessions/{session_id}", tags=["sessions"], summary="A session; wakes it where it sleeps")
    async def session(session_id: str, request: Request) -> dict[str, Any]:
        entry = registry.get(session_id)
        return await service.read(request, session_id, lambda s: session_to_json(entry, s))

    @routes.delete(
        "/sessions/{session_id}", tags=["sessions"], status_code=204, summary="Delete a session with its prompts"
    )
    async def delete(session_id: str) -> Response:
        await service.forget(registry.get(session_id))
        return Response(status_code=204)


def _add_prompts(routes: APIRouter, service: Service) -> None:
    base = "/sessions/{session_id}"

    @routes.post(base + "/prompts", tags=["prompts"], summary="Add a prompt to an object")
    async def add(session_id: str, body: PromptBody, request: Request) -> dict[str, Any]:
        prompt = wire_prompt(body.prompt)
        return await service.edit(
            request, session_id, body.revision, lambda s: [s.add(prompt, body.object_id, body.name)]
        )

    @routes.put(
        base + "/prompts/{prompt_id}", tags=["prompts"], summary="Replace a prompt; the later ones are predicted again"
    )
    async def change(session_id: str, prompt_id: int, body: ChangeBody, request: Request) -> dict[str, Any]:
        prompt = wire_prompt(body.prompt)
        return await service.edit(request, session_id, body.revision, lambda s: [s.move(prompt_id, prompt)])

    @routes.delete(
        base + "/prompts/{prompt_id}",
        tags=["prompts"],
        summary="Take a prompt away; the later ones are predicted again",
    )
    async def remove(session_id: str, prompt_id: int, request: Request, revision: int | None = None) -> dict[str, Any]:
        return await service.edit(request, session_id, revision, lambda s: [s.remove(prompt_id)])

    def step(name: str, back: Callable[[Session], Iterable[MaskUpdate | None]]) -> None:
        @routes.post(f"{base}/{name}", tags=["prompts"], name=name, summary=f"{name.capitalize()} the last change")
        async def move(session_id: str, request: Request, body: EditBody | None = None) -> dict[str, Any]:
            return await service.edit(request, session_id, body.revision if body else None, back)

    step("undo", lambda s: [s.undo()])
    step("redo", lambda s: [s.redo()])


def _add_objects(routes: APIRouter, service: Service) -> None:
    base = "/sessions/{session_id}"

    @routes.post(base + "/objects", tags=["objects"], summary="A new, empty object")
    async def new_object(session_id: str, request: Request, body: NewObjectBody | None = None) -> dict[str, Any]:
        def change(session: Session) -> list[MaskUpdate]:
            session.new_object(body.name if body else None)
            return []

        return await service.edit(request, session_id, body.revision if body else None, change)

    @routes.patch(base + "/objects/{object_id}", tags=["objects"], summary="Name, colour, visibility, lock")
    async def edit_object(session_id: str, object_id: int, body: ObjectBody, request: Request) -> dict[str, Any]:
        changes = body.model_dump(exclude_none=True, exclude={"revision"})
        if not changes:
            raise ApiError(400, "say what of the object changes: name, colour, visible or locked")

        def change(session: Session) -> list[MaskUpdate]:
            session.edit_object(object_id, **changes)
            return []

        return await service.edit(request, session_id, body.revision, change)

    @routes.delete(
        base + "/objects/{object_id}",
        tags=["objects"],
        summary="Remove an object with its prompts (undo brings it back)",
    )
    async def remove_object(
        session_id: str, object_id: int, request: Request, revision: int | None = None
    ) -> dict[str, Any]:
        return await service.edit(request, session_id, revision, lambda s: [s.remove_object(object_id)])

    @routes.put(base + "/rule", tags=["objects"], summary="Whether other objects are background for a prediction")
    async def rule(session_id: str, body: RuleBody, request: Request) -> dict[str, Any]:
        def change(session: Session) -> list[MaskUpdate]:
            session.others_are_negative = body.others_are_negative
            return []

        return await service.edit(request, session_id, body.revision, change)


def _add_results(routes: APIRouter, service: Service) -> None:
    base = "/sessions/{session_id}"

    @routes.get(base + "/masks", tags=["results"], summary="The masks of all objects, each in its box")
    async def masks(session_id: str, request: Request) -> dict[str, Any]:
        def job(session: Session) -> list[dict[str, Any]]:
            return [whole_mask_to_json(o.id, session.mask_of(o.id)) for o in session.objects() if o.voxels]

        return {"updates": await service.read(request, session_id, job)}

    @routes.get(base + "/objects/{object_id}/mask", tags=["results"], summary="One object's mask, in its box")
    async def mask(session_id: str, object_id: int, request: Request) -> dict[str, Any]:
        found = await service.read(request, session_id, lambda s: s.mask_of(object_id))
        return await asyncio.to_thread(whole_mask_to_json, object_id, found)

    @routes.get(
        base + "/objects/{object_id}/probability.nii.gz", tags=["results"], summary="Probability, 0 to 255, as NIfTI"
    )
    async def probability(session_id: str, object_id: int, request: Request) -> Response:
        found, grid = await service.read(request, session_id, lambda s: (s.probability(object_id), s.volume.grid))

        def file() -> bytes:
            with tempfile.TemporaryDirectory(dir=service.options.sessions) as folder:
                write_volume(Path(folder) / "p.nii", np.rint(found * 255.0).astype(np.uint8), grid)
                return gzip.compress((Path(folder) / "p.nii").read_bytes(), 1, mtime=0)

        return Response(await asyncio.to_thread(file), media_type="application/gzip")

    @routes.get(
        base + "/image.nii.gz",
        tags=["results"],
        summary="The image as NIfTI, on its own grid",
        response_class=FileResponse,
    )
    async def image(session_id: str, request: Request) -> FileResponse:
        entry = service.registry.get(session_id)
        volume = await service.read(request, session_id, lambda s: s.volume)
        target = entry.folder / VIEWED
        if not target.exists():
            async with service.uploads:
                await asyncio.to_thread(write_volume, target, volume.array, volume.grid)
        return FileResponse(target, media_type="application/gzip", filename="image.nii.gz")

    @routes.get(base + "/suggest", tags=["results"], summary="Where the model is least certain")
    async def suggest(session_id: str, request: Request, object_id: int | None = None) -> dict[str, Any]:
        point = await service.read(request, session_id, lambda s: s.suggest_click(object_id))
        return {"at": list(point.at), "positive": point.positive, "space": point.space}

    @routes.get(base + "/report", tags=["results"], summary="Versions, prompts, timings, voxels and volumes")
    async def report(session_id: str, request: Request) -> dict[str, Any]:
        return await service.read(request, session_id, lambda s: s.report())

    @routes.get(base + "/export", tags=["results"], summary="The result as a file", response_class=FileResponse)
    async def export(session_id: str, request: Request, format: str = "nifti") -> FileResponse:
        if format not in FORMATS:
            raise ApiError(400, f"format must be one of {', '.join(FORMATS)}, got {format[:40]!r}")
        entry = service.registry.get(session_id)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=service.options.sessions))
        try:
            target = folder / f"segmentation{FORMATS[format][0]}"
            await service.read(request, session_id, lambda s: s.export(target, format))
        except BaseException:
            remove_files(folder)
            raise
        name = f"{_stem(entry)}_segmentation{FORMATS[format][0]}"
        return FileResponse(
            target,
            media_type="application/octet-stream",
            filename=name,
            background=BackgroundTask(remove_files, folder),
        )


def _stem(entry: Entry) -> str:
    name = Path(entry.about.name if entry.about else "image").name
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name.split(".")[0])[:80] or "image"

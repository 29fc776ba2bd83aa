"""The REST API under ``/api``. OpenAPI describes it at ``/docs``.

The answer to every change holds what changed (``updates``, the masks inside the changed boxes) and the session as it is
then. A request may name the ``revision`` that it has seen; if another client has changed the session since, the answer
is 409 and nothing happens. Images from clients are checked in ``files.py``.
"""

from __future__ import annotations

import asyncio
import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from samed3d.apps.server import files
from samed3d.apps.server.service import OneSession, SessionWork, SharedService, prompt_from_client
from samed3d.apps.server.sessions import (
    VIEWED,
    Json,
    SessionInfo,
    read_info,
    session_to_json,
    update_to_json,
)
from samed3d.errors import check_keys
from samed3d.inference.session import Session
from samed3d.masks import Cleaning
from samed3d.prompts import MAX_NAME, MaskUpdate
from samed3d.volume import write_volume
from samed3d.volume.writing import MASK_FORMAT_NAMES

API_VERSION = 1
_BINARY = "application/octet-stream"

api = APIRouter(prefix="/api")
_SESSION = "/sessions/{session_id}"
_OBJECT = _SESSION + "/objects/{object_id}"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, body: Any) -> Any:
        check_keys(body if isinstance(body, dict) else (), cls.model_fields, "the body")
        return body


class OpenBody(_Body):
    """Which image to open, a path in one of the server's folders or the example, and how."""

    path: str | None = None
    example: bool = False
    model: str | None = None
    channel: int | None = Field(None, ge=0)
    series: str | None = None
    modality: str | None = None
    untilt: bool = False


class EditBody(_Body):
    """Any change of a session; it may name the revision that the client has seen."""

    revision: int | None = None


class MoveBody(EditBody):
    """The prompt that replaces another one."""

    prompt: Json


class PromptBody(MoveBody):
    """A prompt as in a prompt file, with its space (ijk by default)."""

    object_id: int = Field(1, ge=1, le=65535)
    name: str | None = Field(None, max_length=MAX_NAME)


class NewObjectBody(EditBody):
    """A new object."""

    name: str | None = Field(None, max_length=MAX_NAME)


class ObjectBody(EditBody):
    """The properties of an object that change."""

    name: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    colour: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    visible: bool | None = None
    locked: bool | None = None
    code: str | None = Field(None, max_length=150)


class CleanBody(EditBody):
    """How an object's mask is cleaned, as ``samed3d.masks.Cleaning``."""

    min_island_mm3: float = 0.0
    keep_largest: bool = False
    fill_holes: bool = False
    smooth_mm: float = 0.0
    grow_mm: float = 0.0


class RuleBody(EditBody):
    """Whether other objects are background for a prediction."""

    others_are_negative: bool


# Sessions


@api.get("/about", tags=["server"])
async def about(service: SharedService) -> Json:
    """Models, export formats and folders."""
    from samed3d import __version__

    return {
        "api": API_VERSION,
        "version": __version__,
        "models": service.models,
        "formats": [{"id": key, "name": name} for key, name in MASK_FORMAT_NAMES.items()],
        "roots": [root.name for root in service.options.roots],
        "example": True,
    }


@api.get("/sessions", tags=["sessions"])
async def sessions(service: SharedService) -> list[Json]:
    """All sessions, the newest first."""
    loaded = {entry.id for entry in service.loaded()}

    def listed() -> list[Json]:
        infos = ((session_id, read_info(service.folder / session_id)) for session_id in service.stored())
        keys = ("name", "model", "kind", "created")
        return [
            {"id": number, **{key: getattr(info, key) for key in keys}, "loaded": number in loaded}
            for number, info in infos
            if info is not None
        ]

    return sorted(await asyncio.to_thread(listed), key=lambda s: str(s["created"]), reverse=True)


@api.post("/sessions", tags=["sessions"], status_code=201)
async def open_session(body: OpenBody, request: Request, service: SharedService) -> Json:
    """Open an image by path, or the example."""
    if (body.path is None) == (not body.example):
        raise HTTPException(400, "give either path or example: true")
    model = service.model_name(body.model)
    image, name = None, "example"
    if body.path is not None:
        image = await asyncio.to_thread(files.confined, body.path, service.options)
        name = image.name[:200]
    async with service.new_session() as entry:
        image = image or await asyncio.to_thread(files.write_example, entry.folder)
        info = SessionInfo(str(image), name, model, body.channel, body.series, body.modality, body.untilt)
        return await service.open(entry, info, request)


@api.post(
    "/sessions/upload",
    tags=["sessions"],
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {_BINARY: {"schema": {"format": "binary"}}}}},
)
async def upload(
    request: Request,
    service: SharedService,
    name: Annotated[str, Query(max_length=500)],
    model: str | None = None,
    channel: Annotated[int | None, Query(ge=0)] = None,
    series: str | None = None,
    modality: str | None = None,
    untilt: bool = False,
) -> Json:
    """Open an image that is the body of the request (.nii .nii.gz .nrrd .mha, or .zip of a DICOM folder)."""
    model, options = service.model_name(model), service.options
    file_name = files.safe_name(name)
    async with service.new_session() as entry:
        async with service.uploads:
            (entry.folder / files.UPLOADED).mkdir()
            file = entry.folder / files.UPLOADED / file_name
            await files.receive(request.stream(), file)
            image = await asyncio.to_thread(files.accept, file, options)
        info = SessionInfo(str(image), name[:200], model, channel, series, modality, untilt)
        return await service.open(entry, info, request)


@api.get(_SESSION, tags=["sessions"])
async def read_session(work: OneSession) -> Json:
    """A session, which is loaded if necessary."""
    return await work.run(lambda s: session_to_json(work.entry, s))


@api.delete(_SESSION, tags=["sessions"], status_code=204)
async def delete_session(work: OneSession) -> Response:
    """Delete a session with its prompts."""
    await work.service.delete(work.entry)
    return Response(status_code=204)


# Prompts and objects


async def edited(
    work: SessionWork, body: EditBody | int | None, change: Callable[[Session], object], timed: bool = True
) -> Json:
    """Change a session.

    Args:
        work: The session.
        body: The request's body, or the revision that the client has seen.
        change: The change; where it returns a ``MaskUpdate``, the answer holds it.
        timed: Whether the prediction's duration goes into the metrics.
    """

    def job(session: Session) -> Json:
        update = change(session)
        answer: Json = {"seconds": 0.0, "prompt_id": None, "updates": []}
        if isinstance(update, MaskUpdate):
            answer |= {"seconds": round(update.seconds, 4), "prompt_id": update.prompt_id}
            if update.changed:
                answer["updates"] = [update_to_json(update.object_id, update.region, update.mask)]
            if timed:
                work.service.predictions.observe(update.seconds)
        return {**answer, "session": session_to_json(work.entry, session)}

    return await work.run(job, body.revision if isinstance(body, EditBody) else body)


@api.post(_SESSION + "/prompts", tags=["prompts"])
async def add_prompt(work: OneSession, body: PromptBody) -> Json:
    """Add a prompt to an object."""
    prompt = prompt_from_client(body.prompt)
    return await edited(work, body, lambda s: s.add(prompt, body.object_id, body.name))


_PROMPT = _SESSION + "/prompts/{prompt_id}"


@api.put(_PROMPT, tags=["prompts"])
async def move_prompt(work: OneSession, prompt_id: int, body: MoveBody) -> Json:
    """Replace a prompt; the later ones are predicted again."""
    prompt = prompt_from_client(body.prompt)
    return await edited(work, body, lambda s: s.move(prompt_id, prompt))


@api.delete(_PROMPT, tags=["prompts"])
async def remove_prompt(work: OneSession, prompt_id: int, revision: int | None = None) -> Json:
    """Remove a prompt; the later ones are predicted again."""
    return await edited(work, revision, lambda s: s.remove(prompt_id))


@api.post(_SESSION + "/undo", tags=["prompts"])
async def undo(work: OneSession, body: EditBody | None = None) -> Json:
    """Undo the last change."""
    return await edited(work, body, lambda s: s.undo(), timed=False)


@api.post(_SESSION + "/redo", tags=["prompts"])
async def redo(work: OneSession, body: EditBody | None = None) -> Json:
    """Redo the last change."""
    return await edited(work, body, lambda s: s.redo(), timed=False)


@api.post(_SESSION + "/objects", tags=["objects"])
async def new_object(work: OneSession, body: NewObjectBody | None = None) -> Json:
    """A new, empty object."""
    return await edited(work, body, lambda s: s.new_object(body.name if body else None))


@api.patch(_OBJECT, tags=["objects"])
async def edit_object(work: OneSession, object_id: int, body: ObjectBody) -> Json:
    """Name, colour, visibility, lock, code (SCHEME:VALUE:MEANING)."""
    changes = body.model_dump(exclude_none=True, exclude={"revision"})
    if not changes:
        raise HTTPException(400, "give what changes: name, colour, visible, locked or code")
    return await edited(work, body, lambda s: s.edit_object(object_id, **changes))


@api.post(_OBJECT + "/clean", tags=["objects"])
async def clean_object(work: OneSession, object_id: int, body: CleanBody) -> Json:
    """Clean an object's mask; later prompts go on from the result."""
    cleaning = Cleaning(**body.model_dump(exclude={"revision"}))
    return await edited(work, body, lambda s: s.clean(cleaning, object_id), timed=False)


@api.delete(_OBJECT, tags=["objects"])
async def remove_object(work: OneSession, object_id: int, revision: int | None = None) -> Json:
    """Remove an object with its prompts (undo brings it back)."""
    return await edited(work, revision, lambda s: s.remove_object(object_id))


@api.put(_SESSION + "/rule", tags=["objects"])
async def set_rule(work: OneSession, body: RuleBody) -> Json:
    """Whether other objects are background for a prediction."""
    return await edited(work, body, lambda s: setattr(s, "others_are_negative", body.others_are_negative))


# Results


@api.get(_SESSION + "/masks", tags=["results"])
async def masks(work: OneSession) -> Json:
    """The masks of all objects, each in its box."""
    found = await work.run(lambda s: [update_to_json(o.id, *s.boxed_mask(o.id)) for o in s.objects() if o.voxels])
    return {"updates": found}


@api.get(_OBJECT + "/mask", tags=["results"])
async def mask(work: OneSession, object_id: int) -> Json:
    """One object's mask, in its box."""
    return await asyncio.to_thread(update_to_json, object_id, *await work.run(lambda s: s.boxed_mask(object_id)))


@api.get(_OBJECT + "/probability.nii.gz", tags=["results"])
async def probability(work: OneSession, object_id: int) -> Response:
    """Probability, 0 to 255, as NIfTI."""
    found, grid = await work.run(lambda s: (s.probability(object_id), s.volume.grid))

    def file() -> bytes:
        with tempfile.TemporaryDirectory(dir=work.service.options.sessions) as folder:
            write_volume(Path(folder) / "p.nii", np.rint(found * 255.0).astype(np.uint8), grid)
            return gzip.compress((Path(folder) / "p.nii").read_bytes(), 1, mtime=0)

    return Response(await asyncio.to_thread(file), media_type="application/gzip")


@api.get(_SESSION + "/image.nii.gz", tags=["results"], response_class=FileResponse)
async def image(work: OneSession) -> FileResponse:
    """The image as NIfTI, on its own grid."""
    volume = await work.run(lambda s: s.volume)
    target = work.entry.folder / VIEWED
    if not target.exists():
        async with work.service.uploads:
            await asyncio.to_thread(write_volume, target, volume.array, volume.grid)
    return FileResponse(target, media_type="application/gzip", filename="image.nii.gz")


@api.get(_SESSION + "/suggest", tags=["results"])
async def suggest(work: OneSession, object_id: int | None = None) -> Json:
    """Where the model is least certain."""
    point = await work.run(lambda s: s.suggest_click(object_id))
    return {"at": list(point.at), "positive": point.positive, "space": point.space}


@api.get(_SESSION + "/report", tags=["results"])
async def report(work: OneSession) -> Json:
    """Versions, prompts, timings, voxels and volumes."""
    found = await work.run(lambda s: s.report())
    return found | {"image": found["image"] | {"source": getattr(work.entry.info, "name", "")}}


@api.get(_SESSION + "/export", tags=["results"], response_class=FileResponse)
async def export(work: OneSession, format: str = "nifti") -> FileResponse:
    """The result as a file."""
    suffix = files.suffix_of(format)
    name = Path(work.entry.info.name if work.entry.info else "image").name.split(".")[0]
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80] or "image"
    with files.exporting(work.service.options.sessions) as folder:
        target = folder / f"segmentation{suffix}"
        await work.run(lambda s: s.export(target, format))
        return files.exported(target, f"{stem}_segmentation{suffix}")

"""``POST /segment``: one image and its prompts in, the mask file out, nothing kept. Who clicks uses sessions
(``rest.py``).
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse

from samed3d.apps.protocol import ApiError
from samed3d.apps.security import confined
from samed3d.apps.service import FORMATS, Service, remove_files, wire_prompt
from samed3d.apps.uploads import accept, safe_name
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import SCHEMA_VERSION, ObjectPrompts
from samed3d.volume import read_volume
from samed3d.volume.untrusted import check_untrusted

_BLOCK = 1 << 20

_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompts"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "prompts": {"type": "string", "description": "a prompt file (JSON)"},
                        "model": {"type": "string"},
                        "format": {"type": "string", "enum": list(FORMATS)},
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["path", "prompts"],
                    "properties": {
                        "path": {"type": "string"},
                        "prompts": {"type": "object"},
                        "model": {"type": "string"},
                        "format": {"type": "string", "enum": list(FORMATS)},
                    },
                }
            },
        },
    }
}


def batch_routes(service: Service) -> APIRouter:
    """The route ``/segment``."""
    routes = APIRouter()

    @routes.post(
        "/segment", tags=["one shot"], summary="An image and its prompts in, the mask out", openapi_extra=_SCHEMA
    )
    async def segment(request: Request) -> FileResponse:
        folder = Path(tempfile.mkdtemp(prefix=".segment-", dir=service.options.sessions))
        try:
            image, fields = await _received(request, service, folder)
            form = str(fields.get("format") or "nifti")
            if form not in FORMATS:
                raise ApiError(400, f"format must be one of {', '.join(FORMATS)}, got {form[:40]!r}")
            model = service.model_name(None if fields.get("model") is None else str(fields["model"]))
            objects = objects_from_json(fields.get("prompts"))
            volume = await asyncio.to_thread(read_volume, image)
            target = folder / f"segmentation{FORMATS[form][0]}"

            def job() -> None:
                with Session.open(volume, service.registry.model(model), service.options.device) as session:
                    session.add_all(objects)
                    session.export(target, form)

            await service.registry.queue.run(folder.name, job, request.is_disconnected)
        except BaseException:
            remove_files(folder)
            raise
        return FileResponse(
            target,
            media_type="application/octet-stream",
            filename=target.name,
            background=BackgroundTask(remove_files, folder),
        )

    return routes


def objects_from_json(body: Any) -> list[ObjectPrompts]:
    """The objects of a prompt file that came with a request.

    Raises:
        InputError: if it breaks the schema, or a mask names a file.
    """
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError as error:
            raise InputError(f"prompts must be JSON, got something else ({error})") from error
    if not isinstance(body, dict) or body.get("version") != SCHEMA_VERSION or not isinstance(body.get("objects"), list):
        raise InputError(f'prompts must be an object with "version": {SCHEMA_VERSION} and a list "objects"')
    found: list[ObjectPrompts] = []
    for number, entry in enumerate(body["objects"], start=1):
        where = f"prompts: object {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("prompts"), list) or not entry["prompts"]:
            raise InputError(f"{where}: 'prompts' must be a list that is not empty")
        object_id = entry.get("id", number)
        if type(object_id) is not int or object_id < 1 or any(o.id == object_id for o in found):
            raise InputError(f"{where}: id must be a whole number > 0 that no other object has, got {object_id!r}")
        prompts = [wire_prompt(p, body.get("space", "ijk"), where) for p in entry["prompts"]]
        found.append(ObjectPrompts(object_id, str(entry.get("name", f"object {number}"))[:200], prompts))
    if not found:
        raise InputError("prompts must hold at least one object, got none")
    return found


async def _received(request: Request, service: Service, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image to read and the other fields, of a form or of JSON."""
    kind = request.headers.get("content-type", "")
    if kind.startswith("application/json"):
        try:
            fields = json.loads(await request.body())
        except ValueError as error:
            raise ApiError(400, f"the body must be JSON, got something else ({error})") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
            raise ApiError(400, 'the body must be an object with "path" and "prompts"')
        image = await asyncio.to_thread(confined, fields["path"], list(service.options.roots))
        await asyncio.to_thread(check_untrusted, image, service.options.images)
        return image, fields
    if not kind.startswith("multipart/form-data"):
        raise ApiError(415, "send a form (image, prompts) or JSON (path, prompts)")
    async with service.uploads:
        try:
            form = await request.form(max_files=1, max_fields=8, max_part_size=service.options.access.largest_json)
        except (MultiPartException, AssertionError) as error:
            raise ApiError(400, f"the form cannot be read: {error}") from error
        try:
            sent = form.get("image")
            if not isinstance(sent, UploadFile) or not sent.filename:
                raise ApiError(400, "the form needs a file called image")
            file = folder / safe_name(sent.filename)
            with file.open("wb") as out:
                while block := await sent.read(_BLOCK):
                    out.write(block)
            fields = {key: value for key, value in form.items() if isinstance(value, str)}
        finally:
            await form.close()
        image = await asyncio.to_thread(accept, file, service.options.images, service.options.access.largest_upload * 4)
    return image, fields

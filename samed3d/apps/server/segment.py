"""``POST /segment``: one image and its prompts in, the mask file out, nothing kept. Sessions are in ``routes.py``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse

from samed3d.apps.server import files
from samed3d.apps.server.service import Service, SharedService, parse_json, prompt_from_client
from samed3d.apps.server.sessions import Json
from samed3d.errors import check_keys
from samed3d.inference.session import Session
from samed3d.prompts import objects_from_json
from samed3d.volume import read_volume
from samed3d.volume.writing import MASK_FORMATS

_BLOCK = 1 << 20
one_shot = APIRouter()

_FIELDS: Json = {
    "model": {"type": "string"},
    "modality": {"type": "string"},
    "format": {"type": "string", "enum": list(MASK_FORMATS)},
}
_FORM = {
    "image": {"type": "string", "format": "binary"},
    "prompts": {"type": "string", "description": "a prompt file (JSON)"},
}
_SEGMENT_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "object", "required": list(fields), "properties": {**fields, **_FIELDS}}}
            for kind, fields in (
                ("multipart/form-data", _FORM),
                ("application/json", {"path": {"type": "string"}, "prompts": {"type": "object"}}),
            )
        },
    }
}


@one_shot.post("/segment", tags=["one shot"], openapi_extra=_SEGMENT_SCHEMA)
async def segment(request: Request, service: SharedService) -> FileResponse:
    """An image and its prompts in, the mask out."""
    with files.exporting(service.options.sessions) as folder:
        image, fields = await _image_and_fields(request, service, folder)
        chosen = {key: str(fields[key]) for key in _FIELDS if fields.get(key) is not None}
        format, model = chosen.get("format", "nifti"), service.model_name(chosen.get("model"))
        target = folder / f"segmentation{files.suffix_of(format)}"
        prompts = fields.get("prompts")
        prompts = parse_json(prompts, "prompts") if isinstance(prompts, str) else prompts
        objects = objects_from_json(prompts, "prompts", prompt_from_client)
        volume = await asyncio.to_thread(read_volume, image, modality=chosen.get("modality"))

        def job() -> None:
            with Session.open(volume, service.model(model), service.options.device) as session:
                session.add_all(objects)
                session.export(target, format)

        await service.queue.run(folder.name, job, request.is_disconnected)
        return files.exported(target, target.name)


async def _image_and_fields(request: Request, service: Service, folder: Path) -> tuple[Path, Json]:
    """The image to read and the other fields, of a form or of JSON."""
    kind = request.headers.get("content-type", "")
    if kind.startswith("multipart/form-data"):
        return await _from_form(request, service, folder)
    if not kind.startswith("application/json"):
        raise HTTPException(415, "send a form (image, prompts) or JSON (path, prompts)")
    fields = parse_json(await request.body(), "the body")
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
        raise HTTPException(400, 'the body must be an object with "path" and "prompts"')
    check_keys(fields, ("path", "prompts", *_FIELDS), "the body")
    image = await asyncio.to_thread(files.confined, fields["path"], service.options)
    return image, fields


async def _from_form(request: Request, service: Service, folder: Path) -> tuple[Path, Json]:
    options = service.options
    async with service.uploads:
        try:
            form = await request.form(max_files=1, max_fields=8, max_part_size=options.largest_json)
        except (MultiPartException, AssertionError) as error:
            raise HTTPException(400, f"the form cannot be read: {error}") from error
        try:
            check_keys(form, (*_FORM, *_FIELDS), "the form", "field")
            sent = form.get("image")
            if not isinstance(sent, UploadFile) or not sent.filename:
                raise HTTPException(400, "the form needs a file called image")
            file = folder / files.safe_name(sent.filename)
            with file.open("wb") as out:
                while block := await sent.read(_BLOCK):
                    out.write(block)
            fields = {key: value for key, value in form.items() if isinstance(value, str)}
        finally:
            await form.close()
        return await asyncio.to_thread(files.accept, file, options), fields

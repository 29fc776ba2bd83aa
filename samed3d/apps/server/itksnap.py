"""The protocol of ITK-SNAP's deep-learning client, so that ITK-SNAP works with this server by changing host and port.

A session here is a lease, so it survives a pause and a restart of the server. ITK-SNAP changes
things with GET requests and cannot send a token, so requests of browsers are refused. Source: what ITK-SNAP 4.4 sends
and expects, and the routes of itksnap-dls 0.1.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import math
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from samed3d.apps.server import nninteractive_arrays as arrays
from samed3d.apps.server.leases import Lease
from samed3d.apps.server.service import SharedService, parse_json
from samed3d.apps.server.sessions import Json
from samed3d.geometry import IntTriple

PROTOCOL_VERSION = "0.1.2"
MODEL = "nnInteractive"
"""The model that ITK-SNAP asks for where it does not let the user choose."""


async def _not_from_a_browser(request: Request) -> None:
    if "sec-fetch-site" in request.headers or "origin" in request.headers:
        raise HTTPException(403, "these routes are for ITK-SNAP; a browser uses /api")


async def _lease(session_id: str, request: Request, service: SharedService) -> Lease:
    if lease := Lease.find(session_id, service, request):
        return lease
    raise HTTPException(404, "this session was not started by ITK-SNAP")


async def _array(request: Request, file: Annotated[UploadFile, File()], metadata: Annotated[str, Form()]) -> NDArray:
    """The image or drawing of a request: float32, gzip, x fastest; its size is in ``metadata``."""
    about = parse_json(metadata, "metadata")
    size = about.get("dimensions") if isinstance(about, dict) else None
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise HTTPException(400, f"metadata must give three dimensions, got {str(size)[:80]}")
    if about.get("components_per_pixel", 1) != 1:
        raise HTTPException(400, "an image must have one component per voxel; choose one component in ITK-SNAP")
    shape: IntTriple = (size[2], size[1], size[0])
    largest = request.app.state.service.options.images.voxels
    if math.prod(shape) > largest:
        raise HTTPException(413, f"an image must have at most {largest} voxels, got {math.prod(shape)}")
    packed = await file.read()
    return await asyncio.to_thread(_unpacked, packed, shape)


def _unpacked(packed: bytes, shape: IntTriple) -> NDArray:
    expected = 4 * math.prod(shape)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            raw = stream.read(expected + 1)  # never more than the declared size, whatever the file unpacks to
    except (OSError, EOFError) as error:
        raise HTTPException(400, f"the file must be gzip, got something else ({error})") from error
    if len(raw) != expected:
        raise HTTPException(400, f"the file must hold {expected} bytes for its dimensions, got {len(raw)}")
    array = np.frombuffer(raw, "<f4").reshape(shape)
    if not np.isfinite(array).all():
        raise HTTPException(400, "the image holds NaN or infinite values; replace them with the background value")
    return array


OneLease = Annotated[Lease, Depends(_lease)]
Array = Annotated[Any, Depends(_array)]
itksnap = APIRouter(tags=["ITK-SNAP"], dependencies=[Depends(_not_from_a_browser)])
"""The routes that ITK-SNAP calls."""


@itksnap.get("/status")
async def status() -> Json:
    """Whether the server answers."""
    return {"status": "ok", "version": PROTOCOL_VERSION}


@itksnap.get("/v2/models")
async def models() -> Json:
    """The models that a session can be started with."""
    interactions = ["point", "scribble", "lasso"]
    return {"models": [{"id": MODEL, "channels": [1], "dimensions": 3, "interactions": interactions}]}


@itksnap.get("/start_session")
@itksnap.get("/v2/start_session/{model_id}")
async def start_session(request: Request, service: SharedService, model_id: str = MODEL) -> Json:
    """Start a session."""
    if model_id != MODEL:
        raise HTTPException(404, f"model must be {MODEL}, got {model_id[:80]!r}")
    return {"session_id": Lease.new(service, request).entry.id}


@itksnap.post("/upload_raw/{session_id}")
@itksnap.post("/v2/upload_raw/{session_id}")
async def upload_raw(lease: OneLease, image: Array, filename: str = "") -> Json:
    """The image to segment; ITK-SNAP also sends the name of a file, without effect."""
    async with lease.service.uploads:
        await lease.open_array(image, arrays.grid_of(image.shape, None), "ITK-SNAP")
    return {"message": "the image is open"}


@itksnap.get("/process_point_interaction/{session_id}")
async def point(lease: OneLease, x: int, y: int, z: int, foreground: bool = False) -> Json:
    """A click at a voxel, x first."""
    return await _interact(lease, lambda _: [arrays.point_prompt([z, y, x], foreground)])


@itksnap.get("/v2/process_point_interaction/{session_id}")
async def point_of_list(lease: OneLease, point: Annotated[list[int], Query()], foreground: bool = False) -> Json:
    """A click at a voxel, given as three values of ``point``, x first."""
    return await _interact(lease, lambda _: [arrays.point_prompt(point[::-1], foreground)])


@itksnap.post("/process_scribble_interaction/{session_id}")
async def scribble(lease: OneLease, drawing: Array, foreground: bool = False) -> Json:
    """A scribble, drawn into an image of the size of the session's."""
    return await _interact(lease, lambda shape: arrays.drawn_prompts("scribble", drawing, None, shape, foreground))


@itksnap.post("/process_lasso_interaction/{session_id}")
async def lasso(lease: OneLease, drawing: Array, foreground: bool = False) -> Json:
    """A lasso, drawn into an image of the size of the session's."""
    return await _interact(lease, lambda shape: arrays.drawn_prompts("lasso", drawing, None, shape, foreground))


@itksnap.get("/reset_interactions/{session_id}")
@itksnap.get("/v2/reset_interactions/{session_id}")
async def reset_interactions(lease: OneLease) -> Json:
    """Begin a new object."""
    await lease.reset()
    return {"status": "success"}


@itksnap.get("/end_session/{session_id}")
@itksnap.get("/v2/end_session/{session_id}")
async def end_session(lease: OneLease) -> Json:
    """End the session, which is kept on disk until it is deleted through the REST API."""
    await lease.service.queue.run(lease.entry.id, lease.entry.unload)
    return {"message": "Session ended"}


async def _interact(lease: Lease, prompts: Any) -> Json:
    """Add one interaction; the answer holds the object's mask on the whole image: int8, x fastest, gzip, base64."""
    await lease.add(prompts, True)
    mask = await lease.run(lambda session: session.mask_of(lease.state.object_id))
    packed = await asyncio.to_thread(gzip.compress, (mask > 0).astype(np.int8).tobytes(), 1)
    return {"status": "success", "result": base64.b64encode(packed).decode()}

"""The protocol of nnInteractive 2.x, so that programs written for its server work with this one by changing a URL.

Leases are in ``leases.py``; arrays and prompts are translated in ``nninteractive_arrays.py``. Source: what
``nninteractive-client`` 2.6.0 sends and expects.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from samed3d.apps.server import nninteractive_arrays as arrays
from samed3d.apps.server.leases import Lease, combined
from samed3d.apps.server.service import SharedService, parse_json
from samed3d.apps.server.sessions import Json
from samed3d.errors import InputError, check_keys
from samed3d.geometry import IntTriple
from samed3d.inference.session import Session
from samed3d.models.weights import licence_of
from samed3d.prompts import MaskUpdate, Prompt

PROTOCOL_VERSION = "2.6.0"
_LONGEST_META = 16 * 1024
_INTERACTION = ("include_interaction", "run_prediction", "override_capability_checks")
"""What a client sends with every interaction; a segmentation to start from has no sign."""
_STORED = {"bool": np.uint8, "float16": np.float32, "float64": np.float32, "int64": np.float32, "uint64": np.float32}

LeaseToken = Annotated[str | None, Header(alias="X-Lease-Token")]
nninteractive = APIRouter(tags=["nnInteractive"])
"""The routes that nnInteractive's clients call."""


async def _lease(request: Request, service: SharedService, token: LeaseToken = None) -> Lease:
    if lease := Lease.find(token or "", service, request):
        return lease
    raise HTTPException(410, "the lease is unknown; claim a new one")


OneLease = Annotated[Lease, Depends(_lease)]
"""A route's parameter of this type receives the lease that the request names, or the answer is 410."""


async def _meta(request: Request) -> Json:
    text = request.headers.get("x-meta", "{}")
    if len(text) > _LONGEST_META:
        raise HTTPException(431, f"the X-Meta header must have at most {_LONGEST_META} characters, got {len(text)}")
    return _object(text, "the X-Meta header")


async def _json(request: Request) -> Json:
    return _object(await request.body(), "the body")


def _object(text: str | bytes, what: str) -> Json:
    body = parse_json(text, what)
    if not isinstance(body, dict):
        raise HTTPException(400, f"{what} must be a JSON object, got {type(body).__name__}")
    return body


async def _array(request: Request, service: SharedService) -> NDArray:
    body = await request.body()
    array = await asyncio.to_thread(arrays.unpack_array, body, service.options.images.voxels)
    if array.dtype.kind == "f" and not math.isfinite(float(array.sum(dtype=np.float64)) if array.size else 0.0):
        raise InputError("the array holds NaN or infinite values; replace them with the background value")
    return array


JsonBody = Annotated[Json, Depends(_json)]
"""A route's parameter of this type receives the body, a JSON object."""
MetaHeader = Annotated[Json, Depends(_meta)]
"""A route's parameter of this type receives the X-Meta header, a JSON object."""
ArrayBody = Annotated[Any, Depends(_array)]
"""A route's parameter of this type receives the body, an array."""


# Leases


@nninteractive.get("/capabilities")
async def capabilities(service: SharedService) -> Json:
    """Which prompts are understood."""
    model = service.options.model
    spec = await service.queue.run("capabilities", lambda: service.model(model).spec)
    drawn = dict.fromkeys(("points", "bbox2d", "scribble", "lasso"), "point" in spec.prompts)
    return {
        "supported_interactions": {**drawn, "bbox3d": "box" in spec.prompts},
        "channel_mapping": {},
        "num_interaction_channels": 0,
        "supports_initial_label": True,
        "supports_zero_shot_label_refinement": True,
        "preferred_scribble_thickness": [2, 2, 2],
        "interaction_decay": None,
        "patch_size": list(spec.input_shape_zyx),
        "do_autozoom": True,
        "inference_session_version": PROTOCOL_VERSION,
        "license": licence_of(model),
        "supports_undo": True,
    }


@nninteractive.post("/claim")
async def claim(request: Request, service: SharedService) -> Json:
    """Claim a lease."""
    options = service.options
    return {
        "lease_token": Lease.new(service, request).entry.id,
        "idle_timeout_seconds": options.idle_seconds,
        "liveness_timeout_seconds": options.liveness_seconds,
        "max_sessions": options.loaded,
    }


@nninteractive.post("/release")
async def release(request: Request, service: SharedService, token: LeaseToken = None) -> dict[str, bool]:
    """Return a lease; its session is kept until it is deleted through the REST API."""
    lease = Lease.find(token or "", service, request)
    if lease is not None and lease.entry.info is None:  # it was never used
        await service.delete(lease.entry)
    elif lease is not None:
        await service.queue.run(lease.entry.id, lease.entry.unload)
    return {"released": True}


@nninteractive.post("/heartbeat")
async def heartbeat(lease: OneLease) -> dict[str, float]:
    """The client is still there."""
    lease.entry.seen = time.monotonic()
    return {"remaining_seconds": lease.remaining_seconds}


@nninteractive.get("/lease_status")
async def lease_status(lease: OneLease) -> dict[str, float]:
    """Seconds until the session is unloaded."""
    idle = lease.service.options.idle_seconds
    return {"remaining_seconds": lease.remaining_seconds, "idle_timeout_seconds": idle}


# The image, and the client's result


@nninteractive.post("/set_image")
async def set_image(request: Request, lease: OneLease, meta: MetaHeader) -> Json:
    """The image, an array of one channel and three axes."""
    async with lease.service.uploads:
        array = await _array(request, lease.service)
        if array.ndim != 4 or array.shape[0] != 1:
            raise HTTPException(400, f"image must have one channel and three axes, (1, X, Y, Z), got {array.shape}")
        check_keys(meta, ("image_properties",), "the X-Meta header")
        shape: IntTriple = (array.shape[1], array.shape[2], array.shape[3])
        stored = array[0].astype(_STORED.get(array.dtype.name, array.dtype), copy=False)
        await lease.open_array(stored, arrays.grid_of(shape, meta.get("image_properties")), "array")
    return {"original_image_shape": [1, *shape]}


@nninteractive.post("/upload_image", include_in_schema=False)
@nninteractive.post("/upload_segment", include_in_schema=False)
async def earlier_protocol() -> Json:
    """The routes of nnInteractive's servers before 2.0, which had no leases."""
    raise HTTPException(
        426, "this client uses nnInteractive's protocol before 2.0; update the client (the Slicer extension)"
    )


@nninteractive.post("/set_target_buffer")
async def set_target_buffer(lease: OneLease, body: JsonBody) -> Json:
    """Shape and type of the client's result array."""
    check_keys(body, ("shape", "dtype"), "the body")
    state, dtype = lease.state, str(body.get("dtype"))
    if state.shape is None or body.get("shape") != state.shape:
        got = str(body.get("shape"))[:80]
        raise HTTPException(400, f"the target must have the image's shape {state.shape}, got {got}")
    if dtype not in arrays.DTYPES or np.dtype(dtype).kind not in "biu":
        raise HTTPException(400, f"the target must be of bool or an integer type, got {dtype[:40]!r}")
    lease.state = replace(state, target=dtype)
    return {}


@nninteractive.post("/set_do_autozoom")
async def set_do_autozoom(lease: OneLease, body: JsonBody) -> dict[str, bool]:
    """Accepted without effect: the model always follows the object."""
    check_keys(body, ("do_autozoom",), "the body")
    _flag(body, "do_autozoom")
    return {"do_autozoom": True}


@nninteractive.post("/reset_interactions")
async def reset_interactions(lease: OneLease) -> Json:
    """Begin a new object."""
    await lease.reset()
    return {}


# Interactions


@nninteractive.post("/add_point_interaction")
async def add_point(lease: OneLease, body: JsonBody) -> Response:
    """A click."""
    at = body.get("coordinates")
    return await _interact(lease, body, "coordinates", lambda _, include: [arrays.point_prompt(at, include)])


@nninteractive.post("/add_bbox_interaction")
async def add_bbox(lease: OneLease, body: JsonBody) -> Response:
    """A box."""
    box = body.get("bbox_coords")
    return await _interact(lease, body, "bbox_coords", lambda shape, include: [arrays.box_prompt(box, include, shape)])


@nninteractive.post("/add_scribble_interaction")
async def add_scribble(lease: OneLease, meta: MetaHeader, mask: ArrayBody) -> Response:
    """A scribble, drawn into a mask."""
    return await _draw(lease, meta, "scribble", mask)


@nninteractive.post("/add_lasso_interaction")
async def add_lasso(lease: OneLease, meta: MetaHeader, mask: ArrayBody) -> Response:
    """A lasso, drawn into a mask."""
    return await _draw(lease, meta, "lasso", mask)


@nninteractive.post("/add_initial_seg_interaction")
async def add_initial_seg(lease: OneLease, meta: MetaHeader, mask: ArrayBody) -> Response:
    """A segmentation to start from; replaces earlier prompts."""
    check_keys(meta, _INTERACTION[1:], "the interaction")
    body = {"include_interaction": True, "run_prediction": False, **meta}
    return await _interact(lease, body, "", lambda shape, _: [arrays.mask_prompt(mask, shape)])


@nninteractive.post("/predict")
async def predict(lease: OneLease) -> Response:
    """Predict with the prompts that were added without a prediction."""

    def job(session: Session) -> MaskUpdate | None:
        state = lease.state
        if not state.steps:
            return None
        update = session.predict(state.object_id)
        lease.state = replace(state, steps=(*state.steps[:-1], state.steps[-1] + 1))
        lease.service.predictions.observe(update.seconds)
        return update

    return await _answer(lease, await lease.run(job))


@nninteractive.post("/undo")
async def undo(lease: OneLease) -> Response:
    """Undo the last interaction; repeatable until the first."""

    def job(session: Session) -> MaskUpdate | None:
        state = lease.state
        if not state.steps:
            return None
        updates = [u for u in (session.undo() for _ in range(state.steps[-1])) if u is not None]
        lease.state = replace(state, steps=state.steps[:-1])
        return combined(session, updates, state.object_id)

    return await _answer(lease, await lease.run(job))


# Answers, and what requests hold


async def _draw(lease: Lease, meta: Json, kind: str, mask: NDArray) -> Response:
    """Add a scribble or a lasso that is drawn into a mask."""
    key = "interaction_bbox"
    box = meta.get(key)
    return await _interact(lease, meta, key, lambda shape, sign: arrays.drawn_prompts(kind, mask, box, shape, sign))


async def _interact(lease: Lease, body: Json, key: str, prompts: Callable[[IntTriple, bool], list[Prompt]]) -> Response:
    """Add the prompts of one interaction, made of the image's shape and the sign, and send what changed.

    ``key`` is what the interaction's body holds beside ``_INTERACTION``.
    """
    check_keys(body, (key, *_INTERACTION), "the interaction")
    include, predict = _flag(body, "include_interaction"), _flag(body, "run_prediction", True)
    return await _answer(lease, await lease.add(lambda shape: prompts(shape, include), predict))


async def _answer(lease: Lease, update: MaskUpdate | None) -> Response:
    """Send the changed box of the client's array."""
    target = lease.state.target
    meta: Json = {"ran_prediction": update is not None, "bbox": None}
    body = b""
    if update is not None and update.changed and target is not None:
        part, region = update.mask.astype(target), update.region
        meta["bbox"] = [list(ends) for ends in zip(region.start_zyx, region.stop_zyx, strict=True)]
        meta |= {"dtype": target, "shape": list(part.shape)}
        body = await asyncio.to_thread(arrays.pack_array, part)
    headers = {"X-Meta": json.dumps(meta, separators=(",", ":"))}
    return Response(body, media_type="application/octet-stream", headers=headers)


def _flag(body: Json, key: str, default: bool | None = None) -> bool:
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise HTTPException(400, f"{key} must be true or false, got {str(value)[:40]}")
    return value

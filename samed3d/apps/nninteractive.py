"""The protocol of nnInteractive 2.x, so that programs written for its server find a session of ours behind a changed
URL.

A lease is a session: after a pause, or a restart of this server, the same lease goes on where it was, for its prompts
are in a journal. Resetting the interactions begins a new object; the earlier ones stay in the session and can be had
through the REST API. What is declared is what there is: no network channels, boxes of both kinds, undo without a limit.
Prompts are translated in ``nninteractive_prompts.py``, arrays in ``nninteractive_wire.py``. Source: what
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
from fastapi import APIRouter, Header, Request, Response
from numpy.typing import NDArray

from samed3d.apps.nninteractive_leases import Lease, Leases, prediction, together
from samed3d.apps.nninteractive_prompts import (
    box_prompt,
    drawn_region,
    grid_of,
    lasso_prompts,
    mask_prior,
    point_prompt,
    scribble_prompts,
)
from samed3d.apps.nninteractive_wire import DTYPES, unpack_array
from samed3d.apps.protocol import ApiError
from samed3d.apps.service import Service
from samed3d.apps.session_files import About, timestamp
from samed3d.apps.sessions import Entry
from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.inference.session import MaskUpdate, Session
from samed3d.models.weights import licence_of
from samed3d.prompts import Prompt
from samed3d.volume import write_volume

PROTOCOL_VERSION = "2.6.0"
_MOST_META = 16 * 1024
_IMAGE = "image.nii"
_STORED = {"bool": np.uint8, "float16": np.float32, "float64": np.float32, "int64": np.float32, "uint64": np.float32}

LeaseHeader = Annotated[str | None, Header(alias="X-Lease-Token")]


def nninteractive_routes(service: Service) -> APIRouter:
    """The routes that nnInteractive's clients call, at the root."""
    routes = APIRouter(tags=["nnInteractive"])
    leases = Leases(service)
    _add_leases(routes, service, leases)
    _add_image(routes, service, leases)
    _add_interactions(routes, leases)
    _add_looks(routes, leases)
    return routes


def _add_leases(routes: APIRouter, service: Service, leases: Leases) -> None:
    registry, limits = service.registry, service.options.limits

    def remaining(entry: Entry) -> float:
        return max(0.0, limits.idle_seconds - (time.monotonic() - entry.used))

    @routes.get("/capabilities", summary="What prompts are understood")
    async def capabilities() -> dict[str, Any]:
        return await registry.queue.run("capabilities", lambda: _capabilities(service))

    @routes.post("/claim", summary="A lease")
    async def claim() -> dict[str, Any]:
        entry = registry.create("nninteractive")
        leases.write(entry, Lease())
        return {
            "lease_token": entry.id,
            "idle_timeout_seconds": limits.idle_seconds,
            "liveness_timeout_seconds": limits.liveness_seconds,
            "max_sessions": limits.awake,
        }

    @routes.post("/release", summary="Give a lease back; its session sleeps until it is deleted through the REST API")
    async def release(token: LeaseHeader = None) -> dict[str, bool]:
        try:
            entry = leases.get(token)
        except ApiError:
            return {"released": True}
        if entry.about is None:  # nothing was done with it
            await service.forget(entry)
        else:
            await registry.queue.run(entry.id, lambda: registry.sleep(entry))
        return {"released": True}

    @routes.post("/heartbeat", summary="The client is still there")
    async def heartbeat(token: LeaseHeader = None) -> dict[str, float]:
        entry = leases.get(token)
        entry.seen = time.monotonic()
        return {"remaining_seconds": remaining(entry)}

    @routes.get("/lease_status", summary="How long until the session sleeps")
    async def lease_status(token: LeaseHeader = None) -> dict[str, float]:
        return {"remaining_seconds": remaining(leases.get(token)), "idle_timeout_seconds": limits.idle_seconds}


def _add_image(routes: APIRouter, service: Service, leases: Leases) -> None:
    @routes.post("/set_image", summary="The image, an array of one channel and three axes")
    async def set_image(request: Request, token: LeaseHeader = None) -> dict[str, Any]:
        entry, meta = leases.get(token), _meta(request)
        async with service.uploads:
            array = await _array(request, service)
            if array.ndim != 4 or array.shape[0] != 1:
                raise ApiError(400, f"image must have one channel and three axes, (1, X, Y, Z), got {array.shape}")
            shape: IntTriple = (array.shape[1], array.shape[2], array.shape[3])
            stored = array[0].astype(_STORED.get(array.dtype.name, array.dtype), copy=False)
            part = entry.folder / "incoming.nii"
            await asyncio.to_thread(write_volume, part, stored, grid_of(shape, meta.get("image_properties")))
            del array, stored

        def job() -> None:
            part.replace(entry.folder / _IMAGE)
            about = About(
                str(entry.folder / _IMAGE), "array", service.options.model, kind="nninteractive", created=timestamp()
            )
            service.registry.set_image(entry, about)
            leases.write(entry, Lease(shape=shape))

        await service.registry.queue.run(entry.id, job, request.is_disconnected)
        try:
            await service.registry.use(entry, lambda session: None, request.is_disconnected)
        except InputError:
            leases.write(entry, Lease())
            raise
        return {"original_image_shape": [1, *shape]}

    @routes.post("/set_target_buffer", summary="Shape and type of the array that the client keeps")
    async def set_target_buffer(request: Request, token: LeaseHeader = None) -> dict[str, Any]:
        entry, body = leases.get(token), await _json(request)
        lease, dtype = leases.read(entry), str(body.get("dtype"))
        if lease.shape is None or body.get("shape") != list(lease.shape):
            raise ApiError(
                400, f"the target must have the image's shape {lease.shape}, got {str(body.get('shape'))[:80]}"
            )
        if dtype not in DTYPES or np.dtype(dtype).kind not in "biu":
            raise ApiError(400, f"the target must be of bool or an integer type, got {dtype[:40]!r}")
        leases.write(entry, replace(lease, target=dtype))
        return {}

    @routes.post("/set_do_autozoom", summary="Noted; following the object is part of the model and stays on")
    async def set_do_autozoom(request: Request, token: LeaseHeader = None) -> dict[str, bool]:
        leases.get(token)
        if not isinstance((await _json(request)).get("do_autozoom"), bool):
            raise ApiError(400, "do_autozoom must be true or false")
        return {"do_autozoom": True}

    @routes.post("/reset_interactions", summary="Begin a new object")
    async def reset_interactions(request: Request, token: LeaseHeader = None) -> dict[str, Any]:
        entry = leases.get(token)

        def job() -> None:
            lease = leases.read(entry)
            leases.write(entry, replace(lease, object_id=lease.object_id + bool(lease.steps), steps=()))

        await service.registry.queue.run(entry.id, job, request.is_disconnected)
        return {}


def _add_interactions(routes: APIRouter, leases: Leases) -> None:
    service = leases.service

    @routes.post("/add_point_interaction", summary="A click")
    async def point(request: Request, token: LeaseHeader = None) -> Response:
        body = await _json(request)
        prompt = point_prompt(body.get("coordinates"), _flag(body, "include_interaction"))
        return await leases.interact(request, token, lambda _: [prompt], _flag(body, "run_prediction", True))

    @routes.post("/add_bbox_interaction", summary="A box")
    async def bbox(request: Request, token: LeaseHeader = None) -> Response:
        body = await _json(request)
        include, coordinates = _flag(body, "include_interaction"), body.get("bbox_coords")
        return await leases.interact(
            request, token, lambda shape: [box_prompt(coordinates, include, shape)], _flag(body, "run_prediction", True)
        )

    def drawn(kind: str, translate: Callable[[NDArray[np.bool_], IntTriple, bool], list[Prompt]]) -> None:
        @routes.post(f"/add_{kind}_interaction", name=kind, summary=f"A {kind}, drawn into a mask")
        async def add(request: Request, token: LeaseHeader = None) -> Response:
            leases.get(token)
            meta = _meta(request)
            include, mask = _flag(meta, "include_interaction"), await _array(request, service)
            box = meta.get("interaction_bbox")
            return await leases.interact(
                request,
                token,
                lambda shape: translate(*drawn_region(mask, box, shape), include),
                _flag(meta, "run_prediction", True),
            )

    drawn("scribble", scribble_prompts)
    drawn("lasso", lasso_prompts)

    @routes.post("/add_initial_seg_interaction", summary="A segmentation to start from; replaces what was said before")
    async def initial_seg(request: Request, token: LeaseHeader = None) -> Response:
        leases.get(token)
        meta = _meta(request)
        mask = await _array(request, service)
        return await leases.interact(
            request, token, lambda shape: [mask_prior(mask, shape)], _flag(meta, "run_prediction", False)
        )


def _add_looks(routes: APIRouter, leases: Leases) -> None:
    service = leases.service

    @routes.post("/predict", summary="Look again, with what was added without looking")
    async def predict(request: Request, token: LeaseHeader = None) -> Response:
        entry = leases.get(token)

        def job(session: Session) -> tuple[MaskUpdate | None, str | None]:
            lease = leases.read(entry)
            if not lease.steps:
                return None, lease.target
            update = session.predict(lease.object_id)
            leases.write(entry, replace(lease, steps=(*lease.steps[:-1], lease.steps[-1] + 1)))
            service.telemetry.prediction(update.seconds)
            return update, lease.target

        update, target = await service.registry.use(entry, job, request.is_disconnected)
        return await asyncio.to_thread(prediction, update, target)

    @routes.post("/undo", summary="Take the last interaction back; as often as there are any")
    async def undo(request: Request, token: LeaseHeader = None) -> Response:
        entry = leases.get(token)

        def job(session: Session) -> tuple[MaskUpdate | None, str | None]:
            lease = leases.read(entry)
            if not lease.steps:
                return None, lease.target
            updates = [u for u in (session.undo() for _ in range(lease.steps[-1])) if u is not None]
            leases.write(entry, replace(lease, steps=lease.steps[:-1]))
            return together(session, updates, lease.object_id), lease.target

        update, target = await service.registry.use(entry, job, request.is_disconnected)
        return await asyncio.to_thread(prediction, update, target)


def _capabilities(service: Service) -> dict[str, Any]:
    spec = service.registry.model(service.options.model).spec
    boxes, points = "box" in spec.prompts, "point" in spec.prompts
    return {
        "supported_interactions": {
            "points": points,
            "bbox2d": points,
            "bbox3d": boxes,
            "scribble": points,
            "lasso": points,
        },
        "channel_mapping": {},
        "num_interaction_channels": 0,
        "supports_initial_label": True,
        "supports_zero_shot_label_refinement": True,
        "preferred_scribble_thickness": [2, 2, 2],
        "interaction_decay": None,
        "patch_size": list(spec.input_shape_zyx),
        "do_autozoom": True,
        "inference_session_version": PROTOCOL_VERSION,
        "license": licence_of(service.options.model),
        "supports_undo": True,
    }


async def _array(request: Request, service: Service) -> NDArray:
    body = await request.body()
    array = await asyncio.to_thread(unpack_array, body, service.options.images.voxels)
    if array.dtype.kind == "f" and not math.isfinite(float(array.sum(dtype=np.float64)) if array.size else 0.0):
        raise InputError("the array holds NaN or infinite values; replace them with the background value")
    return array


def _meta(request: Request) -> dict[str, Any]:
    text = request.headers.get("x-meta", "{}")
    if len(text) > _MOST_META:
        raise ApiError(431, f"the X-Meta header must have at most {_MOST_META} characters, got {len(text)}")
    return _object(text, "the X-Meta header")


async def _json(request: Request) -> dict[str, Any]:
    return _object(await request.body(), "the body")


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{what} must be JSON, got something else ({error})") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"{what} must be a JSON object, got {type(body).__name__}")
    return body


def _flag(body: dict[str, Any], key: str, default: bool | None = None) -> bool:
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise ApiError(400, f"{key} must be true or false, got {str(value)[:40]}")
    return value

"""Leases of nnInteractive's clients: which object their interactions go to, and what each answer says changed.

A lease is a session of ``sessions.py`` with a ``lease.json`` beside its journal. The routes are in
``nninteractive.py``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from fastapi import Request, Response

from samed3d.apps.nninteractive_wire import pack_array
from samed3d.apps.protocol import ApiError
from samed3d.apps.service import Service
from samed3d.apps.session_files import write_json
from samed3d.apps.sessions import Entry
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region
from samed3d.inference.session import MaskUpdate, Session
from samed3d.prompts import Prompt


@dataclass(frozen=True)
class Lease:
    """What a lease remembers beside its session, kept in ``lease.json``.

    Attributes:
        object_id: The object that interactions go to.
        steps: For each interaction since the last reset, how many edits of the session it was.
        shape: Of the image's array, or None.
        target: Type of the client's result, or None where it has none.
    """

    object_id: int = 1
    steps: tuple[int, ...] = ()
    shape: IntTriple | None = None
    target: str | None = None
    kind: str = "nninteractive"


class Leases:
    """Leases by token, and work on their sessions."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def get(self, token: str | None) -> Entry:
        """The session of a lease; 410 if there is none."""
        try:
            entry = self.service.registry.get(token or "")
        except ApiError as error:
            raise ApiError(410, "the lease is unknown; claim a new one") from error
        if not (entry.folder / "lease.json").exists():
            raise ApiError(410, "the lease is unknown; claim a new one")
        return entry

    def read(self, entry: Entry) -> Lease:
        """What the lease remembers."""
        body = json.loads((entry.folder / "lease.json").read_text())
        shape = body.get("shape")
        return Lease(
            body.get("object_id", 1), tuple(body.get("steps", ())), tuple(shape) if shape else None, body.get("target")
        )

    def write(self, entry: Entry, lease: Lease) -> None:
        """Remember it, on the disk."""
        write_json(entry.folder / "lease.json", asdict(lease))

    async def interact(
        self, request: Request, token: str | None, prompts: Callable[[IntTriple], list[Prompt]], predict: bool
    ) -> Response:
        """Add what one interaction says, in order, and look once at the end."""
        entry = self.get(token)
        lease = self.read(entry)
        if lease.shape is None:
            raise ApiError(400, "there is no image yet; call set_image first")
        said = await asyncio.to_thread(prompts, lease.shape)

        def job(session: Session) -> tuple[MaskUpdate | None, Lease]:
            before, updates = self.read(entry), []
            try:
                for number, prompt in enumerate(said, start=1):
                    updates.append(session.add(prompt, before.object_id, predict=predict and number == len(said)))
            except InputError:
                for _ in updates:  # all of an interaction or nothing of it
                    session.undo()
                raise
            after = replace(before, steps=(*before.steps, len(updates)))
            self.write(entry, after)
            if predict:
                self.service.telemetry.prediction(sum(u.seconds for u in updates))
            return (together(session, updates, before.object_id) if predict else None), after

        update, after = await self.service.registry.use(entry, job, request.is_disconnected)
        return await asyncio.to_thread(prediction, update, after.target)


def together(session: Session, updates: list[MaskUpdate], object_id: int) -> MaskUpdate | None:
    """Several updates of an object as one: the mask as it is now in the box around all."""
    if len(updates) == 1:
        return updates[0]
    region = Region((0, 0, 0), (0, 0, 0))
    for update in updates:
        region = region.union(update.region)
    known = any(o.id == object_id for o in session.objects())
    mask = session.mask_of(object_id)[region.slices] if known else np.zeros(region.shape_zyx, np.uint8)
    return MaskUpdate(region, mask, sum(u.seconds for u in updates), object_id)


def prediction(update: MaskUpdate | None, target: str | None) -> Response:
    """What the client writes into its array: the changed box, or that nothing changed."""
    meta: dict[str, Any] = {"ran_prediction": update is not None, "bbox": None}
    body = b""
    if update is not None and update.changed and target is not None:
        part = update.mask.astype(target)
        meta |= {"bbox": [list(ends) for ends in zip(update.region.start_zyx, update.region.stop_zyx, strict=True)]}
        meta |= {"dtype": target, "shape": list(part.shape)}
        body = pack_array(part)
    return Response(
        body, media_type="application/octet-stream", headers={"X-Meta": json.dumps(meta, separators=(",", ":"))}
    )

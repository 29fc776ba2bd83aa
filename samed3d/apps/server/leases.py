"""A lease: a session that a client of another program's protocol holds, with what that protocol must remember.

The state lies in ``lease.json`` beside the session's journal, so it survives a pause and a restart of the server.
Resetting the interactions begins a new object; the earlier ones stay in the session, where the REST API finds them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from samed3d.apps.server.service import Service, SessionWork
from samed3d.apps.server.sessions import SessionInfo
from samed3d.errors import InputError
from samed3d.geometry import EMPTY_REGION, Grid, IntTriple
from samed3d.inference.session import Session
from samed3d.output import write_json
from samed3d.prompts import MaskUpdate, Prompt
from samed3d.volume import write_volume

_IMAGE, _STATE = "image.nii", "lease.json"


@dataclass(frozen=True)
class LeaseState:
    """What a lease keeps in ``lease.json``.

    Attributes:
        object_id: The object that interactions prompt.
        steps: For each interaction since the last reset, how many edits of the session it made.
        shape: Of the image's array, or None.
        target: Data type of the client's result array, or None if the client has none.
    """

    object_id: int = 1
    steps: Sequence[int] = ()
    shape: Sequence[int] | None = None
    target: str | None = None


class Lease(SessionWork):
    """A client's lease: a session, its state, and the request that names it."""

    @classmethod
    def new(cls, service: Service, request: Request) -> Lease:
        """A lease of a new session without an image; raises as ``Service.create``."""
        lease = cls(service.create(), service, request)
        lease.state = LeaseState()
        return lease

    @classmethod
    def find(cls, lease_id: str, service: Service, request: Request) -> Lease | None:
        """The lease of that id, if there is one; a session of the REST API is none."""
        with suppress(HTTPException):
            entry = service.get(lease_id)
            if (entry.folder / _STATE).exists():
                return cls(entry, service, request)
        return None

    @property
    def state(self) -> LeaseState:
        """The state on disk."""
        return LeaseState(**json.loads((self.entry.folder / _STATE).read_text()))

    @state.setter
    def state(self, state: LeaseState) -> None:
        write_json(self.entry.folder / _STATE, asdict(state))

    @property
    def remaining_seconds(self) -> float:
        """Time until the session is unloaded."""
        return max(0.0, self.service.options.idle_seconds - (time.monotonic() - self.entry.used))

    async def open_array(self, array: NDArray, grid: Grid, name: str) -> None:
        """Open an array (D, H, W) in the session; the prompts on an earlier image are deleted.

        Raises:
            InputError: if it cannot be used as an image; the lease then has none.
        """
        service, image = self.service, self.entry.folder / _IMAGE
        incoming = image.with_name("incoming.nii")  # the session may still read the earlier image
        await asyncio.to_thread(write_volume, incoming, array, grid)

        def job() -> None:
            incoming.replace(image)
            info = SessionInfo(str(image), name, service.options.model, kind="nninteractive")
            service.set_image(self.entry, info)
            self.state = LeaseState(shape=grid.shape_zyx)

        await service.queue.run(self.entry.id, job, self.is_gone)
        try:
            await self.run(lambda session: None)
        except InputError:
            self.state = LeaseState()
            raise

    async def add(self, prompts: Callable[[IntTriple], list[Prompt]], predict: bool) -> MaskUpdate | None:
        """Add the prompts of one interaction in order, and predict once after the last."""
        if self.state.shape is None:
            raise HTTPException(400, "there is no image yet; send one first")
        d, h, w = self.state.shape
        added = await asyncio.to_thread(prompts, (d, h, w))

        def job(session: Session) -> MaskUpdate | None:
            before, updates = self.state, []
            try:
                for number, prompt in enumerate(added, start=1):
                    updates.append(session.add(prompt, before.object_id, predict=predict and number == len(added)))
            except InputError:
                for _ in updates:  # an interaction is added as a whole or not at all
                    session.undo()
                raise
            self.state = replace(before, steps=(*before.steps, len(updates)))
            if predict:
                self.service.predictions.observe(sum(u.seconds for u in updates))
            return combined(session, updates, before.object_id) if predict else None

        return await self.run(job)

    async def reset(self) -> None:
        """Begin a new object."""

        def job() -> None:
            state = self.state
            self.state = replace(state, object_id=state.object_id + bool(state.steps), steps=())

        await self.service.queue.run(self.entry.id, job, self.is_gone)


def combined(session: Session, updates: list[MaskUpdate], object_id: int) -> MaskUpdate | None:
    """Several updates of one object as one: its mask now, in the box around all of them."""
    if len(updates) == 1:
        return updates[0]
    region = EMPTY_REGION
    for update in updates:
        region = region.union(update.region)
    exists = any(o.id == object_id for o in session.objects())
    mask = session.mask_of(object_id)[region.slices] if exists else np.zeros(region.shape_zyx, np.uint8)
    return MaskUpdate(region, mask, sum(u.seconds for u in updates), object_id)

"""The sessions of a server as data: how each is opened again, its folder, and its JSON.

Each session has a folder with ``session.json`` (which image, which model), ``journal.jsonl`` (every prompt, which
``Session`` writes before the server answers) and the image where the client uploaded it. ``service.py`` loads and
unloads them; what a session does is in ``inference/session.py``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import Region
from samed3d.inference.mask_files import notes_of
from samed3d.inference.session import Session, SessionObject
from samed3d.prompts import PackedMask, prompt_to_json
from samed3d.volume import Volume

logger = logging.getLogger(__name__)

Json = dict[str, Any]
JOURNAL = "journal.jsonl"
VIEWED = "viewed.nii.gz"
"""The image as a web page receives it; written at the first request for it."""
_COMPRESSION = 1  # higher levels save little on masks and would delay every click


@dataclass(frozen=True)
class SessionInfo:
    """How to open a session again: the content of ``session.json``."""

    image: str
    name: str
    model: str
    channel: int | None = None
    series: str | None = None
    modality: str | None = None
    untilt: bool = False
    kind: str = "rest"
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def reading(self) -> Json:
        """How to read the image, as ``read_volume`` and ``Session.open`` take it."""
        return {"channel": self.channel, "series": self.series, "modality": self.modality, "untilt": self.untilt}


@dataclass
class ServerSession:
    """One session of the server, loaded or not.

    Attributes:
        info: None before the session has an image.
        session: None while the session is not loaded.
        used: When a user last requested something, by the monotonic clock.
        seen: When its client last sent anything.
        reading: Held while the image is read. That happens outside the worker thread, so that a large image does not
            delay the clicks of others.
        image: The image once it is read, until the session takes it.
    """

    id: str
    folder: Path
    info: SessionInfo | None
    session: Session | None = None
    used: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    image: Volume | None = None

    @property
    def revision(self) -> int:
        """Length of the journal. It grows with every edit, restarts included: edits are only ever appended."""
        try:
            return (self.folder / JOURNAL).stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def nbytes(self) -> int:
        """Memory of the image, of the masks after all edits, and of what ``trim`` deletes."""
        if self.session is None:
            return 0
        history = self.session.history
        states = [state for _, state in (*history.done, *history.undone) if state is not None]
        steps = {entry.step for state in states for entry in state.objects.values() if entry.step is not None}
        masks = sum(len(step.mask.bits) for step in steps)
        return self.session.volume.array.nbytes + masks + history.prompts.nbytes

    def trim(self) -> None:
        """Free the memory of what the session can compute again; on the worker thread only."""
        if self.session is not None:
            self.session.history.prompts.clear()

    def unload(self) -> None:
        """Free the session's memory; on the worker thread only."""
        if self.session is not None:
            self.session.close()
            self.session = None
            logger.info("session %s is unloaded; its journal is kept", self.id[:6])


def read_info(folder: Path) -> SessionInfo | None:
    """The content of a session folder's ``session.json``; None before it has an image, or if the file is damaged."""
    try:
        return SessionInfo(**json.loads((folder / "session.json").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("session %s has a damaged session.json: %s", folder.name[:6], error)
        return None


def session_to_json(entry: ServerSession, session: Session) -> Json:
    """A session as clients see it: the image's grid, the objects with their prompts, and whether undo is possible."""
    grid, info = session.volume.grid, entry.info
    return {
        "id": entry.id,
        **{key: getattr(info, key, "") for key in ("name", "model", "created")},
        "revision": entry.revision,
        "size_ijk": list(grid.size_ijk),
        "spacing_mm": list(grid.spacing_xyz_mm),
        "affine_ras": grid.affine_ras.tolist(),
        "notes": notes_of(session.history.state, session.volume),
        **{key: getattr(session, key) for key in ("current", "others_are_negative", "can_undo", "can_redo")},
        "objects": [_object_to_json(shown) for shown in session.objects()],
    }


def _object_to_json(shown: SessionObject) -> Json:
    prompts = []
    for number, prompt in shown.numbered.items():
        body = prompt_to_json(prompt)
        body.pop("bits", None)  # a mask is only named here
        prompts.append({"id": number, "space": prompt.space, **body})
    keys = ("id", "name", "code", "colour", "visible", "locked", "voxels")
    return {**{key: getattr(shown, key) for key in keys}, "prompts": prompts}


def update_to_json(object_id: int, region: Region, mask: NDArray) -> Json:
    """The mask of one object inside a box.

    The answer holds ``object_id``, ``start`` (inclusive) and ``stop`` (exclusive) as i, j, k, and ``bits``: one bit per
    voxel of the box, x fastest, the highest bit of a byte first, zlib ("deflate" in a browser), base64.

    Args:
        object_id: The object.
        region: The box, stored zyx.
        mask: (d, h, w) of the region's shape; voxels that are not 0 belong to the object.
    """
    bits = zlib.compress(np.packbits(mask != 0).tobytes(), _COMPRESSION)
    body = PackedMask(region.stop_zyx, region, bits).to_json()
    del body["size"]
    return {"object_id": object_id, **body}

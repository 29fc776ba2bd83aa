"""What all routes of a server share: its settings, its sessions, its counters, and how a session is shown as JSON.

Not here: routes (``rest.py``, ``batch.py``, ``nninteractive.py``) and how they become one program (``server.py``).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from samed3d.apps.protocol import ApiError, update_to_json
from samed3d.apps.security import Access
from samed3d.apps.session_files import About, timestamp
from samed3d.apps.sessions import Entry, Limits, Registry
from samed3d.apps.telemetry import Telemetry
from samed3d.errors import InputError
from samed3d.geometry import Grid, bounding_region
from samed3d.inference.session import MaskUpdate, Session
from samed3d.models.base import PromptableModel
from samed3d.prompts import Mask, Prompt, prompt_from_json, prompt_to_json
from samed3d.volume import write_volume
from samed3d.volume.untrusted import ReadLimits

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMATS = {
    "nifti": (".nii.gz", "NIfTI label map"),
    "nrrd": (".nrrd", "NRRD label map"),
    "mha": (".mha", "MetaImage label map"),
    "seg.nrrd": (".seg.nrrd", "3D Slicer segmentation (seg.nrrd)"),
    "dicom-seg": (".dcm", "DICOM-SEG"),
    "rtstruct": (".dcm", "DICOM RTSTRUCT"),
}
"""What can be exported: suffix and a name for people."""
EXAMPLE_SEED = 0
_UPLOADS_AT_ONCE = 2


@dataclass(frozen=True)
class ServerOptions:
    """How a server is set up.

    Attributes:
        sessions: Folder in which sessions are kept.
        roots: Folders whose images clients may open by path.
        model: The model of sessions that do not ask for one.
        models: Names that they may ask for; ``model`` is always one.
        device: As ``Session.open``.
        access: Who is let in.
        limits: How many sessions.
        images: How large an image may be.
        page: Folder of the web page that is shown at ``/``, or None.
    """

    sessions: Path
    roots: tuple[Path, ...] = ()
    model: str = "default"
    models: tuple[str, ...] = ()
    device: str = "auto"
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    images: ReadLimits = field(default_factory=ReadLimits)
    page: Path | None = None


class Service:
    """A server's settings, sessions and counters."""

    def __init__(self, options: ServerOptions, load: Callable[[str], PromptableModel]) -> None:
        self.options = options
        self.registry = Registry(options.sessions, load, options.limits, options.device)
        self.telemetry = Telemetry()
        self.uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)

    @property
    def models(self) -> list[str]:
        """Names of the models that may be asked for, the default first."""
        return [self.options.model, *(m for m in self.options.models if m != self.options.model)]

    def model_name(self, asked: str | None) -> str:
        """The model to use.

        Raises:
            ApiError: 400 for one that this server does not offer; a file of the server is never one.
        """
        if asked is None:
            return self.options.model
        if asked not in self.models:
            raise ApiError(400, f"model must be one of {', '.join(self.models)}, got {asked[:80]!r}")
        return asked

    async def opened(self, entry: Entry, about: About, request: Request) -> dict[str, Any]:
        """Give a new entry its image and open it; an image that cannot be opened leaves no session behind."""

        def job() -> None:
            self.registry.set_image(entry, about)

        try:
            await self.registry.queue.run(entry.id, job, request.is_disconnected)
            return await self.registry.use(
                entry, lambda session: session_to_json(entry, session), request.is_disconnected
            )
        except BaseException:
            await self.forget(entry)
            raise

    async def forget(self, entry: Entry) -> None:
        """Delete a session once its turn comes."""
        await self.registry.queue.run(entry.id, lambda: self.registry.delete(entry))

    async def edit(
        self,
        request: Request,
        session_id: str,
        revision: int | None,
        change: Callable[[Session], Iterable[MaskUpdate | None]],
    ) -> dict[str, Any]:
        """Change a session; the answer says what changed, of masks and of lists."""
        entry = self.registry.get(session_id)

        def job(session: Session) -> dict[str, Any]:
            updates = [u for u in change(session) if u is not None]
            if not request.url.path.endswith(("/undo", "/redo")):
                for update in updates:
                    self.telemetry.prediction(update.seconds)
            return edit_to_json(entry, session, updates)

        return await self.registry.use(entry, job, request.is_disconnected, revision)

    async def read(self, request: Request, session_id: str, job: Callable[[Session], T]) -> T:
        """Ask a session for something without changing it."""
        return await self.registry.use(self.registry.get(session_id), job, request.is_disconnected)

    def about(
        self, image: Path, name: str, model: str | None, channel: int | None = None, series: str | None = None
    ) -> About:
        """What is written down of a new session."""
        return About(str(image), name[:200], self.model_name(model), channel, series, "rest", timestamp())

    def example(self, folder: Path) -> Path:
        """The demo's generated body as an image file in a session's folder."""
        from samed3d.data.phantom import anatomical_phantom

        array, _, grid, _ = anatomical_phantom(np.random.default_rng(EXAMPLE_SEED))
        write_volume(folder / "example.nii", array, grid)
        return folder / "example.nii"


def wire_prompt(entry: Any, space: str = "ijk", where: str = "prompt") -> Prompt:
    """A prompt from a request: as in a prompt file, but a mask brings its bits, never the path of a file.

    Raises:
        InputError: if it breaks the schema.
    """
    prompt = prompt_from_json(entry, space, where)
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        raise InputError(f"{where}: a mask must bring its bits (size, start, stop, bits), got the path of a file")
    return prompt


def session_to_json(entry: Entry, session: Session) -> dict[str, Any]:
    """A session as clients see it: the image's grid, the objects with their prompts, where undo stands."""
    grid, about = session.volume.grid, entry.about
    return {
        "id": entry.id,
        "name": about.name if about else "",
        "model": about.model if about else "",
        "created": about.created if about else "",
        "revision": entry.revision,
        **grid_to_json(grid),
        "current": session.current,
        "others_are_negative": session.others_are_negative,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
        "objects": [_object_to_json(o) for o in session.objects()],
    }


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """Size, spacing and the matrix from voxels to RAS millimetres."""
    return {
        "size_ijk": list(grid.size_ijk),
        "spacing_mm": list(grid.spacing_xyz_mm),
        "affine_ras": grid.affine_ras.tolist(),
    }


def edit_to_json(entry: Entry, session: Session, updates: list[MaskUpdate]) -> dict[str, Any]:
    """The answer to every change."""
    return {
        "seconds": round(sum(u.seconds for u in updates), 4),
        "prompt_id": updates[-1].prompt_id if updates else None,
        "updates": [update_to_json(u.object_id, u.region, u.mask) for u in updates if u.changed],
        "session": session_to_json(entry, session),
    }


def whole_mask_to_json(object_id: int, mask: NDArray[np.uint8]) -> dict[str, Any]:
    """An object's whole mask as an update of the box around it."""
    region = bounding_region(mask)
    return update_to_json(object_id, region, mask[region.slices])


def remove_files(*paths: Path) -> None:
    """Delete files and folders that an answer was made of."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _object_to_json(entry: Any) -> dict[str, Any]:
    prompts = [{"id": number, "space": prompt.space, **_listed(prompt)} for number, prompt in entry.numbered.items()]
    keys = ("id", "name", "colour", "visible", "locked", "voxels")
    return {**{key: getattr(entry, key) for key in keys}, "prompts": prompts}


def _listed(prompt: Prompt) -> dict[str, Any]:
    """A prompt in a list; the bits of a mask stay where they are."""
    body = prompt_to_json(prompt)
    body.pop("bits", None)
    return body

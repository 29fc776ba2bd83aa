"""One session as napari needs it: edits run in order outside the window's thread, and each reports what it changed.

The session is a ``Session`` of this process or a ``RemoteSession`` of a server, whose calls are the same. Needs neither
Qt nor napari. The layers that show it are in ``layers.py``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.apps.client import Client, RemoteError
from samed3d.errors import InputError
from samed3d.geometry import Grid, Region, Triple, as_triple, bounding_region
from samed3d.prompts import Box, Mask, PackedMask, Point, Prompt, Scribble, box_in_grid, path_in_grid, point_in_grid
from samed3d.volume import SUFFIXES, Volume, write_volume

logger = logging.getLogger(__name__)

MOST_OBJECTS = 255
_CONFLICT = 409
_NOWHERE = Region((0, 0, 0), (0, 0, 0))
_NO_LABELS = np.zeros((0, 0, 0), np.uint8)
Runner = Callable[[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None]], None]
"""Runs jobs in the given order; afterwards it calls ``done`` or ``failed`` in the caller's thread."""


def open_local(volume: Volume, model: str = "default") -> Any:
    """A session of this process."""
    from samed3d.inference.session import Session  # imports torch, which napari should not load before it is needed

    return Session.open(volume, model)


def open_remote(volume: Volume, url: str, token: str | None = None, model: str | None = None) -> Any:
    """A session on a server, which receives the volume's file, or an NRRD file of it if there is none.

    Raises:
        InputError: if the URL is not one.
        RemoteError: if the server does not answer, or refuses the image.
    """
    client = Client(url, token or None)
    source = Path(volume.source)
    if source.is_file() and source.name.lower().endswith(tuple(SUFFIXES)):
        return client.open(source, model=model)
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder) / "image.nrrd"
        write_volume(sent, volume.array, volume.grid)
        return client.open(sent, model=model)


@dataclass(frozen=True)
class Change:
    """The objects after an edit, and what the edit changed.

    Attributes:
        objects: All objects, ``SessionObject`` or ``RemoteObject``.
        current: The object that was prompted last; 0 before any.
        region: The changed part of the label map, zyx; empty where no voxel changed.
        labels: uint8, of the region's shape.
        prompt_id: The prompt that was added, moved or removed; 0 for other edits.
        seconds: Duration of the edit.
        note: A message for the user, or "".
    """

    objects: tuple[Any, ...] = ()
    current: int = 0
    can_undo: bool = False
    can_redo: bool = False
    region: Region = _NOWHERE
    labels: NDArray[np.uint8] = field(default_factory=_NO_LABELS.copy)
    prompt_id: int = 0
    seconds: float = 0.0
    note: str = ""


def run_now(job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
    """The runner that runs a job at once, in the same thread."""
    try:
        result = job()
    except Exception as error:
        failed(error)
        return
    done(result)


def error_message(error: Exception) -> str:
    """An error as one line for the user; an unexpected one is also logged."""
    if isinstance(error, InputError | RemoteError):
        return str(error)
    logger.error("in the napari plugin", exc_info=error)
    return f"this is our fault: {type(error).__name__}: {error}"


class Controller:
    """One session and its listeners.

    Attributes:
        session: ``Session`` or ``RemoteSession``; used by jobs only.
        grid: Of the image.
        shape_zyx: Of the image.
        labels: uint8 (D, H, W), the ids of the visible objects, as after the last finished edit.
        state: The last change.
        on_change: Called with each change.
        on_error: Called with each error.
    """

    def __init__(self, session: Any, runner: Runner = run_now) -> None:
        """Take an open session; ``start`` reads what it holds."""
        self.session, self._runner = session, runner
        self.is_remote = not hasattr(session, "volume")
        self.grid: Grid = session.grid if self.is_remote else session.volume.grid
        self.shape_zyx = self.grid.shape_zyx
        self.labels = np.zeros(self.shape_zyx, np.uint8)
        self.state = Change()
        self.on_change: list[Callable[[Change], None]] = []
        self.on_error: list[Callable[[Exception], None]] = []
        self._masks: dict[int, PackedMask] = {}
        self._objects: dict[int, Any] = {}  # as after the last job

    def start(self) -> None:
        """Show what the session holds already."""
        self._run(self._read_everything)

    def edit(self, call: Callable[[Any], Any], then: Callable[[int], None] | None = None) -> None:
        """Edit the session.

        Args:
            call: Calls one of the session's methods, such as ``lambda session: session.add(prompt, object_id)``.
            then: Called with the number of the prompt that changed; 0 if there is none or the edit was refused.
        """
        self._run(lambda: self._edited(call), then)

    def new_object(self) -> None:
        """Make an object without prompts; it becomes the current one."""

        def make(session: Any) -> None:
            if len(session.objects()) >= MOST_OBJECTS:
                raise InputError(f"there can be at most {MOST_OBJECTS} objects here; start another session for more")
            session.new_object()

        self.edit(make)

    def painted(self, painted: NDArray) -> None:
        """Take a label map that was edited by hand: each object whose voxels changed restarts from its new mask.

        A painted voxel belongs to its new label and to no other visible object that is not locked.

        Args:
            painted: (D, H, W) of integers; it is compared with ``labels`` and not kept.
        """
        region = bounding_region(painted != self.labels)
        if region.is_empty:
            return
        before, after = self.labels[region.slices], np.asarray(painted)[region.slices].copy()
        where = before != after
        touched = {int(number) for number in np.union1d(before[where], after[where]) if number}
        touched |= {shown.id for shown in self.state.objects if shown.visible and not shown.locked}
        for number in sorted(touched):
            packed = self._masks.get(number) or PackedMask.of_part(_NO_LABELS, _NOWHERE, self.shape_zyx)
            old = packed.on(region)
            new = np.where(where, after == number, old)
            if (new != old).any():
                mask = packed.full()
                mask[region.slices] = new
                self.start_from(mask, number)

    def start_from(self, mask: NDArray, object_id: int) -> None:
        """Restart an object from a mask, (D, H, W)."""

        def add(session: Any) -> Any:
            if not mask.any():
                raise InputError(f"object {object_id} would have no voxel left; remove the object instead")
            return session.add(Mask(mask), object_id)

        self.edit(add)

    def in_voxels(self, prompt: Prompt) -> Prompt:
        """The same prompt with its positions in ijk."""
        if isinstance(prompt, Mask) or prompt.space == "ijk":
            return prompt
        if isinstance(prompt, Point):
            return replace(prompt, at=point_in_grid(prompt, self.grid), space="ijk")
        if isinstance(prompt, Box):
            return Box(*box_in_grid(prompt, self.grid))
        path = tuple(path_in_grid(prompt, self.grid))
        if isinstance(prompt, Scribble):
            return replace(prompt, path=path, space="ijk")
        return replace(prompt, outline=path, space="ijk")

    def suggest_click(self, then: Callable[[Triple, bool], None]) -> None:
        """Call ``then`` with the least certain voxel (zyx), and whether the model predicts the object there."""

        def found(point: Point) -> None:
            then(as_triple(self.in_voxels(point).at[::-1]), point.positive)  # type: ignore[union-attr]

        self._runner(self.session.suggest_click, found, self._failed)

    def save(self, path: str, format: str, then: Callable[[], None] | None = None) -> None:
        """Write the masks to a file; a name that ends in ``.json`` keeps the whole session (of this process only).

        Args:
            path: The file.
            format: One of ``volume.writing.MASK_FORMATS``; not used for ``.json``.
            then: Called when the file is written.
        """

        def write() -> None:
            if not path.lower().endswith(".json"):
                self.session.export(path, format)
            elif self.is_remote:
                raise InputError("a session on a server is kept there; save masks instead, or open it again by its id")
            else:
                self.session.save(path)

        self._runner(write, lambda _: then() if then else None, self._failed)

    def close(self) -> None:
        """Close the session; on a server it is kept."""
        self._runner(self.session.close, lambda _: None, self._failed)

    def _run(self, job: Callable[[], Change], then: Callable[[int], None] | None = None) -> None:
        def done(change: Change) -> None:
            self.labels[change.region.slices] = change.labels
            self.state = change
            report(change)

        def failed(error: Exception) -> None:
            self._failed(error)
            # Listeners show the unchanged state again, so that a refused drawing disappears.
            report(replace(self.state, region=_NOWHERE, labels=_NO_LABELS, prompt_id=0))

        def report(change: Change) -> None:
            if then is not None:
                then(change.prompt_id)
            for listener in self.on_change:
                listener(change)

        self._runner(job, done, failed)

    def _failed(self, error: Exception) -> None:
        for listener in self.on_error:
            listener(error)

    # The methods below run where the runner runs its jobs.

    def _edited(self, call: Callable[[Any], Any]) -> Change:
        try:
            update = call(self.session)
        except RemoteError as error:
            if error.status != _CONFLICT:
                raise
            self.session.refresh()
            note = "the session was changed elsewhere; it is shown as it is now, please repeat your edit"
            return replace(self._read_everything(), note=note)
        region = getattr(update, "region", _NOWHERE)
        if not region.is_empty:
            old = self._masks.get(update.object_id)
            whole = region if old is None else region.union(old.region)
            part = np.zeros(whole.shape_zyx, bool) if old is None else old.on(whole)
            part[region.slices_in(whole)] = update.mask != 0
            self._masks[update.object_id] = PackedMask.of_part(part, whole, self.shape_zyx)
        return self._change(region, getattr(update, "prompt_id", 0), getattr(update, "seconds", 0.0))

    def _read_everything(self) -> Change:
        self._masks = {shown.id: PackedMask.of(self.session.mask_of(shown.id)) for shown in self.session.objects()}
        return self._change(Region((0, 0, 0), self.shape_zyx))

    def _change(self, changed: Region, prompt_id: int = 0, seconds: float = 0.0) -> Change:
        """The state now; the region grows by the masks of objects that were shown, hidden, locked or removed."""
        objects = {shown.id: shown for shown in self.session.objects()}
        if max(objects, default=0) > MOST_OBJECTS:
            expected = f"1 to {MOST_OBJECTS} here, got {max(objects)}"
            raise InputError(f"object ids must be {expected}; open this session in another program")
        for number in objects.keys() | self._objects.keys():
            old, new = self._objects.get(number), objects.get(number)
            if old is None or new is None or (old.visible, old.locked) != (new.visible, new.locked):
                mask = self._masks.get(number)
                changed = changed if mask is None else changed.union(mask.region)
            if new is None:
                self._masks.pop(number, None)
        self._objects = objects
        s, labels = self.session, self._composed(changed)
        shown = tuple(objects.values())
        return Change(shown, s.current, s.can_undo, s.can_redo, changed, labels, prompt_id, seconds)

    def _composed(self, region: Region) -> NDArray[np.uint8]:
        """The label map of the visible objects in a region: a locked object wins, then the more certain one."""
        part = np.zeros(region.shape_zyx, np.uint8)
        clash = np.zeros(region.shape_zyx, bool)
        shown = [o for o in self._objects.values() if o.visible and o.id in self._masks]
        for entry in sorted(shown, key=lambda o: (not o.locked, o.id)):
            mask = self._masks[entry.id].on(region)
            clash |= mask & (part != 0)
            part[mask & (part == 0)] = entry.id
        # A server's certainty is not requested: there the lower id is shown. Files follow the session's own rule.
        if clash.any() and not self.is_remote:
            settled = self.session.labels[region.slices]
            clash &= np.isin(settled, [entry.id for entry in shown])
            part[clash] = settled[clash]
        return part

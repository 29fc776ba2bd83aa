"""A session as napari needs it: edits in order, one after the other, away from the window; after each, what changed. No
Qt, no napari.

The session is a ``Session`` of this process or a ``RemoteSession`` of a server: their calls are the same. Masks are
kept packed and put together into one label map, of which only the changed part is written anew. Calls return at once;
``Runner`` says where the work is done. Not here: layers (``layers.py``). Read that next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from samed3d.apps.client import RemoteError
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region, Triple, as_triple, bounding_region
from samed3d.prompts import Box, Lasso, Mask, PackedMask, Point, Prompt, Scribble, prompt_from_json

logger = logging.getLogger(__name__)

MOST_OBJECTS = 255
_CONFLICT = 409
_NOWHERE = Region((0, 0, 0), (0, 0, 0))
T = TypeVar("T")
Runner = Callable[[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None]], None]
"""Does a job, in the order given, then says in the caller's thread that it is done or has failed."""


@dataclass(frozen=True)
class Entry:
    """An object as it is shown; ``prompts`` by number, with positions in ijk."""

    id: int
    name: str
    colour: str
    visible: bool
    locked: bool
    voxels: int
    prompts: dict[int, Prompt] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What an edit changed.

    Attributes:
        objects: All objects, by id.
        current: The one prompted last; 0 before any.
        can_undo: Whether there is an edit to take back.
        can_redo: Whether there is one to do again.
        region: Of the label map, zyx; empty where no voxel changed.
        labels: uint8, of the region's shape.
        prompt_id: That was added, moved or removed; 0 where none was.
        seconds: That the edit took.
        note: For the user, where there is something to say.
    """

    objects: tuple[Entry, ...]
    current: int
    can_undo: bool
    can_redo: bool
    region: Region
    labels: NDArray[np.uint8]
    prompt_id: int = 0
    seconds: float = 0.0
    note: str = ""


def run_now(job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
    """The runner that does a job at once, in the same thread."""
    try:
        result = job()
    except Exception as error:
        failed(error)
        return
    done(result)


class Controller:
    """One session and those who look at it.

    Attributes:
        session: ``Session`` or ``RemoteSession``; used by jobs only.
        shape_zyx: Of the image.
        labels: uint8 (D, H, W), the objects that are visible, by id, as after the last job whose end was told.
        state: As after that job.
        on_change: Called with each change.
        on_error: Called with one line for the user.
    """

    def __init__(self, session: Any, runner: Runner = run_now) -> None:
        """Take over a session that is open; ``start`` reads what it holds."""
        self.session, self._runner = session, runner
        grid = getattr(getattr(session, "volume", None), "grid", None)
        self.shape_zyx: IntTriple = tuple(session.size_ijk[::-1]) if grid is None else grid.shape_zyx
        self._ijk_from_ras = np.linalg.inv(session.affine_ras if grid is None else grid.affine_ras)
        self.labels = np.zeros(self.shape_zyx, np.uint8)
        self.state = Change((), 0, False, False, _NOWHERE, np.zeros((0, 0, 0), np.uint8))
        self.on_change: list[Callable[[Change], None]] = []
        self.on_error: list[Callable[[str], None]] = []
        self._masks: dict[int, PackedMask] = {}
        self._table: dict[int, Entry] = {}  # as after the last job that was done

    @property
    def is_remote(self) -> bool:
        """Whether the session is on a server."""
        return not hasattr(self.session, "volume")

    def start(self) -> None:
        """Show what the session holds already."""
        self._do(self._reread)

    def add(self, prompt: Prompt, object_id: int, then: Callable[[int], None] | None = None) -> None:
        """Add a prompt; ``then`` is told its number, or 0 where it was refused."""
        self._do(lambda: self._edit(lambda: self.session.add(prompt, object_id)), then)

    def move(self, prompt_id: int, to: Prompt, then: Callable[[int], None] | None = None) -> None:
        """Replace a prompt; ``then`` as for ``add``."""
        self._do(lambda: self._edit(lambda: self.session.move(prompt_id, to)), then)

    def remove(self, prompt_id: int, then: Callable[[int], None] | None = None) -> None:
        """Take a prompt out; ``then`` as for ``add``."""
        self._do(lambda: self._edit(lambda: self.session.remove(prompt_id)), then)

    def undo(self) -> None:
        """Take back the last edit; nothing where there is none."""
        self._do(lambda: self._edit(self.session.undo if self.session.can_undo else None))

    def redo(self) -> None:
        """Do again what was undone last; nothing where there is nothing."""
        self._do(lambda: self._edit(self.session.redo if self.session.can_redo else None))

    def new_object(self, name: str | None = None) -> None:
        """Make an object without prompts; it becomes the current one."""
        self._do(lambda: self._edit(lambda: self._new(name)))

    def edit_object(self, object_id: int, **changes: Any) -> None:
        """Change ``name``, ``colour``, ``visible`` or ``locked``."""
        self._do(lambda: self._edit(lambda: self.session.edit_object(object_id, **changes)))

    def remove_object(self, object_id: int) -> None:
        """Take an object out with all its prompts."""
        self._do(lambda: self._edit(lambda: self.session.remove_object(object_id)))

    def painted(self, painted: NDArray) -> None:
        """Take a label map that was edited by hand: each object whose voxels changed starts anew from what it is now.

        A voxel that was painted belongs to the label that it was given and to no other visible object that is not
        locked.

        Args:
            painted: (D, H, W) of whole numbers; it is compared with ``labels`` and not kept.
        """
        region = bounding_region(painted != self.labels)
        if region.is_empty:
            return
        before, after = self.labels[region.slices], np.asarray(painted)[region.slices].copy()
        where = before != after
        touched = {int(number) for number in np.union1d(before[where], after[where]) if number}
        touched |= {entry.id for entry in self.state.objects if entry.visible and not entry.locked}
        for number in sorted(touched):
            old = self._masks[number].on(region) if number in self._masks else np.zeros(region.shape_zyx, bool)
            new = np.where(where, after == number, old)
            if (new != old).any():
                mask = self._masks[number].full() if number in self._masks else np.zeros(self.shape_zyx, bool)
                mask[region.slices] = new
                self.start_from(mask, number)

    def start_from(self, mask: NDArray, object_id: int) -> None:
        """Let an object start anew from a mask, (D, H, W)."""
        self._do(lambda: self._start_from(object_id, mask))

    def suggest_click(self, then: Callable[[Triple, bool], None]) -> None:
        """Tell ``then`` where the model is least certain, zyx, and whether it would say that the place belongs to the
        object.
        """

        def found(point: Point) -> None:
            ijk = self._in_voxels(point)
            assert isinstance(ijk, Point)
            then(as_triple(ijk.at[::-1]), point.positive)

        self._runner(self.session.suggest_click, found, self._failed)

    def save(self, path: str, format: str, then: Callable[[], None] | None = None) -> None:
        """Write the masks to a file; a name that ends in ``.json`` keeps the whole session (of this process only).

        Args:
            path: The file.
            format: One of ``inference.mask_files.FORMATS``; not used for ``.json``.
            then: Called when it is written.
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
        """Let go of the session; on a server it stays."""
        self._runner(self.session.close, lambda _: None, self._failed)

    def _do(self, job: Callable[[], Change], then: Callable[[int], None] | None = None) -> None:
        def done(change: Change) -> None:
            self.labels[change.region.slices] = change.labels
            self.state = change
            if then is not None:
                then(change.prompt_id)
            for listener in self.on_change:
                listener(change)

        def failed(error: Exception) -> None:
            if then is not None:
                then(0)
            self._failed(error)
            for listener in self.on_change:  # what the user drew and was refused must not stay
                listener(replace(self.state, region=_NOWHERE, labels=np.zeros((0, 0, 0), np.uint8), prompt_id=0))

        self._runner(job, done, failed)

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, InputError | RemoteError):
            logger.error("in the napari plugin", exc_info=error)
        message = (
            str(error)
            if isinstance(error, InputError | RemoteError)
            else f"this is our fault: {type(error).__name__}: {error}"
        )
        for listener in self.on_error:
            listener(message)

    # What follows runs where the runner does its jobs.

    def _edit(self, call: Callable[[], Any] | None) -> Change:
        try:
            update = call() if call is not None else None
        except RemoteError as error:
            if error.status != _CONFLICT:
                raise
            self.session.refresh()
            return replace(self._reread(), note="the session was changed elsewhere; this is how it stands, do it again")
        changed = _NOWHERE
        if update is not None and not update.region.is_empty:
            changed = update.region
            self._patch(update.object_id, update.region, update.mask)
        return self._seen(changed, getattr(update, "prompt_id", 0), getattr(update, "seconds", 0.0))

    def _start_from(self, object_id: int, mask: NDArray) -> Change:
        if not mask.any():
            raise InputError(f"object {object_id} would have no voxel left; remove the object instead")
        return self._edit(lambda: self.session.add(Mask(mask), object_id))

    def _new(self, name: str | None) -> None:
        if len(self.session.objects()) >= MOST_OBJECTS:
            raise InputError(f"there can be at most {MOST_OBJECTS} objects here; start another session for more")
        self.session.new_object(name)

    def _patch(self, object_id: int, region: Region, mask: NDArray) -> None:
        old = self._masks.get(object_id)
        whole = region if old is None else region.union(old.region)
        part = np.zeros(whole.shape_zyx, bool) if old is None else old.on(whole)
        part[region.slices_in(whole)] = mask != 0
        self._masks[object_id] = PackedMask.of_part(part, whole, self.shape_zyx)

    def _reread(self) -> Change:
        self._masks = {entry.id: PackedMask.of(self.session.mask_of(entry.id)) for entry in self._entries()}
        return self._seen(Region((0, 0, 0), self.shape_zyx))

    def _seen(self, changed: Region, prompt_id: int = 0, seconds: float = 0.0) -> Change:
        """What there is to see now, where ``changed`` and wherever the table moved an object in or out of sight."""
        table = {entry.id: entry for entry in self._entries()}
        for number in table.keys() | self._table.keys():
            old, new = self._table.get(number), table.get(number)
            if old is None or new is None or (old.visible, old.locked) != (new.visible, new.locked):
                mask = self._masks.get(number)
                changed = changed if mask is None else changed.union(mask.region)
            if new is None:
                self._masks.pop(number, None)
        self._table = table
        s = self.session
        return Change(
            tuple(table.values()),
            s.current,
            s.can_undo,
            s.can_redo,
            changed,
            self._composed(changed),
            prompt_id,
            seconds,
        )

    def _composed(self, region: Region) -> NDArray[np.uint8]:
        """The label map of the visible objects in a region: a locked object wins, then the more certain one."""
        part = np.zeros(region.shape_zyx, np.uint8)
        clash = np.zeros(region.shape_zyx, bool)
        shown = [entry for entry in self._table.values() if entry.visible and entry.id in self._masks]
        for entry in sorted(shown, key=lambda e: (not e.locked, e.id)):
            mask = self._masks[entry.id].on(region)
            clash |= mask & (part != 0)
            part[mask & (part == 0)] = entry.id
        # A server's label map is not asked for: there the lower id is shown, and files are written by the session's own
        # rule.
        if clash.any() and not self.is_remote:
            settled = self.session.labels[region.slices]
            clash &= np.isin(settled, [entry.id for entry in shown])
            part[clash] = settled[clash]
        return part

    def _entries(self) -> Iterable[Entry]:
        for item in self.session.objects():
            if item.id > MOST_OBJECTS:
                raise InputError(
                    f"object ids must be 1 to {MOST_OBJECTS} here, got {item.id}; open this session in another program"
                )
            if self.is_remote:
                # A server says of a mask only that there is one; it is not drawn anyway.
                given = {int(body["id"]): prompt_from_json(body) for body in item.prompts if body["type"] != "mask"}
            else:
                given = item.numbered
            prompts = {number: self._in_voxels(prompt) for number, prompt in given.items()}
            yield Entry(item.id, item.name, item.colour, item.visible, item.locked, item.voxels, prompts)

    def _in_voxels(self, prompt: Prompt) -> Prompt:
        """The same prompt with its positions in ijk."""
        if prompt.space == "ijk":
            return prompt
        if isinstance(prompt, Point):
            return replace(prompt, at=self._ijk(prompt.at), space="ijk")
        if isinstance(prompt, Scribble):
            return replace(prompt, path=tuple(self._ijk(at) for at in prompt.path), space="ijk")
        if isinstance(prompt, Lasso):
            return replace(prompt, outline=tuple(self._ijk(at) for at in prompt.outline), space="ijk")
        assert isinstance(prompt, Box)
        ends = np.array(
            [self._ijk((x, y, z)) for x in _ends(prompt, 0) for y in _ends(prompt, 1) for z in _ends(prompt, 2)]
        )
        return Box(as_triple(ends.min(0)), as_triple(ends.max(0)))

    def _ijk(self, ras: Triple) -> Triple:
        return as_triple((self._ijk_from_ras @ np.array([*ras, 1.0]))[:3])


def _ends(box: Box, axis: int) -> tuple[float, float]:
    return (box.min[axis], box.max[axis])

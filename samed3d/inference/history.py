"""The edits of a session, the state of all objects after each, and undo and redo.

An edit is a small record that a journal can hold; the same edits on the same volume and model give the same masks. A
state never changes: every edit makes a new one. Read ``model_prompts.py`` next.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from samed3d.drawing import OBJECT_COLOURS, colour_of
from samed3d.errors import InputError, whole_number
from samed3d.geometry import EMPTY_REGION, IntTriple, bounding_region
from samed3d.inference.model_prompts import deepest_voxel
from samed3d.inference.prediction import OtherObjects, PromptHistory, PromptStep, empty_mask
from samed3d.prompts import MaskUpdate, ObjectPrompts, PackedMask, Prompt, checked_code, checked_flag, checked_name

_LARGEST = {"object_id": 2**16 - 1, "prompt_id": 2**31 - 1}


@dataclass
class SessionObject(ObjectPrompts):
    """A copy of an object for callers; changing it changes nothing in the session."""

    prompt_ids: list[int] = field(default_factory=list)  # the numbers of ``prompts``, in the same order
    colour: str = OBJECT_COLOURS[0]  # #rrggbb
    visible: bool = True  # whether a viewer shows it
    locked: bool = False  # whether it is protected from changes
    voxels: int = 0  # of its mask

    @property
    def numbered(self) -> dict[int, Prompt]:
        """The prompts by their numbers."""
        return dict(zip(self.prompt_ids, self.prompts, strict=True))


@dataclass(frozen=True, eq=False)
class ObjectState:
    """One object: its row of the object table and its newest prompt step (None before the first)."""

    id: int
    name: str
    colour: str
    visible: bool = True
    locked: bool = False
    step: PromptStep | None = None
    code: str = ""

    @property
    def chain(self) -> list[PromptStep]:
        """The steps, oldest first."""
        return [] if self.step is None else self.step.chain

    @property
    def prompts(self) -> dict[int, Prompt]:
        """The prompts as given, by their numbers, oldest first."""
        return {step.id: step.prompt for step in self.chain if step.prompt is not None}

    def copy(self) -> SessionObject:
        """The object for callers."""
        prompts = self.prompts
        voxels = 0 if self.step is None else self.step.mask.voxels
        row = (self.colour, self.visible, self.locked, voxels)
        return SessionObject(self.id, self.name, list(prompts.values()), self.code, list(prompts), *row)


@dataclass(frozen=True, eq=False)
class SessionState:
    """All objects, by id, at one moment."""

    objects: Mapping[int, ObjectState] = field(default_factory=dict)
    current: int = 0  # the object that was prompted or made last; 0 before any
    others_are_negative: bool = False  # whether the other objects are background for a prediction

    def object(self, object_id: int) -> ObjectState:
        """An object by its id.

        Raises:
            InputError: if there is none.
        """
        if whole_number(object_id, "object id") not in self.objects:
            known = ", ".join(map(str, sorted(self.objects))) or "none"
            raise InputError(f"object must be one of the session's ({known}), got {object_id!r}")
        return self.objects[object_id]

    def object_of_prompt(self, prompt_id: int) -> ObjectState:
        """The object that a prompt belongs to.

        Raises:
            InputError: if there is no such prompt.
        """
        for entry in self.objects.values():
            if whole_number(prompt_id, "prompt id", _LARGEST["prompt_id"]) in entry.prompts:
                return entry
        raise InputError(f"prompt must be one of the session's, got number {prompt_id!r}; objects() lists them")

    def mask(self, object_id: int, shape_zyx: IntTriple) -> PackedMask:
        """An object's mask on the canonical volume; empty if there is no such object."""
        entry = self.objects.get(object_id)
        return empty_mask(shape_zyx) if entry is None or entry.step is None else entry.step.mask

    def with_object(self, entry: ObjectState) -> SessionState:
        """The state with one object added or replaced, which becomes the current one."""
        return replace(self, objects={**self.objects, entry.id: entry}, current=entry.id)

    def others(self, object_id: int, shape_zyx: IntTriple) -> OtherObjects | None:
        """The other objects as background of a prediction; None unless ``others_are_negative`` and there are any."""
        steps = [entry.step for entry in self.objects.values() if entry.id != object_id]
        masks = [step.mask for step in steps if step is not None and not step.mask.region.is_empty]
        if not self.others_are_negative or not masks:
            return None
        region = masks[0].region
        for mask in masks[1:]:
            region = region.union(mask.region)
        together = np.any([mask.on(region) for mask in masks], axis=0)
        points = tuple(deepest_voxel(mask) for mask in masks)
        return OtherObjects(PackedMask.of_part(together, region, shape_zyx), points)


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """One change of a session; ``object_id`` and ``prompt_id`` are 0 in edits that name none. Fields of another
    type are refused (``InputError``), whether a caller or a journal gave them.
    """

    object_id: int = 0
    prompt_id: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, kind = getattr(self, entry.name), str(entry.type)
            if value is entry.default:
                continue
            if entry.name in _LARGEST:
                value = whole_number(value, entry.name.replace("_", " "), _LARGEST[entry.name])
            elif kind.startswith("bool"):
                value = checked_flag(value, entry.name)
            elif entry.name == "name":
                value = checked_name(value)
            object.__setattr__(self, entry.name, value)

    @abstractmethod
    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """The state after the edit.

        Raises:
            InputError: if there is no such object or prompt, the object is locked, or the prompt cannot be used.
        """


@dataclass(frozen=True, kw_only=True)
class AddPrompt(Edit):
    """Add a prompt to an object, new or not; ``name`` names or renames it, ``code`` codes it."""

    object_id: int
    prompt_id: int
    prompt: Prompt
    name: str | None = None
    code: str | None = None
    predict: bool = True

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        entry = state.objects.get(self.object_id) or _new_object(self.object_id)
        others = state.others(entry.id, prompts.predictor.shape_zyx)
        step = prompts.extend(_unlocked(entry).step, self.prompt_id, self.prompt, self.predict, others)
        code = entry.code if self.code is None else self.code
        return state.with_object(replace(entry, name=self.name or entry.name, code=code, step=step))


@dataclass(frozen=True, kw_only=True)
class Predict(Edit):
    """Predict an object again without a new prompt."""

    object_id: int

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        entry = _unlocked(state.object(self.object_id))
        if not any(step.model_prompts is not None and step.model_prompts.positive for step in entry.chain):
            raise InputError(f"object {entry.id} needs a positive point or a box before it can be predicted")
        others = state.others(entry.id, prompts.predictor.shape_zyx)
        return state.with_object(replace(entry, step=prompts.extend(entry.step, 0, None, True, others)))


@dataclass(frozen=True, kw_only=True)
class MovePrompt(Edit):
    """Replace a prompt and predict its object's later steps again."""

    prompt_id: int
    prompt: Prompt | None

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        entry = _unlocked(state.object_of_prompt(self.prompt_id))
        return state.with_object(replace(entry, step=prompts.rebuild(entry.chain, self.prompt_id, self.prompt)))


@dataclass(frozen=True, kw_only=True)
class RemovePrompt(MovePrompt):
    """Remove a prompt and predict its object's later steps again."""

    prompt: None = None


@dataclass(frozen=True, kw_only=True)
class EditObject(Edit):
    """Change an object's row of the object table, or add an object without prompts; what is None stays."""

    object_id: int
    name: str | None = None
    colour: str | None = None
    visible: bool | None = None
    locked: bool | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.colour is not None and not re.fullmatch(r"#[0-9a-fA-F]{6}", str(self.colour)):
            raise InputError(f"colour must be of the form #rrggbb, got {self.colour!r}")
        object.__setattr__(self, "colour", self.colour and self.colour.lower())
        checked_code(self.code or "", f"object {self.object_id}")

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        entry = state.objects.get(self.object_id)
        given = {key: getattr(self, key) for key in ("name", "colour", "visible", "locked", "code")}
        changes = {key: value for key, value in given.items() if value is not None}
        after = state.with_object(replace(entry or _new_object(self.object_id), **changes))
        return after if entry is None else replace(after, current=state.current)


@dataclass(frozen=True, kw_only=True)
class RemoveObject(Edit):
    """Remove an object with all its prompts."""

    object_id: int

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        removed = _unlocked(state.object(self.object_id)).id
        objects = {number: entry for number, entry in state.objects.items() if number != removed}
        current = state.current if state.current != removed else max(objects, default=0)
        return replace(state, objects=objects, current=current)


@dataclass(frozen=True, kw_only=True)
class SetRule(Edit):
    """Decide whether the other objects are background for predictions from now on."""

    others_are_negative: bool

    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """See ``Edit``."""
        return replace(state, others_are_negative=self.others_are_negative)


class _LogEntry(Edit):
    def apply(self, state: SessionState, prompts: PromptHistory) -> SessionState:
        """Nothing: the log itself steps back or forth."""
        return state


class Undo(_LogEntry):
    """Take back the last edit; an entry of the log only."""


class Redo(_LogEntry):
    """Repeat the edit that was undone last; an entry of the log only."""


def _new_object(object_id: int) -> ObjectState:
    return ObjectState(object_id, f"object {object_id}", colour_of(object_id))


def _unlocked(entry: ObjectState) -> ObjectState:
    if entry.locked:
        raise InputError(f"object {entry.id} ({entry.name}) is locked; unlock it first")
    return entry


class EditHistory:
    """All edits with the state after each, the undone ones, and the number of the next prompt.

    The state after an undone edit is None if it has not been computed yet (after loading). ``record``, if set, is
    called with every edit, undo and redo before it counts.
    """

    def __init__(self, prompts: PromptHistory) -> None:
        self.done: list[tuple[Edit, SessionState]] = []
        self.undone: list[tuple[Edit, SessionState | None]] = []
        self.next_prompt = 1
        self.record: Callable[[Edit], None] | None = None
        self.prompts = prompts

    @property
    def state(self) -> SessionState:
        """The present state."""
        return self.done[-1][1] if self.done else SessionState()

    def commit(self, edit: Edit) -> MaskUpdate:
        """Apply a new edit and record it; undone edits cannot be repeated any more.

        Raises:
            InputError: as ``Edit.apply``; nothing has changed then.
        """
        began, before = time.perf_counter(), self.state
        after = edit.apply(before, self.prompts)
        self._recorded(edit)
        self.done.append((edit, after))
        self.undone.clear()
        self.next_prompt = max(self.next_prompt, edit.prompt_id + 1)
        return self._update(edit, before, began)

    def undo(self) -> MaskUpdate | None:
        """Return to the state before the last edit; None if there is none."""
        began, before = time.perf_counter(), self.state
        if not self.done:
            return None
        self._recorded(Undo())
        self.undone.append(self.done.pop())
        return self._update(self.undone[-1][0], before, began)

    def redo(self) -> MaskUpdate | None:
        """Repeat the edit that was undone last; None if there is none."""
        began, before = time.perf_counter(), self.state
        if not self.undone:
            return None
        edit, after = self.undone[-1]
        after = edit.apply(before, self.prompts) if after is None else after
        self._recorded(Redo())
        self.undone.pop()
        self.done.append((edit, after))
        return self._update(edit, before, began)

    def replay(self, log: Sequence[Edit]) -> None:
        """Apply a log of edits, undos and redos; what is undone at its end is not predicted until it is repeated."""
        kept: list[Edit] = []
        undone: list[Edit] = []
        for edit in log:
            if isinstance(edit, Undo):
                undone += [kept.pop()] if kept else []
            elif isinstance(edit, Redo):
                kept += [undone.pop()] if undone else []
            else:
                kept.append(edit)
                undone.clear()
        for edit in kept:
            self.done.append((edit, edit.apply(self.state, self.prompts)))
        self.undone = [(edit, None) for edit in undone]
        self.next_prompt = max([self.next_prompt, *(edit.prompt_id + 1 for edit in log)])

    def log(self) -> list[Edit]:
        """The shortest log that leads here, with what can be repeated."""
        undone = [edit for edit, _ in reversed(self.undone)]
        return [*(edit for edit, _ in self.done), *undone, *[Undo()] * len(undone)]

    def _recorded(self, edit: Edit) -> None:
        if self.record is not None:
            self.record(edit)

    def _update(self, edit: Edit, before: SessionState, began: float) -> MaskUpdate:
        """How the mask of the edit's object differs from an earlier state."""
        holders = [o.id for s in (before, self.state) for o in s.objects.values() if edit.prompt_id in o.prompts]
        object_id = edit.object_id or next(iter(holders), self.state.current)
        view = self.prompts.volume.view
        old, new = before.mask(object_id, view.shape_zyx), self.state.mask(object_id, view.shape_zyx)
        region = old.region.union(new.region)
        change = EMPTY_REGION
        for part in region.slabs():
            changed = bounding_region(new.on(part) ^ old.on(part))
            change = change if changed.is_empty else change.union(changed.shifted(part.start_zyx))
        mask = np.ascontiguousarray(view.to_stored(new.on(change).view(np.uint8)))
        change = change if change.is_empty else view.region_to_stored(change)
        return MaskUpdate(change, mask, time.perf_counter() - began, object_id, edit.prompt_id)

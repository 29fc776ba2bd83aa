"""What can be done to a scene, one function per edit, and the history of edits with unlimited undo and redo.

An edit is a small record (``{"do": "add", ...}``) that the journal can write and read; the same edits on the same
volume and model give the same masks. Not here: writing them down (``journal.py``). Read ``session.py`` next,
``steps.py`` for how prompts become masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from samed3d.drawing import colour_of
from samed3d.errors import InputError
from samed3d.inference.scene import Scene, Track
from samed3d.inference.steps import Chains, Others, Step
from samed3d.inference.strokes import deepest_voxel
from samed3d.prompts import PackedMask, prompt_from_json, prompt_to_json

Edit = dict[str, Any]
UNDO, REDO = "undo", "redo"


def applied(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    """The scene after an edit; the one given is left as it is.

    Raises:
        InputError: if the edit cannot be done: no such object or prompt, a locked object, a prompt that cannot be used.
    """
    return _DOING[edit["do"]](scene, edit, chains)


def _add(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    track = scene.tracks.get(edit["object"])
    if track is None:
        track = Track(edit["object"], edit.get("name") or f"object {edit['object']}", colour_of(edit["object"]))
    _unlocked(track)
    others = _others(scene, track.id, chains)
    step = chains.extended(track.step, edit["id"], edit["prompt"], edit.get("look", True), others)
    return _with(scene, replace(track, step=step))


def _look(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    track = _unlocked(_known(scene, edit["object"]))
    if track.step is None or not any(s.said is not None and s.said.positive for s in track.chain):
        raise InputError(f"object {track.id} needs a positive point or a box before it can be predicted")
    return _with(
        scene, replace(track, step=chains.extended(track.step, 0, None, True, _others(scene, track.id, chains)))
    )


def _remove(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    track = _unlocked(_holding(scene, edit["id"]))
    return _with(scene, replace(track, step=chains.rebuilt(track.chain, edit["id"], None)))


def _move(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    track = _unlocked(_holding(scene, edit["id"]))
    return _with(scene, replace(track, step=chains.rebuilt(track.chain, edit["id"], edit["prompt"])))


def _table(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    number = edit["object"]
    track = scene.tracks.get(number) or Track(number, f"object {number}", colour_of(number))
    changes = {key: edit[key] for key in ("name", "colour", "visible", "locked") if key in edit}
    current = number if number not in scene.tracks else scene.current
    return replace(_with(scene, replace(track, **changes)), current=current)


def _drop(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    track = _unlocked(_known(scene, edit["object"]))
    left = {number: t for number, t in scene.tracks.items() if number != track.id}
    return replace(scene, tracks=left, current=scene.current if scene.current != track.id else max(left, default=0))


def _rule(scene: Scene, edit: Edit, chains: Chains) -> Scene:
    return replace(scene, others_are_negative=bool(edit["others_are_negative"]))


_DOING = {"add": _add, "look": _look, "remove": _remove, "move": _move, "object": _table, "drop": _drop, "rule": _rule}


def _with(scene: Scene, track: Track) -> Scene:
    return replace(scene, tracks={**scene.tracks, track.id: track}, current=track.id)


def _known(scene: Scene, object_id: int) -> Track:
    track = scene.tracks.get(object_id)
    if track is None:
        known = ", ".join(map(str, sorted(scene.tracks))) or "none"
        raise InputError(f"object must be one of the session's ({known}), got {object_id!r}")
    return track


def _holding(scene: Scene, prompt_id: int) -> Track:
    track = scene.holding(prompt_id)
    if track is None:
        raise InputError(f"prompt must be one of the session's, got number {prompt_id!r}; objects() lists them")
    return track


def _unlocked(track: Track) -> Track:
    if track.locked:
        raise InputError(f"object {track.id} ({track.name}) is locked; unlock it first")
    return track


def _others(scene: Scene, object_id: int, chains: Chains) -> Others | None:
    """The other objects as background, if that is the rule."""
    masks = [
        t.step.mask
        for t in scene.tracks.values()
        if t.id != object_id and t.step is not None and not t.step.mask.region.is_empty
    ]
    if not scene.others_are_negative or not masks:
        return None
    region = masks[0].region
    for mask in masks[1:]:
        region = region.union(mask.region)
    together = masks[0].on(region)
    for mask in masks[1:]:
        together |= mask.on(region)
    shape = chains.predictor.shape_zyx
    return Others(PackedMask.of_part(together, region, shape), tuple(deepest_voxel(mask) for mask in masks))


@dataclass
class History:
    """Every edit that counts and every one that was undone. A scene that was not computed yet (after loading) is None.

    Attributes:
        start: Before the first edit.
        done: Edits with the scene after each, oldest first.
        undone: Edits to redo with the scene after each, the next one last.
    """

    start: Scene = field(default_factory=Scene)
    done: list[tuple[Edit, Scene]] = field(default_factory=list)
    undone: list[tuple[Edit, Scene | None]] = field(default_factory=list)

    @property
    def scene(self) -> Scene:
        """As things stand."""
        return self.done[-1][1] if self.done else self.start

    def push(self, edit: Edit, scene: Scene) -> None:
        """Take note of an edit that was done; what had been undone is gone."""
        self.done.append((edit, scene))
        self.undone.clear()

    def undo(self) -> Edit | None:
        """Go back before the last edit and return it; None where there is none."""
        if not self.done:
            return None
        self.undone.append(self.done.pop())
        return self.undone[-1][0]

    def redo(self, chains: Chains) -> Edit | None:
        """Do the edit again that was undone last and return it; None where there is none."""
        if not self.undone:
            return None
        edit, scene = self.undone[-1]
        scene = applied(self.scene, edit, chains) if scene is None else scene
        self.undone.pop()
        self.done.append((edit, scene))
        return edit

    def replay(self, log: Sequence[Edit], chains: Chains) -> None:
        """Do a log of edits, undos and redos; what ends undone is not predicted until it is redone."""
        kept, waiting = settled(log)
        for edit in kept:
            self.done.append((edit, applied(self.scene, edit, chains)))
        self.undone = [(edit, None) for edit in waiting]

    def log(self) -> list[Edit]:
        """The edits and undos that lead here."""
        return [
            *(edit for edit, _ in self.done),
            *(edit for edit, _ in reversed(self.undone)),
            *({"do": UNDO} for _ in self.undone),
        ]


def settled(log: Sequence[Edit]) -> tuple[list[Edit], list[Edit]]:
    """A log without its detours: the edits that count, and those that a redo would bring back, the next one last."""
    kept: list[Edit] = []
    waiting: list[Edit] = []
    for edit in log:
        if edit["do"] == UNDO:
            if kept:
                waiting.append(kept.pop())
        elif edit["do"] == REDO:
            if waiting:
                kept.append(waiting.pop())
        else:
            kept.append(edit)
            waiting.clear()
    return kept, waiting


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """An edit for the journal."""
    if "prompt" not in edit:
        return edit
    return {**edit, "prompt": {"space": edit["prompt"].space, **prompt_to_json(edit["prompt"])}}


def edit_from_json(body: Any, where: str) -> Edit:
    """The inverse of ``edit_to_json``.

    Raises:
        InputError: if it is no edit.
    """
    if not isinstance(body, dict) or body.get("do") not in (*_DOING, UNDO, REDO):
        raise InputError(f"{where}: not an edit of a session: {str(body)[:80]!r}")
    needed = {
        "add": ("object", "id", "prompt"),
        "move": ("id", "prompt"),
        "remove": ("id",),
        "rule": ("others_are_negative",),
    }
    needed |= {"look": ("object",), "object": ("object",), "drop": ("object",)}
    if missing := [key for key in needed.get(body["do"], ()) if key not in body]:
        raise InputError(f"{where}: an edit {body['do']!r} needs {', '.join(missing)}")
    return {**body, "prompt": prompt_from_json(body["prompt"], where=where)} if "prompt" in body else dict(body)


__all__ = ["REDO", "UNDO", "Edit", "History", "Step", "applied", "edit_from_json", "edit_to_json", "settled"]

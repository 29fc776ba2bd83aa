"""All objects of a volume at one moment, as undo and redo know them: nothing here changes, every edit makes a new
scene.

Also what callers are shown of an object, and the label map of all objects. Read ``edits.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samed3d.drawing import OBJECT_COLOURS
from samed3d.geometry import Region
from samed3d.inference.predictor import Canvas
from samed3d.inference.steps import Step, nothing
from samed3d.prompts import ObjectPrompts, PackedMask, Prompt


@dataclass(frozen=True, eq=False)
class Track:
    """One object: its place in the table and its chain of prompts (``step`` is the newest, None before the first)."""

    id: int
    name: str
    colour: str
    visible: bool = True
    locked: bool = False
    step: Step | None = None

    @property
    def chain(self) -> list[Step]:
        """The steps, oldest first."""
        return [] if self.step is None else self.step.chain


@dataclass(frozen=True, eq=False)
class Scene:
    """What undo brings back.

    Attributes:
        tracks: The objects by id; never changed in place.
        current: The object that was prompted or made last; 0 before any.
        others_are_negative: Whether the other objects are background for a prediction.
    """

    tracks: Mapping[int, Track] = field(default_factory=dict)
    current: int = 0
    others_are_negative: bool = False

    def mask(self, object_id: int, shape_zyx: tuple[int, int, int]) -> PackedMask:
        """An object's mask on the canonical volume; empty where there is no such object."""
        track = self.tracks.get(object_id)
        return nothing(shape_zyx) if track is None or track.step is None else track.step.mask

    def holding(self, prompt_id: int) -> Track | None:
        """The object that a prompt belongs to."""
        return next(
            (t for t in self.tracks.values() if any(s.id == prompt_id for s in t.chain if s.prompt is not None)), None
        )


@dataclass
class SessionObject(ObjectPrompts):
    """An object as a session shows it; changing it changes nothing in the session.

    Attributes:
        prompt_ids: The numbers of ``prompts``, in the same order.
        colour: ``#rrggbb``.
        visible: Whether a viewer shows it.
        locked: Whether it is protected from changes.
        voxels: In its mask.
    """

    prompt_ids: list[int] = field(default_factory=list)
    colour: str = OBJECT_COLOURS[0]
    visible: bool = True
    locked: bool = False
    voxels: int = 0

    @property
    def numbered(self) -> dict[int, Prompt]:
        """The prompts by their numbers."""
        return dict(zip(self.prompt_ids, self.prompts, strict=True))


def shown(track: Track) -> SessionObject:
    """An object for callers."""
    given = [(step.id, step.prompt) for step in track.chain if step.prompt is not None]
    return SessionObject(
        id=track.id,
        name=track.name,
        prompts=[prompt for _, prompt in given],
        prompt_ids=[number for number, _ in given],
        colour=track.colour,
        visible=track.visible,
        locked=track.locked,
        voxels=0 if track.step is None else int(np.count_nonzero(track.step.mask.inside())),
    )


def label_map(
    scene: Scene, shape_zyx: tuple[int, int, int], canvas_of: Callable[[Track], Canvas]
) -> NDArray[np.unsignedinteger]:
    """All objects as one map of their ids on the canonical volume.

    Where objects overlap a locked one wins over others, then the more certain one (the higher logit), then the lower
    id.

    Args:
        scene: The objects.
        shape_zyx: Of the canonical volume.
        canvas_of: An object's logits; asked for only where objects overlap.
    """
    highest = max(scene.tracks, default=0)
    labels = np.zeros(shape_zyx, dtype=np.uint8 if highest < 256 else np.uint16 if highest < 65536 else np.uint32)
    painted: list[Track] = []
    for track in sorted(scene.tracks.values(), key=lambda t: (not t.locked, t.id)):
        if track.step is None or track.step.mask.region.is_empty:
            continue
        region, mask = track.step.mask.region, track.step.mask.inside()
        part = labels[region.slices]
        clash = mask & (part != 0)
        part[mask & ~clash] = track.id
        if clash.any() and not track.locked:
            protected = [t.id for t in painted if t.locked]
            _settle(part, clash & ~np.isin(part, protected), region, track, {t.id: t for t in painted}, canvas_of)
        elif clash.any():
            _settle(part, clash, region, track, {t.id: t for t in painted}, canvas_of)
        painted.append(track)
    return labels


def _settle(
    part: NDArray[np.unsignedinteger],
    clash: NDArray[np.bool_],
    region: Region,
    track: Track,
    painted: dict[int, Track],
    canvas_of: Callable[[Track], Canvas],
) -> None:
    """Give the voxels of ``clash`` to ``track`` where it is more certain than the object that holds them."""
    own = _at(canvas_of(track), clash, region)
    holders = part[clash]
    wins = np.zeros(holders.shape, dtype=bool)
    for holder in np.unique(holders):
        held = holders == holder
        wins[held] = own[held] > _at(canvas_of(painted[int(holder)]), clash, region)[held]
    holders[wins] = track.id
    part[clash] = holders


def _at(canvas: Canvas, where: NDArray[np.bool_], region: Region) -> NDArray[np.float32]:
    """A canvas's logits at some voxels of a region, which it holds where that matters; very low elsewhere."""
    index = np.argwhere(where) + np.array(region.start_zyx) - np.array(canvas.region.start_zyx)
    inside = ((index >= 0) & (index < np.array(canvas.region.shape_zyx))).all(1)
    values = np.full(len(index), -np.inf, dtype=np.float32)
    values[inside] = canvas.logits.numpy()[tuple(index[inside].T)]
    return values

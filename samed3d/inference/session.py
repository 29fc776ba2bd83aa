"""A session: one volume, one model, any number of objects, prompts in and masks on the image's own grid out.

The prompts are the source of truth, the masks follow from them: any prompt can be moved or taken out, everything can be
undone and redone, and with a journal all of it survives a crash. Not here: what can be read from a session
(``results.py``), what an edit does (``edits.py``), what a prompt becomes (``strokes.py``), where the model looks
(``placement.py``), files (``journal.py``, ``saving.py``). One thread at a time. Read ``edits.py`` next; the contract
with models is ``models/base.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from samed3d.errors import InputError
from samed3d.inference.edits import REDO, UNDO, Edit, applied
from samed3d.inference.journal import Journal
from samed3d.inference.results import MaskUpdate, Results, pick_device, update_between
from samed3d.inference.saving import check_colour, identity, read_session
from samed3d.inference.scene import SessionObject, shown
from samed3d.inference.strokes import read_prior
from samed3d.models import load_promptable
from samed3d.models.base import PromptableModel
from samed3d.prompts import ObjectPrompts, Point, Prompt, is_positive
from samed3d.volume import Volume, read_volume

__all__ = ["MaskUpdate", "Session", "SessionObject", "pick_device"]


class Session(Results):
    """Promptable segmentation of one volume. What can be read from it is in ``Results``."""

    def __init__(self, volume: Volume, model: PromptableModel, device: str = "auto", model_name: str = "") -> None:
        """Use ``Session.open``; this takes parts that are already loaded."""
        super().__init__(volume, model, pick_device(device), model_name or model.spec.name)
        self._journal: Journal | None = None
        self._next_prompt = 1

    @classmethod
    def open(
        cls,
        image: str | Path | Volume,
        model: str | Path | PromptableModel = "default",
        device: str = "auto",
        channel: int | None = None,
        series: str | int | None = None,
        journal: str | Path | None = None,
        model_name: str = "",
    ) -> Session:
        """Read an image and a model.

        Args:
            image: File, DICOM folder or ``Volume``.
            model: Checkpoint name or file, or a model that is already built.
            device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
            channel: Channel of a multi-channel image.
            series: Series of a DICOM folder.
            journal: File that every edit is written to before it is acknowledged; where it exists, the session in it
                goes on.
            model_name: What a model that is already built was loaded as, so that a saved session can load it again.

        Raises:
            InputError: for an image or model that cannot be used, a device that is not there, or a journal that is
                damaged, in use, or of another image or model.
        """
        pick_device(device)
        network = model if isinstance(model, PromptableModel) else load_promptable(model)
        volume = image if isinstance(image, Volume) else read_volume(image, channel=channel, series=series)
        session = cls(volume, network, device, model_name or ("" if isinstance(model, PromptableModel) else str(model)))
        session._picked = {key: value for key, value in (("channel", channel), ("series", series)) if value is not None}
        if journal is not None:
            opened = Journal(journal, identity(session))
            try:
                session._replay(opened.edits)
            except BaseException:
                opened.close()
                raise
            session._journal = opened
        return session

    @classmethod
    def load(
        cls,
        path: str | Path,
        image: str | Path | Volume | None = None,
        model: str | Path | PromptableModel | None = None,
        device: str = "auto",
        journal: str | Path | None = None,
    ) -> Session:
        """Go on with a session that ``save`` wrote, undo and redo included.

        Args:
            path: The session file.
            image: The image, where it is no longer at the place that the file names.
            model: The model, where it is not one that can be loaded by its name.
            device: As for ``open``.
            journal: As for ``open``; must not exist yet.

        Raises:
            InputError: if the file is damaged, or the image is not there or another one.
        """
        saved = read_session(Path(path))
        if journal is not None and Path(journal).exists():
            raise InputError(
                f"journal must be a new file for a loaded session, got {journal}; open the journal itself instead"
            )
        source = image if image is not None else saved.image_path(Path(path))
        session = cls.open(source, model if model is not None else saved.model, device, saved.channel, saved.series)
        saved.check(identity(session))
        session._replay(saved.edits)
        if journal is not None:
            session._journal = Journal(journal, identity(session))
            for edit in saved.edits:
                session._journal.append(edit)
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the journal and of what is kept in memory; nothing is lost that a journal holds."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._chains.clear()
        self._predictor.clear()

    def add(self, prompt: Prompt, object_id: int = 1, name: str | None = None, *, predict: bool = True) -> MaskUpdate:
        """Add a prompt to an object and predict it anew.

        Args:
            prompt: A point, box, scribble, lasso or mask.
            object_id: Which object; a new number starts a new object. It becomes the current one.
            name: Of a new object.
            predict: False leaves the mask as it is until the next prompt or ``predict``.

        Raises:
            InputError: if the prompt lies outside the volume, the model does not understand it, nothing positive was
                said yet, or the object is locked.
        """
        track = self._scene.tracks.get(object_id)
        if not is_positive(prompt) and not any(
            is_positive(s.prompt) for s in (track.chain if track else []) if s.prompt is not None
        ):
            raise InputError(f"object {object_id} needs a positive point or a box before a negative point")
        return self._add(prompt, object_id, name, predict)

    def add_all(self, objects: Sequence[ObjectPrompts]) -> None:
        """Add whole objects; prompts of each are given in order, as if clicked one after the other.

        Raises:
            InputError: as ``add``; every prompt is checked before anything is predicted.
        """
        read = [(entry, [read_prior(prompt, self.volume) for prompt in entry.prompts]) for entry in objects]
        for entry, prompts in read:
            if not entry.has_positive:
                raise InputError(
                    f"object {entry.id} ({entry.name}) needs a positive point or a box, got only negative points"
                )
            for prompt in prompts:
                self._chains.check(prompt)
        for entry, prompts in read:
            for prompt in prompts:
                self._add(prompt, entry.id, entry.name, True)

    def _add(self, prompt: Prompt, object_id: int, name: str | None, predict: bool) -> MaskUpdate:
        if type(object_id) is not int or not 1 <= object_id < 2**16:
            raise InputError(f"object id must be a whole number from 1 to 65535, got {object_id!r}")
        edit: Edit = {
            "do": "add",
            "object": object_id,
            "id": self._next_prompt,
            "prompt": read_prior(prompt, self.volume),
        }
        if name is not None and object_id not in self._scene.tracks:
            edit["name"] = name
        if not predict:
            edit["look"] = False
        return self._commit(edit, object_id, self._next_prompt)

    def remove(self, prompt_id: int) -> MaskUpdate:
        """Take a prompt out; its object's later prompts are answered again without it.

        Raises:
            InputError: if there is no such prompt, or its object is locked.
        """
        return self._commit({"do": "remove", "id": prompt_id}, self._holder(prompt_id), prompt_id)

    def move(self, prompt_id: int, to: Prompt | Sequence[float]) -> MaskUpdate:
        """Replace a prompt and answer its object's later prompts again.

        Args:
            prompt_id: Which.
            to: Another prompt; or, for a point, its new position in the point's own space.

        Raises:
            InputError: as ``add`` and ``remove``.
        """
        holder = self._holder(prompt_id)
        if not isinstance(to, Prompt):
            old = self._object(holder).numbered[prompt_id]
            if not isinstance(old, Point):
                raise InputError(
                    f"prompt {prompt_id} is a {type(old).__name__.lower()}: move it by giving the new one, got {to!r}"
                )
            to = Point(tuple(to), old.positive, old.space)  # type: ignore[arg-type]
        return self._commit({"do": "move", "id": prompt_id, "prompt": read_prior(to, self.volume)}, holder, prompt_id)

    def predict(self, object_id: int | None = None) -> MaskUpdate:
        """Ask the model again: what was added with ``predict=False``, or the same prompts with the mask so far to start
        from.
        """
        number = self._number(object_id)
        return self._commit({"do": "look", "object": number}, number, 0)

    def undo(self) -> MaskUpdate | None:
        """Take back the last edit, of whatever kind; None where there is none. Unlimited, and exact."""
        return self._step(UNDO)

    def redo(self) -> MaskUpdate | None:
        """Do again what was undone last; None where there is nothing."""
        return self._step(REDO)

    @property
    def can_undo(self) -> bool:
        """Whether there is an edit to take back."""
        return bool(self._history.done)

    @property
    def can_redo(self) -> bool:
        """Whether there is an edit to do again."""
        return bool(self._history.undone)

    def new_object(self, name: str | None = None) -> int:
        """Make an object without prompts and return its id, the lowest free one."""
        number = next(n for n in range(1, 2**16) if n not in self._scene.tracks)
        self._commit({"do": "object", "object": number, "name": name or f"object {number}"}, number, 0)
        return number

    def edit_object(
        self,
        object_id: int,
        *,
        name: str | None = None,
        colour: str | None = None,
        visible: bool | None = None,
        locked: bool | None = None,
    ) -> None:
        """Change an object's entry in the table; what is None stays. A locked object's mask cannot be changed nor
        covered in ``labels``.

        Raises:
            InputError: if there is no such object, or the colour is not ``#rrggbb``.
        """
        self._object(object_id)
        given = {"name": name, "colour": check_colour(colour), "visible": visible, "locked": locked}
        changes = {key: value for key, value in given.items() if value is not None}
        if changes:
            self._commit({"do": "object", "object": object_id, **changes}, object_id, 0)

    def remove_object(self, object_id: int) -> MaskUpdate:
        """Take an object out with all its prompts.

        Raises:
            InputError: if there is no such object, or it is locked.
        """
        return self._commit({"do": "drop", "object": object_id}, object_id, 0)

    @property
    def others_are_negative(self) -> bool:
        """Whether predictions treat the other objects' voxels as background; setting it is an edit and counts from then
        on.
        """
        return self._scene.others_are_negative

    @others_are_negative.setter
    def others_are_negative(self, value: bool) -> None:
        if bool(value) != self.others_are_negative:
            self._commit({"do": "rule", "others_are_negative": bool(value)}, self.current, 0)

    def _commit(self, edit: Edit, object_id: int, prompt_id: int) -> MaskUpdate:
        """Do an edit: predict, write it to the journal, then let it count."""
        began, before = time.perf_counter(), self._scene
        after = applied(before, edit, self._chains)
        if self._journal is not None:
            self._journal.append(edit)
        self._history.push(edit, after)
        self._next_prompt = max(self._next_prompt, edit.get("id", 0) + 1)
        return update_between(before, after, object_id, prompt_id, began, self.volume.view)

    def _step(self, way: str) -> MaskUpdate | None:
        began, before = time.perf_counter(), self._scene
        if not (self.can_undo if way == UNDO else self.can_redo):
            return None
        edit = self._history.undo() if way == UNDO else self._history.redo(self._chains)
        if self._journal is not None:
            self._journal.append({"do": way})
        assert edit is not None
        prompt_id = int(edit.get("id", 0))
        holders = [track for scene in (before, self._scene) if (track := scene.holding(prompt_id)) is not None]
        object_id = edit.get("object", holders[0].id if holders else self.current)
        return update_between(before, self._scene, object_id, prompt_id, began, self.volume.view)

    def _replay(self, edits: Sequence[Edit]) -> None:
        self._history.replay(edits, self._chains)
        self._next_prompt = max([self._next_prompt, *(int(edit.get("id", 0)) + 1 for edit in edits)])

    def _holder(self, prompt_id: int) -> int:
        track = self._scene.holding(prompt_id)
        if track is None:
            raise InputError(f"prompt must be one of the session's, got number {prompt_id!r}; objects() lists them")
        return track.id

    def _object(self, object_id: int) -> SessionObject:
        if object_id not in self._scene.tracks:
            known = ", ".join(map(str, sorted(self._scene.tracks))) or "none"
            raise InputError(f"object must be one of the session's ({known}), got {object_id!r}")
        return shown(self._scene.tracks[object_id])

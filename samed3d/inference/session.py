"""``Session``: one volume, one model, any number of objects; prompts in, masks on the image's own grid out.

The prompts are the source of truth and the masks follow from them: every prompt can be moved or removed, every edit can
be undone and repeated, and with a journal all of it survives a crash. A session is used by one thread at a time. Read
``history.py`` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.devices import pick_device
from samed3d.errors import InputError, whole_number
from samed3d.geometry import Region
from samed3d.inference import history, mask_files, session_store
from samed3d.inference.history import EditHistory, ObjectState, SessionObject, SessionState
from samed3d.inference.model_prompts import read_mask_file
from samed3d.inference.prediction import PromptHistory
from samed3d.inference.predictor import Canvas, CropPredictor
from samed3d.inference.uncertainty import least_certain
from samed3d.masks import Cleaning
from samed3d.models import load_promptable
from samed3d.models.base import PromptableModel
from samed3d.output import check_spares
from samed3d.prompts import MaskUpdate, ObjectPrompts, Point, Prompt, is_positive
from samed3d.volume import Volume, read_volume, write_mask, write_volume

__all__ = ["MaskUpdate", "Session", "SessionObject"]


class Session:
    """Promptable segmentation of one volume. Attributes: ``volume``, ``model_name``, ``device``, ``history``."""

    def __init__(self, volume: Volume, model: PromptableModel, device: str = "auto", model_name: str = "") -> None:
        """Use ``Session.open``; this takes parts that are already loaded."""
        self.volume, self.model_name, self.device = volume, model_name or model.spec.name, pick_device(device)
        self._predictor = CropPredictor.of(model.eval(), self.device, volume)
        self._prompts = PromptHistory(volume, self._predictor)
        self.history = EditHistory(self._prompts)
        self._journal: session_store.Journal | None = None
        self._options: dict[str, Any] = {}

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
        modality: str | None = None,
        untilt: bool = False,
    ) -> Session:
        """Read an image and a model.

        Args:
            image: File, DICOM folder or ``Volume``.
            model: Checkpoint name or file, or a model that is already built.
            device: As for ``pick_device``.
            channel: As for ``read_volume``, like ``series``, ``modality`` and ``untilt``.
            series: See ``channel``.
            journal: File that every edit is written to before it is acknowledged; an existing one is resumed.
            model_name: The name that a built model was loaded by, so that a saved session can load it again.
            modality: See ``channel``.
            untilt: See ``channel``.

        Raises:
            InputError: for an image, model, device or journal that cannot be used, or a journal of others.
        """
        pick_device(device)
        network = model if isinstance(model, PromptableModel) else load_promptable(model)
        reading: dict[str, Any] = {"channel": channel, "series": series, "untilt": untilt}
        if isinstance(image, Volume):
            volume = image if modality is None else replace(image, modality=modality)
        else:
            volume = read_volume(image, modality=modality, **reading)
        session = cls(volume, network, device, model_name or ("" if isinstance(model, PromptableModel) else str(model)))
        session._options = {key: value for key, value in reading.items() if value is not None and value is not False}
        if journal is not None:
            session._journal = session_store.Journal(journal, session._identity())
            try:
                session.history.replay(session._journal.edits)
            except BaseException:
                session.close()
                raise
            session.history.record = session._journal.append
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
        """Resume a session that ``save`` wrote, undo and redo included.

        Args:
            path: The session file.
            image: The image, if it is no longer at the path that the file names.
            model: The model, if it cannot be loaded by its name.
            device: As for ``open``.
            journal: As for ``open``; must not exist yet.

        Raises:
            InputError: if the file is damaged, or the image is missing or another one.
        """
        header, edits = session_store.read_session(Path(path))
        if journal is not None and Path(journal).exists():
            raise InputError(f"journal must be a new file for a loaded session, got {journal}; open that one instead")
        options = {key: header["image"].get(key) for key in ("channel", "series", "modality", "untilt")}
        options["modality"] = options["modality"] or None
        network = str(header["model"]["name"]) if model is None else model
        image = session_store.find_image(header, Path(path)) if image is None else image
        session = cls.open(image, network, device, **options)
        session_store.check_same(header, session._identity(), f"session {path}")
        session.history.replay(edits)
        if journal is not None:
            session._journal = session_store.Journal(journal, session._identity())
            for edit in edits:
                session._journal.append(edit)
            session.history.record = session._journal.append
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal and delete what is kept in memory; a journal still holds everything."""
        if self._journal is not None:
            self._journal.close()
        self._journal = self.history.record = None
        self._prompts.clear()

    def add(self, prompt: Prompt, object_id: int = 1, name: str | None = None, *, predict: bool = True) -> MaskUpdate:
        """Add a prompt to an object and predict the object again.

        Args:
            prompt: A point, box, scribble, lasso or mask.
            object_id: Which object, which becomes the current one; a new number makes a new object.
            name: Names a new object or renames an existing one.
            predict: False leaves the mask as it is until the next prompt or ``predict``.

        Raises:
            InputError: if the prompt lies outside the volume, the model does not take its kind, the object's first
                prompt is negative, or the object is locked.
        """
        entry = self._state.objects.get(whole_number(object_id, "object id"))
        if not is_positive(prompt) and not any(map(is_positive, entry.prompts.values() if entry else ())):
            raise InputError(f"object {object_id} needs a positive point or a box before a negative point")
        return self._add(prompt, object_id, predict, name=name)

    def add_all(self, objects: Sequence[ObjectPrompts]) -> None:
        """Add whole objects; their prompts are predicted in order, as if clicked one after the other. An object that
        exists keeps its name.

        Raises:
            InputError: as ``add``; every prompt is checked before anything is predicted.
        """
        read = [(entry, [read_mask_file(prompt, self.volume) for prompt in entry.prompts]) for entry in objects]
        for entry, prompts in read:
            entry.check_positive()
            for prompt in prompts:
                self._prompts.check(prompt)
        for entry, prompts in read:
            for prompt in prompts:
                known = entry.id in self._state.objects
                self._add(prompt, entry.id, True, **({} if known else {"name": entry.name, "code": entry.code or None}))

    def _add(self, prompt: Prompt, object_id: int, predict: bool = True, **about: str | None) -> MaskUpdate:
        prompt, number = read_mask_file(prompt, self.volume), self.history.next_prompt
        edit = history.AddPrompt(object_id=object_id, prompt_id=number, prompt=prompt, predict=predict, **about)
        return self.history.commit(edit)

    def remove(self, prompt_id: int) -> MaskUpdate:
        """Remove a prompt; its object's later prompts are predicted again without it.

        Raises:
            InputError: if there is no such prompt, or its object is locked.
        """
        return self.history.commit(history.RemovePrompt(prompt_id=prompt_id))

    def move(self, prompt_id: int, to: Prompt | Sequence[float]) -> MaskUpdate:
        """Replace a prompt and predict its object's later prompts again.

        Args:
            prompt_id: Which.
            to: Another prompt; or, for a point, its new position in the point's own space.

        Raises:
            InputError: as ``add`` and ``remove``.
        """
        entry = self._state.object_of_prompt(prompt_id)
        if not isinstance(to, Prompt):
            old = entry.prompts[prompt_id]
            if not isinstance(old, Point):
                raise InputError(f"prompt {prompt_id} is no point: move it by giving the new one, got {to!r}")
            to = Point(to, old.positive, old.space)  # type: ignore[arg-type]
        return self.history.commit(history.MovePrompt(prompt_id=prompt_id, prompt=read_mask_file(to, self.volume)))

    def predict(self, object_id: int | None = None) -> MaskUpdate:
        """Predict an object (the current one by default) again, with prompts added by ``predict=False``."""
        return self.history.commit(history.Predict(object_id=self._number(object_id)))

    def clean(self, cleaning: Cleaning, object_id: int | None = None) -> MaskUpdate:
        """Clean an object's mask (the current one's by default). The result is a mask prompt: later ones go on from it.

        Raises:
            InputError: if the object has no mask or is locked, or nothing would be left.
        """
        number = self._number(object_id)
        return self._add(mask_files.cleaned_mask(self._prompted(number), self.volume, cleaning), number)

    def undo(self) -> MaskUpdate | None:
        """Take back the last edit, of whatever kind; None if there is none. Unlimited, and exact."""
        return self.history.undo()

    def redo(self) -> MaskUpdate | None:
        """Repeat the edit that was undone last; None if there is none."""
        return self.history.redo()

    @property
    def can_undo(self) -> bool:
        """Whether there is an edit to take back."""
        return bool(self.history.done)

    @property
    def can_redo(self) -> bool:
        """Whether there is an edit to repeat."""
        return bool(self.history.undone)

    def new_object(self, name: str | None = None) -> int:
        """Make an object without prompts and return its id, the lowest free one."""
        number = next(n for n in range(1, 2**16) if n not in self._state.objects)
        self.history.commit(history.EditObject(object_id=number, name=name or f"object {number}"))
        return number

    def edit_object(
        self,
        object_id: int,
        *,
        name: str | None = None,
        colour: str | None = None,
        visible: bool | None = None,
        locked: bool | None = None,
        code: str | None = None,
    ) -> None:
        """Change an object's row of the object table; what is None stays. A locked mask is on top in ``labels``.
        ``code`` is SCHEME:VALUE:MEANING for DICOM; the empty text leaves it to the name.

        Raises:
            InputError: if there is no such object, or the colour (``#rrggbb``) or the code has another form.
        """
        self._state.object(object_id)
        row: dict[str, Any] = {"name": name, "colour": colour, "visible": visible, "locked": locked, "code": code}
        if any(value is not None for value in row.values()):
            self.history.commit(history.EditObject(object_id=object_id, **row))

    def remove_object(self, object_id: int) -> MaskUpdate:
        """Remove an object with all its prompts.

        Raises:
            InputError: if there is no such object, or it is locked.
        """
        return self.history.commit(history.RemoveObject(object_id=object_id))

    @property
    def others_are_negative(self) -> bool:
        """Whether predictions from now on treat the other objects' voxels as background; setting it is an edit."""
        return self._state.others_are_negative

    @others_are_negative.setter
    def others_are_negative(self, value: bool) -> None:
        if (edit := history.SetRule(others_are_negative=value)).others_are_negative != self.others_are_negative:
            self.history.commit(edit)

    def objects(self) -> list[SessionObject]:
        """The objects with their prompts as given, by id."""
        return [entry.copy() for _, entry in sorted(self._state.objects.items())]

    @property
    def current(self) -> int:
        """The object that was prompted or made last; 0 before any."""
        return self._state.current

    def boxed_mask(self, object_id: int) -> tuple[Region, NDArray[np.uint8]]:
        """The bounding box of an object's mask on the image's own grid, and the mask there, uint8 0 or 1."""
        packed, view = self._state.mask(self._prompted(object_id).id, self._predictor.shape_zyx), self.volume.view
        return view.region_to_stored(packed.region), view.to_stored(packed.inside().view(np.uint8))

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """An object's mask, uint8 0 or 1, (D, H, W) on the image's own grid."""
        region, part = self.boxed_mask(object_id)
        return region.placed(part, self.volume.grid.shape_zyx)

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The current object's mask."""
        return self.mask_of(self.current)

    def logits_of(self, object_id: int) -> NDArray[np.float32]:
        """An object's logits, (D, H, W) on the image's own grid; strongly negative where nothing was predicted."""
        canvas = self._canvas(self._prompted(object_id))
        return self.volume.view.to_stored(canvas.on_region(self.volume.view.whole).numpy())

    def probability(self, object_id: int | None = None) -> NDArray[np.float32]:
        """An object's probability (the current one's by default), float32 in 0..1, (D, H, W)."""
        return np.ascontiguousarray(1.0 / (1.0 + np.exp(-self.logits_of(self._number(object_id)))))

    @property
    def labels(self) -> NDArray[np.unsignedinteger]:
        """One (D, H, W) map of all ids. Where objects overlap a locked one wins, then the more certain one."""
        labels, region = mask_files.label_map(self._state, self.volume.view, self._canvas)
        return region.placed(labels, self.volume.grid.shape_zyx)

    def suggest_click(self, object_id: int | None = None) -> Point:
        """A click where the model is least certain, near the border of the mask, with the sign that the model predicts.

        Raises:
            InputError: if the object has no mask yet.
        """
        entry = self._prompted(self._number(object_id))
        given = [at for step in entry.chain if step.model_prompts is not None for at, _ in step.model_prompts.points]
        return least_certain(self._canvas(entry), given, self.volume.view)

    def save(self, path: str | Path) -> None:
        """Write the masks as ``export`` does, or, if the name ends in ``.json``, the whole session: the prompts, the
        object table, every edit for undo and redo, and the path of the image.
        """
        if str(path).lower().endswith(".json"):
            check_spares(path, self.volume.source)
            session_store.save_session(Path(path), self._identity(), self.objects(), self.history.log())
        else:
            self.export(path)

    def export(self, path: str | Path, format: str | None = None) -> None:
        """Write the mask of one object, or the label map of several, in a format of ``volume.writing.MASK_FORMATS``.

        Args:
            path: The file.
            format: None goes by the suffix: ``.seg.nrrd`` is a 3D Slicer segmentation, ``.dcm`` a DICOM-SEG.

        Raises:
            InputError: if format and suffix disagree, there is nothing to write, the file cannot be written, or DICOM
                is asked for an image of another format.
        """
        kind, path = mask_files.checked_format(path, format), Path(path)
        check_spares(path, self.volume.source)
        if kind in mask_files.LABEL_MAP_FORMATS:
            labels, region = mask_files.label_map(self._state, self.volume.view, self._canvas)
            if len(self._state.objects) <= 1:
                np.equal(labels, self._prompted(self.current).id, out=labels, casting="unsafe")
            write_mask(path, labels, self.volume.grid, region)
        else:
            mask_files.export_segments(
                path, kind, mask_files.segments_of(self._state, self.volume), self.volume, self._options.get("series")
            )

    def save_probability(self, path: str | Path) -> None:
        """Write the current object's probability, float32."""
        check_spares(path, self.volume.source)
        write_volume(Path(path), self.probability(), self.volume.grid)

    def report(self) -> dict[str, Any]:
        """What was done, ready for JSON: versions, device, model, prompts, timings, voxels and volume per object."""
        seconds = {number: [s.seconds for s in entry.chain] for number, entry in self._state.objects.items()}
        about = mask_files.notes_of(self._state, self.volume), self.device, self.model_name, self.objects(), seconds
        return session_store.describe(self.volume, *about)

    @property
    def _state(self) -> SessionState:
        return self.history.state

    def _identity(self) -> dict[str, Any]:
        return session_store.identity(self.volume, self._options, self._predictor.model, self.model_name)

    def _number(self, object_id: int | None) -> int:
        return self.current if object_id is None else object_id

    def _prompted(self, object_id: int) -> ObjectState:
        if (entry := self._state.objects.get(whole_number(object_id, "object id", least=0))) is None:
            raise InputError(f"object {object_id} has no mask yet: add a prompt first")
        return entry

    def _canvas(self, entry: ObjectState) -> Canvas:
        prediction = None if entry.step is None else self._prompts.prediction(entry.step)
        return Canvas() if prediction is None else prediction.canvas

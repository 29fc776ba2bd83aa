"""What can be read from a session: objects, masks, probabilities, the label map, a suggested click, files; and what an
edit changed.

Nothing here changes a session; that is in ``session.py``. Read ``scene.py`` for what an object is, ``steps.py`` for
where masks come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.crops import BACKGROUND_LOGIT
from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, Region
from samed3d.inference.edits import History
from samed3d.inference.mask_files import LABEL_MAP_FORMATS, checked_format, export_segments, segments_of
from samed3d.inference.predictor import Canvas, CropPredictor
from samed3d.inference.saving import describe, save_session
from samed3d.inference.scene import Scene, SessionObject, Track, label_map, shown
from samed3d.inference.steps import Chains
from samed3d.inference.uncertainty import least_certain
from samed3d.models.base import PromptableModel
from samed3d.prompts import PackedMask, Point
from samed3d.volume import Volume, write_mask, write_volume

SESSION_SUFFIX = ".json"


@dataclass
class MaskUpdate:
    """What one call changed.

    Attributes:
        region: Box of the voxels that changed, zyx of the stored array; empty where none did.
        mask: The object's uint8 mask inside it.
        seconds: That the call took.
        object_id: Whose mask.
        prompt_id: Of the prompt that was added, moved or removed; 0 where no prompt was.
    """

    region: Region
    mask: NDArray[np.uint8]
    seconds: float
    object_id: int = 1
    prompt_id: int = 0

    @property
    def changed(self) -> bool:
        """Whether any voxel changed."""
        return not self.region.is_empty


class Results:
    """The readable side of a session.

    Attributes:
        volume: The image as read.
        model_name: What was loaded.
        device: Where the model runs.
    """

    def __init__(self, volume: Volume, model: PromptableModel, device: torch.device, model_name: str) -> None:
        """Made by ``Session``."""
        self.volume, self.model_name, self.device = volume, model_name, device
        self._predictor = CropPredictor(
            model.eval(), device, volume.view.to_canonical(volume.array), volume.view.spacing_zyx_mm
        )
        self._chains = Chains(volume, self._predictor)
        self._history = History()
        self._picked: dict[str, Any] = {}

    def objects(self) -> list[SessionObject]:
        """The objects with their prompts as given, by id."""
        return [shown(track) for _, track in sorted(self._scene.tracks.items())]

    @property
    def current(self) -> int:
        """The object that was prompted or made last; 0 before any."""
        return self._scene.current

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """An object's mask, uint8 0 or 1, (D, H, W) on the image's own grid."""
        packed = self._packed(self._track(object_id))
        full = np.zeros(self._predictor.shape_zyx, dtype=np.uint8)
        full[packed.region.slices] = packed.inside()
        return np.ascontiguousarray(self.volume.view.to_stored(full))

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The current object's mask (the one prompted last)."""
        return self.mask_of(self.current)

    def logits_of(self, object_id: int) -> NDArray[np.float32]:
        """An object's logits, (D, H, W) in the file's own order; unseen voxels are strongly negative."""
        canvas = self._canvas(self._track(object_id))
        full = np.full(self._predictor.shape_zyx, BACKGROUND_LOGIT, dtype=np.float32)
        full[canvas.region.slices] = canvas.logits.numpy()
        return self.volume.view.to_stored(full)

    def probability(self, object_id: int | None = None) -> NDArray[np.float32]:
        """An object's probability (the current one's by default), float32 in 0..1, (D, H, W)."""
        return np.ascontiguousarray(1.0 / (1.0 + np.exp(-self.logits_of(self._number(object_id)))))

    @property
    def labels(self) -> NDArray[np.unsignedinteger]:
        """All objects as one label map of their ids, (D, H, W); where objects overlap a locked one wins, then the more
        certain one.
        """
        labels = label_map(self._scene, self._predictor.shape_zyx, self._canvas)
        return np.ascontiguousarray(self.volume.view.to_stored(labels))

    def suggest_click(self, object_id: int | None = None) -> Point:
        """A click where the model is least certain, near the border of the mask; its sign is what the model would say.

        Raises:
            InputError: if the object has no mask yet.
        """
        track = self._track(self._number(object_id))
        said = [at for step in track.chain if step.said is not None for at, _ in step.said.points]
        zyx, positive = least_certain(self._canvas(track), said, self.volume.view.spacing_zyx_mm)
        i, j, k = self.volume.view.position_to_stored(zyx)[::-1]
        return Point((i, j, k), positive)

    def save(self, path: str | Path) -> None:
        """Write the masks, or to a ``.json`` file the whole session; the suffix decides.

        One object is written as its mask, several as a label map. A session file holds the prompts, the object table,
        every edit for undo and redo, and where the image lies.
        """
        if Path(path).name.lower().endswith(SESSION_SUFFIX):
            save_session(Path(path), self, self._history.log())
            return
        self.export(path)

    def export(self, path: str | Path, format: str | None = None) -> None:
        """Write the masks in a format of ``mask_files.FORMATS``: nifti, nrrd, mha, seg.nrrd, dicom-seg or rtstruct.

        Args:
            path: The file.
            format: None goes by the suffix: ``.seg.nrrd`` is a 3D Slicer segmentation, ``.dcm`` a DICOM-SEG.

        Raises:
            InputError: if format and suffix disagree, there is nothing to write, the file cannot be written, or DICOM
                is asked for and the image was not read from a DICOM series.
        """
        kind = checked_format(path, format)
        if kind in LABEL_MAP_FORMATS:
            write_mask(Path(path), self.labels if len(self._scene.tracks) > 1 else self.mask, self.volume.grid)
            return
        export_segments(
            Path(path), kind, segments_of(self._scene, self.volume), self.volume, self._picked.get("series")
        )

    def save_probability(self, path: str | Path) -> None:
        """Write the current object's probability, float32."""
        write_volume(Path(path), self.probability(), self.volume.grid)

    def report(self) -> dict[str, Any]:
        """What was done, ready for JSON: versions, device, model, prompts, timings, voxels and volume per object."""
        return describe(self, {t.id: [s.seconds for s in t.chain] for t in self._scene.tracks.values()})

    @property
    def image(self) -> dict[str, Any]:
        """Where the image was read from: ``source``, and ``channel`` or ``series`` where one was picked."""
        return {"source": self.volume.source, **self._picked}

    @property
    def network(self) -> PromptableModel:
        """The model."""
        return self._predictor.model

    @property
    def _scene(self) -> Scene:
        return self._history.scene

    def _number(self, object_id: int | None) -> int:
        return self.current if object_id is None else object_id

    def _track(self, object_id: int) -> Track:
        track = self._scene.tracks.get(object_id)
        if track is None:
            raise InputError(f"object {object_id} has no mask yet: add a prompt first")
        return track

    def _packed(self, track: Track) -> PackedMask:
        return self._scene.mask(track.id, self._predictor.shape_zyx)

    def _canvas(self, track: Track) -> Canvas:
        placed = None if track.step is None else self._chains.placed(track.step)
        return Canvas(Region((0, 0, 0), (0, 0, 0)), torch.zeros(0, 0, 0)) if placed is None else placed.canvas


def update_between(
    before: Scene, after: Scene, object_id: int, prompt_id: int, began: float, view: CanonicalView
) -> MaskUpdate:
    """How one object's mask differs between two scenes.

    Args:
        before: Earlier scene.
        after: Later scene.
        object_id: Which object; it may be in one of them only.
        prompt_id: For the update.
        began: ``time.perf_counter()`` when the call began.
        view: Of the volume.
    """
    old, new = before.mask(object_id, view.shape_zyx), after.mask(object_id, view.shape_zyx)
    region = old.region.union(new.region)
    now = new.on(region)
    change = PackedMask.of_part(now ^ old.on(region), region, view.shape_zyx).region
    if change.is_empty:
        return MaskUpdate(change, np.zeros((0, 0, 0), np.uint8), time.perf_counter() - began, object_id, prompt_id)
    mask = np.ascontiguousarray(view.to_stored(now[change.slices_in(region)].astype(np.uint8)))
    return MaskUpdate(view.region_to_stored(change), mask, time.perf_counter() - began, object_id, prompt_id)


def pick_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device; CUDA that is not there is refused, never replaced.

    Raises:
        InputError: for another name, or ``"cuda"`` without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda was asked for but this machine has no CUDA GPU that torch can use; leave --device out or say cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

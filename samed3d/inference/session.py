"""What a user holds: a volume, objects with prompts, and their masks on the volume's own grid. No ground truth anywhere.

    from samed3d import Session, Point
    s = Session.open("ct.nii.gz")
    s.add(Point((120, 88, 40)))
    s.save("mask.nii.gz")

Positions come in as ijk or RAS mm, masks go out as (D, H, W) arrays in the file's own order; between them everything is canonical. Which
crops are looked at is decided in ``placement.py``; the contract with models is ``models/base.py``.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Region, Triple, as_triple, ijk_to_zyx
from samed3d.inference.placement import Placed, place
from samed3d.inference.predictor import BACKGROUND_LOGIT, CanonicalPrompts, CropPredictor
from samed3d.models import load
from samed3d.models.base import PromptableModel
from samed3d.prompts import MASK_LOGIT_THRESHOLD, Box, ObjectPrompts, Point, Prompt, box_in_grid, point_in_grid
from samed3d.volume import Volume, read_volume, write_mask, write_volume

logger = logging.getLogger(__name__)

OBEYED_LOGIT = 1.0
"""A clicked voxel gets at least this much of its click's sign: a click is never contradicted at its own voxel."""


@dataclass
class MaskUpdate:
    """What one prompt changed: the region (zyx of the stored array), the object's uint8 mask inside it, and the seconds it took."""

    region: Region
    mask: NDArray[np.uint8]
    seconds: float


@dataclass
class _Object:
    """An object's prompts as given, as canonical, and its prediction so far."""

    given: ObjectPrompts
    canonical: CanonicalPrompts = field(default_factory=CanonicalPrompts)
    placed: Placed | None = None
    seconds: list[float] = field(default_factory=list)


class Session:
    """Promptable segmentation of one volume.

    Attributes:
        volume: The image as read.
        model_name: What was loaded.
    """

    def __init__(self, volume: Volume, model: PromptableModel, device: str = "auto", model_name: str = "") -> None:
        """Use ``Session.open``; this takes parts that are already loaded."""
        self.volume, self.model_name = volume, model_name or model.spec.name
        view = volume.view
        self.device = pick_device(device)
        self._predictor = CropPredictor(model.eval(), self.device, view.to_canonical(volume.array), view.spacing_zyx_mm)
        self._objects: dict[int, _Object] = {}
        self._current = 1

    @classmethod
    def open(
        cls,
        image: str | Path | Volume,
        model: str | Path | PromptableModel = "default",
        device: str = "auto",
        channel: int | None = None,
        series: str | int | None = None,
    ) -> Session:
        """Read an image and a model.

        Args:
            image: File, DICOM folder or ``Volume``.
            model: Checkpoint name or file, or a model that is already built.
            device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
            channel: Channel of a multi-channel image.
            series: Series of a DICOM folder.

        Raises:
            InputError: for an image or model that cannot be used, or a device that is not there.
        """
        pick_device(device)
        network = model if isinstance(model, PromptableModel) else load(model)
        volume = image if isinstance(image, Volume) else read_volume(image, channel=channel, series=series)
        return cls(volume, network, device, "" if isinstance(model, PromptableModel) else str(model))

    def add(self, prompt: Prompt, object_id: int = 1, name: str | None = None) -> MaskUpdate:
        """Add a prompt to an object and predict it anew.

        Args:
            prompt: A point or a box.
            object_id: Which object; a new number starts a new object, which becomes the current one.
            name: Of a new object.

        Raises:
            InputError: if the prompt lies outside the volume, the model does not understand it, or nothing positive was said yet.
        """
        return self._add([prompt], object_id, name)

    def add_all(self, objects: list[ObjectPrompts]) -> None:
        """Add whole objects; prompts of each are given in order, as if clicked one after the other.

        Raises:
            InputError: as ``add``; every prompt is checked before anything is predicted.
        """
        for entry in objects:
            if not entry.has_positive:
                raise InputError(f"object {entry.id} ({entry.name}) needs a positive point or a box, got only negative points")
            for prompt in entry.prompts:
                self._to_canonical(prompt, CanonicalPrompts())
        for entry in objects:
            first_positive = next(i for i, p in enumerate(entry.prompts) if isinstance(p, Box) or p.positive)
            self._add(entry.prompts[: first_positive + 1], entry.id, entry.name)
            for prompt in entry.prompts[first_positive + 1 :]:
                self._add([prompt], entry.id, entry.name)

    def _add(self, prompts: list[Prompt], object_id: int, name: str | None) -> MaskUpdate:
        began = time.perf_counter()
        known = self._objects.get(object_id)
        state = known or _Object(ObjectPrompts(object_id, name or f"object {object_id}"))
        canonical = CanonicalPrompts(list(state.canonical.points), state.canonical.box)
        for prompt in prompts:
            self._to_canonical(prompt, canonical)
        given = [*state.given.prompts, *prompts]
        if not ObjectPrompts(prompts=given).has_positive:
            raise InputError(f"object {object_id} needs a positive point or a box before a negative point")
        before = None if state.placed is None else state.placed.canvas.region
        state.placed = self._obeyed(place(self._predictor, canonical, state.placed), canonical)
        state.canonical, state.given.prompts = canonical, given
        self._objects[object_id], self._current = state, object_id
        canvas = state.placed.canvas
        region = canvas.region if before is None else before.union(canvas.region)
        mask = np.zeros(region.shape_zyx, dtype=np.uint8)  # of the changed part only: a click never costs a pass over the volume
        mask[canvas.region.slices_in(region)] = (canvas.logits > MASK_LOGIT_THRESHOLD).numpy()
        stored, mask = self.volume.view.region_to_stored(region), self.volume.view.to_stored(mask)
        seconds = time.perf_counter() - began
        state.seconds.append(seconds)
        return MaskUpdate(stored, np.ascontiguousarray(mask), seconds)

    def _to_canonical(self, prompt: Prompt, onto: CanonicalPrompts) -> None:
        """Check a prompt against the volume and the model, and append its canonical form."""
        spec, grid, view = self._predictor.model.spec, self.volume.grid, self.volume.view
        kind = "point" if isinstance(prompt, Point) else "box"
        if kind not in spec.prompts:
            raise InputError(f"model {spec.name!r} does not understand a {kind}; it takes {', '.join(sorted(spec.prompts - {'mask'}))}")
        if isinstance(prompt, Point):
            onto.points.append((view.position_to_canonical(ijk_to_zyx(point_in_grid(prompt, grid))), prompt.positive))
            return
        ends = [view.position_to_canonical(ijk_to_zyx(corner)) for corner in box_in_grid(prompt, grid)]
        low = as_triple([min(a, b) for a, b in zip(*ends, strict=True)])
        high = as_triple([max(a, b) + 1 for a, b in zip(*ends, strict=True)])  # both corner voxels belong to the box
        if onto.box is not None:
            low = as_triple([min(a, b) for a, b in zip(low, onto.box[0], strict=True)])
            high = as_triple([max(a, b) for a, b in zip(high, onto.box[1], strict=True)])
        onto.box = (low, high)

    def _obeyed(self, placed: Placed, prompts: CanonicalPrompts) -> Placed:
        """Give every clicked voxel its click's sign."""
        region, logits = placed.canvas.region, placed.canvas.logits
        for at, positive in prompts.points:
            voxel = _voxel(at, self._predictor.shape_zyx)
            index = tuple(v - a for v, a in zip(voxel, region.start_zyx, strict=True))
            if all(0 <= i < n for i, n in zip(index, region.shape_zyx, strict=True)):
                value = float(logits[index])
                logits[index] = max(value, OBEYED_LOGIT) if positive else min(value, -OBEYED_LOGIT)
        return placed

    @property
    def objects(self) -> list[ObjectPrompts]:
        """The objects with their prompts as given, by id."""
        return [state.given for _, state in sorted(self._objects.items())]

    def logits_of(self, object_id: int) -> NDArray[np.float32]:
        """An object's logits, (D, H, W) in the file's own order; unseen voxels are strongly negative."""
        canvas = self._placed(object_id).canvas
        full = np.full(self._predictor.shape_zyx, BACKGROUND_LOGIT, dtype=np.float32)
        full[canvas.region.slices] = canvas.logits.numpy()
        return self.volume.view.to_stored(full)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """An object's mask, uint8 0 or 1, (D, H, W) on the image's own grid."""
        canvas = self._placed(object_id).canvas
        full = np.zeros(self._predictor.shape_zyx, dtype=np.uint8)
        full[canvas.region.slices] = (canvas.logits > MASK_LOGIT_THRESHOLD).numpy()
        return np.ascontiguousarray(self.volume.view.to_stored(full))

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The current object's mask (the one prompted last)."""
        return self.mask_of(self._current)

    @property
    def probability(self) -> NDArray[np.float32]:
        """The current object's probability, float32 in 0..1, (D, H, W)."""
        return np.ascontiguousarray(1.0 / (1.0 + np.exp(-self.logits_of(self._current))))

    @property
    def labels(self) -> NDArray[np.integer]:
        """All objects as one label map of their ids, (D, H, W); where objects overlap the more certain one wins."""
        kind = np.uint8 if max(self._objects, default=0) < 256 else np.uint16
        labels = np.zeros(self.volume.grid.shape_zyx, dtype=kind)
        best = np.full(labels.shape, MASK_LOGIT_THRESHOLD, dtype=np.float32)
        for object_id in sorted(self._objects):
            logits = self.logits_of(object_id)
            wins = logits > best
            labels[wins], best[wins] = object_id, logits[wins]
        return labels

    def save(self, path: str | Path) -> None:
        """Write the mask (one object) or the label map (several) on the image's own grid; the suffix decides the format."""
        write_mask(Path(path), self.labels if len(self._objects) > 1 else self.mask, self.volume.grid)

    def save_probability(self, path: str | Path) -> None:
        """Write the current object's probability, float32."""
        write_volume(Path(path), self.probability, self.volume.grid)

    def report(self) -> dict[str, Any]:
        """What was done, ready for JSON: versions, device, model, prompts, timings, voxels and volume per object."""
        from samed3d import __version__

        voxel_mm3 = float(np.prod(self.volume.grid.spacing_xyz_mm))
        objects = []
        for object_id, state in sorted(self._objects.items()):
            voxels = int(self.mask_of(object_id).sum())
            prompts = [{"type": type(p).__name__.lower(), **asdict(p)} for p in state.given.prompts]
            timing = {"seconds": [round(s, 4) for s in state.seconds]}
            objects.append(
                {"id": object_id, "name": state.given.name, "voxels": voxels, "mm3": voxels * voxel_mm3, "prompts": prompts, **timing}
            )
        versions = {"samed3d": __version__, "torch": torch.__version__, "python": platform.python_version()}
        image = {"source": self.volume.source, "size_ijk": self.volume.grid.size_ijk, "spacing_mm": self.volume.grid.spacing_xyz_mm}
        return {"versions": versions, "device": str(self.device), "model": self.model_name, "image": image, "objects": objects}

    def _placed(self, object_id: int) -> Placed:
        state = self._objects.get(object_id)
        if state is None or state.placed is None:
            raise InputError(f"object {object_id} has no mask yet: add a prompt first")
        return state.placed


def pick_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device; CUDA that is not there is refused, never replaced.

    Raises:
        InputError: for another name, or ``"cuda"`` without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for but this machine has no CUDA GPU that torch can use; leave --device out or say cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _voxel(at: Triple, shape_zyx: tuple[int, int, int]) -> tuple[int, int, int]:
    z, y, x = (min(max(0, int(np.floor(v + 0.5))), n - 1) for v, n in zip(at, shape_zyx, strict=True))
    return (z, y, x)

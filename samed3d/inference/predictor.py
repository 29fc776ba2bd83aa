"""``CropPredictor``: one crop of one volume is sampled, encoded once, and decoded for any prompts.

Features are kept per crop, so a later click costs one decode. Positions are canonical zyx voxels of the volume. Read
``models/base.py`` next.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from samed3d.crops import BACKGROUND_LOGIT, is_ct, normalise, paste_crop, sample_crop
from samed3d.devices import computes_bf16
from samed3d.geometry import EMPTY_REGION, CropFrame, IntTriple, Region, Triple, as_triple, bounding_region
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.models.base import Features, PromptableModel, PromptBatch
from samed3d.prompts import MASK_LOGIT_THRESHOLD, PackedMask
from samed3d.volume import Volume

logger = logging.getLogger(__name__)

CLEAR_LOGIT = -1.0
"""Voxels below it are clear background, which no prompt need push down further."""
CACHED_CROPS = 4
"""Least number of crops whose features are kept."""
CACHED_MIB = 96
"""Features of more crops are kept up to this size: the 27 tiles of a model like SAM-Med3D, so that a click encodes none
of them again."""


@dataclass
class CropMask:
    """A decoded crop."""

    frame: CropFrame  # where it lies
    logits: Tensor  # (D, H, W) on the crop's grid
    inside: Tensor  # (D, H, W) bool, the crop's voxels inside the volume
    iou: float  # predicted
    lowres_logits: Tensor  # (1, 1, d, h, w) on the model's axes, an input of the next decode


@dataclass(frozen=True)
class Canvas:
    """Logits of the canonical volume, computed where they are needed: at once they may need more memory than the image.

    Where ``values`` is None, they follow from ``crop``, what was predicted in and around ``region``; where both are
    None, all is background. Everything outside ``region`` is below ``CLEAR_LOGIT``.
    """

    region: Region = EMPTY_REGION
    values: Tensor | None = None  # (D, H, W) of the region, of any type
    crop: CropMask | None = None
    corrections: tuple[Callable[[Region, Tensor], None], ...] = ()  # each changes a region's logits in place

    @property
    def logits(self) -> Tensor:
        """The logits (D, H, W) of ``region``."""
        return self.on_region(self.region)

    def on_region(self, region: Region) -> Tensor:
        """The logits (D, H, W) of any region of the volume."""
        logits = torch.full(region.shape_zyx, BACKGROUND_LOGIT)
        if self.crop is not None:
            under, values = paste_crop(self.crop.logits, self.crop.frame, region.stop_zyx, region)
            if not under.is_empty:
                logits[under.slices_in(region)] = values
        common = self.region.intersection(region)
        if self.values is not None and not common.is_empty:
            logits[common.slices_in(region)] = self.values[common.slices_in(self.region)].float()
        for correct in self.corrections:
            correct(region, logits)
        return logits

    def mask(self, shape_zyx: IntTriple) -> PackedMask:
        """The object on a volume of that shape."""
        inside = np.empty(self.region.shape_zyx, bool)
        for part in self.region.slabs():
            inside[part.slices_in(self.region)] = self.on_region(part) > MASK_LOGIT_THRESHOLD
        return PackedMask.of_part(inside, self.region, shape_zyx)

    @property
    def shape(self) -> IntTriple:
        """Of ``region``: ``sample_crop`` takes a canvas as an array whose slabs are computed one by one."""
        return self.region.shape_zyx

    def __getitem__(self, index: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        part = Region(tuple(s.start for s in index), tuple(s.stop for s in index)).shifted(self.region.start_zyx)
        return self.on_region(part).numpy()

    def on_frame(self, frame: CropFrame) -> Tensor:
        """The logits (D, H, W) resampled to a crop's grid."""
        moved = frame.shifted(as_triple([-float(a) for a in self.region.start_zyx]))
        near, inside = sample_crop(self, moved)
        around: Tensor | float = BACKGROUND_LOGIT
        if self.crop is not None:
            far, under = sample_crop(self.crop.logits.numpy(), frame.in_crop(self.crop.frame))
            around = torch.where(under, far, BACKGROUND_LOGIT)
        return torch.where(inside, near, around)


class CropPredictor:
    """A model in eval mode, moved to ``device``, on one volume.

    Of the canonical (D, H, W) array only crops are read. A model's clamp for CT is for CT only (``crops.is_ct``).
    """

    def __init__(
        self, model: PromptableModel, device: torch.device, array: NDArray, spacing_zyx_mm: Triple, modality: str = ""
    ) -> None:
        self.model, self.device = model.to(device), device
        self.array, self.spacing_zyx_mm = array, spacing_zyx_mm
        self.shape_zyx: IntTriple = (array.shape[0], array.shape[1], array.shape[2])
        clamp = model.spec.ct_clamp_hu
        self._clamp = clamp if clamp is not None and is_ct(modality, array) else None
        # The spec's shape is on the tensor's own axes.
        d, h, w = model.spec.input_shape_zyx
        self.crop_shape: IntTriple = (d, h, w) if model.spec.tensor_axes == "zyx" else (w, h, d)
        self._features: OrderedDict[CropFrame, tuple[Features, Tensor]] = OrderedDict()

    @classmethod
    def of(cls, model: PromptableModel, device: torch.device, volume: Volume) -> CropPredictor:
        """A model on the canonical view of a volume."""
        view = volume.view
        return cls(model, device, view.to_canonical(volume.array), view.spacing_zyx_mm, volume.modality)

    @torch.inference_mode()
    def decode(self, frame: CropFrame, prompts: ModelPrompts, mask_logits: Tensor | None = None) -> CropMask:
        """The mask of one crop for all of an object's prompts; points outside the crop are left out.

        ``mask_logits`` are (1, 1, d, h, w) ``CropMask.lowres_logits`` of this crop or ``lowres_of`` a canvas, if any.
        """
        features, inside = self._encode(frame)
        with self._precision():
            output = self.model.decode(features, self._batch(frame, prompts, mask_logits))
        logits = output.logits[0, 0].float().cpu()
        if self.model.spec.tensor_axes == "xyz":
            logits = logits.permute(2, 1, 0)
        return CropMask(frame, logits.contiguous(), inside, float(output.iou[0, 0]), output.lowres_logits)

    def lowres_of(self, canvas: Canvas, frame: CropFrame, like: Tensor | None = None) -> Tensor:
        """A canvas's logits as ``mask_logits`` of a crop; the shape is that of ``like``, else found with one decode."""
        if like is None:
            middle = frame.to_volume(as_triple([n / 2 for n in frame.shape_zyx]))
            like = self.decode(frame, ModelPrompts([(middle, True)])).lowres_logits
        logits = canvas.on_frame(frame)
        if self.model.spec.tensor_axes == "xyz":
            logits = logits.permute(2, 1, 0)
        d, h, w = like.shape[2:]
        return F.adaptive_avg_pool3d(logits[None, None].to(self.device), (d, h, w))

    def paste(self, crop: CropMask) -> Canvas:
        """The crop's logits on the volume's own voxels; its region is where they may not be clear background."""
        logits = torch.where(crop.inside, crop.logits, -math.inf)
        near = bounding_region((logits >= min(CLEAR_LOGIT, float(logits.max()))).numpy())
        near = near.expand(1).clip(crop.frame.shape_zyx)
        region = crop.frame.part(near).region().expand(1)
        return Canvas(region.intersection(crop.frame.region()).clip(self.shape_zyx), crop=crop)

    @property
    def nbytes(self) -> int:
        """Memory of the kept features."""
        return sum(_size_of(*kept) for kept in self._features.values())

    def clear(self) -> None:
        """Delete all kept features."""
        self._features.clear()

    def _encode(self, frame: CropFrame) -> tuple[Features, Tensor]:
        if frame in self._features:
            self._features.move_to_end(frame)
            return self._features[frame]
        edges = [f"{e * s:.0f}" for e, s in zip(frame.extent_zyx_vox, self.spacing_zyx_mm, strict=True)]
        logger.info("encoding a crop of %s mm", " x ".join(edges))
        crop, inside = sample_crop(self.array, frame)
        spec = self.model.spec
        image = normalise(crop, inside, spec.normalisation, self._clamp)
        if spec.tensor_axes == "xyz":
            image = image.permute(0, 3, 2, 1)
        with self._precision():
            self._features[frame] = (self.model.encode(image[None].contiguous().to(self.device)), inside)
        most = max(CACHED_CROPS, CACHED_MIB * 2**20 // _size_of(*self._features[frame]))
        while len(self._features) > most:
            self._features.popitem(last=False)
        return self._features[frame]

    def _precision(self) -> AbstractContextManager[object]:
        """bf16 where the weights were trained in it and the processor computes in it."""
        enabled = self.model.spec.bf16 and computes_bf16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def _batch(self, frame: CropFrame, prompts: ModelPrompts, mask_logits: Tensor | None) -> PromptBatch:
        spec = self.model.spec
        points = [(frame.to_crop(at), positive) for at, positive in prompts.points if frame.contains(at)]
        if spec.click_memory == "newest":
            points = points[-1:]
        positions = torch.tensor([_axes(at, spec.tensor_axes) for at, _ in points], dtype=torch.float32)
        labels = torch.tensor([[int(positive) for _, positive in points]], dtype=torch.int64).reshape(1, -1)
        batch = PromptBatch(
            positions.reshape(1, -1, 3).to(self.device), labels.to(self.device), mask_logits=mask_logits
        )
        if prompts.box is not None and "box" in spec.prompts:
            # Corners are voxel edges; an edge at e lies half a voxel below the centre e.
            corners = [frame.to_crop(as_triple([v - 0.5 for v in corner])) for corner in prompts.box]
            edges = [
                [min(max(v + 0.5, 0.0), float(n)) for v, n in zip(c, frame.shape_zyx, strict=True)] for c in corners
            ]
            batch.boxes = torch.tensor([[_axes(as_triple(e), spec.tensor_axes) for e in edges]], device=self.device)
        return batch


def _size_of(features: Features, inside: Tensor) -> int:
    """Bytes."""
    return inside.nbytes + sum(tensor.nbytes for tensor in features.values())


def _axes(values: Triple, tensor_axes: str) -> Triple:
    """zyx values in the order of the model's tensor axes."""
    return values if tensor_axes == "zyx" else (values[2], values[1], values[0])

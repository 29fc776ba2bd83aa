"""SAM-Med3D-MoE: several decoders on one frozen image encoder, and a small gate that chooses whose mask is taken.

The general model stays as it is. An expert is what a fine-tune of its decoder changed, nothing else, so each costs only
its own tensors and the features of a crop serve all of them. The gate sees image and prompts; below its threshold the
general decoder answers, bit for bit as it would alone. Any promptable model can be the base. ``training/moe.py`` makes
experts from checkpoints and trains the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from samed3d.errors import InputError
from samed3d.models.base import Features, MaskOutput, PromptableModel, PromptBatch
from samed3d.nn.prompt_batch import NEGATIVE, PADDING, POSITIVE
from samed3d.nn.prompt_maps import sample_at

SOURCE = "SAM-Med3D-MoE (Wang et al., 2024, arXiv:2407.04938)"
GEOMETRY = 12
"""Numbers on where the prompts are: mean click on and off the object, the box's corners."""


class Decoder(nn.Module):
    """``decode`` as the forward of a module, so that it can be called with other tensors."""

    def __init__(self, model: PromptableModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """As ``PromptableModel.decode``."""
        return self.model.decode(features, prompts)


class Gate(nn.Module):
    """Image and prompts to one logit per decoder, the general one first.

    It sees the mean and spread of the coarsest features, what lies under the clicks on and off the object (the middle
    of a box counts as a click on it), and where the prompts are, as shares of the crop's shape.
    """

    def __init__(self, channels: int, decoders: int, hidden: int, crop: tuple[int, ...]) -> None:
        super().__init__()
        self.crop = crop
        self.norm = nn.LayerNorm(4 * channels)
        self.layers = nn.Sequential(nn.Linear(4 * channels + GEOMETRY, hidden), nn.GELU(), nn.Linear(hidden, decoders))

    def forward(self, image: Tensor, prompts: PromptBatch) -> Tensor:
        """(B, C, d, h, w) features and the prompts to (B, decoders)."""
        image = image.float()
        size = torch.tensor(self.crop, device=image.device, dtype=torch.float32)
        points, labels = prompts.points.float(), prompts.point_labels
        corners = image.new_zeros(image.shape[0], 2, 3)
        if prompts.boxes is not None:
            given, boxes = prompts.has_box(), prompts.boxes.float()
            corners = torch.where(given[:, None, None], boxes / size, corners)
            points = torch.cat([points, boxes.mean(dim=1, keepdim=True) - 0.5], dim=1)
            labels = torch.cat([labels, torch.where(given, POSITIVE, PADDING)[:, None].to(labels.dtype)], dim=1)
        under = sample_at(image, points, self.crop[0] / image.shape[2])
        flat = image.flatten(2)
        seen, where = [flat.mean(2), flat.std(2)], [corners.flatten(1)]
        for label in (POSITIVE, NEGATIVE):
            there = (labels == label).float()[..., None]
            count = there.sum(1).clamp(min=1)
            seen.append((under * there).sum(1) / count)
            where.append((((points + 0.5) / size) * there).sum(1) / count)
        return self.layers(torch.cat([self.norm(torch.cat(seen, dim=1)), *where], dim=1))


class MixtureOfExperts(PromptableModel):
    """See the file's docstring. Only the gate learns; the general model is frozen.

    Args:
        general: The base model.
        feature: Name of the features that the gate reads, as ``coarsest_feature`` gives it.
        channels: Their channels.
        experts: Name of each expert to the names of the base's tensors that it has its own version of.
        threshold: Least probability of an expert for it to be chosen, 0 to 1; above 1 the general model always answers.
        hidden: Hidden channels of the gate.
        config: What rebuilds it.
    """

    prompt_parts = ("gate",)

    def __init__(
        self,
        general: PromptableModel,
        feature: str,
        channels: int,
        experts: Mapping[str, Sequence[str]],
        threshold: float,
        hidden: int,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        if not experts:
            raise InputError("experts must name at least one expert, got none; the base model alone needs no mixture")
        own = general.state_dict()
        if unknown := sorted({n for names in experts.values() for n in names} - set(own)):
            found, remedy = ", ".join(unknown[:3]), "take experts of the same base"
            raise InputError(f"experts must bring tensors of the base model, got {found}; {remedy}")
        self.config, self.feature, self.threshold = config, feature, threshold
        base = general.spec
        self.spec = replace(base, name="sam_med3d_moe", source=f"{SOURCE}; base {base.name}")
        self.encoder_parts = tuple(f"general.model.{part}" for part in general.encoder_parts)
        self.names = tuple(experts)
        self.general = Decoder(general).requires_grad_(False)
        self.experts = nn.ModuleList()
        for names in experts.values():
            tensors = nn.Module()
            for name in names:  # a parameter's name may hold no dot
                tensor = nn.Parameter(own[name].detach().clone(), requires_grad=False)
                tensors.register_parameter(name.replace(".", "/"), tensor)
            self.experts.append(tensors)
        self.gate = Gate(channels, 1 + len(experts), hidden, base.input_shape_zyx)

    def encode(self, image: Tensor) -> Features:
        """The base's features: one pass for all decoders."""
        return self.general.model.encode(image)

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """The mask of the decoder that the gate chooses for each sample; only chosen ones run."""
        chosen = self.choose(features, prompts)
        if chosen.is_meta:  # shapes without numbers: one decoder runs, whichever it is
            return self.decode_by(0, features, prompts)
        first, *others = sorted(set(chosen.tolist()))
        out = self.decode_by(first, features, prompts)
        for index in others:
            mine, other = chosen == index, self.decode_by(index, features, prompts)
            volume = mine[:, None, None, None, None]
            out = MaskOutput(
                torch.where(volume, other.logits, out.logits),
                torch.where(mine[:, None], other.iou, out.iou),
                torch.where(volume, other.lowres_logits, out.lowres_logits),
            )
        return out

    def choose(self, features: Features, prompts: PromptBatch) -> Tensor:
        """(B,) whose mask is taken: 0 the general decoder, i the i-th expert."""
        return self.select(self.gate(features[self.feature], prompts))

    def select(self, logits: Tensor) -> Tensor:
        """(B, 1 + experts) gate logits to the choice (B,): the likeliest expert if it reaches the threshold, else 0."""
        probability, best = logits.softmax(dim=1)[:, 1:].max(dim=1)
        return torch.where(probability >= self.threshold, best + 1, 0)

    def decode_by(self, index: int, features: Features, prompts: PromptBatch) -> MaskOutput:
        """The mask of one decoder, whatever the gate says; 0 is the general one."""
        if index == 0:
            return self.general(features, prompts)
        own = self.experts[index - 1].named_parameters()
        tensors: dict[str, Tensor] = {f"model.{name.replace('/', '.')}": tensor for name, tensor in own}
        return functional_call(self.general, tensors, (features, prompts))


def coarsest_feature(model: PromptableModel) -> tuple[str, int]:
    """Name and channels of the features with the fewest voxels, then the most channels (model on the meta device)."""
    with torch.device("meta"), torch.no_grad():
        features = model.encode(torch.empty(1, *model.spec.image_shape))
    maps = {name: tensor for name, tensor in features.items() if tensor.ndim == 5}
    name = min(maps, key=lambda key: (maps[key][0, 0].numel(), -maps[key].shape[1]))
    return name, maps[name].shape[1]

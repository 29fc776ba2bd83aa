"""SAM3D: a frozen 2D encoder sees every slice, a light 3D decoder segments all classes. No prompts.

The encoder is built once, outside the state dict; slices are folded into its batch, a few at a time. Its features can
be kept on disk, which pays where the same crops come again (no augmentation).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Triple
from samed3d.models.base import ModelEntry, SemanticModel
from samed3d.models.sam_backbone import BackboneConfig, FrozenParts
from samed3d.output import replacing

SOURCE = "SAM3D (Bui et al., ISBI 2024, arXiv:2309.03493), code of UARK-AICV/SAM3D"
DECODER_STRIDE = 16
"""The decoder doubles slices four times."""
SUPERVISION = (4 / 7, 2 / 7, 1 / 7)


@dataclass(frozen=True)
class Sam3DConfig(BackboneConfig):
    """Numbers of a SAM3D, beside those of ``BackboneConfig``; the backbone may be any.

    Attributes:
        input_shape: Crop (D, H, W) in voxels; D is free, H and W multiples of 16 and of the encoder's patch.
        in_channels: Image modalities; each is encoded alone.
        spacing_zyx_mm: Spacing of the crops, or None for each image's own.
        widths: Channels of the four decoder blocks.
        chunk: Slices encoded at once; bounds memory.
    """

    class_names: tuple[str, ...] = tuple(f"class {i}" for i in range(1, 14))
    input_shape: IntTriple = (64, 176, 176)
    in_channels: int = 1
    spacing_zyx_mm: Triple | None = None
    widths: tuple[int, int, int, int] = (128, 64, 32, 16)
    chunk: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise InputError(f"chunk must be at least 1 slice, got {self.chunk}")
        if any(n % DECODER_STRIDE for n in self.input_shape[1:]):
            rule = f"have H and W that are multiples of {DECODER_STRIDE}"
            raise InputError(f"input_shape must {rule}, got {self.input_shape}")


class ResidualUp(nn.Module):
    """Two 3x3x3 convolutions beside a 1x1x1 one, summed, then slices doubled in size (nearest); depth stays."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv3d(before, after, kernel_size=3, padding=1),
            nn.InstanceNorm3d(after),
            nn.LeakyReLU(0.01),
            nn.Conv3d(after, after, kernel_size=3, padding=1),
            nn.InstanceNorm3d(after),
        )
        self.residual = nn.Sequential(nn.Conv3d(before, after, kernel_size=1), nn.InstanceNorm3d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, D, H, W) to (B, after, D, 2H, 2W)."""
        x = F.leaky_relu(self.main(x) + self.residual(x), 0.01)
        return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")


def _head(channels: int, classes: int) -> nn.Sequential:
    half = channels // 2
    first = nn.Conv3d(channels, half, kernel_size=3, padding=1)
    return nn.Sequential(first, nn.InstanceNorm3d(half), nn.LeakyReLU(0.01), nn.Conv3d(half, classes, kernel_size=1))


class Sam3D(FrozenParts, SemanticModel):
    """SAM3D; ``feature_cache`` is a folder that keeps encoder features by the content of the crop.

    Source: the paper's section 2; what it calls skip connections are the residual branches inside the decoder blocks,
    as in the code.
    """

    encoder_parts = ("image_encoder",)

    def __init__(self, config: Sam3DConfig, feature_cache: str | Path | None = None) -> None:
        super().__init__()
        c = config
        encoder, _ = self.open_backbone(c, any_encoder=True)
        self.spec = c.semantic_spec("sam3d", SOURCE, in_channels=c.in_channels)
        self.feature_cache = None if feature_cache is None else Path(feature_cache)
        self.image_encoder = encoder.eval()
        self.freeze(f"image_encoder.{name}" for name, _ in encoder.named_parameters())
        widths = [encoder.out_dim * c.in_channels, *c.widths]
        self.blocks = nn.ModuleList(ResidualUp(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.heads = nn.ModuleList(_head(n, self.spec.classes) for n in widths[:1:-1])

    def train(self, mode: bool = True) -> Sam3D:
        """The frozen encoder stays in eval mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    def encode(self, image: Tensor) -> Tensor:
        """Frozen features (B, M * C, D, H / 16, W / 16), without gradient, of (B, M, D, H, W) normalised crops.

        Raises:
            InputError: if the channels or the edges do not fit.
        """
        batch, channels, depth, height, width = image.shape
        if channels != self.spec.in_channels or height % DECODER_STRIDE or width % DECODER_STRIDE:
            rule = f"(B, {self.spec.in_channels}, D, H, W) with H and W multiples of {DECODER_STRIDE}"
            raise InputError(f"image must be {rule} for {self.spec.name}, got {tuple(image.shape)}")
        volumes = [self._features(volume) for volume in image.flatten(0, 1)]
        return torch.stack(volumes).reshape(batch, -1, depth, height // DECODER_STRIDE, width // DECODER_STRIDE)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of (B, M, D, H, W) crops."""
        return self._decode(self.encode(image))[0]

    def forward_supervised(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """Logits at full, half and quarter slice size with weights 4/7, 2/7 and 1/7."""
        return list(zip(SUPERVISION, self._decode(self.encode(image), outputs=3), strict=True))

    def _decode(self, x: Tensor, outputs: int = 1) -> list[Tensor]:
        """Logits from the finest on; the last block's output is at full size."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return [head(features) for head, features in zip(self.heads[:outputs], maps[::-1], strict=False)]

    @torch.no_grad()
    def _features(self, volume: Tensor) -> Tensor:
        """(D, H, W) to (C, D, H / 16, W / 16), from the cache where it has them."""
        path = self._cache_path(volume)
        if path is not None and path.exists():
            return torch.from_numpy(np.load(path)).to(volume)
        parts = []
        for slices in repeat(volume, "d h w -> d 3 h w").split(self.numbers.chunk):
            part = self.image_encoder(slices)
            size = [n // DECODER_STRIDE for n in slices.shape[2:]]
            if list(part.shape[2:]) != size:  # a timm encoder of another patch
                part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
            parts.append(part)
        features = torch.cat(parts).transpose(0, 1)
        if path is not None:
            with replacing(path) as partial:
                np.save(partial, features.float().cpu().numpy())
        return features

    def _cache_path(self, volume: Tensor) -> Path | None:
        if self.feature_cache is None:
            return None
        self.feature_cache.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{self.numbers.backbone_sha256} {tuple(volume.shape)}".encode())
        digest.update(volume.float().cpu().contiguous().numpy().data)
        return self.feature_cache / f"{digest.hexdigest()}.npy"


def _build(feature_cache: str | None = None, **overrides: Any) -> Sam3D:
    return Sam3D(replace(Sam3DConfig(), **overrides), feature_cache)  # the cache is not stored with the model


MODELS = {  # as published for 13 organs (Synapse)
    "sam3d": ModelEntry(
        _build,
        {"input_shape": (6, 32, 32), "class_names": ("a", "b"), "backbone": "sam_vit_tiny", "widths": (8, 8, 8, 8)},
    )
}

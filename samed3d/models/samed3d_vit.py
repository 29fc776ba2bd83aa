"""Our own vision transformers for clicks, boxes and masks: SAM-Med3D's blocks without its quirks, and edges at full
resolution.

Tokens attend globally, so nothing is padded; positions of points, boxes and features share one frame; padded prompts
are masked out. A convolutional stem feeds the tokens and keeps a finer feature map for the decoder's upscaling; a small
head that also sees the image refines the mask at the crop's own resolution. Read ``nn/vit.py`` next, or
``sam_med3d.py`` for the released architecture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch
from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_encoder import PromptEncoder
from samed3d.nn.unet import depth_to_space, space_to_depth
from samed3d.nn.vit import ConvStem, ImageEncoder


@dataclass(frozen=True)
class Samed3DVitConfig:
    """Numbers of a ``Samed3DVit``.

    Attributes:
        input_shape: Crop shape in voxels (z, y, x); multiples of ``patch``, not necessarily a cube.
        patch: Voxels per token edge, a power of two >= 4.
        dim: Encoder channels.
        depth: Encoder blocks, all global.
        heads: Encoder attention heads.
        prompt_dim: Channels of the prompt encoder and the mask decoder; a multiple of 16.
        stem_width: Channels of the stem's first stage.
        maps: Mask tokens; the first gives the low-resolution mask, all of them guide the refinement.
        refine_width: Hidden channels of the refinement.
        decoder_heads: Attention heads of the mask decoder.
    """

    input_shape: IntTriple
    patch: int
    dim: int
    depth: int
    heads: int
    prompt_dim: int
    stem_width: int
    maps: int = 4
    refine_width: int = 16
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        if self.patch < 4 or self.patch & (self.patch - 1):
            raise InputError(f"patch must be a power of two of at least 4, got {self.patch}")
        shape = tuple(int(n) for n in self.input_shape)
        if len(shape) != 3 or any(n <= 0 or n % self.patch for n in shape):
            raise InputError(f"input_shape must be three multiples of the patch ({self.patch}), got {shape}")
        object.__setattr__(self, "input_shape", shape)

    @property
    def grid(self) -> IntTriple:
        """Tokens along z, y, x."""
        d, h, w = (n // self.patch for n in self.input_shape)
        return (d, h, w)


class Refinement(nn.Module):
    """Corrects an upsampled mask at full resolution with what the image shows there; the image's part is computed once
    per crop.

    It computes on the half-resolution grid, whose voxels hold and predict their eight full-resolution voxels, so no
    detail is lost and no convolution runs on the full grid.

    Args:
        maps: Low-resolution logit maps.
        width: Hidden channels.
    """

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        self.from_image = nn.Sequential(
            nn.Conv3d(8, width, kernel_size=3, padding=1), nn.GELU(), nn.Conv3d(width, width, kernel_size=3, padding=1)
        )
        self.from_maps = nn.Conv3d(maps, width, kernel_size=3, padding=1, bias=False)
        self.out = nn.Conv3d(width, 8, kernel_size=3, padding=1)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to (B, width, D/2, H/2, W/2)."""
        return self.from_image(space_to_depth(image))

    def forward(self, maps: Tensor, detail: Tensor) -> Tensor:
        """(B, maps, d, h, w) logit maps and ``encode``'s features to logits (B, 1, D, H, W)."""
        half = F.interpolate(maps, size=detail.shape[2:], mode="trilinear", align_corners=False)
        change = depth_to_space(self.out(F.gelu(detail + self.from_maps(half))))
        return change + F.interpolate(maps[:, :1], size=change.shape[2:], mode="trilinear", align_corners=False)


class Samed3DVit(PromptableModel):
    """Promptable 3D vision transformer of our own; every click, boxes, mask prompts, a trained no-mask state and IoU
    head.

    Args:
        name: Registry name.
        config: Its numbers.
    """

    encoder_parts = ("stem", "image_encoder", "skip", "refinement.from_image")

    def __init__(self, name: str, config: Samed3DVitConfig) -> None:
        super().__init__()
        c = config
        self.numbers, self.config = c, asdict(c)
        self.spec = ModelSpec(name=name, input_shape_zyx=c.input_shape, source="samed3d; blocks of SAM and SAM-Med3D")
        self.stem = ConvStem(c.patch, c.stem_width, c.dim)
        self.image_encoder = ImageEncoder(
            None, c.grid, c.dim, c.depth, c.heads, 0, (), c.prompt_dim, misbroadcast_relpos=False, pad_sink=False
        )
        nn.init.trunc_normal_(self.image_encoder.pos_embed, std=0.02)
        self.prompt_encoder = PromptEncoder(
            c.prompt_dim, c.grid, c.input_shape, boxes=True, sin_cos_sin=False, swap_pe_axes=False, pad_point=False
        )
        self.mask_decoder = MaskDecoder(
            c.prompt_dim, c.decoder_heads, 4 * c.prompt_dim, mask_tokens=c.maps, iou_outputs=1
        )
        self.skip = nn.Conv3d(self.stem.fine_channels, c.prompt_dim // 8, kernel_size=1)
        self.refinement = Refinement(c.maps, c.refine_width)

    def encode(self, image: Tensor) -> Features:
        """Features of a (B, 1, *input_shape) crop.

        Returns:
            ``image`` (B, prompt_dim, d, h, w), ``skip`` (B, prompt_dim/8, 4d, 4h, 4w), ``detail`` (B, refine_width,
            D/2, H/2, W/2).

        Raises:
            InputError: if the crop has another shape.
        """
        d, h, w = self.numbers.input_shape
        if tuple(image.shape[1:]) != (1, d, h, w):
            raise InputError(
                f"image must be (B, 1, {d}, {h}, {w}) for {self.spec.name}, got {tuple(image.shape)}; resample the crop"
            )
        tokens, fine = self.stem(image)
        return {"image": self.image_encoder(tokens), "skip": self.skip(fine), "detail": self.refinement.encode(image)}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W); ``iou`` in [0, 1]; ``lowres_logits`` has four voxels per token edge."""
        image = features["image"]
        sparse, valid = self.prompt_encoder.embed_points(prompts.points, prompts.point_labels)
        if prompts.boxes is not None:
            corners, corners_valid = self.prompt_encoder.embed_boxes(prompts.boxes, prompts.box_valid)
            sparse, valid = torch.cat([sparse, corners], 1), torch.cat([valid, corners_valid], 1)
        dense = self.prompt_encoder.embed_mask(prompts.mask_logits, image.shape[0], prompts.mask_valid)
        positions = self.prompt_encoder.dense_positions()
        maps, iou = self.mask_decoder(
            image, positions, sparse, dense, self.numbers.maps, sparse_valid=valid, skip=features["skip"]
        )
        return MaskOutput(self.refinement(maps, features["detail"]), iou.sigmoid(), maps[:, :1])


def samed3d_tiny(**overrides: Any) -> Samed3DVit:
    """64^3 crops, 8^3 tokens of 192 channels, 6 blocks: for quick experiments."""
    config = Samed3DVitConfig(
        input_shape=(64, 64, 64), patch=8, dim=192, depth=6, heads=6, prompt_dim=128, stem_width=16
    )
    return Samed3DVit("samed3d_tiny", replace(config, **overrides))


def samed3d_small(**overrides: Any) -> Samed3DVit:
    """64^3 crops, 8^3 tokens of 384 channels, 6 blocks."""
    config = Samed3DVitConfig(
        input_shape=(64, 64, 64), patch=8, dim=384, depth=6, heads=6, prompt_dim=192, stem_width=16
    )
    return Samed3DVit("samed3d_small", replace(config, **overrides))


def samed3d_base(**overrides: Any) -> Samed3DVit:
    """128^3 crops, 8^3 tokens of 768 channels, 12 blocks: the size of SAM-Med3D."""
    config = Samed3DVitConfig(
        input_shape=(128, 128, 128), patch=16, dim=768, depth=12, heads=12, prompt_dim=384, stem_width=16
    )
    return Samed3DVit("samed3d_base", replace(config, **overrides))

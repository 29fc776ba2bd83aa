"""Our own vision transformers for clicks, boxes and masks: SAM-Med3D's blocks without its quirks, edges at full detail.

Tokens attend globally, so nothing is padded; positions of points, boxes and features share one frame; padded prompts
are masked out. A convolutional stem feeds the tokens and keeps a finer feature map for the decoder's upscaling; a small
head that also sees the image refines the mask at the crop's own resolution.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import ArchitectureConfig, Features, MaskOutput, ModelSpec, PromptableModel, family
from samed3d.nn.attention import GridAttention
from samed3d.nn.layers import depth_to_space, space_to_depth
from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_encoder import PromptEncoder
from samed3d.nn.vit import ConvStem, ImageEncoder, token_grid


@dataclass(frozen=True)
class Samed3DVitConfig(ArchitectureConfig):
    """Numbers of a ``Samed3DVit``.

    Attributes:
        input_shape: Crop shape in voxels (z, y, x); multiples of ``patch``, not necessarily a cube.
        patch: Voxels per token edge, a power of two >= 4.
        dim, depth, heads: Channels, blocks (all global) and attention heads of the encoder.
        prompt_dim: Channels of the prompt encoder and the mask decoder; a multiple of 16.
        stem_width: Channels of the stem's first stage.
        maps: Mask tokens; the first gives the low-resolution mask, all of them guide the refinement.
        refine_width: Hidden channels of the refinement.
        decoder_heads: Attention heads of the mask decoder.
    """

    input_shape: IntTriple = (64, 64, 64)
    patch: int = 8
    dim: int = 384
    depth: int = 6
    heads: int = 6
    prompt_dim: int = 192
    stem_width: int = 16
    maps: int = 4
    refine_width: int = 16
    decoder_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 4 or self.patch & (self.patch - 1):
            raise InputError(f"patch must be a power of two of at least 4, got {self.patch}")
        token_grid(self.input_shape, self.patch)


class Refinement(nn.Module):
    """Corrects an upsampled mask at full resolution with what the image shows there, computed once per crop.

    It computes on the half-resolution grid, whose voxels hold and predict their eight full-resolution voxels, so no
    detail is lost and no convolution runs on the full grid.
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
    """Our promptable 3D vision transformer: all clicks, boxes, mask prompts, a trained no-mask state and IoU head."""

    encoder_parts = ("stem", "image_encoder", "skip", "refinement.from_image")

    def __init__(self, name: str, config: Samed3DVitConfig) -> None:
        super().__init__()
        c = config
        self.config = asdict(c)
        self.spec = ModelSpec(name=name, input_shape_zyx=c.input_shape, source="samed3d; blocks of SAM and SAM-Med3D")
        self.stem = ConvStem(c.patch, c.stem_width, c.dim)
        grid = token_grid(c.input_shape, c.patch)
        attentions = (GridAttention(c.dim, c.heads, grid) for _ in range(c.depth))
        self.image_encoder = ImageEncoder(None, attentions, grid, c.dim, c.prompt_dim)
        nn.init.trunc_normal_(self.image_encoder.pos_embed, std=0.02)
        self.prompt_encoder = PromptEncoder(c.prompt_dim, grid, c.input_shape)
        self.mask_decoder = MaskDecoder(c.prompt_dim, c.decoder_heads, 4 * c.prompt_dim, c.maps, iou_outputs=1)
        self.skip = nn.Conv3d(self.stem.fine_channels, c.prompt_dim // 8, kernel_size=1)
        self.refinement = Refinement(c.maps, c.refine_width)

    def encode(self, image: Tensor) -> Features:
        """``image`` (B, prompt_dim, d, h, w), ``skip`` (B, prompt_dim/8, 4d, 4h, 4w), ``detail`` (B, refine_width, D/2,
        H/2, W/2) of a (B, 1, *input_shape) crop.
        """
        self.spec.check_image(image)
        tokens, fine = self.stem(image)
        return {"image": self.image_encoder(tokens), "skip": self.skip(fine), "detail": self.refinement.encode(image)}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W); ``iou`` in [0, 1]; ``lowres_logits`` has four voxels per token edge."""
        tokens, valid, dense = self.prompt_encoder(prompts)
        positions = self.prompt_encoder.dense_positions()
        maps, iou = self.mask_decoder(
            features["image"], positions, tokens, dense, sparse_valid=valid, skip=features["skip"]
        )
        return MaskOutput(self.refinement(maps, features["detail"]), iou.sigmoid(), maps[:, :1])


MODELS = family(
    Samed3DVit,
    {
        "samed3d_tiny": Samed3DVitConfig(dim=192, prompt_dim=128),  # for quick experiments
        "samed3d_small": Samed3DVitConfig(),
        "samed3d_base": Samed3DVitConfig(  # the size of SAM-Med3D
            (128, 128, 128), patch=16, dim=768, depth=12, heads=12, prompt_dim=384
        ),
    },
    tiny={
        "input_shape": (16, 16, 16),
        "patch": 8,
        "dim": 24,
        "depth": 2,
        "heads": 2,
        "prompt_dim": 32,
        "stem_width": 4,
    },
)

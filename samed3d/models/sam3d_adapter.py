"""3DSAM-adapter: SAM's 2D transformer made 3D, with clicks (``sam3d_adapter``) or semantic (``sam3d_adapter_auto``).

The encoder is in ``nn/vit2d_to_3d.py``. Clicks are understood as the paper has them: the features under positive
clicks, without position or sign; a negative click is left out. Written from the paper and a description of the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, SemanticModel, family, own_overlap
from samed3d.models.sam_backbone import BackboneConfig, FrozenParts
from samed3d.nn.mask_decoder import TwoWayBlock
from samed3d.nn.prompt_batch import POSITIVE, PromptBatch
from samed3d.nn.vit2d_to_3d import LiftedEncoder

SOURCE = "3DSAM-adapter (Gong et al., Medical Image Analysis 2024, arXiv:2306.13465)"
QUERIES = 10


@dataclass(frozen=True)
class Sam3DAdapterConfig(BackboneConfig):
    """Numbers and switches of a 3DSAM-adapter, beside those of ``BackboneConfig``.

    Attributes:
        class_names: What the semantic variant segments, background not listed; unused by the promptable one.
        input_shape: Crop (D, H, W) in voxels; after upsampling multiples of a window (8 tokens of 16 voxels).
        spacing_mm: Isotropic spacing of the crops, or None for any.
        upsample: How many times finer the encoder sees the crop: 4 for 128^3, 2 for 256^3 (semantic).
        window: Window edge of attention in tokens; every second block is shifted by half of it.
        taps: After which blocks features are taken (1-based), the last one being prompted.
        channels: Channels inside the decoder.
        zero_adapters: Start the spatial adapters at (almost) no change; the released code starts them at random.
        token_attention: Use the attention from tokens to image, which the released code builds, counts and never calls.
    """

    spacing_mm: float | None = 1.0
    upsample: int = 4
    window: int = 8
    taps: tuple[int, ...] = (3, 6, 9, 12)
    channels: int = 128
    zero_adapters: bool = False
    token_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n * self.upsample % (16 * self.window) for n in self.input_shape):
            rule = f"hold multiples of {16 * self.window // self.upsample} voxels (a window of tokens)"
            raise InputError(f"input_shape must {rule}, got {self.input_shape}")

    @property
    def grid(self) -> IntTriple:
        """Tokens along each axis."""
        d, h, w = (n * self.upsample // 16 for n in self.input_shape)
        return (d, h, w)


class SamplerBlock(TwoWayBlock):
    """Sampled features and learned queries attend to each other, then the map attends to the queries.

    The layers are those of ``TwoWayBlock``, whose forward differs: nothing has positions, only the queries go on.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, token_attention: bool) -> None:
        super().__init__(dim, heads, mlp_dim)
        self.queries = nn.Parameter(0.1 * torch.randn(QUERIES, dim))
        self.token_attention = token_attention

    def forward(self, image: Tensor, points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map (B, N, C) and point tokens (B, P, C), of which ``valid`` (B, P) count; both, updated."""
        own = self.queries[None].expand(image.shape[0], -1, -1)
        tokens = torch.cat([own, points], 1)
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens, F.pad(valid, (QUERIES, 0), value=True)))
        own, points = tokens[:, :QUERIES], tokens[:, QUERIES:]
        if self.token_attention:
            own = self.norm2(own + self.cross_attn_token_to_image(own, image, image))
        own = self.norm3(own + self.mlp(own))
        return self.norm4(image + self.cross_attn_image_to_token(image, own, own)), points


class VisualSampler(nn.Module):
    """Prompt encoder: the map's own features at the clicks, spread over the map by two ``SamplerBlock``."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, token_attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SamplerBlock(dim, heads, mlp_dim, token_attention) for _ in range(2))

    def forward(self, image: Tensor, unit: Tensor, valid: Tensor) -> Tensor:
        """A map (B, C, d, h, w), updated by the points that count.

        Args:
            image: The map.
            unit: (B, P, 3) points as zyx in [0, 1] between the crop's faces.
            valid: (B, P) bool.
        """
        at = (2 * unit - 1).flip(-1)[:, :, None, None].to(image.dtype)  # grid_sample takes xyz
        sampled = F.grid_sample(image, at, padding_mode="zeros", align_corners=False)
        points = rearrange(sampled, "b c p 1 1 -> b p c")
        flat = rearrange(image, "b c d h w -> b (d h w) c")
        for block in self.blocks:
            flat, points = block(flat, points, valid)
        return rearrange(flat, "b (d h w) c -> b c d h w", d=image.shape[2], h=image.shape[3])


class AggregationDecoder(nn.Module):
    """Multi-layer aggregation: every tap refined and doubled, joined with the image, then classes at twice the size."""

    def __init__(self, taps: int, dim: int, channels: int, classes: int) -> None:
        super().__init__()
        self.refine = nn.ModuleList(
            nn.Sequential(*_conv(dim, channels), *_conv(channels, channels)) for _ in range(taps)
        )
        self.join = nn.Sequential(*_conv(taps * channels + 1, channels))
        self.classify = nn.Conv3d(channels, classes, kernel_size=3, padding=1, bias=False)

    def forward(self, maps: list[Tensor], image: Tensor) -> Tensor:
        """Maps (B, dim, d, h, w) and the crop (B, 1, D, H, W) to logits (B, classes, 2d, 2h, 2w)."""
        doubled = [
            F.interpolate(refine(m), scale_factor=2, mode="trilinear")
            for refine, m in zip(self.refine, maps, strict=True)
        ]
        small = F.interpolate(image, size=doubled[0].shape[2:], mode="trilinear")
        return self.classify(self.join(torch.cat([*doubled, small], 1)))


def _conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv3d(before, after, kernel_size=3, padding=1, bias=False), nn.InstanceNorm3d(after), nn.ReLU()]


class _Lifted(FrozenParts):
    """What both variants share: the lifted encoder, whose tensors of SAM are frozen and not stored, and the decoder."""

    def _build(self, config: Sam3DAdapterConfig, classes: int) -> None:
        c = config
        encoder, _ = self.open_backbone(c)
        self.image_encoder = LiftedEncoder(encoder, c.grid, c.upsample, c.window, c.taps, c.zero_adapters)
        self.freeze(f"image_encoder.{name}" for name in self.image_encoder.frozen_names())
        self.decoder = AggregationDecoder(len(c.taps), encoder.out_dim, c.channels, classes)


class Sam3DAdapter(_Lifted, PromptableModel):
    """3DSAM-adapter with clicks: 25,462,400 trained parameters.

    Raises:
        InputError: if the backbone is not SAM's, or its file does not hold it.

    Source: section 3 of the paper; where the released code differs from it, as in the code.
    """

    def __init__(self, name: str, config: Sam3DAdapterConfig) -> None:
        super().__init__()
        self._build(config, classes=2)
        understood = frozenset({"point"})
        self.spec = ModelSpec(name, config.input_shape, config.spacing_mm, prompts=understood, source=SOURCE)
        dim = self.image_encoder.out_dim
        self.prompt_encoder = VisualSampler(dim, heads=8, mlp_dim=8 * dim, token_attention=config.token_attention)

    def encode(self, image: Tensor) -> Features:
        """``{"image": crop, "tap0": (B, C, d, h, w), ...}`` of a (B, 1, *input_shape) crop."""
        self.spec.check_image(image)
        maps = self.image_encoder(image)
        return {"image": image, **{f"tap{i}": m for i, m in enumerate(maps)}}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W) from the positive clicks, given to the last tap; ``iou`` is ``own_overlap``."""
        self.spec.check_prompts(prompts)
        image = features["image"]
        maps = [features[f"tap{i}"] for i in range(len(self.numbers.taps))]
        unit = (prompts.points + 0.5) / prompts.points.new_tensor(self.numbers.input_shape)
        maps[-1] = self.prompt_encoder(maps[-1], unit, prompts.point_labels == POSITIVE)
        two = self.decoder(maps, image)
        lowres = two[:, 1:] - two[:, :1]  # the logit of the softmax's second class
        logits = F.interpolate(lowres, size=image.shape[2:], mode="trilinear")
        return MaskOutput(logits, own_overlap(logits), lowres)


class Sam3DAdapterAuto(_Lifted, SemanticModel):
    """3DSAM-adapter without prompts: 22,298,240 trained parameters for one class."""

    encoder_parts = ("image_encoder",)

    def __init__(self, name: str, config: Sam3DAdapterConfig) -> None:
        super().__init__()
        self.spec = config.semantic_spec(name, SOURCE, spacing_mm=config.spacing_mm)
        self._build(config, self.spec.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of a (B, 1, *input_shape) crop."""
        self.spec.check_image(image)
        return F.interpolate(self.decoder(self.image_encoder(image), image), size=image.shape[2:], mode="trilinear")


_TINY = {"input_shape": (16, 16, 16), "backbone": "sam_vit_tiny", "window": 2, "taps": (2, 4), "channels": 8}

MODELS = family(  # as published: 128^3 crops at 1 mm, seen as 512^3
    Sam3DAdapter, {"sam3d_adapter": Sam3DAdapterConfig()}, tiny=_TINY
) | family(
    Sam3DAdapterAuto,
    {"sam3d_adapter_auto": Sam3DAdapterConfig(input_shape=(256, 256, 256), upsample=2)},
    tiny={**_TINY, "upsample": 4, "class_names": ("a", "b")},
)

"""``samed3d_unet``: our promptable U-Net, small enough for a laptop without a GPU; ``default`` is one.

The encoder sees only the image and runs once per crop. The decoder runs per prompt: at each resolution it adds dense
prompt maps and the learned similarity to the clicked voxels, on the coarsest grid voxels and prompt tokens attend to
each other, and each half-resolution voxel predicts its eight, so that nothing is computed on the full grid.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import ArchitectureConfig, Features, MaskOutput, ModelSpec, PromptableModel, family
from samed3d.nn.layers import LayerNorm3d, ResidualBlock, depth_to_space, space_to_depth
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_maps import MAP_CHANNELS, ClickSimilarity, positions_at, prompt_maps, sample_at

STRIDES = (2, 4, 8, 16)


@dataclass(frozen=True)
class SamedUNetConfig(ArchitectureConfig):
    """Numbers of a ``SamedUNet``.

    Attributes:
        input_shape: Crop shape the weights are for (any multiple of 16 per axis works at run time).
        widths: Encoder channels at strides 2, 4, 8, 16.
        decoder_widths: Decoder channels at strides 2, 4, 8, 16.
        encoder_blocks: Residual blocks per encoder stage.
        joint_blocks: Transformer blocks on the coarsest grid.
        similarity_heads: Heads of the click similarity per stride 2, 4, 8; 0 leaves it out there.
        mask_stride: 1 predicts the eight voxels of each half-resolution voxel; 2 predicts one value there and
            interpolates.
        spacing_mm: Spacing of the crops, for weights trained with ``data.spacing_mm``; None follows the object's size.
        click_memory: As in ``ModelSpec``.
    """

    input_shape: IntTriple = (64, 64, 64)
    widths: tuple[int, ...] = (32, 64, 128, 192)
    decoder_widths: tuple[int, ...] = (32, 64, 96, 128)
    encoder_blocks: tuple[int, ...] = (1, 2, 2, 1)
    joint_blocks: int = 2
    similarity_heads: tuple[int, ...] = (0, 8, 8)
    mask_stride: int = 1
    spacing_mm: float | None = None
    click_memory: str = "all"


class JointBlock(nn.Module):
    """One pre-norm transformer block over voxel tokens and prompt tokens together."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """``tokens`` (B, T, dim); ``visible`` (B, T) bool, False for padding, which no token attends to."""
        qkv = self.qkv(self.norm1(tokens))
        q, k, v = rearrange(qkv, "b n (three heads e) -> three b heads n e", three=3, heads=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
        tokens = tokens + self.proj(rearrange(mixed, "b heads n e -> b n (heads e)"))
        return tokens + self.mlp(self.norm2(tokens))


class PromptTokens(nn.Module):
    """Clicks and box corners as tokens: position in the crop (Fourier features), type, features under a click."""

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.types = nn.Embedding(4, dim)  # background click, object click, low corner, high corner
        self.under = nn.Linear(feature_dim, dim)
        self.position = nn.Linear(dim // 8 * 6, dim)
        self.bands = dim // 8

    def fourier(self, unit: Tensor) -> Tensor:
        """Positions in 0..1, (..., 3), as features (..., dim)."""
        wave = 2.0 ** torch.linspace(0, 5, self.bands, device=unit.device) * math.pi
        angle = (unit.float().unsqueeze(-1) * wave).flatten(-2)
        return self.position(torch.cat([angle.sin(), angle.cos()], dim=-1))

    def grid(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Fourier features of every voxel centre of a coarse grid, (d*h*w, dim): the same frame as the clicks'."""
        axes = [(torch.arange(n, device=device) + 0.5) / n for n in shape]
        return self.fourier(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2))

    def forward(self, prompts: PromptBatch, features: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, N + 2, dim) and which of them are real (B, N + 2)."""
        size = torch.tensor(features.shape[2:], device=features.device)
        labels = prompts.point_labels
        where = self.fourier((positions_at(prompts.points.float(), stride) + 0.5) / size)
        clicks = where + self.types(labels.clamp(min=0)) + self.under(sample_at(features, prompts.points, stride))
        batch = labels.shape[0]
        boxes = clicks.new_zeros(batch, 2, 3) if prompts.boxes is None else prompts.boxes.float()
        corners = self.fourier(boxes / stride / size) + self.types.weight[2:]
        given = prompts.has_box()[:, None].expand(batch, 2)
        return torch.cat([clicks, corners], dim=1), torch.cat([labels >= 0, given], dim=1)


class SamedUNet(PromptableModel):
    """See the file's docstring."""

    encoder_parts = ("stem", "downs", "stages", "skips")
    prompt_parts = ("tokens", "map_in", "similarities")

    def __init__(self, name: str, config: SamedUNetConfig) -> None:
        super().__init__()
        self.config = asdict(config)
        self.spec = ModelSpec(
            name,
            config.input_shape,
            config.spacing_mm,
            normalisation="zscore_rank",
            click_memory=config.click_memory,
            bf16=True,
            source="samed3d (this project)",
        )
        widths, decoder_widths = config.widths, config.decoder_widths
        self.stem = nn.Conv3d(8 * self.spec.image_shape[0], widths[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(n)), LayerNorm3d(w, eps=1e-5))
            for w, n in zip(widths, config.encoder_blocks, strict=True)
        )
        self.skips = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in zip(widths, decoder_widths, strict=True))
        self.similarities = nn.ModuleList(
            ClickSimilarity(w, heads) if heads else nn.Identity()
            for w, heads in zip(widths, config.similarity_heads, strict=False)
        )
        extra = [MAP_CHANNELS + 2 * h for h in (*config.similarity_heads, 0)]
        self.map_in = nn.ModuleList(nn.Linear(e, w) for e, w in zip(extra, decoder_widths, strict=True))
        top = decoder_widths[-1]
        self.tokens = PromptTokens(top, widths[-1])
        self.iou_token = nn.Parameter(torch.randn(1, 1, top) * 0.02)
        self.joint = nn.ModuleList(JointBlock(top, max(1, top // 32)) for _ in range(config.joint_blocks))
        self.ups = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in zip(decoder_widths, decoder_widths[1:], strict=False))
        # On the finest grid one convolution is enough: the skip holds the image, coarser levels combined the prompts.
        self.blocks = nn.ModuleList(
            ResidualBlock(w, convs=1 if i == 0 else 2) for i, w in enumerate(decoder_widths[:-1])
        )
        self.out_norm = LayerNorm3d(decoder_widths[0], eps=1e-5)
        self.out = nn.Conv3d(decoder_widths[0], 8 if config.mask_stride == 1 else 1, 3, padding=1)
        with torch.no_grad():
            self.out.bias.fill_(-2.0)  # type: ignore[union-attr]  # most voxels are background
        self.iou_head = nn.Sequential(nn.Linear(top, top), nn.ReLU(), nn.Linear(top, 1))

    def encode(self, image: Tensor) -> Features:
        """Features of a (B, 2, D, H, W) crop, D, H, W multiples of 16.

        Raises:
            InputError: if an axis is not a multiple of 16.
        """
        if any(n % STRIDES[-1] for n in image.shape[2:]):
            raise InputError(
                f"image shape must be a multiple of {STRIDES[-1]} on each axis, got {tuple(image.shape[2:])}"
            )
        features: Features = {}
        x = self.stem(space_to_depth(image).contiguous(memory_format=torch.channels_last_3d))
        for level, stage in enumerate(self.stages):
            x = stage(x if level == 0 else self.downs[level - 1](x))
            stride = STRIDES[level]
            features[f"skip{stride}"] = self.skips[level](x)
            features[f"image{stride}"] = x
        return features

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """The mask for all prompts; ``lowres_logits`` are (B, 1, D/2, H/2, W/2)."""
        x, iou = self._coarse(features, prompts)
        for level in range(len(self.blocks) - 1, -1, -1):
            skip = features[f"skip{STRIDES[level]}"]
            x = F.interpolate(self.ups[level](x), size=skip.shape[2:], mode="nearest")  # the blocks after it smooth
            x = x.add_(skip).add_(self._prompt_input(level, features, prompts))
            x = self.blocks[level](x)
        fine = self.out(F.relu(self.out_norm(x), inplace=True)).float()
        lowres = fine.mean(dim=1, keepdim=True)
        if fine.shape[1] == 1:
            return MaskOutput(F.interpolate(fine, scale_factor=2, mode="trilinear"), iou, lowres)
        return MaskOutput(depth_to_space(fine), iou, lowres)

    def _prompt_input(self, level: int, features: Features, prompts: PromptBatch) -> Tensor:
        """Dense prompt maps and similarities of one level, projected to its width."""
        stride = STRIDES[level]
        skip = features[f"skip{stride}"]
        shape = (skip.shape[2], skip.shape[3], skip.shape[4])
        maps = prompt_maps(prompts, stride, shape).to(skip.dtype)
        similarity = self.similarities[level] if level < len(self.similarities) else None
        if isinstance(similarity, ClickSimilarity):
            maps = torch.cat([maps, similarity(features[f"image{stride}"], prompts, stride).to(maps.dtype)], dim=-1)
        return rearrange(self.map_in[level](maps), "b d h w c -> b c d h w")

    def _coarse(self, features: Features, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Attention between all voxels of the coarsest grid and the prompt tokens; its map and the predicted IoU."""
        stride, image = STRIDES[-1], features[f"image{STRIDES[-1]}"]
        x = features[f"skip{stride}"] + self._prompt_input(len(STRIDES) - 1, features, prompts)
        batch, _, d, h, w = x.shape
        voxels = rearrange(x, "b c d h w -> b (d h w) c") + self.tokens.grid((d, h, w), x.device).to(x.dtype)
        extra, there = self.tokens(prompts, image, stride)
        tokens = torch.cat([voxels, self.iou_token.expand(batch, -1, -1).to(x.dtype), extra.to(x.dtype)], dim=1)
        count = voxels.shape[1]
        seen = torch.cat([there.new_ones(batch, count + 1), there], dim=1)
        for block in self.joint:
            tokens = block(tokens, seen)
        grid = rearrange(tokens[:, :count], "b (d h w) c -> b c d h w", d=d, h=h, w=w)
        grid = grid.contiguous(memory_format=torch.channels_last_3d)
        return grid, self.iou_head(tokens[:, count]).float().sigmoid()


MODELS = family(
    SamedUNet,
    {"samed3d_unet": SamedUNetConfig()},
    tiny={
        "input_shape": (32, 32, 32),
        "widths": (8, 8, 16, 16),
        "decoder_widths": (8, 8, 16, 16),
        "encoder_blocks": (1, 1, 1, 1),
        "joint_blocks": 1,
        "similarity_heads": (2, 2, 2),
    },
)

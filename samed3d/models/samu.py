"""SAMU: a 3D U-Net whose decoder sees the prompts at every level.

The paper gives the idea, the number of parameters ("12M") and the results, not the widths; these are ours, chosen to
meet that number. Its encoder sees only the image, so it runs once per crop. ``samu`` is the paper's form: one click, no
earlier mask, no box, no IoU head. ``samu_extended`` adds what the paper leaves open: several clicks, clicks off the
object, boxes and the earlier mask. The controls of its ablation are ``prompt_levels``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.errors import InputError, check_choice
from samed3d.geometry import IntTriple
from samed3d.models import base
from samed3d.models.base import ArchitectureConfig, Features, MaskOutput, ModelSpec, PromptableModel, family
from samed3d.nn.layers import CoarseConv3d, Mlp
from samed3d.nn.mask_decoder import TokenAttention
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_encoder import RandomFourierPositions
from samed3d.nn.prompt_maps import MASK_CHANNELS, mask_map

SOURCE = "SAMU (MedAGI 2024, LNCS 15184); widths and blocks are ours, the paper gives none"
PROMPT_LEVELS = ("all", "decoder", "bottom", "none")
LOWRES_STRIDE = 4


@dataclass(frozen=True)
class SamuConfig(ArchitectureConfig):
    """Numbers and switches of a SAMU.

    Attributes:
        input_shape: Crop shape the weights are for; any multiple of ``stride`` works at run time.
        widths: Channels from the full resolution down, each level half of the one before.
        token_dim: Channels of the prompt tokens.
        learned_tokens: Tokens beside the prompts'; at least 1 (see ``PromptAttention``).
        prompt_levels: Where prompts enter: ``"all"`` levels, the ``"decoder"``'s without the coarsest, only the
            ``"bottom"``, or ``"none"`` (a control that sees the crop alone).
        click_memory: ``"newest"`` click (the paper's single one) or ``"all"``.
        boxes: Understand boxes.
        mask_prior: See the earlier mask at each decoder level.
        spacing_mm: Voxel edge of the crops that it is trained on; None where the crop follows the object.
    """

    input_shape: IntTriple = (128, 128, 128)
    widths: tuple[int, ...] = (32, 64, 128, 192, 224)
    token_dim: int = 256
    learned_tokens: int = 4
    prompt_levels: str = "all"
    click_memory: str = "newest"
    boxes: bool = False
    mask_prior: bool = False
    spacing_mm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prompt_levels", self.prompt_levels, PROMPT_LEVELS)
        if self.click_memory not in ("newest", "all"):
            raise InputError(f"click_memory must be newest or all, got {self.click_memory!r}")
        shape, rule = self.input_shape, f"three multiples of {self.stride} for {len(self.widths)} levels"
        if len(shape) != 3 or any(n <= 0 or n % self.stride for n in shape):
            raise InputError(f"input_shape must be {rule}, got {shape}")

    @property
    def stride(self) -> int:
        """Voxels per edge of the coarsest level's voxel."""
        return int(2 ** (len(self.widths) - 1))


class PromptAttention(nn.Module):
    """Prompt tokens and a feature map of one decoder level attend to each other; the change is added to the map.

    Tokens attend to each other and to the map, then the map to the tokens. With one token alone, attention from map to
    tokens would be the same at every voxel (a softmax over one key), so the tokens are several.
    """

    def __init__(self, channels: int, token_dim: int) -> None:
        super().__init__()
        heads = 8 if channels >= 64 else max(1, channels // 8)
        self.token_in = nn.Conv1d(token_dim, channels, kernel_size=1)
        self.position_in = nn.Linear(token_dim, channels, bias=False)
        self.self_attn = TokenAttention(channels, heads)
        self.token_to_image = TokenAttention(channels, heads, downsample=2)
        self.mlp = Mlp(channels, 2 * channels)
        self.image_to_token = TokenAttention(channels, heads, downsample=2)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(4))
        self.norm_image = nn.LayerNorm(channels)
        self.scale = nn.Parameter(torch.ones(()))  # starts open: from scratch there is no earlier state to protect

    def forward(self, image: Tensor, tokens: Tensor, valid: Tensor, positions: RandomFourierPositions) -> Tensor:
        """The map (B, C, d, h, w) after the prompts.

        Args:
            image: The map.
            tokens: (B, T, token_dim).
            valid: (B, T) bool, tokens that may be attended to.
            positions: Of the clicks, so that map and tokens share one frame.
        """
        grid = (image.shape[2], image.shape[3], image.shape[4])
        x = self.token_in(tokens.transpose(1, 2)).transpose(1, 2)
        at = self.norms[0](x)
        x = x + self.self_attn(at, at, at, valid)
        flat = self.norm_image(rearrange(image, "b c d h w -> b (d h w) c"))
        key = flat + projected_positions(positions, grid, self.position_in.weight)
        x = x + self.token_to_image(self.norms[1](x), key, flat)
        x = x + self.mlp(self.norms[2](x))
        at = self.norms[3](x)
        change = self.image_to_token(key, at, at, valid)
        return image + self.scale * rearrange(change, "b (d h w) c -> b c d h w", d=grid[0], h=grid[1])


def projected_positions(positions: RandomFourierPositions, grid: tuple[int, int, int], weight: Tensor) -> Tensor:
    """``linear(positions.dense(grid), weight)`` as (d*h*w, C), without the dense features (2 GiB on a 128^3 map).

    Sine and cosine of a sum of angles split into those of (z, y) and of x, so that the whole is one matrix product with
    ``weight`` (C, dim). The positions are sine and cosine, no swapped axes.
    """
    matrix = positions.positional_encoding_gaussian_matrix
    z, y, x = (
        2 * math.pi * ((2 * (torch.arange(n, device=matrix.device) + 0.5) / n - 1)[:, None] * row)
        for n, row in zip(grid, matrix, strict=True)
    )
    plane = (z[:, None] + y[None]).flatten(0, 1)
    by_sine, by_cosine = weight.chunk(2, dim=1)
    sine, cosine = x.sin()[:, None], x.cos()[:, None]
    line = torch.cat([by_sine * cosine - by_cosine * sine, by_sine * sine + by_cosine * cosine], dim=2)
    out = torch.cat([plane.sin(), plane.cos()], dim=1) @ line.flatten(0, 1).T
    return out.view(-1, weight.shape[0])


class DoubleConv(nn.Sequential):
    """Twice a 3x3x3 convolution, instance norm and leaky ReLU."""

    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers.append(CoarseConv3d(channels, after, kernel_size=3, padding=1, bias=False))
            layers += [nn.InstanceNorm3d(after, affine=True), nn.LeakyReLU(0.01)]
        super().__init__(*layers)


class Samu(PromptableModel):
    """See the file's docstring."""

    encoder_parts = ("encoder",)
    prompt_parts = ("attentions", "kinds", "tokens", "mask_in")

    def __init__(self, name: str, config: SamuConfig) -> None:
        super().__init__()
        c = config
        self.numbers, self.config = c, asdict(c)
        prompts = frozenset({"point"} | ({"box"} if c.boxes else set()) | ({"mask"} if c.mask_prior else set()))
        self.spec = ModelSpec(
            name, c.input_shape, c.spacing_mm, prompts=prompts, click_memory=c.click_memory, source=SOURCE
        )
        self.encoder = nn.ModuleList(DoubleConv(a, b) for a, b in zip((1, *c.widths), c.widths, strict=False))
        pairs = list(zip(c.widths[1:], c.widths, strict=False))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(below, here, kernel_size=2, stride=2) for below, here in pairs)
        self.decoder = nn.ModuleList(DoubleConv(2 * here, here) for _, here in pairs)
        self.head = nn.Conv3d(c.widths[0], 1, kernel_size=1)
        top = len(c.widths) - 1
        prompted = {"all": range(top + 1), "decoder": range(top), "bottom": [top], "none": []}[c.prompt_levels]
        self.attentions = nn.ModuleDict(
            {str(level): PromptAttention(c.widths[level], c.token_dim) for level in prompted}
        )
        self.positions = RandomFourierPositions(c.token_dim)
        if prompted:
            self.kinds = nn.Embedding(4 if c.boxes else 2, c.token_dim)  # off, on, low corner, high corner
            self.tokens = nn.Parameter(torch.randn(c.learned_tokens, c.token_dim) * 0.02)
        self.mask_in = nn.ModuleList(nn.Linear(MASK_CHANNELS, here) for _, here in pairs) if c.mask_prior else None

    def encode(self, image: Tensor) -> Features:
        """``level0`` (B, widths[0], D, H, W) and the coarser ones, of a (B, 1, D, H, W) crop.

        Raises:
            InputError: if an axis is not a multiple of the coarsest stride.
        """
        stride = self.numbers.stride
        if any(n % stride for n in image.shape[2:]):
            raise InputError(f"image shape must be a multiple of {stride} on each axis, got {tuple(image.shape[2:])}")
        features: Features = {}
        x = image
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else F.max_pool3d(x, 2))
            features[f"level{level}"] = x
        return features

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W); ``iou`` is not learned (see ``base.own_overlap``)."""
        tokens, valid = self._tokens(prompts, features["level0"].shape) if len(self.attentions) else (None, None)
        top = len(self.numbers.widths) - 1
        x = self._with_prompts(top, features[f"level{top}"], tokens, valid)
        for level in range(top - 1, -1, -1):
            skip = features[f"level{level}"]
            x = self._with_prompts(level, self.ups[level](x), tokens, valid)
            if self.mask_in is not None:
                seen = mask_map(prompts, (skip.shape[2], skip.shape[3], skip.shape[4])).to(x.dtype)
                # The third channel says that there is a mask: without one nothing is added, not even the bias.
                x = x + (self.mask_in[level](seen) * seen[..., 2:]).movedim(-1, 1)
            x = self.decoder[level](torch.cat([skip, x], dim=1))
        logits = self.head(x).float()
        return MaskOutput(logits, base.own_overlap(logits.detach()), F.avg_pool3d(logits, LOWRES_STRIDE))

    def _with_prompts(self, level: int, x: Tensor, tokens: Tensor | None, valid: Tensor | None) -> Tensor:
        if tokens is None or valid is None or str(level) not in self.attentions:
            return x
        return self.attentions.get_submodule(str(level))(x, tokens, valid, self.positions)

    def _tokens(self, prompts: PromptBatch, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Prompt and learned tokens (B, T, token_dim), and which count (B, T) bool."""
        if self.spec.click_memory == "newest":
            prompts = prompts.newest_click()
        points, labels = prompts.points, prompts.point_labels
        size = points.new_tensor(list(shape[2:]))
        clicks = self.positions((points + 0.5) / size) + self.kinds(labels.clamp(min=0))
        learned = self.tokens.expand(points.shape[0], -1, -1)
        tokens, valid = [learned, clicks], [labels.new_ones(learned.shape[:2], dtype=torch.bool), labels >= 0]
        if self.numbers.boxes and prompts.boxes is not None:
            tokens.append(self.positions(prompts.boxes / size) + self.kinds.weight[2:])
            valid.append(prompts.has_box()[:, None].expand(-1, 2))
        return torch.cat(tokens, dim=1), torch.cat(valid, dim=1)


MODELS = family(
    Samu,
    {
        "samu": SamuConfig(),  # the paper's form
        "samu_extended": SamuConfig(click_memory="all", boxes=True, mask_prior=True),
    },
    tiny={"input_shape": (16, 16, 16), "widths": (8, 8, 16, 16), "token_dim": 16},
)

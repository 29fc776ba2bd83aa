"""FastSAM3D: a student of SAM-Med3D with half the blocks, two of them without attention, and sparse attention in the
others if wanted.

The prompt encoder and the mask decoder are SAM-Med3D's own, so the student starts from its teacher's (``from_teacher``)
and learns its blocks' features (``loss.distill`` of the training config, on ``layer_features``). This is the
architecture of the paper and its figures, not a copy of the released code, which departs from both: the residual of its
MLPs starts from the normalised tokens, so the teacher's weights compute something else there; its sparse attention
leaves the tokens in scrambled order; its fast decoder swaps heads and channels. The relative positions are the correct
ones. Read ``nn/dilated.py`` next, or ``sam_med3d.py`` for the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch
from samed3d.nn.attention import GridAttention
from samed3d.nn.dilated import DilatedAttention
from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_encoder import PromptEncoder
from samed3d.nn.released_decode import decode_released
from samed3d.nn.vit import ImageEncoder, Mlp, PatchEmbed

SOURCE = "FastSAM3D (Shen et al., 2024, arXiv:2403.09827); teacher SAM-Med3D (arXiv:2310.15161)"


@dataclass(frozen=True)
class FastSam3DConfig:
    """Numbers and switches of a student.

    Attributes:
        input_shape: Crop shape in voxels, tensor-axis order; a cube, a multiple of ``patch``.
        patch: Voxels per token edge.
        dim: Encoder channels.
        depth: Blocks.
        plain_blocks: How many of the first blocks have no attention.
        heads: Attention heads of the others.
        attention: ``"full"``, or ``"dilated"``: the same weights, looking at fewer tokens.
        patterns: (segment, dilation) pairs of the dilated attention (see ``nn.dilated``).
        prompt_dim: Channels of the prompt encoder and the mask decoder.
        decoder_heads: Attention heads of the mask decoder.
        decoder_mlp_dim: Hidden channels of the mask decoder's MLPs.
    """

    input_shape: IntTriple = (128, 128, 128)
    patch: int = 16
    dim: int = 768
    depth: int = 6
    plain_blocks: int = 2
    heads: int = 6
    attention: str = "full"
    patterns: tuple[tuple[int, int], ...] = ((4, 1), (8, 2), (16, 4))
    prompt_dim: int = 384
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.input_shape)
        if len(shape) != 3 or any(n <= 0 or n % self.patch for n in shape):
            raise InputError(f"input_shape must be three multiples of the patch ({self.patch}), got {shape}")
        if self.attention not in ("full", "dilated"):
            raise InputError(f"attention must be full or dilated, got {self.attention!r}")
        if not 0 <= self.plain_blocks <= self.depth:
            raise InputError(f"plain_blocks must be from 0 to the depth ({self.depth}), got {self.plain_blocks}")
        object.__setattr__(self, "input_shape", shape)
        object.__setattr__(
            self, "patterns", tuple((int(segment), int(dilation)) for segment, dilation in self.patterns)
        )

    @property
    def grid(self) -> IntTriple:
        """Tokens along each axis."""
        d, h, w = (n // self.patch for n in self.input_shape)
        return (d, h, w)


class PlainBlock(nn.Module):
    """A transformer block without its attention: norm, MLP, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, h, w, dim) to the same shape."""
        return x + self.mlp(self.norm2(x))


class FastSam3D(PromptableModel):
    """See the file's docstring.

    Args:
        config: Numbers and switches.
    """

    def __init__(self, config: FastSam3DConfig) -> None:
        super().__init__()
        c = config
        self.numbers, self.config = c, asdict(c)
        self.spec = ModelSpec(
            name="fast_sam3d",
            input_shape_zyx=c.input_shape,
            spacing_mm=1.5,
            normalisation="zscore_positive",
            ct_clamp_hu=(-1000.0, 1000.0),
            tensor_axes="xyz",
            prompts=frozenset({"point", "mask"}),
            click_memory="newest",
            first_mask="zeros",
            click_logit_threshold=0.5,
            source=SOURCE,
        )
        embed = PatchEmbed(c.patch, c.dim)
        encoder = ImageEncoder(
            embed, c.grid, c.dim, c.depth, c.heads, 0, (), c.prompt_dim, misbroadcast_relpos=False, pad_sink=False
        )
        for index in range(c.plain_blocks):
            encoder.blocks[index] = PlainBlock(c.dim)
        if c.attention == "dilated":
            for module in list(encoder.modules()):
                if isinstance(getattr(module, "attn", None), GridAttention):
                    module.attn = DilatedAttention(c.dim, c.heads, c.grid, c.patterns)
        self.image_encoder = encoder
        self.prompt_encoder = PromptEncoder(
            c.prompt_dim, c.grid, c.input_shape, boxes=False, sin_cos_sin=True, swap_pe_axes=True, pad_point=True
        )
        self.mask_decoder = MaskDecoder(c.prompt_dim, c.decoder_heads, c.decoder_mlp_dim, mask_tokens=4, iou_outputs=4)

    def encode(self, image: Tensor) -> Features:
        """``{"image": (B, prompt_dim, d, h, w)}`` of a (B, 1, *input_shape) crop.

        Raises:
            InputError: if the crop has another shape.
        """
        return {"image": self.image_encoder(self._checked(image))}

    def layer_features(self, image: Tensor) -> list[Tensor]:
        """What distillation compares: (B, d, h, w, dim) after each block, then the neck's (B, d, h, w, prompt_dim)."""
        return self.image_encoder.layer_features(self._checked(image))

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W) from the newest click and the earlier mask, as SAM-Med3D decodes.

        Raises:
            InputError: if the prompts hold a box, which this model cannot understand.
        """
        if prompts.boxes is not None:
            raise InputError(
                "prompts must be points or masks for fast_sam3d, got a box; use a samed3d_* model for boxes"
            )
        lowres, iou = decode_released(self.prompt_encoder, self.mask_decoder, features["image"], prompts, True, True)
        logits = F.interpolate(lowres, size=self.numbers.input_shape, mode="trilinear", align_corners=False)
        return MaskOutput(logits, iou, lowres)

    def _checked(self, image: Tensor) -> Tensor:
        d, h, w = self.numbers.input_shape
        if tuple(image.shape[1:]) != (1, d, h, w):
            raise InputError(
                f"image must be (B, 1, {d}, {h}, {w}) for fast_sam3d, got {tuple(image.shape)}; resample the crop"
            )
        return image


def from_teacher(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict that starts from its teacher's.

    Everything outside the blocks is the teacher's: patches, positions, neck, prompt encoder, mask decoder. Block i of
    the student takes the norms, the MLP and the projections of block 2i + 1, whose features it will be taught; relative
    positions keep the student's own start, as the heads have another width.

    Args:
        student: State dict of a ``FastSam3D``.
        teacher: State dict of SAM-Med3D, twice as deep.

    Raises:
        InputError: if the teacher lacks a tensor or has one of another shape.
    """
    state = {}
    for name, own in student.items():
        if ".rel_pos_" in name:
            state[name] = own
            continue
        source = name
        if name.startswith("image_encoder.blocks."):
            index, rest = name.removeprefix("image_encoder.blocks.").split(".", 1)
            source = f"image_encoder.blocks.{2 * int(index) + 1}.{rest}"
        if source not in teacher or teacher[source].shape != own.shape:
            found = tuple(teacher[source].shape) if source in teacher else "nothing"
            raise InputError(
                f"teacher must hold {source} of shape {tuple(own.shape)}, got {found}; use a sam_med3d_b checkpoint"
            )
        state[name] = teacher[source]
    return state


def fast_sam3d(**overrides: Any) -> FastSam3D:
    """The student of ``sam_med3d_b``: 128^3 crops, an encoder of 45,639,936 parameters."""
    return FastSam3D(replace(FastSam3DConfig(), **overrides))

"""MA-SAM: SAM's 2D encoder with low-rank changes of q and v and 3D adapters, and a decoder up to full size. No prompts.

The encoder's own tensors are frozen and not stored. A stack of slices is one sample; depth enters only through the
adapters. The model also takes one 3D box per stack, as the published variant for tumours does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Triple
from samed3d.models.base import SemanticModel, family
from samed3d.models.sam_backbone import BackboneConfig, FrozenParts
from samed3d.nn.adapters import FactLinear, FactShared
from samed3d.nn.mask_decoder import ProgressiveMaskDecoder
from samed3d.nn.prompt_encoder import PromptEncoder2d
from samed3d.nn.vit import run_block

SOURCE = "MA-SAM (Chen et al., Medical Image Analysis 2024, arXiv:2309.08842), code of cchen-cc/MA-SAM"
FROM_SAM = ("transformer.", "iou_token.", "output_upscaling.0.", "output_upscaling.1.", "output_upscaling.3.")
"""Parts of the mask decoder that start from SAM's."""


@dataclass(frozen=True)
class MaSamConfig(BackboneConfig):
    """Numbers and switches of an MA-SAM, beside those of ``BackboneConfig``.

    Attributes:
        input_shape: Crop (D, H, W) in voxels, H and W multiples of 16.
        spacing_zyx_mm: Spacing of the crops, or None for each image's own (as published).
        backbone_weights: SAM's checkpoint; also starts prompt encoder and mask decoder. ``""`` for random weights.
        rank: Of FacT.
        fact_dropout: After FacT's core.
        adapter_width: Channels inside the 3D adapters.
        zero_adapters: Start the adapters at zero, so that the encoder starts as SAM's; released code starts them at
            random.
    """

    class_names: tuple[str, ...] = tuple(f"class {i}" for i in range(1, 13))
    input_shape: IntTriple = (5, 512, 512)
    spacing_zyx_mm: Triple | None = None
    rank: int = 32
    fact_dropout: float = 0.1
    adapter_width: int = 384
    zero_adapters: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n % 16 for n in self.input_shape[1:]):
            raise InputError(f"input_shape must have H and W that are multiples of 16, got {self.input_shape}")


class DepthAdapter(nn.Module):
    """x + up(GELU(convolution along depth(down(norm(x))))), of 384 channels inside whatever the encoder.

    ``zero`` starts ``up`` at zero, so that the adapter changes nothing until it is trained. MA-SAM starts it at random.

    Source: MA-SAM (Chen et al., MedIA 2024), section 3.2; kernel and widths as in the code.
    """

    def __init__(self, dim: int, width: int = 384, zero: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, width, bias=False)
        self.conv = nn.Conv3d(width, width, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.up = nn.Linear(width, dim, bias=False)
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """(B * depth, h, w, C) tokens of stacked slices, depth running fastest; same shape."""
        low = rearrange(self.down(self.norm(x)), "(b d) h w c -> b c d h w", d=depth)
        return x + self.up(rearrange(F.gelu(self.conv(low)), "b c d h w -> (b d) h w c"))


class MaSam(FrozenParts, SemanticModel):
    """MA-SAM.

    Raises:
        InputError: if the backbone is not SAM's, or its file does not hold it.

    Source: section 3 of the paper; where the released code differs from it, as in the code.
    """

    encoder_parts = ("image_encoder", "fact", "adapters")
    prompt_parts = ("prompt_encoder",)

    def __init__(self, name: str, config: MaSamConfig) -> None:
        super().__init__()
        c = config
        encoder, state = self.open_backbone(c)
        self.spec = c.semantic_spec(name, SOURCE)
        dim, out_dim = encoder.dim, encoder.out_dim
        self.checkpoint_blocks = False  # recompute blocks in the backward pass (run.activation_checkpointing)
        self.image_encoder = encoder
        self.freeze(f"image_encoder.{n}" for n, _ in encoder.named_parameters())
        self.fact = FactShared(dim, c.rank)
        self.adapters = nn.ModuleList()
        for block in encoder.blocks:
            block.attn.qkv = FactLinear(block.attn.qkv, self.fact, dropout=c.fact_dropout)
            places = ("before", "between")
            pair = {place: DepthAdapter(dim, c.adapter_width, c.zero_adapters) for place in places}
            self.adapters.append(nn.ModuleDict(pair))
        self.prompt_encoder = PromptEncoder2d(out_dim)
        self.mask_decoder = ProgressiveMaskDecoder(out_dim, self.spec.classes)
        self._start_from_sam(state)

    def forward(self, image: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Logits (B, K, D, H, W) of (B, 1, D, H, W) normalised stacks of slices.

        ``boxes`` (B, 2, 3) are low and high corners (voxel edges, zyx) around what is wanted. As published, every slice
        gets the box's rectangle; its extent along z is not used.

        Raises:
            InputError: for more than one channel or edges that are no multiples of 16.
        """
        batch, channels, depth, height, width = image.shape
        if channels != 1:
            shape = tuple(image.shape)
            raise InputError(f"image must be (B, 1, D, H, W) for {self.spec.name}, got {shape}; give one modality")
        x = self.encode(image)
        h, w = x.shape[2:]
        sparse = x.new_zeros(x.shape[0], 0, x.shape[1])
        if boxes is not None:
            tokens = self.prompt_encoder.embed_boxes(boxes[..., 1:].to(x), (height, width))
            sparse = repeat(tokens, "b t c -> (b d) t c", d=depth)
        dense = self.prompt_encoder.no_mask(x.shape[0], h, w)
        logits, _ = self.mask_decoder(x, self.prompt_encoder.pe_layer.dense((h, w)), sparse, dense)
        return rearrange(logits, "(b d) k h w -> b k d h w", b=batch)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to features of every slice (B * D, C, H / 16, W / 16)."""
        depth = image.shape[2]
        x = self.image_encoder.tokens(repeat(image, "b 1 d h w -> (b d) 3 h w"))
        for block, adapter in zip(self.image_encoder.blocks, self.adapters, strict=True):
            x = run_block(_adapted, block, adapter, x, depth, recompute=self.checkpoint_blocks and self.training)
        return self.image_encoder.neck(rearrange(x, "b h w c -> b c h w"))

    def _start_from_sam(self, state: dict[str, Tensor]) -> None:
        """Copy the prompt encoder and the shared part of the mask decoder from a whole SAM checkpoint, if it is one."""
        shared = ("prompt_encoder.", *(f"mask_decoder.{part}" for part in FROM_SAM))
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        with torch.no_grad():
            for key, value in state.items():
                if not key.startswith(shared):
                    continue
                if key not in own or own[key].shape != value.shape:
                    found = f"{key} of shape {tuple(value.shape)}"
                    raise InputError(f"backbone_weights must be a SAM checkpoint, got {found} in it; give that file")
                own[key].copy_(value)


def _adapted(block: Any, adapter: Any, x: Tensor, depth: int) -> Tensor:
    """A frozen block between two depth adapters: one before attention, one between attention and MLP."""
    x = adapter["before"](x, depth)
    x = x + block.attn(block.norm1(x))
    x = adapter["between"](x, depth)
    return x + block.mlp(block.norm2(x))


MODELS = family(
    MaSam,
    {name: MaSamConfig(backbone=name.replace("ma_sam", "sam_vit")) for name in ("ma_sam_b", "ma_sam_l", "ma_sam_h")},
    tiny={
        "input_shape": (3, 32, 32),
        "class_names": ("a", "b"),
        "backbone": "sam_vit_tiny",
        "rank": 4,
        "adapter_width": 8,
    },
)

"""MA-SAM: SAM's 2D encoder with low-rank changes of q and v and 3D adapters, a mask decoder that upsamples to full
size. Automatic.

The encoder's own tensors are frozen and not stored. A stack of slices is one sample; depth enters only through the
adapters. Also takes one 3D box per stack, as the published variant for tumours does. Read ``nn/adapters3d.py`` and
``nn/sam2d.py`` next.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Triple
from samed3d.models.base import ModelSpec, SemanticModel
from samed3d.models.weights import read_state, tensors_sha256
from samed3d.nn.adapters import FactLinear, FactShared
from samed3d.nn.adapters3d import DepthAdapter
from samed3d.nn.frozen import FrozenParts, open_encoder
from samed3d.nn.sam2d import ProgressiveMaskDecoder, PromptEncoder2d
from samed3d.nn.vit2d import Block2d, SamEncoder2d

SOURCE = "MA-SAM (Chen et al., Medical Image Analysis 2024, arXiv:2309.08842), code of cchen-cc/MA-SAM"
FROM_SAM = ("transformer.", "iou_token.", "output_upscaling.0.", "output_upscaling.1.", "output_upscaling.3.")
"""Parts of the mask decoder that start from SAM's."""


@dataclass(frozen=True)
class MaSamConfig:
    """Numbers and switches of an MA-SAM.

    Attributes:
        class_names: What is segmented, background not listed.
        input_shape: Crop (D, H, W), H and W multiples of 16.
        spacing_zyx_mm: Spacing of the crops, or None for each image's own (as published).
        backbone: 2D encoder: ``sam_vit_b|l|h``.
        backbone_weights: SAM's checkpoint; also starts prompt encoder and mask decoder. ``""`` for random weights.
        backbone_sha256: Hash of the encoder's tensors; filled in when the model is built.
        rank: Of FacT.
        fact_dropout: After FacT's core.
        adapter_width: Channels inside the 3D adapters.
        zero_adapters: Start the adapters at zero, so that the encoder starts as SAM's; released code starts them at
            random.
    """

    class_names: tuple[str, ...] = tuple(f"class {i}" for i in range(1, 13))
    input_shape: IntTriple = (5, 512, 512)
    spacing_zyx_mm: Triple | None = None
    backbone: str = "sam_vit_h"
    backbone_weights: str = ""
    backbone_sha256: str = ""
    rank: int = 32
    fact_dropout: float = 0.1
    adapter_width: int = 384
    zero_adapters: bool = True

    def __post_init__(self) -> None:
        for name in ("class_names", "input_shape", "spacing_zyx_mm"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.class_names:
            raise InputError("class_names must name at least one class, got none")
        if any(n % 16 for n in self.input_shape[1:]):
            raise InputError(f"input_shape must have H and W that are multiples of 16, got {self.input_shape}")


class MaSam(FrozenParts, SemanticModel):
    """MA-SAM.

    Args:
        name: Registry name.
        config: Numbers and switches.

    Raises:
        InputError: if the backbone is not SAM's, or its file does not hold it.

    Source: section 3 of the paper; where the released code differs from it, as in the code.
    """

    encoder_parts = ("image_encoder", "fact", "adapters")
    prompt_parts = ("prompt_encoder",)

    def __init__(self, name: str, config: MaSamConfig) -> None:
        super().__init__()
        c = config
        encoder, sha256, state = open_encoder(
            c.backbone, c.backbone_weights, c.backbone_sha256, read_state, tensors_sha256
        )
        if not isinstance(encoder, SamEncoder2d):
            raise InputError(
                f"backbone of {name} must be one of SAM's encoders (sam_vit_b, sam_vit_l, sam_vit_h), got {c.backbone!r}"
            )
        self.numbers = replace(c, backbone_sha256=sha256)
        self.config = asdict(self.numbers)
        self.spec = ModelSpec(
            name=name,
            input_shape_zyx=c.input_shape,
            normalisation="zscore_volume",
            prompts=frozenset(),
            source=SOURCE,
            classes=len(c.class_names) + 1,
        )
        dim, out_dim = encoder.dim, encoder.out_dim
        self.checkpoint_blocks = (
            False  # recompute blocks in the backward pass, for memory (run.activation_checkpointing)
        )
        self.image_encoder = encoder
        self.freeze(f"image_encoder.{n}" for n, _ in encoder.named_parameters())
        self.fact = FactShared(dim, c.rank)
        self.adapters = nn.ModuleList()
        for block in encoder.blocks:
            assert isinstance(block, Block2d) and isinstance(block.attn.qkv, nn.Linear)
            block.attn.qkv = FactLinear(block.attn.qkv, self.fact, dropout=c.fact_dropout)
            pair = [DepthAdapter(dim, c.adapter_width, c.zero_adapters) for _ in range(2)]
            self.adapters.append(nn.ModuleDict(dict(zip(("before", "between"), pair, strict=True))))
        self.prompt_encoder = PromptEncoder2d(out_dim)
        self.mask_decoder = ProgressiveMaskDecoder(out_dim, self.spec.classes)
        self._start_from_sam(state)

    def forward(self, image: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Logits of all classes.

        Args:
            image: (B, 1, D, H, W) normalised stacks of slices.
            boxes: (B, 2, 3) low and high corner (voxel edges, zyx) around what is wanted, or None. As published, every
                slice gets the box's rectangle; its extent along z is not used.

        Returns:
            (B, K, D, H, W).

        Raises:
            InputError: for more than one channel or edges that are no multiples of 16.
        """
        batch, channels, depth, height, width = image.shape
        if channels != 1:
            raise InputError(
                f"image must be (B, 1, D, H, W) for {self.spec.name}, got {tuple(image.shape)}; give one modality"
            )
        x = self.encode(image)
        h, w = x.shape[2:]
        sparse = x.new_zeros(x.shape[0], 0, x.shape[1])
        if boxes is not None:
            sparse = self.prompt_encoder.embed_boxes(boxes[..., 1:].to(x), (height, width)).repeat_interleave(depth, 0)
        dense = self.prompt_encoder.no_mask(x.shape[0], h, w)
        logits = self.mask_decoder(x, self.prompt_encoder.pe_layer.dense(h, w), sparse, dense)
        return logits.unflatten(0, (batch, depth)).transpose(1, 2)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) to features of every slice (B * D, C, H / 16, W / 16)."""
        depth = image.shape[2]
        x = self.image_encoder.tokens(image.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1))
        for block, adapter in zip(self.image_encoder.blocks, self.adapters, strict=True):
            if self.checkpoint_blocks and self.training:
                x = checkpoint(_adapted, block, adapter, x, depth, use_reentrant=False)
            else:
                x = _adapted(block, adapter, x, depth)
        return self.image_encoder.neck(x.permute(0, 3, 1, 2))

    def _start_from_sam(self, state: dict[str, Tensor]) -> None:
        """Prompt encoder and the shared part of the mask decoder from a whole SAM checkpoint; an encoder alone changes
        nothing.
        """
        wanted = {k: v for k, v in state.items() if k.startswith("prompt_encoder.")}
        prefix = "mask_decoder."
        wanted |= {k: v for k, v in state.items() if k.startswith(tuple(prefix + p for p in FROM_SAM))}
        own = {k: v for k, v in self.named_parameters()} | {k: v for k, v in self.named_buffers()}
        with torch.no_grad():
            for key, value in wanted.items():
                if key not in own or own[key].shape != value.shape:
                    raise InputError(
                        f"backbone_weights must be a SAM checkpoint, got {key} of shape {tuple(value.shape)} in it"
                    )
                own[key].copy_(value)


def _adapted(block: Any, adapter: Any, x: Tensor, depth: int) -> Tensor:
    """A frozen block between two depth adapters: one before attention, one between attention and MLP."""
    x = adapter["before"](x, depth)
    x = x + block.attn(block.norm1(x))
    x = adapter["between"](x, depth)
    return x + block.mlp(block.norm2(x))


def ma_sam_b(**overrides: Any) -> MaSam:
    """MA-SAM on ViT-B: 30.1 M trained parameters for 12 classes."""
    return MaSam("ma_sam_b", replace(MaSamConfig(backbone="sam_vit_b"), **overrides))


def ma_sam_l(**overrides: Any) -> MaSam:
    """MA-SAM on ViT-L: 64.5 M trained parameters for 12 classes."""
    return MaSam("ma_sam_l", replace(MaSamConfig(backbone="sam_vit_l"), **overrides))


def ma_sam_h(**overrides: Any) -> MaSam:
    """MA-SAM on ViT-H, as published: 96.8 M trained parameters for 12 classes."""
    return MaSam("ma_sam_h", replace(MaSamConfig(), **overrides))

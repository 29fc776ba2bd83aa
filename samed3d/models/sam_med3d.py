"""SAM-Med3D as released, with the quirks its weights depend on, and FastSAM3D, the student distilled from it.

Every quirk is a switch of ``SamMed3DConfig``. FastSAM3D is the same network with half the blocks, two of them without
attention, the correct relative positions and, if wanted, dilated attention. Our own models without quirks are in
``samed3d_vit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import ArchitectureConfig, Features, MaskOutput, ModelSpec, PromptableModel, family
from samed3d.nn.attention import DilatedAttention, GridAttention
from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_encoder import PromptEncoder
from samed3d.nn.vit import ImageEncoder, PatchEmbed, token_grid


@dataclass(frozen=True)
class SamMed3DConfig(ArchitectureConfig):
    """Numbers and switches of a SAM-Med3D or a FastSAM3D.

    Attributes:
        input_shape: Crop shape in voxels, tensor-axis order; a multiple of ``patch``.
        patch: Voxels per token edge.
        dim, depth, heads: Channels, blocks and attention heads of the encoder.
        global_blocks: Indices of the blocks with global attention.
        window: Window edge of the others, in tokens; 0 makes all global.
        prompt_dim: Channels of the prompt encoder and the mask decoder.
        decoder_heads, decoder_mlp_dim: Attention heads of the mask decoder, hidden channels of its MLPs.
        misbroadcast_relpos: Quirk: relative positions added along the wrong axes (see ``nn.attention.GridAttention``).
        pad_sink: Quirk: padding of windows takes part in attention (see ``nn.attention.GridAttention``).
        swap_pe_axes: Quirk: dense positions swap axes 0 and 1, points do not.
        sin_cos_sin: Quirk: positions are sine, cosine and the same sine again. Off changes the shape of the position
            buffer.
        pad_point: Quirk: N clicks give N + 1 tokens. Off drops the padding embedding from the state dict.
        first_mask: Quirk: ``"zeros"``, the first mask prompt is zero logits; ``"none"`` uses the no-mask embedding,
            untrained upstream.
        click_memory: Quirk: ``"newest"``, a decode sees only the last click; ``"all"`` sees every click.
        boxes: ``"none"``; ``"stored"``: the embeddings of a box's corners are there, as in the published
            ``*_bbox_init`` file, which holds them untrained, and boxes are refused; ``"used"``: boxes are prompts, for
            a fine-tune that trains them.
        plain_blocks: FastSAM3D: how many of the first blocks have no attention.
        attention: ``"full"``, or FastSAM3D's ``"dilated"``: the same weights, but each token attends to fewer others.
        patterns: (segment, dilation) pairs of the dilated attention (see ``nn.attention.DilatedAttention``).
    """

    input_shape: IntTriple = (128, 128, 128)
    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    prompt_dim: int = 384
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    misbroadcast_relpos: bool = True
    pad_sink: bool = True
    swap_pe_axes: bool = True
    sin_cos_sin: bool = True
    pad_point: bool = True
    first_mask: str = "zeros"
    click_memory: str = "newest"
    boxes: str = "none"
    plain_blocks: int = 0
    attention: str = "full"
    patterns: tuple[tuple[int, int], ...] = ((4, 1), (8, 2), (16, 4))

    def __post_init__(self) -> None:
        super().__post_init__()
        token_grid(self.input_shape, self.patch)
        if self.boxes not in ("none", "stored", "used"):
            raise InputError(f"boxes must be none, stored or used, got {self.boxes!r}")
        if self.attention not in ("full", "dilated"):
            raise InputError(f"attention must be full or dilated, got {self.attention!r}")
        if self.attention == "dilated" and (self.window or self.misbroadcast_relpos):
            needed, got = "window 0 and misbroadcast_relpos False", f"{self.window} and {self.misbroadcast_relpos}"
            raise InputError(f"attention dilated needs {needed}, got {got}; use fast_sam3d")
        if not 0 <= self.plain_blocks <= self.depth:
            raise InputError(f"plain_blocks must be from 0 to the depth ({self.depth}), got {self.plain_blocks}")


class SamMed3D(PromptableModel):
    """SAM-Med3D. State-dict names and shapes are those of the released checkpoint; its IoU head is untrained.

    Source: sections 3.1-3.2 of the paper; where the released code differs from it, as in the code.
    """

    source = "SAM-Med3D (Wang et al., 2023, arXiv:2310.15161), code and weights of uni-medical/SAM-Med3D"

    def __init__(self, name: str, config: SamMed3DConfig) -> None:
        super().__init__()
        c = config
        self.config = asdict(c)
        self.spec = ModelSpec(
            name=name,
            input_shape_zyx=c.input_shape,
            spacing_mm=1.5,
            normalisation="zscore_positive",
            ct_clamp_hu=(-1000.0, 1000.0),
            tensor_axes="xyz",
            prompts=frozenset({"point", "mask", "box"} if c.boxes == "used" else {"point", "mask"}),
            click_memory=c.click_memory,
            first_mask=c.first_mask,
            click_logit_threshold=0.5,
            source=self.source,
        )
        grid = token_grid(c.input_shape, c.patch)
        attentions = (_attention(c, grid, index) for index in range(c.depth))
        self.image_encoder = ImageEncoder(PatchEmbed(c.patch, c.dim), attentions, grid, c.dim, c.prompt_dim)
        self.prompt_encoder = PromptEncoder(
            c.prompt_dim,
            grid,
            c.input_shape,
            boxes=c.boxes != "none",
            sin_cos_sin=c.sin_cos_sin,
            swap_pe_axes=c.swap_pe_axes,
            pad_point=c.pad_point,
            zero_first_mask=c.first_mask == "zeros",
        )
        self.mask_decoder = MaskDecoder(c.prompt_dim, c.decoder_heads, c.decoder_mlp_dim, mask_tokens=4, iou_outputs=4)

    def encode(self, image: Tensor) -> Features:
        """``{"image": (B, prompt_dim, d, h, w)}`` of a (B, 1, *input_shape) crop."""
        self.spec.check_image(image)
        return {"image": self.image_encoder(image)}

    def layer_features(self, image: Tensor) -> list[Tensor]:
        """What distillation compares: (B, d, h, w, dim) after each block, then the neck's (B, d, h, w, prompt_dim)."""
        self.spec.check_image(image)
        return self.image_encoder.layer_features(image)

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        """One mask (B, 1, D, H, W) from clicks and the earlier mask; ``lowres_logits`` has 4 voxels per token edge."""
        self.spec.check_prompts(prompts)
        if self.spec.click_memory == "newest":
            prompts = prompts.newest_click()
        tokens, valid, dense = self.prompt_encoder(prompts)
        positions = self.prompt_encoder.dense_positions()
        lowres, iou = self.mask_decoder(features["image"], positions, tokens, dense, maps=1, sparse_valid=valid)
        logits = F.interpolate(lowres, size=self.spec.input_shape_zyx, mode="trilinear", align_corners=False)
        return MaskOutput(logits, iou[:, :1], lowres)


class FastSam3D(SamMed3D):
    """The student of ``sam_med3d_b``; it starts from its teacher's tensors and learns its blocks' features.

    Source: the paper and its figures. The released code departs from both, which is not copied: the residual of its
    MLPs starts from the normalised tokens, so that the teacher's weights compute something else there; its sparse
    attention leaves the tokens in scrambled order; its fast decoder swaps heads and channels.
    """

    source = "FastSAM3D (Shen et al., 2024, arXiv:2403.09827); teacher SAM-Med3D (arXiv:2310.15161)"


def _attention(c: SamMed3DConfig, grid: IntTriple, index: int) -> nn.Module | None:
    """The attention of one block."""
    if index < c.plain_blocks:
        return None
    if c.attention == "dilated":
        return DilatedAttention(c.dim, c.heads, grid, c.patterns)
    window = 0 if index in c.global_blocks else c.window
    return GridAttention(c.dim, c.heads, grid, window, c.misbroadcast_relpos, c.pad_sink)


def variant_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Overrides that a published state dict needs: ``*_bbox_init`` and fine-tunes of it have two more embeddings."""
    corners = [f"prompt_encoder.point_embeddings.{index}.weight" for index in (2, 3)]
    return {"boxes": "stored"} if all(name in state for name in corners) else {}


def from_teacher(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``FastSam3D`` that starts from a SAM-Med3D's, twice as deep.

    Everything outside the blocks is the teacher's: patches, positions, neck, prompt encoder, mask decoder. Block i of
    the student takes the norms, the MLP and the projections of block 2i + 1, whose features it will be taught; relative
    positions keep the student's own start, as the heads have another width.

    Raises:
        InputError: if the teacher lacks a tensor or has one of another shape.
    """
    blocks, state = "image_encoder.blocks.", {}
    for name, own in student.items():
        if ".rel_pos_" in name:
            state[name] = own
            continue
        source = name
        if name.startswith(blocks):
            index, rest = name.removeprefix(blocks).split(".", 1)
            source = f"{blocks}{2 * int(index) + 1}.{rest}"
        if source not in teacher or teacher[source].shape != own.shape:
            found = tuple(teacher[source].shape) if source in teacher else "nothing"
            raise InputError(
                f"teacher must hold {source} of shape {tuple(own.shape)}, got {found}; use a sam_med3d_b checkpoint"
            )
        state[name] = teacher[source]
    return state


_SMALL = {"input_shape": (16, 16, 16), "patch": 8, "dim": 24, "depth": 2, "heads": 2}
_SMALL_DECODER = {"prompt_dim": 48, "decoder_mlp_dim": 32}
_CUBE = (256, 256, 256)

MODELS = family(
    SamMed3D,
    {
        "sam_med3d_b": SamMed3DConfig(),  # upstream's vit_b_ori, the only one with public weights
        "sam_med3d_b256": SamMed3DConfig(_CUBE, dim=384),  # upstream's vit_b, vit_l and vit_h
        "sam_med3d_l": SamMed3DConfig(_CUBE, dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
        "sam_med3d_h": SamMed3DConfig(_CUBE, dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    },
    tiny={**_SMALL, **_SMALL_DECODER, "global_blocks": (1,), "window": 3},
) | family(
    FastSam3D,
    {
        "fast_sam3d": SamMed3DConfig(
            depth=6,
            heads=6,
            global_blocks=(),
            window=0,
            misbroadcast_relpos=False,
            pad_sink=False,
            plain_blocks=2,
        )
    },
    tiny={**_SMALL, **_SMALL_DECODER, "plain_blocks": 1},
)

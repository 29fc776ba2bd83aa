"""SAM-Med3D as released: a 3D vision transformer, a prompt encoder and a two-way mask decoder, with the quirks its
weights depend on.

Every quirk is a switch of ``SamMed3DConfig``. Our own models, without them, are in ``samed3d_vit.py``. Read
``nn/vit.py`` next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch
from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_encoder import PromptEncoder
from samed3d.nn.released_decode import decode_released
from samed3d.nn.vit import ImageEncoder, PatchEmbed

SOURCE = "SAM-Med3D (Wang et al., 2023, arXiv:2310.15161), code and weights of uni-medical/SAM-Med3D"


@dataclass(frozen=True)
class SamMed3DConfig:
    """Numbers and switches of a SAM-Med3D.

    Attributes:
        input_shape: Crop shape in voxels, tensor-axis order; a multiple of ``patch``.
        patch: Voxels per token edge.
        dim: Encoder channels.
        depth: Encoder blocks.
        heads: Encoder attention heads.
        global_blocks: Indices of the blocks with global attention.
        window: Window edge of the others, in tokens.
        prompt_dim: Channels of the prompt encoder and the mask decoder.
        decoder_heads: Attention heads of the mask decoder.
        decoder_mlp_dim: Hidden channels of the mask decoder's MLPs.
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
    """

    input_shape: IntTriple
    patch: int
    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
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

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.input_shape)
        if len(shape) != 3 or any(n <= 0 or n % self.patch for n in shape):
            raise InputError(f"input_shape must be three multiples of the patch ({self.patch}), got {shape}")
        if self.boxes not in ("none", "stored", "used"):
            raise InputError(f"boxes must be none, stored or used, got {self.boxes!r}")
        object.__setattr__(self, "input_shape", shape)
        object.__setattr__(self, "global_blocks", tuple(self.global_blocks))

    @property
    def grid(self) -> IntTriple:
        """Tokens along each axis."""
        d, h, w = (n // self.patch for n in self.input_shape)
        return (d, h, w)


class SamMed3D(PromptableModel):
    """SAM-Med3D. State-dict names and shapes are those of the released checkpoint; ``iou`` is untrained there.

    Args:
        name: Registry name.
        config: Numbers and switches.

    Source: sections 3.1-3.2 of the paper; where the released code differs from it, as in the code.
    """

    def __init__(self, name: str, config: SamMed3DConfig) -> None:
        super().__init__()
        c = config
        self.numbers, self.config = c, asdict(c)
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
            source=SOURCE,
        )
        embed = PatchEmbed(c.patch, c.dim)
        self.image_encoder = ImageEncoder(
            embed,
            c.grid,
            c.dim,
            c.depth,
            c.heads,
            c.window,
            c.global_blocks,
            c.prompt_dim,
            c.misbroadcast_relpos,
            c.pad_sink,
        )
        self.prompt_encoder = PromptEncoder(
            c.prompt_dim, c.grid, c.input_shape, c.boxes != "none", c.sin_cos_sin, c.swap_pe_axes, c.pad_point
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
        """One mask (B, 1, D, H, W) from clicks and the earlier mask; ``lowres_logits`` has four voxels per token edge.

        Raises:
            InputError: if the prompts hold a box, which this model cannot understand.
        """
        if prompts.boxes is not None and "box" not in self.spec.prompts:
            raise InputError(
                f"prompts must be points or masks for {self.spec.name}, got a box; use a samed3d_* model for boxes"
            )
        newest, zeros = self.spec.click_memory == "newest", self.spec.first_mask == "zeros"
        lowres, iou = decode_released(self.prompt_encoder, self.mask_decoder, features["image"], prompts, newest, zeros)
        logits = F.interpolate(lowres, size=self.numbers.input_shape, mode="trilinear", align_corners=False)
        return MaskOutput(logits, iou, lowres)

    def _checked(self, image: Tensor) -> Tensor:
        d, h, w = self.numbers.input_shape
        if tuple(image.shape[1:]) != (1, d, h, w):
            raise InputError(
                f"image must be (B, 1, {d}, {h}, {w}) for {self.spec.name}, got {tuple(image.shape)}; resample the crop"
            )
        return image


def variant_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The switches that a published state dict asks for: ``*_bbox_init`` and its descendants bring two more prompt
    embeddings.
    """
    corners = [f"prompt_encoder.point_embeddings.{index}.weight" for index in (2, 3)]
    return {"boxes": "stored"} if all(name in state for name in corners) else {}


def sam_med3d_b(**overrides: Any) -> SamMed3D:
    """The released SAM-Med3D (upstream ``vit_b_ori``): 128^3 crops, 100,509,232 parameters; the only one with public
    weights.
    """
    config = SamMed3DConfig(
        input_shape=(128, 128, 128), patch=16, dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)
    )
    return SamMed3D("sam_med3d_b", replace(config, **overrides))


def sam_med3d_b256(**overrides: Any) -> SamMed3D:
    """Upstream ``vit_b``: 256^3 crops, narrow, 36,186,928 parameters."""
    config = SamMed3DConfig(
        input_shape=(256, 256, 256), patch=16, dim=384, depth=12, heads=12, global_blocks=(2, 5, 8, 11)
    )
    return SamMed3D("sam_med3d_b256", replace(config, **overrides))


def sam_med3d_l(**overrides: Any) -> SamMed3D:
    """Upstream ``vit_l``: 256^3 crops, 322,786,864 parameters."""
    config = SamMed3DConfig(
        input_shape=(256, 256, 256), patch=16, dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)
    )
    return SamMed3D("sam_med3d_l", replace(config, **overrides))


def sam_med3d_h(**overrides: Any) -> SamMed3D:
    """Upstream ``vit_h``: 256^3 crops, 652,434,992 parameters."""
    config = SamMed3DConfig(
        input_shape=(256, 256, 256), patch=16, dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)
    )
    return SamMed3D("sam_med3d_h", replace(config, **overrides))

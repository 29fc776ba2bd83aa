"""The image encoder of Segment Anything (2D): a vision transformer with windowed attention and relative positions.

State-dict names and shapes are those of ``image_encoder.*`` in ``sam_vit_{b,l,h}_*.pth``. Any image size that is a
multiple of the patch works: the position table is resampled, relative positions are interpolated. As in
``attention.py``, padding tokens of a partly filled window are never computed, yet the result equals SAM's, where they
take part in the softmax. This is the one file that imports timm. ``models/sam_backbone.py`` reads and freezes these
encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.nn.attention import GridAttention
from samed3d.nn.vit import ImageEncoder

SAM_SIZES: dict[str, dict[str, Any]] = {
    "sam_vit_b": {"dim": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)},
    "sam_vit_l": {"dim": 1024, "depth": 24, "heads": 16, "global_blocks": (5, 11, 17, 23)},
    "sam_vit_h": {"dim": 1280, "depth": 32, "heads": 16, "global_blocks": (7, 15, 23, 31)},
    # For tests: the same structure, 0.1 M parameters.
    "sam_vit_tiny": {"dim": 24, "depth": 4, "heads": 2, "global_blocks": (1, 3), "grid": 8, "window": 3, "out_dim": 16},
}
"""Numbers of the published encoders by name."""
TIMM_PREFIX = "timm:"


class Attention2d(GridAttention):
    """``GridAttention`` on a (B, H, W, C) grid of any size, with SAM's two tables, made for an edge of ``grid``, and
    its padded windows.

    Source: Segment Anything's released image encoder (after ViTDet and MViTv2).
    """

    def __init__(self, dim: int, heads: int, grid: int, window: int) -> None:
        super().__init__(dim, heads, (1, grid, grid), window, pad_sink=True)
        self.rel_pos_d = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return super().forward(x[:, None])[:, 0]

    def extent_on(self, x: Tensor) -> IntTriple:
        """Window edges in tokens on a (B, 1, H, W, C) grid."""
        return (1, self.window or x.shape[2], self.window or x.shape[3])


class SamEncoder2d(ImageEncoder):
    """SAM's image encoder, (B, 3, H, W) to (B, out_dim, H / patch, W / patch), with its numbers from ``SAM_SIZES``.

    ``grid`` is the edge of the token grid that the tables are made for; blocks not in ``global_blocks`` have windows.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        global_blocks: tuple[int, ...],
        grid: int = 64,
        window: int = 14,
        out_dim: int = 256,
        patch: int = 16,
    ) -> None:
        patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, kernel_size=patch, stride=patch)})
        windows = (0 if index in global_blocks else window for index in range(depth))
        attentions = (Attention2d(dim, heads, grid, edge) for edge in windows)
        super().__init__(patch_embed, attentions, (grid, grid), dim, out_dim)
        self.stride = patch

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) pixels to (B, H / patch, W / patch, dim) tokens with their positions.

        Raises:
            InputError: if an edge is no multiple of the patch.
        """
        if any(n % self.stride for n in x.shape[2:]):
            rule, remedy = f"multiples of {self.stride} pixels", "pad or resample the slices"
            raise InputError(f"image edges must be {rule}, got {tuple(x.shape[2:])}; {remedy}")
        tokens = self.get_submodule("patch_embed.proj")(x).movedim(1, -1)
        return tokens + resampled_positions(self.pos_embed, tokens.shape[1], tokens.shape[2])


def resampled_positions(table: Tensor, height: int, width: int) -> Tensor:
    """(1, G, G, C) positions for another grid, bilinearly as SAM3D and MA-SAM do; (1, height, width, C)."""
    if tuple(table.shape[1:3]) == (height, width):
        return table
    channels_first = rearrange(table, "1 h w c -> 1 c h w")
    resampled = F.interpolate(channels_first, size=(height, width), mode="bilinear", align_corners=False)
    return rearrange(resampled, "1 c h w -> 1 h w c")


class TimmEncoder2d(nn.Module):
    """A vision transformer of timm as an image encoder: (B, 3, H, W) to (B, out_dim, H / stride, W / stride).

    Raises:
        InputError: if timm is not installed or knows no such model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        what = f"backbone {TIMM_PREFIX}{name}"
        try:
            import timm
        except ImportError as error:
            raise InputError(f"{what} needs timm: pip install 'samed3d[timm]' ({error})") from error
        except RuntimeError as error:  # torchvision of another build than torch
            remedy = "install a torchvision that matches torch"
            raise InputError(f"{what} needs timm, which cannot be imported ({error}); {remedy}") from error
        sized: dict[str, Any] = {} if name.startswith("samvit") else {"dynamic_img_size": True}
        try:
            network: Any = timm.create_model(name, pretrained=False, num_classes=0, **sized)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{what} cannot be built: {error}; name one of timm's ViTs") from error
        self.network = network
        has_neck = name.startswith("samvit") and isinstance(getattr(network, "neck", None), nn.Sequential)
        self.out_dim = int(network.neck[0].out_channels) if has_neck else int(network.num_features)
        self.stride = int(network.feature_info[-1]["reduction"])

    def forward(self, image: Tensor) -> Tensor:
        """Features before pooling; SAM's neck where the model has one."""
        network: Any = self.network
        x = network.forward_features(image)
        if x.ndim == 4:
            return x
        h, w = image.shape[2] // self.stride, image.shape[3] // self.stride
        return rearrange(x[:, -h * w :], "b (h w) c -> b c h w", h=h, w=w)  # class and register tokens come first


def build_encoder(name: str, seed: int = 0) -> SamEncoder2d | TimmEncoder2d:
    """An encoder by name (a key of ``SAM_SIZES`` or ``timm:NAME``) with random weights that follow from the seed alone.

    Raises:
        InputError: for an unknown name.
    """
    if name.startswith(TIMM_PREFIX):
        encoder: SamEncoder2d | TimmEncoder2d = TimmEncoder2d(name.removeprefix(TIMM_PREFIX))
    elif name in SAM_SIZES:
        encoder = SamEncoder2d(**SAM_SIZES[name])
    else:
        raise InputError(f"backbone must be one of {', '.join(SAM_SIZES)} or timm:NAME, got {name!r}")
    fill_randomly(encoder, seed)
    return encoder


@torch.no_grad()
def fill_randomly(module: nn.Module, seed: int) -> None:
    """Weights ~ N(0, 0.02) cut at two deviations, biases 0, norms 1; on the meta device nothing is done."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim >= 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator).clamp(-2, 2) * 0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def encoder_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The image encoder's part of a SAM checkpoint, in this file's names; a ``timm:NAME`` gets its own names.

    ``state`` is a whole SAM state dict (``image_encoder.*`` beside prompt encoder and mask decoder), an encoder alone,
    or has timm's names.
    """
    prefix = "image_encoder."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or dict(state)
    to_timm = name.startswith(TIMM_PREFIX)
    pairs = (("mlp.fc1.", "mlp.lin1."), ("mlp.fc2.", "mlp.lin2."))
    renamed = {}
    for key, value in own.items():
        for theirs, ours in pairs:
            key = key.replace(ours, theirs) if to_timm else key.replace(theirs, ours)
        renamed[f"network.{key}" if to_timm and not key.startswith("network.") else key] = value
    return renamed

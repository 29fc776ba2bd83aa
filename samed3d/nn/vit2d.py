"""The image encoder of Segment Anything (2D): a vision transformer with windowed attention, relative positions and a
convolutional neck.

State-dict names and shapes are those of ``image_encoder.*`` in ``sam_vit_{b,l,h}_*.pth``. Any image size that is a
multiple of the patch works: the position table is resampled, relative positions are interpolated. As in
``attention.py``, padding tokens of a partly filled window are never computed, yet the result equals SAM's, where they
take part in the softmax. This is the one file that imports timm.

Not here: reading a checkpoint (``models/weights.py``), freezing it (``frozen.py``), adapting it to 3D
(``adapters3d.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.nn.norm import LayerNorm3d
from samed3d.nn.vit import Mlp

SAM_SIZES: dict[str, dict[str, Any]] = {
    "sam_vit_b": {"dim": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)},
    "sam_vit_l": {"dim": 1024, "depth": 24, "heads": 16, "global_blocks": (5, 11, 17, 23)},
    "sam_vit_h": {"dim": 1280, "depth": 32, "heads": 16, "global_blocks": (7, 15, 23, 31)},
    # For tests: the same structure, 0.1 M parameters.
    "sam_vit_tiny": {"dim": 24, "depth": 4, "heads": 2, "global_blocks": (1, 3), "grid": 8, "window": 3, "out_dim": 16},
}
"""Numbers of the published encoders by name."""
TIMM_PREFIX = "timm:"


class Attention2d(nn.Module):
    """Multi-head self-attention on a (B, H, W, C) grid with decomposed relative positions, global or in windows.

    Args:
        dim: Channels.
        heads: Attention heads.
        grid: Edge of the token grid that the tables were made for.
        window: Window edge in tokens, 0 for global attention.

    Source: Segment Anything's released image encoder (after ViTDet and MViTv2).
    """

    def __init__(self, dim: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim)  # a module of any kind: adapters wrap it
        self.proj = nn.Linear(dim, dim)
        rows = 2 * (window or grid) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, height, width, 3, self.heads, dim // self.heads).permute(3, 0, 4, 1, 2, 5)
        if not self.window or (height == self.window and width == self.window):
            return self.proj(self._attend(q, k, v))
        out = v.new_empty(batch, height, width, dim)
        for rows in _spans(height, self.window):
            for columns in _spans(width, self.window):
                part = [_windows(t[:, :, rows[0] : rows[1], columns[0] : columns[1]], self.window) for t in (q, k, v)]
                answer = self._attend(*part)
                out[:, rows[0] : rows[1], columns[0] : columns[1]] = _from_windows(
                    answer, batch, rows, columns, self.window
                )
        return self.proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Within windows; (B, heads, h, w, e) each, real tokens only; returns (B, h, w, C)."""
        batch, heads, h, w, e = q.shape
        edges = (self.window or h, self.window or w)
        row = torch.einsum("bnhwe,hke->bnhwk", q, relative_table(self.rel_pos_h, edges[0])[:h].to(q.dtype))
        column = torch.einsum("bnhwe,wke->bnhwk", q, relative_table(self.rel_pos_w, edges[1])[:w].to(q.dtype))
        keys, values = k.flatten(2, 3), v.flatten(2, 3)
        bias = (row[..., :h, None] + column[..., None, :w]).flatten(4)
        if (h, w) != edges:
            # All padding keys share one key and one value, those of a zero token: their softmax weights add up to that
            # of a single key.
            pad = self.qkv(q.new_zeros(1, heads * e)).reshape(3, 1, heads, 1, e).expand(-1, batch, -1, -1, -1)
            keys, values = torch.cat([keys, pad[1]], 2), torch.cat([values, pad[2]], 2)
            bias = torch.cat([bias, _sink(row.float(), column.float(), h, w).to(bias.dtype)[..., None]], -1)
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3), keys, values, attn_mask=bias.flatten(2, 3), scale=self.scale
        )
        return out.transpose(1, 2).reshape(batch, h, w, heads * e)


def relative_table(table: Tensor, edge: int) -> Tensor:
    """(R, e) relative positions as (edge, edge, e), entry [q, k] for the offset q - k; interpolated where R is not 2
    edge - 1.
    """
    rows = 2 * edge - 1
    if table.shape[0] != rows:
        table = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T
    at = torch.arange(edge, device=table.device)
    return table[at[:, None] - at + edge - 1]


def _sink(row: Tensor, column: Tensor, h: int, w: int) -> Tensor:
    """Log-sum-exp of the relative position bias over the padding keys of a window: rows below h, and columns beyond w
    in real rows.
    """
    parts = []
    if h < row.shape[-1]:
        parts.append(row[..., h:].logsumexp(-1) + column.logsumexp(-1))
    if w < column.shape[-1]:
        parts.append(row[..., :h].logsumexp(-1) + column[..., w:].logsumexp(-1))
    return torch.stack(parts, -1).logsumexp(-1)


def _spans(size: int, window: int) -> list[tuple[int, int]]:
    """The stretch covered by full windows, and the rest."""
    full = size // window * window
    return [(a, b) for a, b in ((0, full), (full, size)) if b > a]


def _windows(x: Tensor, window: int) -> Tensor:
    """(B, heads, H, W, e), each edge below ``window`` or a multiple of it, to (B * windows, heads, h, w, e)."""
    batch, heads, height, width, e = x.shape
    h, w = min(window, height), min(window, width)
    return (
        x.reshape(batch, heads, height // h, h, width // w, w, e)
        .permute(0, 2, 4, 1, 3, 5, 6)
        .reshape(-1, heads, h, w, e)
    )


def _from_windows(x: Tensor, batch: int, rows: tuple[int, int], columns: tuple[int, int], window: int) -> Tensor:
    """Inverse of ``_windows`` on (B * windows, h, w, C)."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    h, w = min(window, height), min(window, width)
    return (
        x.reshape(batch, height // h, width // w, h, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
    )


class Block2d(nn.Module):
    """Pre-norm transformer block on a (B, H, W, C) grid."""

    def __init__(self, dim: int, heads: int, grid: int, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention2d(dim, heads, grid, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SamEncoder2d(nn.Module):
    """SAM's image encoder.

    Args:
        dim: Token channels.
        depth: Blocks.
        heads: Attention heads.
        global_blocks: Indices of the blocks that attend globally.
        grid: Edge of the token grid that the tables are made for.
        window: Window edge of the other blocks.
        out_dim: Channels of the neck's output.
        patch: Pixels per token edge.
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
        super().__init__()
        self.dim, self.stride, self.out_dim = dim, patch, out_dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, kernel_size=patch, stride=patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(
            Block2d(dim, heads, grid, 0 if i in global_blocks else window) for i in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out_dim, kernel_size=1, bias=False),
            LayerNorm3d(out_dim),  # it normalises the channels of images just as well
            nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm3d(out_dim),
        )

    def tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) pixels to (B, H / patch, W / patch, dim) tokens with their positions.

        Raises:
            InputError: if an edge is no multiple of the patch.
        """
        if any(n % self.stride for n in image.shape[2:]):
            raise InputError(
                f"image edges must be multiples of {self.stride} pixels, got {tuple(image.shape[2:])}; pad or resample the slices"
            )
        x = self.patch_embed["proj"](image).permute(0, 2, 3, 1)
        return x + resampled_positions(self.pos_embed, x.shape[1], x.shape[2])

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, out_dim, H / patch, W / patch)."""
        x = self.tokens(image)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def resampled_positions(table: Tensor, height: int, width: int) -> Tensor:
    """(1, G, G, C) positions for another grid, bilinearly as SAM3D and MA-SAM do; (1, height, width, C)."""
    if tuple(table.shape[1:3]) == (height, width):
        return table
    size = (height, width)
    return F.interpolate(table.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


class TimmEncoder2d(nn.Module):
    """Any vision transformer of timm as an image encoder: (B, 3, H, W) to (B, out_dim, H / stride, W / stride).

    Args:
        name: timm's model name.

    Raises:
        InputError: if timm is not installed or knows no such model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise InputError(
                f"backbone {TIMM_PREFIX}{name} needs timm: pip install 'samed3d[timm]' ({error})"
            ) from error
        except RuntimeError as error:  # torchvision of another build than torch
            raise InputError(
                f"backbone {TIMM_PREFIX}{name} needs timm, which cannot be imported ({error}); install matching torchvision"
            ) from error
        sized: dict[str, Any] = {} if name.startswith("samvit") else {"dynamic_img_size": True}
        try:
            network: Any = timm.create_model(name, pretrained=False, num_classes=0, **sized)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"backbone {TIMM_PREFIX}{name} cannot be built: {error}; name one of timm's ViTs"
            ) from error
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
        grid = (image.shape[2] // self.stride, image.shape[3] // self.stride)
        return x[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)  # class and register tokens come first


def build_encoder(name: str, seed: int = 0) -> SamEncoder2d | TimmEncoder2d:
    """An encoder by name with random weights that follow from the seed alone.

    Args:
        name: A key of ``SAM_SIZES`` or ``timm:NAME``.
        seed: Of the weights.

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
    """The image encoder's part of a SAM checkpoint, in this file's names.

    Args:
        state: A whole SAM state dict (``image_encoder.*`` beside prompt encoder and mask decoder), an encoder alone, or
            timm's names.
        name: The encoder that it is for, as in ``build_encoder``; a ``timm:NAME`` gets its own names.
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

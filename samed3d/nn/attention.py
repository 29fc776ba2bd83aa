"""Self-attention on a 3D token grid with decomposed relative positions, global or in windows.

Windowed attention here never computes a padding token, yet equals attention over zero-padded, unmasked windows
(SAM-Med3D) exactly. After the normalisation that precedes it, a padding token is zero, so its query, key and value are
the projection's bias. All padding keys of a window therefore share one value, and for each query their softmax weights
add up to that of a single key, the *sink*, whose logit is the log-sum-exp over the padding keys. The relative position
bias of a key is a sum of terms of one key axis each (or, as released, of one axis and the last), so that this
log-sum-exp factorises per axis and the padding keys are never listed.

Not here: the transformer block around it (``vit.py``), attention between tokens and image (``two_way.py``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple


@dataclass(frozen=True)
class _Terms:
    """The relative position bias of one window as a sum of three terms, over the full window edge K on every key axis.

    For real queries (a, b, c) and keys (x, y, z), with n over batch and heads:
    correct: ``first[n,a,b,c,x] + second[n,a,b,c,y] + third[n,a,b,c,z]``;
    as released: ``first[n,a,b,c,z] + second[n,a,b,x,z] + third[n,a,b,y,z]``.
    """

    first: Tensor
    second: Tensor
    third: Tensor


class GridAttention(nn.Module):
    """Multi-head self-attention on a (B, D, H, W, C) token grid.

    Args:
        dim: Channels; a multiple of ``heads``.
        heads: Attention heads.
        grid: Token grid.
        window: Window edge in tokens, or 0 for global attention. The grid is covered from its low corner; windows at
            the high faces may hold fewer tokens.
        misbroadcast_relpos: Add the relative position bias as SAM-Med3D's released code does: with keys (x, y, z) and
            queries (a, b, c),
            ``q[a,b,c].Rd[a-z] + q[a,b,x].Rh[b-z] + q[a,b,y].Rw[y-z]`` instead of ``q[a,b,c].(Rd[a-x] + Rh[b-y] +
            Rw[c-z])``. Its weights were trained with it. Needs a cubic grid.
        pad_sink: Let the padding of partly filled windows take part as unmasked keys (SAM-Med3D). False leaves them
            out.

    Raises:
        InputError: if ``misbroadcast_relpos`` meets a grid that is not cubic.

    Source: decomposed relative positions of MViTv2 and SAM; both switches as in SAM-Med3D's released code, which
    differs from SAM.
    """

    def __init__(
        self, dim: int, heads: int, grid: IntTriple, window: int, misbroadcast_relpos: bool, pad_sink: bool
    ) -> None:
        super().__init__()
        if misbroadcast_relpos and len(set(grid)) > 1:
            remedy = "use a cube or misbroadcast_relpos=False"
            raise InputError(
                f"input_shape must be a cube for the released relative positions, got a token grid of {grid}; {remedy}"
            )
        self.heads, self.grid, self.window = heads, grid, window
        self.misbroadcast_relpos, self.pad_sink = misbroadcast_relpos, pad_sink
        head_dim = dim // heads
        self.scale = head_dim**-0.5
        self.extent: IntTriple = (window, window, window) if window else grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_d = nn.Parameter(torch.zeros(2 * self.extent[0] - 1, head_dim))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * self.extent[1] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * self.extent[2] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to the same shape."""
        batch, *grid, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, *grid, 3, self.heads, dim // self.heads).permute(4, 0, 5, 1, 2, 3, 6)
        rows = [
            [slice(start, start + edge) for start in range(0, n, edge)]
            for n, edge in zip(grid, self.extent, strict=True)
        ]
        windows = list(itertools.product(*rows))
        if len(windows) == 1:
            return self.proj(self._attend(q, k, v))
        out = v.new_empty(x.shape)
        for d, h, w in windows:
            out[:, d, h, w] = self._attend(q[:, :, d, h, w], k[:, :, d, h, w], v[:, :, d, h, w])
        return self.proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within one window; (B, heads, d, h, w, head_dim) each, the window's real tokens only; returns (B,
        d, h, w, C).
        """
        batch, heads, *real, head_dim = q.shape
        terms = self._released_terms(q) if self.misbroadcast_relpos else self._correct_terms(q)
        keys, values = k.flatten(2, 4), v.flatten(2, 4)
        sink = None
        if self.pad_sink and tuple(real) != self.extent:
            _, k_pad, v_pad = self.qkv.bias.reshape(3, 1, heads, 1, head_dim).expand(3, batch, heads, 1, head_dim)
            keys, values = torch.cat([keys, k_pad], 2), torch.cat([values, v_pad], 2)
            sink = _released_sink(terms, real) if self.misbroadcast_relpos else _correct_sink(terms, real)
        bias = _logit_bias(terms, sink, real, self.misbroadcast_relpos).unflatten(0, (batch, heads))
        out = F.scaled_dot_product_attention(q.flatten(2, 4), keys, values, attn_mask=bias, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, *real, heads * head_dim)

    def _released_terms(self, q: Tensor) -> _Terms:
        d, h, w = q.shape[2:5]
        edge = self.extent[2]
        q = q.flatten(0, 1)
        # The second and third terms read queries along the whole window edge, beyond the real tokens the constant one
        # of a padding token.
        pad_query = self.qkv.bias.unflatten(0, (3, self.heads, -1))[0].repeat(q.shape[0] // self.heads, 1)
        pad_queries = pad_query[:, None, None, None].expand(-1, d, h, edge - w, -1)
        line = torch.cat([q, pad_queries], 3) if w < edge else q
        return _Terms(
            first=torch.einsum("nabce,aze->nabcz", q, _by_offset(self.rel_pos_d, d)),
            second=torch.einsum("nabxe,bze->nabxz", line, _by_offset(self.rel_pos_h, h)),
            third=torch.einsum("nabye,yze->nabyz", line, _by_offset(self.rel_pos_w, edge)),
        )

    def _correct_terms(self, q: Tensor) -> _Terms:
        return _Terms(*relative_terms(q.flatten(0, 1), (self.rel_pos_d, self.rel_pos_h, self.rel_pos_w)))


def relative_terms(q: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Decomposed relative positions: per query (n, d, h, w, e) the bias of each key position along z, y and x, (n, d,
    h, w, K) each.
    """
    d, h, w = q.shape[1:4]
    return (
        torch.einsum("nabce,axe->nabcx", q, _by_offset(tables[0], d)),
        torch.einsum("nabce,bye->nabcy", q, _by_offset(tables[1], h)),
        torch.einsum("nabce,cze->nabcz", q, _by_offset(tables[2], w)),
    )


def _by_offset(table: Tensor, queries: int) -> Tensor:
    """(2K-1, e) relative positions as (queries, K, e), entry [q, k] for the offset q - k."""
    edge = (table.shape[0] + 1) // 2
    query = torch.arange(queries, device=table.device)
    key = torch.arange(edge, device=table.device)
    return table[query[:, None] - key + edge - 1]


def _logit_bias(terms: _Terms, sink: Tensor | None, real: list[int], released: bool) -> Tensor:
    """(n, N, N) bias between the N real tokens of a window, or (n, N, N + 1) with the sink in the last column.

    Both summands are laid out with the key's (y, z) as one contiguous axis and added into the final buffer, which
    dominates the time.
    """
    d, h, w = real
    if released:
        per_query = terms.first[..., None, :w].expand(-1, -1, -1, -1, h, -1).flatten(4)[..., None, :]
        shared = (terms.second[:, :, :, :d, None, :w] + terms.third[:, :, :, None, :h, :w]).flatten(4)[:, :, :, None]
    else:
        per_query = (terms.second[..., :h, None] + terms.third[..., None, :w]).flatten(4)[..., None, :]
        shared = terms.first[..., :d, None]
    bias = per_query.new_empty(*per_query.shape[:4], d * h * w + (0 if sink is None else 1))
    to_real = bias[..., : d * h * w].unflatten(-1, (d, h * w))
    to_real.copy_(per_query.expand_as(to_real))  # an ONNX exporter does not widen a copy by itself
    to_real.add_(shared)
    if sink is not None:
        bias[..., -1] = sink
    return bias.flatten(1, 3)


def _released_sink(terms: _Terms, real: list[int]) -> Tensor:
    """(n, a, b, c) log-sum-exp over the padding keys, as the disjoint sets x padded; y padded; z padded (x, y, z: key
    axes).
    """
    d, h, w = real
    first, second, third = terms.first, terms.second, terms.third
    x_real, y_real = second[:, :, :, :d].logsumexp(3), third[:, :, :, :h].logsumexp(3)
    parts = [first[..., w:] + (x_real + y_real)[:, :, :, None, w:]]
    if d < second.shape[3]:
        parts.append(first + (second[:, :, :, d:].logsumexp(3) + third.logsumexp(3))[:, :, :, None])
    if h < third.shape[3]:
        parts.append(first + (x_real + third[:, :, :, h:].logsumexp(3))[:, :, :, None])
    return torch.cat(parts, -1).logsumexp(-1)


def _correct_sink(terms: _Terms, real: list[int]) -> Tensor:
    """As ``_released_sink`` for the correct bias, where each term has a key axis of its own."""
    d, h, w = real
    first, second, third = terms.first, terms.second, terms.third
    x_real, y_real = first[..., :d].logsumexp(-1), second[..., :h].logsumexp(-1)
    parts = []
    if d < first.shape[-1]:
        parts.append(first[..., d:].logsumexp(-1) + second.logsumexp(-1) + third.logsumexp(-1))
    if h < second.shape[-1]:
        parts.append(x_real + second[..., h:].logsumexp(-1) + third.logsumexp(-1))
    if w < third.shape[-1]:
        parts.append(x_real + y_real + third[..., w:].logsumexp(-1))
    return torch.stack(parts, -1).logsumexp(-1)

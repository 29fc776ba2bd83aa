"""Self-attention on a 3D token grid with decomposed relative positions: global, in windows, or dilated.

Windowed attention here never computes a padding token, yet equals attention over zero-padded, unmasked windows
(SAM-Med3D) exactly. After the normalisation that precedes it, a padding token is zero, so its query, key and value are
the projection's bias. All padding keys of a window therefore share one value, and for each query their softmax weights
add up to that of a single key, the *sink*, whose logit is the log-sum-exp over the padding keys. The relative position
bias of a key is a sum of terms of one key axis each (or, as released, of one axis and the last), so that this
log-sum-exp factorises per axis and the padding keys are never listed.

The transformer block around the attention is in ``vit.py``, attention between tokens and image in ``mask_decoder.py``.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.geometry import IntTriple


class _Terms(NamedTuple):
    """The relative position bias of one window as a sum of three terms, over the full window edge K on every key axis.

    For real queries (a, b, c) and keys (x, y, z), with n over batch and heads:
    correct: ``first[n,a,b,c,x] + second[n,a,b,c,y] + third[n,a,b,c,z]``, without ``first`` in 2D;
    as released: ``first[n,a,b,c,z] + second[n,a,b,x,z] + third[n,a,b,y,z]``.
    """

    first: Tensor | None
    second: Tensor
    third: Tensor


class GridAttention(nn.Module):
    """Multi-head self-attention on a (B, D, H, W, C) token grid, global or in windows of an edge of ``window`` tokens.

    Windows cover the grid from its low corner; those at the high faces may hold fewer tokens. With ``pad_sink`` the
    padding of partly filled windows takes part as unmasked keys (SAM-Med3D).

    ``misbroadcast_relpos`` adds the relative position bias as SAM-Med3D's released code does, with which its weights
    were trained: for keys (x, y, z) and queries (a, b, c), ``q[a,b,c].Rd[a-z] + q[a,b,x].Rh[b-z] + q[a,b,y].Rw[y-z]``
    instead of ``q[a,b,c].(Rd[a-x] + Rh[b-y] + Rw[c-z])``.

    Raises:
        InputError: if ``misbroadcast_relpos`` meets a grid that is not cubic.

    Source: decomposed relative positions of MViTv2 and SAM; both switches as in SAM-Med3D's released code.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: IntTriple,
        window: int = 0,
        misbroadcast_relpos: bool = False,
        pad_sink: bool = False,
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
        self.rel_pos_d: nn.Parameter | None = nn.Parameter(torch.zeros(2 * self.extent[0] - 1, head_dim))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * self.extent[1] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * self.extent[2] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to the same shape."""
        batch, extent = x.shape[0], self.extent_on(x)
        q, k, v = rearrange(self.qkv(x), "b d h w (three heads e) -> three b heads d h w e", three=3, heads=self.heads)
        if all(n <= edge for n, edge in zip(x.shape[1:4], extent, strict=True)):
            return self.proj(self._attend(q, k, v, extent))
        regions = list(itertools.product(*map(_regions, x.shape[1:4], extent)))
        out = v.new_empty(x.shape)
        for region in regions:
            sizes = [axis.stop - axis.start for axis in region]
            i, j, n = map(min, sizes, extent)
            queries, keys, values = (
                rearrange(t[:, :, *region], "b heads (d i) (h j) (w n) e -> (b d h w) heads i j n e", i=i, j=j, n=n)
                for t in (q, k, v)
            )
            answer = self._attend(queries, keys, values, extent)
            counts = {"b": batch, "d": sizes[0] // i, "h": sizes[1] // j}
            answer = rearrange(answer, "(b d h w) i j n c -> b (d i) (h j) (w n) c", **counts)
            if len(regions) == 1:
                return self.proj(answer)
            out[:, *region] = answer
        return self.proj(out)

    def extent_on(self, x: Tensor) -> IntTriple:
        """Window edges in tokens on a (B, D, H, W, C) grid; the whole grid for global attention."""
        return self.extent

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extent: IntTriple) -> Tensor:
        """Attention between the real tokens of windows; (B, heads, d, h, w, e) each to (B, d, h, w, C)."""
        batch, heads, d, h, w, _ = q.shape
        queries, keys, values = (rearrange(t, "b heads d h w e -> b heads (d h w) e") for t in (q, k, v))
        if self.pad_sink and (d, h, w) != extent:
            bias = self.qkv.bias.to(k.dtype)
            _, k_pad, v_pad = repeat(bias, "(three heads e) -> three b heads 1 e", three=3, heads=heads, b=batch)
            keys, values = torch.cat([keys, k_pad], 2), torch.cat([values, v_pad], 2)
        bias = self._bias(q, extent)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=self.scale)
        return rearrange(out, "b heads (d h w) e -> b d h w (heads e)", d=d, h=h, w=w)

    def _bias(self, q: Tensor, extent: IntTriple) -> Tensor:
        """(B, heads, N, N) bias between a window's N real tokens, or (B, heads, N, N + 1) with the sink."""
        batch, real = q.shape[0], list(q.shape[2:5])
        padded = self.pad_sink and tuple(real) != extent
        if self.misbroadcast_relpos:
            terms = self._released_terms(q)
            sink = _released_sink(terms, real) if padded else None
        else:
            terms = self._correct_terms(q, extent)
            sink = _correct_sink(terms, real) if padded else None
        return _logit_bias(terms, sink, real, self.misbroadcast_relpos).unflatten(0, (batch, -1))

    def _released_terms(self, q: Tensor) -> _Terms:
        d, h, w = q.shape[2:5]
        edge = self.extent[2]
        q = q.flatten(0, 1)
        # The second and third terms read queries along the whole window edge; beyond the real tokens those of padding.
        pad_query = self.qkv.bias.unflatten(0, (3, self.heads, -1))[0].repeat(q.shape[0] // self.heads, 1)
        pad_queries = pad_query[:, None, None, None].expand(-1, d, h, edge - w, -1)
        line = torch.cat([q, pad_queries], 3) if w < edge else q
        assert self.rel_pos_d is not None  # in 3D
        return _Terms(
            first=torch.einsum("nabce,aze->nabcz", q, relative_table(self.rel_pos_d, edge)[:d]),
            second=torch.einsum("nabxe,bze->nabxz", line, relative_table(self.rel_pos_h, edge)[:h]),
            third=torch.einsum("nabye,yze->nabyz", line, relative_table(self.rel_pos_w, edge)),
        )

    def _correct_terms(self, q: Tensor, extent: IntTriple) -> _Terms:
        """Per query the bias of each key position along z, y and x."""
        q = q.flatten(0, 1)
        tables = zip((self.rel_pos_d, self.rel_pos_h, self.rel_pos_w), extent, q.shape[1:4], strict=True)
        d, h, w = (None if t is None else relative_table(t, edge)[:n].to(q.dtype) for t, edge, n in tables)
        return _Terms(
            first=None if d is None else torch.einsum("nabce,axe->nabcx", q, d),
            second=torch.einsum("nabce,bye->nabcy", q, h),
            third=torch.einsum("nabce,cze->nabcz", q, w),
        )


def _regions(size: int, window: int) -> list[slice]:
    """The stretch of an axis that full windows cover, and the rest."""
    full = size // window * window
    return [slice(a, b) for a, b in ((0, full), (full, size)) if b > a]


def relative_table(table: Tensor, edge: int) -> Tensor:
    """(edge, edge, e) relative positions, entry [q, k] for the offset q - k.

    ``table`` is (R, e) by offset, interpolated to 2 ``edge`` - 1 rows if R differs.
    """
    rows = 2 * edge - 1
    if table.shape[0] != rows:
        table = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T
    at = torch.arange(edge, device=table.device)
    return table[at[:, None] - at + edge - 1]


def _logit_bias(terms: _Terms, sink: Tensor | None, real: list[int], released: bool) -> Tensor:
    """(n, N, N) bias between the N real tokens of a window, or (n, N, N + 1) with the sink in the last column.

    Both summands are laid out with the key's (y, z) as one contiguous axis and added into the final buffer, which
    dominates the time.
    """
    d, h, w = real
    shared: Tensor | None = None
    if released:
        assert terms.first is not None
        per_query = terms.first[..., None, :w].expand(-1, -1, -1, -1, h, -1).flatten(4)[..., None, :]
        shared = (terms.second[:, :, :, :d, None, :w] + terms.third[:, :, :, None, :h, :w]).flatten(4)[:, :, :, None]
    else:
        per_query = (terms.second[..., :h, None] + terms.third[..., None, :w]).flatten(4)[..., None, :]
        if terms.first is not None:
            shared = terms.first[..., :d, None]
    if shared is None and sink is None:
        return per_query.flatten(4).flatten(1, 3)
    bias = per_query.new_empty(*per_query.shape[:4], d * h * w + (0 if sink is None else 1))
    to_real = bias[..., : d * h * w].unflatten(-1, (d, h * w))
    to_real.copy_(per_query.expand_as(to_real))  # an ONNX exporter does not widen a copy by itself
    if shared is not None:
        to_real.add_(shared)
    if sink is not None:
        bias[..., -1] = sink
    return bias.flatten(1, 3)


def _released_sink(terms: _Terms, real: list[int]) -> Tensor:
    """(n, a, b, c) log-sum-exp over the padding keys: the disjoint sets of padded x, padded y and padded z."""
    d, h, w = real
    first, second, third = terms
    assert first is not None
    x_real, y_real = second[:, :, :, :d].logsumexp(3), third[:, :, :, :h].logsumexp(3)
    parts = [first[..., w:] + (x_real + y_real)[:, :, :, None, w:]]
    if d < second.shape[3]:
        parts.append(first + (second[:, :, :, d:].logsumexp(3) + third.logsumexp(3))[:, :, :, None])
    if h < third.shape[3]:
        parts.append(first + (x_real + third[:, :, :, h:].logsumexp(3))[:, :, :, None])
    return torch.cat(parts, -1).logsumexp(-1)


def _correct_sink(terms: _Terms, real: list[int]) -> Tensor:
    """As ``_released_sink`` for the correct bias, where each term has a key axis of its own."""
    given = [(term.float(), n) for term, n in zip(terms, real, strict=True) if term is not None]
    every = [term.logsumexp(-1) for term, _ in given]
    inside, parts = torch.zeros_like(every[0]), []
    for axis, (term, n) in enumerate(given):  # keys padded on this axis, real on those before, anything on those after
        if n < term.shape[-1]:
            parts.append(sum(every[axis + 1 :], inside + term[..., n:].logsumexp(-1)))
        inside = inside + term[..., :n].logsumexp(-1)
    return torch.stack(parts, -1).logsumexp(-1)


class DilatedAttention(GridAttention):
    """``GridAttention`` in which each token attends to a few others: near ones densely, far ones sparsely.

    The tokens of the grid are one sequence (x fastest). A pattern (segment, dilation) cuts it into segments and takes
    every dilation-th token of a segment as one group, at every offset, so that each token is in exactly one group per
    pattern. A token's weights over the groups of all patterns add up to one. The state dict is that of global
    attention, which one pattern of one whole segment equals.

    Raises:
        InputError: if there is no pattern, a segment does not divide the tokens or a dilation its segment.

    Source: dilated attention of LongNet, in FastSAM3D for image tokens. The released FastSAM3D concatenates its groups
    without putting the tokens back in their order and drops the positions; here both are kept.
    """

    def __init__(self, dim: int, heads: int, grid: IntTriple, patterns: tuple[tuple[int, int], ...]) -> None:
        super().__init__(dim, heads, grid)
        count = math.prod(grid)
        for segment, dilation in patterns:
            if segment < 1 or dilation < 1 or count % segment or segment % dilation:
                rule = f"a segment must divide the {count} tokens and a dilation its segment"
                raise InputError(f"patterns: {rule}, got ({segment}, {dilation}); choose other numbers")
        if not patterns:
            raise InputError("patterns must hold at least one (segment, dilation), got none")
        self.patterns = patterns

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extent: IntTriple) -> Tensor:
        """(B, heads, d, h, w, e) each; returns (B, d, h, w, C)."""
        heads, (d, h, w) = q.shape[1], q.shape[2:5]
        terms = self._correct_terms(q, extent)
        q, k, v = (rearrange(t, "b heads d h w e -> (b heads) (d h w) e") for t in (q, k, v))
        at = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in (d, h, w)))
        logits, values = [], []
        for segment, dilation in self.patterns:
            group = token_groups(q.shape[1], segment, dilation, q.device)
            scores = torch.einsum("ngqe,ngke->ngqk", q[:, group] * self.scale, k[:, group])
            for term, axis in zip(terms, at.T, strict=True):
                assert term is not None  # in 3D
                by_key = term.flatten(1, 3)[:, group]
                scores = scores + by_key.gather(-1, axis[group][None, :, None, :].expand_as(scores))
            back = group.flatten().argsort()
            logits.append(scores.flatten(1, 2)[:, back])
            values.append(repeat(v[:, group], "n g k e -> n (g q) k e", q=group.shape[1])[:, back])
        weights = torch.cat(logits, -1).softmax(-1)
        out = torch.einsum("ntk,ntke->nte", weights, torch.cat(values, 2))
        return rearrange(out, "(b heads) (d h w) e -> b d h w (heads e)", heads=heads, d=d, h=h, w=w)


def token_groups(count: int, segment: int, dilation: int, device: torch.device) -> Tensor:
    """(groups, segment / dilation) token numbers; each of ``count`` tokens is in exactly one group."""
    order = torch.arange(count, device=device)
    return rearrange(order, "(s k step) -> (s step) k", s=count // segment, step=dilation)

"""Dilated self-attention on a 3D token grid: each token looks at a few, near ones densely and far ones sparsely.

The tokens of the grid are one sequence (x fastest). A pattern (segment, dilation) cuts it into segments and takes every
dilation-th token of a segment as one group, at every offset, so that each token is in exactly one group per pattern. A
token's weights over the groups of all patterns add up to one. Weights, names and positions are those of
``attention.GridAttention``; one pattern of one whole segment is it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samed3d.errors import InputError
from samed3d.geometry import IntTriple
from samed3d.nn.attention import GridAttention, relative_terms


class DilatedAttention(GridAttention):
    """``GridAttention`` over groups of tokens instead of all.

    Args:
        dim: Channels; a multiple of ``heads``.
        heads: Attention heads.
        grid: Token grid.
        patterns: (segment, dilation) pairs; a segment divides the number of tokens, a dilation its segment.

    Raises:
        InputError: if a pattern does not divide.

    Source: dilated attention of LongNet, in FastSAM3D for image tokens. The released FastSAM3D concatenates its groups
    without putting the
        tokens back in their order and drops the positions; here both are kept.
    """

    def __init__(self, dim: int, heads: int, grid: IntTriple, patterns: tuple[tuple[int, int], ...]) -> None:
        super().__init__(dim, heads, grid, 0, misbroadcast_relpos=False, pad_sink=False)
        count = grid[0] * grid[1] * grid[2]
        for segment, dilation in patterns:
            if segment < 1 or dilation < 1 or count % segment or segment % dilation:
                rule = f"a segment must divide the {count} tokens and a dilation its segment"
                raise InputError(f"patterns: {rule}, got ({segment}, {dilation}); choose other numbers")
        if not patterns:
            raise InputError("patterns must hold at least one (segment, dilation), got none")
        self.patterns = patterns

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, d, h, w, head_dim) each; returns (B, d, h, w, C)."""
        batch, heads, *grid, head_dim = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        terms = relative_terms(q, (self.rel_pos_d, self.rel_pos_h, self.rel_pos_w))
        q, k, v = (x.flatten(1, 3) for x in (q, k, v))
        at = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in grid))
        logits, values = [], []
        for segment, dilation in self.patterns:
            group = token_groups(q.shape[1], segment, dilation, q.device)
            scores = torch.einsum("ngqe,ngke->ngqk", q[:, group] * self.scale, k[:, group])
            for term, axis in zip(terms, at.T, strict=True):
                by_key = term.flatten(1, 3)[:, group]
                scores = scores + by_key.gather(-1, axis[group][None, :, None, :].expand_as(scores))
            back = group.flatten().argsort()
            logits.append(scores.flatten(1, 2)[:, back])
            values.append(v[:, group][:, :, None].expand(-1, -1, group.shape[1], -1, -1).flatten(1, 2)[:, back])
        weights = torch.cat(logits, -1).softmax(-1)
        out = torch.einsum("ntk,ntke->nte", weights, torch.cat(values, 2))
        return out.view(batch, heads, *grid, head_dim).permute(0, 2, 3, 4, 1, 5).flatten(-2)


def token_groups(count: int, segment: int, dilation: int, device: torch.device) -> Tensor:
    """(groups, segment / dilation) token numbers; each of ``count`` tokens is in exactly one group."""
    order = torch.arange(count, device=device).view(count // segment, segment // dilation, dilation)
    return order.transpose(1, 2).reshape(-1, segment // dilation)

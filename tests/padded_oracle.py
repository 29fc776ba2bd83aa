"""The oracle for windowed attention: plain, slow and padded. Only tests and benchmarks use it.

It pads the token grid with zeros to whole windows, computes query, key and value of every padding token and a full
softmax over all keys of the window, as SAM-Med3D's released encoder does. It runs on the weights of an ``ImageEncoder``
and shares no code with its attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samed3d.nn.attention import GridAttention
from samed3d.nn.vit import ImageEncoder


def padded_encoder(encoder: ImageEncoder, x: Tensor) -> Tensor:
    """The encoder's output (B, C, d, h, w) for a crop or tokens ``x``, through padded windows."""
    if encoder.patch_embed is not None:
        x = encoder.patch_embed(x)
    x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = x + padded_attention(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return encoder.neck(x.permute(0, 4, 1, 2, 3))


def padded_attention(attention: GridAttention, x: Tensor) -> Tensor:
    """Attention over a (B, D, H, W, C) grid in windows that are filled up with zero tokens."""
    batch, depth, height, width, dim = x.shape
    kd, kh, kw = attention.extent
    nd, nh, nw = -(-depth // kd), -(-height // kh), -(-width // kw)
    padded = x.new_zeros(batch, nd * kd, nh * kh, nw * kw, dim)
    padded[:, :depth, :height, :width] = x
    is_pad = torch.ones(nd * kd, nh * kh, nw * kw, dtype=torch.bool)
    is_pad[:depth, :height, :width] = False
    out = torch.zeros_like(padded)
    for i in range(nd):
        for j in range(nh):
            for k in range(nw):
                at = (slice(i * kd, (i + 1) * kd), slice(j * kh, (j + 1) * kh), slice(k * kw, (k + 1) * kw))
                out[(slice(None), *at)] = _one_window(attention, padded[(slice(None), *at)], is_pad[at])
    return out[:, :depth, :height, :width]


def _one_window(attention: GridAttention, x: Tensor, is_pad: Tensor) -> Tensor:
    batch, kd, kh, kw, dim = x.shape
    heads, head_dim, count = attention.heads, dim // attention.heads, kd * kh * kw
    qkv = attention.qkv(x).reshape(batch, count, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]  # (B, heads, count, head_dim)
    logits = (q * head_dim**-0.5) @ k.transpose(-1, -2) + _bias(
        attention, q.reshape(batch, heads, kd, kh, kw, head_dim)
    )
    if not attention.pad_sink:
        logits = logits.masked_fill(is_pad.reshape(-1), float("-inf"))
    out = logits.softmax(-1) @ v
    return attention.proj(out.transpose(1, 2).reshape(batch, kd, kh, kw, dim))


def _bias(attention: GridAttention, q: Tensor) -> Tensor:
    """(B, heads, K^3, K^3) relative position bias from unscaled queries (B, heads, a, b, c, e) to keys x, y, z."""
    kd, kh, kw = q.shape[2:5]
    # offset[i, j] = i - j + K - 1 picks the table's row for query i and key j.
    rd = attention.rel_pos_d[torch.arange(kd)[:, None] - torch.arange(kd) + kd - 1]
    rh = attention.rel_pos_h[torch.arange(kh)[:, None] - torch.arange(kh) + kh - 1]
    rw = attention.rel_pos_w[torch.arange(kw)[:, None] - torch.arange(kw) + kw - 1]
    bias = q.new_zeros(*q.shape[:5], kd, kh, kw)
    if attention.misbroadcast_relpos:
        bias = bias + torch.einsum("nmabce,aze->nmabcz", q, rd)[:, :, :, :, :, None, None, :]  # q[a,b,c] . Rd[a-z]
        bias = bias + torch.einsum("nmabxe,bze->nmabxz", q, rh)[:, :, :, :, None, :, None, :]  # q[a,b,x] . Rh[b-z]
        bias = bias + torch.einsum("nmabye,yze->nmabyz", q, rw)[:, :, :, :, None, None, :, :]  # q[a,b,y] . Rw[y-z]
    else:
        bias = bias + torch.einsum("nmabce,axe->nmabcx", q, rd)[..., :, None, None]  # q[a,b,c] . Rd[a-x]
        bias = bias + torch.einsum("nmabce,bye->nmabcy", q, rh)[..., None, :, None]  # q[a,b,c] . Rh[b-y]
        bias = bias + torch.einsum("nmabce,cze->nmabcz", q, rw)[..., None, None, :]  # q[a,b,c] . Rw[c-z]
    return bias.reshape(q.shape[0], q.shape[1], kd * kh * kw, kd * kh * kw)

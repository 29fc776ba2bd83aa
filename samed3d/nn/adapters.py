"""Low-rank adapters on the layers of a trained encoder: LoRA and FacT, for attention and for 3D convolutions.

An adapted layer *is* the plain layer (same class, same parameters under the same names) with a few parameters beside
them, so that a state dict of the plain model loads into the adapted one but for the adapters' own keys. Adapters start
at zero: the adapted model equals the plain one bit for bit until it is trained. ``training/start.py`` chooses what
is frozen, ``models/weights.py`` stores adapters.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); FacT in its tensor-train form, Jie and Deng 2023 (arXiv 2212.03145), as
MA-SAM uses it on queries and values (arXiv 2309.08842). For convolutions our own forms, each the same idea with the
kernel in the middle factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError, check_choice

ADAPTER_KINDS = ("lora", "fact")
QUERY_AND_VALUE = (0, 2)
"""The adapted ones of the three equal parts of a fused query-key-value projection."""


class AdaptedLinear(nn.Linear, ABC):
    """A trained query-key-value projection, whose parameters are used and not copied, with changes of queries and
    values.

    Raises:
        InputError: if the output does not have three equal parts.
    """

    def __init__(self, linear: nn.Linear) -> None:
        if linear.out_features % 3:
            rule = "an adapter needs a projection to queries, keys and values of equal width"
            raise InputError(f"{rule}, got {linear.out_features} outputs")
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.width = linear.out_features // 3

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out = F.linear(x, self.weight, self.bias)
        for part, change in zip(QUERY_AND_VALUE, self.changes(x), strict=True):
            out.narrow(-1, part * self.width, self.width).add_(change.to(out.dtype))
        return out

    @abstractmethod
    def changes(self, x: Tensor) -> list[Tensor]:
        """What is added to queries and to values, (..., out / 3) each."""

    def merged(self) -> nn.Linear:
        """A plain layer with the change in its weight."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.detach().clone()
        self.eval()  # no dropout in what is merged
        unit = torch.eye(self.in_features, device=weight.device)
        with torch.no_grad():
            for part, change in zip(QUERY_AND_VALUE, self.changes(unit), strict=True):
                weight.narrow(0, part * self.width, self.width).add_(change.T.to(weight.dtype))
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


class LoraLinear(AdaptedLinear):
    """W + up @ down for queries and for values; ``up`` starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear)
        self.lora_down = nn.Parameter(_uniform((2, rank, self.in_features), self.in_features, linear.weight))
        self.lora_up = nn.Parameter(linear.weight.new_zeros(2, self.width, rank, dtype=torch.float32))

    def changes(self, x: Tensor) -> list[Tensor]:
        """See ``AdaptedLinear``; computed in the adapter's own precision unless autocast says otherwise."""
        x = x.to(self.lora_down.dtype)
        return [F.linear(F.linear(x, down), up) for down, up in zip(self.lora_down, self.lora_up, strict=True)]


class FactShared(nn.Module):
    """The outer factors that layers of one width share: ``u`` (in, rank), ``v`` (rank, out), which starts at zero."""

    def __init__(self, dim_in: int, rank: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.u = nn.Parameter(_uniform((dim_in, rank), dim_in))
        self.v = nn.Parameter(torch.zeros(rank, dim_in if dim_out is None else dim_out))


class FactLinear(AdaptedLinear):
    """W + (u core v)^T for queries and for values, with a rank x rank core each and u, v of ``shared``.

    The caller registers ``shared`` once: it is no submodule of this layer, so that no state dict holds it twice. Its
    ``v`` has the width of the queries. ``dropout`` follows the core (MA-SAM: 0.1).
    """

    def __init__(self, linear: nn.Linear, shared: FactShared, dropout: float = 0.0) -> None:
        super().__init__(linear)
        rank = shared.u.shape[1]
        self.dropout, self._shared = dropout, (shared,)  # the tuple keeps it from being a submodule
        self.fact_cores = nn.Parameter(_uniform((2, rank, rank), rank, linear.weight))

    def changes(self, x: Tensor) -> list[Tensor]:
        """See ``AdaptedLinear``."""
        shared = self._shared[0]
        low = F.linear(x.to(shared.u.dtype), shared.u.T)
        mixed = [F.dropout(F.linear(low, core), self.dropout, self.training) for core in self.fact_cores]
        return [F.linear(m, shared.v.T) for m in mixed]


class AdaptedConv3d(nn.Conv3d, ABC):
    """A trained convolution, whose parameters are used and not copied, with a low-rank one of the same reach added to
    it.

    Raises:
        InputError: for grouped or non-zero-padded convolutions.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise InputError(f"an adapter needs an ungrouped convolution padded with a number of zeros, got {conv}")
        super().__init__(conv.in_channels, conv.out_channels, _size(conv), bias=conv.bias is not None, device="meta")
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.weight, self.bias = conv.weight, conv.bias

    @abstractmethod
    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Before, with and after the kernel: (rank, in) or None, (rank, rank or in, kd, kh, kw) and (out, rank)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, D, H, W) to (B, out, d, h, w)."""
        out = super().forward(input)
        before, kernel, after = self.factors()
        x = input.to(kernel.dtype)
        x = x if before is None else F.conv3d(x, before[:, :, None, None, None])
        x = F.conv3d(x, kernel, None, self.stride, self.padding, self.dilation)
        return out + F.conv3d(x, after[:, :, None, None, None]).to(out.dtype)

    def merged(self) -> nn.Conv3d:
        """A plain convolution with the change in its weight."""
        plain = nn.Conv3d(self.in_channels, self.out_channels, _size(self), bias=self.bias is not None, device="meta")
        plain.stride, plain.padding, plain.dilation = self.stride, self.padding, self.dilation
        before, kernel, after = (None if t is None else t.detach() for t in self.factors())
        change = torch.einsum("or,ridhw->oidhw", after, kernel)
        change = change if before is None else torch.einsum("ordhw,ri->oidhw", change, before)
        plain.weight, plain.bias = nn.Parameter(self.weight.detach() + change.to(self.weight.dtype)), self.bias
        return plain


class LoraConv3d(AdaptedConv3d):
    """A convolution to ``rank`` channels, then 1x1x1 to the output; the second starts at zero."""

    def __init__(self, conv: nn.Conv3d, rank: int) -> None:
        super().__init__(conv)
        fan_in = conv.in_channels * math.prod(conv.kernel_size)
        self.lora_down = nn.Parameter(_uniform((rank, conv.in_channels, *conv.kernel_size), fan_in, conv.weight))
        self.lora_up = nn.Parameter(conv.weight.new_zeros(conv.out_channels, rank, dtype=torch.float32))

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """See ``AdaptedConv3d``; computed in the adapter's own precision unless autocast says otherwise."""
        return None, self.lora_down, self.lora_up


class FactConv3d(AdaptedConv3d):
    """1x1x1 to ``rank`` channels by the shared u, a rank x rank kernel of this layer, 1x1x1 by the shared v."""

    def __init__(self, conv: nn.Conv3d, shared: FactShared) -> None:
        super().__init__(conv)
        rank, size = shared.u.shape[1], _size(conv)
        self._shared = (shared,)
        self.fact_core = nn.Parameter(_uniform((rank, rank, *size), rank * math.prod(size), conv.weight))

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """See ``AdaptedConv3d``."""
        shared = self._shared[0]
        return shared.u.T, self.fact_core, shared.v.T


def add_adapters(model: nn.Module, kind: str, rank: int) -> int:
    """Put adapters on a model's image encoder, in place; nothing else changes, nothing is frozen.

    Queries and values of every fused ``qkv`` projection are adapted; an encoder without attention has its convolutions
    with a kernel above 1x1x1 adapted instead. The encoder is what the model names in ``encoder_parts``, else all of it.

    Returns:
        Number of parameters added.

    Raises:
        InputError: for a kind that is not in ``ADAPTER_KINDS``, a rank below 1, an encoder that has adapters already or
            has
            nothing to put them on.
    """
    check_choice("adapter", kind, ADAPTER_KINDS)
    if rank < 1:
        raise InputError(f"rank of an adapter must be 1 or more, got {rank}")
    if adapter_names(model):
        raise InputError("model has adapters already; merge them first (samed3d.nn.adapters.merge_adapters)")
    places = _places(model)
    if not places:
        lacks = "it has neither qkv projections nor convolutions; train the decoder alone"
        raise InputError(f"no adapter fits the image encoder of {type(model).__name__}: {lacks}")
    shared = nn.ModuleDict()
    for parent, name, layer in places:
        setattr(parent, name, _adapted(layer, kind, rank, shared))
    if kind == "fact":
        model.fact_shared = shared
    return sum(dict(model.named_parameters())[n].numel() for n in adapter_names(model))


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that adapters added, in the model's order."""
    adapters = tuple(m for m in model.modules() if isinstance(m, AdaptedLinear | AdaptedConv3d | FactShared))
    own = {id(p) for m in adapters for n, p in m.named_parameters(recurse=False) if n not in ("weight", "bias")}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights beside it, in place: a plain model again, as fast as before."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, AdaptedLinear | AdaptedConv3d):
                setattr(module, name, layer.merged())
    if hasattr(model, "fact_shared"):
        del model.fact_shared


def _adapted(layer: nn.Linear | nn.Conv3d, kind: str, rank: int, shared: nn.ModuleDict) -> nn.Module:
    """The layer with an adapter; of FacT, the outer factors are taken from ``shared`` or added to it."""
    if kind == "lora":
        return LoraLinear(layer, rank) if isinstance(layer, nn.Linear) else LoraConv3d(layer, rank)
    if isinstance(layer, nn.Linear):
        dims = (layer.in_features, layer.out_features // 3)
    else:
        dims = (layer.in_channels, layer.out_channels)
    key = f"{dims[0]}to{dims[1]}"
    if key not in shared:
        shared[key] = FactShared(dims[0], rank, dims[1]).to(layer.weight.device)
    outer = shared[key]
    assert isinstance(outer, FactShared)
    return FactLinear(layer, outer) if isinstance(layer, nn.Linear) else FactConv3d(layer, outer)


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear | nn.Conv3d]]:
    """(parent, name, layer) of all that is adapted."""
    fused: dict[str, nn.Linear | nn.Conv3d] = {}
    convolutions: dict[str, nn.Linear | nn.Conv3d] = {}
    parts = getattr(model, "encoder_parts", ("",))
    for name, layer in model.named_modules():
        if not any(part in ("", name) or name.startswith(f"{part}.") for part in parts):
            continue
        is_linear = isinstance(layer, nn.Linear) and layer.out_features == 3 * layer.in_features
        if is_linear and name.split(".")[-1] == "qkv":
            fused[name] = layer
        if type(layer) is nn.Conv3d and layer.groups == 1 and math.prod(layer.kernel_size) > 1:
            convolutions[name] = layer
    split = [(*name.rpartition(".")[::2], layer) for name, layer in (fused or convolutions).items()]
    return [(model.get_submodule(parent), name, layer) for parent, name, layer in split]


def _size(conv: nn.Conv3d) -> tuple[int, int, int]:
    return (conv.kernel_size[0], conv.kernel_size[1], conv.kernel_size[2])


def _uniform(shape: tuple[int, ...], fan_in: int, like: Tensor | None = None) -> Tensor:
    """As ``nn.Linear`` starts: uniform within one over the root of the number of inputs; float32, where ``like`` is."""
    bound = fan_in**-0.5
    return torch.empty(shape, device=None if like is None else like.device).uniform_(-bound, bound)

"""Adapters: the identity at the start, exact counts, merging, half precision, one owner of shared factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model
from samed3d.models.base import PromptBatch
from samed3d.nn.adapters import (
    FactLinear,
    FactShared,
    LoraConv3d,
    LoraLinear,
    adapter_names,
    add_adapters,
    merge_adapters,
)
from samed3d.nn.attention import GridAttention
from samed3d.nn.vit import ImageEncoder

ARCHITECTURES = ("samed3d_unet", "samed3d_tiny", "sam_med3d_b")


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **MODELS[name].tiny).eval()


def crop_and_prompts(model: nn.Module) -> tuple[torch.Tensor, PromptBatch]:
    generator = torch.Generator().manual_seed(1)
    shape = model.spec.input_shape_zyx
    channels = 2 if model.spec.normalisation == "zscore_rank" else 1
    image = torch.randn(1, channels, *shape, generator=generator)
    return image, PromptBatch(torch.full((1, 1, 3), shape[0] / 2), torch.ones(1, 1, dtype=torch.int64))


def disturb(model: nn.Module) -> None:
    """Give every adapter parameter a value, as training would."""
    generator = torch.Generator().manual_seed(2)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in adapter_names(model):
            parameters[name].copy_(0.3 * torch.randn(parameters[name].shape, generator=generator))


@pytest.mark.parametrize("kind", ["lora", "fact"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapted_model_starts_equal_then_differs_and_merges_to_the_same(name, kind):
    model = tiny(name)
    image, prompts = crop_and_prompts(model)
    plain_keys = set(model.state_dict())
    with torch.no_grad():
        before = model(image, prompts).logits
        added = add_adapters(model, kind, rank=2)
        assert torch.equal(model(image, prompts).logits, before)
        assert added == sum(v.numel() for k, v in model.state_dict().items() if k not in plain_keys) > 0
        assert plain_keys < set(model.state_dict())
        disturb(model)
        adapted = model(image, prompts).logits
        assert (adapted - before).abs().max() > 3e-4
        merge_adapters(model)
        assert set(model.state_dict()) == plain_keys
        merged = model(image, prompts).logits
    scale = float(adapted.abs().max())
    assert float((merged - adapted).abs().max()) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize(("dim", "depth", "expected"), [(768, 12, 73_728), (1024, 24, 114_688), (1280, 32, 147_456)])
def test_fact_of_rank_32_has_the_published_number_of_parameters(dim, depth, expected):
    with torch.device("meta"):
        grid = (2, 2, 2)
        encoder = ImageEncoder(None, (GridAttention(dim, dim // 64, grid) for _ in range(depth)), grid, dim, 8)
        assert add_adapters(encoder, "fact", rank=32) == expected


def test_lora_changes_queries_and_values_but_never_keys():
    torch.manual_seed(0)
    plain = nn.Linear(8, 24)
    adapted = LoraLinear(copy.deepcopy(plain), 2)
    nn.init.normal_(adapted.lora_up)
    x = torch.randn(5, 8)
    change = (adapted(x) - plain(x)).detach()
    assert change[:, :8].abs().max() > 0.01 and change[:, 16:].abs().max() > 0.01
    assert torch.equal(change[:, 8:16], torch.zeros(5, 8))
    expected = x @ (adapted.lora_up[0] @ adapted.lora_down[0]).T
    torch.testing.assert_close(change[:, :8], expected.detach(), atol=1e-6, rtol=1e-5)


def test_merging_lora_into_a_linear_layer_is_equal_to_1e_6():
    torch.manual_seed(0)
    adapted = LoraLinear(nn.Linear(16, 48), 4)
    nn.init.normal_(adapted.lora_up, std=0.1)
    x = torch.randn(10, 16)
    out = adapted(x).detach()
    assert float((adapted.merged()(x) - out).abs().max().detach() / out.abs().max()) < 1e-6


@pytest.mark.parametrize("numbers", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 2, "stride": 2, "bias": False}])
def test_merging_lora_into_a_convolution_is_equal_to_1e_6(numbers):
    torch.manual_seed(0)
    adapted = LoraConv3d(nn.Conv3d(4, 6, **numbers), 2)
    nn.init.normal_(adapted.lora_up, std=0.1)
    x = torch.randn(1, 4, 6, 6, 6)
    out = adapted(x).detach()
    assert adapted.lora_up.abs().max() > 0.05
    assert float((adapted.merged()(x) - out).abs().max().detach() / out.abs().max()) < 1e-6


def test_shared_factors_are_stored_once_and_follow_a_copy():
    model = tiny("samed3d_tiny")
    add_adapters(model, "fact", rank=2)
    outer = [k for k in model.state_dict() if k.endswith((".u", ".v"))]
    assert outer == ["fact_shared.24to24.u", "fact_shared.24to24.v"]
    twin = copy.deepcopy(model)
    used = twin.image_encoder.blocks[0].attn.qkv._shared[0]
    assert used is twin.fact_shared["24to24"] and used is not model.fact_shared["24to24"]


def test_dropout_acts_in_training_only_and_not_on_what_is_merged():
    torch.manual_seed(0)
    shared = FactShared(8, 4)
    nn.init.normal_(shared.v)
    adapted = FactLinear(nn.Linear(8, 24), shared, dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(adapted(x), adapted(x))
    merged = adapted.merged()
    torch.testing.assert_close(merged(x), adapted.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_full_precision_beside_half_weights_stay_finite_and_learn(dtype):
    torch.manual_seed(0)
    adapted = LoraLinear(nn.Linear(8, 24).to(dtype), 2)
    out = adapted(100 * torch.randn(4, 8).to(dtype))
    out.float().square().mean().backward()
    assert out.dtype == dtype and adapted.lora_up.dtype == torch.float32
    assert (
        torch.isfinite(out).all()
        and torch.isfinite(adapted.lora_up.grad).all()
        and adapted.lora_up.grad.abs().max() > 0
    )


def test_gradients_reach_every_adapter_under_autocast():
    model = tiny("samed3d_unet")
    add_adapters(model, "fact", rank=2)
    disturb(model)
    image, prompts = crop_and_prompts(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(image, prompts).logits.float().mean().backward()
    parameters = dict(model.named_parameters())
    assert all(torch.isfinite(parameters[n].grad).all() for n in adapter_names(model))
    assert sum(float(parameters[n].grad.abs().max()) > 0 for n in adapter_names(model)) > len(adapter_names(model)) // 2


@pytest.mark.parametrize(
    ("kind", "rank", "said"),
    [
        ("dora", 4, "adapter must be one of lora, fact, got 'dora'"),
        ("lora", 0, "rank of an adapter must be 1 or more, got 0"),
    ],
)
def test_a_wrong_kind_or_rank_is_refused(kind, rank, said):
    with pytest.raises(InputError, match=said):
        add_adapters(tiny("samed3d_tiny"), kind, rank)


def test_adapters_are_not_put_on_twice_nor_on_nothing():
    model = tiny("samed3d_tiny")
    add_adapters(model, "lora", 2)
    with pytest.raises(InputError, match="has adapters already"):
        add_adapters(model, "fact", 2)
    with pytest.raises(InputError, match="neither qkv projections nor convolutions"):
        add_adapters(nn.Sequential(nn.Linear(4, 4)), "lora", 2)


def test_a_projection_without_three_equal_parts_is_refused():
    with pytest.raises(InputError, match="queries, keys and values of equal width, got 10 outputs"):
        LoraLinear(nn.Linear(4, 10), 2)


def test_a_grouped_convolution_is_refused():
    with pytest.raises(InputError, match="ungrouped"):
        LoraConv3d(nn.Conv3d(4, 4, 3, groups=2), 2)

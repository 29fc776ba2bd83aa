"""SAM3D, MA-SAM and 3DSAM-adapter: published parameter counts, what learns and what does not, files that name their
frozen encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptBatch, SemanticModel
from samed3d.models.ma_sam import MaSam
from samed3d.models.sam3d import Sam3D
from samed3d.models.sam3d_adapter import Sam3DAdapter
from samed3d.models.weights import read_header, save_weights
from samed3d.nn.vit2d import build_encoder
from tests.test_vit2d import fake_sam

SYSTEMS = ["sam3d", "ma_sam_b", "ma_sam_l", "ma_sam_h", "sam3d_adapter", "sam3d_adapter_auto"]
ONE_OF_EACH = ["sam3d", "ma_sam_b", "sam3d_adapter", "sam3d_adapter_auto"]


def tiny(name: str, seed: int = 0, **overrides: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(name, **{**MODELS[name].tiny, **overrides})


def crops(model: Any, batch: int = 2) -> Tensor:
    return torch.randn(
        batch, model.spec.in_channels, *model.spec.input_shape_zyx, generator=torch.Generator().manual_seed(1)
    )


def answer(model: Any, image: Tensor) -> Tensor:
    if isinstance(model, SemanticModel):
        return model(image)
    count = image.shape[0]
    points = torch.tensor([[[4.0, 5.0, 6.0], [9.0, 2.0, 3.0]]]).expand(count, -1, -1)
    return model(image, PromptBatch(points, torch.tensor([[1, 0]]).expand(count, -1))).logits


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def on_meta(name: str, **overrides: Any) -> Any:
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("sam3d", {}, 1_880_258),
        ("sam3d", {"class_names": ("a", "b", "c"), "in_channels": 4, "input_shape": (64, 64, 64)}, 4_632_180),
        ("sam3d", {"class_names": ("a", "b", "c")}, 1_879_668),
        ("sam3d_adapter", {}, 25_462_400),
        ("sam3d_adapter_auto", {}, 22_298_240),
        ("ma_sam_b", {}, 73_728 + 24_818_688 + 5_243_725 + 6_220),
        ("ma_sam_l", {}, 114_688 + 59_099_136 + 5_243_725 + 6_220),
        ("ma_sam_h", {}, 147_456 + 91_414_528 + 5_243_725 + 6_220),
    ],
)
def test_trained_parameters_are_the_published_ones(name, overrides, count):
    assert trained(on_meta(name, **overrides)) == count


@pytest.mark.parametrize(
    ("name", "fact", "adapters"), [("ma_sam_b", 73_728, 24_818_688), ("ma_sam_h", 147_456, 91_414_528)]
)
def test_ma_sams_parts_have_the_published_sizes(name, fact, adapters):
    model = on_meta(name)
    assert sum(p.numel() for n, p in model.named_parameters() if "fact" in n) == fact
    assert (trained(model.adapters), trained(model.mask_decoder), trained(model.prompt_encoder)) == (
        adapters,
        5_243_725,
        6_220,
    )


def test_the_adapted_encoders_parts_have_the_published_sizes():
    model = on_meta("sam3d_adapter")
    encoder = model.image_encoder
    parts = {n: p.numel() for n, p in encoder.named_parameters() if p.requires_grad}
    assert (
        trained(encoder) == 15_209_984
        and trained(model.prompt_encoder) == 3_164_160
        and trained(model.decoder) == 7_088_256
    )
    assert sum(v for k, v in parts.items() if ".adapter." in k) == 7_220_736 and trained(encoder.necks) == 7_868_416
    assert sum(v for k, v in parts.items() if "rel_pos_d" in k) == 46_336 and parts["depth_embed"] == 24_576


@pytest.mark.parametrize("name", SYSTEMS)
def test_forward_and_finite_gradients(name):
    model = tiny(name)
    out = answer(model, crops(model))
    assert out.shape == (2, model.spec.classes or 1, *model.spec.input_shape_zyx)
    out.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(torch.isfinite(g).all() for g in gradients.values())
    assert not set(gradients) & model.frozen_names
    idle = {n for n, p in model.named_parameters() if p.requires_grad and n not in gradients}
    dead = (
        "prompt_encoder.",
        "mask_decoder.iou_prediction_head.",
        "heads.1.",
        "heads.2.",
    )  # as published; heads are for training
    assert not [n for n in idle if not n.startswith(dead)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_frozen_stays_frozen_and_the_rest_learns(name):
    model = tiny(name).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    image = crops(model)
    for _ in range(2):
        optimiser.zero_grad()
        outputs = model.forward_supervised(image) if isinstance(model, SemanticModel) else [(1.0, answer(model, image))]
        sum(weight * out.square().mean() for weight, out in outputs).backward()
        optimiser.step()
    after = dict(model.named_parameters())
    assert model.frozen_names and all(torch.equal(before[n], after[n]) for n in model.frozen_names)
    moved = [n for n in before if n not in model.frozen_names and not torch.equal(before[n], after[n])]
    assert len(moved) > 0.5 * (len(before) - len(model.frozen_names))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_a_file_holds_what_was_trained_and_names_the_rest(name, tmp_path):
    torch.save(fake_sam(), tmp_path / "sam.pth")
    model = tiny(name, backbone_weights=str(tmp_path / "sam.pth")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    save_weights(model, tmp_path / "model.safetensors", {})
    assert not set(model.state_dict()) & model.frozen_names
    config = read_header(tmp_path / "model.safetensors")["config"]
    assert config["backbone"] == "sam_vit_tiny" and len(config["backbone_sha256"]) == 64
    again = load(tmp_path / "model.safetensors")
    image = crops(model)
    torch.testing.assert_close(answer(again, image), answer(model, image), rtol=0, atol=0)
    changed = fake_sam()
    changed["image_encoder.blocks.0.attn.proj.weight"] += 1
    torch.save(changed, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"must be the file that this model was trained on"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_state_survives_inside_another_module(name):
    model, other = tiny(name), tiny(name, seed=1)
    outer, inner = nn.ModuleDict({"model": model}), nn.ModuleDict({"model": other})
    assert not any("image_encoder.blocks.0.mlp" in key for key in outer.state_dict())
    inner.load_state_dict(outer.state_dict())
    with torch.no_grad():
        image = crops(model)
        torch.testing.assert_close(answer(other.eval(), image), answer(model.eval(), image))


# SAM3D


@torch.no_grad()
def test_sam3d_supervises_three_depths_with_falling_weight():
    model = tiny("sam3d").eval()
    image = crops(model)
    outputs = model.forward_supervised(image)
    assert [round(7 * weight) for weight, _ in outputs] == [4, 2, 1]
    assert [tuple(out.shape[2:]) for _, out in outputs] == [(6, 32, 32), (6, 16, 16), (6, 8, 8)]
    assert torch.equal(outputs[0][1], model(image))


@torch.no_grad()
def test_sam3d_encodes_every_slice_alone_whatever_the_chunk():
    model = tiny("sam3d").eval()
    image = crops(model, batch=1)
    features = model.encode(image)
    assert features.shape == (1, 16, 6, 2, 2)
    expected = build_encoder("sam_vit_tiny")(image[0, 0, 4][None, None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(features[:, :, 4], expected)
    torch.testing.assert_close(tiny("sam3d", chunk=1).encode(image), features)


@torch.no_grad()
def test_sam3d_keeps_features_on_disk(tmp_path, monkeypatch):
    model = tiny("sam3d", feature_cache=str(tmp_path / "cache")).eval()
    image = crops(model)
    first = model.encode(image)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    monkeypatch.setattr(model.image_encoder, "forward", lambda _: pytest.fail("encoded again"))
    assert torch.equal(model.encode(image), first)
    assert "feature_cache" not in model.config


@torch.no_grad()
def test_sam3d_joins_modalities_on_channels():
    model = tiny("sam3d", in_channels=2).eval()
    image = crops(model)
    assert model.encode(image).shape == (2, 32, 6, 2, 2) and model(image).shape == (2, 3, 6, 32, 32)
    with pytest.raises(InputError, match=r"image must be \(B, 2, D, H, W\) with H and W multiples of 16 for sam3d"):
        model(image[:, :1])


# MA-SAM


@pytest.mark.parametrize("name", ["ma_sam_b", "ma_sam_h"])
@torch.no_grad()
def test_ma_sams_encoder_starts_as_sams(name, tmp_path):
    torch.save(fake_sam(), tmp_path / "sam.pth")
    model: MaSam = tiny(name, backbone_weights=str(tmp_path / "sam.pth")).eval()
    image = crops(model)
    slices = image.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)
    plain = build_encoder("sam_vit_tiny", seed=5)
    torch.testing.assert_close(model.encode(image), plain(slices), rtol=0, atol=0)
    released = tiny(name, backbone_weights=str(tmp_path / "sam.pth"), zero_adapters=False).eval()
    assert (released.encode(image) - plain(slices)).abs().mean() > 1e-3


@torch.no_grad()
def test_ma_sam_starts_its_decoder_from_sams(tmp_path):
    state = fake_sam()
    torch.save(state, tmp_path / "sam.pth")
    model = tiny("ma_sam_b", backbone_weights=str(tmp_path / "sam.pth"))
    own = model.state_dict()
    shared = "mask_decoder.transformer.layers.1.self_attn.q_proj.weight", "mask_decoder.output_upscaling.3.weight"
    for key in (
        *shared,
        "prompt_encoder.no_mask_embed.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ):
        assert torch.equal(own[key], state[key]), key
    fresh = "mask_decoder.iou_prediction_head.layers.0.weight"
    assert own[fresh].shape == state[fresh].shape and not torch.equal(own[fresh], state[fresh])


@torch.no_grad()
def test_depth_enters_through_the_adapters():
    model = tiny("ma_sam_b", zero_adapters=False).eval()
    image = crops(model, batch=1)
    other = image.clone()
    other[:, :, 0] += 1
    difference = (model(image) - model(other)).abs().amax((0, 1, 3, 4))
    assert difference[1] > 1e-6 and difference[2] > 1e-7
    flat = tiny("ma_sam_b").eval()
    difference = (flat(image) - flat(other)).abs().amax((0, 1, 3, 4))
    assert difference[0] > 1e-6 and difference[1:].max() == 0


@torch.no_grad()
def test_ma_sam_takes_a_box_and_other_numbers_of_slices():
    model = tiny("ma_sam_b").eval()
    image = crops(model)
    box = torch.tensor([[[0.0, 2.0, 3.0], [3.0, 20.0, 22.0]]]).expand(2, -1, -1)
    boxed = model(image, box)
    assert boxed.shape == model(image).shape and not torch.allclose(boxed, model(image), atol=1e-5)
    assert torch.equal(boxed, model(image, box + torch.tensor([1.0, 0, 0])))  # its extent along z is not used
    assert model(torch.randn(1, 1, 7, 32, 48)).shape == (1, 3, 7, 32, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ma_sam_stays_finite_in_half_precision(dtype):
    model = tiny("ma_sam_b", zero_adapters=False).train()
    with torch.autocast("cpu", dtype):
        logits = model(100 * crops(model))
    assert torch.isfinite(logits).all()
    F.cross_entropy(logits.float(), torch.zeros(2, 3, 32, 32, dtype=torch.int64)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["ma_sam_b", "sam3d_adapter"])
def test_recomputing_blocks_changes_no_gradient(name):
    gradients = []
    for recompute in (False, True):
        model = tiny(name, **({"fact_dropout": 0.0} if name == "ma_sam_b" else {})).train()
        part = model if name == "ma_sam_b" else model.image_encoder
        assert part.checkpoint_blocks is False
        part.checkpoint_blocks = recompute
        answer(model, crops(model)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# 3DSAM-adapter


@torch.no_grad()
def test_slices_are_embedded_as_one_fine_volume_would_be():
    embed = tiny("sam3d_adapter").image_encoder.patch_embed
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    fine = F.interpolate(image, scale_factor=4, mode="trilinear")
    slices = embed.proj(fine.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)).unflatten(0, (2, -1)).transpose(1, 2)
    expected = F.conv3d(slices, embed.depth.weight, embed.depth.bias, stride=(16, 1, 1), groups=slices.shape[1])
    torch.testing.assert_close(embed(image), expected.movedim(1, -1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_shifted_windows_never_join_opposite_faces():
    block = tiny("sam3d_adapter").image_encoder.blocks[0]
    assert block.attn.shift == 1 and tiny("sam3d_adapter").image_encoder.blocks[1].attn.shift == 0
    x = torch.randn(1, 4, 4, 4, 24, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 0, 0, 0] += 5
    changed = (block.attn(x) - block.attn(other)).abs().amax((0, 4)) > 1e-7
    assert (
        changed[0, 0, 0] and changed.sum() == 1
    )  # a corner is alone in its window; rolled round it would reach seven others


@torch.no_grad()
def test_clicks_matter_by_place_and_negative_ones_are_left_out():
    model: Sam3DAdapter = tiny("sam3d_adapter").eval()
    features = model.encode(crops(model, batch=1))

    def at(*points: tuple[float, float, float], labels: tuple[int, ...] | None = None) -> Tensor:
        return model.decode(
            features, PromptBatch(torch.tensor([points]), torch.tensor([labels or (1,) * len(points)]))
        ).logits

    here, there = (4.0, 5.0, 6.0), (12.0, 9.0, 3.0)
    assert not torch.allclose(at(here), at(there), atol=1e-6)
    assert not torch.allclose(at(here), at(here, there), atol=1e-6)
    torch.testing.assert_close(at(here, there, labels=(1, 0)), at(here))
    torch.testing.assert_close(at(here, there), at(there, here), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"prompts must be points for sam3d_adapter, got a box"):
        model.decode(features, PromptBatch(torch.zeros(1, 0, 3), torch.zeros(1, 0).long(), boxes=torch.zeros(1, 2, 3)))


@torch.no_grad()
def test_a_click_reads_the_feature_under_it():
    sampler = tiny("sam3d_adapter").prompt_encoder
    seen: list[Tensor] = []
    sampler.blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    grid = torch.arange(64.0).reshape(1, 1, 4, 4, 4).expand(1, 16, -1, -1, -1)
    unit = (torch.tensor([[[2.0, 1.0, 3.0]]]) + 0.5) / 4
    sampler(grid, unit, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(seen[0][0, 0], torch.full((16,), 16 * 2 + 4 * 1 + 3.0))


def test_promised_overlap_is_a_share():
    model = tiny("sam3d_adapter").eval()
    with torch.no_grad():
        out = model(crops(model), PromptBatch.empty(2))
    assert out.iou.shape == (2, 1) and ((out.iou >= 0) & (out.iou <= 1)).all()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "sam3d",
            {"input_shape": (6, 40, 32)},
            r"input_shape must have H and W that are multiples of 16, got \(6, 40, 32\)",
        ),
        ("sam3d", {"class_names": ()}, r"class_names must name at least one class"),
        ("sam3d", {"chunk": 0}, r"chunk must be at least 1 slice, got 0"),
        ("ma_sam_b", {"backbone": "nonsense"}, r"backbone must be one of"),
        ("ma_sam_b", {"input_shape": (3, 32, 24)}, r"multiples of 16, got \(3, 32, 24\)"),
        (
            "sam3d_adapter",
            {"input_shape": (16, 16, 12)},
            r"input_shape must hold multiples of 8 voxels \(a window of tokens\)",
        ),
        ("sam3d_adapter", {"taps": (2, 9)}, r"taps must be blocks from 1 to 4, got \(2, 9\)"),
        ("sam3d", {"widht": 3}, r"'sam3d' cannot be built with .*widht"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name, overrides, message):
    with pytest.raises(InputError, match=message):
        tiny(name, **overrides)


def test_sam3d_stands_on_any_encoder_of_timm():
    from tests.timm_here import timm_or_skip

    timm_or_skip()
    model: Sam3D = tiny("sam3d", backbone="timm:vit_tiny_patch16_224").eval()
    with torch.no_grad():
        assert model(crops(model, batch=1)).shape == (1, 3, 6, 32, 32)

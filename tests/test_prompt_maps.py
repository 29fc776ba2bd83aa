"""Prompts as maps, similarity to the click, and the U-Net that reads them: any crop shape, and what is not given
changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model
from samed3d.models.base import PromptableModel, PromptBatch
from samed3d.nn.layers import LayerNorm3d, ResidualBlock, depth_to_space, space_to_depth
from samed3d.nn.prompt_maps import (
    MAP_CHANNELS,
    SIGMAS,
    ClickSimilarity,
    box_map,
    click_bumps,
    mask_map,
    positions_at,
    prompt_maps,
    sample_at,
)

WIDE, NARROW = SIGMAS.index(max(SIGMAS)), SIGMAS.index(min(SIGMAS))


def clicks(*points: tuple[float, float, float], labels: list[int] | None = None) -> PromptBatch:
    """One sample's clicks."""
    return PromptBatch(torch.tensor([points]), torch.tensor([labels or [1] * len(points)]))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Maps


def test_a_bump_is_one_at_the_click_and_falls_as_a_gaussian():
    maps = click_bumps(clicks((2.0, 3.0, 1.0)), 1, (6, 7, 5))
    assert maps.shape == (1, 6, 7, 5, 2 * len(SIGMAS))
    for index, sigma in enumerate(SIGMAS):
        bump = maps[0, ..., 2 * index]
        assert float(bump[2, 3, 1]) == 1 == float(bump.max())
        assert float(bump[4, 3, 2]) == pytest.approx(math.exp(-(4 + 1) / (2 * sigma**2)))
        assert not maps[0, ..., 2 * index + 1].any(), "an object click says nothing about background"


def test_signs_have_their_own_channels_and_the_nearest_click_counts():
    maps = click_bumps(clicks((0.0, 0.0, 0.0), (0.0, 0.0, 4.0), (3.0, 3.0, 3.0), labels=[1, 1, 0]), 1, (4, 4, 5))
    bump = maps[0, ..., 2 * NARROW]
    assert float(bump[0, 0, 0]) == float(bump[0, 0, 4]) == 1
    assert float(bump[0, 0, 3]) == pytest.approx(math.exp(-0.5))
    background = maps[0, ..., 2 * WIDE + 1]
    assert float(background[3, 3, 3]) == 1 == float(background.max())


@pytest.mark.parametrize("stride", [2, 4])
def test_coarse_maps_keep_the_voxel_edges(stride):
    """The middle of a coarse voxel's block of crop voxels is that voxel's centre."""
    middle = torch.tensor([[[(stride - 1) / 2 + stride * i for i in (0, 1, 2)]]])
    assert torch.allclose(positions_at(middle, stride), torch.tensor([[[0.0, 1.0, 2.0]]]))
    maps = click_bumps(PromptBatch(middle, torch.tensor([[1]])), stride, (3, 3, 3))
    assert float(maps[0, 0, 1, 2, 0]) == pytest.approx(1)


def test_box_map_is_the_share_of_each_voxel_inside():
    prompts = PromptBatch.empty(2)
    prompts.boxes = torch.tensor([[[1.0, 0.0, 2.0], [4.0, 8.0, 3.0]]] * 2)
    prompts.box_valid = torch.tensor([True, False])
    maps = box_map(prompts, 2, (4, 4, 4))
    expected = torch.tensor([0.5, 1, 0, 0])[:, None, None] * torch.tensor([0, 0.5, 0, 0])
    assert torch.allclose(maps[0, ..., 0], expected.expand(4, 4, 4))
    assert (maps[0, ..., 1] == 1).all() and not maps[1].any()
    fine = box_map(prompts, 1, (8, 8, 8))[0, ..., 0].bool()
    assert fine.sum() == 3 * 8 * 1 and fine[1:4, :, 2:3].all(), "half-open"


def test_mask_map_is_probability_scaled_logit_and_a_flag():
    prompts = PromptBatch.empty(1)
    assert not mask_map(prompts, (2, 2, 2)).any()
    prompts.mask_logits = torch.tensor([0.0, 2.0, -100.0, 100.0]).view(1, 1, 1, 1, 4)
    maps = mask_map(prompts, (1, 1, 4))[0, 0, 0]
    assert maps[:, 0].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2)), 0, 1])
    assert maps[:, 1].tolist() == pytest.approx([0, 0.5, -2, 2])
    assert maps[:, 2].tolist() == [1] * 4
    assert mask_map(prompts, (1, 1, 2))[0, 0, 0, 0, 0] == pytest.approx(1 / (1 + math.exp(-1))), (
        "coarser: of the mean logit"
    )


def test_all_maps_are_there_in_order_and_zero_without_prompts():
    prompts = clicks((1.0, 2.0, 3.0))
    prompts.boxes, prompts.mask_logits = torch.tensor([[[0.0, 0.0, 0.0], [2.0, 3.0, 4.0]]]), random(1, 1, 4, 4, 4)
    maps = prompt_maps(prompts, 1, (4, 4, 4))
    assert maps.shape[-1] == MAP_CHANNELS
    n = 2 * len(SIGMAS)
    assert torch.equal(maps[..., n : n + 2], box_map(prompts, 1, (4, 4, 4)))
    assert torch.equal(maps[..., n + 2 :], mask_map(prompts, (4, 4, 4)))
    assert not prompt_maps(PromptBatch.empty(2), 2, (4, 4, 4)).any()


# Features at a click


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_sampling_is_grid_sample_with_borders(stride):
    features = random(2, 3, 4, 5, 6)
    points = (
        torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([4.0, 5.0, 6.0]) * stride - 1
    )  # some outside
    at = (positions_at(points, stride) * 2 + 1) / torch.tensor([4.0, 5.0, 6.0]) - 1
    expected = F.grid_sample(features, at.flip(-1)[:, :, None, None], padding_mode="border", align_corners=False)[
        ..., 0, 0
    ].transpose(1, 2)
    torch.testing.assert_close(sample_at(features, points, stride), expected, atol=1e-5, rtol=0)
    assert sample_at(features, points[:, :0], stride).shape == (2, 0, 3)


def test_similarity_is_the_best_product_with_the_clicked_features():
    torch.manual_seed(0)
    module, features = ClickSimilarity(6, heads=2, head_dim=4), random(1, 6, 3, 4, 5)
    prompts = clicks((1.0, 2.0, 3.0), (2.0, 0.0, 1.0), (0.0, 3.0, 4.0), (1.0, 1.0, 1.0), labels=[1, 1, 0, -1])
    maps = module(features, prompts, 1)
    assert maps.shape == (1, 3, 4, 5, 4)
    keys = module.key(sample_at(features, prompts.points, 1))[0].view(4, 2, 4)
    for head in range(2):
        voxels = torch.einsum("kc,cdhw->dhwk", module.back[head], features[0])
        products = [torch.einsum("dhwk,k->dhw", voxels, key[head]) / 2 for key in keys]  # 2 is the root of head_dim
        torch.testing.assert_close(maps[0, ..., head], torch.maximum(products[0], products[1]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps[0, ..., 2 + head], products[2], atol=1e-5, rtol=1e-4)


def test_similarity_without_clicks_of_a_sign_is_zero():
    torch.manual_seed(0)
    module, features = ClickSimilarity(6, heads=2), random(1, 6, 3, 4, 5)
    only_object = module(features, clicks((1.0, 2.0, 3.0)), 1)
    assert only_object[..., :2].any() and not only_object[..., 2:].any()
    assert not module(features, clicks((1.0, 2.0, 3.0), labels=[-1]), 1).any()
    assert not module(features, PromptBatch.empty(1), 1).any()


# Blocks


def test_space_to_depth_loses_nothing():
    x = random(2, 3, 4, 6, 8)
    packed = space_to_depth(x)
    assert packed.shape == (2, 24, 2, 3, 4) and torch.equal(depth_to_space(packed), x)
    assert packed[0, 1 * 8 + 0b101, 1, 2, 3] == x[0, 1, 3, 4, 7]


def test_a_residual_block_starts_as_the_identity_and_the_norm_is_per_voxel():
    x = random(1, 4, 3, 3, 3)
    assert torch.equal(ResidualBlock(4)(x), x)
    changed = x.clone()
    changed[..., 0] += 5
    assert torch.equal(LayerNorm3d(4)(x)[..., 1:], LayerNorm3d(4)(changed)[..., 1:])


# The U-Net


@pytest.fixture(scope="module")
def model() -> PromptableModel:
    """A tiny network in which nothing is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_model("samed3d_unet", **MODELS["samed3d_unet"].tiny)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 32, 48), (64, 16, 32)])
@torch.no_grad()
def test_any_multiple_of_sixteen_is_taken_cubic_or_not(model, shape):
    out = model(
        random(2, 2, *shape), PromptBatch(torch.tensor([[[3.0, 9.0, 12.0]]] * 2), torch.ones(2, 1, dtype=torch.int64))
    )
    assert out.logits.shape == (2, 1, *shape) and out.lowres_logits.shape == (2, 1, *(n // 2 for n in shape))
    assert torch.isfinite(out.logits).all() and ((out.iou > 0) & (out.iou < 1)).all() and out.iou.shape == (2, 1)
    torch.testing.assert_close(F.avg_pool3d(out.logits, 2), out.lowres_logits, atol=1e-5, rtol=1e-5)


def test_other_shapes_are_refused(model):
    with pytest.raises(InputError, match=r"multiple of 16 on each axis, got \(16, 24, 16\)"):
        model.encode(random(1, 2, 16, 24, 16))


@torch.no_grad()
def test_a_padding_click_is_no_click_at_all(model):
    features = model.encode(random(2, 2, 32, 32, 32))
    nothing = model.decode(features, PromptBatch.empty(2))
    padding = model.decode(features, PromptBatch(torch.tensor([[[5.0, 6.0, 7.0]]] * 2), torch.full((2, 1), -1)))
    torch.testing.assert_close(padding.logits, nothing.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padding.iou, nothing.iou, atol=1e-6, rtol=1e-5)
    clicked = model.decode(features, PromptBatch(torch.tensor([[[5.0, 6.0, 7.0]]] * 2), torch.tensor([[1], [-1]])))
    assert not torch.allclose(clicked.logits[0], nothing.logits[0], atol=1e-3)
    torch.testing.assert_close(clicked.logits[1], nothing.logits[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_box_that_is_not_valid_is_no_box(model):
    features = model.encode(random(2, 2, 32, 32, 32))
    points, labels = torch.tensor([[[5.0, 6.0, 7.0]]] * 2), torch.ones(2, 1, dtype=torch.int64)
    without = model.decode(features, PromptBatch(points, labels))
    boxes = torch.tensor([[[2.0, 3.0, 4.0], [20.0, 21.0, 22.0]]] * 2)
    off = model.decode(features, PromptBatch(points, labels, boxes, torch.tensor([False, False])))
    torch.testing.assert_close(off.logits, without.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(off.iou, without.iou, atol=1e-6, rtol=1e-5)
    on = model.decode(features, PromptBatch(points, labels, boxes))
    assert torch.equal(
        on.logits, model.decode(features, PromptBatch(points, labels, boxes, torch.tensor([True, True]))).logits
    )
    assert not torch.allclose(on.logits, without.logits, atol=1e-3)


@torch.no_grad()
def test_the_order_of_clicks_and_the_rest_of_the_batch_do_not_matter(model):
    image = random(3, 2, 16, 16, 16)
    points, labels = (
        torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(2)) * 15,
        torch.tensor([[1, 0, 1, 0]] * 3),
    )
    out = model(image, PromptBatch(points, labels)).logits
    order = [2, 3, 1, 0]
    torch.testing.assert_close(
        model(image, PromptBatch(points[:, order], labels[:, order])).logits, out, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        model(image[1:2], PromptBatch(points[1:2], labels[1:2])).logits, out[1:2], atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_features_do_not_depend_on_prompts_and_are_not_changed_by_a_decode(model):
    features = model.encode(random(1, 2, 16, 16, 16))
    kept = {k: v.clone() for k, v in features.items()}
    first = model.decode(features, clicks((3.0, 4.0, 5.0))).logits
    model.decode(features, clicks((9.0, 1.0, 2.0), labels=[0]))
    assert all(torch.equal(kept[k], v) for k, v in features.items())
    assert torch.equal(model.decode(features, clicks((3.0, 4.0, 5.0))).logits, first)


def test_every_parameter_is_trained_by_a_session_with_clicks_a_box_and_a_mask(model):
    features = model.encode(random(1, 2, 16, 16, 16))
    prompts = clicks((3.0, 4.0, 5.0), (9.0, 9.0, 2.0), labels=[1, 0])
    prompts.boxes = torch.tensor([[[2.0, 3.0, 4.0], [12.0, 13.0, 14.0]]])
    first = model.decode(features, prompts)
    prompts.mask_logits = first.lowres_logits
    second = model.decode(features, prompts)
    model.zero_grad()
    (second.logits.square().mean() + second.iou.square().mean()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert idle == []

"""SAMU: the count of its plan, its controls, one click against several, and positions without the dense features."""

import pytest
import torch
import torch.nn.functional as F

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model
from samed3d.models.base import PromptBatch, own_overlap
from samed3d.models.samu import PromptAttention, projected_positions
from samed3d.nn.prompt_encoder import RandomFourierPositions

TINY = MODELS["samu"].tiny


def make(name: str = "samu", **switches):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, **{**TINY, **switches}).eval()


def image() -> torch.Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def click(at=(4.0, 5.0, 6.0), positive=1) -> PromptBatch:
    return PromptBatch(torch.tensor([[at]]), torch.tensor([[positive]]))


def both() -> PromptBatch:
    return PromptBatch(torch.tensor([[[4.0, 5.0, 6.0], [12.0, 3.0, 9.0]]]), torch.tensor([[1, 0]]))


@torch.no_grad()
def logits(model, prompts: PromptBatch) -> torch.Tensor:
    return model(image(), prompts).logits


@pytest.mark.parametrize(
    ("levels", "total"), [("all", 12_034_342), ("decoder", 11_312_389), ("bottom", 11_111_362), ("none", 10_387_873)]
)
def test_parameter_counts(levels, total):
    with torch.device("meta"):
        model = create_model("samu", prompt_levels=levels)
    assert sum(p.numel() for p in model.parameters()) == total
    if levels == "all":
        assert sum(p.numel() for p in model.encoder.parameters()) == 5_035_360
        assert [sum(p.numel() for p in a.parameters()) for a in model.attentions.values()] == [
            29_409,
            83_393,
            265_089,
            545_089,
            721_953,
        ]


def test_the_control_without_prompts_does_not_listen():
    torch.testing.assert_close(
        logits(make(prompt_levels="none"), click()), logits(make(prompt_levels="none"), click((12.0, 3.0, 9.0), 0))
    )


@pytest.mark.parametrize("levels", ["all", "decoder", "bottom"])
def test_the_others_do(levels):
    base = logits(make(prompt_levels=levels), click())
    assert not torch.allclose(base, logits(make(prompt_levels=levels), click((12.0, 3.0, 9.0))), atol=1e-6)
    assert not torch.allclose(base, logits(make(prompt_levels=levels), click(positive=0)), atol=1e-6)


def test_the_papers_form_sees_the_newest_click_and_no_mask():
    model = make()
    assert (model.spec.prompts, model.spec.click_memory) == ({"point"}, "newest")
    last = both()
    last.points, last.point_labels = last.points[:, 1:], last.point_labels[:, 1:]
    torch.testing.assert_close(logits(model, both()), logits(model, last))
    last.mask_logits = torch.ones(1, 1, 4, 4, 4)
    torch.testing.assert_close(logits(model, both()), logits(model, last))


def test_the_extension_sees_all():
    model = make("samu_extended")
    base = logits(model, click())
    assert not torch.allclose(base, logits(model, both()), atol=1e-6)
    boxed, masked = click(), click()
    boxed.boxes = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]])
    masked.mask_logits = torch.ones(1, 1, 4, 4, 4)
    assert not torch.allclose(base, logits(model, boxed), atol=1e-6)
    assert not torch.allclose(base, logits(model, masked), atol=1e-6)
    masked.mask_valid = torch.tensor([False])
    torch.testing.assert_close(base, logits(model, masked))


def test_a_mask_alone_is_a_prompt_of_the_extension():
    prompts = PromptBatch.empty(1)
    prompts.mask_logits = torch.ones(1, 1, 4, 4, 4)
    assert torch.isfinite(logits(make("samu_extended"), prompts)).all()


def test_overlap_is_one_where_sure_and_lower_where_not():
    sure = torch.full((1, 1, 4, 4, 4), -30.0)
    sure[..., :2] = 30.0
    torch.testing.assert_close(own_overlap(sure), torch.tensor([[1.0]]))
    torch.testing.assert_close(
        own_overlap(torch.full((1, 1, 2, 2, 2), 0.01)), torch.tensor([[0.5025]]), atol=1e-4, rtol=0
    )


def test_projected_positions_are_those_of_the_dense_features():
    torch.manual_seed(0)
    positions, weight = RandomFourierPositions(16, sin_cos_sin=False, swap_axes=False), torch.randn(5, 16)
    dense = F.linear(positions.dense((3, 4, 5)).flatten(2)[0].T, weight)
    torch.testing.assert_close(projected_positions(positions, (3, 4, 5), weight), dense, atol=1e-5, rtol=1e-5)


def test_clicks_and_map_share_one_frame():
    """A click's position code is that of the voxel under it."""
    positions = RandomFourierPositions(16, sin_cos_sin=False, swap_axes=False)
    at = positions((torch.tensor([1.0, 3.0, 2.0]) + 0.5) / torch.tensor([3.0, 4.0, 5.0]))
    torch.testing.assert_close(positions.dense((3, 4, 5))[0, :, 1, 3, 2], at, atol=1e-5, rtol=1e-5)


def test_attention_is_not_the_same_everywhere():
    torch.manual_seed(0)
    block, positions = PromptAttention(16, 8), RandomFourierPositions(8, sin_cos_sin=False, swap_axes=False)
    image = torch.zeros(1, 16, 2, 2, 2)
    change = block(image, torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool), positions)
    assert change.flatten(2).std(dim=2).max() > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_levels": "top"}, r"prompt_levels must be one of all, decoder, bottom, none, got 'top'"),
        ({"click_memory": "some"}, r"click_memory must be newest or all"),
        ({"input_shape": (16, 16, 15)}, r"three multiples of 8 for 4 levels"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        make(**wrong)


def test_wrong_crop_is_refused():
    with pytest.raises(InputError, match=r"multiple of 8 on each axis, got \(12, 16, 16\)"):
        make().encode(torch.zeros(1, 1, 12, 16, 16))

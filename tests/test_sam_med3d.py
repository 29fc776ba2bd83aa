"""SAM-Med3D: names, shapes and counts of the released weights, and every quirk by its switch."""

from pathlib import Path

import pytest
import torch

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model
from samed3d.models.base import PromptBatch
from samed3d.models.sam_med3d import variant_of
from samed3d.models.weights import load_state_strict

STATE_DICT_LIST = Path(__file__).parent / "data" / "sam_med3d_state_dict.txt"
TINY = MODELS["sam_med3d_b"].tiny


def released_entries() -> dict[str, tuple[int, ...]]:
    """Name to shape, from the list of the released checkpoint."""
    entries = {}
    for line in STATE_DICT_LIST.read_text().splitlines()[1:]:
        name, shape = line.split(" ", 1)
        entries[name] = tuple(int(n) for n in shape[1 : shape.index(")")].split(",") if n.strip())
    return entries


def make(**switches):
    """A tiny model whose weights do not depend on the switches."""
    model = create_model("sam_med3d_b", **TINY, **switches).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def image() -> torch.Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def clicks() -> PromptBatch:
    return PromptBatch(torch.tensor([[[3.0, 4.0, 5.0], [9.0, 2.0, 12.0]]]), torch.tensor([[1, 0]]))


@torch.no_grad()
def logits(model, prompts: PromptBatch) -> torch.Tensor:
    return model(image(), prompts).logits


def test_state_dict_has_the_released_names_and_shapes():
    with torch.device("meta"):
        model = create_model("sam_med3d_b")
    expected = released_entries()
    assert len(expected) == 324
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "encoder", "total"),
    [
        ("sam_med3d_b", 92_924_928, 100_509_232),
        ("sam_med3d_b256", 28_602_624, 36_186_928),
        ("sam_med3d_l", 315_202_560, 322_786_864),
        ("sam_med3d_h", 644_850_688, 652_434_992),
    ],
)
def test_parameter_counts(name, encoder, total):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.image_encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.spec.input_shape_zyx == ((128,) * 3 if name == "sam_med3d_b" else (256,) * 3)


def test_spec_says_how_the_weights_were_trained():
    spec = make().spec
    assert (spec.spacing_mm, spec.normalisation, spec.ct_clamp_hu) == (1.5, "zscore_positive", (-1000.0, 1000.0))
    assert (spec.tensor_axes, spec.prompts, spec.click_logit_threshold) == ("xyz", {"point", "mask"}, 0.5)
    assert (spec.click_memory, spec.first_mask) == ("newest", "zeros")


@pytest.mark.parametrize("switch", ["misbroadcast_relpos", "pad_sink", "swap_pe_axes"])
def test_quirk_changes_the_mask(switch):
    assert not torch.allclose(logits(make(), clicks()), logits(make(**{switch: False}), clicks()), atol=1e-3)


def test_quirk_sin_cos_sin_changes_the_position_buffer():
    assert make().prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.shape == (3, 16)
    assert make(sin_cos_sin=False).prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.shape == (3, 24)


def test_quirk_pad_point_adds_one_token():
    prompts = clicks()
    assert make().prompt_encoder.embed_points(prompts.points, prompts.point_labels)[0].shape[1] == 3
    assert make(pad_point=False).prompt_encoder.embed_points(prompts.points, prompts.point_labels)[0].shape[1] == 2


def test_quirk_first_mask_is_zero_logits():
    prompts = clicks()
    explicit = PromptBatch(prompts.points, prompts.point_labels, mask_logits=torch.zeros(1, 1, 8, 8, 8))
    torch.testing.assert_close(logits(make(), prompts), logits(make(), explicit))
    assert not torch.allclose(logits(make(), prompts), logits(make(first_mask="none"), prompts), atol=1e-3)


def test_quirk_newest_click_is_the_only_one_seen():
    both = clicks()
    last = PromptBatch(both.points[:, 1:], both.point_labels[:, 1:])
    torch.testing.assert_close(logits(make(), both), logits(make(), last))
    assert not torch.allclose(logits(make(click_memory="all"), both), logits(make(), both), atol=1e-3)


def test_newest_click_skips_padding():
    points = torch.arange(12.0).reshape(2, 2, 3)
    kept = PromptBatch(points, torch.tensor([[1, -1], [0, 1]])).newest_click()
    assert kept.points.tolist() == [[[0.0, 1.0, 2.0]], [[9.0, 10.0, 11.0]]]
    assert kept.point_labels.tolist() == [[1], [1]]


def test_points_are_in_tensor_axis_order():
    moved = PromptBatch(torch.tensor([[[12.0, 2.0, 9.0]]]), torch.tensor([[0]]))
    last = PromptBatch(torch.tensor([[[9.0, 2.0, 12.0]]]), torch.tensor([[0]]))
    assert not torch.allclose(logits(make(), moved), logits(make(), last), atol=1e-3)


def test_mask_only_prompt_has_no_tokens_but_decodes():
    model = make()
    prompts = PromptBatch.empty(1)
    prompts.mask_logits = torch.ones(1, 1, 8, 8, 8)
    out = model(image(), prompts)
    assert (
        out.logits.shape == (1, 1, 16, 16, 16)
        and out.lowres_logits.shape == (1, 1, 8, 8, 8)
        and out.iou.shape == (1, 1)
    )


def test_box_is_refused():
    prompts = clicks()
    prompts.boxes = torch.tensor([[[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]])
    with pytest.raises(InputError, match=r"points or masks for sam_med3d_b, got a box"):
        make()(image(), prompts)


def test_wrong_crop_shape_is_refused():
    with pytest.raises(InputError, match=r"image must be \(B, 1, 16, 16, 16\).*got \(1, 1, 8, 16, 16\)"):
        make().encode(torch.zeros(1, 1, 8, 16, 16))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((16, 16, 24), "must be a cube"), ((16, 16, 17), "multiples of the patch"), ((16, 16), "three multiples")],
)
def test_wrong_input_shape_is_refused(shape, message):
    with pytest.raises(InputError, match=message):
        create_model("sam_med3d_b", **{**TINY, "input_shape": shape})


def with_box_embeddings(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ``sam_med3d_turbo_bbox_init.pth``: two more prompt embeddings."""
    width = state["prompt_encoder.point_embeddings.0.weight"].shape[1]
    return {
        **state,
        **{f"prompt_encoder.point_embeddings.{i}.weight": torch.full((1, width), float(i)) for i in (2, 3)},
    }


def test_the_variant_with_box_embeddings_loads_whole_and_answers_as_before():
    plain = make()
    state = with_box_embeddings(plain.state_dict())
    assert variant_of(plain.state_dict()) == {} and variant_of(state) == {"boxes": "stored"}
    model = create_model("sam_med3d_b", **TINY, **variant_of(state)).eval()
    load_state_strict(model, state)
    assert model.spec.prompts == {"point", "mask"}
    assert torch.equal(logits(model, clicks()), logits(plain, clicks()))
    prompts = clicks()
    prompts.boxes = torch.tensor([[[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]])
    with pytest.raises(InputError, match="got a box"):
        model(image(), prompts)


def test_boxes_are_prompts_where_they_are_used():
    model = make(boxes="used")
    assert "box" in model.spec.prompts
    prompts = clicks()
    prompts.boxes = torch.tensor([[[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]])
    assert not torch.allclose(logits(model, prompts), logits(model, clicks()), atol=1e-4)
    prompts.box_valid = torch.tensor([False])
    torch.testing.assert_close(logits(model, prompts), logits(model, clicks()))
    with pytest.raises(InputError, match="boxes must be none, stored or used, got 'yes'"):
        make(boxes="yes")

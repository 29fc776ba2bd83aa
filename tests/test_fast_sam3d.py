"""FastSAM3D: its count, its features for distillation, its start from a teacher, and sparse attention against a plain
form of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptBatch
from samed3d.models.sam_med3d import from_teacher
from samed3d.models.weights import HEADER_KEY, read_header, save_weights
from samed3d.nn.attention import DilatedAttention, GridAttention, token_groups

TINY = MODELS["fast_sam3d"].tiny
TINY_TEACHER = {**MODELS["sam_med3d_b"].tiny, "depth": 4, "global_blocks": (1, 3), "heads": 2}


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def test_the_encoder_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = create_model("fast_sam3d")
    assert sum(p.numel() for p in model.image_encoder.parameters()) == 45_639_936
    assert not any("attn" in name for name, _ in model.image_encoder.blocks[1].named_parameters())
    assert [b.attn.heads for b in model.image_encoder.blocks[2:]] == [6] * 4


@torch.no_grad()
def test_layer_features_end_in_what_encode_returns():
    for name, tiny in (("fast_sam3d", TINY), ("sam_med3d_b", TINY_TEACHER)):
        model = seeded(create_model(name, **tiny)).eval()
        image = torch.randn(2, 1, *model.spec.input_shape_zyx, generator=torch.Generator().manual_seed(1))
        features = model.layer_features(image)
        assert [tuple(f.shape) for f in features[:-1]] == [(2, 2, 2, 2, tiny["dim"])] * tiny["depth"]
        torch.testing.assert_close(features[-1].movedim(-1, 1), model.encode(image)["image"])
        assert not torch.equal(features[0], features[1])


def test_gradients_flow_into_the_features():
    model = create_model("fast_sam3d", **TINY)
    model.layer_features(torch.randn(1, 1, 16, 16, 16))[0].square().mean().backward()
    assert model.image_encoder.blocks[0].mlp.lin1.weight.grad.abs().sum() > 0
    assert model.image_encoder.blocks[1].mlp.lin1.weight.grad is None


def test_one_pattern_of_one_segment_is_full_attention():
    full, dilated = (
        seeded(GridAttention(12, 2, (2, 3, 4), 0, False, False)),
        DilatedAttention(12, 2, (2, 3, 4), ((24, 1),)),
    )
    dilated.load_state_dict(full.state_dict())
    x = torch.randn(2, 2, 3, 4, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dilated(x), full(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dilated_attention_is_attention_to_the_tokens_of_its_groups():
    """Against a loop over tokens: keys of all patterns in one softmax, positions by offset, each token at its own
    place."""
    patterns, grid = ((4, 1), (8, 2)), (2, 2, 4)
    attention = seeded(DilatedAttention(6, 1, grid, patterns))
    x = torch.randn(1, *grid, 6, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.qkv(x).reshape(16, 3, 6).unbind(1)
    place = [(z, y, w) for z in range(2) for y in range(2) for w in range(4)]
    tables = (attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w)
    out = torch.zeros(16, 6)
    for token in range(16):
        seen = [
            key
            for segment, step in patterns
            for key in range(16)
            if key // segment == token // segment and (key - token) % step == 0
        ]
        assert len(seen) == 8
        logits = []
        for key in seen:
            position = sum(t[a - b + n - 1] for t, a, b, n in zip(tables, place[token], place[key], grid, strict=True))
            logits.append(q[token] @ (k[key] * attention.scale + position))
        out[token] = torch.stack(logits).softmax(0) @ v[seen]
    torch.testing.assert_close(attention(x).reshape(16, 6), attention.proj(out), atol=1e-5, rtol=1e-5)


def test_every_token_is_in_one_group():
    groups = token_groups(512, 512, 64, torch.device("cpu"))
    assert groups.shape == (64, 8) and groups[3].tolist() == [3 + 64 * i for i in range(8)]
    assert sorted(groups.flatten().tolist()) == list(range(512))


@torch.no_grad()
def test_dilated_takes_the_weights_of_full_and_differs():
    full = seeded(create_model("fast_sam3d", **TINY)).eval()
    sparse = create_model("fast_sam3d", **TINY, attention="dilated", patterns=((2, 1), (4, 2))).eval()
    sparse.load_state_dict(full.state_dict())
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(full.encode(image)["image"], sparse.encode(image)["image"], atol=1e-4)


@pytest.mark.parametrize("patterns", [((5, 1),), ((8, 3),), ((0, 1),)])
def test_patterns_that_do_not_divide_are_refused(patterns):
    with pytest.raises(InputError, match=r"patterns: a segment must divide the 8 tokens"):
        DilatedAttention(6, 1, (2, 2, 2), patterns)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": "flash"}, r"attention must be full or dilated, got 'flash'"),
        ({"attention": "dilated", "window": 2}, r"attention dilated needs window 0 .* got 2 and False; use fast_sam3d"),
        ({"plain_blocks": 9}, r"plain_blocks must be from 0 to the depth"),
        ({"input_shape": (16, 16, 17)}, r"multiples of the patch"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        create_model("fast_sam3d", **{**TINY, **wrong})


@torch.no_grad()
def test_files_from_before_students_were_configured_as_sam_med3d_are_read(tmp_path):
    numbers = {**TINY, "attention": "dilated", "patterns": ((2, 1), (4, 2))}
    model, path = seeded(create_model("fast_sam3d", **numbers)).eval(), tmp_path / "old.safetensors"
    save_weights(model, path, {})
    header = read_header(path)
    known = ["input_shape", "patch", "dim", "depth", "plain_blocks", "heads", "attention", "patterns"]
    known += ["prompt_dim", "decoder_heads", "decoder_mlp_dim"]
    header["config"] = {name: header["config"][name] for name in known}
    save_file(load_file(path), path, metadata={HEADER_KEY: json.dumps(header)})
    again = load(path)
    assert again.config == model.config and again.spec == model.spec
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = PromptBatch(torch.tensor([[[3.0, 4.0, 5.0]]]), torch.tensor([[1]]))
    assert torch.equal(again(image, prompts).logits, model(image, prompts).logits)


def test_a_student_starts_from_its_teacher():
    teacher = seeded(create_model("sam_med3d_b", **TINY_TEACHER))
    student = create_model("fast_sam3d", **TINY)
    student.load_state_dict(from_teacher(student.state_dict(), teacher.state_dict()))
    taught, own = teacher.state_dict(), student.state_dict()
    assert torch.equal(own["image_encoder.blocks.1.mlp.lin1.weight"], taught["image_encoder.blocks.3.mlp.lin1.weight"])
    assert torch.equal(own["mask_decoder.mask_tokens.weight"], taught["mask_decoder.mask_tokens.weight"])
    features = {"image": teacher.encode(torch.randn(1, 1, 16, 16, 16))["image"]}
    prompts = PromptBatch(torch.tensor([[[3.0, 4.0, 5.0]]]), torch.tensor([[1]]))
    torch.testing.assert_close(student.decode(features, prompts).logits, teacher.decode(features, prompts).logits)


def test_a_teacher_of_another_shape_is_refused():
    student = create_model("fast_sam3d", **TINY)
    with pytest.raises(
        InputError, match=r"teacher must hold image_encoder\.\S+ of shape .* use a sam_med3d_b checkpoint"
    ):
        from_teacher(student.state_dict(), {})

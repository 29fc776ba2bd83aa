"""SAM's 2D encoder: equal to timm's on the same weights, any image size, SAM's checkpoints read by name, a hash that
knows them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samed3d.errors import InputError
from samed3d.models.sam_backbone import import_sam, open_encoder
from samed3d.models.weights import read_header, tensors_sha256
from samed3d.nn.attention import relative_table
from samed3d.nn.mask_decoder import ProgressiveMaskDecoder
from samed3d.nn.prompt_encoder import PromptEncoder2d
from samed3d.nn.vit2d import SAM_SIZES, Attention2d, SamEncoder2d, build_encoder, encoder_state
from tests.timm_here import timm_or_skip

SIZES = {"sam_vit_b": 89_670_912, "sam_vit_l": 308_278_272, "sam_vit_h": 637_026_048}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def timm_sam(grid: int, window: int, depth: int = 4) -> Any:
    timm_or_skip()
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        img_size=16 * grid,
        embed_dim=48,
        depth=depth,
        num_heads=4,
        window_size=window,
        num_classes=0,
        use_abs_pos=True,
        use_rel_pos=True,
        global_attn_indexes=(1, 3),
        neck_chans=32,
    )


def fake_sam(name: str = "sam_vit_tiny") -> dict[str, Tensor]:
    """A whole SAM checkpoint of a small encoder, with SAM's names."""
    encoder = build_encoder(name, seed=5)
    assert isinstance(encoder, SamEncoder2d)
    parts = {"image_encoder": encoder, "prompt_encoder": PromptEncoder2d(encoder.out_dim)}
    parts["mask_decoder"] = ProgressiveMaskDecoder(encoder.out_dim, classes=4)
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize(("grid", "window"), [(4, 3), (5, 3), (4, 4), (2, 3), (7, 3)])
@torch.no_grad()
def test_equals_timm_on_the_same_weights(grid, window):
    theirs = filled(timm_sam(grid, window))
    ours = SamEncoder2d(48, 4, 4, (1, 3), grid, window, 32)
    ours.load_state_dict(encoder_state(theirs.state_dict(), "sam_vit_tiny"))
    image = images(2, 3, 16 * grid, 16 * grid)
    torch.testing.assert_close(ours(image), theirs.forward_features(image), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_base_encoder_equals_timms_at_full_depth():
    theirs = timm_or_skip().create_model("samvit_base_patch16", img_size=256, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ours = SamEncoder2d(**SAM_SIZES["sam_vit_b"], grid=16)
    ours.load_state_dict(encoder_state(theirs.state_dict(), "sam_vit_b"))
    image = images(1, 3, 256, 256)
    expected = theirs.eval().forward_features(image)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours.eval()(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_sam(name):
    with torch.device("meta"):
        encoder = build_encoder(name)
    assert sum(p.numel() for p in encoder.parameters()) == SIZES[name]
    assert len(list(encoder.parameters())) == {"sam_vit_b": 177, "sam_vit_l": 345, "sam_vit_h": 457}[name]


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 7), (9, 2), (6, 6)])
@torch.no_grad()
def test_windows_without_padding_equal_padded_windows(height, width):
    layer = filled(Attention2d(12, 2, 8, 3))
    x = images(2, height, width, 12)
    padded = F.pad(x, (0, 0, 0, -width % 3, 0, -height % 3))
    expected = torch.empty_like(padded)
    for top in range(0, padded.shape[1], 3):
        for left in range(0, padded.shape[2], 3):
            part = (slice(None), slice(top, top + 3), slice(left, left + 3))
            expected[part] = layer(padded[part])  # a full window holds no padding of its own
    torch.testing.assert_close(layer(x), expected[:, :height, :width], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_other_image_sizes_work_and_a_size_between_patches_is_refused():
    encoder = build_encoder("sam_vit_tiny")
    assert encoder(images(1, 3, 32, 80)).shape == (1, 16, 2, 5)
    with pytest.raises(InputError, match=r"multiples of 16 pixels, got \(40, 32\)"):
        encoder(images(1, 3, 40, 32))


def test_relative_positions_are_interpolated_to_the_grid():
    table = torch.arange(15.0)[:, None]
    torch.testing.assert_close(relative_table(table, 8)[3, 5], torch.tensor([5.0]))  # offset -2, the middle is row 7
    small = relative_table(table, 4)
    assert small.shape == (4, 4, 1) and small[0, 0] == 7 and small[3, 0] > small[2, 0] > small[0, 3]


def test_random_weights_follow_from_the_seed_and_are_told(caplog):
    first, again, other = (build_encoder("sam_vit_tiny", seed).state_dict() for seed in (0, 0, 1))
    assert tensors_sha256(first) == tensors_sha256(again) != tensors_sha256(other)
    open_encoder("sam_vit_tiny", "", "")
    assert "the frozen encoder sam_vit_tiny has random weights" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_is_read_whatever_its_format(tmp_path, suffix):
    state = fake_sam()
    file = tmp_path / "sam.pth"
    torch.save(state, file)
    if suffix == ".safetensors":
        assert import_sam(file, tmp_path / "sam.safetensors", "sam_vit_tiny") == len(state)
        file = tmp_path / "sam.safetensors"
        assert read_header(file)["model"] == "sam_vit_tiny"
    encoder, sha256, whole = open_encoder("sam_vit_tiny", str(file), "")
    assert set(whole) == set(state)
    assert sha256 == tensors_sha256(encoder_state(state, "sam_vit_tiny"))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[f"image_encoder.{key}"])


def test_a_checkpoint_is_found_in_the_folder_of_checkpoints(tmp_path, monkeypatch):
    torch.save(fake_sam(), tmp_path / "sam.pth")
    monkeypatch.setenv("SAMED3D_CHECKPOINTS", str(tmp_path))
    assert open_encoder("sam_vit_tiny", "elsewhere/sam.pth", "")[1]
    with pytest.raises(InputError, match=r"checkpoint does not exist: elsewhere/other.pth"):
        open_encoder("sam_vit_tiny", "elsewhere/other.pth", "")


def test_another_checkpoint_than_the_one_trained_on_is_refused(tmp_path):
    torch.save(fake_sam(), tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"must be the file that this model was trained on .*abc.*give the right file"):
        open_encoder("sam_vit_tiny", str(tmp_path / "sam.pth"), "abc")


def test_a_checkpoint_that_is_not_that_encoder_is_refused(tmp_path):
    state = fake_sam()
    del state["image_encoder.blocks.3.attn.qkv.bias"]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(
        InputError, match=r"does not hold the encoder sam_vit_tiny: .*; missing \(1\): blocks.3.attn.qkv.bias"
    ):
        open_encoder("sam_vit_tiny", str(tmp_path / "sam.pth"), "")
    with pytest.raises(
        InputError, match=r"sam.pth is no sam_vit_b: .* missing .* mis-shaped .*; give --model another name"
    ):
        import_sam(tmp_path / "sam.pth", tmp_path / "out.safetensors", "sam_vit_b")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"image_encoder.x": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"must hold only tensors .* holds the Python object pathlib"):
        open_encoder("sam_vit_tiny", str(tmp_path / "bad.pth"), "")


def test_any_vision_transformer_of_timm_is_an_encoder():
    timm_or_skip()
    encoder = build_encoder("timm:vit_tiny_patch16_224")
    assert (encoder.out_dim, encoder.stride) == (192, 16)
    with torch.no_grad():
        assert encoder.eval()(images(2, 3, 32, 64)).shape == (2, 192, 2, 4)
    state = timm_or_skip().create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    encoder.load_state_dict(encoder_state(state, "timm:vit_tiny_patch16_224"))


def test_sams_weights_fit_timms_encoder_and_the_reverse():
    timm_or_skip()
    with torch.device("meta"):
        ours, theirs = build_encoder("sam_vit_b").state_dict(), build_encoder("timm:samvit_base_patch16").state_dict()
    sam = {f"image_encoder.{key}": value for key, value in ours.items()} | {"mask_decoder.x": torch.zeros(1)}
    assert {k: v.shape for k, v in encoder_state(sam, "timm:samvit_base_patch16").items()} == {
        k: v.shape for k, v in theirs.items()
    }


def test_unknown_encoders_are_refused():
    with pytest.raises(InputError, match=r"backbone must be one of sam_vit_b, .* or timm:NAME, got 'sam_vit_x'"):
        build_encoder("sam_vit_x")
    timm_or_skip()
    with pytest.raises(InputError, match=r"backbone timm:no_such_model cannot be built"):
        build_encoder("timm:no_such_model")

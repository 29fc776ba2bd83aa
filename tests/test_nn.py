"""The blocks: windowed attention against the padded oracle, positions in one frame, prompts masked rightly."""

import itertools

import pytest
import torch
from padded_oracle import _bias, padded_attention, padded_encoder

from samed3d.errors import InputError
from samed3d.nn.attention import GridAttention
from samed3d.nn.layers import LayerNorm3d, ResidualBlock
from samed3d.nn.mask_decoder import TwoWayTransformer
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_encoder import PromptEncoder, RandomFourierPositions
from samed3d.nn.vit import ConvStem, ImageEncoder


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights with strong relative positions and biases, so that a wrong bias or sink shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        strong = "rel_pos" in name or name.endswith("bias")
        parameter.data.normal_(std=0.5 if strong else 0.12, generator=generator)


def make_encoder(grid: tuple[int, int, int], released: bool, pad_sink: bool = True, depth: int = 4) -> ImageEncoder:
    windows = [14] * (depth - 1) + [0]
    encoder = ImageEncoder(
        None, (GridAttention(48, 2, grid, edge, released, pad_sink) for edge in windows), grid, 48, 24
    )
    randomise(encoder, seed=1)
    return encoder.eval()


def tokens(grid: tuple[int, int, int], batch: int = 1, dim: int = 48) -> torch.Tensor:
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("pad_sink", [True, False])
def test_encoder_equals_padded_oracle_in_one_window(released, pad_sink):
    encoder, x = make_encoder((8, 8, 8), released, pad_sink), tokens((8, 8, 8), batch=2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), padded_encoder(encoder, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("released", [True, False])
def test_encoder_equals_padded_oracle_in_eight_windows(released):
    encoder, x = make_encoder((16, 16, 16), released, depth=2), tokens((16, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), padded_encoder(encoder, x), atol=1e-5, rtol=0)


def test_gradients_equal_the_oracle_s():
    encoder, x = make_encoder((8, 8, 8), released=True, depth=2), tokens((8, 8, 8))
    gradients = []
    for run in (encoder, lambda value: padded_encoder(encoder, value)):
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().mean().backward()
        gradients.append({"x": leaf.grad, **{name: p.grad.clone() for name, p in encoder.named_parameters()}})
    for name, cheap in gradients[0].items():
        assert torch.isfinite(cheap).all(), name
        torch.testing.assert_close(
            cheap, gradients[1][name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_equal_the_oracle_s_where_windows_are_filled_unevenly():
    attention = GridAttention(12, 2, (5, 5, 5), 3, misbroadcast_relpos=True, pad_sink=True)
    randomise(attention, seed=3)
    x = tokens((5, 5, 5), dim=12)
    gradients = []
    for run in (attention, lambda value: padded_attention(attention, value)):
        attention.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in attention.parameters()])
    for cheap, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(cheap, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_encoder_equals_padded_oracle_at_the_released_size():
    from samed3d.models import create_model

    model = create_model("sam_med3d_b").eval()
    for name, parameter in model.image_encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    image = torch.randn(1, 1, 128, 128, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (model.image_encoder(image) - padded_encoder(model.image_encoder, image)).abs().max() <= 1e-4


@pytest.mark.parametrize("released", [True, False])
@torch.no_grad()
def test_oracle_bias_is_the_formula_key_by_key(released):
    attention = GridAttention(4, 1, (3, 3, 3), 0, misbroadcast_relpos=released, pad_sink=True)
    randomise(attention, seed=6)
    q = tokens((3, 3, 3), dim=4)[None]
    bias = _bias(attention, q).reshape(3, 3, 3, 3, 3, 3)
    rd, rh, rw = attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w
    q = q[0, 0]
    for a, b, c, x, y, z in itertools.product(range(3), repeat=6):
        if released:
            expected = q[a, b, c] @ rd[a - z + 2] + q[a, b, x] @ rh[b - z + 2] + q[a, b, y] @ rw[y - z + 2]
        else:
            expected = q[a, b, c] @ (rd[a - x + 2] + rh[b - y + 2] + rw[c - z + 2])
        assert float(bias[a, b, c, x, y, z]) == pytest.approx(float(expected), abs=1e-5)


def test_released_relative_position_refuses_a_grid_that_is_not_cubic():
    with pytest.raises(InputError, match=r"input_shape must be a cube.*\(4, 4, 6\).*misbroadcast_relpos=False"):
        GridAttention(12, 2, (4, 4, 6), 3, misbroadcast_relpos=True, pad_sink=True)


@pytest.mark.parametrize("window", [0, 3])
def test_correct_relative_position_takes_any_grid_and_equals_the_oracle(window):
    attention = GridAttention(12, 2, (4, 2, 6), window, misbroadcast_relpos=False, pad_sink=True)
    randomise(attention, seed=7)
    x = tokens((4, 2, 6), dim=12)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), padded_attention(attention, x), atol=1e-5, rtol=0)


def test_attention_runs_in_bfloat16_autocast():
    attention = GridAttention(12, 2, (5, 5, 5), 3, misbroadcast_relpos=True, pad_sink=True)
    x = tokens((5, 5, 5), dim=12)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    torch.testing.assert_close(out.float(), attention(x), atol=0.05, rtol=0.05)


def test_layer_norm_3d_normalises_channels_of_each_voxel():
    out = LayerNorm3d(6)(3 + 2 * torch.randn(2, 6, 3, 4, 5, generator=torch.Generator().manual_seed(8)))
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(2, 3, 4, 5), atol=1e-3, rtol=0)


def test_dense_positions_are_the_points_positions_and_swap_two_axes_as_released():
    for swap in (False, True):
        pe = RandomFourierPositions(12, sin_cos_sin=True, swap_axes=swap)
        dense = pe.dense((2, 3, 4))[0]
        point = pe(torch.tensor([(1 + 0.5) / 2, (0 + 0.5) / 3, (2 + 0.5) / 4]))
        assert torch.allclose(dense[:, 1, 0, 2], point, atol=1e-5) is not swap
    cubic = pe.dense((4, 4, 4))[0]
    torch.testing.assert_close(cubic[:, 0, 1, 2], pe((torch.tensor([1.0, 0.0, 2.0]) + 0.5) / 4), atol=1e-5, rtol=0)


def test_released_position_repeats_its_sine():
    released = RandomFourierPositions(12, sin_cos_sin=True, swap_axes=False)(torch.tensor([0.1, 0.7, 0.4]))
    assert torch.equal(released[:4], released[8:]) and not torch.equal(released[:4], released[4:8])
    assert RandomFourierPositions(12, sin_cos_sin=False, swap_axes=False).positional_encoding_gaussian_matrix.shape == (
        3,
        6,
    )


def make_prompt_encoder(pad_point: bool) -> PromptEncoder:
    return PromptEncoder(
        12, (2, 2, 2), (8, 8, 8), boxes=True, sin_cos_sin=False, swap_pe_axes=False, pad_point=pad_point
    )


def test_released_prompt_encoder_adds_a_padding_token_that_counts():
    points, labels = torch.zeros(1, 2, 3), torch.tensor([[1, -1]])
    released, valid = make_prompt_encoder(pad_point=True).embed_points(points, labels)
    assert released.shape == (1, 3, 12) and valid.all()
    assert torch.equal(released[0, 1], released[0, 2])
    ours, valid = make_prompt_encoder(pad_point=False).embed_points(points, labels)
    assert ours.shape == (1, 2, 12) and valid.tolist() == [[True, False]]


@pytest.mark.parametrize("pad_point", [True, False])
def test_no_points_give_no_tokens(pad_point):
    encoder = make_prompt_encoder(pad_point)
    sparse, valid = encoder.embed_points(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.int64))
    assert sparse.shape == (2, 0, 12) and valid.shape == (2, 0)


def test_box_corners_are_voxel_edges_in_the_frame_of_points():
    encoder = make_prompt_encoder(pad_point=False)
    box = torch.tensor([[[2.0, 2.0, 2.0], [5.0, 6.0, 7.0]]])
    corners = encoder.embed_boxes(box)
    low = encoder.pe_layer((torch.tensor([1.5, 1.5, 1.5]) + 0.5) / 8) + encoder.point_embeddings[2].weight[0]
    torch.testing.assert_close(corners[0, 0], low)
    prompts = PromptBatch(torch.zeros(1, 2, 3), torch.tensor([[1, -1]]), box)
    sparse, valid, _ = encoder(prompts)
    assert torch.equal(sparse[:, 2:], corners) and valid.tolist() == [[True, False, True, True]]
    prompts.box_valid = torch.tensor([False])
    assert encoder(prompts)[1].tolist() == [[True, False, False, False]]


def test_masked_tokens_change_nothing():
    transformer = TwoWayTransformer(16, depth=2, heads=2, mlp_dim=16).eval()
    generator = torch.Generator().manual_seed(9)
    image, pos = torch.randn(2, 16, 2, 2, 2, generator=generator), torch.randn(1, 16, 2, 2, 2, generator=generator)
    prompt = torch.randn(2, 3, 16, generator=generator)
    valid = torch.tensor([[True, True, False], [True, True, False]])
    other = prompt.clone()
    other[:, 2] = 5.0
    a, b = transformer(image, pos, prompt, valid), transformer(image, pos, other, valid)
    torch.testing.assert_close(a[0][:, :2], b[0][:, :2])
    torch.testing.assert_close(a[1], b[1])
    torch.testing.assert_close(a[1], transformer(image, pos, prompt[:, :2])[1])


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_stem_gives_tokens_and_features_four_times_as_fine(patch):
    stem = ConvStem(patch, width=2, dim=6)
    out, fine = stem(torch.zeros(1, 1, patch, 2 * patch, 3 * patch))
    assert out.shape == (1, 1, 2, 3, 6)
    assert fine.shape == (1, stem.fine_channels, 4, 8, 12)


def test_bf16_gradients_of_a_two_voxel_grid_are_those_of_float32():
    """oneDNN's bf16 weight gradient reads memory that was never written there; freed NaNs make that visible."""
    torch.manual_seed(0)
    block = ResidualBlock(128)
    torch.nn.init.normal_(block.convs[-1].weight, std=0.02)
    x = torch.randn(1, 128, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)

    def gradients(bf16: bool) -> list[torch.Tensor]:
        block.zero_grad()
        spoilt = [torch.full((2**n,), float("nan")) for n in range(8, 22, 2) for _ in range(3)]
        del spoilt
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = block(x)
        y.float().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    for _ in range(3):
        for ours, exact in zip(gradients(True), gradients(False), strict=True):
            assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))

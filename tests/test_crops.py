"""Crops: sampled where they should be, without aliasing, touching nothing else, and pasted back on the same voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from samed3d.crops import CLAMP_SIGMA, image_channels, normalise, paste_crop, sample_crop
from samed3d.geometry import CropFrame


def random_array(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_frame(rng: np.random.Generator, shape: tuple[int, int, int], steps: tuple[float, float]) -> CropFrame:
    """A crop of 5 x 6 x 4 somewhere around an array of ``shape``, partly outside."""
    step = rng.uniform(*steps, 3)
    origin = [rng.uniform(-4, n - 2) for n in shape]
    return CropFrame(tuple(map(float, origin)), tuple(map(float, step)), (5, 6, 4))


# Sampling


def test_identity_frame_returns_the_array():
    array = random_array((5, 6, 7))
    crop, inside = sample_crop(array, CropFrame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (5, 6, 7)))
    assert torch.equal(crop, torch.from_numpy(array)) and inside.all() and inside.dtype == torch.bool


def test_whole_voxel_shift_is_a_slice_and_the_border_repeats_outside():
    array = random_array((5, 6, 7))
    crop, inside = sample_crop(array, CropFrame((2.0, -2.0, 4.0), (1.0, 1.0, 1.0), (2, 5, 6)))
    expected = np.pad(array, ((0, 0), (2, 0), (0, 3)), mode="edge")[2:4, :5, 4:10]
    assert np.array_equal(crop.numpy(), expected)
    want = np.zeros((2, 5, 6), bool)
    want[:, 2:, :3] = True
    assert np.array_equal(inside.numpy(), want)


def test_inside_is_where_the_voxel_centre_falls_in_the_volume():
    array = random_array((4, 4, 4))
    _, inside = sample_crop(array, CropFrame((-0.5, -0.6, 0.0), (0.5, 1.0, 2.0), (2, 2, 3)))
    # centres z: -0.75, -0.25; y: -0.6, 0.4; x: 0.5, 2.5, 4.5; the volume reaches from -0.5 to below 3.5
    assert inside[:, 1, 0].tolist() == [False, True]
    assert inside[1, :, 0].tolist() == [False, True]
    assert inside[1, 1].tolist() == [True, True, False]


@pytest.mark.parametrize("factor", [2, 3])
def test_zooming_in_is_torch_interpolation_by_voxel_edges(factor):
    array = random_array((4, 5, 6))
    shape = tuple(n * factor for n in array.shape)
    crop, inside = sample_crop(array, CropFrame((0.0, 0.0, 0.0), (1 / factor,) * 3, shape))
    expected = F.interpolate(
        torch.from_numpy(array)[None, None], scale_factor=factor, mode="trilinear", align_corners=False
    )[0, 0]
    torch.testing.assert_close(crop, expected, atol=1e-6, rtol=0)
    assert inside.all()


@pytest.mark.parametrize("seed", range(5))
def test_fine_crops_agree_with_grid_sample_anywhere(seed):
    rng = np.random.default_rng(seed)
    array = random_array((8, 7, 9), seed)
    frame = random_frame(rng, array.shape, (0.3, 1.0))
    lines = []
    for axis in range(3):
        at = frame.origin_zyx_vox[axis] + (torch.arange(frame.shape_zyx[axis]) + 0.5) * frame.step_zyx_vox[axis] - 0.5
        lines.append((2 * at + 1) / array.shape[axis] - 1)
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flip(-1)[None].float()
    expected = F.grid_sample(torch.from_numpy(array)[None, None], grid, padding_mode="border", align_corners=False)[
        0, 0
    ]
    torch.testing.assert_close(sample_crop(array, frame)[0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("step", [1.0, 1.7, 4.0, 0.4])
def test_a_position_on_a_ramp_is_read_exactly(step):
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], (40, 3, 3))
    frame = CropFrame((8.3, 0.0, 0.0), (step, 1.0, 1.0), (5, 3, 3))
    crop, _ = sample_crop(ramp, frame)
    want = [frame.to_volume((float(i), 1.0, 1.0))[0] for i in range(5)]
    # A triangle that does not fall on whole voxels is a little off centre: far below a voxel.
    assert crop[:, 1, 1].tolist() == pytest.approx(want, abs=1e-4 if step in (1.0, 4.0, 0.4) else 0.1)


def test_zooming_out_does_not_alias():
    checks = (np.indices((32, 32, 32)).sum(axis=0) % 2).astype(np.float32)
    crop, _ = sample_crop(checks, CropFrame((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (8, 8, 8)))
    assert float((crop - 0.5).abs().max()) < 0.02


def test_zooming_out_keeps_the_mean():
    array = np.pad(random_array((24, 24, 24)) + 2, 8)
    crop, _ = sample_crop(array, CropFrame((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (10, 10, 10)))
    assert float(crop.mean()) == pytest.approx(float(array.mean()), rel=1e-4)
    flat, _ = sample_crop(np.full((9, 9, 9), 3.5), CropFrame((-3.0, 1.3, 2.0), (3.3, 2.1, 0.7), (6, 6, 6)))
    assert torch.allclose(flat, torch.tensor(3.5))


def test_a_mask_survives_zooming_out():
    mask = np.zeros((32, 32, 32), bool)
    mask[8:24, 8:24, 4:28] = True
    crop, _ = sample_crop(mask, CropFrame((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (8, 8, 8)))
    expected = torch.zeros(8, 8, 8, dtype=torch.bool)
    expected[2:6, 2:6, 1:7] = True
    assert torch.equal(crop > 0.5, expected)


def test_only_the_crop_is_touched():
    huge = np.broadcast_to(np.full((1, 1, 1), 7, np.int16), (4096, 4096, 4096))  # 128 GiB if anything copied it
    crop, inside = sample_crop(huge, CropFrame((2000.0, 3000.0, 4080.0), (2.0, 0.5, 1.0), (16, 16, 32)))
    assert (crop == 7).all() and inside[:, :, :16].all() and not inside[:, :, 16:].any()


class Watched(np.ndarray):
    """Records which slices are asked for."""

    asked: list

    def __getitem__(self, key):
        Watched.asked.append(key)
        return super().__getitem__(key)


def test_the_part_read_ends_a_few_voxels_beyond_the_crop():
    Watched.asked = []
    array = np.zeros((200, 200, 200), np.int16).view(Watched)
    sample_crop(array, CropFrame((50.0, 60.0, 70.0), (2.0, 1.0, 0.5), (10, 10, 10)))
    assert len(Watched.asked) == 1
    for part, (low, high) in zip(Watched.asked[0], ((50, 70), (60, 70), (70, 75)), strict=True):
        assert low - 5 <= part.start <= low and high <= part.stop <= high + 5


def test_a_crop_wholly_outside_repeats_the_nearest_border():
    array = random_array((4, 5, 6))
    for origin, corner in (((-90.0, -90.0, -90.0), (0, 0, 0)), ((90.0, 90.0, 90.0), (-1, -1, -1))):
        crop, inside = sample_crop(array, CropFrame(origin, (1.5, 1.0, 0.5), (3, 3, 3)))
        assert not inside.any() and torch.allclose(crop, torch.tensor(array[corner]))


def test_integer_arrays_and_flipped_views_are_read():
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)[::-1, :, ::-1]
    crop, _ = sample_crop(array, CropFrame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3, 4, 5)))
    assert np.array_equal(crop.numpy(), array)


# Pasting


def test_paste_is_the_inverse_of_an_identity_sample():
    array = random_array((9, 8, 7))
    frame = CropFrame((2.0, 3.0, -2.0), (1.0, 1.0, 1.0), (4, 5, 6))
    region, values = paste_crop(sample_crop(array, frame)[0], frame, array.shape)
    assert (region.start_zyx, region.stop_zyx) == ((2, 3, 0), (6, 8, 4))
    assert np.array_equal(values.numpy(), array[region.slices])


def test_paste_of_a_coarse_crop_is_torch_interpolation():
    coarse = torch.from_numpy(random_array((3, 4, 5)))
    frame = CropFrame((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (3, 4, 5))
    region, values = paste_crop(coarse, frame, (6, 8, 10))
    assert region.shape_zyx == (6, 8, 10)
    expected = F.interpolate(coarse[None, None], scale_factor=2, mode="trilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_field_comes_back_in_place(seed):
    """Sampling then pasting a plane gives the plane, away from the ends where a border repeats."""
    rng = np.random.default_rng(seed)
    shape = (30, 32, 34)
    slope = rng.standard_normal(3)
    field = sum(s * i for s, i in zip(slope, np.indices(shape), strict=True)).astype(np.float32)
    step = tuple(float(s) for s in rng.choice([0.4, 0.8, 1.0, 2.0], 3))
    frame = CropFrame(tuple(float(v) for v in rng.uniform(6, 9, 3)), step, (8, 8, 8))
    region, values = paste_crop(sample_crop(field, frame)[0], frame, shape)
    middle = tuple(slice(math.ceil(s), n - math.ceil(s)) for n, s in zip(values.shape, step, strict=True))
    wanted = torch.from_numpy(field[region.slices])[middle]
    assert wanted.numel() > 0
    torch.testing.assert_close(values[middle], wanted, atol=0.2 * float(np.abs(slope).max()), rtol=0)


def test_paste_of_a_fine_crop_averages():
    fine = torch.zeros(8, 8, 8)
    fine[::2] = 1.0
    _, values = paste_crop(fine, CropFrame((0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (8, 8, 8)), (2, 2, 2))
    assert float((values - 0.5).abs().max()) < 0.1


def test_paste_outside_the_volume_is_empty():
    region, values = paste_crop(
        torch.zeros(4, 4, 4), CropFrame((50.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 4)), (9, 9, 9)
    )
    assert region.is_empty and values.numel() == 0


# Normalising


def everywhere(crop: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(crop, dtype=torch.bool)


def test_zscore_uses_the_inside_only_and_leaves_the_outside_at_zero():
    crop = torch.from_numpy(random_array((6, 6, 6))) * 30 + 400
    inside = everywhere(crop)
    inside[4:] = False
    crop[4:] = 1e6
    out = normalise(crop, inside, "zscore")
    assert out.shape == (1, 6, 6, 6)
    assert float(out[0][inside].mean()) == pytest.approx(0, abs=1e-4)
    assert float(out[0][inside].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not out[0][~inside].any()


def test_zscore_cuts_outliers_and_clamp_comes_first():
    crop = torch.from_numpy(random_array((10, 10, 10)))
    crop[0, 0, 0], crop[0, 0, 1] = 500.0, -500.0
    out = normalise(crop, everywhere(crop), "zscore")[0]
    assert float(out.max()) == CLAMP_SIGMA and float(out.min()) == -CLAMP_SIGMA
    clamped = normalise(crop, everywhere(crop), "zscore", clamp=(-2.0, 2.0))[0]
    assert torch.equal(clamped, normalise(crop.clamp(-2, 2), everywhere(crop), "zscore")[0])


@pytest.mark.parametrize("method", ["zscore", "zscore_rank"])
def test_normalising_ignores_scale_and_offset(method):
    crop = torch.from_numpy(random_array((8, 8, 8)))
    one, other = (normalise(c, everywhere(crop), method) for c in (crop, crop * 250 - 900))
    torch.testing.assert_close(one, other, atol=5e-3, rtol=0)


def test_rank_is_monotone_with_unit_deviation_for_any_histogram():
    crop = torch.from_numpy(np.exp(1.5 * random_array((16, 16, 16))))  # a long tail
    inside = everywhere(crop)
    inside[12:] = False
    scaled, rank = normalise(crop, inside, "zscore_rank")
    order = rank[inside][crop[inside].argsort()]
    assert (order.diff() >= -1e-5).all()
    assert float(rank[inside].mean()) == pytest.approx(0, abs=0.02) and float(rank[inside].std()) == pytest.approx(
        1, abs=0.02
    )
    assert not rank[~inside].any()
    assert torch.equal(scaled[None], normalise(crop, inside, "zscore"))


def test_zscore_positive_is_that_of_sam_med3d():
    crop = torch.from_numpy(random_array((6, 6, 6))) * 50 + 20
    inside = everywhere(crop)
    inside[:, :2] = False
    padded = torch.where(inside, crop, 0.0)
    positive = padded[padded > 0]
    expected = (padded - positive.mean()) / positive.std()
    torch.testing.assert_close(normalise(crop, inside, "zscore_positive")[0], expected)
    assert float(expected[0, 0, 0]) != 0


@pytest.mark.parametrize("method", ["zscore", "zscore_rank", "zscore_positive"])
def test_degenerate_crops_stay_finite(method):
    shape = (4, 4, 4)
    none = torch.zeros(shape, dtype=torch.bool)
    one = none.clone()
    one[0, 0, 0] = True
    for crop in (
        torch.zeros(shape),
        torch.full(shape, -1024.0),
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    ):
        for inside in (none, one, ~none):
            out = normalise(crop, inside, method)
            assert out.shape == (image_channels(method), *shape) and torch.isfinite(out).all()


def test_unknown_method_is_named():
    with pytest.raises(
        ValueError, match="normalisation must be one of zscore, zscore_positive, zscore_rank, got 'minmax'"
    ):
        normalise(torch.zeros(2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool), "minmax")


# One image in any unit


METHODS = ["zscore", "zscore_rank", "zscore_positive"]


@pytest.mark.parametrize("method", METHODS)
@given(exponent=st.integers(-100, 80), seed=st.integers(0, 9))
def test_a_power_of_two_changes_no_bit(method, exponent, seed):
    crop = torch.from_numpy(random_array((6, 7, 8), seed)) * 250 + 40
    inside = torch.ones(crop.shape, dtype=torch.bool)
    inside[0, 0] = seed % 2 == 0
    assert torch.equal(normalise(crop * 2.0**exponent, inside, method), normalise(crop, inside, method))


@pytest.mark.parametrize("method", METHODS)
@given(factor=st.floats(1e-15, 1e15), offset=st.floats(-1000, 1000))
def test_any_scale_and_offset_changes_rounding_only(method, factor, offset):
    crop = torch.from_numpy(random_array((6, 7, 8))) * 250 + 2000
    shifted = crop if method == "zscore_positive" else crop + offset
    one, other = (normalise(c, everywhere(crop), method) for c in (crop, shifted * factor))
    atol = 2e-4 if method != "zscore_rank" else 2 * math.sqrt(12) / crop.numel()  # a voxel may change its bin
    torch.testing.assert_close(other[0], one[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(other[-1], one[-1], atol=atol, rtol=0)


@pytest.mark.parametrize("level", [0.0, 1e-15, -1024.0, 1e15])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_crop_stays_small_at_any_level(method, level):
    crop = torch.full((6, 7, 8), level)
    assert normalise(crop, everywhere(crop), method).abs().max() < 0.5

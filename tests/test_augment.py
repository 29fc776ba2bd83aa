"""Augmentation: what a seed gave stays what it gives, and the blur against a known one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.ndimage import gaussian_filter

from samed3d.config import DataConfig, TrainConfig, load_config
from samed3d.data.augment import augment_intensity, gaussian_blur
from samed3d.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def ramp() -> torch.Tensor:
    return torch.linspace(-100, 300, 12**3).reshape(12, 12, 12)


def drawn(seed: int, blur_probability: float = 0.0) -> torch.Tensor:
    image = ramp()
    return augment_intensity(
        image, torch.ones_like(image, dtype=torch.bool), torch.Generator().manual_seed(seed), blur_probability
    )


@pytest.mark.parametrize(
    ("seed", "mean", "deviation"),
    [(0, 127.823944, 121.019707), (1, 99.598282, 116.050240), (2, 100.0, 115.570343), (3, 140.214523, 104.603058)],
)
def test_a_seed_gives_what_it_gave_before_there_was_a_blur(seed, mean, deviation):
    """A resumed run draws the same samples."""
    image = drawn(seed)
    assert float(image.mean()) == pytest.approx(mean, abs=1e-3) and float(image.std()) == pytest.approx(
        deviation, abs=1e-3
    )


def test_the_blur_comes_when_it_is_asked_for():
    assert not torch.equal(drawn(2, 1.0), drawn(2)), "seed 2 changes nothing else"
    changed = sum(not torch.equal(drawn(seed, 0.5), drawn(seed, 1e-9)) for seed in range(60))
    assert 15 <= changed <= 45


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_the_blur_is_scipys(sigma):
    image = torch.randn(9, 14, 5, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(image.numpy(), sigma, mode="nearest", radius=max(1, -int(-3 * sigma // 1)))
    torch.testing.assert_close(gaussian_blur(image, sigma), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_the_blur_keeps_a_flat_image():
    torch.testing.assert_close(gaussian_blur(torch.full((4, 5, 6), -1000.0), 1.2), torch.full((4, 5, 6), -1000.0))


def test_a_chance_is_a_chance():
    with pytest.raises(InputError, match=r"data\.blur_probability must be from 0 to 1, got 1\.5"):
        DataConfig(blur_probability=1.5)
    with pytest.raises(InputError, match=r"data\.blur_probability must be 0 with data\.augment=flips, got 0\.2"):
        load_config(TrainConfig, None, ["data.blur_probability=0.2", "data.augment=flips"])

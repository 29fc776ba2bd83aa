"""Intensities: one image gives one mask in any unit, and voxels that hold no intensity do not set the scale."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from samed3d.inference.session import Session
from samed3d.models import load
from samed3d.prompts import Point
from samed3d.volume import Volume


def ball(dtype=np.float32):
    z, y, x = np.ogrid[:32, :36, :40]
    inside = ((z - 14) / 6) ** 2 + ((y - 18) / 8) ** 2 + ((x - 20) / 8) ** 2 <= 1
    array = np.random.default_rng(0).normal(200, 12, (32, 36, 40)) + 120 * inside
    return array.astype(dtype), inside


@functools.cache
def model():
    return load("default")


def clicked(array: np.ndarray) -> tuple[np.ndarray, Volume]:
    volume = Volume.from_array(array, spacing_mm=1.5, modality="MR")
    session = Session(volume, model(), "cpu")
    session.add(Point((20.0, 18.0, 14.0)))
    return session.mask, volume


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@functools.cache
def plain():
    return clicked(ball(np.float64)[0])[0]


@pytest.mark.parametrize(("factor", "offset"), [(1e-15, 1e4), (1e-12, 0.0), (2.0**40, 0.0), (1e15, 0.0)])
def test_the_same_mask_at_any_scale(factor, offset):
    array, inside = ball(np.float64)
    mask, volume = clicked((array + offset) * factor)
    assert not volume.notes and dice(plain(), inside) > 0.9 and dice(mask, plain()) > 0.995
    if factor == 2.0**40:  # exact: nothing is rounded
        np.testing.assert_array_equal(mask, plain())


FILLS = {
    "no data": (-3.4028235e38, 0.3),
    "mostly no data": (-3.4028235e38, 0.7),
    "netCDF": (9.96921e36, 0.3),
    "1e30": (1e30, 0.01),
    "one spike": (3e38, 0),
    "one smaller spike": (1e12, 0),
    "one negative spike": (-1e20, 0),
}


@pytest.mark.parametrize("factor", [1e-6, 1.0])
@pytest.mark.parametrize("name", FILLS)
def test_voxels_without_an_intensity_do_not_set_the_scale(name, factor):
    value, share = FILLS[name]
    array, inside = ball()
    array *= np.float32(factor)
    near = np.zeros(array.shape, bool)
    near[6:23, 8:29, 10:31] = True
    far = ~near & (np.random.default_rng(1).random(array.shape) < share)
    far[0, 0, 0] = True
    expected = np.where(far, array[~far].min(), array)
    given = np.where(far, np.float32(value), array)
    kept = given.copy()
    volume = Volume.from_array(given)
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(given, kept)
    [note] = volume.notes
    assert note.startswith(f"{far.sum()} voxels are no intensities")


ORDINARY = {
    "metal": lambda a: np.where(a > 300, a * 100, a),
    "a hot pixel": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, 65535, a),
    "mostly zero": lambda a: np.where(a > 330, a, 0),
    "masked": lambda a: np.where(a > 280, a, 1e-17),
    "a filter's answer": lambda a: np.exp(np.clip(a - 330, -80, 5)),
    "padding": lambda a: np.where(np.arange(a.size).reshape(a.shape) % 5 == 0, -32768, a),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_intensities_are_kept_as_they_are(name):
    array = ORDINARY[name](ball()[0]).astype(np.float32)
    volume = Volume.from_array(array)
    assert not volume.notes and volume.array is array

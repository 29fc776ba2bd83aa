"""Fixtures shared by all tests: tiny seeded volumes in awkward grids, and the folder of real data where there is
one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from samed3d.geometry import Grid


def rotation_matrix(degrees_xyz: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z."""
    a, b, c = np.radians(degrees_xyz)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def oblique_grid(shape_zyx: tuple[int, int, int] = (5, 6, 7), *, left_handed: bool = False) -> Grid:
    """Anisotropic, rotated about all axes, with an origin that no float holds exactly."""
    direction = rotation_matrix((10.0, -20.0, 35.0))
    if left_handed:
        direction[:, 0] *= -1.0
    return Grid(shape_zyx, (0.7, 0.8, 2.5), (-101.3, 57.7, 1.1), tuple(float(v) for v in direction.ravel()))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240)


@pytest.fixture
def tiny_image(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Random (D, H, W) intensities of any type."""

    def make(shape_zyx: tuple[int, int, int] = (5, 6, 7), dtype: str = "int16") -> np.ndarray:
        return rng.integers(0, 120, shape_zyx).astype(dtype)

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real labelled volumes: ``SAMED3D_DATA``, or ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("SAMED3D_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set SAMED3D_DATA")
    return folder


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line sets up our logger for its process; a test must not leave it so for the next."""
    logger = logging.getLogger("samed3d")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)

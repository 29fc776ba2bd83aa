"""The public names: every one of ``docs/api.md`` exists, its example runs, and importing the package stays cheap."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import samed3d
from samed3d import InputError, Session, Volume
from tests.clicked_model import ClickedModel

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text()


def test_the_page_lists_every_public_name_and_no_other():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.M)
    assert sorted(listed) == sorted(set(samed3d.__all__) - {"__version__"})
    for name in listed:
        assert inspect.getdoc(getattr(samed3d, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has Box, InputError"):
        samed3d.nothing  # noqa: B018


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert example is not None
    exec(example.group(1), {})
    shape, voxels = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert shape == "(40, 48, 56)" and 0.7 * 4189 < int(voxels) < 1.3 * 4189
    assert samed3d.read_volume("ball.nii.gz").grid.spacing_xyz_mm == pytest.approx((0.8, 0.8, 1.5))


def test_importing_the_package_loads_neither_torch_nor_simpleitk():
    code = "import sys, samed3d; sys.exit(any(name in sys.modules for name in ('torch', 'SimpleITK', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_volume_from_an_array_lies_where_its_affine_says():
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6))
    volume = Volume.from_array(array, spacing_mm=(1.0, 2.0, 3.0), modality="MR")
    np.testing.assert_array_equal(volume.grid.affine_ras, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert volume.grid.shape_zyx == (4, 5, 6) and volume.modality == "MR" and volume.array is array
    assert Volume.from_array(array, spacing_mm=2).grid.spacing_xyz_mm == (2.0, 2.0, 2.0)
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.array([[2 * c, -s, 0, 5], [2 * s, c, 0, -6], [0, 0, -1.5, 7], [0, 0, 0, 1.0]])
    turned = Volume.from_array(array.astype(np.float64), affine_ras=affine)
    np.testing.assert_allclose(turned.grid.affine_ras, affine, atol=1e-12)
    assert turned.array.dtype == np.float32 and turned.grid.spacing_xyz_mm == pytest.approx((2, 1, 1.5))
    assert Session(Volume.from_array(array > 50), ClickedModel()).volume.array.dtype == np.uint8


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((3, 3)), {}, "array must be numbers .D, H, W., got float64 of shape .3, 3."),
        (np.array([[["a", "b"]]]), {}, "array must be numbers"),
        (np.zeros((3, 3, 3)), {}, "image is constant"),
        (np.full((3, 3, 3), np.nan), {}, "image holds 27 NaN or infinite voxels"),
        (np.eye(9).reshape(3, 3, 9), {"spacing_mm": (1, 0, 1)}, "spacing must be > 0 on each axis"),
        (np.eye(9).reshape(3, 3, 9), {"spacing_mm": (1, 1)}, "spacing_mm must be one number or three"),
        (np.eye(9).reshape(3, 3, 9), {"affine_ras": np.eye(3)}, "affine_ras must be a finite 4x4 matrix"),
        (
            np.eye(9).reshape(3, 3, 9),
            {"affine_ras": np.eye(4) + np.eye(4, k=1)},
            "axes must be perpendicular, got 45.0 degrees of shear: affine_ras",
        ),
        (np.eye(9).reshape(3, 3, 9), {"spacing_mm": 1, "affine_ras": np.eye(4)}, "give spacing_mm or affine_ras, not"),
    ],
)
def test_arrays_that_are_no_volume(array, options, message):
    with pytest.raises(InputError, match=message):
        Volume.from_array(array, **options)

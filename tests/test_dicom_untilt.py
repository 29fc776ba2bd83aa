"""Tilted and unevenly spaced DICOM slices: refused, or resampled by position, with the mask back on the slices."""

from __future__ import annotations

import numpy as np
import pytest
from dicom_kinds import ORIGIN, SPACING, image, setting, stack

from samed3d.errors import InputError
from samed3d.inference.mask_files import export_segments
from samed3d.prompts import PackedMask
from samed3d.volume import read_volume
from samed3d.volume.writing import Segment


def ramp(z, y, x):
    """A linear function of position: linear interpolation keeps it."""
    return 40 * z + 7 * y + 11 * x


UNEVEN = {
    "tilted": (np.arange(8) * 2.0, (0.0, 0.3), "gantry tilt of 8.5 degrees"),
    "tilted both ways": (np.arange(8) * 2.0, (-0.2, 0.35), "gantry tilt of"),
    "one missing": (np.delete(np.arange(9), 4) * 2.0, (0.0, 0.0), "2 to 4 mm apart (most between im003.dcm and im004"),
    "three missing": (np.delete(np.arange(11), [4, 5, 6]) * 2.0, (0.0, 0.0), "2 to 8 mm apart"),
    "unequal": (np.array([0, 2, 4, 6, 8.5, 11, 13.5, 16]), (0.0, 0.0), "2 to 2.5 mm apart"),
}


@pytest.mark.parametrize(("positions", "shear", "message"), UNEVEN.values(), ids=list(UNEVEN))
def test_tilted_and_uneven_slices_are_refused_or_resampled(tmp_path, positions, shear, message):
    z = positions[:, None, None]
    y = np.arange(20)[None, :, None] * SPACING[1] + (np.arange(8) * shear[1])[:, None, None]
    x = np.arange(24)[None, None] * SPACING[0] + (np.arange(8) * shear[0])[:, None, None]
    array = np.rint(10 * ramp(z, y, x)).astype(np.int16)
    stack(tmp_path / "s", array, positions=positions, shear=shear)
    with pytest.raises(InputError) as refused:
        read_volume(tmp_path / "s")
    assert message in str(refused.value) and "--untilt" in str(refused.value)
    volume = read_volume(tmp_path / "s", untilt=True)
    assert "resampled by position" in volume.notes[0] and message in volume.notes[0]
    k, j, i = np.indices(volume.grid.shape_zyx)
    origin = np.array(volume.grid.origin_lps_mm) - ORIGIN
    dx, dy, dz = volume.grid.spacing_xyz_mm
    expected = 10 * ramp(origin[2] + k * dz, origin[1] + j * dy, origin[0] + i * dx)
    middle = np.abs(volume.array - expected)[:, 5:-5, 5:-5]
    assert middle.max() < 2
    back = volume.layout.on_slices(volume.array)
    assert back.shape == array.shape
    assert np.abs(back - array)[:, 5:-5, 5:-5].max() < 10 * (40 * dz / 2 + 7 * dy / 2 + 11 * dx / 2)


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (0.01, False), (0.04, True)])
def test_small_deviations_are_read_and_large_ones_of_them_told(tmp_path, shift, noted):
    positions = np.arange(8) * 2.0
    positions[4] += 2 * shift
    volume = read_volume(stack(tmp_path / "s", positions=positions))
    np.testing.assert_array_equal(volume.array, image())
    assert bool(volume.notes) == noted and not volume.layout.resampled


def test_inverted_grey_is_told(tmp_path):
    volume = read_volume(stack(tmp_path / "s", change=setting(PhotometricInterpretation="MONOCHROME1")))
    assert "MONOCHROME1" in volume.notes[0]


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
@pytest.mark.parametrize(
    ("positions", "shear"), [(np.arange(8) * 2.0, (0.2, 0.5)), (np.delete(np.arange(9), 4) * 2.0, (0.0, 0.0))]
)
def test_the_mask_of_resampled_slices_comes_back_on_the_original_ones(tmp_path, kind, positions, shear):
    pytest.importorskip("highdicom", reason="writing DICOM-SEG needs highdicom")
    from pydicom import dcmread

    stack(tmp_path / "s", image((8, 20, 24)), positions=positions, shear=shear)
    volume = read_volume(tmp_path / "s", untilt=True)
    k, j, i = np.indices(volume.grid.shape_zyx)
    ball = ((k - 3.5) / 3) ** 2 + ((j - 12) / 5) ** 2 + ((i - 12) / 6) ** 2 <= 1
    segments = [Segment(1, "ball", "#ff0000", PackedMask.of(ball))]
    export_segments(tmp_path / "out.dcm", kind, segments, volume, None)
    expected, found = volume.layout.on_slices(ball), np.zeros((8, 20, 24), bool)
    number = {dcmread(s.file).SOPInstanceUID: n for n, s in enumerate(volume.layout.slices)}
    data = dcmread(tmp_path / "out.dcm")
    if kind == "dicom-seg":
        for frame, pixels in zip(data.PerFrameFunctionalGroupsSequence, np.atleast_3d(data.pixel_array), strict=True):
            n = number[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
            origin = volume.layout.slices[n].origin_lps_mm
            np.testing.assert_allclose(frame.PlanePositionSequence[0].ImagePositionPatient, origin, atol=1e-4)
            found[n] = pixels
        np.testing.assert_array_equal(found, expected)
    else:
        for contour in data.ROIContourSequence[0].ContourSequence:
            n = number[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            relative = np.reshape(contour.ContourData, (-1, 3)).astype(float) - volume.layout.slices[n].origin_lps_mm
            j, i = np.nonzero(expected[n])
            assert np.abs(relative[:, 2]).max() < 1e-4
            for axis, index in ((0, i), (1, j)):
                ends = relative[:, axis].min() / SPACING[axis], relative[:, axis].max() / SPACING[axis]
                assert ends == pytest.approx((index.min() - 0.5, index.max() + 0.5), abs=1e-3)

"""Images that cannot be used: each is refused with one clear line, and nothing else is printed."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_volume import itk_image, nifti, patched

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import Volume, read_volume


def cut(path: Path, keep: float = 0.6, end: bytes = b"") -> Path:
    """Keep a share of the file, or leave out some bytes of its end; then put others there."""
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep < 0 else len(data) * keep)] + end)
    return path


def bad_missing(folder, array):
    return folder / "none.nii.gz"


def bad_suffix(folder, array):
    (folder / "picture.png").write_bytes(b"x")
    return folder / "picture.png"


def bad_text(folder, array):
    (folder / "text.nii").write_text("hello")
    return folder / "text.nii"


def bad_text_mha(folder, array):
    (folder / "text.mha").write_text("hello")
    return folder / "text.mha"


def bad_not_gzip(folder, array):
    (folder / "zip.nii.gz").write_bytes(b"PK\3\4" + bytes(600))
    return folder / "zip.nii.gz"


def bad_loop(folder, array):
    (folder / "loop.nii").symlink_to("loop.nii")
    return folder / "loop.nii"


def bad_pipe(folder, array):
    os.mkfifo(folder / "pipe.nii")
    return folder / "pipe.nii"


def bad_name(folder, array):
    return folder / ("n" * 300 + ".nii")


def bad_zlib_mha(folder, array):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.arange(8000).reshape(20, 20, 20)), folder / "sum.mha", useCompression=True
    )
    return cut(folder / "sum.mha", -4, b"abcd")


def bad_matrix_mha(folder, array):
    sitk.WriteImage(sitk.GetImageFromArray(array), folder / "flat.mha")
    text = (folder / "flat.mha").read_bytes()
    (folder / "flat.mha").write_bytes(text.replace(b"TransformMatrix = 1 0 0", b"TransformMatrix = 0 0 0"))
    return folder / "flat.mha"


def bad_type(folder, array):
    return array


def bad_cut_nii(folder, array):
    return cut(nifti(folder / "cut.nii", array))


def bad_cut_gz(folder, array):
    return cut(nifti(folder / "cut.nii.gz", array))


def bad_checksum(folder, array):
    path = nifti(folder / "sum.nii.gz", array)
    return patched(path, len(path.read_bytes()) - 8, "<I", 12345)


def bad_short_gz(folder, array):
    path = nifti(folder / "whole.nii", array)
    (folder / "short.nii.gz").write_bytes(gzip.compress(path.read_bytes()[:-10]))
    return folder / "short.nii.gz"


def bad_cut_mha(folder, array):
    sitk.WriteImage(itk_image(array, Grid(array.shape)), str(folder / "cut.mha"))
    return cut(folder / "cut.mha", 0.9)


def bad_cut_nrrd(folder, array):
    sitk.WriteImage(itk_image(array, Grid(array.shape)), str(folder / "cut.nrrd"))
    return cut(folder / "cut.nrrd", 0.9)


def bad_2d(folder, array):
    return nifti_2d(folder / "flat.nii", array[0])


def nifti_2d(path, plane):
    sitk.WriteImage(sitk.GetImageFromArray(plane), str(path))
    return path


def bad_slice(folder, array):
    return nifti(folder / "slice.nii", array[:1])


def bad_4d(folder, array):
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(array)] * 3), str(folder / "4d.nii"))
    return folder / "4d.nii"


def bad_rgb(folder, array):
    sitk.WriteImage(itk_image(np.stack([array] * 3, -1), Grid(array.shape), vector=True), str(folder / "rgb.mha"))
    return folder / "rgb.mha"


def bad_nan(folder, array, name="nan.nii.gz"):
    array = array.astype(np.float32)
    array[0, 0, :2] = np.nan
    array[1, 1, 1] = np.inf
    return nifti(folder / name, array)


def bad_nan_nrrd(folder, array):
    return bad_nan(folder, array, "nan.nrrd")


def bad_constant(folder, array):
    return nifti(folder / "const.nii.gz", np.full_like(array, 3))


def bad_zero_spacing(folder, array):
    return patched(nifti(folder / "zero.nii", array), 80, "<f", 0.0)


def bad_negative_spacing(folder, array):
    return patched(nifti(folder / "negative.nii", array), 84, "<f", -1.0)


def bad_zero_spacing_mha(folder, array):
    path = folder / "zero.mha"
    sitk.WriteImage(itk_image(array, Grid(array.shape)), str(path))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1"))
    return path


def bad_dicom_folder(folder, array):
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("x")
    return folder / "empty"


BAD = [
    (bad_missing, "image does not exist: .*none.nii.gz"),
    (bad_suffix, r"must be a folder of DICOM slices or end in one of \.nii\.gz .*picture.png"),
    (bad_text, "not an image, or its header is damaged: .*text.nii"),
    (bad_text_mha, "not an image, or its header is damaged: .*text.mha"),
    (bad_not_gzip, "not an image, or its header is damaged: .*zip.nii.gz"),
    (bad_loop, "cannot read image .*loop.nii: Too many levels of symbolic links"),
    (bad_pipe, "image must be a file or a folder, got a pipe or device: .*pipe.nii"),
    (bad_name, "cannot read image .*n.nii: File name too long"),
    (bad_type, "image must be a path, got ndarray"),
    (bad_zlib_mha, r"truncated or damaged: .*sum.mha \(Uncompress failed\)"),
    (bad_matrix_mha, r"truncated or damaged: .*flat.mha \(Bad direction, determinant is 0"),
    (bad_cut_nii, r"truncated or damaged: .*cut.nii \(\d+ of 772 bytes\)"),
    (bad_cut_gz, "truncated or damaged: .*cut.nii.gz .*end-of-stream"),
    (bad_checksum, "truncated or damaged: .*sum.nii.gz .*CRC check failed"),
    (bad_short_gz, r"truncated or damaged: .*short.nii.gz \(762 of 772 bytes\)"),
    (bad_cut_mha, "truncated or damaged: .*cut.mha .*data not read completely"),
    (bad_cut_nrrd, "truncated or damaged: .*cut.nrrd .*of expected"),
    (bad_2d, r"image must be 3D, got 2D \(7 x 6\)"),
    (bad_slice, r"image must be 3D, got a single slice \(7 x 6 x 1\)"),
    (bad_4d, r"has 3 volumes \(4D\), one is needed: pick one with --channel N \(0 to 2\)"),
    (bad_rgb, r"has 3 channels, one is needed: pick one with --channel N \(0 to 2\)"),
    (bad_nan, "image holds 3 NaN or infinite voxels of 210"),
    (bad_nan_nrrd, "image holds 3 NaN or infinite voxels of 210"),
    (bad_constant, "image is constant, every voxel is 3"),
    (bad_zero_spacing, "spacing must be > 0 on each axis, got 0 x 1 x 1 mm"),
    (bad_negative_spacing, "spacing must be > 0 on each axis, got 1 x -1 x 1 mm"),
    (bad_zero_spacing_mha, "spacing must be > 0 on each axis, got 0 x 1 x 1 mm"),
    (bad_dicom_folder, "no DICOM series in folder: .*empty; give the folder that holds the slices"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_bad_input_is_one_clear_line(tmp_path, tiny_image, capfd, make, message):
    path = make(tmp_path, tiny_image())
    capfd.readouterr()
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("stored", "named"), [("a.nii", "b.nii.gz"), ("a.nii.gz", "b.nii")])
def test_a_nifti_file_is_gzip_by_its_bytes_not_by_its_name(tmp_path, tiny_image, stored, named):
    expected = tiny_image()
    found = read_volume(nifti(tmp_path / stored, expected).rename(tmp_path / named))
    np.testing.assert_array_equal(found.array, expected)


ARRAYS = [
    ([[1], [2, 3]], {}, "array and spacing_mm must be numbers"),
    (np.zeros((0, 3, 3)), {}, r"array must be numbers \(D, H, W\), got float64 of shape \(0, 3, 3\)"),
    (np.ones((2, 2, 2)), {"spacing_mm": "wide"}, "array and spacing_mm must be numbers"),
    (np.ones((2, 2, 2)), {"affine_ras": "none"}, "affine_ras must be a 4x4 matrix of numbers"),
    (np.ones((2, 2, 2)), {"affine_ras": np.ones((4, 4))}, "affine_ras must be a finite 4x4 matrix"),
]


@pytest.mark.parametrize(("array", "given", "message"), ARRAYS)
def test_arrays_that_are_no_volume(array, given, message):
    with pytest.raises(InputError, match=message):
        Volume.from_array(array, **given)


@pytest.mark.parametrize("channel", [3, -1])
def test_channel_out_of_range(tmp_path, tiny_image, channel):
    with pytest.raises(InputError, match=f"--channel must be 0 to 2, got {channel}"):
        read_volume(bad_4d(tmp_path, tiny_image()), channel=channel)
    with pytest.raises(InputError, match=f"--channel must be 0 for an image of one channel, got {channel}"):
        read_volume(nifti(tmp_path / "one.nii", tiny_image()), channel=channel)


def test_series_of_a_file_is_refused(tmp_path, tiny_image):
    with pytest.raises(InputError, match="--series picks from a DICOM folder, got a file"):
        read_volume(nifti(tmp_path / "one.nii", tiny_image()), series="1")

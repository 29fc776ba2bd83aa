"""Reading and writing: every format gives the same array and grid, masks keep the grid bit for bit, a full disk leaves
nothing behind."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_grid

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import SUFFIXES, read_volume, write_mask, write_volume

SHAPE = (5, 6, 7)


def itk_image(array: np.ndarray, grid: Grid, *, vector: bool = False) -> sitk.Image:
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing(grid.spacing_xyz_mm)
    image.SetOrigin(grid.origin_lps_mm)
    image.SetDirection(grid.direction_lps)
    return image


def geometry(path: Path) -> tuple:
    image = sitk.ReadImage(str(path))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def nifti(path: Path, array: np.ndarray, grid: Grid | None = None) -> Path:
    sitk.WriteImage(itk_image(array, grid or Grid(array.shape)), str(path))
    return path


def patched(path: Path, offset: int, layout: str, *values: float) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_reads_what_itk_wrote(tmp_path, tiny_image, suffix, dtype):
    array, grid = tiny_image(SHAPE, dtype), oblique_grid(SHAPE, left_handed=True)
    path = tmp_path / f"image{suffix}"
    sitk.WriteImage(itk_image(array, grid), str(path))
    volume = read_volume(path)
    assert volume.array.dtype == array.dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.grid.affine_ras, grid.affine_ras, atol=1e-5)
    assert volume.view.shape_zyx == volume.view.to_canonical(volume.array).shape
    assert volume.source == str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("left_handed", [False, True])
def test_mask_has_the_images_geometry_bit_for_bit(tmp_path, tiny_image, suffix, left_handed):
    image = tmp_path / f"image{suffix}"
    sitk.WriteImage(itk_image(tiny_image(), oblique_grid(left_handed=left_handed)), str(image))
    volume = read_volume(image)
    mask = volume.array > 60
    write_mask(tmp_path / f"mask{suffix}", mask, volume.grid)
    assert geometry(tmp_path / f"mask{suffix}") == geometry(image)
    back = sitk.ReadImage(str(tmp_path / f"mask{suffix}"))
    assert back.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), mask)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_any_direction_survives(tmp_path, tiny_image, suffix, seed):
    from conftest import rotation_matrix

    rng = np.random.default_rng(seed)
    direction = rotation_matrix(tuple(rng.uniform(-180, 180, 3)))
    grid = Grid(SHAPE, tuple(rng.uniform(0.2, 6, 3)), tuple(rng.uniform(-300, 300, 3)), tuple(direction.ravel()))
    image, mask = tmp_path / f"image{suffix}", tmp_path / f"mask{suffix}"
    sitk.WriteImage(itk_image(tiny_image(), grid), str(image))
    volume = read_volume(image)
    write_mask(mask, volume.array > 60, volume.grid)
    assert geometry(mask) == geometry(image)


def test_metaimage_keeps_the_grid_of_any_other_format(tmp_path, tiny_image):
    image = nifti(tmp_path / "image.nii", tiny_image(), oblique_grid())
    write_mask(tmp_path / "mask.mha", tiny_image() > 60, read_volume(image).grid)
    assert geometry(tmp_path / "mask.mha") == geometry(image)


def test_real_images_and_masks_agree(tmp_path, data_dir):
    for name in ("sts_mr_t1", "prostate_mr_deepreg", "msd_hippocampus", "sunnybrook_cardiac_mr", "sct_gray_matter_mr"):
        image = sorted((data_dir / name / "imagesTr").glob("*.nii.gz"))[0]
        volume = read_volume(image)
        write_mask(tmp_path / "mask.nii.gz", volume.array > volume.array.mean(), volume.grid)
        assert geometry(tmp_path / "mask.nii.gz") == geometry(image)


def test_scaling_is_applied_and_doubles_are_halved(tmp_path, tiny_image):
    array = tiny_image()
    path = patched(nifti(tmp_path / "scaled.nii", array), 112, "<2f", 2.0, -1024.0)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, array * 2.0 - 1024.0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_nifti_type_in_both_byte_orders(tmp_path, tiny_image, order, kind):
    array = tiny_image().astype(order + kind)
    code = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
    header = bytearray(352)
    for layout, offset, values in (
        ("i", 0, [348]),
        ("8h", 40, [3, *array.shape[::-1], 1, 1, 1, 1]),
        ("2h", 70, [code[kind], 8 * array.itemsize]),
        ("8f", 76, [1] * 8),
        ("3f", 108, [352, 0, 7]),  # a slope of 0 means no scaling, whatever the intercept
    ):
        struct.pack_into(order + layout, header, offset, *values)
    header[344:347] = b"n+1"
    (tmp_path / "a.nii").write_bytes(header + array.tobytes())
    found = read_volume(tmp_path / "a.nii").array
    assert found.dtype == ("f4" if kind == "f8" else kind) and found.dtype.isnative and found.flags.writeable
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint32", "int32", "float32", "float64"])
def test_write_volume_keeps_values(tmp_path, tiny_image, suffix, dtype):
    array = tiny_image(SHAPE, dtype)
    write_volume(tmp_path / f"out{suffix}", array, oblique_grid(SHAPE))
    back = read_volume(tmp_path / f"out{suffix}").array
    assert back.dtype == ("float32" if dtype == "float64" else dtype)
    np.testing.assert_array_equal(back, array)


def test_label_map_with_many_ids_is_uint16(tmp_path):
    labels = np.zeros(SHAPE, np.int64)
    labels[2, 3, 4] = 300
    write_mask(tmp_path / "labels.nii.gz", labels, Grid(SHAPE))
    assert read_volume(tmp_path / "labels.nii.gz").array[2, 3, 4] == 300


def test_transposed_and_flipped_arrays_are_written_in_order(tmp_path):
    mask = np.zeros((7, 6, 5), bool)
    mask[1, 2, 3] = True
    write_mask(tmp_path / "m.mha", mask.transpose(2, 1, 0)[::-1], Grid((5, 6, 7)))
    assert np.argwhere(read_volume(tmp_path / "m.mha").array).tolist() == [[1, 2, 1]]


def test_channels_of_vector_and_4d_images(tmp_path, rng):
    grid = oblique_grid(SHAPE)
    colours = rng.integers(0, 99, (*SHAPE, 3)).astype(np.uint8)
    sitk.WriteImage(itk_image(colours, grid, vector=True), str(tmp_path / "rgb.nrrd"))
    np.testing.assert_array_equal(read_volume(tmp_path / "rgb.nrrd", channel=2).array, colours[..., 2])
    frames = [itk_image(rng.integers(0, 99, SHAPE).astype(np.int16), grid) for _ in range(4)]
    sitk.WriteImage(sitk.JoinSeries(frames), str(tmp_path / "4d.nii.gz"))
    volume = read_volume(tmp_path / "4d.nii.gz", channel=1)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(frames[1]))
    np.testing.assert_allclose(volume.grid.affine_ras, grid.affine_ras, atol=1e-5)


def test_nan_in_another_volume_does_no_harm(tmp_path, rng):
    frames = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    frames[1, 2, 3, 4] = np.nan
    path = tmp_path / "4d.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(f) for f in frames]), str(path))
    np.testing.assert_array_equal(read_volume(path, channel=2).array, frames[2])
    with pytest.raises(InputError, match="image holds 1 NaN or infinite voxels of 210"):
        read_volume(path, channel=1)


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_skew_by_rounding_is_kept_exactly_and_a_shear_refused(tmp_path, tiny_image, suffix):
    path = tmp_path / f"skew{suffix}"
    for skew in (0.004, 0.3):
        affine = np.array([[-1, skew, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        if suffix == ".nii":
            patched(patched(nifti(path, tiny_image()), 252, "<2h", 0, 1), 280, "<12f", *affine[:3].ravel())
        else:
            columns = np.linalg.norm(affine[:3, :3], axis=0)
            direction = np.diag([-1, -1, 1]) @ affine[:3, :3] / columns
            nifti(path, tiny_image(), Grid(SHAPE, tuple(columns), direction_lps=tuple(direction.ravel())))
        if skew == 0.004:
            np.testing.assert_allclose(read_volume(path).grid.affine_ras, affine, atol=1e-5)
    with pytest.raises(InputError, match=r"perpendicular, got 16\.\d degrees of shear: .*; resample"):
        read_volume(path)


# ---- DICOM
# ---


def dicom_series(folder: Path, array: np.ndarray, uid: str, name: str, *, positions: list[float] | None = None) -> None:
    """A CT series of axial slices, 0.5 x 0.75 mm in plane, 3 mm apart, from (10, 20, -30) mm LPS; stored as value +
    1000."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    folder.mkdir(exist_ok=True)
    for number, plane in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{uid}.{number + 1}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = folder / f"{name}-{len(array) - number:03d}.dcm"
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Modality, data.SeriesInstanceUID, data.SeriesDescription = "CT", uid, name
        data.StudyInstanceUID, data.FrameOfReferenceUID, data.InstanceNumber = "1.2.9", "1.2.8", number + 1
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing, data.SliceThickness = [0.75, 0.5], 3.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [10, 20, positions[number] if positions else -30 + 3 * number]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleIntercept, data.RescaleSlope = -1000, 1
        data.PixelData = (plane + 1000).astype("<u2").tobytes()
        data.save_as(path, enforce_file_format=True)


def test_dicom_folder(tmp_path, tiny_image):
    array = tiny_image((4, 6, 7))
    dicom_series(tmp_path / "ct", array, "1.2.3", "Thorax")
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.grid == Grid((4, 6, 7), (0.5, 0.75, 3.0), (10.0, 20.0, -30.0))
    assert volume.modality == "CT" and read_volume(tmp_path / "ct", modality="PT").modality == "PT"


def test_dicom_folder_with_two_series_lists_them(tmp_path, tiny_image):
    first, second = tiny_image((4, 6, 7)), tiny_image((3, 6, 7))
    dicom_series(tmp_path / "ct", first, "1.2.3", "Thorax")
    dicom_series(tmp_path / "ct", second, "1.2.4", "Scout")
    listed = r"1 = 'Thorax', 4 slices, UID 1\.2\.3; 2 = 'Scout', 3 slices"
    with pytest.raises(InputError, match=f"2 series, pick one with --series N or UID.*{listed}"):
        read_volume(tmp_path / "ct")
    for asked in ("1.2.4", "2", 2):
        np.testing.assert_array_equal(read_volume(tmp_path / "ct", series=asked).array, second)
    with pytest.raises(InputError, match="--series must be a number or UID.*got '3'"):
        read_volume(tmp_path / "ct", series=3)


def test_dicom_slices_in_one_place_and_gaps(tmp_path, tiny_image):
    dicom_series(tmp_path / "phases", tiny_image((4, 6, 7)), "1.2.3", "Phases", positions=[0, 3, 3, 6])
    with pytest.raises(InputError, match="several slices at one position"):
        read_volume(tmp_path / "phases")
    dicom_series(tmp_path / "gap", tiny_image((4, 6, 7)), "1.2.3", "Gap", positions=[0, 3, 6, 12])
    with pytest.raises(InputError, match=r"3 to 6 mm apart.*Gap-002.dcm and Gap-001.dcm.*--untilt"):
        read_volume(tmp_path / "gap")


# ---- output
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, rng, capfd, suffix):
    noise = rng.integers(0, 255, (40, 50, 60), dtype=np.uint8)
    path = tmp_path / f"mask{suffix}"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*mask(\.\w+)+: .+"):
            write_volume(path, noise, Grid(noise.shape))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"
    assert capfd.readouterr() == ("", "")


def test_wrong_shape_and_type_are_our_fault(tmp_path):
    with pytest.raises(ValueError, match=r"grid's shape \(2, 2, 2\), got \(2, 2, 3\)"):
        write_volume(tmp_path / "a.nii", np.zeros((2, 2, 3)), Grid((2, 2, 2)))
    with pytest.raises(ValueError, match="bool or integer type, got float64"):
        write_mask(tmp_path / "a.nii", np.zeros((2, 2, 2)), Grid((2, 2, 2)))


def test_importing_reads_no_itk_and_no_torch():
    code = "import sys, samed3d.volume; print([m for m in ('SimpleITK', 'torch', 'pydicom') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

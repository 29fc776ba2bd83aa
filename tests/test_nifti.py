"""NIfTI headers: which matrix places the image, what is refused, and masks that repeat the whole geometry."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from samed3d.errors import InputError
from samed3d.geometry import Region
from samed3d.volume import read_volume, write_mask, write_volume
from samed3d.volume.files import ReadLimits, check_untrusted, count_volumes

SIZE = (7, 6, 5)
SIZES = (0.8, 0.8, 2.0)
AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.8, 0, 50], [0, 0, 2, 10], [0, 0, 0, 1.0]])
MOVED = AFFINE + [[0, 0, 0, 10], [0, 0, 0, -5], [0, 0, 0, 3], [0, 0, 0, 0]]
MIRRORED = AFFINE @ np.diag([-1, 1, 1, 1.0])
SHEARED = AFFINE + [[0, 0, 0, 0], [0, 0, 0.2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
UNIT = np.diag([-1, -1, 1, 1.0])
TURN = (0.0, 0.0, 1.0)  # the quaternion of AFFINE: half a turn around z
# Offsets of what a test sets: NIfTI-1 and NIfTI-2.
FIELDS = {
    "dim": ("8h", 40, "8q", 16),
    "datatype": ("2h", 70, "2h", 12),
    "pixdim": ("8f", 76, "8d", 104),
    "vox_offset": ("f", 108, "q", 168),
    "scale": ("2f", 112, "2d", 176),
    "units": ("B", 123, "i", 500),
    "codes": ("2h", 252, "2i", 344),
    "quatern": ("3f", 256, "3d", 352),
    "qoffset": ("3f", 268, "3d", 376),
    "srow": ("12f", 280, "12d", 400),
}
GEOMETRY = ("pixdim", "units", "codes", "quatern", "qoffset", "srow")


def voxels(dtype="i2", volumes=1):
    return np.random.default_rng(1).integers(0, 100, (volumes, *SIZE[::-1])).astype(dtype)


def nifti(path: Path, *, version=1, order="<", array=None, sform=AFFINE, offset=AFFINE[:3, 3], **given) -> Path:
    """A NIfTI file from its fields; ``given`` replaces the usual values of ``FIELDS``."""
    array = voxels() if array is None else array
    code = {"i2": 4, "u2": 512, "f4": 16, "f8": 64, "i8": 1024, "c8": 32, "i1": 256}[array.dtype.str[1:]]
    length = 348 if version == 1 else 540
    values = {
        "dim": (4 if len(array) > 1 else 3, *SIZE, len(array), 1, 1, 1),
        "datatype": (code, 8 * array.itemsize),
        "pixdim": (1.0, *SIZES, 2.5, 0, 0, 0),
        "vox_offset": (length + 4,),
        "scale": (0.0, 0.0),
        "units": (10,),
        "codes": (1, 1),
        "quatern": TURN,
        "qoffset": offset,
        "srow": np.asarray(sform)[:3].ravel(),
        **given,
    }
    header = bytearray(length + 4)
    struct.pack_into(f"{order}i", header, 0, length)
    magic, at = (b"n+1\0", 344) if version == 1 else (b"n+2\0\r\n\x1a\n", 4)
    header[at : at + len(magic)] = magic
    for name, value in values.items():
        layout, position = FIELDS[name][2 * version - 2 : 2 * version]
        struct.pack_into(order + layout, header, position, *value)
    data = bytes(header) + array.astype(array.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def geometry(path: Path, order="<") -> dict[str, tuple]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    version = 1 if struct.unpack_from(f"{order}i", data)[0] == 348 else 2
    columns = {name: FIELDS[name][2 * version - 2 : 2 * version] for name in GEOMETRY}
    # As bytes in one order: NaN is not equal to itself.
    return {
        n: struct.pack(f"<{kind}", *struct.unpack_from(order + kind, data, at)) for n, (kind, at) in columns.items()
    }


APART = "sform and qform place the image up to .* mm apart; the sform is used"
PLACES = {  # fields, the affine in mm that counts, a note
    "both agree": ({}, AFFINE, ""),
    "sform alone": ({"codes": (0, 2), "sform": MOVED}, MOVED, ""),
    "qform alone": ({"codes": (1, 0), "sform": MOVED}, AFFINE, ""),
    "neither": ({"codes": (0, 0), "sform": MOVED}, np.diag([-0.8, -0.8, 2, 1]), "states no orientation"),
    "sform elsewhere": ({"codes": (1, 4), "sform": MOVED}, MOVED, APART),
    "sform mirrored": ({"codes": (1, 2), "sform": MIRRORED}, MIRRORED, APART),
    "qform of a template": ({"codes": (4, 1), "sform": MOVED}, MOVED, APART),
    "sform a tenth of a voxel off": ({"sform": AFFINE + np.outer([0.08, 0, 0, 0], [0, 0, 0, 1])}, None, ""),
    "sform without scale": ({"codes": (1, 2), "sform": UNIT}, AFFINE, "sform holds no voxel sizes .* the qform places"),
    "sform without scale alone": (
        {"codes": (0, 2), "sform": UNIT},
        np.diag([-0.8, -0.8, 2, 1]),
        "sform holds no voxel sizes .*; the voxel sizes are those of pixdim",
    ),
    "pixdim of 1": ({"codes": (0, 1), "pixdim": (1, 1, 1, 1, 0, 0, 0, 0)}, AFFINE, r"0.8 x 0.8 x 2 mm by the sform"),
    "sform sheared": ({"sform": SHEARED}, AFFINE, r"sform is sheared by 5\.7 degrees; the qform places"),
    "sform singular": ({"sform": AFFINE[:, [0, 0, 2, 3]]}, AFFINE, "sform is sheared by 90.0 degrees; the qform"),
    "sform of zeros": ({"sform": np.zeros((4, 4))}, AFFINE, "sform has an axis without length; the qform places"),
    "sform nan": ({"sform": AFFINE * np.nan}, AFFINE, "sform holds numbers that are not finite"),
    "qform no rotation": ({"quatern": (1.0, 1.0, 0.5)}, AFFINE, ""),
    "qform nan": ({"quatern": (np.nan, 0, 0)}, AFFINE, ""),
    "quaternion a hair too long": ({"codes": (1, 0), "quatern": (0, 0, 1.0000002)}, AFFINE, ""),
    "left-handed": ({"codes": (1, 0), "pixdim": (-1, *SIZES, 0, 0, 0, 0)}, AFFINE @ np.diag([1, 1, -1, 1]), ""),
    "qfac of 0": ({"codes": (1, 0), "pixdim": (0, *SIZES, 0, 0, 0, 0)}, AFFINE, ""),
    "skewed by rounding": ({"sform": AFFINE + np.outer([0.004, 0, 0, 0], [0, 1, 0, 0])}, None, ""),
    "microns": ({"units": (3,)}, np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE, ""),
    "metres": ({"units": (1,)}, np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE, ""),
    "unknown unit": ({"units": (0,)}, AFFINE, ""),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", PLACES)
def test_the_image_is_placed_and_the_mask_repeats_the_header(tmp_path, name, version):
    given, affine, note = PLACES[name]
    order = ">" if name in ("both agree", "sform elsewhere", "microns") else "<"
    image = nifti(tmp_path / "image.nii.gz", version=version, order=order, **given)
    volume = read_volume(image)
    np.testing.assert_array_equal(volume.array, voxels()[0])
    wanted = given["sform"] if affine is None else affine
    np.testing.assert_allclose(volume.grid.affine_ras, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    assert len(volume.notes) == bool(note) and re.search(note, " ".join(volume.notes))
    write_mask(tmp_path / "mask.nii", volume.array > 50, volume.grid)
    assert geometry(tmp_path / "mask.nii") == geometry(image, order)
    again = read_volume(tmp_path / "mask.nii")
    assert again.grid == volume.grid and again.array.dtype == np.uint8
    np.testing.assert_array_equal(again.array, volume.array > 50)


SPATIAL = (3, *SIZE, 1, 1, 1, 1)
REFUSED = {
    "sheared": (
        {"codes": (0, 1), "sform": SHEARED},
        r"perpendicular, got 5\.7 degrees of shear: sform of .*image.nii; res",
    ),
    "both unusable": ({"sform": SHEARED, "quatern": (1, 1, 1)}, "perpendicular, got 5.7 degrees of shear: sform of"),
    "sform nan": (
        {"codes": (0, 1), "sform": AFFINE * np.nan},
        "sform of .* must be a finite 4x4 matrix with axes of some",
    ),
    "sform zero": ({"codes": (0, 1), "sform": AFFINE * 0}, "sform of .* must be a finite 4x4 matrix with axes of some"),
    "no rotation": ({"codes": (1, 0), "quatern": (1, 1, 0)}, "qform of .* must be a finite 4x4 matrix"),
    "qoffset infinite": ({"codes": (1, 0), "offset": (np.inf, 0, 0)}, "qform of .* must be a finite 4x4 matrix"),
    "pixdim zero": ({"pixdim": (1, 0, 1, 1, 0, 0, 0, 0)}, "spacing must be > 0 on each axis, got 0 x 1 x 1 mm"),
    "pixdim negative": ({"pixdim": (1, 1, 1, -1, 0, 0, 0, 0)}, "spacing must be > 0 on each axis, got 1 x 1 x -1 mm"),
    "pixdim nan": ({"pixdim": (1, 1, np.nan, 1, 0, 0, 0, 0)}, "spacing must be > 0 on each axis, got 1 x nan x 1 mm"),
    "dim[0] of 0": ({"dim": (0, *SPATIAL[1:])}, "its header is damaged"),
    "dim[0] of 9": ({"dim": (9, *SPATIAL[1:])}, "its header is damaged"),
    "dim[0] of 2": ({"dim": (2, *SPATIAL[1:])}, "image must be 3D, got 2D"),
    "dim negative": ({"dim": (3, 7, -6, 5, 1, 1, 1, 1)}, r"header is damaged: .* \(dim 7 -6 5, vox_offset 35"),
    "dim too large": ({"dim": (3, 7, 6, 500, 1, 1, 1, 1)}, r"truncated or damaged: .* \(772 of 42352 bytes\)"),
    "offset infinite": ({"vox_offset": (np.inf,)}, "header is damaged: .* vox_offset inf"),
    "complex": ({"array": voxels("c8")}, "image holds complex numbers"),
    "bits": ({"datatype": (1, 1)}, "NIfTI voxels of type 1 cannot be read"),
    "128-bit floats": ({"datatype": (1536, 128)}, "NIfTI voxels of type 1536 cannot be read"),
    "offset not a number": ({"scale": (2.0, np.nan)}, "scl_inter must be a number, got nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_cannot_be_right_is_refused_in_one_line(tmp_path, name, capfd):
    given, message = REFUSED[name]
    path = nifti(tmp_path / "image.nii", **given)
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("slope", "inter", "factor", "added"),
    [(0, 5, 1, 0), (np.nan, 0, 1, 0), (np.nan, np.nan, 1, 0), (1, 0, 1, 0), (2, -10, 2, -10), (-0.5, 3, -0.5, 3)],
)
def test_scales(tmp_path, suffix, slope, inter, factor, added):
    volume = read_volume(nifti(tmp_path / f"a{suffix}", scale=(slope, inter)))
    np.testing.assert_array_equal(volume.array, voxels()[0] * np.float32(factor) + np.float32(added))
    assert volume.array.dtype == ("int16" if factor == 1 else "float32")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "u2", "f4", "f8", "i8"])
def test_voxel_types_and_volumes(tmp_path, dtype, order):
    array = voxels(dtype, volumes=3)
    for name in ("a.nii", "a.nii.gz"):
        path = nifti(tmp_path / name, array=array, order=order, version=2)
        assert count_volumes(path) == 3
        np.testing.assert_array_equal(read_volume(path, channel=1).array, array[1])
        check_untrusted(path, ReadLimits())
        with pytest.raises(InputError, match="at most 629 voxels here, got 7 x 6 x 5 x 3 x 1"):
            check_untrusted(path, ReadLimits(voxels=629))
    vectors = nifti(tmp_path / "vectors.nii", array=array, dim=(5, *SIZE, 1, 3, 1, 1))
    np.testing.assert_array_equal(read_volume(vectors, channel=2).array, array[2])


@pytest.mark.parametrize("fill", [b"\0" * 100, b"\0" * 5000])
def test_a_packed_file_that_declares_far_more_than_it_can_hold(tmp_path, fill):
    path = nifti(tmp_path / "huge.nii", dim=(3, 32000, 32000, 32000, 1, 1, 1, 1))
    packed = tmp_path / "huge.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()[:352] + fill))
    with pytest.raises(
        InputError, match=r"image is truncated or damaged: .*huge.nii.gz \(.* of 65536000000352 bytes\)"
    ):
        read_volume(packed)


def test_a_part_and_another_format_do_not_repeat_the_header(tmp_path):
    volume = read_volume(nifti(tmp_path / "image.nii", codes=(1, 4), sform=MOVED))
    part = volume.grid.part(Region((1, 2, 3), (4, 6, 7)))
    write_volume(tmp_path / "part.nii", volume.array[1:4, 2:6, 3:7], part)
    found = read_volume(tmp_path / "part.nii")
    assert not found.notes
    np.testing.assert_allclose(found.grid.affine_ras, part.affine_ras, atol=1e-5)
    for suffix in (".nrrd", ".mha"):
        write_mask(tmp_path / f"mask{suffix}", volume.array > 50, volume.grid)
        np.testing.assert_allclose(read_volume(tmp_path / f"mask{suffix}").grid.affine_ras, MOVED, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_grid_of_another_format_gets_two_matrices_that_agree(tmp_path, seed):
    from conftest import oblique_grid, rotation_matrix

    rng = np.random.default_rng(seed)
    turned = rotation_matrix(tuple(rng.choice([0, 90, 180, 33.3], 3))) @ np.diag([1, 1, rng.choice([-1, 1])])
    grid = oblique_grid(SIZE[::-1])
    grid = type(grid)(grid.shape_zyx, grid.spacing_xyz_mm, grid.origin_lps_mm, tuple(map(float, turned.ravel())))
    write_volume(tmp_path / "a.nii", voxels()[0], grid)
    for codes in ((1, 1), (1, 0), (0, 1)):
        data = bytearray((tmp_path / "a.nii").read_bytes())
        struct.pack_into("<2h", data, 252, *codes)
        (tmp_path / "b.nii").write_bytes(data)
        volume, itk = read_volume(tmp_path / "b.nii"), sitk.ReadImage(str(tmp_path / "b.nii"))
        assert not volume.notes
        np.testing.assert_allclose(volume.grid.affine_ras, grid.affine_ras, atol=2e-4)
        np.testing.assert_allclose(itk.GetDirection(), grid.direction_lps, atol=1e-6)
        np.testing.assert_allclose(itk.GetOrigin(), grid.origin_lps_mm, rtol=1e-6)


def test_other_readers_see_the_mask_where_they_see_the_image(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for name, (given, _, _) in PLACES.items():
        if not name.startswith(("qform n", "quaternion", "sform nan")):  # nibabel refuses these
            image = nifti(tmp_path / "image.nii", **given)
            write_mask(tmp_path / "mask.nii.gz", voxels()[0] > 50, read_volume(image).grid)
            one, other = (nibabel.load(tmp_path / n) for n in ("image.nii", "mask.nii.gz"))
            np.testing.assert_array_equal(one.affine, other.affine, err_msg=name)
            assert one.header.get_zooms()[:3] == other.header.get_zooms()[:3]
            assert one.header.get_xyzt_units() == other.header.get_xyzt_units()


def test_real_headers_are_repeated(tmp_path, data_dir):
    images = [
        sorted((data_dir / n / "imagesTr").glob("*.nii.gz"))[0]
        for n in ("sts_mr_t1", "msd_hippocampus", "lidc_nodule_ct", "mouse_brain_fvb_mr")
    ]
    for image in images:
        volume = read_volume(image)
        write_mask(tmp_path / "mask.nii.gz", volume.array > volume.array.mean(), volume.grid)
        assert geometry(tmp_path / "mask.nii.gz") == geometry(image)

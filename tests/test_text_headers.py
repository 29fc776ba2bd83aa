"""Geometry in NRRD and MetaImage headers: read right, with a note where it is not stated, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samed3d.errors import InputError
from samed3d.volume import read_volume, write_mask

VOXELS = np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype("<i2")
NRRD = {"type": "int16", "dimension": "3", "sizes": "7 6 5", "endian": "little", "encoding": "raw"}
LPS = {
    "space": "left-posterior-superior",
    "space directions": "(0.8,0,0) (0,0.9,0) (0,0,2)",
    "space origin": "(1,2,3)",
}
FOUR = {**LPS, "dimension": "4", "sizes": "7 6 5 2", "space directions": "(0.8,0,0) (0,0.9,0) (0,0,2) none"}
MHA = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "1 2 3",
    "ElementSpacing": "0.8 0.9 2",
    "DimSize": "7 6 5",
}
AFFINE = np.array([[-0.8, 0, 0, -1], [0, -0.9, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])


def written(folder: Path, kind: str, fields: dict[str, str]) -> Path:
    path = folder / f"image.{kind}"
    if kind == "nrrd":
        lines = ["NRRD0005", *(f"{key}: {value}" for key, value in (NRRD | fields).items()), "", ""]
    else:
        given = MHA | fields | {"ElementType": "MET_SHORT", "ElementDataFile": "LOCAL"}
        lines = [*(f"{key} = {value}" for key, value in given.items() if value), ""]
    volumes = 2 if fields.get("dimension") == "4" else 1
    path.write_bytes("\n".join(lines).encode() + VOXELS.tobytes() * volumes)
    return path


NO_SIZES, NO_ORIENTATION = "states no voxel sizes; 1 mm is assumed", "states no orientation; left and right are assumed"
READ = [
    ("nrrd", LPS, AFFINE, ""),
    ("nrrd", LPS | {"space": "LPS", "space units": '"mm" "mm" "mm"'}, AFFINE, ""),
    ("nrrd", LPS | {"space": "right-anterior-superior"}, np.diag([-1, -1, 1, 1]) @ AFFINE, ""),
    ("nrrd", LPS | {"space": "LAS"}, np.diag([1, -1, 1, 1]) @ AFFINE, ""),
    ("nrrd", LPS | {"space": "scanner-xyz"}, AFFINE, NO_ORIENTATION),
    ("nrrd", FOUR | {"kinds": "domain domain domain list"}, AFFINE, ""),
    ("nrrd", {"spacings": "0.8 0.9 2"}, np.diag([-0.8, -0.9, 2, 1]), NO_ORIENTATION),
    ("nrrd", {"spacings": "0.8 0.9 2", "units": '"mm" "mm" "mm"'}, np.diag([-0.8, -0.9, 2, 1]), NO_ORIENTATION),
    ("nrrd", {}, np.diag([-1, -1, 1, 1]), NO_SIZES),
    ("mha", {}, AFFINE, ""),
    ("mha", {"DistanceUnits": "mm"}, AFFINE, ""),
    ("mha", {"ElementSpacing": "", "ElementSize": "0.8 0.9 2"}, AFFINE, ""),
    ("mha", {"ElementSpacing": ""}, AFFINE / [[0.8, 0.9, 2, 1]], NO_SIZES),
    (
        "mha",
        {"TransformMatrix": "2 0 0 0 2 0 0 0 0.5"},
        AFFINE * [[2, 2, 0.5, 1]],
        "0.8 x 0.9 x 2 mm stated, 1.6 x 1.8 x 1",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "affine", "note"), READ)
def test_the_image_is_placed_as_its_header_says(tmp_path, kind, fields, affine, note):
    volume = read_volume(written(tmp_path, kind, fields), channel=0 if "dimension" in fields else None)
    np.testing.assert_array_equal(volume.array, VOXELS)
    np.testing.assert_allclose(volume.grid.affine_ras, affine, atol=1e-12)
    assert len(volume.notes) == bool(note) and note in " ".join(volume.notes)
    for suffix in ("nrrd", "mha", "nii"):
        write_mask(tmp_path / f"mask.{suffix}", VOXELS > 50, volume.grid)
        back = read_volume(tmp_path / f"mask.{suffix}")
        np.testing.assert_allclose(back.grid.affine_ras, affine, atol=1e-6)
        assert not back.notes


SHEARED = r"perpendicular, got 1\d\.\d degrees of shear: .*image"
REFUSED = [
    ("nrrd", {"spacings": "0.8 nan 2"}, "spacings must be numbers, got nan: .*; correct the header"),
    ("nrrd", {"spacings": "0.8 -0.9 2"}, "spacing must be > 0"),
    ("nrrd", {"spacings": "0.8 0 2"}, "header is damaged"),
    ("nrrd", LPS | {"space directions": "(0.8,0,0) (nan,nan,nan) (0,0,2)"}, "space directions must be numbers"),
    ("nrrd", LPS | {"space directions": "(0.8,0,0) none (0,0,2)"}, "space directions must be numbers, got none"),
    ("nrrd", LPS | {"space origin": "(nan,nan,nan)"}, "space origin must be numbers"),
    (
        "nrrd",
        FOUR | {"space directions": "(1,0,0) none (0,0,2) (0,1,0)", "kinds": "domain domain domain list"},
        "got none",
    ),
    ("nrrd", FOUR, "header is damaged: .* number of domain axes"),
    ("nrrd", LPS | {"space units": '"um" "um" "um"'}, "lengths must be in mm, got um: .*; convert the header to mm"),
    ("nrrd", {"spacings": "0.8 0.9 2", "units": '"cm" "cm" "cm"'}, "lengths must be in mm, got cm"),
    ("nrrd", LPS | {"space directions": "(0.8,0,0) (0,0.9,0) (0.5,0,2)"}, SHEARED),
    ("mha", {"TransformMatrix": "1 0 0 0.3 1 0 0 0 1"}, SHEARED),
    ("mha", {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "image is truncated or damaged"),
    ("mha", {"TransformMatrix": "1 0 0 nan 1 0 0 0 1"}, "transformmatrix must be numbers, got nan"),
    ("mha", {"Offset": "1 nan 3"}, "offset must be numbers, got nan"),
    ("mha", {"ElementSpacing": "0.8 nan 2"}, "elementspacing must be numbers, got nan"),
    ("mha", {"ElementSpacing": "0.8 -1 2"}, "spacing must be > 0"),
    ("mha", {"DistanceUnits": "um"}, "lengths must be in mm, got um"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED)
def test_a_geometry_that_cannot_be_right_is_refused(tmp_path, kind, fields, message, capfd):
    path = written(tmp_path, kind, fields)
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path, channel=0 if "dimension" in fields else None)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")

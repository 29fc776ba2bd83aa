"""Labels, grids and files that cannot be used: refused in one line when the case is loaded, repaired only when
asked."""

from __future__ import annotations

import gzip
import re
from dataclasses import replace

import numpy as np
import pytest

from data_prep.readers import load_case
from samed3d.errors import InputError
from samed3d.volume import write_volume
from samed3d.volume.label_maps import grid_difference
from tests import dataset_trees as trees
from tests.conftest import oblique_grid
from tests.dataset_trees import SPOILT, image_of, label_of, listed


@pytest.fixture
def folder(tmp_path):
    return trees.to_be_spoilt(tmp_path / "Dataset001")


@pytest.fixture(autouse=True)
def nothing_on_disk_changes(tmp_path):
    yield
    trees.reading_changes_nothing(tmp_path)


def load(folder, **options):
    """Load the spoilt case; all others must still load."""
    cases, problems = listed(folder)
    assert problems == []
    for case in cases:
        if case.id != SPOILT:
            load_case(case)
    return load_case(next(c for c in cases if c.id == SPOILT), **options)


# Labels that do not hold what they should


def test_label_values_without_a_name(folder):
    trees.put(label_of(folder), trees.label_array((1, 7, 9)))
    with pytest.raises(
        InputError, match=rf"label holds values that dataset.json does not name: 7, 9: .*{SPOILT}\.nii\.gz; add them"
    ):
        load(folder)


def test_values_of_instances_need_no_names(folder):
    trees.put(label_of(folder), trees.label_array((1, 700), dtype="uint16"))
    trees.put_json(folder / "source.json", {"label_kind": "instance"})
    assert load(folder).layers[0].names == {1: "a", 700: "object 700"}


def test_whole_numbers_stored_as_float_are_taken_with_a_warning(folder, caplog):
    trees.put(label_of(folder), trees.label_array((1, 2)).astype(np.float32))
    layer = load(folder).layers[0]
    assert layer.array.dtype == np.uint8 and layer.names == {1: "a", 2: "b"}
    np.testing.assert_array_equal(layer.array, trees.label_array((1, 2)))
    assert re.search(
        rf"label is stored as floating point; its values are whole numbers and are taken as such: .*{SPOILT}",
        caplog.text,
    )


def test_fractions_and_negative_numbers_are_refused(folder):
    trees.put(label_of(folder), trees.label_array((1, 2)).astype(np.float32) * 0.5)
    with pytest.raises(
        InputError, match=rf"label must hold whole numbers, got 0\.5: .*{SPOILT}\.nii\.gz; threshold or round it first"
    ):
        load(folder)
    trees.put(label_of(folder), trees.label_array((1, 2)).astype(np.int16) - 1)
    with pytest.raises(InputError, match=r"label must not be negative, got -1"):
        load(folder)


@pytest.mark.parametrize("labels", [None, {"background": 0, "a": 1, "b": [2], "ignore": 3}])
def test_an_empty_label_is_refused(folder, labels):
    trees.put(label_of(folder), np.zeros(trees.SHAPE, np.uint8))
    with pytest.raises(InputError, match=rf"label is empty, every voxel is 0: .*{SPOILT}\.nii\.gz; leave the case out"):
        load(folder)
    if labels:
        trees.nnunet_v2(folder, labels=labels, channel_names={"0": "CT", "1": "CT"})
        trees.put(label_of(folder), trees.label_array((3,)))
        with pytest.raises(InputError, match=r"label is empty, nothing but ignored voxels"):
            load(folder)


def test_a_case_whose_structures_are_all_empty_is_refused(tmp_path):
    folder = trees.totalseg(tmp_path / "set")
    for path in (folder / "s0001" / "segmentations").iterdir():
        trees.put(path, np.zeros(trees.SHAPE, np.uint8))
    cases, _ = listed(folder)
    load_case(cases[0])
    with pytest.raises(
        InputError, match=r"label is empty, no structure has a voxel; leave the case out: .*s0001/segmentations"
    ):
        load_case(cases[1])


def test_a_mask_file_with_several_values_is_refused(tmp_path):
    folder = trees.totalseg(tmp_path / "set")
    trees.put(folder / "s0001" / "segmentations" / "liver.nii.gz", trees.label_array((1, 2)))
    with pytest.raises(
        InputError, match=r"label of one structure must hold one value beside 0, got 1, 2: .*liver\.nii\.gz"
    ):
        load_case(listed(folder)[0][1])


# Grids


def test_a_label_of_another_size_is_refused_or_resampled(folder):
    small = replace(oblique_grid(), shape_zyx=(5, 6, 5))
    write_volume(label_of(folder), trees.label_array((1, 2))[:, :, :5], small)
    message = r"image and label must share one grid: sizes \(i, j, k\) are 7 x 6 x 5 and 5 x 6 x 5: .*; correct them, or give --repair"
    with pytest.raises(InputError, match=message):
        load(folder)
    raw = load(folder, repair_geometry=True)
    np.testing.assert_array_equal(raw.layers[0].array, trees.label_array((1, 2)))


def test_a_label_in_another_place_is_refused_or_put_on_the_image(folder, caplog):
    moved = replace(oblique_grid(), origin_lps_mm=(-101.3, 57.7, 4.1))
    write_volume(label_of(folder), trees.label_array((1, 2)), moved)
    with pytest.raises(
        InputError, match=r"image and label must share one grid: same size, but positions differ by up to 3 mm"
    ):
        load(folder)
    raw = load(folder, repair_geometry=True)
    np.testing.assert_array_equal(raw.layers[0].array, trees.label_array((1, 2)))
    assert "label takes the grid of its image" in caplog.text


def test_a_label_outside_its_image_is_never_repaired(folder):
    away = replace(oblique_grid(), shape_zyx=(5, 6, 5), origin_lps_mm=(900.0, 0.0, 0.0))
    write_volume(label_of(folder), trees.label_array((1, 2))[:, :, :5], away)
    with pytest.raises(InputError, match=r"label lies outside its image .*; it was drawn on another one"):
        load(folder, repair_geometry=True)


def test_channels_on_two_grids_are_refused_or_put_together(folder):
    moved = replace(oblique_grid(), origin_lps_mm=(-101.3, 57.7, 4.1))
    write_volume(folder / "imagesTr" / f"{SPOILT}_0001.nii.gz", trees.image_array(1), moved)
    with pytest.raises(
        InputError, match=r"channels must share one grid: same size, but positions differ by up to 3 mm: .*--repair"
    ):
        load(folder)
    raw = load(folder, repair_geometry=True)
    assert raw.images[1][1].grid == raw.grid
    trees.put(folder / "imagesTr" / f"{SPOILT}_0001.nii.gz", trees.image_array(1, (5, 6, 8)))
    with pytest.raises(
        InputError,
        match=r"channels must share one grid: sizes \(i, j, k\) are 7 x 6 x 5 and 8 x 6 x 5: .*; resample it$",
    ):
        load(folder, repair_geometry=True)


def test_rounded_headers_are_one_grid():
    grid = oblique_grid((300, 512, 512))
    rounded = replace(grid, direction_lps=tuple(round(v, 6) for v in grid.direction_lps))
    assert grid_difference(grid, rounded) == ""
    assert "positions differ" in grid_difference(grid, replace(grid, origin_lps_mm=(-101.3, 58.4, 1.1)))


# Files that cannot be read


def test_a_4d_image_and_a_4d_label_are_refused(folder):
    good = label_of(folder).read_bytes()
    trees.put_4d(label_of(folder), [trees.label_array()] * 3)
    with pytest.raises(InputError, match=rf"label must be 3D, got 4D with 3 volumes: .*{SPOILT}\.nii\.gz; save each"):
        load(folder)
    label_of(folder).write_bytes(good)
    trees.put_4d(image_of(folder), [trees.image_array(0), trees.image_array(1)])
    with pytest.raises(
        InputError,
        match=r"image must be 3D, got 4D with 2 volumes: .*; save each as its own file .* or use --format msd",
    ):
        load(folder)


def test_a_4d_image_of_another_length_than_dataset_json_says_is_refused(tmp_path):
    folder = trees.msd(tmp_path / "Task", modalities=4)
    trees.put_4d(folder / "imagesTr" / "BRATS_002.nii.gz", [trees.image_array(n) for n in range(5)])
    with pytest.raises(
        InputError, match=r"image must hold one volume per modality of dataset.json \(4\), got 5: .*BRATS_002"
    ):
        load_case(listed(folder)[0][1])


@pytest.mark.parametrize("spoilt", [image_of, label_of])
@pytest.mark.parametrize("how", ["cut", "not gzip", "checksum"])
def test_unreadable_gzip_is_refused(folder, spoilt, how):
    path = spoilt(folder)
    good = path.read_bytes()
    path.write_bytes({"cut": good[:-40], "not gzip": b"not gzip", "checksum": good[:-8] + b"\0" * 8}[how])
    with pytest.raises(InputError, match=rf"(truncated|damaged).*{re.escape(path.name)}"):
        load(folder)


def test_npz_that_is_damaged_or_holds_objects_is_refused(tmp_path):
    folder = trees.npz(tmp_path / "set")
    path = folder / "MR_ProstateT2_7.npz"
    np.savez_compressed(
        path, imgs=np.array([{"not": "numbers"}], dtype=object), gts=trees.label_array(), spacing=(1, 1, 1)
    )
    with pytest.raises(
        InputError,
        match=r"npz has no readable 'imgs', or it holds Python objects, which are not read: .*MR_ProstateT2_7\.npz",
    ):
        load_case(listed(folder)[0][1])
    path.write_bytes((folder / "CT_AMOS_amos_0018.npz").read_bytes()[:-100])
    cases, problems = listed(folder)
    assert [c.id for c in cases] == ["CT_AMOS_amos_0018"] and [p.reason for p in problems] == [
        "not a readable npz file"
    ]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgs": trees.image_array(0)[0]}, r"imgs must be 3D, got 2D"),
        (
            {"gts": trees.label_array()[1:]},
            r"image and label must share one grid: imgs is \(5, 6, 7\) and gts is \(4, 6, 7\)",
        ),
        ({"gts": np.zeros(trees.SHAPE)}, r"label is empty, every voxel is 0"),
        ({"spacing": (1, 1)}, r"spacing must be three numbers > 0, got \[1\.0, 1\.0\]"),
        ({"spacing": (1, 0, 1)}, r"spacing must be three numbers > 0"),
        ({"imgs": np.full(trees.SHAPE, 3)}, r"image is constant, every voxel is 3"),
        ({"imgs": np.full(trees.SHAPE, np.nan)}, r"image holds NaN or infinite voxels"),
    ],
)
def test_npz_with_unfit_arrays_is_refused(tmp_path, arrays, message):
    folder = trees.npz(tmp_path / "set")
    body = {"imgs": trees.image_array(0), "gts": trees.label_array(), "spacing": (1, 1, 1)} | arrays
    np.savez_compressed(folder / "CT_AMOS_amos_0018.npz", **body)
    with pytest.raises(InputError, match=message):
        load_case(listed(folder)[0][0])


def test_a_constant_image_is_refused(folder):
    write_volume(image_of(folder), np.full(trees.SHAPE, 4, np.int16), oblique_grid())
    with pytest.raises(InputError, match=r"image is constant, every voxel is 4"):
        load(folder)


def test_gzip_in_name_only_is_read_by_its_bytes(folder):
    packed = load(folder)
    label_of(folder).write_bytes(gzip.decompress(label_of(folder).read_bytes()))
    np.testing.assert_array_equal(load(folder).layers[0].array, packed.layers[0].array)

"""What is wrong with a data set is said in one line, costs only the case it is in, and changes nothing on disk."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tests import dataset_trees as trees
from tests.conftest import oblique_grid

from data_prep.readers import READERS, find_sources, load_case
from samed3d.errors import InputError
from samed3d.volume import write_volume
from samed3d.volume.label_maps import grid_difference

CASE = "case_001"


@pytest.fixture
def folder(tmp_path):
    """An nnU-Net 2 data set with one semantic label set, so that a single file can be spoilt."""
    return trees.nnunet_v2(tmp_path / "Dataset001", labels={"background": 0, "a": 1, "b": 2, "c": 3}, channel_names={"0": "CT", "1": "CT"})


@pytest.fixture(autouse=True)
def nothing_on_disk_changes(tmp_path):
    """Called at the end of a test on what it left behind; reading again must change no byte."""
    yield
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    try:
        for reader, source in find_sources([tmp_path]):
            for case in reader.cases(source)[0]:
                try:
                    load_case(case, repair_geometry=True)
                except InputError:
                    pass
    except InputError:
        pass
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def label_of(folder):
    return folder / "labelsTr" / f"{CASE}.nii.gz"


def image_of(folder):
    return folder / "imagesTr" / f"{CASE}_0000.nii.gz"


def listed(folder):
    [(reader, found)] = find_sources([folder])
    return reader.cases(found)


def load(folder, **options):
    """Load the spoilt case; all others must still load."""
    cases, problems = listed(folder)
    assert problems == []
    for case in cases:
        if case.id != CASE:
            load_case(case)
    return load_case(next(c for c in cases if c.id == CASE), **options)


def problem_of(folder):
    """The one problem of a listing, as (file name, reason), and the ids of the cases that are left."""
    cases, problems = listed(folder)
    assert len(problems) == 1, problems
    return problems[0].path.rsplit("/", 1)[-1], problems[0].reason, [c.id for c in cases]


# A label or an image that is not there


def test_nnunet_image_without_label(folder):
    label_of(folder).unlink()
    assert problem_of(folder) == (f"{CASE}_0000.nii.gz", "image has no label in the folder of labels", ["case_002", "case_101"])


def test_nnunet_label_without_image(folder):
    for channel in range(2):
        (folder / "imagesTr" / f"{CASE}_{channel:04d}.nii.gz").unlink()
    assert problem_of(folder) == (f"{CASE}.nii.gz", "label has no image in the folder of images", ["case_002", "case_101"])


def test_nnunet_channel_missing(folder):
    (folder / "imagesTr" / f"{CASE}_0001.nii.gz").unlink()
    assert problem_of(folder)[1:] == ("channel 0001 is missing (2 in dataset.json)", ["case_002", "case_101"])


def test_nnunet_image_without_channel_number(folder):
    image_of(folder).rename(folder / "imagesTr" / "scan.nii.gz")
    cases, problems = listed(folder)
    assert [p.reason for p in problems] == ["image name must end in a channel number, CASE_0000.nii.gz", "channel 0000 is missing (2 in dataset.json)"]
    assert [c.id for c in cases] == ["case_002", "case_101"]


def test_nnunet_version_1_lists_a_file_that_is_not_there(tmp_path):
    folder = trees.nnunet_v1(tmp_path / "d")
    (folder / "labelsTr" / "la_003.nii.gz").unlink()
    cases, problems = listed(folder)
    assert {p.reason for p in problems} == {"image has no label in the folder of labels", "listed in dataset.json but not there"}
    assert [c.id for c in cases] == ["la_004"]


def test_nnunet_version_2_lists_a_file_that_is_not_there(tmp_path):
    listing = {CASE: {"images": [f"imagesTr/{CASE}_0000.nii.gz"], "label": "labelsTr/gone.nii.gz"}, "broken": {"label": "x"}}
    folder = trees.nnunet_v2(tmp_path / "d", dataset=listing)
    cases, problems = listed(folder)
    assert cases == []
    assert [p.reason for p in problems] == [
        f"listed in dataset.json for case '{CASE}' but not there",
        "dataset entry 'broken' must have images and label",
    ]


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_decathlon_file_missing_or_not_listed(tmp_path, part):
    folder = trees.msd(tmp_path / "Task")
    (folder / part / "BRATS_002.nii.gz").rename(folder / part / "stray.nii.gz")
    cases, problems = listed(folder)
    assert [c.id for c in cases] == ["BRATS_001"]
    assert [(p.path.rsplit("/", 1)[-1], p.reason) for p in problems] == [
        ("BRATS_002.nii.gz", "listed in dataset.json but not there"),
        ("stray.nii.gz", f"{part[:5]} is not listed in dataset.json"),
    ]


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("ct.nii.gz", "label has no image: ct.nii.gz or mri.nii.gz is missing beside segmentations"),
        ("segmentations", "image has no label: segmentations is missing or empty"),
    ],
)
def test_totalsegmentator_half_a_case(tmp_path, gone, reason):
    folder = trees.totalseg(tmp_path / "set")
    (folder / "s0001" / gone).rename(tmp_path / "away")
    assert problem_of(folder) == ("s0001", reason, ["s0000"])
    (tmp_path / "away").rename(folder / "s0001" / gone)


@pytest.mark.parametrize(("gone", "reason"), [("images", "label has no image"), ("labels", "image has no label")])
def test_plain_half_a_case(tmp_path, gone, reason):
    folder = trees.plain(tmp_path / "set")
    (folder / gone / "bert.nii.gz").unlink()
    assert problem_of(folder) == ("bert.nii.gz", reason, ["anna"])


@pytest.mark.parametrize(("gone", "reason"), [("imagesTr", "label has no image in imagesTr"), ("labelsTr", "image has no label in labelsTr")])
def test_sa_med3d_half_a_case(tmp_path, gone, reason):
    folder = trees.sa_med3d(tmp_path / "set")
    (folder / "liver" / "mr_CHAOS" / gone / "word_0001.nii.gz").unlink()
    assert problem_of(folder) == ("word_0001.nii.gz", reason, ["ct_WORD.word_0001"])


def test_sa_med3d_one_category_without_its_label_keeps_the_others(tmp_path):
    folder = trees.sa_med3d(tmp_path / "set")
    (folder / "spleen" / "ct_WORD" / "labelsTr" / "word_0001.nii.gz").unlink()
    reason = "image has no label in labelsTr of this category; the case is taken with its other labels"
    assert problem_of(folder) == ("word_0001.nii.gz", reason, ["ct_WORD.word_0001", "mr_CHAOS.word_0001"])
    assert list(load_case(listed(folder)[0][0]).layers[0].names.values()) == ["liver"]


@pytest.mark.parametrize(("kept", "reason"), [("imgs", "image has no label: gts is missing"), ("gts", "label has no image: imgs is missing")])
def test_npz_half_a_case(tmp_path, kept, reason):
    folder = trees.npz(tmp_path / "set")
    np.savez_compressed(folder / "MR_ProstateT2_7.npz", **{kept: trees.label_array(), "spacing": (1, 1, 1)})
    assert problem_of(folder) == ("MR_ProstateT2_7.npz", reason, ["CT_AMOS_amos_0018"])


# Labels that do not hold what they should


def test_label_values_without_a_name(folder):
    trees.put(label_of(folder), trees.label_array((1, 7, 9)))
    with pytest.raises(InputError, match=rf"label holds values that dataset.json does not name: 7, 9: .*{CASE}\.nii\.gz; add them"):
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
    assert re.search(rf"label is stored as floating point; its values are whole numbers and are taken as such: .*{CASE}", caplog.text)


def test_fractions_and_negative_numbers_are_refused(folder):
    trees.put(label_of(folder), trees.label_array((1, 2)).astype(np.float32) * 0.5)
    with pytest.raises(InputError, match=rf"label must hold whole numbers, got 0\.5: .*{CASE}\.nii\.gz; threshold or round it first"):
        load(folder)
    trees.put(label_of(folder), trees.label_array((1, 2)).astype(np.int16) - 1)
    with pytest.raises(InputError, match=r"label must not be negative, got -1"):
        load(folder)


@pytest.mark.parametrize("labels", [None, {"background": 0, "a": 1, "b": [2], "ignore": 3}])
def test_an_empty_label_is_refused(folder, labels):
    trees.put(label_of(folder), np.zeros(trees.SHAPE, np.uint8))
    with pytest.raises(InputError, match=rf"label is empty, every voxel is 0: .*{CASE}\.nii\.gz; leave the case out"):
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
    with pytest.raises(InputError, match=r"label is empty, no structure has a voxel; leave the case out: .*s0001/segmentations"):
        load_case(cases[1])


def test_a_mask_file_with_several_values_is_refused(tmp_path):
    folder = trees.totalseg(tmp_path / "set")
    trees.put(folder / "s0001" / "segmentations" / "liver.nii.gz", trees.label_array((1, 2)))
    with pytest.raises(InputError, match=r"label of one structure must hold one value beside 0, got 1, 2: .*liver\.nii\.gz"):
        load_case(listed(folder)[0][1])


# Grids


def test_a_label_of_another_size_is_refused_or_resampled(folder):
    small = replace(oblique_grid(), shape_zyx=(5, 6, 5))
    write_volume(label_of(folder), trees.label_array((1, 2))[:, :, :5], small)
    message = rf"image and label must share one grid: sizes \(i, j, k\) are 7 x 6 x 5 and 5 x 6 x 5: .*{CASE}.*; correct them, or give --repair"
    with pytest.raises(InputError, match=message):
        load(folder)
    raw = load(folder, repair_geometry=True)
    np.testing.assert_array_equal(raw.layers[0].array, trees.label_array((1, 2)))


def test_a_label_in_another_place_is_refused_or_put_on_the_image(folder, caplog):
    moved = replace(oblique_grid(), origin_lps_mm=(-101.3, 57.7, 4.1))
    write_volume(label_of(folder), trees.label_array((1, 2)), moved)
    with pytest.raises(InputError, match=r"image and label must share one grid: same size, but positions differ by up to 3 mm"):
        load(folder)
    raw = load(folder, repair_geometry=True)
    np.testing.assert_array_equal(raw.layers[0].array, trees.label_array((1, 2)))
    assert "label takes the grid of its image" in caplog.text


def test_a_label_outside_its_image_is_never_repaired(folder):
    away = replace(oblique_grid(), shape_zyx=(5, 6, 5), origin_lps_mm=(900.0, 0.0, 0.0))
    write_volume(label_of(folder), trees.label_array((1, 2))[:, :, :5], away)
    with pytest.raises(InputError, match=r"label lies outside its image .*; it cannot be repaired"):
        load(folder, repair_geometry=True)


def test_channels_on_two_grids_are_refused_or_put_together(folder):
    moved = replace(oblique_grid(), origin_lps_mm=(-101.3, 57.7, 4.1))
    write_volume(folder / "imagesTr" / f"{CASE}_0001.nii.gz", trees.image_array(1), moved)
    with pytest.raises(InputError, match=r"channels must share one grid: same size, but positions differ by up to 3 mm: .*--repair-geometry"):
        load(folder)
    raw = load(folder, repair_geometry=True)
    assert raw.images[1][1].grid == raw.grid
    trees.put(folder / "imagesTr" / f"{CASE}_0001.nii.gz", trees.image_array(1, (5, 6, 8)))
    with pytest.raises(InputError, match=r"channels must share one grid: sizes \(i, j, k\) are 7 x 6 x 5 and 8 x 6 x 5: .*; resample it$"):
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
    with pytest.raises(InputError, match=rf"label must be 3D, got 4D with 3 volumes: .*{CASE}\.nii\.gz; save each volume as its own label"):
        load(folder)
    label_of(folder).write_bytes(good)
    trees.put_4d(image_of(folder), [trees.image_array(0), trees.image_array(1)])
    with pytest.raises(InputError, match=r"image must be 3D, got 4D with 2 volumes: .*; save each as its own file .* or use --format msd"):
        load(folder)


def test_a_4d_image_of_another_length_than_dataset_json_says_is_refused(tmp_path):
    folder = trees.msd(tmp_path / "Task", modalities=4)
    trees.put_4d(folder / "imagesTr" / "BRATS_002.nii.gz", [trees.image_array(n) for n in range(5)])
    with pytest.raises(InputError, match=r"image must hold one volume per modality of dataset.json \(4\), got 5: .*BRATS_002"):
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
    np.savez_compressed(path, imgs=np.array([{"not": "numbers"}], dtype=object), gts=trees.label_array(), spacing=(1, 1, 1))
    with pytest.raises(InputError, match=r"npz is damaged, or holds Python objects, which are not read: .*MR_ProstateT2_7\.npz"):
        load_case(listed(folder)[0][1])
    path.write_bytes((folder / "CT_AMOS_amos_0018.npz").read_bytes()[:-100])
    assert problem_of(folder) == ("MR_ProstateT2_7.npz", "not a readable npz file", ["CT_AMOS_amos_0018"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgs": trees.image_array(0)[0]}, r"imgs must be 3D, got 2D"),
        ({"gts": trees.label_array()[1:]}, r"image and label must share one grid: imgs is \(5, 6, 7\) and gts is \(4, 6, 7\)"),
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


# Names


def test_names_with_slashes_and_unicode(tmp_path):
    labels = {"background": 0, "prostate/uterus": 1, "Gefäß 血管": 2, "c": 3}
    cases = ("Müller 1", "肝臓", "a.b")
    folder = trees.nnunet_v2(tmp_path / "Größe", cases=cases, labels=labels)
    found, problems = listed(folder)
    assert problems == [] and len(found) == 4
    for case in found:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", case.id) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", case.source)
        assert load_case(case).layers[0].names == {1: "prostate/uterus", 2: "Gefäß 血管", 3: "c"}
    assert {case.subject for case in found} == {*cases, "case_101"}
    listing = {"site/1": {"images": ["imagesTr/a.b_0000.nii.gz", "imagesTr/a.b_0001.nii.gz"], "label": "labelsTr/a.b.nii.gz"}}
    [case] = listed(trees.nnunet_v2(folder, labels=labels, dataset=listing))[0]
    assert "/" not in case.id and case.subject == "site/1"


def test_two_files_of_one_case_are_a_problem(tmp_path):
    folder = trees.plain(tmp_path / "set")
    trees.put(folder / "images" / "bert.nrrd", trees.image_array(5))
    name, reason, left = problem_of(folder)
    assert left == ["anna"]
    assert reason == "two cases have the id 'bert': bert.nii.gz, bert.nrrd, bert.nii.gz; rename one of them"


def test_a_case_that_is_listed_twice_is_taken_once(tmp_path):
    for tree, name in ((trees.nnunet_v1, "v1"), (trees.msd, "msd")):
        folder = tree(tmp_path / name)
        about = json.loads((folder / "dataset.json").read_text())
        about["training"].append(about["training"][0])
        trees.put_json(folder / "dataset.json", about)
        _, reason, left = problem_of(folder)
        assert re.search(r"two cases (cannot have one id|have the id BRATS_001)", reason) and len(left) == 2


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    trees.plain(tmp_path / "a" / "livers")
    trees.plain(tmp_path / "b" / "livers")
    with pytest.raises(InputError, match=r"data sets need names of their own, got .*a/livers and .*b/livers; rename one"):
        find_sources([tmp_path])


def test_two_different_images_of_one_name_are_refused(tmp_path):
    folder = trees.sa_med3d(tmp_path / "set")
    trees.put(folder / "spleen" / "ct_WORD" / "imagesTr" / "word_0001.nii.gz", trees.image_array(77))
    with pytest.raises(InputError, match=r"two different images have one dataset and name: .*liver.* and .*spleen.*; rename one"):
        load_case(listed(folder)[0][0])


# The data set as a whole


def test_nothing_recognised_says_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        find_sources([tmp_path / "empty"])
    assert str(error.value).startswith(f"no data set recognised in {tmp_path / 'empty'}; looked for msd: dataset.json")
    assert all(f"{name}: {reader.looks_for}" in str(error.value) for name, reader in READERS.items())
    with pytest.raises(InputError, match=r"no data set recognised in .*; looked for totalseg: SUBJECT/ct\.nii\.gz"):
        find_sources([trees.plain(tmp_path / "set")], "totalseg")
    with pytest.raises(InputError, match=r"source must be a folder, got .*nowhere"):
        find_sources([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {}}, r"dataset.json must name its labels"),
        ({"labels": {"a": "b"}}, r"labels must be value: name or name: value\(s\), got 'a': 'b'"),
        ({"labels": {"a": 1, "b": 1}}, r"labels must not share a value, got 1 for two names"),
        ({"labels": {"a": -1}}, r"labels must have values from 1, got 'a': -1"),
        ({"file_ending": ".png"}, r"file_ending must be one of \.nii\.gz .*, got '\.png': .*; convert the files"),
    ],
)
def test_dataset_json_that_makes_no_sense_is_refused(folder, changes, message):
    trees.put_json(folder / "dataset.json", json.loads((folder / "dataset.json").read_text()) | changes)
    with pytest.raises(InputError, match=message):
        listed(folder)


def test_damaged_json_is_refused(folder, tmp_path):
    trees.put_json(folder / "source.json", {"license": "CC0"})
    with pytest.raises(InputError, match=r"source.json knows attribution, .*; got 'license'"):
        listed(folder)
    trees.put_json(folder / "source.json", {"label_kind": "objects"})
    with pytest.raises(InputError, match=r"label_kind must be semantic or instance, got 'objects'"):
        listed(folder)
    (folder / "source.json").unlink()
    (folder / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"not valid JSON: .*dataset\.json"):
        listed(folder)
    (tmp_path / "x.json").write_text("[]")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("images/{case}.nii.gz", None), r"--image-pattern and --label-pattern must be given together"),
        (("images/x.nii.gz", "{case}.nii.gz"), r"--image-pattern must have \{case\}, and may have \{channel\} and \{suffix\}"),
        (("{case}.nii.gz", "{case}_{organ}.nii.gz"), r"--label-pattern must have \{case\}, and may have \{label\}"),
        (("{case}.nii.gz", "../{case}.nii.gz"), r"--label-pattern must be a path below the source"),
    ],
)
def test_bad_patterns_are_refused(tmp_path, patterns, message):
    with pytest.raises(InputError, match=message):
        find_sources([tmp_path], image_pattern=patterns[0], label_pattern=patterns[1])
    with pytest.raises(InputError, match=r"--image-pattern and --label-pattern are for --format plain, got --format msd"):
        find_sources([tmp_path], "msd", image_pattern="a/{case}.mha", label_pattern="b/{case}.mha")


def test_a_constant_image_is_refused(folder):
    write_volume(image_of(folder), np.full(trees.SHAPE, 4, np.int16), oblique_grid())
    with pytest.raises(InputError, match=r"image is constant, every voxel is 4"):
        load(folder)


def test_gzip_in_name_only_is_refused(folder):
    label_of(folder).write_bytes(gzip.decompress(label_of(folder).read_bytes()))
    with pytest.raises(InputError, match=r"damaged.*case_001"):
        load(folder)

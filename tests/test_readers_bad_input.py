"""What is wrong with a data set is said in one line, costs only the case it is in, and changes nothing on disk."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from data_prep.readers import READERS, find_sources, load_case
from samed3d.errors import InputError
from tests import dataset_trees as trees
from tests.dataset_trees import SPOILT, image_of, label_of, listed


@pytest.fixture
def folder(tmp_path):
    return trees.to_be_spoilt(tmp_path / "Dataset001")


@pytest.fixture(autouse=True)
def nothing_on_disk_changes(tmp_path):
    yield
    trees.reading_changes_nothing(tmp_path)


def problem_of(folder):
    """The one problem of a listing, as (file name, reason), and the ids of the cases that are left."""
    cases, problems = listed(folder)
    assert len(problems) == 1, problems
    return problems[0].path.rsplit("/", 1)[-1], problems[0].reason, [c.id for c in cases]


# A label or an image that is not there


def test_nnunet_image_without_label(folder):
    label_of(folder).unlink()
    assert problem_of(folder) == (
        f"{SPOILT}_0000.nii.gz",
        "image has no label in the folder of labels",
        ["case_002", "case_101"],
    )


def test_nnunet_label_without_image(folder):
    for channel in range(2):
        (folder / "imagesTr" / f"{SPOILT}_{channel:04d}.nii.gz").unlink()
    assert problem_of(folder) == (
        f"{SPOILT}.nii.gz",
        "label has no image in the folder of images",
        ["case_002", "case_101"],
    )


def test_nnunet_channel_missing(folder):
    (folder / "imagesTr" / f"{SPOILT}_0001.nii.gz").unlink()
    assert problem_of(folder)[1:] == ("channel 0001 is missing (2 in dataset.json)", ["case_002", "case_101"])


def test_nnunet_image_without_channel_number(folder):
    image_of(folder).rename(folder / "imagesTr" / "scan.nii.gz")
    cases, problems = listed(folder)
    assert [p.reason for p in problems] == [
        "image name must end in a channel number, CASE_0000.nii.gz",
        "channel 0000 is missing (2 in dataset.json)",
    ]
    assert [c.id for c in cases] == ["case_002", "case_101"]


def test_nnunet_version_1_lists_a_file_that_is_not_there(tmp_path):
    folder = trees.nnunet_v1(tmp_path / "d")
    (folder / "labelsTr" / "la_003.nii.gz").unlink()
    cases, problems = listed(folder)
    assert {p.reason for p in problems} == {
        "image has no label in the folder of labels",
        "listed in dataset.json but not there",
    }
    assert [c.id for c in cases] == ["la_004"]


def test_nnunet_version_2_lists_a_file_that_is_not_there(tmp_path):
    listing = {
        SPOILT: {"images": [f"imagesTr/{SPOILT}_0000.nii.gz"], "label": "labelsTr/gone.nii.gz"},
        "broken": {"label": "x"},
    }
    folder = trees.nnunet_v2(tmp_path / "d", dataset=listing)
    cases, problems = listed(folder)
    assert cases == []
    assert [p.reason for p in problems] == [
        f"listed in dataset.json for case '{SPOILT}' but not there",
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


@pytest.mark.parametrize(
    ("gone", "reason"), [("imagesTr", "label has no image in imagesTr"), ("labelsTr", "image has no label in labelsTr")]
)
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


@pytest.mark.parametrize(
    ("kept", "reason"), [("imgs", "image has no label: gts is missing"), ("gts", "label has no image: imgs is missing")]
)
def test_npz_half_a_case(tmp_path, kept, reason):
    folder = trees.npz(tmp_path / "set")
    np.savez_compressed(folder / "MR_ProstateT2_7.npz", **{kept: trees.label_array(), "spacing": (1, 1, 1)})
    assert problem_of(folder) == ("MR_ProstateT2_7.npz", reason, ["CT_AMOS_amos_0018"])


# Names


def test_names_with_slashes_and_unicode(tmp_path):
    labels = {"background": 0, "prostate/uterus": 1, "Gefäß 血管": 2, "c": 3}
    cases = ("Müller 1", "肝臓", "a.b")
    folder = trees.nnunet_v2(tmp_path / "Größe", cases=cases, labels=labels)
    found, problems = listed(folder)
    assert problems == [] and len(found) == 4
    for case in found:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", case.id) and re.fullmatch(
            r"[A-Za-z0-9_][A-Za-z0-9._-]*", case.source
        )
        assert load_case(case).layers[0].names == {1: "prostate/uterus", 2: "Gefäß 血管", 3: "c"}
    assert {case.subject for case in found} == {*cases, "case_101"}
    listing = {
        "site/1": {"images": ["imagesTr/a.b_0000.nii.gz", "imagesTr/a.b_0001.nii.gz"], "label": "labelsTr/a.b.nii.gz"}
    }
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
        assert re.search(r"two cases (cannot have one id|have the id 'BRATS_001')", reason) and len(left) == 2


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    trees.plain(tmp_path / "a" / "livers")
    trees.plain(tmp_path / "b" / "livers")
    with pytest.raises(
        InputError, match=r"data sets need names of their own, got .*a/livers and .*b/livers; rename one"
    ):
        find_sources([tmp_path])


def test_two_different_images_of_one_name_are_refused(tmp_path):
    folder = trees.sa_med3d(tmp_path / "set")
    trees.put(folder / "spleen" / "ct_WORD" / "imagesTr" / "word_0001.nii.gz", trees.image_array(77))
    with pytest.raises(
        InputError, match=r"two different images have one dataset and name: .*liver.* and .*spleen.*; rename one"
    ):
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
    with pytest.raises(InputError, match=r"source\.json has no key 'license'; did you mean licence\?"):
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
        (
            ("images/x.nii.gz", "{case}.nii.gz"),
            r"--image-pattern must have \{case\}, and may have \{channel\} and \{suffix\}",
        ),
        (("{case}.nii.gz", "{case}_{organ}.nii.gz"), r"--label-pattern must have \{case\}, and may have \{label\}"),
        (("{case}.nii.gz", "../{case}.nii.gz"), r"--label-pattern must be a path below the source"),
    ],
)
def test_bad_patterns_are_refused(tmp_path, patterns, message):
    with pytest.raises(InputError, match=message):
        find_sources([tmp_path], patterns=patterns)
    with pytest.raises(
        InputError, match=r"--image-pattern and --label-pattern are for --format plain, got --format msd"
    ):
        find_sources([tmp_path], "msd", ("a/{case}.mha", "b/{case}.mha"))

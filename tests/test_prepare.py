"""Preparing a corpus: the same arrays whatever the storage order, and nothing taken that should not be."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.nnunet import prepare
from samed3d.data.corpus import Corpus
from samed3d.errors import InputError
from samed3d.geometry import bounding_region
from samed3d.volume import write_volume
from tests.nnunet_tree import RAS, scene, stored_as, write_set

ORDERS = [
    ((0, 1, 2), (False, False, False)),
    ((0, 1, 2), (True, True, True)),
    ((2, 0, 1), (False, True, False)),
    ((1, 2, 0), (True, False, False)),
    ((2, 1, 0), (False, False, True)),
]


def one_case(folder: Path) -> tuple[Corpus, np.ndarray, np.ndarray]:
    corpus = Corpus(folder)
    (case,) = corpus.cases
    image, labels = corpus.arrays(case)
    return corpus, image, labels


@pytest.mark.parametrize(("axes", "flips"), ORDERS)
def test_arrays_are_canonical_whatever_the_stored_orientation(axes, flips, tmp_path):
    write_set(tmp_path / "set", {"a": 0}, axes=axes, flips=flips)
    corpus, image, labels = one_case(prepare([tmp_path / "set"], tmp_path / "corpus"))
    wanted = scene(0)
    assert np.array_equal(image, wanted[0]) and image.dtype == np.int16
    assert np.array_equal(labels, wanted[1]) and labels.dtype == np.uint8
    assert corpus.cases[0].shape_zyx == RAS.shape_zyx and corpus.cases[0].spacing_zyx_mm == pytest.approx((2.0, 1.5, 1.0))


def test_index_says_what_is_in_a_case(tmp_path):
    subjects = [{"case": "a", "subject": "p1"}, {"case": "b", "subject": "p1"}]
    write_set(tmp_path / "set", {"a": 0, "b": 1, "c": 2}, cases=subjects, licence_flag="ok", attribution="someone")
    told = []
    corpus = Corpus(prepare([tmp_path / "set"], tmp_path / "corpus", on_case=lambda done, total: told.append((done, total))))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [(c.id, c.source, c.subject, c.modality, c.has_image) for c in corpus.cases] == [
        ("set.a", "set", "p1", "CT", True),
        ("set.b", "set", "p1", "CT", True),
        ("set.c", "set", "c", "CT", True),
    ]
    assert corpus.sources == {"set": {"modality": "CT", "licence": "CC0", "attribution": "someone", "label_kind": ""}}
    for case in corpus.cases:
        labels = corpus.arrays(case)[1]
        assert [(r.value, r.name) for r in case.labels] == [(1, "bright"), (2, "dark")], "the speck is too small"
        for record in case.labels:
            assert record.voxels == int((labels == record.value).sum()) and record.region == bounding_region(labels == record.value)


def test_small_structures_are_kept_when_asked_and_unnamed_ones_get_a_name(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    corpus = Corpus(prepare([tmp_path / "set"], tmp_path / "corpus", min_voxels=8))
    assert [(r.name, r.voxels) for r in corpus.cases[0].labels][2] == ("label 3", 8)


def test_a_folder_of_sets_is_taken_and_licence_flags_are_minded(tmp_path, caplog):
    write_set(tmp_path / "all" / "free", {"a": 0}, licence_flag="ok")
    write_set(tmp_path / "all" / "quiet", {"a": 0})
    write_set(tmp_path / "all" / "closed", {"a": 0}, licence_flag="non-commercial")
    with caplog.at_level(logging.WARNING, logger="samed3d"):
        corpus = Corpus(prepare([tmp_path / "all"], tmp_path / "one"))
    assert {c.source for c in corpus.cases} == set(corpus.sources) == {"free", "quiet"}
    assert "left out closed: licence_flag is non-commercial" in caplog.text
    both = Corpus(prepare([tmp_path / "all"], tmp_path / "two", licence_flags=("ok", "non-commercial")))
    assert {c.source for c in both.cases} == {"free", "quiet", "closed"}
    with pytest.raises(InputError, match="no case to prepare in .*closed.*licence_flag of ok"):
        prepare([tmp_path / "all" / "closed"], tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_every_channel_becomes_a_case_with_the_same_labels(tmp_path):
    write_set(tmp_path / "set", {"a": 0}, channels=2, channel_names={"0": "T1", "1": "FLAIR"})
    corpus = Corpus(prepare([tmp_path / "set"], tmp_path / "corpus"))
    assert [(c.id, c.subject, c.modality) for c in corpus.cases] == [("set.a_0000", "a", "T1"), ("set.a_0001", "a", "FLAIR")]
    (one, labels), (two, same) = (corpus.arrays(c) for c in corpus.cases)
    assert np.array_equal(two, one + 1000) and np.array_equal(labels, same)


def test_label_maps_without_images_are_kept_as_such(tmp_path):
    write_set(tmp_path / "set", {"a": 0}, channels=0)
    corpus, image, labels = one_case(prepare([tmp_path / "set"], tmp_path / "corpus"))
    assert not corpus.cases[0].has_image and image is None and np.array_equal(labels, scene(0)[1])


def test_another_grid_for_image_and_labels_is_refused(tmp_path):
    changes = {"spacing_xyz_mm": (1.0, 1.5, 2.1), "origin_lps_mm": (0.0, 0.5, 0.0), "shape_zyx": (20, 24, 27)}
    for number, (field, value) in enumerate(changes.items()):
        grid = replace(RAS, **{field: value})
        folder = write_set(tmp_path / f"set{number}", {"a": 0})
        write_volume(folder / "imagesTr" / "a_0000.nii.gz", scene(0, grid.shape_zyx)[0], grid)
        with pytest.raises(InputError, match=r"image and label must share one grid: .*a_0000.nii.gz and .*a.nii.gz"):
            prepare([folder], tmp_path / "corpus")
        assert not (tmp_path / "corpus" / "corpus.json").exists(), "half a corpus is none"


def test_labels_stored_as_floats_become_integers_and_fractions_are_refused(tmp_path):
    folder = write_set(tmp_path / "set", {"a": 0})
    labels = scene(0)[1].astype(np.float32)
    write_volume(folder / "labelsTr" / "a.nii.gz", labels, RAS)
    _, _, stored = one_case(prepare([folder], tmp_path / "corpus"))
    assert stored.dtype.kind == "i" and np.array_equal(stored, labels)
    write_volume(folder / "labelsTr" / "a.nii.gz", labels * 0.5, RAS)
    with pytest.raises(InputError, match="label map must hold whole numbers only: .*a.nii.gz"):
        prepare([folder], tmp_path / "other")


def test_coarsening_strides_each_axis_and_keeps_structures_in_place(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    corpus, image, labels = one_case(prepare([tmp_path / "set"], tmp_path / "corpus", max_side=14))
    case, (fine, fine_labels) = corpus.cases[0], scene(0)
    assert image.shape == labels.shape == case.shape_zyx == (10, 12, 14)
    assert case.spacing_zyx_mm == pytest.approx((4.0, 3.0, 2.0))
    assert np.array_equal(labels, fine_labels[1::2, 1::2, 1::2]), "labels are picked, never mixed"
    assert image.dtype == fine.dtype
    blocks = fine.reshape(10, 2, 12, 2, 14, 2).astype(float).mean(axis=(1, 3, 5))
    assert np.abs(image - blocks).max() <= 1, "images are averaged"
    assert case.labels[0].region == bounding_region(labels == 1)


def test_nothing_is_overwritten_and_no_dataset_is_named(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    prepare([tmp_path / "set"], tmp_path / "corpus")
    before = (tmp_path / "corpus" / "corpus.json").read_bytes()
    with pytest.raises(InputError, match="already holds a corpus: .*corpus; choose another"):
        prepare([tmp_path / "set"], tmp_path / "corpus")
    assert (tmp_path / "corpus" / "corpus.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.part*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="source must be a folder with dataset.json, or a folder of such folders, got .*empty"):
        prepare([tmp_path / "empty"], tmp_path / "other")


def test_the_orders_of_the_test_are_real_permutations():
    """As stored, the arrays of different orders differ; else the first test could not fail."""
    stored = [stored_as(scene(0)[0], axes, flips) for axes, flips in ORDERS]
    for (one, grid), (other, another) in itertools.combinations(stored, 2):
        assert not np.array_equal(one, other) and grid != another

"""Readers on trees laid out as the real data sets are: what is a case, whose it is, and that every voxel comes
through."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from data_prep.readers import READERS, find_sources, load_case
from data_prep.readers.facts import safe_name, subject_of
from data_prep.readers.labels import pack_layers
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import read_volume
from tests import dataset_trees as trees


def listed(folder, name):
    """The one source of a folder and its cases; the reader must be the expected one and find no problem."""
    [(reader, found)] = find_sources([folder])
    assert (reader.name, found) == (name, folder)
    cases, problems = reader.cases(folder)
    assert problems == []
    assert len({case.id for case in cases}) == len(cases)
    facts = reader.source(folder)
    assert all(
        case.source == facts.name and case.reader == name and case == pickle.loads(pickle.dumps(case)) for case in cases
    )
    return cases, facts


def structures(raw):
    """Each structure of a case as name: mask."""
    return {name: layer.array == value for layer in raw.layers for value, name in layer.names.items()}


def test_nnunet_version_2_with_channels_regions_and_a_test_part(tmp_path):
    folder = trees.nnunet_v2(tmp_path / "Dataset007_BraTS")
    cases, facts = listed(folder, "nnunet")
    assert [(c.id, c.split) for c in cases] == [("case_001", "train"), ("case_002", "train"), ("case_101", "test")]
    assert (facts.modality, facts.licence, facts.licence_flag) == ("FLAIR, T1c", "", "unclear")
    raw = load_case(cases[1])
    assert [name for name, _ in raw.images] == ["FLAIR", "T1c"]
    for channel, (_, volume) in enumerate(raw.images):
        np.testing.assert_array_equal(volume.array, trees.image_array(10 + channel))
    assert raw.grid == read_volume(folder / "imagesTr" / "case_002_0000.nii.gz").grid
    label, found = trees.label_array((1, 2, 3)), structures(raw)
    assert set(found) == {"whole tumor", "tumor core", "enhancing tumor"} and len(raw.layers) == 3
    np.testing.assert_array_equal(found["whole tumor"], label >= 1)
    np.testing.assert_array_equal(found["tumor core"], label >= 2)
    np.testing.assert_array_equal(found["enhancing tumor"], label == 3)


def test_nnunet_version_2_in_nrrd_with_an_ignored_label_and_a_list_of_files(tmp_path):
    labels = {"background": 0, "organ": 1, "vessel": 2, "ignore": 3}
    folder = trees.nnunet_v2(tmp_path / "D", ending=".nrrd", labels=labels)
    raw = load_case(listed(folder, "nnunet")[0][0])
    assert len(raw.layers) == 1 and raw.layers[0].names == {1: "organ", 2: "vessel"}
    np.testing.assert_array_equal(
        raw.layers[0].array, np.where(trees.label_array((1, 2, 3)) == 3, 0, trees.label_array((1, 2, 3)))
    )
    entry = {
        "images": ["imagesTr/case_001_0000.nrrd", "imagesTr/case_001_0001.nrrd"],
        "label": "labelsTr/case_001.nrrd",
    }
    trees.nnunet_v2(folder, ending=".nrrd", labels=labels, dataset={"first": entry})
    cases, _ = listed(folder, "nnunet")
    assert [c.id for c in cases] == ["first"]
    assert [name for name, _ in load_case(cases[0]).images] == ["FLAIR", "T1c"]


def test_nnunet_version_1(tmp_path):
    folder = trees.nnunet_v1(tmp_path / "Task002_Heart")
    cases, facts = listed(folder, "nnunet")
    assert [(c.id, c.split, c.modality) for c in cases] == [("la_003", None, "MRI"), ("la_004", None, "MRI")]
    assert (facts.licence, facts.licence_flag, facts.attribution) == ("CC-BY-SA 4.0", "ok", "King's College London")
    raw = load_case(cases[0])
    assert raw.layers[0].names == {1: "left atrium", 2: "wall"}
    np.testing.assert_array_equal(raw.layers[0].array, trees.label_array())


@pytest.mark.parametrize("modalities", [1, 4])
def test_decathlon(tmp_path, modalities):
    folder = trees.msd(tmp_path / "Task01_BrainTumour", modalities=modalities)
    cases, facts = listed(folder, "msd")
    assert [c.id for c in cases] == ["BRATS_001", "BRATS_002"] and facts.licence == "CC-BY-SA 4.0"
    raw = load_case(cases[1])
    assert [name for name, _ in raw.images] == ["FLAIR", "T1w", "t1gd", "T2w"][:modalities]
    for number, (_, volume) in enumerate(raw.images):
        np.testing.assert_array_equal(volume.array, trees.image_array(10 + number))
    assert raw.layers[0].names == {1: "edema", 2: "non-enhancing tumor"}


@pytest.mark.parametrize(("image", "modality"), [("ct", "CT"), ("mri", "MR")])
def test_totalsegmentator(tmp_path, image, modality):
    cases, facts = listed(trees.totalseg(tmp_path / "Totalsegmentator_dataset_v201", image=image), "totalseg")
    assert [(c.id, c.subject, c.split, c.modality) for c in cases] == [
        ("s0000", "s0000", "train", modality),
        ("s0001", "s0001", "test", modality),
    ]
    assert facts.modality == modality
    raw = load_case(cases[0])
    found = structures(raw)
    assert set(found) == {"liver", "spleen"} and len(raw.layers) == 1, (
        "empty masks are no structures, disjoint ones share a layer"
    )
    np.testing.assert_array_equal(found["spleen"], np.roll(trees.label_array((1,)), 2, axis=2) == 1)


def test_plain_folders_with_names_from_source_json(tmp_path):
    folder = trees.plain(tmp_path / "mine", suffix=".mha")
    trees.put_json(
        folder / "source.json", {"labels": {"femur": 1, "tibia": 2}, "modality": "CT", "licence": "own data"}
    )
    cases, facts = listed(folder, "plain")
    assert [c.id for c in cases] == ["anna", "bert"] and (facts.modality, facts.licence_flag) == ("CT", "ok")
    raw = load_case(cases[1])
    assert raw.layers[0].names == {1: "femur", 2: "tibia"} and raw.images[0][0] == "CT"
    np.testing.assert_array_equal(raw.images[0][1].array, trees.image_array(1))


def test_plain_folders_with_patterns_channels_and_one_file_per_structure(tmp_path):
    for case in ("p1", "p2"):
        for seed, channel in enumerate(("flair", "t2")):
            trees.put(tmp_path / "set" / case / f"{case}_{channel}.nii.gz", trees.image_array(seed))
        trees.put(tmp_path / "set" / case / f"{case}_seg.nii.gz", trees.label_array())
        trees.put(tmp_path / "set" / case / "rois" / "edema.nii.gz", trees.label_array((1, 1)))
        trees.put(tmp_path / "set" / case / "rois" / "core.nii.gz", trees.label_array((1,)))
    folder = tmp_path / "set"
    [(reader, _)] = find_sources([folder], patterns=("{case}/{case}_{channel}.nii.gz", "{case}/{case}_seg.nii.gz"))
    cases, problems = reader.cases(folder)
    assert problems == [] and [c.id for c in cases] == ["p1", "p2"]
    raw = load_case(cases[0])
    assert [name for name, _ in raw.images] == ["flair", "t2"] and raw.layers[0].names == {1: "label 1", 2: "label 2"}
    [(reader, _)] = find_sources([folder], "plain", ("{case}/{case}_t2{suffix}", "{case}/rois/{label}{suffix}"))
    raw = load_case(reader.cases(folder)[0][0])
    found = structures(raw)
    assert len(raw.layers) == 2 and {name: int(m.sum()) for name, m in found.items()} == {"core": 30, "edema": 60}


def test_sa_med3d_keeps_each_image_once(tmp_path):
    cases, _ = listed(trees.sa_med3d(tmp_path / "data"), "sa_med3d")
    about = [(c.id, c.subject, c.modality) for c in cases]
    assert about == [
        ("ct_WORD.word_0001", "ct_WORD.word_0001", "CT"),
        ("mr_CHAOS.word_0001", "mr_CHAOS.word_0001", "MR"),
    ]
    raw = load_case(cases[0])
    assert len(raw.images) == 1 and set(structures(raw)) == {"liver", "spleen"}
    assert set(structures(load_case(cases[1]))) == {"liver"}


def test_sa_med3d_accepts_copies_that_were_compressed_differently(tmp_path):
    folder = trees.sa_med3d(tmp_path / "data")
    copy = folder / "spleen" / "ct_WORD" / "imagesTr" / "word_0001.nii.gz"
    before = copy.read_bytes()
    copy.write_bytes(before[:4] + b"\1\2\3\4" + before[8:])  # another time stamp in the gzip header
    assert set(structures(load_case(listed(folder, "sa_med3d")[0][0]))) == {"liver", "spleen"}


def test_npz_of_the_challenge(tmp_path):
    folder = trees.npz(tmp_path / "3D_train")
    cases, _ = listed(folder, "npz")
    assert [(c.id, c.modality) for c in cases] == [("CT_AMOS_amos_0018", "CT"), ("MR_ProstateT2_7", "MR")]
    raw = load_case(cases[0])
    assert raw.grid == Grid(trees.SHAPE, (0.7, 0.8, 5.0)) and raw.layers[0].names == {1: "label 1", 2: "label 2"}
    np.testing.assert_array_equal(raw.images[0][1].array, trees.image_array(0, dtype="uint8"))
    trees.put_json(folder / "source.json", {"spacing_order": "zyx", "labels": {"liver": 1}})
    raw = load_case(READERS["npz"].cases(folder)[0][0])
    assert raw.grid.spacing_xyz_mm == (5.0, 0.8, 0.7) and raw.layers[0].names == {1: "liver", 2: "label 2"}


def test_a_folder_of_data_sets_is_recognised_one_by_one(tmp_path, caplog):
    trees.nnunet_v2(tmp_path / "all" / "brains")
    trees.msd(tmp_path / "all" / "deeper" / "Task01")
    trees.totalseg(tmp_path / "all" / "bodies")
    trees.npz(tmp_path / "all" / "challenge")
    trees.plain(tmp_path / "all" / "mine")
    trees.sa_med3d(tmp_path / "all" / "sa")
    (tmp_path / "all" / "notes").mkdir()
    found = find_sources([tmp_path / "all"])
    assert sorted((reader.name, folder.name) for reader, folder in found) == [
        ("msd", "Task01"),
        ("nnunet", "brains"),
        ("npz", "challenge"),
        ("plain", "mine"),
        ("sa_med3d", "sa"),
        ("totalseg", "bodies"),
    ]
    assert "nothing recognised in" in caplog.text and "notes" in caplog.text
    assert find_sources([tmp_path / "all" / "brains", tmp_path / "all" / "brains"]) == find_sources(
        [tmp_path / "all" / "brains"]
    )


def test_a_format_overrides_recognition(tmp_path):
    folder = trees.nnunet_v1(tmp_path / "d")
    (folder / "imagesTr" / "la_003.nii.gz").write_bytes((folder / "imagesTr" / "la_003_0000.nii.gz").read_bytes())
    assert find_sources([folder])[0][0].name == "msd"
    assert find_sources([folder], "nnunet")[0][0].name == "nnunet"
    with pytest.raises(InputError, match=r"--format must be one of msd, nnunet, .*got 'nifti'"):
        find_sources([folder], "nifti")


def test_label_maps_without_images(tmp_path):
    folder = trees.nnunet_v1(tmp_path / "maps")
    for path in (folder / "imagesTr").iterdir():
        path.unlink()
    raw = load_case(listed(folder, "nnunet")[0][0])
    assert raw.images == [] and raw.layers[0].array.shape == raw.grid.shape_zyx == trees.SHAPE


def test_names_are_safe_and_stay_apart():
    assert safe_name("case_001.a-b") == "case_001.a-b"
    unsafe = ["prostate/uterus", "prostate uterus", "prostate_uterus/", "Müller", "Muller/", "肝臓", "..", "-x", "a."]
    made = [safe_name(name) for name in unsafe]
    assert len(set(made)) == len(unsafe)
    assert all(name == safe_name(name) and "/" not in name and name.isascii() for name in made)
    assert safe_name("M\u00fcller") == safe_name("Mu\u0308ller"), "one name in two Unicode forms"


@pytest.mark.parametrize(
    ("case", "subject"),
    [
        ("patient001_frame12", "patient001"),
        ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
        ("MR_BraTS-GLI-00005-100", "BraTS-GLI-00005"),
        ("sub-03_ses-2_T1w", "sub-03"),
        ("TCGA-DU-7294_1998.01.04_flair", "TCGA-DU-7294"),
        ("liver_12", "liver_12"),
    ],
)
def test_a_person_is_seen_behind_several_cases(case, subject):
    assert subject_of(case) == subject


def test_a_pattern_in_source_json_tells_the_person(tmp_path):
    folder = trees.plain(tmp_path / "SPIDER")
    for case in ("7_t1", "7_t2"):
        trees.put(folder / "images" / f"{case}.nii.gz", trees.image_array())
        trees.put(folder / "labels" / f"{case}.nii.gz", trees.label_array())
    trees.put_json(folder / "source.json", {"subject_pattern": r"^(\d+)_"})
    cases, _ = listed(folder, "plain")
    assert [(c.id, c.subject) for c in cases] == [("7_t1", "7"), ("7_t2", "7"), ("anna", "anna"), ("bert", "bert")]
    for wrong, message in (("(", "must be a regular expression"), (r"^\d", "must have a group")):
        trees.put_json(folder / "source.json", {"subject_pattern": wrong})
        with pytest.raises(InputError, match=f"subject_pattern {message}"):
            READERS["plain"].cases(folder)


def test_layers_hold_what_does_not_overlap():
    masks = {name: np.zeros(trees.SHAPE, bool) for name in "abcd"}
    masks["a"][0], masks["b"][1], masks["c"][:2], masks["d"][4] = True, True, True, True
    layers = pack_layers(iter(masks.items()), trees.SHAPE, "x")
    assert [sorted(layer.names.values()) for layer in layers] == [["a", "b", "d"], ["c"]]
    for layer in layers:
        for value, name in layer.names.items():
            np.testing.assert_array_equal(layer.array == value, masks[name])


def test_layers_hold_more_than_255_structures():
    array = np.arange(2 * 10 * 20).reshape(2, 10, 20)
    [layer] = pack_layers(((f"n{v}", array == v) for v in range(1, 400)), (2, 10, 20), "x")
    assert layer.array.dtype == np.uint16 and layer.names[300] == "n300"
    np.testing.assert_array_equal(layer.array, array)


def test_the_real_data_sets(data_dir):
    found = find_sources([data_dir])
    expected = {path.parent.name for path in data_dir.glob("*/dataset.json")}
    assert {folder.name for _, folder in found} == expected and {reader.name for reader, _ in found} == {"nnunet"}
    counts = {}
    for reader, folder in found:
        cases, problems = reader.cases(folder)
        assert problems == []
        counts[folder.name] = len(cases)
        facts = reader.source(folder)
        assert facts.licence and facts.attribution and facts.licence_flag == "ok"
        if folder.name == "sts_pet":
            assert {c.subject for c in cases} >= {"STS_001", "STS_002"} and len(cases) == 41
        if folder.name in ("tcga_lgg_glioma", "plantseg_nuclei", "labelmaps_knee_pymskt", "sct_spinal_cord_mr"):
            raw = load_case(cases[0])
            assert len(raw.images) == {"tcga_lgg_glioma": 2, "labelmaps_knee_pymskt": 0}.get(folder.name, 1)
            assert raw.layers[0].names and raw.layers[0].array.shape == raw.grid.shape_zyx
    assert counts == {name: len(list((data_dir / name / "labelsTr").glob("*.nii.gz"))) for name in expected}


@pytest.mark.parametrize(
    ("image", "label", "files", "cases"),
    [
        (
            "*/{case}_CT-*.nii.gz",
            "*/{case}_CT-*_seg.nii.gz",
            ["verse500/verse500_CT-ax.nii.gz", "verse500/verse500_CT-ax_seg.nii.gz"],
            ["verse500"],
        ),
        (
            "*/preRT/{case}_T2.nii.gz",
            "*/preRT/{case}_mask.nii.gz",
            ["2/preRT/2_preRT_T2.nii.gz", "2/preRT/2_preRT_mask.nii.gz"],
            ["2_preRT"],
        ),
        (
            "{case}/{case}_IMG_CT.nrrd",
            "{case}/{case}_OAR_{label}.seg.nrrd",
            ["c1/c1_IMG_CT.nrrd", "c1/c1_OAR_A_Carotid_L.seg.nrrd"],
            ["c1"],
        ),
        (
            "*/{case}-{channel}.nii.gz",
            "*/{case}-seg.nii.gz",
            [f"x/BraTS-GLI-00000-000-{n}.nii.gz" for n in ("t1c", "t2f", "seg")],
            ["BraTS-GLI-00000-000"],
        ),
    ],
)
def test_the_patterns_of_the_list_of_datasets(tmp_path, image, label, files, cases):
    for file in files:
        trees.put(tmp_path / "set" / file, trees.label_array((1,)))
    [(reader, folder)] = find_sources([tmp_path / "set"], patterns=(image, label))
    found, problems = reader.cases(folder)
    assert problems == [] and [case.id for case in found] == cases

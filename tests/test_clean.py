"""The cleaning rules one by one, the values of label maps, and the names of categories."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data_prep.categories import GROUPS, categorise, modality_family
from data_prep.clean import Rules, clean_layer, compact_layer, rules_from
from samed3d.data.corpus import POINTS
from samed3d.errors import InputError

MM = (1.0, 1.0, 1.0)
ALL = rules_from("lenient", [])


def block(shape=(40, 40, 40), *boxes: tuple[int, slice, slice, slice]) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    for value, *box in boxes:
        array[tuple(box)] = value
    return array


def cube(value: int, start: int, size: int) -> tuple[int, slice, slice, slice]:
    return (value, *[slice(start, start + size)] * 3)


@pytest.mark.parametrize(
    ("rule", "passes", "fails", "reason"),
    [
        ("min_volume_mm3=1000", 10, 9, r"729 mm3, under 1000"),
        ("min_side_mm=15", 15, 14, r"side of 14 mm, under 15"),
        ("min_voxels=64", 4, 3, r"27 voxels, under 64"),
        ("max_background=0.99", 9, 8, r"background is 99\.20 % of the case, over 99"),
    ],
)
def test_each_rule_drops_what_is_just_below_it(rule, passes, fails, reason):
    rules = rules_from("lenient", [rule, *(["min_voxels=1"] if "voxels" not in rule else [])])
    for size, kept in ((passes, True), (fails, False)):
        _, [found] = clean_layer(block((40, 40, 40), cube(1, 2, size)), {1: "liver"}, MM, rules)
        assert (found.reason == "") is kept
        if not kept:
            assert re.fullmatch(reason, found.reason), found.reason


def test_rules_are_in_millimetres_not_voxels():
    _, [fine] = clean_layer(block((40, 40, 40), cube(1, 2, 20)), {1: "liver"}, (0.5, 0.5, 0.5), Rules(max_background=1))
    assert fine.reason == "side of 10 mm, under 15"


def test_the_measures_of_a_mask():
    array = block((30, 30, 30), (3, slice(4, 9), slice(10, 20), slice(2, 5)))
    _, [found] = clean_layer(array, {3: "spleen"}, MM, ALL)
    assert (found.voxels, found.components) == (150, 1)
    assert (found.start_zyx, found.stop_zyx) == ((4, 10, 2), (9, 20, 5))
    points = np.array(found.points)
    assert (
        points.shape == (POINTS, 3)
        and (array[tuple(points.T)] == 3).all()
        and len(np.unique(points, axis=0)) > POINTS // 2
    )


def test_points_are_spread_over_the_whole_mask_and_do_not_change():
    array = block((40, 40, 40), cube(1, 0, 40))
    first, second = (np.array(clean_layer(array.copy(), {1: "x"}, MM, ALL, seed="a")[1][0].points) for _ in range(2))
    assert np.array_equal(first, second)
    assert (np.ptp(first, axis=0) > 25).all()
    assert not np.array_equal(first, np.array(clean_layer(array, {1: "x"}, MM, ALL, seed="b")[1][0].points))


def test_only_the_largest_pieces_are_kept():
    array = block((40, 40, 40), *[cube(1, 6 * n, n + 1) for n in range(5)])
    kept, [found] = clean_layer(array, {1: "lesion"}, MM, rules_from("lenient", ["keep_components=2"]))
    assert found.components == 5 and found.voxels == 5**3 + 4**3
    assert kept[0, 0, 0] == 0 and kept[24, 24, 24] == 1


def test_both_kidneys_under_one_name_become_left_and_right():
    rules = rules_from("lenient", ["split_sides=true"])
    left, right = (2, slice(5, 15), slice(5, 15), slice(2, 12)), (2, slice(5, 15), slice(5, 15), slice(26, 36))
    array, found = clean_layer(block((40, 40, 40), left, right), {2: "kidneys", 9: "liver"}, MM, rules)
    assert {f.category: f.value for f in found} == {"left kidney": 2, "right kidney": 10}
    assert array[10, 10, 30] == 10 and array[10, 10, 5] == 2, "x runs to the right"
    assert [f.side for f in found] == ["left", "right"]


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("liver", [(1, slice(5, 15), slice(5, 15), slice(2, 12)), (1, slice(5, 15), slice(5, 15), slice(26, 36))]),
        (
            "left kidney",
            [(1, slice(5, 15), slice(5, 15), slice(2, 12)), (1, slice(5, 15), slice(5, 15), slice(26, 36))],
        ),
        ("kidney", [(1, slice(5, 15), slice(5, 15), slice(2, 12))]),
        ("kidney", [(1, slice(5, 15), slice(5, 15), slice(2, 12)), (1, slice(25, 35), slice(5, 15), slice(2, 12))]),
        ("kidney", [(1, slice(5, 15), slice(5, 15), slice(2, 12)), (1, slice(5, 7), slice(5, 7), slice(26, 28))]),
    ],
    ids=["not paired", "has a side", "one piece", "one above the other", "a speck on the other side"],
)
def test_what_is_no_pair_is_not_split(name, boxes):
    _, found = clean_layer(block((40, 40, 40), *boxes), {1: name}, MM, rules_from("lenient", ["split_sides=true"]))
    assert len(found) == 1


def test_splitting_makes_room_beyond_eight_bits():
    boxes = [(250, slice(5, 15), slice(5, 15), slice(2, 12)), (250, slice(5, 15), slice(5, 15), slice(26, 36))]
    array, found = clean_layer(
        block((40, 40, 40), *boxes), {250: "lung", 255: "liver"}, MM, rules_from("lenient", ["split_sides=true"])
    )
    assert sorted(f.value for f in found) == [250, 256] and array.dtype == np.uint16 and (array == 256).sum() == 1000


def test_a_value_without_a_name_is_dropped_and_said():
    _, found = clean_layer(block((40, 40, 40), cube(1, 0, 20), cube(7, 20, 20)), {1: "liver"}, MM, ALL)
    assert [f.reason for f in found] == ["", "value 7 has no name in the source"]


def test_instances_share_the_category_of_their_source():
    _, found = clean_layer(
        block((40, 40, 40), cube(1, 0, 9), cube(2, 20, 9)), {}, MM, ALL, instances=True, source="plantseg_nuclei"
    )
    assert {(f.category, f.anatomy, f.reason) for f in found} == {("plantseg nuclei", "cell", "")}


def test_large_instance_ids_are_compacted_with_their_names():
    array, names = compact_layer(np.array([[[0, 70000, 5, 70000]]]), {5: "five", 70000: "big"})
    assert array.ravel().tolist() == [0, 2, 1, 2] and names == {1: "five", 2: "big"} and array.dtype == np.uint16


def test_presets_and_changes():
    assert rules_from("published", []) == Rules(1000.0, 15.0, 30, 0.99, 5, True)
    assert rules_from("published", ["min_side_mm=5", "split_sides=false"]) == Rules(1000.0, 5.0, 30, 0.99, 5, False)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("strict", [], r"--rules must be one of published, lenient, got 'strict'"),
        ("published", ["size=3"], r"--rule must be NAME=VALUE with a name of min_volume_mm3, .*, got 'size=3'"),
        ("published", ["min_voxels=few"], r"--rule min_voxels must be a int, got 'few'"),
        ("published", ["min_side_mm=-1"], r"--rule min_side_mm must be 0 or more, got -1"),
        ("published", ["max_background=2"], r"--rule max_background must be from 0 to 1, got 2"),
        ("published", ["split_sides=perhaps"], r"--rule split_sides must be a bool, got 'perhaps'"),
    ],
)
def test_bad_rules_are_named(preset, change, message):
    with pytest.raises(InputError, match=message):
        rules_from(preset, change)


@pytest.mark.parametrize(
    ("names", "category", "group"),
    [
        (("kidney_right", "Right Kidney", "rt. kidney", "RightKidney", "kidney_r"), "right kidney", "abdomen"),
        (("vertebrae_L4", "vertebra L4", "L4 vertebra"), "vertebra L4", "bone"),
        (("rib_left_7", "Left rib 7"), "left rib 7", "bone"),
        (("left ventricle cavity", "LV", "heart_ventricle_left"), "left ventricle", "heart"),
        (("Left-Lateral-Ventricle",), "left lateral ventricle", "brain"),
        (("prostate/uterus",), "prostate or uterus", "pelvis"),
        (("oesophagus", "Esophagus"), "esophagus", "thorax"),
        (("gall bladder", "gallbladder"), "gallbladder", "abdomen"),
        (("left masseter",), "left masseter", "muscle"),
        (("Nierentumor",), "nierentumor", "other"),
        (("",), "unnamed", "other"),
    ],
)
def test_names_of_one_structure_are_one_category(names, category, group):
    assert {(categorise(n).name, categorise(n).group) for n in names} == {(category, group)}
    assert group in GROUPS


def test_names_that_mean_something_only_in_their_source_carry_it():
    assert categorise("label_7", "knee_mr").name == "knee mr label 7"
    assert categorise("anterior", "msd_hippocampus").name == "msd hippocampus anterior"
    assert categorise("anterior", "msd_hippocampus").group == "brain"


def test_modalities_fall_into_families():
    said = {
        "CT (portal venous phase)": "CT",
        "MR (T2*)": "MR",
        "PET (FDG)": "PET",
        "3D ultrasound (transrectal)": "ultrasound",
        "FLAIR": "MR",
    }
    assert {text: modality_family(text) for text in said} == said
    assert modality_family("") == "not stated" and modality_family("OCT angiography") == "OCT angiography"

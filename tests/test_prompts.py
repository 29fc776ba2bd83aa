"""Prompts: the JSON form keeps everything, positions become voxels in either space, and each mistake is one clear
line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import oblique_grid
from hypothesis import given
from hypothesis import strategies as st

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.prompts import (
    Box,
    Mask,
    ObjectPrompts,
    Point,
    box_in_grid,
    dump_prompts,
    is_positive,
    load_prompts,
    parse_numbers,
    point_in_grid,
)

GRID = Grid((10, 20, 30))
numbers = st.floats(-1e4, 1e4)
places = st.tuples(numbers, numbers, numbers)
boxes = st.tuples(places, places).map(
    lambda c: Box(tuple(map(min, zip(*c, strict=True))), tuple(map(max, zip(*c, strict=True))))
)
prompts = st.one_of(st.builds(Point, places, st.booleans()), boxes)


@given(given=st.lists(st.lists(prompts, min_size=1, max_size=4), min_size=1, max_size=3))
def test_json_round_trip(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    objects = [ObjectPrompts(n, f"object {n}", listed) for n, listed in enumerate(given, start=1)]
    dump_prompts(objects, path)
    assert load_prompts(path) == objects


def test_json_keeps_the_space_and_the_schema(tmp_path):
    path = tmp_path / "prompts.json"
    dump_prompts([ObjectPrompts(3, "liver", [Point((1, 2, 3), space="ras"), Box((0, 0, 0), (4, 5, 6), "ras")])], path)
    assert json.loads(path.read_text()) == {
        "version": 1,
        "space": "ras",
        "objects": [
            {
                "id": 3,
                "name": "liver",
                "prompts": [
                    {"type": "point", "at": [1, 2, 3], "positive": True},
                    {"type": "box", "min": [0, 0, 0], "max": [4, 5, 6]},
                ],
            }
        ],
    }
    assert load_prompts(path)[0].prompts[0].space == "ras"
    with pytest.raises(InputError, match="must share one space, got both ijk and ras"):
        dump_prompts([ObjectPrompts(1, "x", [Point((1, 2, 3)), Point((1, 2, 3), space="ras")])], path)


BALL = np.ones((2, 2, 2))
OTHER_TYPES = [
    *((lambda at=at: Point(at), "point must be three numbers") for at in (b"abc", {1, 2, 3}, np.ones(3, bool))),
    *((lambda m=m: Mask(m), "mask must hold finite numbers") for m in (BALL * np.nan, BALL.astype(str), BALL * 1j)),
    *((lambda m=m: Mask(m), "mask must be an array or the path of a file") for m in (None, 5, [[[1]]])),
    (lambda: is_positive((1, 2, 3)), r"prompt must be a Point, Box, Scribble, Lasso or Mask, got \(1, 2, 3\)"),
]


@pytest.mark.parametrize(("make", "message"), OTHER_TYPES)
def test_values_of_another_type_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_point_in_either_space():
    assert point_in_grid(Point((1, 2, 3)), GRID) == (1, 2, 3)
    grid = oblique_grid()
    ras = grid.ijk_to_ras_mm((5.25, 1.0, 3.0))
    np.testing.assert_allclose(point_in_grid(Point(ras, space="ras"), grid), (5.25, 1.0, 3.0), atol=1e-9)


@pytest.mark.parametrize("at", [(30, 0, 0), (0, 20, 0), (0, 0, 10), (-1, 0, 0), (10, 5, 19.5)])
def test_point_outside_names_the_bounds(at):
    with pytest.raises(
        InputError, match=r"must lie inside the volume, ijk \(0, 0, 0\) to \(29, 19, 9\), got .*; check --space"
    ):
        point_in_grid(Point(at), GRID)


def test_ras_point_outside_shows_both_spaces():
    with pytest.raises(InputError, match=r"got \(5, 5, 5\) mm RAS \(= voxel \(-5, -5, 5\)\)"):
        point_in_grid(Point((5, 5, 5), space="ras"), GRID)


def test_box_is_clipped_to_the_volume():
    assert box_in_grid(Box((-5, 2, 3), (8, 40, 9)), GRID) == ((0, 2, 3), (8, 19, 9))
    assert box_in_grid(Box((4, 4, 4), (4, 4, 4)), GRID) == ((4, 4, 4), (4, 4, 4))
    assert box_in_grid(Box((-0.4, 4, 9.2), (-0.3, 4, 9.3)), GRID) == (
        (0, 4, 9),
        (0, 4, 9),
    )  # in the outer half of a border voxel
    for low, high in [((30, 0, 0), (31, 5, 5)), ((0, -9, 0), (5, -1, 5)), ((0, 0, 9.5), (5, 5, 12))]:
        with pytest.raises(
            InputError, match=r"box must meet the volume, ijk \(0, 0, 0\) to \(29, 19, 9\), got .* \(ijk\)"
        ):
            box_in_grid(Box(low, high), GRID)


def test_box_in_ras_is_the_voxel_box_around_its_corners():
    # LPS and RAS differ in the sign of x and y, so the order of the corners turns round.
    low, high = box_in_grid(Box((-8, -6, 1), (-2, -3, 4), "ras"), GRID)
    np.testing.assert_allclose([low, high], [(2, 3, 1), (8, 6, 4)], atol=1e-9)
    grid = oblique_grid((20, 20, 20))
    middle = np.array(grid.ijk_to_ras_mm((10, 10, 10)))
    low, high = box_in_grid(Box(tuple(middle - 2), tuple(middle + 2), "ras"), grid)
    np.testing.assert_allclose(np.add(low, high) / 2, (10, 10, 10), atol=1e-9)
    for sign in np.ndindex(2, 2, 2):
        corner = grid.ras_mm_to_ijk(tuple(middle - 2 + 4 * np.array(sign)))
        assert all(lo - 1e-9 <= c <= hi + 1e-9 for lo, c, hi in zip(low, corner, high, strict=True))


def test_what_counts_as_positive():
    for prompts in ([], [Point((1, 2, 3), positive=False)]):
        with pytest.raises(InputError, match=f"object 1 .object. needs a positive .* got {len(prompts)} negative only"):
            ObjectPrompts(prompts=prompts).check_positive()
    ObjectPrompts(prompts=[Point((1, 2, 3), positive=False), Point((1, 2, 3))]).check_positive()
    ObjectPrompts(prompts=[Box((0, 0, 0), (1, 1, 1))]).check_positive()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Point((1, 2)), r"point must be three numbers, got \(1, 2\)"),
        (lambda: Point((1, 2, "a")), "point must be three numbers, got"),
        (lambda: Point(7), "point must be three numbers, got 7"),
        (lambda: Point((1, 2, float("nan"))), "point must be finite, got"),
        (lambda: Point((1, 2, 3), space="lps"), "space must be one of ijk, ras, got 'lps'"),
        (lambda: Box((1, 2, 3, 4), (5, 6, 7)), "box min must be three numbers"),
        (lambda: Box((1, 2, 3), (5, float("inf"), 7)), "box max must be finite"),
        (
            lambda: Box((1, 2, 3), (0, 6, 7)),
            r"box min must not exceed box max .* min \(1, 2, 3\) and max \(0, 6, 7\); swap",
        ),
        (lambda: parse_numbers("1,2", 3, "--point"), "--point needs 3 numbers separated by commas, got '1,2'"),
        (lambda: parse_numbers("1,2,x", 3, "--point"), "--point needs 3 numbers separated by commas, got '1,2,x'"),
        (lambda: parse_numbers("1,2,inf", 3, "--point"), "--point needs 3 numbers"),
    ],
)
def test_bad_prompts(make, message):
    with pytest.raises(InputError, match=message):
        make()


POINT = '{"type": "point", "at": [1, 2, 3]}'


def one_object(prompt: str, entry: str = '"name": "x"') -> str:
    return f'{{"version": 1, "objects": [{{{entry}, "prompts": [{prompt}]}}]}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "prompt file cannot be read: .*No such file"),
        ("{", "prompt file is not JSON"),
        ("[]", 'must be an object with "version": 1'),
        ('{"version": 2}', 'must be an object with "version": 1'),
        ('{"version": 1}', "'objects' must be a list that is not empty"),
        ('{"version": 1, "space": "lps", "objects": []}', "space must be one of ijk, ras"),
        ('{"version": 1, "objects": [{"prompts": []}]}', "object 1: 'prompts' must be a list that is not empty"),
        ('{"version": 1, "objects": [3]}', "object 1: 'prompts' must be a list"),
        (one_object('{"type": "point"}'), "object 1: a point needs 'at'"),
        (
            one_object('{"type": "point", "at": [1, 2, 3], "positive": "no"}'),
            "object 1: positive must be true or false, got 'no'",
        ),
        (one_object('{"type": "text"}'), "prompt type must be one of point, box, scribble, lasso, mask, got 'text'"),
        (one_object('{"type": ["box"]}'), r"prompt type must be one of .*, got \['box'\]"),
        (one_object('{"type": "lasso"}'), "object 1: a lasso needs 'outline'"),
        (one_object('{"type": "lasso", "outline": [[1, 2, 3]]}'), "lasso must have 3 to 10000 positions, got 1"),
        (one_object('{"type": "scribble", "path": 3}'), "scribble must be a list of positions, got 3"),
        (
            one_object('{"type": "scribble", "path": [[1, 2, 3]], "radius_vox": "big"}'),
            "object 1: scribble radius_vox must be a number from 0 to 50, got 'big'",
        ),
        (
            one_object('{"type": "scribble", "path": [[1, 2, 3]], "radius_vox": -1}'),
            "scribble radius_vox must be a number from 0 to 50, got -1",
        ),
        (one_object('{"type": "mask", "path": 7}'), "path of a mask must be a file name, got 7"),
        (one_object('{"type": "mask"}'), "mask size must be three whole numbers, got None"),
        (
            one_object('{"type": "mask", "size": [2, 2, 2], "start": [0, 0, 0], "stop": [3, 1, 1]}'),
            "start and stop must lie in its size",
        ),
        (
            one_object('{"type": "mask", "size": [2, 2, 2], "start": [0, 0, 0], "stop": [2, 2, 2], "bits": "AA"}'),
            "mask bits are damaged",
        ),
        (one_object('{"type": "box", "min": [3, 0, 0], "max": [1, 1, 1]}'), "box min must not exceed box max"),
        (one_object(POINT, '"id": "x"'), "object 1: object id must be a whole number from 1 to 65535, got 'x'"),
        (one_object(POINT, '"id": 0'), "object 1: object id must be a whole number from 1 to 65535, got 0"),
        (
            one_object(POINT, '"id": 2')[:-2] + f', {{"prompts": [{POINT}]}}]}}',
            "object 2: id must differ .* got 2 again",
        ),
    ],
)
def test_bad_prompt_files(tmp_path, text, message):
    path = tmp_path / "prompts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [{"type": "point", "at": [1, 2, 3], "postive": False}]}, "'postive'; did you mean positive"),
        ({"prompts": [{"type": "box", "min": [1, 2, 3], "max": [4, 5, 6], "label": 0}]}, "no key 'label'"),
        ({"Name": "liver"}, "no key 'Name'; did you mean name"),
        ({"name": "\ud800"}, "name must be text"),
        ({"prompts": [{"type": "point", "at": [10**400, 2, 3]}]}, "point must be three numbers"),
    ],
)
def test_unknown_keys_and_broken_values_of_a_prompt_file_are_refused(tmp_path, change, message):
    entry = {"id": 1, "prompts": [{"type": "point", "at": [1, 2, 3]}], **change}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "objects": [entry]}))
    with pytest.raises(InputError, match=re.escape(message)):
        load_prompts(tmp_path / "p.json")


def test_a_prompt_file_with_a_byte_order_mark_is_read_and_deep_nesting_is_refused(tmp_path):
    body = {"version": 1, "objects": [{"prompts": [{"type": "point", "at": [1, 2, 3]}]}]}
    (tmp_path / "p.json").write_text("\ufeff" + json.dumps(body), encoding="utf-8")
    assert load_prompts(tmp_path / "p.json")[0].prompts == [Point((1, 2, 3))]
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        load_prompts(tmp_path / "p.json")

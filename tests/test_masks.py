"""Cleaning and measuring masks: in millimetres, on any storage order, in a session, and by the commands."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.session import Session
from samed3d.masks import Cleaning, clean_labels, measure_mask
from samed3d.prompts import Mask, Point
from samed3d.volume import Volume, read_volume, write_mask, write_volume
from tests.clicked_model import ClickedModel

SHAPE, SPACING = (24, 40, 44), (2.0, 1.0, 1.0)  # z, y, x
GRID = Grid(SHAPE, SPACING[::-1])
Z, Y, X = np.indices(SHAPE)


def ball(z: float, y: float, x: float, radius_mm: float) -> np.ndarray:
    """Voxels whose centre is at most ``radius_mm`` from a voxel position."""
    return ((Z - z) * 2.0) ** 2 + (Y - y) ** 2 + (X - x) ** 2 <= radius_mm**2


BIG, SMALL = ball(12, 20, 14, 10), ball(12, 20, 36, 4)


@pytest.mark.parametrize(
    ("cleaning", "before", "after"),
    [
        (Cleaning(), BIG | SMALL, BIG | SMALL),
        (Cleaning(keep_largest=True), BIG | SMALL, BIG),
        (Cleaning(min_island_mm3=2 * SMALL.sum() - 1), BIG | SMALL, BIG | SMALL),
        (Cleaning(min_island_mm3=2 * SMALL.sum() + 1), BIG | SMALL, BIG),
        (Cleaning(min_island_mm3=1e9), BIG | SMALL, BIG & False),
        (Cleaning(fill_holes=True), BIG & ~ball(12, 20, 14, 4), BIG),
        (Cleaning(fill_holes=True, keep_largest=True), (BIG & ~ball(12, 20, 14, 4)) | SMALL, BIG),
        (Cleaning(keep_largest=True), BIG & False, BIG & False),
    ],
)
def test_pieces_and_holes(cleaning, before, after):
    assert np.array_equal(cleaning.apply(before, SPACING), after)


@pytest.mark.parametrize("mm", [-4.0, -2.0, 2.0, 4.0])
def test_growing_and_shrinking_are_in_millimetres_along_every_axis(mm):
    changed = Cleaning(grow_mm=mm).apply(BIG, SPACING)
    assert (changed & ~BIG).any() == (mm > 0) and (BIG & ~changed).any() == (mm < 0)
    for axis, spacing in enumerate(SPACING):
        extent = changed.any(axis=tuple(a for a in range(3) if a != axis)).sum() * spacing
        assert extent == pytest.approx(20 + 2 * mm, abs=2.01 * spacing)


def test_smoothing_rounds_a_spike_off_and_keeps_the_size():
    spike = np.zeros(SHAPE, bool)
    spike[12, 20, 20:34] = True
    smooth = Cleaning(smooth_mm=2).apply(BIG | spike, SPACING)
    assert not smooth[12, 20, 28:].any() and abs(int(smooth.sum()) - int(BIG.sum())) < 0.1 * BIG.sum()


@pytest.mark.parametrize("wrong", [{"smooth_mm": -1}, {"min_island_mm3": float("nan")}, {"grow_mm": float("inf")}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be a number"):
        Cleaning(**wrong)


def test_a_structure_that_grows_takes_no_voxel_of_another():
    labels = np.zeros(SHAPE, np.uint16)
    labels[BIG], labels[ball(12, 20, 27, 4)] = 1, 700
    grown = clean_labels(labels, SPACING, Cleaning(grow_mm=3))
    assert np.array_equal(grown[labels > 0], labels[labels > 0])
    assert all((grown == value).sum() > (labels == value).sum() for value in (1, 700)) and grown.dtype == labels.dtype


@pytest.mark.parametrize("degrees", [0, 30, 45, 90])
@pytest.mark.parametrize("permuted", [False, True])
def test_axial_diameters_of_an_ellipse_in_any_direction(degrees, permuted):
    turn = np.radians(degrees)
    along = (X - 22) * np.cos(turn) + (Y - 20) * np.sin(turn)
    across = (Y - 20) * np.cos(turn) - (X - 22) * np.sin(turn)
    mask = (along / 15) ** 2 + (across / 6) ** 2 + ((Z - 12) / 8) ** 2 <= 1
    image, grid = np.where(mask, 7.0, 0.0), GRID
    if permuted:  # stored z first; the axial plane is the patient's, not the array's
        mask, image = (np.ascontiguousarray(a.transpose(2, 0, 1)) for a in (mask, image))
        grid = Grid(mask.shape, (1.0, 2.0, 1.0), direction_lps=(0, 0, 1, 1, 0, 0, 0, 1, 0))
    found = measure_mask(mask, grid, image)
    assert found["longest_axial_mm"] == pytest.approx(30, abs=1.5)
    assert found["perpendicular_mm"] == pytest.approx(12, abs=1.5)
    assert found["ml"] == pytest.approx(mask.sum() * 2 / 1000)
    assert (found["mean"], found["sd"], found["pieces"]) == (7.0, 0.0, 1)


@pytest.fixture
def session():
    array = (100.0 * (BIG | SMALL) + np.random.default_rng(0).normal(0, 5, SHAPE)).astype(np.float32)
    flipped = Grid(SHAPE, SPACING[::-1], direction_lps=(-1, 0, 0, 0, 1, 0, 0, 0, 1))
    opened = Session(Volume(array, flipped, "image"), ClickedModel())
    opened.add(Mask(BIG | SMALL))
    return opened


def test_in_a_session_cleaning_is_an_edit_that_later_prompts_go_on_from(session, tmp_path):
    update = session.clean(Cleaning(keep_largest=True))
    assert np.array_equal(session.mask.astype(bool), BIG) and update.changed and not update.mask.any()
    session.save(tmp_path / "session.json")
    session.undo()
    assert np.array_equal(session.mask.astype(bool), BIG | SMALL)
    session.redo()
    session.add(Point((14.0, 20.0, 12.0), positive=False))
    assert not session.mask[12, 20, 14] and not (session.mask.astype(bool) & SMALL).any()


def test_nothing_to_clean_and_nothing_left_are_refused(session):
    with pytest.raises(InputError, match="nothing of object 1; use smaller values"):
        session.clean(Cleaning(grow_mm=-50))
    assert np.array_equal(session.mask.astype(bool), BIG | SMALL)
    number = session.new_object()
    with pytest.raises(InputError, match=f"object {number} has no voxel to clean"):
        session.clean(Cleaning(fill_holes=True))


@pytest.fixture
def files(tmp_path):
    write_volume(tmp_path / "image.nii.gz", (100 * BIG + Z).astype(np.int16), GRID)
    labels = np.zeros(SHAPE, np.uint8)
    labels[BIG], labels[SMALL] = 3, 5
    write_mask(tmp_path / "labels.nii.gz", labels, GRID)
    return tmp_path


def test_the_commands_clean_and_measure(files, capsys):
    labels, cleaned = str(files / "labels.nii.gz"), files / "cleaned.nrrd"
    assert main(["clean", labels, "-o", str(cleaned), "--min-island-mm3", "1000"]) == 0
    assert set(np.unique(read_volume(cleaned).array)) == {0, 3}
    for suffix in ("csv", "json"):
        assert main(["measure", str(files / "image.nii.gz"), labels, "-o", str(files / f"sizes.{suffix}")]) == 0
    rows = list(csv.DictReader((files / "sizes.csv").open()))
    assert [row["label"] for row in rows] == ["3", "5"]
    assert float(rows[0]["ml"]) == pytest.approx(4 * np.pi / 3, rel=0.1) and float(rows[0]["mean"]) == pytest.approx(
        112
    )
    assert json.loads((files / "sizes.json").read_text())["structures"][1]["voxels"] == SMALL.sum()


def test_segment_cleans_what_it_found(files):
    write_mask(files / "both.nii.gz", BIG | SMALL, GRID)
    start = ["segment", str(files / "image.nii.gz"), "--mask", str(files / "both.nii.gz"), "--device", "cpu"]
    assert main([*start, "-o", str(files / "mask.nii.gz"), "--keep-largest"]) == 0
    assert np.array_equal(read_volume(files / "mask.nii.gz").array.astype(bool), BIG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "--batch", "list.csv", "-o", "out", "--fill-holes"], "--batch takes images and prompts"),
        (["clean", "labels.nii.gz", "-o", "out.nii.gz"], "clean needs something to do"),
        (["clean", "labels.nii.gz", "-o", "labels.nii.gz", "--keep-largest"], "labels.nii.gz"),
        (["clean", "labels.nii.gz", "-o", "out.txt", "--keep-largest"], "out.txt"),
        (["clean", "labels.nii.gz", "-o", "out.nii.gz", "--grow-mm", "-90"], "would leave nothing"),
        (["measure", "image.nii.gz", "none.nii.gz"], "does not exist"),
        (["measure", "image.nii.gz", "labels.nii.gz", "-o", "image.nii.gz"], "image.nii.gz"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before

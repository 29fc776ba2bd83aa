"""DICOM-SEG and RTSTRUCT on the grid of their image: exact voxels, in any slice order, for the right series."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="reading DICOM labels needs pydicom")

from data_prep.readers import find_sources, load_case  # noqa: E402
from samed3d.errors import InputError  # noqa: E402
from samed3d.geometry import Grid  # noqa: E402
from samed3d.volume import read_volume  # noqa: E402
from samed3d.volume.contours import fill_contours  # noqa: E402
from samed3d.volume.dicom_labels import read_dicom_labels  # noqa: E402
from tests import dicom_trees as dicom  # noqa: E402

SHAPE = (5, 9, 11)  # 99 pixels per frame: packed bits of one frame end inside a byte


@pytest.fixture
def array(rng):
    return rng.integers(-1000, 1000, SHAPE).astype(np.int16)


@pytest.fixture
def masks(rng):
    """Two that overlap and one with empty slices at both ends and in the middle."""
    gappy = np.zeros(SHAPE, bool)
    gappy[1, 2:5, 3:6] = gappy[3, 4:8, 1:9] = True
    return {"liver": rng.random(SHAPE) < 0.4, "tumour": rng.random(SHAPE) < 0.1, "gap": gappy}


def rectangle(i0, i1, j0, j1, k):
    return np.array([[i0, j0, k], [i1, j0, k], [i1, j1, k], [i0, j1, k]], float)


def cases_of(folder):
    [(reader, found)] = find_sources([folder])
    assert (reader.name, found) == ("dicom", folder)
    return reader.cases(folder)


def structures(raw):
    return {name: layer.array == value for layer in raw.layers for value, name in layer.names.items()}


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_a_segmentation_by_another_program_comes_back_voxel_by_voxel(tmp_path, array, masks, kind):
    pytest.importorskip("highdicom", reason="writes the DICOM-SEG to read")
    dicom.image_series(tmp_path / "tree" / "P1" / "ct", array)
    dicom.segmentation(tmp_path / "tree" / "P1" / "seg" / "seg.dcm", tmp_path / "tree" / "P1" / "ct", masks, kind=kind)
    cases, problems = cases_of(tmp_path / "tree")
    assert problems == [] and [(c.subject, c.modality) for c in cases] == [("P1", "CT")]
    raw = load_case(cases[0])
    np.testing.assert_array_equal(raw.images[0][1].array, array)
    found = structures(raw)
    assert set(found) == set(masks) and len(raw.layers) > 1
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def test_a_label_map_segmentation(tmp_path, array, masks):
    pytest.importorskip("highdicom", reason="writes the DICOM-SEG to read")
    dicom.image_series(tmp_path / "ct", array)
    masks = {"liver": masks["liver"] & ~masks["tumour"], "tumour": masks["tumour"]}
    dicom.segmentation(tmp_path / "seg.dcm", tmp_path / "ct", masks, kind="LABELMAP")
    found = structures(load_case(cases_of(tmp_path)[0][0]))
    assert set(found) == set(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def test_a_segmentation_with_its_slices_the_other_way_round_is_placed_by_position(tmp_path, array, masks):
    pytest.importorskip("highdicom", reason="writes the DICOM-SEG to read")
    import pydicom

    dicom.image_series(tmp_path / "ct", array)
    path = dicom.segmentation(tmp_path / "seg.dcm", tmp_path / "ct", {"gap": masks["gap"]})
    data = pydicom.dcmread(path)
    frames = data.pixel_array
    assert len(frames) == 2, "empty frames are not stored"
    data.PerFrameFunctionalGroupsSequence = list(data.PerFrameFunctionalGroupsSequence)[::-1]
    data.PixelData = np.packbits(frames[::-1].ravel(), bitorder="little").tobytes() + b"\0"
    data.save_as(path)
    np.testing.assert_array_equal(structures(load_case(cases_of(tmp_path)[0][0]))["gap"], masks["gap"])


def test_a_segmentation_on_finer_voxels_is_resampled_by_position(tmp_path, array):
    pytest.importorskip("highdicom", reason="writes the DICOM-SEG to read")
    # Both series start at the same voxel centre; the finer one has a third of the spacing, so its voxels 0, 3, 6 ...
    # are the image's.
    dicom.image_series(tmp_path / "ct", array)
    fine = np.zeros((5, 25, 31), np.int16)
    fine[0, 0, 0] = 1
    dicom.image_series(tmp_path / "fine", fine, name="fine", spacing=(0.8 / 3, 0.7 / 3, 2.5))
    mask = np.zeros(fine.shape, bool)
    mask[1:4, 6:15, 9:21] = True
    path = dicom.segmentation(tmp_path / "seg.dcm", tmp_path / "fine", {"box": mask})
    import pydicom

    data = pydicom.dcmread(path)
    data.ReferencedSeriesSequence[0].SeriesInstanceUID = dicom.uid("P1", "a")
    data.save_as(path)
    raw = load_case(cases_of(tmp_path)[0][0])
    assert raw.grid.shape_zyx == SHAPE
    np.testing.assert_array_equal(structures(raw)["box"], mask[:, ::3, ::3])


def test_a_structure_set_fills_the_voxels_whose_centres_are_inside(tmp_path, array):
    dicom.image_series(tmp_path / "P1" / "ct", array)
    hole = [rectangle(0.6, 8.4, 0.6, 7.4, 2), rectangle(2.6, 5.4, 2.6, 5.4, 2), rectangle(3.6, 4.4, 3.6, 4.4, 2)]
    keyhole = (
        np.array([[1, 1], [8, 1], [8, 7], [1, 7], [1, 3], [3, 3], [3, 5], [5, 5], [5, 3], [3, 3], [1, 3]], float) + 0.5
    )
    contours = {
        "box": [rectangle(1.5, 6.5, 2.5, 5.5, k) for k in (1, 2, 3)],
        "ring": hole,
        "keyhole": [np.column_stack([keyhole, np.full(len(keyhole), 4.0)])],
        "thin": [rectangle(1.2, 1.4, 1.2, 1.4, 0)],
    }
    dicom.structure_set(tmp_path / "P1" / "rt" / "rt.dcm", tmp_path / "P1" / "ct", contours)
    cases, problems = cases_of(tmp_path)
    assert problems == []
    found = structures(load_case(cases[0]))
    expected = {name: np.zeros(SHAPE, bool) for name in ("box", "ring", "keyhole")}
    expected["box"][1:4, 3:6, 2:7] = True
    expected["ring"][2, 1:8, 1:9] = True
    expected["ring"][2, 3:6, 3:6] = False
    expected["ring"][2, 4, 4] = True
    expected["keyhole"][4, 2:8, 2:9] = True
    expected["keyhole"][4, 4:6, 4:6] = False
    assert set(found) == set(expected), "a contour around no voxel centre is no structure"
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def test_contours_follow_the_even_odd_rule_for_any_polygon(rng):
    grid = Grid((1, 40, 50))
    for _ in range(10):
        corners = rng.uniform(-5, 55, (int(rng.integers(3, 12)), 2))
        filled = fill_contours([np.column_stack([corners, np.zeros(len(corners))])], grid, "p")[0]
        following = np.roll(corners, -1, axis=0)
        j, i = np.mgrid[:40, :50].astype(float)
        inside = np.zeros((40, 50), bool)
        for (i0, j0), (i1, j1) in zip(corners, following, strict=True):  # rays to the left, every voxel by itself
            inside ^= ((j0 <= j) != (j1 <= j)) & (i0 + (j - j0) / (j1 - j0) * (i1 - i0) <= i)
        np.testing.assert_array_equal(filled, inside)


@pytest.mark.parametrize("exclusive_or", [False, True])
@pytest.mark.parametrize(
    ("contours", "filled", "xor_filled", "left_out"),
    [
        ([(1, 8, 1, 8)] * 2, "1-8", "1-8", "1 stored twice"),
        ([(1, 8, 1, 8)] * 4, "1-8", "1-8", "3 stored twice"),
        ([(1, 8, 1, 8), (8, 1, 8, 1), (1, 8, 1.001, 8)], "1-8", "1-8", "2 stored twice"),
        ([(1, 6, 1, 8), (4, 9, 1, 8)], "1-9", "1-4 6-9", ""),
        ([(1, 9, 1, 9), (3, 7, 3, 7)], "1-3 7-9", "1-3 7-9", ""),
        ([(3, 7, 3, 7), (1, 9, 1, 9)], "1-3 7-9", "1-3 7-9", ""),
        ([(1, 9, 1, 9), (3, 7, 3, 7), (4, 6, 4, 6)], "1-3 4-6 7-9", "1-3 4-6 7-9", ""),
        ([(1, 9, 1, 9), (3, 7, 3, 7), (3, 7, 3, 7)], "1-3 7-9", "1-3 7-9", "1 stored twice"),
        ([(1, 9, 1, 9), (2, 5, 2, 8), (4, 7, 2, 8)], "1-2 7-9", "1-2 4-5 7-9", ""),
        ([(1, 4, 1, 8), (6, 9, 1, 8)], "1-4 6-9", "1-4 6-9", ""),
    ],
)
def test_contours_of_one_slice_are_combined(caplog, contours, filled, xor_filled, left_out, exclusive_or):
    """Rectangles as (i0, i1, j0, j1) less half a voxel; the row through their middle says what is filled."""
    outlines = [rectangle(*(v - 0.5 for v in corners), 0) for corners in contours]
    with caplog.at_level("WARNING"):
        row = fill_contours(outlines, Grid((1, 10, 10)), "r", exclusive_or=exclusive_or)[0, 5]
    expected = np.zeros(10, bool)
    for run in (xor_filled if exclusive_or else filled).split():
        start, stop = map(int, run.split("-"))
        expected[start:stop] = True
    np.testing.assert_array_equal(row, expected)
    assert [r.getMessage() for r in caplog.records] == [f"contours of 'r' are left out: {left_out}"] * bool(left_out)


def test_contours_that_are_left_out_are_listed(tmp_path, array, caplog):
    """Points, open contours, too few points and contours between slices; the rest of the structure is kept."""
    import pydicom

    dicom.image_series(tmp_path / "ct", array)
    box = rectangle(1.5, 6.5, 2.5, 5.5, 1)
    drawn = [box, rectangle(1.5, 6.5, 2.5, 5.5, 2.5), box, box[:1], box[:2], box, box]
    path = dicom.structure_set(tmp_path / "rt.dcm", tmp_path / "ct", {"box": drawn, "isocentre": [box[:1]]})
    data = pydicom.dcmread(path)
    first, second = (roi.ContourSequence for roi in data.ROIContourSequence)
    for contour, kind in ((first[3], "POINT"), (first[5], "OPEN_PLANAR"), (first[6], None), (second[0], "POINT")):
        contour.ContourGeometricType = kind or "CLOSED_PLANAR"
    del first[6].ContourData
    data.save_as(path)
    with caplog.at_level("WARNING"):
        [(name, mask)] = read_dicom_labels(path, load_case(cases_of(tmp_path)[0][0]).grid)
    assert (name, mask.sum()) == ("box", 15)
    assert [r.getMessage() for r in caplog.records][-2:] == [
        "contours of 'box' are left out: 1 of type POINT, 1 of type OPEN_PLANAR, 1 not in a slice, 1 stored twice, "
        "2 of fewer than three points",
        "contours of 'isocentre' are left out: 1 of type POINT",
    ]


def test_a_disc_has_the_area_of_a_disc():
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    points = np.column_stack([50.3 + 30 * np.cos(angle), 49.6 + 30 * np.sin(angle), np.full(400, 1.0)])
    for one in (points, points[::-1]):
        assert fill_contours([one], Grid((2, 100, 100)), "disc").sum() == pytest.approx(np.pi * 30**2, rel=0.005)


def test_the_series_that_is_referred_to_is_taken_among_several(tmp_path, array, rng):
    other = rng.integers(0, 50, (7, 8, 8)).astype(np.int16)
    dicom.image_series(tmp_path / "P1" / "all", other, name="scout")
    for path in (tmp_path / "P1" / "all").glob("*.dcm"):
        path.rename(path.with_name(f"scout{path.name}"))
    dicom.image_series(tmp_path / "P1" / "all", array, name="ct")
    dicom.image_series(tmp_path / "P2" / "ct", array + 1, patient="P2", name="ct")
    ct_only = tmp_path / "elsewhere"
    dicom.image_series(ct_only, array, name="ct")
    dicom.structure_set(tmp_path / "P1" / "all" / "rt.dcm", ct_only, {"box": [rectangle(1.5, 6.5, 2.5, 5.5, 1)]})
    dicom.structure_set(
        tmp_path / "P2" / "rt.dcm", tmp_path / "P2" / "ct", {"box": [rectangle(1.5, 6.5, 2.5, 5.5, 1)]}, refers_to=None
    )
    for path in ct_only.glob("*.dcm"):
        path.unlink()
    cases, problems = cases_of(tmp_path)
    assert problems == [] and [c.subject for c in cases] == ["P1", "P2"]
    np.testing.assert_array_equal(load_case(cases[0]).images[0][1].array, array)
    np.testing.assert_array_equal(load_case(cases[1]).images[0][1].array, array + 1)


def test_two_structure_sets_of_one_series_are_one_case(tmp_path, array):
    dicom.image_series(tmp_path / "P1" / "ct", array)
    for name, edge in (("reader1", 6.5), ("reader2", 7.5)):
        dicom.structure_set(
            tmp_path / "P1" / f"{name}.dcm", tmp_path / "P1" / "ct", {"GTV": [rectangle(1.5, edge, 2.5, 5.5, 1)]}
        )
    cases, problems = cases_of(tmp_path)
    assert problems == [] and len(cases) == 1
    assert {n: int(m.sum()) for n, m in structures(load_case(cases[0])).items()} == {"GTV": 15, "GTV (reader2)": 18}


def test_a_structure_set_of_another_series_is_a_problem_that_names_both(tmp_path, array):
    held = dicom.image_series(tmp_path / "P1" / "ct", array)
    dicom.structure_set(
        tmp_path / "P1" / "rt.dcm", tmp_path / "P1" / "ct", {"box": [rectangle(1, 6, 2, 5, 1)]}, refers_to="1.2.3.4"
    )
    cases, problems = cases_of(tmp_path)
    assert cases == [] and len(problems) == 1
    assert problems[0].path.endswith("rt.dcm")
    assert problems[0].reason == f"RTSTRUCT points at another series, 1.2.3.4, which is not there; there is {held}"


@pytest.mark.parametrize(
    ("contour", "message"),
    [
        (
            rectangle(1, 6, 2, 5, 1.5),
            r"contours of 'box' must lie in the slices of the image, one is 0\.50 slices away",
        ),
        (np.array([[1, 1, 0], [6, 1, 3], [6, 5, 3.0]]), r"contours of 'box' must lie in the slices of the image"),
        (rectangle(1, 6, 2, 5, 60), r"contours of 'box' lie outside the image; they were drawn on another series"),
    ],
)
def test_contours_that_do_not_belong_to_the_image_are_refused(tmp_path, array, contour, message):
    dicom.image_series(tmp_path / "P1" / "ct", array)
    dicom.structure_set(tmp_path / "P1" / "rt.dcm", tmp_path / "P1" / "ct", {"box": [contour]})
    with pytest.raises(InputError, match=message):
        load_case(cases_of(tmp_path)[0][0])


def test_images_without_label_and_files_that_are_damaged_are_problems(tmp_path, array):
    dicom.image_series(tmp_path / "P1" / "ct", array)
    (tmp_path / "P1" / "broken.dcm").write_bytes(b"not DICOM at all")
    (tmp_path / "P1" / "LICENSE").write_text("free")
    cases, problems = cases_of(tmp_path)
    assert cases == []
    assert [p.reason for p in problems] == [
        "not a DICOM file although its name ends in .dcm",
        "image has no label: no SEG or RTSTRUCT refers to a series of P1",
    ]


def test_empty_and_damaged_labels_are_refused(tmp_path, array):
    dicom.image_series(tmp_path / "P1" / "ct", array)
    path = dicom.structure_set(
        tmp_path / "P1" / "rt.dcm", tmp_path / "P1" / "ct", {"thin": [rectangle(1.2, 1.4, 1.2, 1.4, 0)]}
    )
    case = cases_of(tmp_path)[0][0]
    with pytest.raises(InputError, match=r"label is empty, no structure has a voxel; leave the case out: .*rt\.dcm"):
        load_case(case)
    import pydicom

    data = pydicom.dcmread(path)
    del data.StructureSetROISequence
    data.save_as(path)
    with pytest.raises(InputError, match=r"DICOM label is damaged or incomplete: .*rt\.dcm"):
        load_case(case)
    with pytest.raises(InputError, match=r"DICOM label must be SEG or RTSTRUCT, got CT"):
        list(read_dicom_labels(next((tmp_path / "P1" / "ct").glob("*.dcm")), Grid(SHAPE)))


def test_a_segmentation_from_the_clinic_is_placed_by_position(tmp_path):
    """One frame of a liver, written by dcmqi, as pydicom ships it; read onto images that are stored in three ways."""
    import pydicom
    from pydicom.data import get_testdata_file

    data = pydicom.dcmread(str(get_testdata_file("liver_1frame.dcm")))
    path = tmp_path / "liver.dcm"
    data.save_as(path)
    grid = Grid((3, 512, 512), (0.8105470, 0.8105470, 1.0), (-235.2, -226.8, -129.69))
    with pytest.raises(InputError, match=r"DICOM label is damaged or incomplete: .*liver\.dcm"):
        list(read_dicom_labels(path, grid))  # the file states positions for two frames that were taken out
    data.PerFrameFunctionalGroupsSequence = data.PerFrameFunctionalGroupsSequence[:1]
    data.save_as(path)
    expected = data.pixel_array.reshape(512, 512) == 1
    [(name, mask)] = read_dicom_labels(path, grid)
    assert name == "Liver" and [int(plane.sum()) for plane in mask] == [0, int(expected.sum()), 0]
    np.testing.assert_array_equal(mask[1], expected)
    corner = -235.2 + 511 * 0.8105470
    mirrored = Grid(grid.shape_zyx, grid.spacing_xyz_mm, (corner, -226.8, -127.69), (-1, 0, 0, 0, 1, 0, 0, 0, -1))
    np.testing.assert_array_equal(next(read_dicom_labels(path, mirrored))[1][1, :, ::-1], expected)
    coronal = Grid((512, 3, 512), (0.8105470, 1.0, 0.8105470), (-235.2, -226.8, -129.69), (1, 0, 0, 0, 0, 1, 0, 1, 0))
    np.testing.assert_array_equal(next(read_dicom_labels(path, coronal))[1][:, 1], expected)
    with pytest.raises(
        InputError, match="segmentation lies outside the image; it was drawn on another series: .*liver"
    ):
        list(read_dicom_labels(path, Grid((3, 512, 512), grid.spacing_xyz_mm, (900.0, 0.0, 0.0))))


@pytest.mark.parametrize(("shift", "turned"), [(0.5, False), (0.3, False), (0.0, True)])
def test_a_segmentation_between_the_slices_of_its_image_is_refused(tmp_path, shift, turned):
    pytest.importorskip("highdicom", reason="reading DICOM-SEG needs highdicom")
    dicom.image_series(tmp_path / "ct", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16))
    mask = np.zeros(SHAPE, bool)
    mask[1:3, 2:8, 2:9] = True
    path = dicom.segmentation(tmp_path / "seg.dcm", tmp_path / "ct", {"a": mask})
    grid = read_volume(tmp_path / "ct").grid
    direction = np.reshape(grid.direction_lps, (3, 3))
    origin = np.array(grid.origin_lps_mm) + direction[:, 2] * shift * grid.spacing_xyz_mm[2]
    if turned:
        c, s = np.cos(0.2), np.sin(0.2)
        direction = direction @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    moved = Grid(grid.shape_zyx, grid.spacing_xyz_mm, tuple(origin), tuple(direction.ravel()))
    [(_, placed)] = read_dicom_labels(path, grid)
    np.testing.assert_array_equal(placed, mask)
    with pytest.raises(InputError, match="must lie on the slices of the image, it is 0.[2-5]. slices away"):
        list(read_dicom_labels(path, moved))


def test_what_reading_decided_is_a_warning_of_the_corpus(tmp_path):
    pytest.importorskip("highdicom", reason="reading DICOM-SEG needs highdicom")
    from dicom_kinds import image, setting, stack

    from data_prep.convert import Settings
    from data_prep.pipeline import prepare

    inverted = setting(PhotometricInterpretation="MONOCHROME1", PositionReferenceIndicator="")
    stack(tmp_path / "in" / "ct", image((8, 20, 24)), change=inverted)
    mask = np.zeros((8, 20, 24), bool)
    mask[1:7, 4:16, 4:18] = True
    dicom.segmentation(tmp_path / "in" / "seg.dcm", tmp_path / "in" / "ct", {"a": mask})
    result = prepare([tmp_path / "in"], tmp_path / "out", Settings())
    assert result.counts["warnings"] == 1 and not result.failed
    [_, line] = (tmp_path / "out" / "problems.csv").read_text().splitlines()
    assert ",warning," in line and "MONOCHROME1" in line and str(tmp_path / "in" / "ct") in line

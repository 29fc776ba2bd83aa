"""Masks in every format, read back by other programs: DICOM-SEG by highdicom, RTSTRUCT by our reader, .seg.nrrd by ITK
and its header."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Mask, Point
from samed3d.volume import read_volume
from samed3d.volume.contours import toggle_polygon, trace_contours
from tests.clicked_model import ClickedModel
from tests.test_session import ball_volume

SHAPE = (6, 9, 11)


def with_masks(session: Session, masks: dict[str, np.ndarray]) -> Session:
    for number, (name, mask) in enumerate(masks.items(), start=1):
        session.add(Mask(mask), object_id=number * 2, name=name)
    return session


@pytest.fixture
def masks(rng) -> dict[str, np.ndarray]:
    """One with holes and islands, one that overlaps it, one with gaps between its slices."""
    gaps = np.zeros(SHAPE, np.uint8)
    gaps[1, 2:5, 3:6] = gaps[4, 4:8, 1:9] = 1
    return {
        "léber": (rng.random(SHAPE) < 0.5).astype(np.uint8),
        "tumour": (rng.random(SHAPE) < 0.1).astype(np.uint8),
        "gaps": gaps,
    }


@pytest.fixture
def dicom_session(tmp_path, rng, masks) -> Session:
    pytest.importorskip("highdicom", reason="writing DICOM needs highdicom")
    from tests import dicom_trees

    dicom_trees.image_series(tmp_path / "ct", rng.integers(-1000, 1000, SHAPE).astype(np.int16))
    return with_masks(Session.open(tmp_path / "ct", ClickedModel()), masks)


def labels_of(path, grid) -> dict[str, np.ndarray]:
    from samed3d.volume.dicom_labels import read_dicom_labels

    return dict(read_dicom_labels(path, grid))


@pytest.mark.parametrize("format", ["dicom-seg", "rtstruct"])
def test_dicom_comes_back_voxel_by_voxel(tmp_path, dicom_session, masks, format):
    dicom_session.export(tmp_path / "out.dcm", format)
    found = labels_of(tmp_path / "out.dcm", dicom_session.volume.grid)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask.astype(bool), err_msg=name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct", "out.dcm"]


def test_a_dicom_seg_read_by_highdicom_maps_its_frames_to_the_right_slices(tmp_path, dicom_session, masks):
    import highdicom as hd
    import pydicom

    dicom_session.save(tmp_path / "seg.dcm")
    slices = {str(d.SOPInstanceUID): d for d in (pydicom.dcmread(p) for p in (tmp_path / "ct").glob("*.dcm"))}
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert [s.SegmentLabel for s in seg.SegmentSequence] == list(masks) and seg.Modality == "SEG"
    assert {str(seg.PatientID), str(seg.StudyInstanceUID)} == {
        str(next(iter(slices.values()))[k].value) for k in ("PatientID", "StudyInstanceUID")
    }
    # The slice that a frame names is the one whose voxels it was drawn on, wherever its file lies in the folder.
    order = sorted(slices, key=lambda uid: int(slices[uid].InstanceNumber))
    pixels = seg.get_pixels_by_source_instance(order, ignore_spatial_locations=False)
    for number, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(pixels[..., number], mask)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        named = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert frame.PlanePositionSequence[0].ImagePositionPatient == slices[str(named)].ImagePositionPatient


def test_an_rtstruct_names_its_slices_and_keeps_colours(tmp_path, dicom_session):
    import pydicom

    dicom_session.edit_object(2, colour="#0a141e")
    dicom_session.export(tmp_path / "rt.dcm", "rtstruct")
    data = pydicom.dcmread(tmp_path / "rt.dcm")
    assert list(data.ROIContourSequence[0].ROIDisplayColor) == [10, 20, 30]
    positions = {str(d.SOPInstanceUID): d for d in (pydicom.dcmread(p) for p in (tmp_path / "ct").glob("*.dcm"))}
    for contour in data.ROIContourSequence[2].ContourSequence:
        image = positions[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
        normal = np.cross(*np.array(image.ImageOrientationPatient, float).reshape(2, 3))
        off = (
            np.array(contour.ContourData, float).reshape(-1, 3) - np.array(image.ImagePositionPatient, float)
        ) @ normal
        np.testing.assert_allclose(off, 0, atol=1e-3)
    assert (
        len(
            data.ReferencedFrameOfReferenceSequence[0]
            .RTReferencedStudySequence[0]
            .RTReferencedSeriesSequence[0]
            .ContourImageSequence
        )
        == SHAPE[0]
    )


def test_dicom_is_refused_where_it_cannot_be_right(tmp_path, dicom_session):
    volume, mask = ball_volume()
    other = with_masks(Session(volume, ClickedModel()), {"ball": mask})
    with pytest.raises(
        InputError, match="DICOM can be written for an image that was read from a DICOM folder only, got ball"
    ):
        other.export(tmp_path / "seg.dcm")
    empty = Session.open(tmp_path / "ct", ClickedModel())
    empty.new_object("nothing")
    with pytest.raises(InputError, match="segmentation must hold a voxel, got empty masks only"):
        empty.export(tmp_path / "seg.dcm")
    for file in (tmp_path / "ct").glob("*_3.dcm"):
        file.unlink()
    with pytest.raises(InputError, match=r"DICOM file cannot be read any more: .*_3.dcm \(No such file"):
        dicom_session.export(tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


def test_a_slicer_segmentation_keeps_names_colours_and_overlaps(tmp_path):
    volume, ball = ball_volume(spacing=(0.7, 1.3, 2.0))
    small = np.zeros_like(ball)
    small[10:12, 14:17, 12:15] = True
    apart = np.zeros_like(ball)
    apart[0:2, 0:2, 0:3] = True
    session = with_masks(Session(volume, ClickedModel()), {"ball": ball, "small": small, "a\\b": apart})
    session.edit_object(4, colour="#ff8000")
    session.save(tmp_path / "s.seg.nrrd")
    header = (tmp_path / "s.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    fields = dict(line.split(":=", 1) for line in header.splitlines() if ":=" in line)
    assert [fields[f"Segment{n}_{key}"] for n in (0, 1, 2) for key in ("Name", "LabelValue", "Layer")] == [
        "ball", "2", "0", "small", "4", "1", "a\\\\b", "6", "0",
    ]  # fmt: skip
    assert fields["Segment1_Color"] == "1 0.501961 0" and fields["Segment1_Extent"] == "12 14 14 16 10 11"
    image = sitk.ReadImage(str(tmp_path / "s.seg.nrrd"))  # the list axis becomes components
    assert (
        image.GetSpacing() == pytest.approx(volume.grid.spacing_xyz_mm)
        and image.GetOrigin() == volume.grid.origin_lps_mm
    )
    layers = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(layers[..., 0], 2 * ball + 6 * apart)
    np.testing.assert_array_equal(layers[..., 1], 4 * small)


def test_one_layer_is_a_plain_label_map(tmp_path):
    volume, ball = ball_volume()
    session = with_masks(Session(volume, ClickedModel()), {"ball": ball})
    session.export(tmp_path / "s.seg.nrrd")
    image = read_volume(tmp_path / "s.seg.nrrd")
    np.testing.assert_array_equal(image.array, 2 * ball)
    assert image.grid == volume.grid


@pytest.mark.parametrize(("format", "name"), [("nifti", "m.nii.gz"), ("nrrd", "m.nrrd"), ("mha", "m.mha")])
def test_label_maps(tmp_path, format, name):
    volume, ball = ball_volume()
    session = Session(volume, ClickedModel())
    session.add(Point((13, 15, 11)))
    session.export(tmp_path / name, format)
    np.testing.assert_array_equal(read_volume(tmp_path / name).array, session.mask)


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("m.png", None, r"output name must end in one of \.dcm"),
        ("m.nii.gz", "dicom-seg", r"output name must end in one of \.dcm, got 'm\.nii\.gz'"),
        ("m.nii.gz", "stl", "format must be one of nifti, nrrd, mha, seg.nrrd, dicom-seg, rtstruct, got 'stl'"),
        ("m.nrrd", "seg.nrrd", r"output name must end in one of \.seg\.nrrd"),
        ("no/m.nrrd", None, "output folder does not exist"),
    ],
)
def test_formats_that_do_not_fit(tmp_path, name, format, message):
    volume, _ = ball_volume()
    session = Session(volume, ClickedModel())
    session.add(Point((13, 15, 11)))
    with pytest.raises(InputError, match=message):
        session.export(tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_outlines_of_any_mask_fill_to_that_mask():
    rng = np.random.default_rng(7)
    for _ in range(200):
        height, width = rng.integers(1, 12, 2)
        mask = rng.random((height, width)) < rng.random()
        plane = np.zeros((height, width + 1), bool)
        for outline in trace_contours(mask):
            assert len(outline) >= 4
            toggle_polygon(plane, outline)
        np.testing.assert_array_equal(np.logical_xor.accumulate(plane, axis=1)[:, :width], mask)


def test_straight_sides_have_no_corners_within():
    mask = np.zeros((8, 9), bool)
    mask[2:6, 1:8] = True
    [outline] = trace_contours(mask)
    assert len(outline) == 8  # four sides and four cut corners
    assert trace_contours(np.zeros((3, 3), bool)) == []

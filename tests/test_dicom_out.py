"""What a DICOM-SEG and an RTSTRUCT say beside their voxels: names, codes, what the source lacks; and memory."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom", reason="writing DICOM needs highdicom")

from samed3d.errors import InputError  # noqa: E402
from samed3d.inference.session import Session  # noqa: E402
from samed3d.prompts import ObjectPrompts, PackedMask, load_prompts  # noqa: E402
from samed3d.volume import dicom_codes, read_volume  # noqa: E402
from samed3d.volume.dicom_codes import coding_of  # noqa: E402
from samed3d.volume.dicom_labels import read_dicom_labels  # noqa: E402
from samed3d.volume.dicom_source import source_series  # noqa: E402
from samed3d.volume.dicom_writing import write_dicom_seg, write_rtstruct  # noqa: E402
from samed3d.volume.writing import Segment  # noqa: E402
from tests import dicom_trees  # noqa: E402
from tests.clicked_model import ClickedModel  # noqa: E402

SHAPE = (4, 7, 9)
WRITERS = {"seg": write_dicom_seg, "rtstruct": write_rtstruct}
both = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture
def series(tmp_path, rng) -> Path:
    dicom_trees.image_series(tmp_path / "ct", rng.integers(-1000, 1000, SHAPE).astype(np.int16))
    return tmp_path / "ct"


def edited(folder: Path, change) -> None:
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        data = pydicom.dcmread(path)
        change(data, number)
        data.save_as(path)


def written(kind: str, folder: Path, named: list[tuple[str, str]]):
    """The file of one block per (name, code), its (name, coded item) pairs, and the names read back."""
    volume = read_volume(folder)
    segments = []
    for number, (name, code) in enumerate(named):
        mask = np.zeros(SHAPE, np.uint8)
        mask[1:3, 1:4, number % 6 : number % 6 + 3] = 1
        segments.append(Segment(number + 1, name, "#ff0000", PackedMask.of(mask), code))
    path = folder.parent / f"{kind}.dcm"
    WRITERS[kind](path, segments, source_series(folder, None, volume.grid))
    data = pydicom.dcmread(path)
    back = dict(read_dicom_labels(path, volume.grid))
    for segment, mask in zip(segments, back.values(), strict=True):
        np.testing.assert_array_equal(mask, segment.mask.full())
    if kind == "seg":
        return data, [(s.SegmentLabel, s) for s in data.SegmentSequence], list(back)
    names = [roi.ROIName for roi in data.StructureSetROISequence]
    return data, list(zip(names, data.RTROIObservationsSequence, strict=True)), list(back)


@both
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["肝脏", "печень", "Léber", "كبد", "간", "🫀"], ["肝脏", "печень", "Léber", "كبد", "간", "🫀"]),
        (["liver\\tumour"], ["liver/tumour"]),
        (["a\tb\nc\x1b$B", " padded "], ["a b c $B", "padded"]),
        (["lone \ud800 surrogate", "pair \ud83e\udec0"], ["lone � surrogate", "pair 🫀"]),
        (["x" * 64 + "1", "x" * 64 + "2", "x" * 64 + "3"], ["x" * 64, "x" * 60 + " (2)", "x" * 60 + " (3)"]),
        (["肝" * 70, "肝" * 71], ["肝" * 64, "肝" * 60 + " (2)"]),
        (["a", "a", "a (2)", " "], ["a", "a (2)", "a (2) (2)", "segment 4"]),
        (["a\\b", "a/b"], ["a/b", "a/b (2)"]),
    ],
)
def test_names_are_kept_and_stay_distinct(series, kind, given, expected):
    edited(series, lambda data, _: setattr(data, "SpecificCharacterSet", "ISO_IR 100"))
    data, described, back = written(kind, series, [(name, "") for name in given])
    assert [name for name, _ in described] == expected == back
    assert data.SpecificCharacterSet == "ISO_IR 192"
    if kind == "seg":
        full = [s.get("SegmentDescription", s.SegmentLabel) for s in data.SegmentSequence]
    else:
        full = [r.get("ROIDescription", r.ROIName) for r in data.StructureSetROISequence]
    assert [name for name in full if len(name) > 64] == [name for name in given if len(name) > 64]


@both
@pytest.mark.parametrize(
    ("charset", "raw", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen".encode("latin-1"), "Müller^Jürgen"),
        ("ISO_IR 144", "Люкceмбypг".encode("iso8859-5"), "Люкceмбypг"),
        ("ISO_IR 192", "王^小东".encode(), "王^小东"),
        ("GB18030", "王^小东".encode("gb18030"), "王^小东"),
        ("GBK", "王^小东".encode("gbk"), "王^小东"),
        (["", "ISO 2022 IR 87"], b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
        ("ISO-IR 100", "Müller".encode("latin-1"), "Müller"),
        ("KLINGON", "Müller".encode("latin-1"), "Müller"),
        ("", b"Doe^Jane", "Doe^Jane"),
        (None, b"Doe^Jane", "Doe^Jane"),
    ],
)
def test_text_of_the_source_is_written_in_utf8(series, kind, charset, raw, name, recwarn):
    def change(data, _):
        data.SpecificCharacterSet, data.PatientName = charset, "X" * (len(raw) + len(raw) % 2)

    edited(series, change)
    for path in series.glob("*.dcm"):
        path.write_bytes(path.read_bytes().replace(b"X" * (len(raw) + len(raw) % 2), raw + b" " * (len(raw) % 2)))
    data, _, back = written(kind, series, [("肝脏", "")])
    assert str(data.PatientName) == name and back == ["肝脏"]


def _without(*keywords):
    return lambda data, _: [delattr(data, keyword) for keyword in keywords]


def _raw(keyword, value):
    tag = pydicom.tag.Tag(keyword)
    about = (pydicom.datadict.dictionary_VR(tag), len(value), value, 0, False, True)
    return lambda data, _: data.__setitem__(tag, pydicom.dataelem.RawDataElement(tag, *about))


@both
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without("FrameOfReferenceUID", "PositionReferenceIndicator"), {"PositionReferenceIndicator": ""}),
        (_without("PatientID", "PatientName", "PatientBirthDate", "PatientSex"), {"PatientID": "", "PatientSex": ""}),
        (_without("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"), {"StudyDate": ""}),
        (_without("SeriesNumber", "ReferringPhysicianName", "Manufacturer"), {"SeriesNumber": 1000}),
        (_raw("FrameOfReferenceUID", b""), {}),
        (_raw("StudyDate", b"2020.01.01"), {"StudyDate": ""}),
        (_raw("PatientSex", b"unknown."), {"PatientSex": ""}),
        (_raw("PatientID", b"p" * 70), {"PatientID": "p" * 64}),
        (_raw("PatientID", b"a\\b "), {"PatientID": "a/b"}),
        (_raw("AccessionNumber", b"1234567890123456789 "), {"AccessionNumber": "1234567890123456"}),
        (_raw("SeriesNumber", b"one "), {"SeriesNumber": 1000}),
        (_raw("SeriesNumber", b"2147483647"), {}),
        (_raw("StudyInstanceUID", b"1.2.notauid."), {"StudyInstanceUID": "1.2.notauid."}),
    ],
)
def test_what_the_source_lacks_is_empty_or_made(series, kind, change, expected, recwarn):
    edited(series, change)
    data, _, _ = written(kind, series, [("liver", "")])
    assert {keyword: data.get(keyword) or "" for keyword in expected} == expected
    for keyword in ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        assert data[keyword].value, keyword
    again, _, _ = written(kind, series, [("liver", "")])
    assert [again.FrameOfReferenceUID, again.StudyInstanceUID] == [data.FrameOfReferenceUID, data.StudyInstanceUID]
    assert again.SOPInstanceUID != data.SOPInstanceUID


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "ImagePositionPatient"])
def test_what_cannot_be_made_is_named(series, keyword):
    grid = read_volume(series).grid
    edited(series, lambda data, number: delattr(data, keyword) if number == 0 else None)
    import samed3d.volume.dicom_source as module

    stack = SimpleNamespace(slices=[SimpleNamespace(file=file, frame=0) for file in series.glob("*.dcm")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pick_stack", lambda folder, chosen: stack)
        with pytest.raises(InputError, match=rf"for slices with {keyword} only, which .*00_0\.dcm lacks"):
            source_series(series, None, grid)


def test_a_frame_of_a_multi_frame_file_is_referred_to(tmp_path, rng):
    dicom_trees.image_series(tmp_path / "single", rng.integers(-1000, 1000, SHAPE).astype(np.int16))
    (tmp_path / "ct").mkdir()
    slices = dicom_trees.slices_of(tmp_path / "single")
    data = slices[0]
    item = dicom_trees.Dataset
    measures, plane = item(), item()
    measures.PixelSpacing, measures.SpacingBetweenSlices, measures.SliceThickness = data.PixelSpacing, 2.5, 2.5
    plane.ImageOrientationPatient = data.ImageOrientationPatient
    shared = item()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    frames = []
    for k, one in enumerate(slices):
        frame, place, content = item(), item(), item()
        place.ImagePositionPatient, content.DimensionIndexValues = one.ImagePositionPatient, [k + 1]
        content.StackID, content.InStackPositionNumber = "1", k + 1
        frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
        frames.append(frame)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], frames
    data.NumberOfFrames, data.PixelData = SHAPE[0], b"".join(one.PixelData for one in slices)
    del data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing
    data.save_as(tmp_path / "ct" / "all.dcm")
    seg, _, _ = written("seg", tmp_path / "ct", [("liver", "")])
    for frame, number in zip(seg.PerFrameFunctionalGroupsSequence, (2, 3), strict=True):
        named = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert (named.ReferencedSOPInstanceUID, named.ReferencedFrameNumber) == (data.SOPInstanceUID, number)
        assert frame.PlanePositionSequence[0].ImagePositionPatient == slices[number - 1].ImagePositionPatient
    contours = written("rtstruct", tmp_path / "ct", [("liver", "")])[0].ROIContourSequence[0].ContourSequence
    assert [c.ContourImageSequence[0].ReferencedFrameNumber for c in contours] == [2, 3]


def _rows():
    with Path(dicom_codes.__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_agrees_with_the_dictionary_of_pydicom():
    from pydicom.sr._concepts_dict import concepts

    meanings: dict[str, set[str]] = {}
    for entries in concepts["SCT"].values():
        for value, (meaning, _) in entries.items():
            meanings.setdefault(value, set()).add(meaning.lower())
    rows = _rows()
    assert len(rows) > 150 and len({row["value"] for row in rows}) == len(rows)
    codes = [(row["value"], row["meaning"]) for row in rows]
    codes += [(value, meaning) for meaning, value in dicom_codes._CATEGORIES.items()]
    codes += [(code.value, code.meaning) for code in dicom_codes._SIDES.values()]
    known = [(value, meaning) for value, meaning in codes if value in meanings]
    assert [pair for pair in known if pair[1].lower() not in meanings[pair[0]]] == []
    assert len(known) > 0.8 * len(codes)
    names: dict[frozenset[str], str] = {}
    for row in rows:  # no name means two things
        for name in filter(None, (row["meaning"], *row["synonyms"].split("|"))):
            assert names.setdefault(frozenset(dicom_codes._words(name)), row["value"]) == row["value"], name


TOTALSEGMENTATOR = """
spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right lung_upper_lobe_left
lung_lower_lobe_left lung_middle_lobe_right esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder
prostate kidney_cyst_left sacrum vertebrae_S1 vertebrae_L5 vertebrae_T12 vertebrae_C1 heart aorta pulmonary_vein
brachiocephalic_trunk subclavian_artery_right common_carotid_artery_left brachiocephalic_vein_left
atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left
iliac_vena_right humerus_left scapula_left clavicula_right femur_left hip_right spinal_cord gluteus_maximus_left
gluteus_medius_left gluteus_minimus_right autochthon_left iliopsoas_right brain skull rib_left_1 rib_right_12 sternum
costal_cartilages""".split()


@pytest.mark.parametrize("name", TOTALSEGMENTATOR)
def test_common_anatomy_has_a_code_of_its_own(name):
    coding = coding_of(name)
    assert coding.kind.meaning != "Tissue"
    told = (
        "left" if "left" in coding.kind.meaning.lower() else "right" if "right" in coding.kind.meaning.lower() else ""
    )
    side = told or (coding.side.meaning.lower() if coding.side else "")
    assert side == next((s for s in ("left", "right") if s in name), "")


@pytest.mark.parametrize(
    ("name", "category", "kind", "side", "site", "interpreted"),
    [
        ("LeftKidney", "Anatomical Structure", "Kidney", "Left", None, "ORGAN"),
        ("kidney, R", "Anatomical Structure", "Kidney", "Right", None, "ORGAN"),
        ("both lungs", "Anatomical Structure", "Lung", "Bilateral", None, "ORGAN"),
        ("L4", "Anatomical Structure", "L4 vertebra", None, None, "ORGAN"),
        ("heart_ventricle_left", "Anatomical Structure", "Left ventricle", None, None, "ORGAN"),
        ("lateral ventricle left", "Anatomical Structure", "Lateral Ventricle", "Left", None, "ORGAN"),
        ("Rib_Left_7", "Anatomical Structure", "Seventh rib", "Left", None, "ORGAN"),
        ("Oesophagus", "Anatomical Structure", "Esophagus", None, None, "ORGAN"),
        ("subcutaneous fat", "Tissue", "Fat", None, None, "ORGAN"),
        ("CSF", "Body Substance", "Cerebrospinal Fluid", None, None, ""),
        ("liver tumour 3", "Morphologically Abnormal Structure", "Neoplasm", None, "Liver", ""),
        ("left kidney cyst", "Morphologically Abnormal Structure", "Cyst", "Left", "Kidney", ""),
        ("brain metastases", "Morphologically Abnormal Structure", "Metastasis", None, "Brain", ""),
        ("oedema", "Morphologically Abnormal Structure", "Edema", None, None, ""),
        ("GTV liver", "Spatial and Relational Concept", "GTV", None, "Liver", "GTV"),
        ("PTV_7000", "Spatial and Relational Concept", "PTV", None, None, "PTV"),
        ("body", "Anatomical Structure", "Entire body", None, None, "EXTERNAL"),
        ("object 1", "Tissue", "Tissue", None, None, ""),
        ("肝脏", "Tissue", "Tissue", None, None, ""),
        ("", "Tissue", "Tissue", None, None, ""),
    ],
)
def test_codes_go_by_the_name(series, name, category, kind, side, site, interpreted):
    def meanings(item):
        code = item[0]
        modifier = code.get("SegmentedPropertyTypeModifierCodeSequence")
        return code.CodeMeaning, modifier[0].CodeMeaning if modifier else None

    [(_, segment)] = written("seg", series, [(name, "")])[1]
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == category
    assert meanings(segment.SegmentedPropertyTypeCodeSequence) == (kind, side)
    assert (segment.AnatomicRegionSequence[0].CodeMeaning if "AnatomicRegionSequence" in segment else None) == site
    [(_, observed)] = written("rtstruct", series, [(name, "")])[1]
    assert meanings(observed.RTROIIdentificationCodeSequence) == (kind, side)
    assert observed.RTROIInterpretedType == interpreted


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("肝脏 left", "SCT:10200004:Liver", ("SCT", "10200004", "Liver", "Left", "Anatomical Structure")),
        ("liver", "99LAB:X1:Graft: donor", ("99LAB", "X1", "Graft: donor", None, "Anatomical Structure")),
        ("x", "SCT:108369006:肿瘤", ("SCT", "108369006", "肿瘤", None, "Morphologically Abnormal Structure")),
        ("x", "SCT:16560241000119104:Long", ("SCT", "16560241000119104", "Long", None, "Tissue")),
    ],
)
def test_a_stated_code_is_written(series, name, code, expected):
    [(_, segment)] = written("seg", series, [(name, code)])[1]
    item = segment.SegmentedPropertyTypeCodeSequence[0]
    side = item.get("SegmentedPropertyTypeModifierCodeSequence")
    found = (item.CodingSchemeDesignator, item.get("CodeValue") or item.LongCodeValue, item.CodeMeaning)
    category = segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning
    assert (*found, side[0].CodeMeaning if side else None, category) == expected


def test_a_code_is_kept_by_prompt_files_sessions_and_journals(tmp_path, series):
    mask, expected = np.zeros(SHAPE, np.uint8), {3: "SCT:10200004:Liver", 1: "99LAB:S:Spleen"}
    mask[1:3, 1:4, 1:5] = 1
    packed = {"type": "mask", **PackedMask.of(mask).to_json()}
    entry = {"id": 3, "name": "肝", "code": "SCT:10200004:Liver", "prompts": [packed]}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "objects": [entry]}))
    with Session.open(series, ClickedModel(), journal=tmp_path / "j") as session:
        session.add_all(load_prompts(tmp_path / "p.json"))
        session.new_object("spleen")
        session.edit_object(1, code="99LAB:S:Spleen")
        session.edit_object(1, code="")
        session.undo()
        session.save(tmp_path / "s.json")
        session.save(tmp_path / "seg.dcm")
    with Session.open(series, ClickedModel(), journal=tmp_path / "j") as again:
        assert {o.id: o.code for o in again.objects()} == expected
    with Session.load(tmp_path / "s.json", model=ClickedModel()) as again:
        assert {o.id: o.code for o in again.objects()} == expected
    table = json.loads((tmp_path / "s.json").read_text())["objects"]
    assert {o["id"]: o["code"] for o in table} == expected
    [segment] = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"


@pytest.mark.parametrize(
    "code",
    ["Liver", "SCT:1", "SCT::Liver", ":1:Liver", "SCT:1:", "S" * 17 + ":1:a", "SCT:1:" + "a" * 65, "SCT:1:a\\b", "SCT:1:a\nb",
     "SCT:1:\ud800", " SCT:1:a", 7, None],
)  # fmt: skip
def test_a_code_of_another_form_is_refused(tmp_path, code):
    point = {"type": "point", "at": [1, 1, 1]}
    (tmp_path / "p.json").write_text(
        json.dumps({"version": 1, "objects": [{"id": 1, "code": code, "prompts": [point]}]})
    )
    with pytest.raises(InputError, match=r"object 1: code must be SCHEME:VALUE:MEANING as SCT:10200004:Liver, got"):
        load_prompts(tmp_path / "p.json")


def test_codes_of_the_command_line():
    from samed3d.cli.segment import _code_objects

    objects = [ObjectPrompts(1, "肝=1"), ObjectPrompts(2, "a"), ObjectPrompts(3, "2")]
    _code_objects(objects, ["a=SCT:1:A=B", "1=SCT:2:B", "2=SCT:3:C"])
    assert [o.code for o in objects] == ["SCT:2:B", "SCT:1:A=B", "SCT:3:C"]  # a name comes before an id
    for text, message in (
        ("spleen=SCT:1:A", r"--code must be OBJECT=SCHEME:VALUE:MEANING of one of 1 \(肝=1\), 2 \(a\), 3 \(2\), got"),
        ("a", "--code must be OBJECT=SCHEME"),
        ("a=SCT:1", "--code: code must be SCHEME:VALUE:MEANING"),
    ):
        with pytest.raises(InputError, match=message):
            _code_objects(objects, [text])


@both
def test_writing_takes_little_memory(tmp_path, rng, kind):
    """24 segments that would take 12 MB as one array of bytes, and 20 MB as numbers of a DICOM library."""
    shape = (8, 256, 256)
    dicom_trees.image_series(tmp_path / "ct", rng.integers(-1000, 1000, shape).astype(np.int16))
    volume = read_volume(tmp_path / "ct")
    z, y, x = np.ogrid[:8, :256, :256]
    segments = [
        Segment(n + 1, f"object {n}", "#ff0000", PackedMask.of((y - 60 - n) ** 2 + (x - 64) ** 2 + 0 * z < 900))
        for n in range(24)
    ]
    source = source_series(tmp_path / "ct", None, volume.grid)
    WRITERS[kind](tmp_path / "warm.dcm", segments[:1], source)
    tracemalloc.start()
    try:
        WRITERS[kind](tmp_path / "out.dcm", segments, source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6
    for number, (_, mask) in enumerate(read_dicom_labels(tmp_path / "out.dcm", volume.grid)):
        np.testing.assert_array_equal(mask, segments[number].mask.full())


@both
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy of Debian's dicom3tools is not installed")
def test_dciodvfy_finds_nothing(series, kind):
    edited(series, _without("PatientID", "StudyTime", "FrameOfReferenceUID", "PositionReferenceIndicator"))
    written(
        kind, series, [("kidney_left", ""), ("肝脏 опухоль é", "SCT:10200004:Liver"), ("liver tumour", ""), ("x", "")]
    )
    said = subprocess.run(["dciodvfy", series.parent / f"{kind}.dcm"], capture_output=True, text=True)
    empty = "Missing attribute or value that would be needed to build DICOMDIR"
    found = [line for line in said.stderr.splitlines() if line.startswith(("Error", "Warning")) and empty not in line]
    assert found == []

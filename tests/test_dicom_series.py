"""Image series as scanners and archives have them: placed right, divided and listed, or refused in one line."""

from __future__ import annotations

import re

import numpy as np
import pytest
from dicom_kinds import ORIGIN, SHAPE, SPACING, enhanced, image, set_pixels, setting, stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import read_volume

GRID = Grid(SHAPE, SPACING, tuple(ORIGIN.tolist()))
TILTED = (1, 0, 0, 0, np.cos(0.3), np.sin(0.3))


def refusal(path, **options) -> str:
    """The message of a refused image: one line, and nothing but InputError."""
    with pytest.raises(InputError) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def interleaved(folder, offset_mm, *, change_second=None, numbers=lambda k: k + 1):
    """Two acquisitions of eight slices, the second of which lies between the slices of the first."""
    stack(folder, change=setting(InstanceNumber=lambda k: k + 1))
    second = image(seed=1)
    more = change_second or setting(InstanceNumber=numbers)
    return stack(folder, second, origin=ORIGIN + [0, 0, offset_mm], prefix="z", change=more)


# ---- right


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(6)), angle=st.floats(-1.2, 1.2), pitch=st.floats(0.3, 9), multi=st.booleans())
def test_order_of_files_and_frames_does_not_matter(tmp_path_factory, order, angle, pitch, multi):
    folder, array = tmp_path_factory.mktemp("series"), image((6, 5, 7))
    if multi:
        volume = read_volume(enhanced(folder / "a.dcm", array, order))
        assert volume.grid == Grid((6, 5, 7), SPACING, GRID.origin_lps_mm)
    else:
        axes = (np.cos(angle), np.sin(angle), 0, 0, 0, -1)
        number = setting(InstanceNumber=lambda k: order[k] + 1)
        volume = read_volume(stack(folder, array, positions=np.arange(6) * pitch, axes=axes, change=number))
        assert volume.grid.spacing_xyz_mm == pytest.approx((*SPACING[:2], pitch), abs=1e-5)
    np.testing.assert_array_equal(volume.array, array)
    assert volume.notes == ()


def halved(data, k):
    array = image()[k]
    set_pixels(data, array if k % 2 else array // 2, 1 if k % 2 else 2)


def pet(data, k):
    stored = np.zeros(SHAPE[1:], np.uint16) if k == 0 else (image()[k] + 900).astype(np.uint16)
    set_pixels(data, stored, 1 if k == 0 else 0.004)


def unsigned_first(data, k):
    set_pixels(data, np.abs(image()[k]).astype(np.uint16) if k == 0 else image()[k])


def narrow_first(data, k):
    array = (np.abs(image()[k]) % 200).astype(np.uint8)
    set_pixels(data, array if k == 0 else array.astype(np.uint16) * 100)


def twelve_bits(data, k):
    set_pixels(data, ((image()[k] // 2) & 0xFFF | 0x7000).astype(np.uint16), 1, -1024)
    data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 1


PIXELS = [
    (halved, lambda a: np.where(np.arange(8)[:, None, None] % 2, a, a // 2 * 2), np.int32),
    (pet, lambda a: np.where(np.arange(8)[:, None, None], (a + 900) * 0.004, 0), np.float32),
    (unsigned_first, lambda a: np.concatenate([np.abs(a[:1]), a[1:]]), np.int32),
    (narrow_first, lambda a: np.abs(a) % 200 * np.where(np.arange(8), 100, 1)[:, None, None], np.uint16),
    (twelve_bits, lambda a: a // 2 - 1024, np.int16),
]


@pytest.mark.parametrize(("change", "expected", "kind"), PIXELS, ids=[change.__name__ for change, *_ in PIXELS])
def test_each_slice_has_its_own_scaling_and_type(tmp_path, change, expected, kind):
    volume = read_volume(stack(tmp_path / "s", change=change))
    np.testing.assert_allclose(volume.array, expected(image().astype(int)), atol=1e-3)
    assert volume.array.dtype == kind


@pytest.mark.parametrize("missing", [("RescaleSlope", "RescaleIntercept"), ("RescaleIntercept",), ("RescaleSlope",)])
def test_slices_without_a_scaling_keep_their_stored_values(tmp_path, missing):
    volume = read_volume(stack(tmp_path / "s", change=setting(**dict.fromkeys(missing))))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, image())


def test_frames_have_their_own_slopes(tmp_path):
    array, slopes = image() // 4, [1, 2, 3, 4] * 2
    volume = read_volume(enhanced(tmp_path / "a.dcm", array, [3, 1, 0, 2, 7, 6, 5, 4], slopes=slopes))
    np.testing.assert_array_equal(volume.array, array * np.array(slopes)[:, None, None])


@pytest.mark.parametrize("multi", [False, True])
def test_compressed_pixels_are_not_scaled_twice(tmp_path, multi):
    from pydicom import dcmread
    from pydicom.uid import RLELossless

    array, slopes = image(), [1, 2] * 4
    if multi:
        enhanced(tmp_path / "s" / "a.dcm", array, range(8), slopes=slopes)
    else:
        stack(tmp_path / "s", change=lambda data, k: set_pixels(data, array[k], slopes[k], -3))
    for path in (tmp_path / "s").iterdir():
        data = dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, array * np.array(slopes)[:, None, None] - (0 if multi else 3))


def test_other_files_are_no_series(tmp_path):
    from dicom_trees import segmentation, structure_set

    stack(tmp_path / "s", change=setting(KVP=120, AcquisitionNumber=1, PositionReferenceIndicator=""))
    structure_set(tmp_path / "s" / "rt.dcm", tmp_path / "s", {"a": [np.array([[2, 2, 3], [5, 2, 3], [5, 6, 3]])]})
    mask = np.zeros(SHAPE, bool)
    mask[2:4, 3:5, 3:5] = True
    (tmp_path / "seg").mkdir()
    (tmp_path / "s" / "rt.dcm").rename(tmp_path / "rt.dcm")
    segmentation(tmp_path / "seg" / "seg.dcm", tmp_path / "s", {"a": mask})
    for name in ("seg/seg.dcm", "rt.dcm"):
        (tmp_path / name).rename(tmp_path / "s" / name.split("/")[-1])
    (tmp_path / "s" / "notes.txt").write_text("x")
    (tmp_path / "s" / "README").write_text("x" * 300)
    (tmp_path / "s" / ".DS_Store").touch()
    (tmp_path / "s" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    np.testing.assert_array_equal(read_volume(tmp_path / "s").array, image())


def test_a_single_slice_beside_a_volume_is_named(tmp_path):
    stack(tmp_path / "s")
    stack(tmp_path / "s", image((1, 10, 12)), prefix="scout", axes=(0, 1, 0, 0, 0, -1))
    stack(tmp_path / "s", image((1, 9, 9)), prefix="report", series="report", change=setting(PixelSpacing=None))
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, image())
    assert len(volume.notes) == 2 and "1 slice at 90 degrees" in volume.notes[0] + volume.notes[1]


@pytest.mark.parametrize(
    ("charset", "text", "shown"),
    [
        ("GB18030", "胸部平扫".encode("gb18030"), "胸部平扫"),
        (["", "ISO 2022 IR 87"], "胸部".encode("iso2022_jp"), "胸部"),
        ("ISO_IR 192", "Fuß".encode(), "Fuß"),
        (None, "Fuß".encode(), "Fuß"),
        (None, b"\xd0\xd8\xff", "?"),
        ("ISO_IR 999", b"Thorax \xff", "Thorax"),
    ],
)
def test_descriptions_are_legible(tmp_path, charset, text, shown):
    def change(data, k):
        from pydicom.dataelem import RawDataElement
        from pydicom.tag import Tag

        if charset is not None:
            data.SpecificCharacterSet = charset
        tag = Tag(0x0008103E)
        data._dict[tag] = RawDataElement(tag, "LO", len(text), text, 0, False, True)

    stack(tmp_path / "s", change=change)
    stack(tmp_path / "s", series="other", prefix="z")
    assert shown in refusal(tmp_path / "s")


# ---- divided

ECHOES = setting(EchoNumbers=2, InstanceNumber=lambda k: k + 9)
DIVIDED = {
    "angles": ({"axes": TILTED}, "8 slices at 17.2 degrees"),
    "sizes": ({"array": image((8, 6, 6))}, "8 slices of 6 x 6 pixels"),
    "echoes": ({"change": ECHOES}, "8 slices, echo 2"),
    "echoes half-way": ({"change": ECHOES, "origin": ORIGIN + [0, 0, 1]}, "8 slices, echo 2"),
    "b-values": ({"change": setting(DiffusionBValue=1000.0)}, "8 slices, b 1000"),
    "times": ({"change": setting(TemporalPositionIdentifier=2)}, "8 slices, time 2 of 2"),
    "image types": ({"change": setting(ImageType=["DERIVED", "PRIMARY", "WATER"])}, "DERIVED PRIMARY WATER"),
    "instance numbers": ({"change": setting(InstanceNumber=lambda k: k + 9)}, "8 slices, volume 2 of 2"),
    "far": ({"origin": ORIGIN + [0, 0, 90]}, "8 slices from 100 to 114 mm"),
    "interleaved": ({"origin": ORIGIN + [0, 0, 0.5]}, "8 slices, acquisition 2 of 2"),
    "half-way, repeated numbers": ({"origin": ORIGIN + [0, 0, 1]}, "8 slices, acquisition 2 of 2"),
    "half-way, later numbers": (
        {"origin": ORIGIN + [0, 0, 1], "change": setting(InstanceNumber=lambda k: k + 9)},
        "8 slices, acquisition 2 of 2",
    ),
    "half-way, by acquisition": (
        {"origin": ORIGIN + [0, 0, 1], "change": setting(InstanceNumber=lambda k: 2 * k, AcquisitionNumber=2)},
        "8 slices, acquisition 2 of 2",
    ),
    "coordinate systems": ({"change": setting(FrameOfReferenceUID="2.2.3")}, "coordinate system 2 of 2"),
}


@pytest.mark.parametrize(("second", "name"), DIVIDED.values(), ids=list(DIVIDED))
def test_two_volumes_of_one_series_are_listed_and_picked(tmp_path, second, name):
    first = {"EchoNumbers": 1, "DiffusionBValue": 0.0, "TemporalPositionIdentifier": 1, "AcquisitionNumber": 1}
    stated = {key: value for key, value in first.items() if key in _attributes(second)}
    number = (lambda k: 2 * k + 1) if "AcquisitionNumber" in stated else (lambda k: k + 1)
    stack(tmp_path / "s", change=setting(InstanceNumber=number, **stated))
    arrays = [image(), second.get("array", image(seed=1))]
    stack(tmp_path / "s", **{"array": arrays[1], "prefix": "z", **second})
    message = refusal(tmp_path / "s")
    assert "holds 2 volumes, pick one with --series N" in message and name in message, message
    entries = re.findall(r"(\d) = ('Thorax'[^;]*)", message)
    found = [read_volume(tmp_path / "s", series=number).array for number, _ in entries]
    assert len(found) == 2
    for number, entry in entries:
        expected = arrays[1] if name in entry else arrays[0]
        np.testing.assert_array_equal(read_volume(tmp_path / "s", series=number).array, expected)


def _attributes(second) -> set[str]:
    """Which attributes the change of the second stack sets."""
    from pydicom import Dataset

    data = Dataset()
    second.get("change", setting())(data, 0)
    return {element.keyword for element in data}


@pytest.mark.parametrize("count", [2, 5])
def test_times_of_a_multi_frame_file(tmp_path, count):
    array = image()

    def time(_data, own, number):
        own.FrameContentSequence[0].TemporalPositionIndex = number % count + 1

    path = enhanced(tmp_path / "a.dcm", array, [k for k in range(8) for _ in range(count)], change=time)
    assert f"time {count} of {count}" in refusal(path)
    np.testing.assert_array_equal(read_volume(path, series=str(count)).array, array)


def test_one_acquisition_may_take_its_odd_slices_first(tmp_path):
    """Instance numbers and times in the order of acquisition are no second volume: its slices do not overlap."""
    order = setting(
        InstanceNumber=lambda k: k // 2 + 1 + 4 * (k % 2), AcquisitionTime=lambda k: f"1010{k // 2 + 30 * (k % 2):02d}"
    )
    np.testing.assert_array_equal(read_volume(stack(tmp_path / "s", change=order)).array, image())


# ---- refused

REFUSED = {
    "no spacing": (setting(PixelSpacing=None), r"PixelSpacing \(0028,0030\) is missing or empty: .*im000.dcm"),
    "zero spacing": (setting(PixelSpacing=[0, 0]), r"PixelSpacing \(0028,0030\) must be > 0.*im000.dcm"),
    "empty spacing": (setting(PixelSpacing=""), r"PixelSpacing \(0028,0030\) is missing or empty"),
    "changing spacing": (
        setting(PixelSpacing=lambda k: [0.7, 0.8 + 0.1 * (k > 4)]),
        r"PixelSpacing \(0028,0030\) must be the same in all slices, got 0.7\\0.8 in im000.dcm and 0.7\\0.9 in im005",
    ),
    "no position": (setting(ImagePositionPatient=None), r"ImagePositionPatient \(0020,0032\) is missing"),
    "one without position": (
        setting(ImagePositionPatient=lambda k: None if k == 3 else (ORIGIN + [0, 0, 2 * k]).tolist()),
        r"ImagePositionPatient \(0020,0032\) is missing or empty: .*im003.dcm",
    ),
    "no orientation": (setting(ImageOrientationPatient=None), r"ImageOrientationPatient \(0020,0037\) is missing"),
    "no unit vectors": (
        setting(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        r"ImageOrientationPatient \(0020,0037\) must be two perpendicular unit vectors",
    ),
    "no slope": (setting(RescaleSlope=0), r"RescaleSlope \(0028,1053\) must differ from 0"),
    "no rows": (setting(Rows=None), r"Rows missing from a DICOM image: .*im000.dcm"),
    "no bits": (setting(BitsAllocated=None, Columns=None), r"Columns and BitsAllocated missing"),
    "lookup table": (setting(ModalityLUTSequence=[Dataset()]), r"behind a ModalityLUTSequence \(0028,3000\)"),
    "two numbers": (setting(ImagePositionPatient=[1, 2]), r"ImagePositionPatient .* must be 3 numbers, got '1.0"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_missing_and_wrong_attributes_are_named(tmp_path, change, message):
    assert re.search(message, refusal(stack(tmp_path / "s", change=change)))


@pytest.mark.parametrize("text", [b"0,8\\0,8 ", b"abc ", b"nan\\nan "])
def test_numbers_that_are_none(tmp_path, text):
    path = stack(tmp_path / "s") / "im002.dcm"
    content = path.read_bytes()
    at = content.index(b"\x28\x00\x30\x00DS")
    length = int.from_bytes(content[at + 6 : at + 8], "little")
    path.write_bytes(content[: at + 6] + len(text).to_bytes(2, "little") + text + content[at + 8 + length :])
    assert re.search(r"PixelSpacing \(0028,0030\) must be 2 numbers, got '.*im002.dcm", refusal(tmp_path / "s"))


CUT = [0, 50, 131, 140, 500, 700, -300, -100, -1]


@pytest.mark.parametrize("suffix", [".dcm", "", ".123"])
@pytest.mark.parametrize("length", CUT)
def test_cut_files_are_named(tmp_path, length, suffix):
    path = stack(tmp_path / "s") / "im007.dcm"  # the last: without it the others are a volume
    path.write_bytes(path.read_bytes()[:length])
    path = path.rename(path.with_suffix(suffix))
    assert re.search(rf"(empty|cut|damaged).*{path.name}", refusal(tmp_path / "s"))


def test_cut_compressed_files_are_named(tmp_path):
    from pydicom import dcmread
    from pydicom.uid import RLELossless

    stack(tmp_path / "s")
    data = dcmread(tmp_path / "s" / "im007.dcm")
    data.compress(RLELossless)
    data.save_as(tmp_path / "s" / "im007.dcm")
    content = (tmp_path / "s" / "im007.dcm").read_bytes()
    (tmp_path / "s" / "im007.dcm").write_bytes(content[:-60])
    assert re.search("cut.*im007.dcm", refusal(tmp_path / "s"))


def test_films_have_no_place_in_space(tmp_path):
    def change(data, k):
        set_pixels(data, np.abs(image()).astype(np.uint16))
        data.Modality, data.NumberOfFrames, data.FrameTime = "US", 8, 33

    path = stack(tmp_path / "s", image((1, 10, 12)), change=change) / "im000.dcm"
    for place in (path, path.parent):
        assert re.search("US file of 8 frames states no place in space.*frames in time are no volume", refusal(place))


def test_slices_that_nothing_tells_apart(tmp_path):
    stack(tmp_path / "s")
    stack(tmp_path / "s", image(seed=1), prefix="z")
    assert re.search("several slices at one position, such as (im|z)000.dcm and", refusal(tmp_path / "s"))


def test_copies_are_left_out_and_named(tmp_path):
    path = stack(tmp_path / "s") / "im003.dcm"
    (path.parent / "copy of im003.dcm").write_bytes(path.read_bytes())
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, image())
    assert "copies of other files" in volume.notes[0]


@pytest.mark.parametrize("name", ["single slice", "one file"])
def test_a_single_slice_is_no_volume(tmp_path, name):
    folder = stack(tmp_path / "s", image((1, 10, 12)))
    message = refusal(folder if name == "single slice" else folder / "im000.dcm")
    assert re.search(r"image must be 3D, got a single slice \(12 x 10 x 1\)", message)

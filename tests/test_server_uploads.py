"""Images that come to a server: by path, by upload, in one shot, and in damaged or malicious files."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from samed3d.volume import read_volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import CLICK, served, write_ball


@pytest.fixture
def ball(tmp_path: Path):
    return write_ball(tmp_path / "ball.nii.gz")


@pytest.fixture
def client(tmp_path: Path, ball):
    with served(tmp_path, images=ReadLimits(voxels=100_000)) as running:
        yield running


def test_paths_stay_in_the_allowed_folders(client, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}_outside.nii.gz"
    write_ball(outside)
    (tmp_path / "link.nii.gz").symlink_to(outside)
    for path in (str(outside), f"../{outside.name}", "link.nii.gz", "/etc/passwd", "sessions/../../x.nii"):
        assert client.post("/api/sessions", json={"path": path}).status_code == 403, path
    assert client.post("/api/sessions", json={"path": "none.nii.gz"}).status_code == 404
    assert client.post("/api/sessions", json={"path": "a\0b"}).status_code == 400
    assert client.post("/api/sessions", json={}).status_code == 400
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "slice.dcm").symlink_to(outside)
    assert client.post("/api/sessions", json={"path": "series"}).status_code == 403
    outside.unlink()


def test_the_modality_can_be_stated_and_is_kept(client, tmp_path, monkeypatch):
    content = (tmp_path / "ball.nii.gz").read_bytes()
    query = {"name": "x.nii.gz", "modality": "MR"}
    numbers = [
        client.post("/api/sessions", json={"path": "ball.nii.gz", "modality": "MR"}).json()["id"],
        client.post("/api/sessions/upload", params=query, content=content).json()["id"],
    ]
    for number in numbers:
        entry = client.app.state.service.get(number)
        assert entry.session.volume.modality == "MR"
        entry.unload()  # and again after the session was unloaded
        assert client.get(f"/api/sessions/{number}").status_code == 200 and entry.session.volume.modality == "MR"
    read = []
    monkeypatch.setattr("samed3d.apps.server.segment.Session.open", lambda volume, *_: read.append(volume) or 1 / 0)
    prompts = {"version": 1, "objects": [{"prompts": [CLICK["prompt"]]}]}
    client.post("/segment", json={"path": "ball.nii.gz", "modality": "PT", "prompts": prompts})
    assert read[0].modality == "PT"


def test_upload(client, ball, tmp_path):
    content = (tmp_path / "ball.nii.gz").read_bytes()
    answer = client.post("/api/sessions/upload", params={"name": "../../Röntgen bild.nii.gz"}, content=content)
    assert answer.status_code == 201 and answer.json()["size_ijk"] == [32, 28, 24]
    assert client.post(f"/api/sessions/{answer.json()['id']}/prompts", json=CLICK).status_code == 200
    assert {f.parent for f in (tmp_path / "sessions").rglob("*.nii.gz")} == {
        tmp_path / "sessions" / answer.json()["id"]
    }


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("x.nii.gz", b"", 400),
        ("x.exe", b"MZ", 415),
        ("x.mhd", b"ElementDataFile = /etc/passwd\n", 415),
        ("x.nii.gz", b"not gzip at all", 400),
        ("x.nii.gz", gzip.compress(b"\0" * 400, mtime=0), 400),
        ("x.nrrd", b"NRRD0004\n" + b"# long\n" * 20_000, 400),
        (
            "x.nrrd",
            b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\ndata file: /etc/passwd\nencoding: raw\n\n",
            400,
        ),
        (
            "x.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n",
            400,
        ),
        ("x.zip", b"PK not a zip", 400),
    ],
)
def test_a_bad_upload_is_refused_and_leaves_nothing(client, tmp_path, name, content, status):
    answer = client.post("/api/sessions/upload", params={"name": name}, content=content)
    assert answer.status_code == status, answer.text
    assert client.get("/api/sessions").json() == [] and [p.name for p in (tmp_path / "sessions").iterdir()] == ["lock"]


def test_a_cut_gzip_is_refused(client, tmp_path):
    content = (tmp_path / "ball.nii.gz").read_bytes()
    answer = client.post("/api/sessions/upload", params={"name": "x.nii.gz"}, content=content[:-500])
    assert answer.status_code == 400 and "truncated or damaged" in answer.json()["detail"]


def test_a_gzip_bomb_is_refused_before_it_fills_memory(client, tmp_path):
    import tracemalloc

    header = gzip.decompress((tmp_path / "ball.nii.gz").read_bytes())[:352]
    bomb = gzip.compress(header + bytes(100 * 2**20), 1, mtime=0)
    assert len(bomb) < 10**6
    tracemalloc.start()
    answer = client.post("/api/sessions/upload", params={"name": "x.nii.gz"}, content=bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.status_code == 400 and "unpack to what its header declares" in answer.json()["detail"]
    assert peak < 20 * 2**20


def test_a_header_that_declares_a_huge_image_is_refused(client, tmp_path):
    raw = bytearray(gzip.decompress((tmp_path / "ball.nii.gz").read_bytes()))
    raw[42:48] = np.array([30_000, 30_000, 30_000], "<i2").tobytes()
    answer = client.post("/api/sessions/upload", params={"name": "x.nii"}, content=bytes(raw))
    assert answer.status_code == 400 and "at most 100000 voxels" in answer.json()["detail"]


def test_a_zip_bomb_is_refused(tmp_path, ball):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../a.dcm", bytes(20 * 2**20))
    with served(tmp_path, largest_upload=2**20) as client:
        answer = client.post(
            "/api/sessions/upload", params={"name": "x.zip"}, content=(tmp_path / "x.zip").read_bytes()
        )
        assert answer.status_code == 400 and "more bytes than are allowed" in answer.json()["detail"]


def test_a_zip_of_a_dicom_folder(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs samed3d[dicom]")
    from tests.dicom_trees import image_series

    image_series(tmp_path / "ct", np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6))
    for file in (tmp_path / "ct").iterdir():  # as programs that remove names leave them
        data = pydicom.dcmread(file)
        del data.FrameOfReferenceUID, data.PatientID, data.PatientName, data.StudyInstanceUID, data.StudyDate
        data.save_as(file)
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for file in sorted((tmp_path / "ct").iterdir()):
            archive.write(file, f"folder/{file.name}")
        for name in ("folder/README.txt", "README", "../../notes.md", "__MACOSX/folder/._0.dcm"):
            archive.writestr(name, "no DICOM")
    with served(tmp_path) as client:
        answer = client.post(
            "/api/sessions/upload", params={"name": "ct.zip"}, content=(tmp_path / "ct.zip").read_bytes()
        )
        assert answer.status_code == 201, answer.text
        assert answer.json()["size_ijk"] == list(read_volume(tmp_path / "ct").grid.size_ijk)
        pytest.importorskip("highdicom", reason="needs samed3d[dicom]")
        base = f"/api/sessions/{answer.json()['id']}"
        client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [4, 2, 2]}, "name": "肝脏 left"})
        code = {"code": "SCT:10200004:Liver"}
        assert client.patch(f"{base}/objects/1", json=code).json()["session"]["objects"][0]["code"] == code["code"]
        refused = client.patch(f"{base}/objects/1", json={"code": "Liver"})
        assert refused.status_code == 400 and "code must be SCHEME:VALUE:MEANING" in refused.json()["detail"]
        for format, modality in (("dicom-seg", "SEG"), ("rtstruct", "RTSTRUCT")):
            answer = client.get(f"{base}/export", params={"format": format})
            (tmp_path / "out.dcm").write_bytes(answer.content)
            data = pydicom.dcmread(tmp_path / "out.dcm")
            assert (answer.status_code, data.Modality) == (200, modality)
            if modality == "SEG":
                [described] = data.SegmentSequence
                assert described.SegmentLabel == "肝脏 left"
                assert described.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"


def test_one_shot(client, tmp_path):
    prompts = {"version": 1, "space": "ijk", "objects": [{"id": 3, "prompts": [CLICK["prompt"]]}]}
    by_path = client.post("/segment", json={"path": "ball.nii.gz", "prompts": prompts})
    assert by_path.status_code == 200, by_path.text
    with (tmp_path / "ball.nii.gz").open("rb") as file:
        sent = client.post(
            "/segment", files={"image": ("ball.nii.gz", file)}, data={"prompts": json.dumps(prompts), "format": "mha"}
        )
    assert sent.status_code == 200, sent.text
    (tmp_path / "a.nii.gz").write_bytes(by_path.content)
    (tmp_path / "b.mha").write_bytes(sent.content)
    mask = read_volume(tmp_path / "a.nii.gz").array
    assert np.array_equal(mask, read_volume(tmp_path / "b.mha").array) and mask.any()
    assert client.get("/api/sessions").json() == [] and not list((tmp_path / "sessions").glob(".segment-*"))
    for body in (
        {"path": "ball.nii.gz"},
        {"path": "ball.nii.gz", "prompts": {"version": 1, "objects": []}},
        {"prompts": prompts},
        [],
    ):
        assert client.post("/segment", json=body).status_code == 400
    assert client.post("/segment", content=b"x", headers={"content-type": "text/plain"}).status_code == 415


def test_what_reading_decided_is_in_the_answer(tmp_path):
    from dicom_kinds import stack

    stack(tmp_path / "ct", shear=(0.0, 0.5))
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for file in (tmp_path / "ct").iterdir():
            archive.write(file, file.name)
    content = (tmp_path / "ct.zip").read_bytes()
    with served(tmp_path) as client:
        refused = client.post("/api/sessions/upload", params={"name": "ct.zip"}, content=content)
        assert refused.status_code == 400 and "gantry tilt of 14 degrees" in refused.json()["detail"]
        answer = client.post("/api/sessions/upload", params={"name": "ct.zip", "untilt": True}, content=content)
        assert answer.status_code == 201, answer.text
        assert "resampled by position to slices 2 mm apart" in answer.json()["notes"][0]
        assert client.get(f"/api/sessions/{answer.json()['id']}").json()["notes"] == answer.json()["notes"]

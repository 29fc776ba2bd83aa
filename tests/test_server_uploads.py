"""Images that come to a server: by path, by upload, in one shot, and in damaged or malicious files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from samed3d.geometry import Grid
from samed3d.volume import read_volume, write_volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import CLICK, opened, sent, served, tiny_model, write_ball


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
        tmp_path / "sessions" / answer.json()["id"] / "upload"
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


def zipped(**members: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return held.getvalue()


NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: %s\n%s\n"
REFUSED = {
    "cut.nii.gz": lambda ball: ball[:-500],
    "cut.nii": lambda ball: gzip.decompress(ball)[:-500],
    "text.nii": lambda _: b"no image" * 99,
    "elsewhere.nrrd": lambda _: NRRD % (b"raw", b"data file: /etc/passwd\n"),
    "damaged.nrrd": lambda _: NRRD % (b"gzip", b"space directions: (1,0,0) (0,1,0) (0,0,1)\n") + b"x" * 40,
    "cut.nrrd": lambda _: NRRD % (b"raw", b"") + b"x" * 40,
    "cut.mha": lambda _: b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\nxx",
    "broken.zip": lambda ball: b"PK" + ball,
    "empty.zip": lambda _: zipped(),
    "text.zip": lambda _: zipped(**{"a.dcm": b"no slice", "b.txt": b"x"}),
    "n" * 300 + ".nii.gz": lambda ball: ball[:-500],
    "con.nii.gz": lambda ball: ball[:-500],
    "a/../b\\x\0\n.nii.gz": lambda ball: ball[:-500],
}


@pytest.fixture
def private(tmp_path):
    """A server whose answers must name no place on its disk, and the answers that it gave."""
    from samed3d.errors import InputError

    def load(name: str):
        if name == "broken":
            raise InputError(
                f"checkpoint is damaged: {Path(np.__file__)}, {Path.home() / 'w.safetensors'}; get it again"
            )
        return tiny_model()

    (tmp_path / "data root").mkdir()
    write_ball(tmp_path / "data root" / "ball.nii.gz")
    with served(tmp_path / "data root", load, models=("broken",), sessions=tmp_path / "kept") as client:
        answers: list = []
        client.event_hooks["response"].append(answers.append)
        yield client, answers


def shown(answers: list, tmp_path: Path) -> list[str]:
    """The answers that name a place on the server's disk."""
    places = (tmp_path, Path(np.__file__).parent, Path(__file__).parents[1], Path.home())
    texts = [answer.read().decode("latin-1") for answer in answers]
    assert len(texts) > 1
    return [text for text in texts for place in places if str(place) in text or "/kept" in text]


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: repr(name[:20]))
def test_a_refused_image_is_called_by_the_clients_name(private, tmp_path, name):
    client, answers = private
    content = REFUSED[name]((tmp_path / "data root" / "ball.nii.gz").read_bytes())
    prompts = json.dumps({"version": 1, "objects": [{"prompts": [CLICK["prompt"]]}]})
    client.post("/api/sessions/upload", params={"name": name}, content=content)
    client.post("/segment", files={"image": (name, content)}, data={"prompts": prompts})
    with contextlib.suppress(OSError, ValueError):
        (tmp_path / "data root" / name).write_bytes(content)
    client.post("/api/sessions", json={"path": name})
    client.post("/segment", json={"path": name, "prompts": json.loads(prompts)})
    assert all(answer.status_code in (400, 403, 404, 415) for answer in answers), [a.text for a in answers]
    assert not any("\n" in answer.json()["detail"] or "upload_" in answer.text for answer in answers)
    assert not shown(answers, tmp_path) and {p.name for p in (tmp_path / "kept").iterdir()} == {"lock"}


def test_no_answer_names_a_place_on_the_servers_disk(private, tmp_path, monkeypatch):
    client, answers = private
    session_id = opened(client)
    base, folder = f"/api/sessions/{session_id}", tmp_path / "kept" / session_id
    client.post(f"{base}/prompts", json=CLICK)
    for address in ("", "/report", "/masks", "/suggest"):
        assert client.get(base + address).status_code == 200
    for address in ("/api/sessions", "/api/about", "/metrics", "/openapi.json", "/docs", "/capabilities"):
        assert client.get(address).status_code == 200
    assert [client.get(f"{base}/export", params={"format": kind}).status_code for kind in ("dicom-seg", "x")] == [
        400
    ] * 2
    assert client.post("/api/sessions", json={"path": "ball.nii.gz", "model": "broken"}).status_code == 400
    for path in (".", "none", "x" * 300, "x/" * 3000, "ball.nii.gz/x", "a\nb", "\ud800", "~", ""):
        for route, body in (("/api/sessions", {}), ("/segment", {"prompts": {}})):
            answer = client.post(
                route, content=json.dumps({"path": path, **body}), headers={"content-type": "application/json"}
            )
            assert answer.status_code in (400, 403, 404), (path, answer.text)
    for content in ("damaged\n", '{"journal": 1, "image": {"sha256": "x", "source": "/srv/a"}}\n'):
        client.app.state.service.get(session_id).unload()
        (folder / "journal.jsonl").write_text(content)
        assert client.get(base).status_code == 400
    (tmp_path / "data root" / "ball.nii.gz").unlink()
    assert client.get(base).status_code == 400
    monkeypatch.setattr("samed3d.output.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert client.post("/api/sessions", json={"example": True}).status_code == 507
    assert not shown(answers, tmp_path)


@pytest.fixture
def listening(tmp_path):
    """A real server in a thread, with a model that takes its time, and its address."""
    import uvicorn

    from samed3d.apps.server.app import create_app
    from samed3d.apps.server.service import ServerOptions

    model, decode = tiny_model(), tiny_model().decode
    model.decode = lambda *given: (time.sleep(0.3), decode(*given))[1]  # type: ignore[method-assign]
    app = create_app(ServerOptions(tmp_path / "kept", (tmp_path,)), lambda _: model)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "moment", ["upload", "body", "head", "prediction", "one shot", "image", "export", "masks", "lease"]
)
def test_a_client_that_hangs_up_leaves_no_traceback(listening, tmp_path, moment, caplog, capfd):
    import httpx

    write_volume(
        tmp_path / "noise.nii",
        np.random.default_rng(0).integers(0, 999, (96, 96, 96)).astype(np.int16),
        Grid((96, 96, 96)),
    )
    with httpx.Client(base_url=f"http://localhost:{listening[1]}", timeout=30) as client:
        session_id = client.post("/api/sessions", json={"path": "noise.nii"}).json()["id"]
        base = f"/api/sessions/{session_id}"
        if moment in ("export", "masks"):
            client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [40, 40, 40]}})
        image, click = (
            (tmp_path / "noise.nii").read_bytes(),
            json.dumps({"prompt": {"type": "point", "at": [40, 40, 40]}}).encode(),
        )
        shot = json.dumps(
            {
                "path": "noise.nii",
                "prompts": {"version": 1, "objects": [{"prompts": [{"type": "point", "at": [40, 40, 40]}]}]},
            }
        )
        for _ in range(3):
            if moment == "upload":
                sent(listening, "POST /api/sessions/upload?name=x.nii", image[:99_999], len(image))
            elif moment == "body":
                sent(listening, f"POST {base}/prompts", click[:9], len(click))
            elif moment == "head":
                sent(listening, f"POST {base}/prompts", b"", 99)
            elif moment == "prediction":
                sent(listening, f"POST {base}/prompts", click)
            elif moment == "one shot":
                sent(listening, "POST /segment", shot.encode())
            elif moment == "lease":
                lease = client.post("/claim").json()["lease_token"]
                sent(listening, f"POST /set_image HTTP/1.1\r\nX-Lease-Token: {lease}\r\nX:", b"NNIA" * 99, 9999)
            else:
                sent(listening, f"GET {base}/{'image.nii.gz' if moment == 'image' else moment}", read=100)
        for _ in range(100):
            left = [p.name for p in (tmp_path / "kept").iterdir() if p.name.startswith(".export") or p.name == "x"]
            if not left and "samed3d_jobs_waiting 0.0" in client.get("/metrics").text:
                break
            time.sleep(0.1)
        assert client.get(base).status_code == 200 and not left
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info]
    assert "Traceback" not in "".join(capfd.readouterr())

"""The REST API: sessions, prompts, results, every kind of bad input, two tabs, sleep and crash."""

from __future__ import annotations

import gzip
import json
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs samed3d[serve]")

from samed3d.apps.client import Client, RemoteError
from samed3d.apps.security import Access
from samed3d.apps.sessions import Limits
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Box, MaskPrior, PackedMask, Point, Scribble
from samed3d.volume import read_volume
from samed3d.volume.untrusted import ReadLimits
from tests.server_tools import BALL_IJK, ServerProcess, served, tiny_model, write_ball

CLICK = {"prompt": {"type": "point", "at": list(BALL_IJK)}}


def opened(client, **body) -> str:
    answer = client.post("/api/sessions", json={"path": "ball.nii.gz", **body})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


@pytest.fixture
def ball(tmp_path: Path):
    return write_ball(tmp_path / "ball.nii.gz")


@pytest.fixture
def client(tmp_path: Path, ball):
    with served(tmp_path, images=ReadLimits(voxels=100_000)) as running:
        yield running


def masks_of(client, session_id: str) -> dict[int, np.ndarray]:
    from samed3d.apps.protocol import update_from_json

    size = tuple(client.get(f"/api/sessions/{session_id}").json()["size_ijk"])
    found = {}
    for entry in client.get(f"/api/sessions/{session_id}/masks").json()["updates"]:
        number, region, part = update_from_json(entry, size)
        found[number] = np.zeros(size[::-1], np.uint8)
        found[number][region.slices] = part
    return found


def test_the_masks_are_those_of_a_session_without_a_server(client, ball):
    session_id = opened(client)
    alone = Session.open(ball, tiny_model())
    for prompt in ({"type": "point", "at": list(BALL_IJK)}, {"type": "point", "at": [13, 15, 21], "positive": False}):
        answer = client.post(f"/api/sessions/{session_id}/prompts", json={"prompt": prompt}).json()
        alone.add(Point(tuple(prompt["at"]), prompt.get("positive", True)))
        assert answer["session"]["objects"][0]["voxels"] == alone.mask.sum() > 0
    assert np.array_equal(masks_of(client, session_id)[1], alone.mask)


def test_edits_undo_and_redo(client):
    base = f"/api/sessions/{opened(client)}"
    first = client.post(f"{base}/prompts", json={**CLICK, "name": "ball"}).json()
    second = client.post(f"{base}/prompts", json={"prompt": {"type": "box", "min": [7, 9, 5], "max": [19, 21, 17]}, "object_id": 2}).json()
    assert [o["name"] for o in second["session"]["objects"]] == ["ball", "object 2"]
    moved = client.put(f"{base}/prompts/{first['prompt_id']}", json={"prompt": {"type": "point", "at": [12, 15, 11]}}).json()
    assert moved["session"]["objects"][0]["prompts"][0]["at"] == [12, 15, 11]
    gone = client.delete(f"{base}/prompts/{second['prompt_id']}").json()
    assert gone["session"]["objects"][1]["prompts"] == []
    assert client.patch(f"{base}/objects/1", json={"locked": True, "colour": "#00ff00"}).json()["session"]["objects"][0]["locked"]
    refused = client.post(f"{base}/prompts", json=CLICK)
    assert refused.status_code == 400 and "locked" in refused.json()["detail"]
    before = client.get(base).json()["objects"]
    for _ in range(3):
        assert client.post(f"{base}/undo").status_code == 200
    assert [len(o["prompts"]) for o in client.get(base).json()["objects"]] == [1, 1]
    for _ in range(3):
        client.post(f"{base}/redo", json={})
    assert client.get(base).json()["objects"] == before
    assert client.post(f"{base}/objects", json={"name": "third"}).json()["session"]["current"] == 3
    assert len(client.delete(f"{base}/objects/2").json()["session"]["objects"]) == 2
    assert client.put(f"{base}/rule", json={"others_are_negative": True}).json()["session"]["others_are_negative"]


def test_results(client, ball, tmp_path):
    base = f"/api/sessions/{opened(client)}"
    client.post(f"{base}/prompts", json=CLICK)
    (tmp_path / "image.nii.gz").write_bytes(client.get(f"{base}/image.nii.gz").content)
    again = read_volume(tmp_path / "image.nii.gz")
    assert client.get(f"{base}/export", params={"format": "dicom-seg"}).status_code == 400  # not from DICOM
    assert np.array_equal(again.array, ball.array) and again.grid == read_volume(tmp_path / "ball.nii.gz").grid
    raw = gzip.decompress(client.get(f"{base}/objects/1/probability.nii.gz").content)
    probability = np.frombuffer(raw, np.uint8, offset=352).reshape(ball.array.shape)
    mask = next(iter(masks_of(client, base.rsplit("/", 1)[1]).values()))
    assert np.array_equal(probability >= 128, mask.astype(bool))
    assert client.get(f"{base}/suggest").json()["space"] == "ijk"
    assert client.get(f"{base}/report").json()["objects"][0]["voxels"] == mask.sum()
    assert client.get("/api/sessions").json()[0]["name"] == "ball.nii.gz"
    assert set(client.get("/api/about").json()) >= {"models", "formats", "version"}


@pytest.mark.parametrize("form", ["nifti", "nrrd", "mha", "seg.nrrd"])
def test_export(client, form, tmp_path):
    base = f"/api/sessions/{opened(client)}"
    client.post(f"{base}/prompts", json=CLICK)
    answer = client.get(f"{base}/export", params={"format": form})
    assert answer.status_code == 200, answer.text
    name = answer.headers["content-disposition"].split('"')[1]
    (tmp_path / name).write_bytes(answer.content)
    mask = next(iter(masks_of(client, base.rsplit("/", 1)[1]).values()))
    assert np.array_equal(read_volume(tmp_path / name).array != 0, mask != 0)
    assert not list((tmp_path / "sessions").glob(".export-*"))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"type": "point", "at": [99, 15, 11]}, "inside the volume"),
        ({"type": "point", "at": [1, 2]}, "three numbers"),
        ({"type": "point", "at": ["a", 1, 2]}, "three numbers"),
        ({"type": "point", "at": [1e400, 1, 2]}, "finite"),
        ({"type": "point"}, "needs 'at'"),
        ({"type": "point", "at": [13, 15, 11], "positive": "yes"}, "true or false"),
        ({"type": "point", "at": [13, 15, 11], "positive": False}, "positive point or a box"),
        ({"type": "point", "at": [13, 15, 11], "space": "lps"}, "space must be"),
        ({"type": "box", "min": [9, 9, 9], "max": [3, 3, 3]}, "swap them"),
        ({"type": "star"}, "type must be one of"),
        ({"type": "scribble", "path": [[1, 1, 1]] * 20_000}, "10000"),
        ({"type": "mask", "path": "/etc/passwd"}, "must bring its bits"),
        ({"type": "mask", "size": [32, 28, 24], "start": [0, 0, 0], "stop": [4, 4, 4], "bits": "AAAA"}, "damaged"),
        ({"type": "mask", "size": [2, 2, 2], "start": [0, 0, 0], "stop": [2, 2, 2], "bits": "eJxjAAAAAQAB"}, "size|shape"),
    ],
)
def test_a_bad_prompt_is_a_400_that_says_why_and_changes_nothing(client, prompt, said):
    import re

    base = f"/api/sessions/{opened(client)}"
    before = client.get(base).json()
    text = json.dumps({"prompt": prompt}).replace("Infinity", "1e400")
    answer = client.post(f"{base}/prompts", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and re.search(said, answer.json()["detail"]), answer.text
    assert "\n" not in answer.json()["detail"]
    assert client.get(base).json() == before


def test_a_body_that_does_not_fit_is_a_422(client):
    base = f"/api/sessions/{opened(client)}"
    for body in ({}, {"prompt": 3}, {**CLICK, "object_id": "1"}, {**CLICK, "object_id": 0}, {**CLICK, "extra": 1}):
        answer = client.post(f"{base}/prompts", json=body)
        assert answer.status_code == 422 and "does not fit" in answer.json()["detail"]
    assert client.post(f"{base}/prompts", content=b"{broken", headers={"content-type": "application/json"}).status_code == 422


@pytest.mark.parametrize("session_id", ["nothing", "x" * 22, "..%2f..", "a" * 5000])
def test_an_unknown_session_is_a_404(client, session_id):
    for answer in (client.get(f"/api/sessions/{session_id}"), client.post(f"/api/sessions/{session_id}/prompts", json=CLICK)):
        assert answer.status_code == 404


def test_objects_and_prompts_that_are_not_there_are_refused(client):
    base = f"/api/sessions/{opened(client)}"
    assert client.get(f"{base}/objects/7/mask").status_code == 400
    assert client.delete(f"{base}/prompts/7").status_code == 400
    assert client.get(f"{base}/suggest").status_code == 400
    assert client.get(f"{base}/export", params={"format": "jpeg"}).status_code == 400
    assert client.patch(f"{base}/objects/1", json={"name": "x"}).status_code == 400


def test_two_tabs_on_one_session(client):
    base = f"/api/sessions/{opened(client)}"
    seen = client.get(base).json()["revision"]
    assert client.post(f"{base}/prompts", json={**CLICK, "revision": seen}).status_code == 200
    late = client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [12, 15, 11]}, "revision": seen})
    assert late.status_code == 409 and "changed elsewhere" in late.json()["detail"]
    now = client.get(base).json()
    assert len(now["objects"][0]["prompts"]) == 1
    assert client.post(f"{base}/undo", json={"revision": now["revision"]}).status_code == 200


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


def test_upload(client, ball, tmp_path):
    content = (tmp_path / "ball.nii.gz").read_bytes()
    answer = client.post("/api/sessions/upload", params={"name": "../../Röntgen bild.nii.gz"}, content=content)
    assert answer.status_code == 201 and answer.json()["size_ijk"] == [32, 28, 24]
    assert client.post(f"/api/sessions/{answer.json()['id']}/prompts", json=CLICK).status_code == 200
    assert {f.parent for f in (tmp_path / "sessions").rglob("*.nii.gz")} == {tmp_path / "sessions" / answer.json()["id"]}


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("x.nii.gz", b"", 400),
        ("x.exe", b"MZ", 415),
        ("x.mhd", b"ElementDataFile = /etc/passwd\n", 415),
        ("x.nii.gz", b"not gzip at all", 400),
        ("x.nii.gz", gzip.compress(b"\0" * 400), 400),
        ("x.nrrd", b"NRRD0004\n" + b"# long\n" * 20_000, 400),
        ("x.nrrd", b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\ndata file: /etc/passwd\nencoding: raw\n\n", 400),
        ("x.mha", b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n", 400),
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
    bomb = gzip.compress(header + bytes(100 * 2**20), 1)
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
    with served(tmp_path, access=Access(largest_upload=2**20)) as client:
        answer = client.post("/api/sessions/upload", params={"name": "x.zip"}, content=(tmp_path / "x.zip").read_bytes())
        assert answer.status_code == 400 and "more bytes than are allowed" in answer.json()["detail"]


def test_a_zip_of_a_dicom_folder(tmp_path):
    pytest.importorskip("pydicom", reason="needs samed3d[dicom]")
    from tests.dicom_trees import image_series

    image_series(tmp_path / "ct", np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6))
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for file in sorted((tmp_path / "ct").iterdir()):
            archive.write(file, f"folder/{file.name}")
    with served(tmp_path) as client:
        answer = client.post("/api/sessions/upload", params={"name": "ct.zip"}, content=(tmp_path / "ct.zip").read_bytes())
        assert answer.status_code == 201, answer.text
        assert answer.json()["size_ijk"] == list(read_volume(tmp_path / "ct").grid.size_ijk)
        pytest.importorskip("highdicom", reason="needs samed3d[dicom]")
        base = f"/api/sessions/{answer.json()['id']}"
        client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [4, 2, 2]}})
        (tmp_path / "seg.dcm").write_bytes(client.get(f"{base}/export", params={"format": "dicom-seg"}).content)
        import pydicom

        assert pydicom.dcmread(tmp_path / "seg.dcm").Modality == "SEG"


def test_a_sleeping_session_comes_back_with_its_masks(client):
    registry = client.app.state.service.registry
    session_id = opened(client)
    client.post(f"/api/sessions/{session_id}/prompts", json=CLICK)
    before, mask = client.get(f"/api/sessions/{session_id}").json(), masks_of(client, session_id)[1]
    registry.get(session_id).used -= 10_000
    assert registry.expire() == [session_id]
    for _ in range(100):
        if not registry.awake():
            break
        time.sleep(0.02)
    assert not registry.awake() and not client.get("/api/sessions").json()[0]["awake"]
    assert client.get(f"/api/sessions/{session_id}").json() == before
    assert np.array_equal(masks_of(client, session_id)[1], mask)


def test_sessions_in_memory_are_bounded_and_none_is_lost(tmp_path, ball):
    with served(tmp_path, limits=Limits(awake=2, busy_seconds=0.0)) as client:
        ids = [opened(client) for _ in range(5)]
        for session_id in ids:
            assert client.post(f"/api/sessions/{session_id}/prompts", json=CLICK).status_code == 200
        assert len(client.app.state.service.registry.awake()) == 2
        assert all(len(client.get(f"/api/sessions/{i}").json()["objects"][0]["prompts"]) == 1 for i in ids)


def test_a_full_server_says_when_to_come_back(tmp_path, ball):
    with served(tmp_path, limits=Limits(awake=1, stored=2, busy_seconds=1000.0)) as client:
        opened(client)
        answer = client.post("/api/sessions", json={"path": "ball.nii.gz"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    with served(tmp_path, limits=Limits(stored=1)) as client:
        assert client.post("/api/sessions", json={"path": "ball.nii.gz"}).status_code == 507


def test_delete(client, tmp_path):
    session_id = opened(client)
    assert client.delete(f"/api/sessions/{session_id}").status_code == 204
    assert client.get(f"/api/sessions/{session_id}").status_code == 404
    assert not (tmp_path / "sessions" / session_id).exists()


def test_one_shot(client, tmp_path):
    prompts = {"version": 1, "space": "ijk", "objects": [{"id": 3, "prompts": [CLICK["prompt"]]}]}
    by_path = client.post("/segment", json={"path": "ball.nii.gz", "prompts": prompts})
    assert by_path.status_code == 200, by_path.text
    with (tmp_path / "ball.nii.gz").open("rb") as file:
        sent = client.post("/segment", files={"image": ("ball.nii.gz", file)}, data={"prompts": json.dumps(prompts), "format": "mha"})
    assert sent.status_code == 200, sent.text
    (tmp_path / "a.nii.gz").write_bytes(by_path.content)
    (tmp_path / "b.mha").write_bytes(sent.content)
    mask = read_volume(tmp_path / "a.nii.gz").array
    assert np.array_equal(mask, read_volume(tmp_path / "b.mha").array) and mask.any()
    assert client.get("/api/sessions").json() == [] and not list((tmp_path / "sessions").glob(".segment-*"))
    for body in ({"path": "ball.nii.gz"}, {"path": "ball.nii.gz", "prompts": {"version": 1, "objects": []}}, {"prompts": prompts}, []):
        assert client.post("/segment", json=body).status_code == 400
    assert client.post("/segment", content=b"x", headers={"content-type": "text/plain"}).status_code == 415


def test_the_page_of_the_api_names_every_route(client):
    page, described = client.get("/docs").text, client.get("/openapi.json").json()
    assert len(described["paths"]) > 30 and all(path in page for path in described["paths"])
    assert "http" not in page.split("<style>")[0]


def test_metrics(client):
    client.post(f"/api/sessions/{opened(client)}/prompts", json=CLICK)
    text = client.get("/metrics").text
    assert "samed3d_prediction_seconds_count 1" in text and "samed3d_sessions_awake 1" in text
    assert 'route="/api/sessions/{session_id}/prompts",status="200"} 1' in text


def test_the_clients_calls_are_the_sessions(tmp_path, ball):
    with ServerProcess(tmp_path) as server:
        with Client(server.url).open(tmp_path / "ball.nii.gz") as remote, Session.open(ball, tiny_model()) as alone:
            prior = np.zeros(ball.array.shape, np.uint8)
            prior[9:13, 13:17, 11:15] = 1
            for number, prompt in enumerate(
                [
                    Point(BALL_IJK),
                    Point((13, 15, 21), False),
                    Scribble(((12, 15, 11), (14, 15, 11))),
                    Box((7, 9, 5), (19, 21, 17)),
                    MaskPrior(prior),
                ]
            ):
                here, there = alone.add(prompt, 1 + number // 3), remote.add(prompt, 1 + number // 3)
                assert (here.region, here.prompt_id) == (there.region, there.prompt_id) and np.array_equal(here.mask, there.mask)
            for name in ("undo", "undo", "redo"):
                getattr(alone, name)()
                getattr(remote, name)()
            for each in (alone, remote):
                each.edit_object(1, name="ball", colour="#112233")
                each.move(1, Point((12, 15, 11)))
                each.remove(2)
            for number in (1, 2):
                assert np.array_equal(alone.mask_of(number), remote.mask_of(number))
                assert np.abs(alone.probability(number) - remote.probability(number)).max() <= 0.5 / 255 + 1e-6
            assert remote.suggest_click(1) == alone.suggest_click(1)
            assert [o.name for o in remote.objects()] == [o.name for o in alone.objects()]
            remote.remove_object(2)
            with pytest.raises(InputError, match="no mask yet"):
                remote.mask_of(2)
            remote.export(tmp_path / "out.nii.gz")
            assert np.array_equal(read_volume(tmp_path / "out.nii.gz").array, remote.mask_of(1))
        again = Client(server.url).resume(remote.id)
        assert again.objects()[0].name == "ball"
        with pytest.raises(RemoteError, match="inside the volume") as caught:
            again.add(Point((99, 0, 0)))
        assert caught.value.status == 400
        other = Client(server.url).resume(remote.id)
        other.add(Point(BALL_IJK))
        with pytest.raises(RemoteError, match="changed elsewhere"):
            again.add(Point(BALL_IJK))
        again.refresh()
        again.add(Point((12, 15, 11)))
        last: list[int] = []
        clicking = threading.Thread(target=lambda: last.append(again.add(Point((14, 15, 11))).prompt_id))
        clicking.start()
        time.sleep(0.05)
        assert server.stop() == 0  # a request under way is answered first
        clicking.join(10)
        assert len(last) == 1
        with pytest.raises(RemoteError, match="does not answer"):
            again.delete()


def test_kill_and_restart_brings_the_session_back(tmp_path, ball):
    server = ServerProcess(tmp_path)
    try:
        remote = Client(server.url).open_path("ball.nii.gz")
        remote.add(Point(BALL_IJK), name="ball")
        remote.add(Point((13, 15, 21), False))
        remote.undo()
        told: list[int] = []

        def click() -> None:
            try:
                for step in range(200):
                    told.append(remote.add(Point((10 + step % 7, 15, 11))).prompt_id)
            except RemoteError:
                pass

        clicking = threading.Thread(target=click)
        clicking.start()
        while len(told) < 5:
            time.sleep(0.005)
        server.kill()
        clicking.join(20)
        assert 5 <= len(told) < 200
        server = ServerProcess(tmp_path, server.port)
        back = Client(server.url).resume(remote.id)
        ids = [p["id"] for p in back.objects()[0].prompts]
        # Every prompt that was acknowledged; perhaps one more, which was written down and not yet answered.
        assert ids[: 1 + len(told)] == [1, *told] and len(ids) <= 2 + len(told)
        alone = Session.open(ball, tiny_model())
        for prompt in back.objects()[0].prompts:
            alone.add(Point(tuple(prompt["at"]), prompt["positive"]))
        assert np.array_equal(back.mask_of(1), alone.mask)
        back.add(Point((13, 16, 11)))
    finally:
        server.kill()


def test_only_one_server_may_use_a_folder(tmp_path):
    with served(tmp_path), pytest.raises(InputError, match="another server uses"), served(tmp_path):
        pass


def test_a_real_scan(data_dir, tmp_path):
    """The default model on a real MR, as a client sees it."""
    from fastapi.testclient import TestClient

    from samed3d.apps.server import create_app
    from samed3d.apps.service import ServerOptions

    images = data_dir / "msd_hippocampus" / "imagesTr"
    name = sorted(p.name for p in images.iterdir())[0]
    with TestClient(create_app(ServerOptions(tmp_path / "s", (images,))), base_url="http://localhost") as client:
        base = f"/api/sessions/{client.post('/api/sessions', json={'path': name}).json()['id']}"
        size = client.get(base).json()["size_ijk"]
        answer = client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [n // 2 for n in size]}})
        assert answer.status_code == 200 and answer.json()["seconds"] > 0
        assert client.get(f"{base}/export").status_code == 200


def test_a_mask_prior_travels_as_bits(client, ball):
    base = f"/api/sessions/{opened(client)}"
    prior = np.zeros(ball.array.shape, np.uint8)
    prior[3:9, 4:12, 5:20] = 1
    body = {"prompt": {"type": "mask", **PackedMask.of(prior).to_json()}}
    assert client.post(f"{base}/prompts", json=body).status_code == 200
    assert np.array_equal(masks_of(client, base.rsplit("/", 1)[1])[1], prior)
    assert "bits" not in client.get(base).json()["objects"][0]["prompts"][0]


def test_reading_a_large_image_holds_nobody_up(client, monkeypatch):
    import samed3d.apps.sessions as sessions

    first, gate, reads = opened(client), threading.Event(), []
    real = sessions.read_volume

    def slow(path, **picked):
        reads.append(path)
        gate.wait(10)
        return real(path, **picked)

    monkeypatch.setattr(sessions, "read_volume", slow)
    opening = threading.Thread(target=opened, args=(client,))
    opening.start()
    while not reads:
        time.sleep(0.01)
    assert client.post(f"/api/sessions/{first}/prompts", json=CLICK).status_code == 200  # while the other is still read
    gate.set()
    opening.join(10)
    assert len(client.get("/api/sessions").json()) == 2 and len(reads) == 1

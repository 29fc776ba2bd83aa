"""The REST API: sessions, prompts, results, every kind of bad input, two tabs."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from samed3d.inference.session import Session
from samed3d.prompts import PackedMask, Point
from samed3d.volume import read_volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import BALL_IJK, CLICK, masks_of, opened, served, tiny_model, write_ball


@pytest.fixture
def ball(tmp_path: Path):
    return write_ball(tmp_path / "ball.nii.gz")


@pytest.fixture
def client(tmp_path: Path, ball):
    with served(tmp_path, images=ReadLimits(voxels=100_000)) as running:
        yield running


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
    second = client.post(
        f"{base}/prompts", json={"prompt": {"type": "box", "min": [7, 9, 5], "max": [19, 21, 17]}, "object_id": 2}
    ).json()
    assert [o["name"] for o in second["session"]["objects"]] == ["ball", "object 2"]
    moved = client.put(
        f"{base}/prompts/{first['prompt_id']}", json={"prompt": {"type": "point", "at": [12, 15, 11]}}
    ).json()
    assert moved["session"]["objects"][0]["prompts"][0]["at"] == [12, 15, 11]
    gone = client.delete(f"{base}/prompts/{second['prompt_id']}").json()
    assert gone["session"]["objects"][1]["prompts"] == []
    assert client.patch(f"{base}/objects/1", json={"locked": True, "colour": "#00ff00"}).json()["session"]["objects"][
        0
    ]["locked"]
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
        (
            {"type": "mask", "size": [2, 2, 2], "start": [0, 0, 0], "stop": [2, 2, 2], "bits": "eJxjAAAAAQAB"},
            "size|shape",
        ),
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
    assert (
        client.post(f"{base}/prompts", content=b"{broken", headers={"content-type": "application/json"}).status_code
        == 422
    )


@pytest.mark.parametrize("session_id", ["nothing", "x" * 22, "..%2f..", "a" * 5000])
def test_an_unknown_session_is_a_404(client, session_id):
    for answer in (
        client.get(f"/api/sessions/{session_id}"),
        client.post(f"/api/sessions/{session_id}/prompts", json=CLICK),
    ):
        assert answer.status_code == 404


def test_objects_and_prompts_that_are_not_there_are_refused(client):
    base = f"/api/sessions/{opened(client)}"
    assert client.get(f"{base}/objects/7/mask").status_code == 400
    assert client.delete(f"{base}/prompts/7").status_code == 400
    assert client.get(f"{base}/suggest").status_code == 400
    assert client.get(f"{base}/export", params={"format": "jpeg"}).status_code == 400
    assert client.patch(f"{base}/objects/1", json={"name": "x"}).status_code == 400


def test_an_object_is_cleaned_and_the_edit_is_undone(client):
    session_id = opened(client)
    base = f"/api/sessions/{session_id}"
    client.post(f"{base}/prompts", json=CLICK)
    before = masks_of(client, session_id)[1]
    answer = client.post(f"{base}/objects/1/clean", json={"grow_mm": 3, "keep_largest": True})
    after = masks_of(client, session_id)[1]
    assert answer.status_code == 200 and answer.json()["updates"][0]["object_id"] == 1
    assert after.sum() > before.sum() and not (before & ~after).any()
    client.post(f"{base}/undo", json={})
    assert np.array_equal(masks_of(client, session_id)[1], before)
    wrong = {"grow_mm": -90}, {"smooth_mm": -1}, {"keep_larges": True}
    assert [client.post(f"{base}/objects/1/clean", json=body).status_code for body in wrong] == [400, 400, 422]
    assert np.array_equal(masks_of(client, session_id)[1], before)


def test_two_tabs_on_one_session(client):
    base = f"/api/sessions/{opened(client)}"
    seen = client.get(base).json()["revision"]
    assert client.post(f"{base}/prompts", json={**CLICK, "revision": seen}).status_code == 200
    late = client.post(f"{base}/prompts", json={"prompt": {"type": "point", "at": [12, 15, 11]}, "revision": seen})
    assert late.status_code == 409 and "changed elsewhere" in late.json()["detail"]
    now = client.get(base).json()
    assert len(now["objects"][0]["prompts"]) == 1
    assert client.post(f"{base}/undo", json={"revision": now["revision"]}).status_code == 200


def test_the_page_of_the_api_names_every_route(client):
    page, described = client.get("/docs").text, client.get("/openapi.json").json()
    assert len(described["paths"]) > 30 and all(path in page for path in described["paths"])
    assert "http" not in page.split("<style>")[0]


def test_metrics(client):
    client.post(f"/api/sessions/{opened(client)}/prompts", json=CLICK)
    text = client.get("/metrics").text
    assert "samed3d_prediction_seconds_count 1" in text and "samed3d_sessions_loaded 1" in text
    assert 'route="/api/sessions/{session_id}/prompts",status="200"} 1' in text


def test_a_real_scan(data_dir, tmp_path):
    """The default model on a real MR, as a client sees it."""
    from fastapi.testclient import TestClient

    from samed3d.apps.server.app import create_app
    from samed3d.apps.server.service import ServerOptions

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


def test_a_full_disk_is_not_the_client_s_fault(client, monkeypatch):
    def full(*_paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("samed3d.output.os.replace", full)
        answer = client.post("/api/sessions", json={"path": "ball.nii.gz"})
    assert answer.status_code == 507 and "No space left" in answer.json()["detail"]
    assert opened(client)


BODIES = {
    ("POST", "/api/sessions"): {"path": "ball.nii.gz"},
    ("POST", "/api/sessions/{s}/prompts"): CLICK,
    ("PUT", "/api/sessions/{s}/prompts/1"): CLICK,
    ("POST", "/api/sessions/{s}/undo"): {},
    ("POST", "/api/sessions/{s}/redo"): {},
    ("POST", "/api/sessions/{s}/objects"): {},
    ("PATCH", "/api/sessions/{s}/objects/1"): {"name": "x"},
    ("PUT", "/api/sessions/{s}/rule"): {"others_are_negative": True},
    ("POST", "/segment"): {"path": "ball.nii.gz", "prompts": {}},
}


@pytest.mark.parametrize("route", BODIES, ids=" ".join)
def test_an_unknown_key_of_a_body_is_refused_with_the_nearest_name(client, route):
    session_id = opened(client)
    client.post(f"/api/sessions/{session_id}/prompts", json=CLICK)
    before = client.get(f"/api/sessions/{session_id}").json()
    known = next(iter(BODIES[route]), "revision")
    answer = client.request(route[0], route[1].format(s=session_id), json={**BODIES[route], known[:-1]: True})
    assert answer.status_code in (400, 422) and "\n" not in answer.text
    assert f"the body has no key {known[:-1]!r}; did you mean {known}?" in answer.json()["detail"]
    assert client.get(f"/api/sessions/{session_id}").json() == before and len(client.get("/api/sessions").json()) == 1


def test_an_unknown_query_parameter_is_refused_by_every_route(client):
    from samed3d.apps.server.routes import api

    session_id = opened(client)
    for route in api.routes:
        known = [query.alias for query in route.dependant.query_params] or ["any"]
        path = route.path.format(session_id=session_id, object_id=1, prompt_id=1)
        answer = client.request(next(iter(route.methods)), path, params={f"{known[0]}x": "true"})
        assert answer.status_code == 400, route.path
        assert f"the address has no parameter '{known[0]}x'; " in answer.json()["detail"]
    assert [s["id"] for s in client.get("/api/sessions").json()] == [session_id]


def test_a_form_refuses_unknown_fields(client, tmp_path):
    prompts = json.dumps({"version": 1, "objects": [{"prompts": [CLICK["prompt"]]}]})
    files = {"image": ("ball.nii.gz", (tmp_path / "ball.nii.gz").read_bytes())}
    assert client.post("/segment", files=files, data={"prompts": prompts}).status_code == 200
    answer = client.post("/segment", files=files, data={"prompts": prompts, "formt": "nrrd"})
    assert answer.status_code == 400 and "the form has no field 'formt'; did you mean format?" in answer.text

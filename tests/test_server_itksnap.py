"""ITK-SNAP's deep-learning protocol, with requests as ITK-SNAP makes them: GET for clicks, multipart for images."""

from __future__ import annotations

import base64
import gzip
import json

import numpy as np
import pytest

from samed3d.inference.session import Session
from samed3d.prompts import Point
from samed3d.volume import Volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import BALL_IJK, served, tiny_model, write_ball

X, Y, Z = BALL_IJK


@pytest.fixture
def ball(tmp_path) -> Volume:
    return write_ball(tmp_path / "ball.nii.gz")


@pytest.fixture
def client(tmp_path):
    with served(tmp_path, images=ReadLimits(voxels=100_000)) as running:
        yield running


def upload(client, address: str, array: np.ndarray, **about):
    """As ITK-SNAP encodes an image: gzip of float32, dimensions x first."""
    metadata = json.dumps({"dimensions": list(array.shape[::-1]), "components_per_pixel": 1, **about})
    packed = gzip.compress(array.astype("<f4").tobytes())
    files = {"file": ("upload.nii.gz", packed, "application/octet-stream")}
    return client.post(address, files=files, data={"metadata": metadata})


def started(client, array: np.ndarray) -> str:
    session = client.get("/start_session").json()["session_id"]
    assert upload(client, f"/upload_raw/{session}?filename=upload.nii.gz", array).status_code == 200
    return session


def mask_of(answer, shape) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["status"] == "success"
    raw = gzip.decompress(base64.b64decode(body["result"]))
    return np.frombuffer(raw, np.int8).reshape(shape)


def test_status_and_models(client):
    assert client.get("/status").json() == {"status": "ok", "version": "0.1.2"}
    (model,) = client.get("/v2/models").json()["models"]
    assert model["id"] == "nnInteractive" and model["interactions"] == ["point", "scribble", "lasso"]


def test_clicks_give_the_masks_of_a_session(client, ball):
    session = started(client, ball.array)
    alone = Session.open(Volume.from_array(ball.array, spacing_mm=(1, 1, 1)), tiny_model())
    for at, positive in (((X, Y, Z), True), ((X, Y, Z + 9), False)):
        x, y, z = at
        address = f"/process_point_interaction/{session}?x={x}&y={y}&z={z}&foreground={str(positive).lower()}"
        mask = mask_of(client.get(address), ball.array.shape)
        alone.add(Point(at, positive))
        assert np.array_equal(mask, alone.mask) and mask.any()


def test_version_two_clicks_and_reset_begin_a_new_object(client, ball):
    session = client.get("/v2/start_session/nnInteractive").json()["session_id"]
    assert upload(client, f"/v2/upload_raw/{session}", ball.array).status_code == 200
    click = f"/v2/process_point_interaction/{session}?point={X}&point={Y}&point={Z}&foreground=true"
    first = mask_of(client.get(click), ball.array.shape)
    assert first[Z, Y, X] == 1
    assert client.get(f"/v2/reset_interactions/{session}").json() == {"status": "success"}
    assert np.array_equal(mask_of(client.get(click), ball.array.shape), first)
    assert len(client.get(f"/api/sessions/{session}").json()["objects"]) == 2
    assert client.get(f"/v2/end_session/{session}").json() == {"message": "Session ended"}


def test_scribbles_and_lassos_are_drawn_images(client, ball):
    session = started(client, ball.array)
    drawing = np.zeros(ball.array.shape, np.float32)
    drawing[Z, Y, X - 3 : X + 4] = 2
    mask = mask_of(upload(client, f"/process_scribble_interaction/{session}?foreground=true", drawing), drawing.shape)
    assert mask[drawing > 0].all()
    drawing[:] = 0
    drawing[Z + 9, Y - 3 : Y + 4, X - 3 : X + 4] = 1
    mask = mask_of(upload(client, f"/process_lasso_interaction/{session}?foreground=false", drawing), drawing.shape)
    assert not mask[drawing > 0].any()


def test_a_session_survives_a_restart(tmp_path, ball):
    with served(tmp_path) as client:
        session = started(client, ball.array)
        click = f"/process_point_interaction/{session}?x={X}&y={Y}&z={Z}&foreground=true"
        first = mask_of(client.get(click), ball.array.shape)
    with served(tmp_path) as client:
        second = mask_of(client.get(click), ball.array.shape)
        assert second[first > 0].all()
        assert len(client.get(f"/api/sessions/{session}").json()["objects"][0]["prompts"]) == 2


def test_an_upload_may_be_larger_than_a_json_body(tmp_path, ball):

    with served(tmp_path, largest_json=100) as client:
        started(client, ball.array)
        assert client.post("/api/sessions", content=b"x" * 101).status_code == 413


@pytest.mark.parametrize(
    ("about", "status", "message"),
    [
        ({"dimensions": [4, 4]}, 400, "must give three dimensions"),
        ({"dimensions": [4, 4, 4]}, 400, "must hold 256 bytes for its dimensions"),
        ({"dimensions": [1000, 1000, 1000]}, 413, "at most 100000 voxels"),
        ({"components_per_pixel": 3}, 400, "one component per voxel"),
    ],
)
def test_images_that_do_not_fit_are_refused(client, ball, about, status, message):
    session = client.get("/start_session").json()["session_id"]
    answer = upload(client, f"/upload_raw/{session}", ball.array, **about)
    assert answer.status_code == status and message in answer.json()["detail"]


def test_what_cannot_be_answered_says_why(client, ball):
    session = client.get("/start_session").json()["session_id"]
    click = f"/process_point_interaction/{session}?x=1&y=1&z=1&foreground=true"
    assert "there is no image yet" in client.get(click).json()["detail"]
    assert client.get("/process_point_interaction/unknown?x=1&y=1&z=1").status_code == 404
    assert client.get("/v2/start_session/SAM2").status_code == 404
    files = {"file": ("upload.nii.gz", b"not gzip", "application/octet-stream")}
    answer = client.post(
        f"/upload_raw/{session}", files=files, data={"metadata": json.dumps({"dimensions": [2, 2, 2]})}
    )
    assert answer.status_code == 400 and "must be gzip" in answer.json()["detail"]
    assert upload(client, f"/upload_raw/{session}", np.full((4, 4, 4), np.nan)).status_code == 400


def test_a_page_in_a_browser_cannot_start_sessions(client):
    assert client.get("/start_session", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/start_session", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 403


def test_clients_of_nninteractive_before_two_are_told_to_update(client):
    for route in ("upload_image", "upload_segment"):
        answer = client.post(f"/{route}", files={"file": ("a", b"x")})
        assert answer.status_code == 426 and "update the client" in answer.json()["detail"]


@pytest.mark.parametrize("typo", ["forground=true", "positive=true", "foreground=true&w=3"])
def test_a_misspelt_click_is_refused_and_never_counts(client, ball, typo):
    session = started(client, ball.array)
    answer = client.get(f"/process_point_interaction/{session}?x={X}&y={Y}&z={Z}&{typo}")
    assert answer.status_code == 400 and "the address has no parameter" in answer.json()["detail"]
    assert not client.get(f"/api/sessions/{session}").json()["objects"]

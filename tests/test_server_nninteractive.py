"""nnInteractive's protocol, driven by its own client package, and damaged messages."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from samed3d.apps.server.nninteractive_arrays import (
    box_prompt,
    drawn_region,
    grid_of,
    lasso_prompts,
    pack_array,
    scribble_prompts,
    unpack_array,
)
from samed3d.errors import InputError
from samed3d.inference.model_prompts import to_model_prompts
from samed3d.inference.session import Session
from samed3d.prompts import Box, Mask, Point
from samed3d.volume import Volume, read_volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import BALL_IJK, ServerProcess, served, tiny_model, write_ball

CENTRE = BALL_IJK[::-1]
"""Of the ball, as a position in the array that a client sends."""


@pytest.fixture(scope="module")
def remote():
    return pytest.importorskip("nnInteractive.inference.remote", reason="needs the package nninteractive-client")


@pytest.fixture
def ball(tmp_path: Path) -> Volume:
    return write_ball(tmp_path / "ball.nii.gz")


def local(ball: Volume) -> Session:
    """The session that a client's image becomes, without a server."""
    return Session.open(
        Volume(ball.array, grid_of(ball.array.shape, {"spacing": list(ball.grid.spacing_zyx_mm)}), "array"),
        tiny_model(),
    )


def begun(remote, server: ServerProcess, ball: Volume):
    session = remote.nnInteractiveRemoteInferenceSession(server.url)
    session.set_image(ball.array[None], {"spacing": np.array(ball.grid.spacing_zyx_mm)})
    target = np.zeros(ball.array.shape, np.uint8)
    session.set_target_buffer(target)
    return session, target


def test_every_call_of_the_client(remote, tmp_path, ball):
    alone = local(ball)
    with ServerProcess(tmp_path) as server:
        session, target = begun(remote, server, ball)
        assert (
            session.ping() and 0 < session.heartbeat() <= 600 and session.lease_status()["idle_timeout_seconds"] == 600
        )
        assert (
            session.supports_undo
            and session.license == "Apache-2.0"
            and session.supported_interactions["bbox3d"]
            and session.original_image_shape == (1, *ball.array.shape)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.initialize_from_trained_model_folder("anything")
        session.set_do_autozoom(True)

        def same(*prompts) -> bool:
            for prompt in prompts:
                alone.add(prompt, same.object_id)
            return np.array_equal(target, alone.mask_of(same.object_id))

        same.object_id = 1
        box = session.add_point_interaction(CENTRE, include_interaction=True)
        assert (
            box is not None
            and target[tuple(slice(*ends) for ends in box)].sum() == target.sum() > 0
            and same(Point(BALL_IJK))
        )
        session.add_point_interaction((21, 15, 13), include_interaction=False)
        assert same(Point((13, 15, 21), False))
        session.add_bbox_interaction([[5, 18], [9, 22], [7, 20]], include_interaction=True)
        assert same(Box((7, 9, 5), (19, 21, 17)))
        session.add_bbox_interaction([[11, 12], [9, 22], [7, 20]], include_interaction=True)
        assert same(Box((7, 9, 11), (19, 21, 11)))
        before = target.copy()
        session.add_bbox_interaction([[11, 12], [13, 18], [10, 12]], include_interaction=False)
        assert not target[11, 13:18, 10:12].any() and before[11, 13:18, 10:12].any()
        assert session.undo() and np.array_equal(target, before)
        stroke = np.zeros(ball.array.shape, np.uint8)
        stroke[3, 3:9, 4] = stroke[3, 8, 4:12] = stroke[20, 20, 20] = 1
        session.add_scribble_interaction(stroke, include_interaction=True)
        assert target[stroke > 0].all()
        session.add_scribble_interaction(
            np.ones((1, 2, 3), np.uint8), include_interaction=False, interaction_bbox=[[11, 12], [15, 17], [12, 15]]
        )
        assert not target[11, 15:17, 12:15].any()
        loop = np.zeros(ball.array.shape, bool)
        loop[:, 15, :][9:14, 9:17] = True
        session.add_lasso_interaction(loop, include_interaction=False)
        assert not target[loop].any()
        for _ in range(7):
            assert session.undo()
        assert not session.undo() and not target.any()
        session.close()
        session.close()


def test_a_segmentation_to_start_from_and_prompts_without_a_look(remote, tmp_path, ball):
    with ServerProcess(tmp_path) as server:
        session, target = begun(remote, server, ball)
        session.add_point_interaction(CENTRE, include_interaction=True)
        first = target.copy()
        session.reset_interactions()
        assert not target.any() and not session.undo()
        prior = np.zeros(ball.array.shape, np.uint8)
        prior[5:18, 9:22, 7:20] = 1
        assert session.add_initial_seg_interaction(prior) is None and np.array_equal(target, prior)
        assert session.add_point_interaction(CENTRE, include_interaction=True, run_prediction=False) is None
        assert np.array_equal(target, prior)
        assert session._predict() is not None and 0 < target.sum() < prior.sum()
        alone = local(ball)
        alone.add(Mask(prior))
        alone.add(Point(BALL_IJK))
        assert np.array_equal(target, alone.mask)
        session.add_initial_seg_interaction(prior, run_prediction=True)
        # The object before the reset is still there, for whoever asks our own API.
        from samed3d.apps.client import Client

        assert np.array_equal(Client(server.url).resume(session._lease_token).mask_of(1), first)


def test_a_lease_outlives_a_crash(remote, tmp_path, ball):
    server = ServerProcess(tmp_path)
    session, target = begun(remote, server, ball)
    session.add_point_interaction(CENTRE, include_interaction=True)
    before = target.copy()
    session.add_point_interaction((21, 15, 13), include_interaction=False)
    server.kill()
    with ServerProcess(tmp_path, server.port):
        session._http.headers["Connection"] = "close"
        assert session.undo() and np.array_equal(target, before)
        session.add_bbox_interaction([[5, 18], [9, 22], [7, 20]], include_interaction=True)
        with pytest.raises(remote.SessionExpiredError, match="claim a new one"):
            session._http.headers["X-Lease-Token"] = "x" * 22
            session.undo()


def test_the_clients_errors(remote, tmp_path, ball):
    import httpx

    with ServerProcess(tmp_path, loaded=1, busy_seconds=1000) as server:
        session, target = begun(remote, server, ball)
        with pytest.raises(httpx.HTTPStatusError, match="400") as caught:
            session.add_point_interaction((99, 0, 0), include_interaction=True)
        assert "inside the volume" in caught.value.response.json()["detail"]
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            session.add_point_interaction(CENTRE, include_interaction=False)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            session.set_image(np.zeros((1, 5, 6, 7), np.float32))
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            session.set_target_buffer(np.zeros((2, 2, 2), np.uint8))
        session.set_image(ball.array[None])
        session.set_target_buffer(target)
        session.add_point_interaction(CENTRE, include_interaction=True)
        assert target.any()
        with pytest.raises(remote.ServerAtCapacityError):
            remote.nnInteractiveRemoteInferenceSession(server.url)


@pytest.mark.parametrize("source", ["totalseg_ct_example", "totalseg_mr_example"])
def test_the_client_on_a_real_volume(remote, data_dir, tmp_path, source):
    image = next(iter(sorted((data_dir / source / "imagesTr").glob("*.nii.gz"))), None)
    if image is None:
        pytest.skip(f"no image in {source}")
    volume = read_volume(image)
    middle = tuple(slice(n // 4, n // 4 + 40) for n in volume.array.shape)
    array = np.ascontiguousarray(volume.array[middle])
    with ServerProcess(tmp_path) as server:
        session = remote.nnInteractiveRemoteInferenceSession(server.url)
        session.set_image(array[None], {"spacing": volume.grid.spacing_zyx_mm})
        target = np.zeros(array.shape, np.uint16)
        session.set_target_buffer(target)
        bright = np.unravel_index(int(array.argmax()), array.shape)
        session.add_point_interaction(bright, include_interaction=True)
        assert target[bright] == 1 and target.max() == 1
        assert session.undo() and not target.any()


@pytest.fixture
def plain(tmp_path, ball):
    with served(tmp_path, images=ReadLimits(voxels=50_000), largest_upload=500_000) as client:
        client.headers["X-Lease-Token"] = client.post("/claim").json()["lease_token"]
        yield client


def damaged() -> dict[str, bytes]:
    whole = pack_array(np.zeros((1, 8, 8, 8), np.float32))
    return {
        "empty": b"",
        "magic": b"XXXX" + whole[4:],
        "version": whole[:4] + b"\x09" + whole[5:],
        "codec": whole[:5] + b"\x09" + whole[6:],
        "axes": whole[:6] + b"\xff" + whole[7:],
        "cut": whole[:-10],
        "trailing": whole + b"x",
        "object": whole.replace(b"float32", b"object0"),
        "negative": whole.replace((8).to_bytes(8, "little"), (-8).to_bytes(8, "little", signed=True), 1),
        "huge": whole.replace((8).to_bytes(8, "little"), (2**40).to_bytes(8, "little"), 1),
        "frame": whole[:-8] + bytes(8),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_arrays_are_refused(plain, kind):
    answer = plain.post("/set_image", content=damaged()[kind])
    assert answer.status_code == 400 and "array" in answer.json()["detail"], answer.text
    assert "\n" not in answer.json()["detail"]


def test_what_is_packed_small_and_unpacks_large_is_refused(plain):
    bomb = pack_array(np.zeros((1, 400, 400, 400), np.uint8))
    assert len(bomb) < 300_000
    assert "at most 50000 voxels" in plain.post("/set_image", content=bomb).json()["detail"]


def test_no_damage_of_an_array_gets_past_the_reader(rng):
    whole = bytearray(pack_array(np.arange(4000, dtype=np.float32).reshape(10, 20, 20)))
    refused = 0
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(3):
            broken[rng.integers(len(broken))] = rng.integers(256)
        try:
            assert unpack_array(bytes(broken[: rng.integers(1, len(broken) + 1)]), 100_000).size <= 100_000
        except InputError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bool", "int64", "float16", "uint16"])
def test_arrays_are_the_clients_own(remote, dtype, rng):
    from nnInteractive.inference.remote.serialization import pack_array as theirs
    from nnInteractive.inference.remote.serialization import unpack_array as read_theirs

    array = (rng.random((1, 5, 6, 7)) * 3).astype(dtype)
    for found in (read_theirs(pack_array(array)), unpack_array(theirs(array), 1000)):
        assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize(
    ("path", "content", "headers"),
    [
        ("/add_point_interaction", b'{"coordinates": [1, 2, 3], "include_interaction": true}', {}),
        ("/add_point_interaction", b"[]", {}),
        ("/add_point_interaction", b"{broken", {}),
        ("/add_bbox_interaction", b'{"bbox_coords": [[1, 2]], "include_interaction": true}', {}),
        ("/add_scribble_interaction", pack_array(np.ones((2, 2, 2), np.uint8)), {"X-Meta": "{}"}),
        ("/add_scribble_interaction", pack_array(np.ones((2, 2, 2), np.uint8)), {"X-Meta": "not json"}),
        ("/set_target_buffer", b'{"shape": [2, 2, 2], "dtype": "uint8"}', {}),
        ("/set_do_autozoom", b"{}", {}),
    ],
)
def test_calls_that_make_no_sense_yet_are_a_400(plain, path, content, headers):
    answer = plain.post(path, content=content, headers=headers)
    assert answer.status_code == 400 and answer.json()["detail"]


def test_a_header_that_is_too_long_is_refused(plain):
    content = pack_array(np.ones((2, 2, 2), np.uint8))
    assert (
        plain.post(
            "/add_scribble_interaction", content=content, headers={"X-Meta": json.dumps({"a": "x" * 20_000})}
        ).status_code
        == 431
    )


def test_without_a_lease_there_is_nothing(plain):
    for token in ("", "x" * 22, "../../etc"):
        assert plain.post("/undo", headers={"X-Lease-Token": token}).status_code == 410
    assert plain.post("/release", headers={"X-Lease-Token": "x"}).json() == {"released": True}
    # A session of the REST API is no lease.
    session_id = plain.post("/api/sessions", json={"path": "ball.nii.gz"}).json()["id"]
    assert plain.post("/undo", headers={"X-Lease-Token": session_id}).status_code == 410


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lassos_hold_the_voxels_that_were_drawn(axis, ball):
    shape = ball.array.shape
    drawn = np.zeros(shape, bool)
    plane = [slice(4, 16), slice(5, 15), slice(6, 18)]
    plane[axis] = slice(9, 10)
    drawn[tuple(plane)] = True
    corner = [slice(4, 8), slice(5, 8), slice(6, 9)]
    corner[axis] = slice(9, 10)
    drawn[tuple(corner)] = False  # not convex
    prompts = lasso_prompts(*drawn_region(drawn, None, shape), False)
    said = to_model_prompts(prompts[0], ball, tiny_model().spec)
    found = np.zeros(shape, bool)
    found[tuple(said.voxels.T)] = True
    assert len(prompts) == 1 and np.array_equal(ball.view.to_stored(found), drawn)


def test_scribbles_mark_exactly_what_was_drawn(ball):
    shape = ball.array.shape
    drawn = np.zeros(shape, bool)
    drawn[4:7, 5:20, 6] = drawn[5, 12, 6:25] = drawn[15:18, 20:22, 20:22] = True
    for n in range(6):
        drawn[10 + n, 22 - n, 24 + n % 2] = True  # touches at corners only, in both directions
    prompts = scribble_prompts(*drawn_region(drawn, None, shape), True)
    found = np.zeros(shape, bool)
    for prompt in prompts:
        found[tuple(to_model_prompts(prompt, ball, tiny_model().spec).voxels.T)] = True
    assert len(prompts) == 3 and np.array_equal(ball.view.to_stored(found), drawn)


def test_drawings_that_cannot_be_understood(ball):
    shape = ball.array.shape
    with pytest.raises(InputError, match="nothing is drawn"):
        drawn_region(np.zeros(shape), None, shape)
    with pytest.raises(InputError, match="image's shape"):
        drawn_region(np.ones((2, 2, 2)), None, shape)
    with pytest.raises(InputError, match="shape of interaction_bbox"):
        drawn_region(np.ones((2, 2, 2)), [[0, 3], [0, 2], [0, 2]], shape)
    with pytest.raises(InputError, match="lie in one slice"):
        lasso_prompts(*drawn_region(np.ones(shape), None, shape), True)
    with pytest.raises(InputError, match="at least one voxel"):
        box_prompt([[5, 5], [0, 2], [0, 2]], True, shape)
    with pytest.raises(InputError, match="one voxel thick"):
        box_prompt([[0, 3], [0, 2], [0, 2]], False, shape)
    with pytest.raises(InputError, match="three numbers > 0"):
        grid_of(shape, {"spacing": [1, 0, 1]})
    dots = np.zeros(shape)
    dots[::4, ::4, ::4] = 1
    with pytest.raises(InputError, match="at most 256 strokes"):
        scribble_prompts(*drawn_region(dots, None, shape), True)
    dots[1:] = 0  # one slice with 56 pieces
    assert len(scribble_prompts(*drawn_region(dots, None, shape), True)) == int(dots.sum()) > 16


@pytest.mark.parametrize(
    ("path", "body", "header"),
    [
        ("set_target_buffer", {"shape": list(CENTRE), "dtype": "uint8", "dtyp": "bool"}, False),
        ("set_do_autozoom", {"do_autozoom": True, "autozoom": False}, False),
        (
            "add_point_interaction",
            {"coordinates": list(CENTRE), "include_interaction": True, "run_predicton": False},
            0,
        ),
        ("add_bbox_interaction", {"bbox_coords": [[5, 18]] * 3, "include_interaction": True, "negative": True}, False),
        ("add_scribble_interaction", {"include_interaction": True, "interaction_box": [[0, 1]] * 3}, True),
        ("add_lasso_interaction", {"include_interaction": True, "interaction_box": [[0, 1]] * 3}, True),
        ("add_initial_seg_interaction", {"include_interaction": False}, True),
        ("set_image", {"image_propertys": {"spacing": [1, 1, 1]}}, True),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(plain, path, body, header):
    headers = {"x-lease-token": plain.post("/claim").json()["lease_token"]}
    image = pack_array(np.random.default_rng(0).normal(size=(1, 24, 28, 32)).astype(np.float32))
    assert plain.post("/set_image", content=image, headers=headers).status_code == 200
    drawn = image if path == "set_image" else pack_array(np.ones((24, 28, 32), np.uint8))
    sent = {"content": drawn, "headers": {**headers, "x-meta": json.dumps(body)}}
    answer = plain.post(f"/{path}", **(sent if header else {"json": body, "headers": headers}))
    assert answer.status_code == 400 and " has no key " in answer.json()["detail"], answer.text
    assert not plain.get(f"/api/sessions/{headers['x-lease-token']}").json()["objects"]

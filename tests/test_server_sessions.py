"""Sessions of a server over time: sleep, bounds, crash, restart, and our own client."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from samed3d.apps.client import Client, RemoteError
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Box, Mask, Point, Scribble
from samed3d.volume import read_volume
from samed3d.volume.files import ReadLimits
from tests.server_tools import BALL_IJK, CLICK, ServerProcess, masks_of, opened, served, tiny_model, write_ball


@pytest.fixture
def ball(tmp_path: Path):
    return write_ball(tmp_path / "ball.nii.gz")


@pytest.fixture
def client(tmp_path: Path, ball):
    with served(tmp_path, images=ReadLimits(voxels=100_000)) as running:
        yield running


def test_an_unloaded_session_comes_back_with_its_masks(client):
    registry = client.app.state.service
    session_id = opened(client)
    client.post(f"/api/sessions/{session_id}/prompts", json=CLICK)
    before, mask = client.get(f"/api/sessions/{session_id}").json(), masks_of(client, session_id)[1]
    registry.get(session_id).used -= 10_000
    assert client.portal.call(registry.expire) == [session_id]
    for _ in range(100):
        if not registry.loaded():
            break
        time.sleep(0.02)
    assert not registry.loaded() and not client.get("/api/sessions").json()[0]["loaded"]
    assert client.get(f"/api/sessions/{session_id}").json() == before
    assert np.array_equal(masks_of(client, session_id)[1], mask)


def test_sessions_in_memory_are_bounded_and_none_is_lost(tmp_path, ball):
    with served(tmp_path, loaded=2, busy_seconds=0.0) as client:
        ids = [opened(client) for _ in range(5)]
        for session_id in ids:
            assert client.post(f"/api/sessions/{session_id}/prompts", json=CLICK).status_code == 200
        assert len(client.app.state.service.loaded()) == 2
        assert all(len(client.get(f"/api/sessions/{i}").json()["objects"][0]["prompts"]) == 1 for i in ids)


def test_a_full_server_says_when_to_come_back(tmp_path, ball):
    with served(tmp_path, loaded=1, stored=2, busy_seconds=1000.0) as client:
        opened(client)
        answer = client.post("/api/sessions", json={"path": "ball.nii.gz"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    with served(tmp_path, stored=1) as client:
        assert client.post("/api/sessions", json={"path": "ball.nii.gz"}).status_code == 507


def test_delete(client, tmp_path):
    session_id = opened(client)
    assert client.delete(f"/api/sessions/{session_id}").status_code == 204
    assert client.get(f"/api/sessions/{session_id}").status_code == 404
    assert not (tmp_path / "sessions" / session_id).exists()


def test_the_clients_calls_are_the_sessions(tmp_path, ball):
    with ServerProcess(tmp_path) as server:
        with Client(server.url).open(tmp_path / "ball.nii.gz") as remote, Session.open(ball, tiny_model()) as alone:
            assert remote.grid.shape_zyx == ball.array.shape
            np.testing.assert_allclose(remote.grid.affine_ras, ball.grid.affine_ras, atol=1e-6)
            prior = np.zeros(ball.array.shape, np.uint8)
            prior[9:13, 13:17, 11:15] = 1
            for number, prompt in enumerate(
                [
                    Point(BALL_IJK),
                    Point((13, 15, 21), False),
                    Scribble(((12, 15, 11), (14, 15, 11))),
                    Box((7, 9, 5), (19, 21, 17)),
                    Mask(prior),
                ]
            ):
                here, there = alone.add(prompt, 1 + number // 3), remote.add(prompt, 1 + number // 3)
                assert (here.region, here.prompt_id) == (there.region, there.prompt_id) and np.array_equal(
                    here.mask, there.mask
                )
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


def test_reading_a_large_image_holds_nobody_up(client, monkeypatch):
    import samed3d.apps.server.service as service

    first, gate, reads = opened(client), threading.Event(), []
    real = service.read_volume

    def slow(path, **picked):
        reads.append(path)
        gate.wait(10)
        return real(path, **picked)

    monkeypatch.setattr(service, "read_volume", slow)
    opening = threading.Thread(target=opened, args=(client,))
    opening.start()
    while not reads:
        time.sleep(0.01)
    assert client.post(f"/api/sessions/{first}/prompts", json=CLICK).status_code == 200  # while the other is still read
    gate.set()
    opening.join(10)
    assert len(client.get("/api/sessions").json()) == 2 and len(reads) == 1


def test_the_client_needs_neither_torch_nor_the_servers_libraries():
    code = "import sys, samed3d.apps.client; print(sorted({'torch', 'fastapi', 'SimpleITK', 'scipy', 'blosc2'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(("busy_seconds", "loaded"), [(0.0, 1), (1000.0, 3)])
def test_all_sessions_together_keep_to_their_memory(tmp_path, ball, busy_seconds, loaded):
    """What can be computed again is deleted first, and sessions in use are never unloaded; all masks stay the same."""
    with served(tmp_path, memory_bytes=200_000, busy_seconds=busy_seconds) as client:  # two images of 86 kB
        service, ids, masks = client.app.state.service, [], []
        for _ in range(3):
            ids.append(opened(client))
            client.post(f"/api/sessions/{ids[-1]}/prompts", json=CLICK)
            masks.append(masks_of(client, ids[-1])[1])
        found = service.loaded()
        assert len(found) == loaded
        assert all(e.nbytes < 90_000 for e in found if e.id != ids[-1]) and service.get(ids[-1]).nbytes > 90_000
        assert all(np.array_equal(masks_of(client, i)[1], mask) for i, mask in zip(ids, masks, strict=True))

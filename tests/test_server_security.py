"""Checks of requests: addresses, tokens, other sites, sizes, untrusted files, disconnected clients; metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from starlette.exceptions import HTTPException

from samed3d.apps.client import update_from_json
from samed3d.apps.server.files import confined, safe_name
from samed3d.apps.server.security import check_binding
from samed3d.apps.server.service import ServerOptions, Service
from samed3d.apps.server.sessions import update_to_json
from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.geometry import Region
from samed3d.volume.files import ReadLimits, check_untrusted
from tests.server_tools import served, tiny_model, write_ball

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def guarded(tmp_path):
    with served(tmp_path, token=TOKEN, hosts=frozenset({"scans.example.org"}), largest_json=2000) as client:
        yield client


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "path", ["/api/sessions", "/metrics", "/docs", "/openapi.json", "/capabilities", "/lease_status", "/nothing"]
)
def test_nothing_is_told_without_the_token(guarded, path):
    for headers in (
        {},
        bearer("wrong"),
        bearer(TOKEN + "x"),
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        bearer("é"),
    ):
        answer = guarded.get(path, headers={k: v.encode("utf-8") for k, v in headers.items()})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get(path, headers=bearer()).status_code != 401
    assert guarded.get("/healthz").json() == {"ok": True}


def test_a_token_in_an_address_is_refused_and_never_logged(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        assert guarded.get(f"/api/sessions?token={TOKEN}", headers=bearer()).status_code == 400
        guarded.get("/api/sessions", headers=bearer())
        guarded.get("/api/sessions", headers=bearer("wrong-wrong-wrong-wrong"))
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpx")]
    assert not any(TOKEN in line or "wrong-wrong" in line for line in ours)


@pytest.mark.parametrize("host", ["evil.example.com", "127.0.0.1.nip.io", "", "localhost.evil.com:80"])
def test_a_rebound_name_is_not_answered(tmp_path, guarded, host):
    assert guarded.get("/healthz", headers={"Host": host}).status_code == 421
    with served(tmp_path / "open") as client:
        assert client.get("/healthz", headers={"Host": host}).status_code == 421


def test_hosts_that_are_answered(tmp_path, guarded):
    for host in (
        "localhost:1527",
        "127.0.0.1",
        "[::1]:8000",
        "scans.example.org",
        "SCANS.example.org:443",
        "192.168.1.5:1527",
    ):
        assert guarded.get("/healthz", headers={"Host": host}).status_code == 200, host
    with served(tmp_path / "open") as client:  # without a token an address of the network is not ours
        assert client.get("/healthz", headers={"Host": "192.168.1.5:1527"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example.com"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_another_sites_page_cannot_post(tmp_path, headers):
    with served(tmp_path) as client:
        answer = client.post("/api/sessions", json={"example": True}, headers=headers)
        assert answer.status_code == 403 and not client.get("/api/sessions").json()
        assert client.post("/api/sessions", json={}, headers={"Origin": "http://localhost"}).status_code == 400
        # A form of another site cannot make JSON.
        assert (
            client.post(
                "/api/sessions", content=b'{"example":true}', headers={"content-type": "text/plain"}
            ).status_code
            == 422
        )


def test_bodies_end_at_the_limit(guarded):
    def chunks():
        for _ in range(10):
            yield b"x" * 1000

    assert guarded.post("/api/sessions", content=b"x" * 3000, headers=bearer()).status_code == 413
    assert guarded.post(
        "/api/sessions", content=chunks(), headers={**bearer(), "content-type": "application/json"}
    ).status_code in (
        400,
        413,
    )
    assert (
        guarded.post("/api/sessions", content=b"x", headers={**bearer(), "Content-Encoding": "gzip"}).status_code == 415
    )
    assert guarded.post("/api/sessions", content=b"x", headers={**bearer(), "Content-Length": "-1"}).status_code == 400


def test_an_upload_without_a_length_ends_at_the_limit(tmp_path):
    def chunks():
        for _ in range(100):
            yield bytes(1000)

    with served(tmp_path, largest_upload=50_000) as client:
        assert client.post("/api/sessions/upload", params={"name": "x.nii"}, content=chunks()).status_code == 413
        assert [p.name for p in (tmp_path / "sessions").iterdir()] == ["lock"]


def test_every_answer_forbids_frames_and_guessing(guarded):
    headers = guarded.get("/healthz").headers
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


def test_listening_beyond_loopback_demands_a_token(monkeypatch, capsys):
    monkeypatch.delenv("SAMED3D_TOKEN", raising=False)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(InputError, match="token is needed"):
            check_binding(host, "")
        check_binding(host, TOKEN)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_binding(host, "")
    with pytest.raises(InputError, match="at least 16"):
        check_binding("0.0.0.0", "short")


def test_confined_follows_no_loop(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(HTTPException) as caught:
        confined("loop", ServerOptions(tmp_path, (tmp_path,)))
    assert caught.value.status_code in (403, 404)
    with pytest.raises(HTTPException, match="no folder is open"):
        confined("a", ServerOptions(tmp_path))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/etc/x.nii", "x.nii"),
        ("..\\..\\a b.NII.GZ", "a_b.nii.gz"),
        (".hidden.mha", "hidden.mha"),
        ("Ä ö.zip", "___.zip"),
        ("session.json.nii", "session.json.nii"),
    ],
)
def test_names_of_uploads(given, kept):
    assert safe_name(given) == kept


def test_updates_round_trip_and_damage_is_refused(rng):
    mask = rng.random((5, 6, 7)) > 0.5
    region = Region((1, 2, 3), (6, 8, 10))
    body = json.loads(json.dumps(update_to_json(4, region, mask)))
    number, where, found = update_from_json(body, (10, 8, 6))
    assert (number, where) == (4, region) and np.array_equal(found, mask)
    wrong = [
        {**body, "stop": [11, 8, 6]},
        {**body, "bits": "!"},
        {**body, "bits": body["bits"][:-8]},
        {**body, "stop": [9, 8, 6]},
        {**body, "object_id": "4"},
        {**body, "bits": base64.b64encode(base64.b64decode(body["bits"]) + b"x").decode()},
        {**body, "bits": base64.b64encode(zlib.compress(bytes(50 * 2**20))).decode()},
    ]
    for entry in (*wrong, {**body, "start": [1.5, 2, 3]}, 7):
        with pytest.raises(InputError):
            update_from_json(entry, (10, 8, 6))


def test_only_images_within_limits_are_read(tmp_path):
    write_ball(tmp_path / "a.nii.gz")
    for name in ("a.nii.gz", "b.nrrd", "c.mha"):
        write_ball(tmp_path / name)
        check_untrusted(tmp_path / name, ReadLimits())
        with pytest.raises(InputError, match="at most 100 voxels"):
            check_untrusted(tmp_path / name, ReadLimits(voxels=100))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputError, match="image must end in"):
        check_untrusted(tmp_path / "x.txt", ReadLimits())
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(4):
        (folder / str(number)).touch()
    with pytest.raises(InputError, match="at most 3 files"):
        check_untrusted(folder, ReadLimits(files=3))


def test_the_registry_survives_a_damaged_session_file(tmp_path):
    registry = Service(ServerOptions(tmp_path / "s"), tiny_model)
    entry = registry.create()
    (entry.folder / "session.json").write_text("{broken")
    asyncio.run(registry.close())
    registry = Service(ServerOptions(tmp_path / "s"), tiny_model)
    assert registry.get(entry.id).info is None and registry.stored() == [entry.id]
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    asyncio.run(registry.close())


def test_counters_as_prometheus_text(tmp_path):
    service = Service(ServerOptions(tmp_path / "s"), tiny_model)
    service.requests.labels("GET", "/x", 200).inc()
    service.predictions.observe(0.2)
    service.predictions.observe(40.0)
    service.create()
    lines = service.metrics().decode().splitlines()
    assert 'samed3d_prediction_seconds_bucket{le="0.25"} 1.0' in lines
    assert 'samed3d_prediction_seconds_bucket{le="+Inf"} 2.0' in lines
    assert 'samed3d_requests_total{method="GET",route="/x",status="200"} 1.0' in lines
    assert "samed3d_sessions_stored 1.0" in lines and "samed3d_sessions_loaded 0.0" in lines
    assert next(float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes")) > 2**20
    asyncio.run(service.close())


@pytest.mark.parametrize(
    ("path", "status"), [("pipe.nii", 400), ("loop.nii", 403), ("n" * 300 + ".nii", 404), ("\ud800", 400), ("a\0", 400)]
)
def test_paths_that_nothing_can_be_read_from_are_refused(tmp_path, path, status):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    with served(tmp_path) as client:
        answer = client.post(
            "/api/sessions", content=json.dumps({"path": path}), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == status and str(tmp_path) not in answer.text


def test_serve_says_what_is_wrong_before_it_listens(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("SAMED3D_TOKEN", raising=False)
    for arguments, said in (
        (["--host", "0.0.0.0"], "token is needed"),
        (["--token-file", str(tmp_path / "none")], "--token-file cannot be read"),
        (["--root", str(tmp_path / "none")], "--root does not exist"),
        (["--model", "nothing"], "no checkpoint or file"),
    ):
        assert main(["serve", "--sessions", str(tmp_path / "s"), *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "app"])
def test_a_port_in_use_is_one_line_and_no_address_is_printed(tmp_path, monkeypatch, capsys, command):
    import samed3d.apps

    monkeypatch.setattr("samed3d.cli.serve._check_models", lambda options: None)
    monkeypatch.setattr(samed3d.apps, "__file__", str(tmp_path / "__init__.py"))  # a page with a viewer
    (tmp_path / "viewer" / "vendor").mkdir(parents=True)
    (tmp_path / "viewer" / "vendor" / "niivue.js").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([command, "--port", port, "--sessions", str(tmp_path / "s")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"cannot listen on port {port}" in printed.err and "--port" in printed.err
    assert printed.err.count("\n") == 1


def test_a_second_server_on_the_same_sessions_prints_no_address(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samed3d.cli.serve._check_models", lambda options: None)
    with served(tmp_path):
        assert main(["serve", "--port", "0", "--sessions", str(tmp_path / "sessions")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "another server uses the sessions" in printed.err


def disconnecting(headers: dict[str, str], path: str, query: str = "") -> dict[str, object]:
    """The ASGI scope of a request whose client will disconnect."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }


@pytest.mark.parametrize(
    ("path", "query", "kind"),
    [
        ("/api/sessions/upload", "name=x.nii", "application/octet-stream"),
        ("/segment", "", "multipart/form-data; boundary=x"),
        ("/segment", "", "application/json"),
        ("/set_image", "", "application/octet-stream"),
    ],
)
def test_a_client_that_disconnects_leaves_no_traceback_and_no_session(tmp_path, caplog, path, query, kind):
    headers = {"content-type": kind, "content-length": "1000"}
    with served(tmp_path) as client:
        if path == "/set_image":
            headers["x-lease-token"] = client.post("/claim").json()["lease_token"]
        messages = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}]
        answers = []

        async def receive() -> dict[str, object]:
            return messages.pop(0) if len(messages) > 1 else messages[0]

        async def send(message: dict[str, object]) -> None:
            answers.append(message)

        asyncio.run(client.app(disconnecting(headers, path, query), receive, send))  # raises what uvicorn would log
        assert answers[0]["status"] in (400, 499)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    left = {p.name for p in (tmp_path / "sessions").iterdir()} - {"lock", headers.get("x-lease-token")}
    assert left == set()


def test_messages_name_no_folder_of_the_server(tmp_path):
    write_ball(tmp_path / "ball.nii.gz")
    damaged = (tmp_path / "ball.nii.gz").read_bytes()[:-500]
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "cut.nii.gz").write_bytes(damaged)
    with served(tmp_path) as client:
        answers = [
            client.post("/api/sessions/upload", params={"name": "x.nii.gz"}, content=damaged),
            client.post("/api/sessions", json={"path": "inside/cut.nii.gz"}),
            client.post("/api/sessions", json={"path": "none.nii.gz"}),
            client.post("/segment", json={"path": "inside/cut.nii.gz", "prompts": {}}),
        ]
        opened = client.post("/api/sessions", json={"path": "ball.nii.gz"}).json()["id"]
        (tmp_path / "sessions" / opened / "journal.jsonl").write_text("damaged\n")
        client.app.state.service.get(opened).unload()
        answers.append(client.get(f"/api/sessions/{opened}"))
    details = [answer.json()["detail"] for answer in answers]
    assert [answer.status_code for answer in answers] == [400, 400, 404, 400, 400], details
    assert "cut.nii.gz" in details[1] and "journal.jsonl" in details[4]
    assert not [detail for detail in details if str(tmp_path) in detail or "/sessions/" in detail]

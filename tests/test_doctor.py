"""``samed3d doctor``: what it finds here, and what it says where something is wrong."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from samed3d.cli import doctor, main
from samed3d.cli.doctor import Check
from samed3d.devices import available_devices, pick_device
from samed3d.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def one(part: Callable[[], Iterator[Check]], name: str) -> Check:
    return next(check for check in doctor._guarded(part) if check.name == name)


@pytest.fixture
def no_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "_self_test", lambda device: iter([Check("self-test", "ok", "left out")]))


def test_a_whole_run_clicks_on_a_ball_and_says_that_it_works(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in said["checks"]}
    assert said["ok"] and found["self-test"]["state"] == "ok"
    assert torch.__version__ in found["packages"]["found"]
    assert "Apache-2.0" in found["weights default"]["found"]
    assert {"devices", "threads", "memory", "sessions", "port of app", "port of serve", "extra dicom"} <= set(found)


def test_text_has_one_line_a_check_and_the_remedy_below_it(capsys, monkeypatch, no_self_test):
    monkeypatch.setattr(doctor, "_memory", lambda: iter([Check("memory", "failed", "none", "buy some")]))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("failed"))
    assert lines[at].split() == ["failed", "memory", "none"]
    assert lines[at + 1].split() == ["->", "buy", "some"]
    assert lines[-1] == "1 checks failed"


def test_damaged_weights_fail(monkeypatch, tmp_path, capsys, no_self_test):
    shutil.copytree(ROOT / "checkpoints", tmp_path / "weights")
    with (tmp_path / "weights" / "default.safetensors").open("ab") as file:
        file.write(b"x")
    monkeypatch.setenv("SAMED3D_CHECKPOINTS", str(tmp_path / "weights"))
    assert main(["doctor", "--json"]) == 1
    failed = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["state"] == "failed"]
    assert [check["name"] for check in failed] == ["weights"]
    assert "must have sha256" in failed[0]["found"]


def test_a_part_that_raises_is_a_failed_check(monkeypatch):
    def broken() -> Iterator[Check]:
        raise ImportError("libgomp is missing")
        yield

    assert doctor._guarded(broken) == [Check("broken", "failed", "ImportError: libgomp is missing")]


def test_missing_and_old_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    versions = {"highdicom": "", "scipy": "1.2"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name) or "999"))
    check = one(doctor._packages, "packages")
    assert check.state == "failed" and check.remedy == "pip install 'scipy>=1.11'"
    extra = one(doctor._extras, "extra dicom")
    assert extra.state == "note" and extra.remedy == "pip install 'samed3d[dicom]'" and "highdicom" in extra.found


def test_torchvision_for_another_torch_is_noted(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: {"torchvision": "0.20.1", "torch": "2.7.0+cpu"}.get(name, ""))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy", "torch==2.5.1"])
    check = one(doctor._torchvision, "torchvision")
    assert check.state == "note" and "needs torch==2.5.1, but torch is 2.7.0+cpu" in check.found


def test_a_port_in_use_is_noted_with_the_option(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("samed3d.cli.serve.SERVE_PORT", server.getsockname()[1])
        check = one(doctor._ports, "port of serve")
    assert check.state == "note" and "samed3d serve --port N" in check.remedy


def test_little_memory_is_noted(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30, total=2**33))
    check = one(doctor._memory, "memory")
    assert check.state == "note" and check.found == "1.0 of 8.0 GiB available"


def test_a_folder_of_sessions_that_cannot_be_written_fails(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    check = one(doctor._sessions, "sessions")
    assert check.state == "failed" and "--sessions FOLDER" in check.remedy


@pytest.mark.parametrize(("cuda", "mps", "first"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_fastest_device_and_a_missing_one_is_refused(monkeypatch, cuda, mps, first):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert pick_device("auto").type == first
    assert pick_device("cpu").type == "cpu" and available_devices()[-1] == "cpu"
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert pick_device(name).type == name
        else:
            with pytest.raises(InputError, match=f"device {name} was asked for but this machine has no"):
                pick_device(name)
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or mps, got 'tpu'"):
        pick_device("tpu")

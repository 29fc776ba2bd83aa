"""The package as a user installs it: built, checked, installed into an empty environment, and used from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samed3d.geometry import Grid
from samed3d.volume import read_volume, write_volume

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL_MIB = 60
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "out", "runs", "corpus", "site", "*.egg-info", "__pycache__")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def clean_environment() -> dict[str, str]:
    """Nothing that leads to the source tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SAMED3D"))}


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution of a copy of this tree."""
    pytest.importorskip("build", reason="build is not installed: pip install 'samed3d[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--outdir", folder, folder / "source", cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path) -> Path:
    """``samed3d`` in an environment that holds the wheel and what it requires."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=wheel.parent)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    constraint = [] if shutil.which("nvidia-smi") else ["-c", ROOT / "constraints-cpu.txt"]
    run(scripts / "python", "-m", "pip", "install", "-q", *constraint, wheel, cwd=wheel.parent)
    return scripts / "samed3d"


def test_the_distributions_pass_twine_and_hold_weights_and_page(wheel):
    pytest.importorskip("twine", reason="twine is not installed: pip install 'samed3d[dev]'")
    source = next(wheel.parent.glob("*.tar.gz"))
    assert "FAILED" not in run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=wheel.parent)
    assert wheel.stat().st_size <= LARGEST_WHEEL_MIB * 2**20
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"checkpoints/default.safetensors", "checkpoints/manifest.json", "apps/viewer/index.html", "py.typed"}
    assert {f"samed3d/{name}" for name in wanted} <= names
    if shutil.which("npm"):
        assert "samed3d/apps/viewer/vendor/niivue.js" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "samed3d-0.1.0.data/"))]


def test_the_installed_program_checks_itself_and_segments(program, tmp_path):
    report = json.loads(run(program, "doctor", "--json", cwd=tmp_path))
    assert report["ok"]
    assert str(program.parents[1]) in report["checks"][0]["found"]  # the installed copy, not the source tree
    z, y, x = np.indices((40, 40, 40))
    ball = (z - 20) ** 2 + (y - 18) ** 2 + (x - 22) ** 2 < 81
    noise = np.random.default_rng(0).normal(0, 10, ball.shape)
    write_volume(tmp_path / "ct.nii.gz", (100 * ball + noise).astype(np.int16), Grid(ball.shape))
    run(program, "segment", "ct.nii.gz", "--point", "22,18,20", "-o", "mask.nii.gz", cwd=tmp_path)
    mask = read_volume(tmp_path / "mask.nii.gz").array > 0
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.8


def test_the_installed_program_serves_its_page(program, tmp_path):
    command = [str(program), "app", "--no-browser", "--port", "15280", "--sessions", str(tmp_path / "sessions")]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), **options) as server:
        try:
            for name in ("", "js/app.js", "vendor/niivue.js" if shutil.which("npm") else "style.css"):
                assert fetch(f"http://127.0.0.1:15280/app/{name}", server)
        finally:
            server.terminate()


def fetch(address: str, server: subprocess.Popen[bytes]) -> bytes:
    """The body, as soon as the server answers."""
    for _ in range(1200):
        assert server.poll() is None, server.communicate()[0]
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}")

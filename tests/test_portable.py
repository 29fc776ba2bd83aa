"""What Windows and macOS need: no module of POSIX systems at import or in a session, and paths of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samed3d.cli import main
from samed3d.inference.session import Session
from samed3d.output import only_writer, write_json
from samed3d.prompts import Point
from samed3d.volume import read_volume
from tests.server_tools import BALL_IJK, tiny_model, write_ball

ROOT = Path(__file__).resolve().parents[1]
POSIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios", "syslog")
PLACES = ("with space", "Größe 体積 é", "x" * 100 + "/" + "y" * 100)

WITHOUT_POSIX = """
import importlib, pkgutil, sys
POSIX_ONLY = {posix!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in POSIX_ONLY:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in POSIX_ONLY:
    sys.modules.pop(name, None)
OURS = ("samed3d", "data_prep")
OPTIONAL = {{"napari", "qtpy", "torchio", "wandb", "timm"}}
# Packages of others are imported first: on Windows they have their own ways.
import torch, numpy, scipy.ndimage, SimpleITK, fastapi.testclient, uvicorn, psutil, joblib, safetensors.torch, rich.console
import setuptools.command.build_py, multiprocessing.connection, subprocess, tempfile, asyncio, accelerate
for name in POSIX_ONLY:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocker())
count = 0
for top in OURS:
    for found in pkgutil.walk_packages(importlib.import_module(top).__path__, top + "."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
            count += 1
        except ImportError as error:
            if (error.name or "").split(".")[0] not in OPTIONAL:
                raise
print(count)
from tests.server_tools import BALL_IJK, tiny_model, write_ball
from samed3d import Point, Session
from pathlib import Path
folder = Path({folder!r})
write_ball(folder / "ball.nii.gz")
with Session.open(folder / "ball.nii.gz", tiny_model(), journal=folder / "journal.jsonl") as session:
    session.add(Point(BALL_IJK))
    session.save(folder / "mask.nii.gz")
    session.save(folder / "work.json")
from samed3d.output import only_writer
with only_writer(folder / "locked"):
    (folder / "locked" / "file").write_text("")
from samed3d.evaluation import meter
assert not set(POSIX_ONLY) & set(sys.modules), set(POSIX_ONLY) & set(sys.modules)
"""


def test_every_module_imports_and_a_session_runs_without_posix_modules(tmp_path):
    code = WITHOUT_POSIX.format(posix=POSIX_ONLY, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100
    assert (tmp_path / "mask.nii.gz").is_file() and (tmp_path / "work.json").is_file()


@pytest.mark.parametrize("place", PLACES, ids=("spaces", "unicode", "long"))
def test_files_lie_in_folders_of_any_name(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    image = folder / "ein Bild 画像.nii.gz"
    volume = write_ball(image)
    with Session.open(image, tiny_model(), journal=folder / "clicks 1.jsonl") as session:
        session.add(Point(BALL_IJK))
        expected = session.mask
        for name in ("mask é.nii.gz", "mask é.nrrd", "mask é.seg.nrrd", "mask é.mha"):
            session.save(folder / name)
    for name in ("mask é.nii.gz", "mask é.nrrd", "mask é.mha"):
        assert np.array_equal(read_volume(folder / name).array > 0, expected > 0), name
    assert read_volume(image).grid.shape_zyx == volume.grid.shape_zyx
    with Session.open(image, tiny_model(), journal=folder / "clicks 1.jsonl") as again:
        assert np.array_equal(again.mask, expected)
    with only_writer(folder / "a run"):
        write_json(folder / "a run" / "é.json", {"é": 1})
    assert main(["segment", str(image), "--point", "x", "-o", str(folder / "m.nii.gz"), "--quiet"]) == 2

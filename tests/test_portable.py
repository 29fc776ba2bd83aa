"""What Windows and macOS need: no module of POSIX systems at import or in a session, and paths of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samed3d import clicks
from samed3d.cli import main
from samed3d.config import ClickConfig, OptimConfig, TrainConfig
from samed3d.inference.session import Session
from samed3d.inference.sliding_window import segment_volume
from samed3d.models import MODELS, create_model, list_models
from samed3d.models.base import PromptableModel
from samed3d.output import only_writer, write_json
from samed3d.prompts import Box, Mask, Point, Scribble
from samed3d.training.optimiser import EmaWeights, make_optimiser
from samed3d.training.start import step_of
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


class WithoutFloat64(TorchDispatchMode):
    """Refuses every operation that makes float64 numbers, but for the draws that a CPU generator makes on the CPU."""

    aten = torch.ops.aten
    on_the_cpu = (aten.rand.generator, aten.stack.default, aten.scalar_tensor.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
        if made and func not in self.on_the_cpu:
            raise TypeError(f"{func} makes float64, which Apple's GPUs lack")
        return result


@pytest.fixture
def as_on_an_apple_gpu(monkeypatch):
    """Device tensors are still on the CPU here, but nothing may be float64."""
    monkeypatch.setattr(clicks, "widest_float", lambda device: torch.float32)
    with WithoutFloat64():
        yield


def test_the_guard_refuses_float64_from_torch_and_from_numpy(as_on_an_apple_gpu):
    for make in (
        lambda: torch.ones(2).double(),
        lambda: torch.from_numpy(np.ones(2)) + 1,
        lambda: torch.tensor([np.pi], dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="makes float64, which Apple's GPUs lack"):
            make()


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_training_step_needs_no_float64(as_on_an_apple_gpu, name, optimiser):
    model = create_model(name, **MODELS[name].tiny)
    simulated = ClickConfig(3, "mixed", box_probability=0.5, mask_only_probability=0.5, window_probability=0.5)
    step, ema = step_of(TrainConfig(clicks=simulated), model), EmaWeights(model, 0.9)
    image = torch.randn(2, *model.spec.image_shape, generator=torch.Generator().manual_seed(0))
    step(image, image[:, :1] > 0.5, 0, torch.arange(2)).loss.backward()
    make_optimiser(model, OptimConfig(name=optimiser)).step()
    ema.update(model)


@pytest.mark.parametrize("name", list_models())
def test_inference_needs_no_float64(as_on_an_apple_gpu, tmp_path, name):
    volume, model = write_ball(tmp_path / "ball.nii.gz"), create_model(name, **MODELS[name].tiny).eval()
    if not isinstance(model, PromptableModel):
        assert segment_volume(volume, model).shape == volume.array.shape
        return
    with Session.open(volume, model) as session:
        session.add(Point(BALL_IJK))
        if "box" in model.spec.prompts:
            session.add(Box((8, 10, 6), (18, 20, 16)))
        if "mask" in model.spec.prompts:
            session.add(Mask(volume.array > 0.5))
        session.add(Scribble((BALL_IJK, (15, 15, 11)), positive=False))
        assert session.mask_of(1).shape == volume.array.shape

"""Every bad input: exit code 2, one line on stderr that says what is wrong, no traceback, no output file."""

from __future__ import annotations

import errno
import gzip
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samed3d.cli import main
from samed3d.geometry import Grid
from samed3d.models import MODELS, create_model
from samed3d.models.weights import save_weights
from samed3d.volume import write_volume

SHAPE = (10, 12, 14)  # so the last voxel is ijk (13, 11, 9)
CLICK = ("--point", "5,5,5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs, one good (``good.nii.gz``, ``tiny.safetensors``) and the rest bad."""
    import SimpleITK as sitk

    folder = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    good = rng.integers(0, 99, SHAPE).astype(np.int16)

    def write(name: str, array: np.ndarray, *, vector: bool = False) -> None:
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(folder / name))

    write_volume(folder / "good.nii.gz", good, Grid(SHAPE))
    whole = (folder / "good.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.nii.gz").write_text("this is no image\n" * 100)
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "picture.xyz").write_bytes(b"x")
    (folder / "no_slices").mkdir()
    write("flat.nii.gz", good[0])
    write("slice.mha", good[:1])
    write("time.nii.gz", np.stack([good, good + 1]))
    write("colour.mha", rng.integers(0, 99, (*SHAPE, 3)).astype(np.uint8), vector=True)
    holes = good.astype(np.float32)
    holes[0, 0, :3] = np.nan
    holes[1, 1, 1] = np.inf
    write("holes.nii.gz", holes)
    write("constant.nii.gz", np.full(SHAPE, 7, np.int16))
    header = bytearray(gzip.decompress(whole))
    struct.pack_into("<f", header, 80, 0.0)  # the spacing along i; and no matrix that could stand in for it
    struct.pack_into("<2h", header, 252, 0, 0)
    (folder / "thin.nii").write_bytes(bytes(header))
    write_weights(folder)
    (folder / "prompts_none.json").write_text(json.dumps({"version": 1, "objects": [{"id": 1, "prompts": []}]}))
    negative = [{"type": "point", "at": [5, 5, 5], "positive": False}]
    liver = {"version": 1, "objects": [{"id": 4, "name": "liver", "prompts": negative}]}
    (folder / "prompts_negative.json").write_text(json.dumps(liver))
    (folder / "prompts_broken.json").write_text("{")
    (folder / "config.yaml").write_text("optim:\n  learning: 1\n")
    return folder


def write_weights(folder: Path) -> None:
    """A good file, one whose header names another architecture, one that is no safetensors, and an upstream
    checkpoint."""
    tiny = create_model("samed3d_tiny", **MODELS["samed3d_tiny"].tiny)
    save_weights(tiny, folder / "tiny.safetensors", {})
    tiny.config = {**tiny.config, "dim": 48}
    save_weights(tiny, folder / "other.safetensors", {})
    (folder / "broken.safetensors").write_bytes(b"\x00" * 64)
    torch.save({"model_state_dict": {"a": torch.zeros(1)}}, folder / "upstream.pth")


@pytest.fixture
def run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command among the inputs, check all that every failure has in common, and return the line on stderr."""
    monkeypatch.chdir(place)

    def fail(*arguments: str) -> str:
        before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
        code = main([a.replace("OUT", str(tmp_path)) for a in arguments])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert said.err.startswith("samed3d: error: ") and said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        assert list(tmp_path.iterdir()) == []
        assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before
        return said.err

    return fail


def segment(
    image: str = "good.nii.gz", *more: str, output: str = "OUT/mask.nii.gz", model: str = "tiny.safetensors"
) -> tuple[str, ...]:
    return ("segment", image, "-o", output, "--model", model, *more)


BAD = {
    "missing image": (segment("none.nii.gz", *CLICK), r"image does not exist: none\.nii\.gz"),
    "truncated image": (segment("cut.nii.gz", *CLICK), r"truncated|damaged"),
    "not an image": (segment("text.nii.gz", *CLICK), r"not an image|damaged"),
    "empty file": (segment("empty.nii.gz", *CLICK), r"empty\.nii\.gz"),
    "unknown suffix": (segment("picture.xyz", *CLICK), r"end in one of .*\.nii\.gz.*, got picture\.xyz"),
    "folder without slices": (segment("no_slices", *CLICK), r"no DICOM series in folder: no_slices"),
    "2D": (segment("flat.nii.gz", *CLICK), r"must be 3D"),
    "single slice": (segment("slice.mha", *CLICK), r"must be 3D, got a single slice"),
    "4D": (
        segment("time.nii.gz", *CLICK),
        r"has 2 volumes \(4D\), one is needed: pick one with --channel N \(0 to 1\)",
    ),
    "RGB": (segment("colour.mha", *CLICK), r"has 3 channels, one is needed: pick one with --channel N \(0 to 2\)"),
    "channel too high": (segment("colour.mha", *CLICK, "--channel", "3"), r"--channel must be 0 to 2, got 3"),
    "NaN and inf": (segment("holes.nii.gz", *CLICK), r"image holds 4 NaN or infinite voxels of 1680"),
    "constant": (segment("constant.nii.gz", *CLICK), r"image is constant, every voxel is 7"),
    "zero spacing": (segment("thin.nii", *CLICK), r"spacing must be > 0"),
    "point outside": (
        segment("good.nii.gz", "--point", "14,5,5"),
        r"point must lie inside the volume, ijk \(0, 0, 0\) to \(13, 11, 9\)",
    ),
    "negative point outside": (
        segment("good.nii.gz", *CLICK, "--negative-point", "0,0,-2"),
        r"must lie inside the volume.*got \(0, 0, -2\)",
    ),
    "RAS point outside": (segment("good.nii.gz", "--point", "500,0,0", "--space", "ras"), r"mm RAS \(= voxel"),
    "box outside": (
        segment("good.nii.gz", "--box", "20,20,20,30,30,30"),
        r"box must meet the volume, ijk \(0, 0, 0\) to \(13, 11, 9\)",
    ),
    "box min over max": (
        segment("good.nii.gz", "--box", "5,5,5,1,9,9"),
        r"box min must not exceed box max.*\(5, 5, 5\).*\(1, 9, 9\)",
    ),
    "too few numbers": (
        segment("good.nii.gz", "--point", "1,2"),
        r"--point needs 3 numbers separated by commas, got '1,2'",
    ),
    "not numbers": (segment("good.nii.gz", "--point", "a,b,c"), r"--point needs 3 numbers"),
    "not finite": (segment("good.nii.gz", "--point", "nan,1,1"), r"--point needs 3 numbers"),
    "unknown space": (segment("good.nii.gz", *CLICK, "--space", "lps"), r"space must be one of ijk, ras, got 'lps'"),
    "no prompt": (segment("none.nii.gz"), r"needs at least one prompt; give --point I,J,K"),
    "none positive": (
        segment("none.nii.gz", "--negative-point", "1,1,1"),
        r"needs a positive point or a box, got 1 negative only",
    ),
    "prompt file missing": (
        segment("good.nii.gz", "--prompts", "none.json"),
        r"prompt file cannot be read: none\.json",
    ),
    "prompt file broken": (segment("good.nii.gz", "--prompts", "prompts_broken.json"), r"prompt file is not JSON"),
    "prompt file empty": (
        segment("good.nii.gz", "--prompts", "prompts_none.json"),
        r"'prompts' must be a list that is not empty",
    ),
    "prompt file negative": (
        segment("good.nii.gz", "--prompts", "prompts_negative.json"),
        r"object 4 \(liver\) of prompts_negative\.json needs a pos",
    ),
    "prompt file and click": (
        segment("good.nii.gz", *CLICK, "--prompts", "p.json"),
        r"--prompts cannot be combined with --point",
    ),
    "unknown model": (segment("good.nii.gz", *CLICK, model="samed3d_unt"), r"'samed3d_unt'; nearest.*samed3d_unet"),
    "other architecture": (segment("good.nii.gz", *CLICK, model="other.safetensors"), r"mis-shaped \(\d+\)"),
    "broken weights": (
        segment("good.nii.gz", *CLICK, model="broken.safetensors"),
        r"checkpoint must be a \.safetensors file written by samed3d",
    ),
    "upstream weights": (segment("good.nii.gz", *CLICK, model="upstream.pth"), r"samed3d import-weights"),
    "unknown device": (
        segment("good.nii.gz", *CLICK, "--device", "tpu"),
        r"device must be auto, cpu, cuda or mps, got 'tpu'",
    ),
    "no output folder": (
        segment("good.nii.gz", *CLICK, output="OUT/none/m.nii.gz"),
        r"output folder does not exist: .*none; create it first",
    ),
    "output suffix": (
        segment("good.nii.gz", *CLICK, output="OUT/m.png"),
        r"output name must end in one of .*got 'm\.png'",
    ),
    "preview suffix": (
        segment("good.nii.gz", *CLICK, "--preview", "OUT/p.jpg"),
        r"output name must end in one of \.png, got 'p\.jpg'",
    ),
    "report folder": (segment("good.nii.gz", *CLICK, "--report", "OUT/none/r.json"), r"output folder does not exist"),
    "output is the image": (
        segment("good.nii.gz", *CLICK, output="good.nii.gz"),
        r"the image and --output must be different files",
    ),
    "two outputs in one": (
        segment("good.nii.gz", *CLICK, "--probability", "OUT/mask.nii.gz"),
        r"--output and --probability must be different",
    ),
    "unknown option": (segment("good.nii.gz", "--pont", "1,1,1"), r"No such option: --pont"),
    "unknown config key": (
        ("train", "--set", "optim.lrr=1", "--set", "run.folder=OUT/run"),
        r"unknown config key 'optim\.lrr'; did you mean optim\.lr",
    ),
    "unknown key in file": (
        ("train", "--config", "config.yaml", "--set", "run.folder=OUT/run"),
        r"unknown config key 'optim\.learning'",
    ),
    "config missing": (("train", "--config", "none.yaml"), r"config file cannot be read: none\.yaml"),
    "demo: unknown model": (("demo", "-o", "OUT/demo", "--model", "none"), r"no checkpoint or file is called 'none'"),
    "import: missing": (
        ("import-weights", "none.pth", "-o", "OUT/w.safetensors"),
        r"checkpoint does not exist: none\.pth",
    ),
    "import: not torch": (("import-weights", "text.nii.gz", "-o", "OUT/w.safetensors"), r"checkpoint"),
    "import: suffix": (("import-weights", "upstream.pth", "-o", "OUT/w.pth"), r"must end in one of \.safetensors"),
    "data missing": (("evaluate", "none", "-o", "OUT/results"), r"data folder does not exist: none"),
    "data set missing": (("prepare", "none", "-o", "OUT/corpus"), r"data set does not exist: none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, case):
    arguments, message = BAD[case]
    line = run(*arguments)
    assert re.search(message, line), line


def test_cuda_without_a_gpu_is_refused_and_never_becomes_the_cpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "device cuda was asked for but this machine has no CUDA GPU"
    assert message in run(*segment("good.nii.gz", *CLICK, "--device", "cuda"))
    assert message in run("demo", "-o", "OUT/demo", "--device", "cuda")


def refuse(*_values, **_named):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_is_not_writable_is_named_before_any_work(run, monkeypatch):
    from samed3d import output
    from samed3d.inference import session

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(session.Session, "open", lambda *_v, **_n: pytest.fail("the image was opened"))
    assert "output folder is not writable" in run(*segment("good.nii.gz", *CLICK))


def full_disk(path: Path, *_values, **_named) -> None:
    """What a writer meets: some bytes fit, then no more."""
    path.open("wb").write(b"half a mask")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_half_written_mask(run, monkeypatch):
    from samed3d.volume import writing

    monkeypatch.setattr(writing, "_write_nifti", full_disk)
    line = run(*segment("good.nii.gz", *CLICK))
    assert "cannot write" in line and "No space left on device" in line


def test_a_full_disk_leaves_an_older_mask_as_it_was(place, tmp_path, monkeypatch, capsys):
    from samed3d.volume import writing

    monkeypatch.chdir(place)
    older = tmp_path / "mask.nii.gz"
    older.write_bytes(b"older")
    monkeypatch.setattr(writing, "_write_nifti", full_disk)
    assert main([a.replace("OUT", str(tmp_path)) for a in segment("good.nii.gz", *CLICK)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert older.read_bytes() == b"older" and list(tmp_path.iterdir()) == [older]


def test_a_full_disk_leaves_no_half_written_report(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    more = ("--report", str(tmp_path / "r.json"))
    assert main(list(segment("good.nii.gz", *CLICK, *more, output=str(tmp_path / "m.nii.gz")))) == 2
    assert f"cannot write {tmp_path / 'r.json'}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.nii.gz"]

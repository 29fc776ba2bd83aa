"""The command line: one program behind four doors, what it writes, what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from samed3d.cli import main
from samed3d.cli import segment as segment_command
from samed3d.geometry import Grid
from samed3d.models import MODELS, create_model
from samed3d.models.base import ModelEntry
from samed3d.models.weights import load_state_strict, read_weights, save_weights
from samed3d.prompts import Box, ObjectPrompts, Point, dump_prompts
from samed3d.volume import read_volume, write_volume

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("segment", "train", "evaluate", "models", "import-weights", "demo", "prepare")
GRID = Grid((14, 16, 18), (0.8, 0.9, 2.0), (-20.0, 11.0, 3.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bright ball in ``image.nii.gz`` and random weights in ``tiny.safetensors``."""
    folder = tmp_path_factory.mktemp("cli")
    z, y, x = np.indices(GRID.shape_zyx)
    noise = np.random.default_rng(0).integers(0, 20, GRID.shape_zyx)
    ball = (z - 7) ** 2 + (y - 8) ** 2 + (x - 9) ** 2 < 16
    write_volume(folder / "image.nii.gz", (noise + 100 * ball).astype(np.int16), GRID)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        save_weights(create_model("samed3d_tiny", **MODELS["samed3d_tiny"].tiny), folder / "tiny.safetensors", {})
    return folder


def segment(place: Path, *more: str) -> list[str]:
    return [
        "segment",
        str(place / "image.nii.gz"),
        "--model",
        str(place / "tiny.safetensors"),
        "--device",
        "cpu",
        *more,
    ]


def test_help_answers_without_torch_or_simpleitk():
    code = f"""
import sys
from samed3d.cli import main
for command in {COMMANDS!r}:
    assert main([command, "--help"]) == 0, command
assert main(["--help"]) == 0
assert not {{"torch", "SimpleITK", "scipy"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("door", "usage"),
    [
        (["-m", "samed3d", "segment"], "Usage: samed3d segment"),
        (["infer.py"], "Usage: samed3d segment"),
        (["train.py"], "Usage: samed3d train"),
    ],
)
def test_every_door_opens_the_same_program(door, usage):
    done = subprocess.run([sys.executable, *door, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert usage in done.stdout


def test_a_door_passes_the_exit_code_on():
    done = subprocess.run(
        [sys.executable, "infer.py", "x.nii.gz", "-o", "y.nii.gz"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("samed3d: error: segment needs at least one prompt") and done.stderr.count("\n") == 1


def test_segment_writes_everything_on_the_images_grid(place, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("mask.nii.gz", "probability.nii.gz", "preview.png", "report.json")}
    more = ["--point", "9,8,7", "--negative-point", "1,1,1", "-o", str(outputs["mask.nii.gz"]), "--probability"]
    more += [
        str(outputs["probability.nii.gz"]),
        "--preview",
        str(outputs["preview.png"]),
        "--report",
        str(outputs["report.json"]),
    ]
    assert main(segment(place, *more)) == 0, capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(outputs)

    image = read_volume(place / "image.nii.gz")
    probability = read_volume(outputs["probability.nii.gz"])
    assert probability.grid == image.grid and probability.array.dtype == np.float32
    assert probability.array.min() >= 0 and probability.array.max() <= 1
    assert outputs["preview.png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads(outputs["report.json"].read_text())
    assert report["device"] == "cpu" and report["seconds"] > 0 and report["objects"][0]["voxels"] > 0
    said = capsys.readouterr()
    assert "voxels" in said.out and "mask.nii.gz" in said.out
    assert said.err == ""


@pytest.mark.parametrize(("spacing_mm", "unit"), [(1.0, "mL"), (0.001, "mm³")])
def test_a_volume_is_never_printed_as_zero(place, tmp_path, capsys, spacing_mm, unit):
    image = tmp_path / "image.nrrd"
    write_volume(image, read_volume(place / "image.nii.gz").array, Grid(GRID.shape_zyx, (spacing_mm,) * 3))
    box = ["--box", "2,2,2,15,13,11", "-o", str(tmp_path / "mask.nrrd")]
    assert main(["segment", str(image), *segment(place, *box)[2:]]) == 0
    voxels, size = re.search(r"([\d,]+) voxels, (\S+) " + unit, capsys.readouterr().out).groups()
    mm3 = float(size) * (1000 if unit == "mL" else 1)
    assert mm3 == pytest.approx(int(voxels.replace(",", "")) * spacing_mm**3, rel=0.05) and mm3 > 0


def test_quiet_prints_nothing(place, tmp_path, capsys):
    assert main(segment(place, "--point", "9,8,7", "-o", str(tmp_path / "m.nrrd"), "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


def test_the_same_click_in_ijk_and_in_ras_gives_the_same_probability(place, tmp_path):
    ras = GRID.ijk_to_ras_mm((9, 8, 7))
    for name, numbers, space in (("a", "9,8,7", "ijk"), ("b", ",".join(map(repr, ras)), "ras")):
        more = [
            "--point",
            numbers,
            "--space",
            space,
            "-o",
            str(tmp_path / f"m{name}.mha"),
            "--probability",
            str(tmp_path / f"{name}.mha"),
        ]
        assert main(segment(place, *more)) == 0
    first, second = (read_volume(tmp_path / f"{n}.mha").array for n in "ab")
    assert np.abs(first - second).max() < 1e-4


def test_a_prompt_file_of_two_objects(place, tmp_path, capsys):
    objects = [ObjectPrompts(1, "ball", [Point((9, 8, 7))]), ObjectPrompts(3, "corner", [Box((0, 0, 0), (4, 4, 4))])]
    dump_prompts(objects, tmp_path / "prompts.json")
    report = tmp_path / "report.json"
    more = ["--prompts", str(tmp_path / "prompts.json"), "-o", str(tmp_path / "labels.mha"), "--report", str(report)]
    assert main(segment(place, *more)) == 0, capsys.readouterr().err
    assert (tmp_path / "labels.mha").exists()
    out = capsys.readouterr().out
    assert "ball" in out and "corner" in out


def test_boxes_come_first_then_positive_then_negative_points():
    [one] = segment_command._gather_prompts(
        {"box": ["0,0,0,9,9,9"], "point": ["1,2,3", "4,5,6"], "scribble": None, "negative_point": ["7,8,9"]},
        space="ras",
    )
    assert one.prompts == [
        Box((0, 0, 0), (9, 9, 9), "ras"),
        Point((1, 2, 3), True, "ras"),
        Point((4, 5, 6), True, "ras"),
        Point((7, 8, 9), False, "ras"),
    ]


def test_negative_coordinates_are_values_not_options(place, tmp_path, capsys):
    assert main(segment(place, "--point", "-500,-8,7", "-o", str(tmp_path / "m.mha"))) == 2
    assert "got (-500, -8, 7)" in capsys.readouterr().err


def test_train_passes_config_overrides_and_resume(monkeypatch, capsys):
    import samed3d.training.loop as loop

    seen = {}

    def record(config, **named):
        seen.update(config=config, **named)
        return Path("runs/x")

    monkeypatch.setattr(loop, "train", record)
    tiny = str(ROOT / "configs" / "tiny_cpu.yaml")
    assert main(["train", "--config", tiny, "--set", "optim.lr=1e-4", "--set", "optim.steps=20", "--resume", "-q"]) == 0
    assert (seen["config"].optim.lr, seen["config"].optim.steps, seen["resume"], seen["quiet"]) == (
        1e-4,
        20,
        True,
        True,
    )
    assert capsys.readouterr().out == ""
    assert main(["train", "--config", tiny]) == 0
    assert (seen["resume"], seen["quiet"]) == (False, False)
    assert "runs/x" in capsys.readouterr().out


def test_evaluate_passes_its_options(monkeypatch, tmp_path, capsys):
    import samed3d.evaluation.run as run

    seen = {}
    (tmp_path / "dataset.json").write_text("{}")
    monkeypatch.setattr(run, "evaluate", lambda *values, **named: seen.update(values=values, **named))
    assert (
        main(
            [
                "evaluate",
                str(tmp_path),
                "-o",
                str(tmp_path / "out"),
                "--model",
                "a",
                "--model",
                "b",
                "--clicks",
                "1,2",
                "--no-report",
                "--quiet",
            ]
        )
        == 0
    )
    assert seen["values"] == ([tmp_path], ["a", "b"], tmp_path / "out")
    assert (seen["clicks"], seen["seeds"], seen["split"], seen["limit"], seen["progress"]) == (
        (1, 2),
        None,
        "val",
        None,
        False,
    )
    assert main(["evaluate", str(tmp_path), "-o", str(tmp_path / "out"), "--clicks", "0,1"]) == 2
    assert "--clicks needs whole numbers from 1" in capsys.readouterr().err


def test_models_lists_every_architecture(capsys, monkeypatch):
    monkeypatch.setattr("samed3d.models.list_models", lambda: ["sam_med3d_b", "samu"])
    assert main(["models"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.strip().splitlines()]
    row = next(line for line in lines if line.startswith("sam_med3d_b"))
    assert row.split()[1:8] == ["100,509,232", "100,509,232", "92,924,928", "8,668", "7,575,636", "104.7", "1.5"]
    assert "12,034,342" in next(line for line in lines if line.startswith("samu"))
    assert lines[-1].startswith("checkpoints:")


def test_models_shows_one_models_modules(capsys):
    assert main(["models", "fast_sam3d"]) == 0
    out = capsys.readouterr().out
    assert "0 to 1, each Block 4,723,968" in out and "image_encoder ImageEncoder 45,639,936" in out
    assert main(["models", "fast_sam"]) == 2
    assert "unknown model 'fast_sam'; nearest: fast_sam3d" in capsys.readouterr().err


def test_import_weights_round_trip(monkeypatch, tmp_path, capsys):
    entry = MODELS["sam_med3d_b"]
    monkeypatch.setitem(
        MODELS, "sam_med3d_b", ModelEntry(lambda **more: entry.build(**{**entry.tiny, **more}), entry.tiny)
    )
    upstream = create_model("sam_med3d_b").state_dict()
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in upstream.items()}}, tmp_path / "turbo.pth")
    target = tmp_path / "turbo.safetensors"
    assert main(["import-weights", str(tmp_path / "turbo.pth"), "-o", str(target)]) == 0, capsys.readouterr().err
    assert f"{len(upstream)} tensors" in capsys.readouterr().out
    state, header = read_weights(target)
    assert header["imported_from"] == "turbo.pth"
    load_state_strict(create_model("sam_med3d_b"), state)
    assert all(torch.equal(state[k], v) for k, v in upstream.items())


def test_import_weights_of_published_variants(monkeypatch, tmp_path, capsys):
    """Box embeddings make their own variant; a student starts from a teacher; a foreign file is one line."""
    for name, more in (("sam_med3d_b", {"depth": 4, "global_blocks": (1, 3)}), ("fast_sam3d", {})):
        entry = MODELS[name]
        tiny = {**entry.tiny, **more}
        monkeypatch.setitem(MODELS, name, ModelEntry(lambda b=entry.build, t=tiny, **given: b(**{**t, **given}), tiny))
    state = create_model("sam_med3d_b", boxes="stored").state_dict()
    torch.save({"model_state_dict": state}, tmp_path / "bbox_init.pth")
    assert main(["import-weights", str(tmp_path / "bbox_init.pth"), "-o", str(tmp_path / "b.safetensors")]) == 0, (
        capsys.readouterr().err
    )
    stored, header = read_weights(tmp_path / "b.safetensors")
    assert header["config"]["boxes"] == "stored" and stored.keys() == state.keys()
    student = [
        "import-weights",
        str(tmp_path / "bbox_init.pth"),
        "-o",
        str(tmp_path / "s.safetensors"),
        "--model",
        "fast_sam3d",
    ]
    assert main(student) == 0, capsys.readouterr().err
    taught, _ = read_weights(tmp_path / "s.safetensors")
    assert torch.equal(taught["mask_decoder.mask_tokens.weight"], state["mask_decoder.mask_tokens.weight"])
    wrong = [
        "import-weights",
        str(tmp_path / "bbox_init.pth"),
        "-o",
        str(tmp_path / "x.safetensors"),
        "--model",
        "sam_vit_b",
    ]
    assert main(wrong) == 2
    assert "is no sam_vit_b" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def break_segment(monkeypatch, error: BaseException) -> None:
    def fail(*_values, **_options):
        raise error

    monkeypatch.setattr(segment_command, "_gather_prompts", fail)


def test_our_fault_is_one_line_and_exit_code_1(monkeypatch, capsys):
    break_segment(monkeypatch, RuntimeError("two\nlines"))
    assert main(["segment", "x", "-o", "y"]) == 1
    err = capsys.readouterr().err
    assert err == "samed3d: internal error: RuntimeError: two lines; run again with --debug for the traceback\n"


def test_debug_shows_the_traceback_of_our_fault(monkeypatch):
    break_segment(monkeypatch, RuntimeError("inside"))
    with pytest.raises(RuntimeError, match="inside"):
        main(["segment", "x", "-o", "y", "--debug"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    break_segment(monkeypatch, KeyboardInterrupt())
    assert main(["segment", "x", "-o", "y"]) == 130
    assert capsys.readouterr().err == "samed3d: error: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segmnt"], "No such command 'segmnt'. Did you mean 'segment'?"),
        (["segment", "x"], "Missing option '--output'"),
        (["segment", "x", "-o", "y", "--pont", "1,2,3"], "No such option: --pont"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_a_mistyped_command_line_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("samed3d: error: ")


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "segment" in said.out + said.err and "error" not in said.err

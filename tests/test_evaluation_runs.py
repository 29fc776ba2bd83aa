"""Whole runs of ``samed3d evaluate``: several processes, killed and continued, corpora, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.evaluation.cases import CaseSelection, LabelledCase, LoadedCase, smallest
from samed3d.evaluation.methods import ModelMethod
from samed3d.evaluation.results import FIELDS, curves, read_lines, read_rows
from samed3d.evaluation.run import QUICK_CASES, evaluate
from samed3d.evaluation.statistics import score_series
from samed3d.geometry import Grid
from samed3d.output import only_writer
from samed3d.volume import Volume, write_mask
from samed3d.volume.label_maps import EmptyLabelError
from tests.brightness_model import BrightnessModel
from tests.nnunet_tree import RAS, write_set
from tests.test_evaluation import tiny_checkpoint

COST = {"seconds", "encode_seconds", "peak_mib"}


def numbers(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in COST} for row in read_rows(out / "cases.csv")]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    write_set(tmp_path / "set", {"a": 0})
    ask = {"clicks": (1,), "split": "all"}
    with (
        only_writer(tmp_path / "out" / "parts"),
        pytest.raises(InputError, match="another run is writing to .*; wait for it"),
    ):
        evaluate([tmp_path / "set"], ["region_growing"], tmp_path / "out", **ask)
    evaluate([tmp_path / "set"], ["region_growing"], tmp_path / "out", **ask)
    assert len(numbers(tmp_path / "out")) == 2 and not (tmp_path / "out" / "parts").exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    write_set(tmp_path / "set", {"a": 0, "b": 1, "c": 2})
    weights = str(tiny_checkpoint(tmp_path / "tiny.safetensors"))
    ask = {
        "clicks": (2,),
        "split": "all",
        "seeds": 2,
        "protocols": ("samed3d", "cvpr25"),
        "prompts": ("click", "scribble"),
    }
    for name, processes in (("one", 1), ("two", 2)):
        evaluate([tmp_path / "set"], [weights, "region_growing"], tmp_path / name, processes=processes, **ask)
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    assert (tmp_path / "one" / "prompts.jsonl").read_bytes() == (tmp_path / "two" / "prompts.jsonl").read_bytes()
    bodies = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert bodies[0]["settings"] == bodies[1]["settings"] and bodies[1]["environment"]["processes"] == 2
    assert [s["value"] for s in bodies[0]["scores"]] == [s["value"] for s in bodies[1]["scores"]]


def test_a_run_that_broke_off_goes_on(tmp_path, monkeypatch):
    import samed3d.evaluation.run as run

    write_set(tmp_path / "set", {"a": 0, "b": 1, "c": 2})
    calls, measure, ask = [], run.measure, {"clicks": (1,), "split": "all"}

    def breaking(case, *rest):
        calls.append(case.case)
        if len(calls) == 3:
            raise InputError("no memory left")
        return measure(case, *rest)

    monkeypatch.setattr(run, "measure", breaking)
    with pytest.raises(InputError, match="no memory left"):
        evaluate([tmp_path / "set"], ["dilated_ball"], tmp_path / "out", **ask)
    assert sorted(p.name[0] for p in (tmp_path / "out" / "parts").glob("*.json")) == ["0", "0", "s"], (
        "two cases and the settings"
    )
    with pytest.raises(InputError, match="another configuration"):
        evaluate([tmp_path / "set"], ["dilated_ball"], tmp_path / "out", clicks=(2,), split="all")
    evaluate([tmp_path / "set"], ["dilated_ball"], tmp_path / "out", **ask)
    assert calls == ["a", "b", "c", "c"] and {row["case"] for row in read_rows(tmp_path / "out" / "cases.csv")} == {
        "a",
        "b",
        "c",
    }
    evaluate([tmp_path / "set"], ["dilated_ball"], tmp_path / "whole", **ask)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    write_set(tmp_path / "set", {name: seed for seed, name in enumerate("abcdef")})
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, SimpleITK as sitk\ntime.sleep(0.4)\n"
        "image = sitk.ReadImage(sys.argv[1])\nsitk.WriteImage(sitk.Cast(image > 150, sitk.sitkUInt8), sys.argv[3])\n"
    )
    command = f"{sys.executable} {slow} {{image}} {{prompts}} {{out}}"
    arguments = [
        str(tmp_path / "set"),
        "--external",
        command,
        "--clicks",
        "1",
        "--split",
        "all",
        "--labels-per-case",
        "1",
        "-q",
    ]
    words = [sys.executable, "-m", "samed3d", "evaluate", *arguments, "-o", str(tmp_path / "out")]
    began = subprocess.Popen(words, cwd=Path(__file__).resolve().parents[1], start_new_session=True)
    parts = tmp_path / "out" / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("0*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(began.pid, signal.SIGKILL)
    began.wait()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.json")}
    assert 2 <= len(done) < 6 and not (tmp_path / "out" / "cases.csv").exists()
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        import samed3d.evaluation.run as run

        remove = run.shutil.rmtree

        def remember(path: Path, *more: object, **named: object) -> None:
            if Path(path) == parts:
                kept.update({p.name: p.stat().st_mtime_ns for p in parts.glob("0*.json")})
            remove(path, *more, **named)

        patch.setattr(run.shutil, "rmtree", remember)
        assert main(["evaluate", *arguments, "-o", str(tmp_path / "out")]) == 0
    assert len(kept) == 6 and all(kept[name] == when for name, when in done.items()), "finished cases were not touched"
    assert len(read_rows(tmp_path / "out" / "cases.csv")) == 6


def test_all_protocols_of_the_command_line_and_what_the_files_hold(tmp_path, capsys):
    write_set(tmp_path / "set", {"a": 0})
    models = [word for name in ("region_growing", "threshold_in_box") for word in ("--model", name)]
    options = [
        *models,
        "--protocol",
        "all",
        "--prompt",
        "all",
        "--clicks",
        "1",
        "--split",
        "all",
        "--labels-per-case",
        "1",
    ]
    out = tmp_path / "out"
    assert main(["evaluate", "--data", str(tmp_path / "set"), *options, "-o", str(out)]) == 0
    assert f"results in {out}" in capsys.readouterr().out and "radioactive-3d" in (out / "report.html").read_text()
    rows = read_rows(out / "cases.csv")
    assert list(rows[0]) == list(FIELDS) and all(0 <= row["dice"] <= 1 for row in rows)
    assert {(row["model"], row["protocol"]) for row in rows} >= {
        ("region_growing", "radioactive-3d"),
        ("threshold_in_box", "cvpr25"),
    }
    lines = read_lines(out / "prompts.jsonl")
    assert len(lines) == len(curves(rows)) and all(line["turns"] for line in lines)
    body = json.loads((out / "results.json").read_text())
    assert (
        body["command"].startswith("samed3d") and body["environment"]["cores"] and body["protocols"]["cvpr25"]["title"]
    )
    assert {s["score"] for s in body["scores"] if s["protocol"] == "cvpr25"} >= {
        "DSC_AUC",
        "NSD_AUC",
        "DSC_Final",
        "NSD_Final",
        "area",
    }
    assert {s["click"] for s in body["summary"] if s["protocol"] == "radioactive-3d"} == set(range(1, 7))


def test_models_of_ones_own_through_the_api(tmp_path):
    write_set(tmp_path / "set", {"a": 0, "b": 1})
    mine = ModelMethod("mine", BrightnessModel((16, 16, 16)))
    evaluate([tmp_path / "set"], [mine], tmp_path / "out", clicks=(1,), split="all")
    assert {row["model"] for row in read_rows(tmp_path / "out" / "cases.csv")} == {"mine"}
    with pytest.raises(InputError, match="models given as objects are measured in one process, got processes=2"):
        evaluate([tmp_path / "set"], [mine], tmp_path / "two", clicks=(1,), split="all", processes=2)


def test_a_corpus_is_measured_as_its_folder_is(tmp_path):
    pytest.importorskip("joblib", reason="preparation needs samed3d[corpus]")
    names = {"background": 0, "bright": 1, "dark": 2, "speck": 3}
    write_set(tmp_path / "data" / "set", {"a": 0, "b": 1}, labels=names)
    options = ["--storage", "npz", "--rules", "lenient", "--jobs", "1", "-q"]
    assert main(["prepare", str(tmp_path / "data"), "-o", str(tmp_path / "corpus"), *options]) == 0
    for name, data in (("folder", tmp_path / "data"), ("prepared", tmp_path / "corpus")):
        evaluate([data], ["dilated_ball"], tmp_path / name, clicks=(2,), split="all", labels_per_case=1)
    one, other = numbers(tmp_path / "folder"), numbers(tmp_path / "prepared")
    assert [(r["source"], r["label"], r["voxels"], r["dice"]) for r in one] == [
        (r["source"], r["label"], r["voxels"], r["dice"]) for r in other
    ]


def test_scores_of_series_by_hand():
    row = {
        "model": "m",
        "protocol": "samed3d",
        "group": "g",
        "source": "s",
        "case": "c",
        "policy": "noisy",
        "prompt": "click",
        "seconds": 1.0,
    }
    series = [[0.5, 0.82, 0.91], [0.1, 0.3, 0.2]]
    rows = [
        row | {"subject": f"p{n}", "label": n, "click": c + 1, "dice": d}
        for n, dices in enumerate(series)
        for c, d in enumerate(dices)
    ]
    found = {s["score"]: s["value"] for s in score_series(rows)}
    assert (
        found["clicks to 0.8"] == (2 + 4) / 2
        and found["failures at 0.8"] == 0.5
        and found["clicks to 0.9"] == (3 + 4) / 2
    )
    assert found["area"] == pytest.approx(((0.25 + 0.82 + 0.455) / 2 + (0.05 + 0.3 + 0.1) / 2) / 2, abs=1e-4)
    assert found["monotone"] == (1 + 0.5) / 2 and found["seconds to 0.8"] == (2 * 3.0 + 3 * 3.0) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "samed"], "unknown protocol 'samed'; nearest: samed3d"),
        (["--policy", "lazy"], "policy must be one of uniform, centre, ritm, noisy or all, got 'lazy'"),
        (["--prompt", "lasso"], "prompt must be one of click, box, scribble or all, got 'lasso'"),
        (["--model", "dilated_ball", "--prompt", "box"], "model 'dilated_ball' needs a point or a scribble first"),
        (
            ["--model", "dilated_ball", "--model", "dilated_ball"],
            "models must be given once each, got dilated_ball twice",
        ),
    ],
)
def test_options_that_make_no_sense_are_one_line(tmp_path, capsys, options, message):
    write_set(tmp_path / "set", {"a": 0})
    if "--model" not in options:
        options = [*options, "--model", "dilated_ball"]
    assert main(["evaluate", str(tmp_path / "set"), *options, "--split", "all", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and len([line for line in said.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_data_that_cannot_be_measured_is_one_line(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    write_set(tmp_path / "set", {"a": 0})
    write_set(tmp_path / "specks", {"a": 0})
    labels = np.zeros(RAS.shape_zyx, np.uint8)
    labels[3, 3, 3] = 1
    write_mask(tmp_path / "specks" / "labelsTr" / "a.nii.gz", labels, RAS)
    for words, message in (
        ([], "evaluate needs data"),
        ([str(tmp_path / "nothing")], "no data set recognised"),
        ([str(tmp_path / "gone")], "data folder does not exist"),
        (
            [str(tmp_path / "set"), "--data", str(tmp_path / "set")],
            "case ids must be unique within a source, got 'a' of 'set' twice",
        ),
        ([str(tmp_path / "specks")], "nothing could be measured: no structure of at least 100 voxels in 1 cases"),
    ):
        assert main(["evaluate", *words, "--model", "dilated_ball", "--split", "all", "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_real_cases_by_two_baselines(data_dir, tmp_path):
    data = [data_dir / "msd_hippocampus"]
    if not data[0].is_dir():
        pytest.skip(f"no {data[0]}")
    evaluate(data, ["dilated_ball", "oracle_bound@1"], tmp_path / "out", clicks=(1, 3), limit=1, split="all")
    best = {row["model"]: row["dice"] for row in read_rows(tmp_path / "out" / "cases.csv") if row["click"] == 3}
    assert best["oracle_bound@1"] > best["dilated_ball"] > 0.05


def test_a_quick_run_takes_what_covers_least_of_each_source(tmp_path):
    def case(source: str, name: str, size: int, spacing: float, empty: bool = False) -> LabelledCase:
        path = tmp_path / f"{source}.{name}"
        path.write_bytes(bytes(size))
        grid = Grid((4, 4, 4), (spacing,) * 3, (0.0, 0.0, 0.0), RAS.direction_lps)

        def load() -> LoadedCase:
            if empty:
                raise EmptyLabelError("nothing labelled")
            return LoadedCase(Volume(np.zeros((4, 4, 4), np.int16), grid, "memory"), np.ones((4, 4, 4), np.uint8))

        return LabelledCase(source, name, name, "CT", "unseen subject", path, path, {}, load)

    others = [case(f"s{n}", "only", 50, 2.0 + n) for n in range(QUICK_CASES)]
    cases = [
        case("large", "a", 10, 90.0),
        case("fine", "big", 99, 0.1),
        case("fine", "small", 20, 0.5),
        case("none", "a", 5, 0.1, empty=True),
    ]
    found = [(c.source, c.case) for c in smallest(CaseSelection([*cases, *others]), QUICK_CASES).cases]
    assert found == [("fine", "small"), *((f"s{n}", "only") for n in range(QUICK_CASES - 1))]


def test_baselines_as_a_group_are_those_that_the_prompts_suit(tmp_path):
    data = [write_set(tmp_path / "set", {"a": 0})]
    evaluate(data, ["baselines"], tmp_path / "clicks", clicks=(1,), split="all", surfaces=False)
    clicked = {row["model"] for row in read_rows(tmp_path / "clicks" / "cases.csv")}
    assert clicked == {"region_growing", "fast_marching", "random_walker", "dilated_ball", "oracle_bound"}
    evaluate(data, ["baselines"], tmp_path / "box", clicks=(1,), split="all", surfaces=False, prompts=("box",))
    boxed = {row["model"] for row in read_rows(tmp_path / "box" / "cases.csv")}
    assert "threshold_in_box" in boxed and "region_growing" not in boxed
    with pytest.raises(InputError, match="'threshold_in_box' needs a box first"):
        evaluate(data, ["dilated_ball", "threshold_in_box"], tmp_path / "named", clicks=(1,), split="all")

"""The benchmarks' page: its own numbers are those of the JSON files, and every published number has a source."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


def module(name):
    """A script of ``benchmarks/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


tables = module("tables")
collect = module("collect")


def test_the_page_holds_the_numbers_of_the_files():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.page_with_blocks(page, FOLDER / "results") == page, "run python benchmarks/collect.py --page"


def test_every_published_number_has_a_source():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    published = [part for part in re.split(r"^#+ ", page, flags=re.MULTILINE) if part.startswith("Published")]
    assert len(published) >= 5
    for part in published:
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        assert rows[0][-1] == "source" and len(rows) > 3
        assert [row for row in rows if not row[-1]] == []


def test_a_file_that_is_not_there_is_said(tmp_path):
    assert (
        tables.block("latency", tmp_path)
        == "*Not measured: `benchmarks/results/latency.json` is not there (`make bench`).*"
    )


def curve(means, subjects=7, structures=9):
    dice = {str(click): {"mean": mean, "interval": ends, "subjects": subjects} for click, mean, ends in means}
    return {"subjects": subjects, "structures": structures, "dice": dice}


def test_the_accuracy_block_has_every_mean_with_its_interval(tmp_path):
    own = curve([(1, 0.2, [0.1, 0.3]), (10, 0.25, None)])
    body = {
        "group": {"unseen subject": own},
        "controls": {"unseen subject": {"other": curve([(1, 0.9, [0.8, 1.0])], 2, 3)}},
    }
    body |= {
        "seeds": 5,
        "commands": {"clicks": "samed3d evaluate X", "box": "samed3d evaluate Y"},
        "revisions": {"clicks": "abc", "box": "abc"},
    }
    (tmp_path / "default_evaluation.json").write_text(json.dumps(body))
    text = tables.block("accuracy", tmp_path)
    assert "| unseen subject | `default`, 5 seeds | 7 | 9 | 0.20 [0.10, 0.30] | 0.25 |" in text
    assert "| unseen subject | `other` | 2 | 3 | 0.90 [0.80, 1.00] |  |" in text
    assert "1 click | 10 clicks" in text and "`samed3d evaluate X`; `samed3d evaluate Y`; revision abc" in text


def test_every_protocol_first_prompt_and_model_has_a_line():
    ends = {
        "first": {"click": 0, "mean": 0.5, "interval": [0.4, 0.6]},
        "last": {"click": 5, "mean": 0.75, "interval": None},
    }
    rows = [
        {"protocol": p, "prompt": w, "model": "m", "subjects": 2, "structures": 3} | ends
        for p, w in (("a", "click"), ("b", "box"))
    ]
    text = tables.markdown("protocols", {"rows": rows, "wall_s": 1200.0, "processor_s": 2400.0})
    assert "| a | `m` | 2 | 3 | 0.50 [0.40, 0.60] | 0.75 (5) |" in text and "| b, box first | `m` |" in text
    assert text.endswith("The whole run took 20 minutes, 40 minutes of processor time.")
    assert "took" not in tables.markdown("protocols", {"rows": rows})


def test_a_block_can_show_every_number_of_its_file():
    body = {"loop": {"samples_per_s": 1.234}, "losses": [1.0, 0.5], "collected": {"seconds": 9}, "machine": {}}
    assert tables.markdown("every_number", body).splitlines()[2:] == [
        "| loop samples per s | 1.23 |",
        "| losses | 1, 0.5 |",
    ]


def test_a_page_must_hold_each_block_once(tmp_path):
    with pytest.raises(ValueError, match="must hold each block once"):
        tables.page_with_blocks("<!-- measured: latency -->\n<!-- end -->", tmp_path)


def test_a_script_is_run_and_its_result_kept_with_the_machine(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    script = "import json, sys; open(sys.argv[4], 'w').write(json.dumps({'data': sys.argv[2], 'value': 3}))"
    (folder / "speed.py").write_text(script)
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    job, out = collect.Job("speed", ("--fast",), data=True), tmp_path / "speed.json"
    command = collect.command_of(job, tmp_path / "d", out, quick=True)
    assert command == ["benchmarks/speed.py", "--data", str(tmp_path / "d"), "--out", str(out), "--fast"]
    assert collect.run_job(command, out, True, tmp_path / "d") == ""
    body = json.loads(out.read_text())
    assert body["value"] == 3 and body["data"] == str(tmp_path / "d") and body["collected"]["quick"]
    assert body["collected"]["command"] == "python benchmarks/speed.py --data DATA --out speed.json --fast"
    assert body["collected"]["machine"]["cores"] >= 1 and body["collected"]["machine"]["torch"]


def test_a_script_that_fails_leaves_the_earlier_result(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bad.py").write_text("raise SystemExit('no luck')")
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    out = tmp_path / "bad.json"
    out.write_text("{}")
    monkeypatch.setattr(collect, "describe_machine", dict)
    assert collect.run_job(["benchmarks/bad.py"], out, False) == "no luck"
    assert out.read_text() == "{}"


def test_every_job_is_a_script_that_starts():
    for name in [*(job.name for job in collect.JOBS), "gpu", "card", "collect"]:
        done = subprocess.run(
            [sys.executable, f"benchmarks/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("job", "quick", "told"),
    [
        (collect.Job("nowhere"), False, "no such script"),
        (collect.Job("prepare", data=True), False, "needs the development data"),
        (collect.Job("prepare", None), True, "no quick form"),
    ],
)
def test_what_cannot_run_is_passed_over_with_a_reason(tmp_path, job, quick, told):
    assert told in collect.command_of(job, None, tmp_path / "x.json", quick)

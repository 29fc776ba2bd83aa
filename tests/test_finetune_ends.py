# ruff: noqa: F811 (fixtures are arguments of the name under which they are imported)
"""How a fine-tuning ends: which model is the result, what is left in its folder, and when."""

from __future__ import annotations

import time

import pytest
import torch

from samed3d.cli import main
from samed3d.models import load
from samed3d.models.weights import read_header, save_weights
from samed3d.training.finetune import TUNED
from tests.test_finetune import base, cache, command, error_of, five, tuned  # noqa: F401 (fixtures)


def test_the_base_is_kept_where_it_is_not_beaten_and_the_run_folder_is_a_model(
    base, five, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    assert command(base, five, out, "--set", "optim.lr=1e-9") == 0
    assert "the base is kept as model.safetensors" in capsys.readouterr().out
    kept, own = load(out).state_dict(), load(base).state_dict()
    assert all(torch.equal(kept[name], own[name]) for name in own) and (out / TUNED).is_file()
    monkeypatch.setattr("samed3d.training.finetune.is_better", lambda before, after: True)
    assert command(base, five, tmp_path / "better") == 0
    assert "is the result" in capsys.readouterr().out and not (tmp_path / "better" / TUNED).exists()


def test_a_finished_run_keeps_no_state_and_its_model_has_the_size_of_the_base(base, five, tmp_path):
    half = tmp_path / "half.safetensors"
    save_weights(load(base), half, {}, torch.float16)
    out = tmp_path / "run"
    assert command(half, five, out, "--set", "run.save_every=1", "--quiet") == 0
    assert not list(out.glob("*.pt")) and tuned(out).stat().st_size < 1.3 * half.stat().st_size + 10_000
    header = read_header(tuned(out))
    assert len(header["training_images"]) == 4 and header["base"]["history"] == {}


def test_a_limit_of_time_holds_for_the_whole_call(base, five, tmp_path):
    began = time.monotonic()
    words = [
        "train",
        "--finetune",
        str(base),
        "--data",
        str(five),
        "-o",
        str(tmp_path / "run"),
        "--minutes",
        "0.2",
        "-q",
    ]
    assert main(words) == 0
    assert time.monotonic() - began < 12 + 10  # the rest is one structure, and starting
    assert (tmp_path / "run" / "table.md").is_file()


def test_a_tracker_that_nobody_is_logged_in_to_is_refused_before_anything_is_measured(
    base, five, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("samed3d.training.finetune.measure", lambda *values, **named: pytest.fail("measured"))
    assert command(base, five, tmp_path / "run", "--set", "run.trackers=[wandb]") == 2
    assert "nobody is logged in to wandb; run: wandb login" in error_of(capsys) and not (tmp_path / "run").exists()

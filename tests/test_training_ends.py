"""How a run ends and is resumed: killed at any moment, stopped by a signal, out of memory, with a loss that is not
finite."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from samed3d.config import TrainConfig
from samed3d.errors import InputError
from samed3d.models import load
from samed3d.training import checkpoints, loop
from samed3d.training.loop import StopRequest, memory_error, train
from tests.test_training import metrics, tiny_config

LONG = ["optim.steps=9", "run.save_every=2", "run.ema=0.9", "optim.accumulate=2", "optim.batch=1"]


def in_another_process(config: TrainConfig) -> multiprocessing.Process:
    """A training in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(config,), kwargs={"quiet": True})
    process.start()
    return process


def wait_for_step(folder: Path, step: int, process: multiprocessing.Process) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.is_alive():
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run never came to that step")


def shown(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["dice"], r["lr"]) for r in metrics(folder)]


def assert_same_state(one: Path, other: Path) -> None:
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))
    assert (first["step"], first["samples"]) == (second["step"], second["samples"])
    for part in ("model", "average"):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])


def test_a_run_killed_at_a_random_step_and_resumed_is_the_unbroken_one(tmp_path):
    train(tiny_config(tmp_path / "whole", *LONG), quiet=True)
    moment = random.SystemRandom().randint(3, 7)  # whatever it is, the result must be the same
    process = in_another_process(tiny_config(tmp_path / "killed", *LONG))
    wait_for_step(tmp_path / "killed", moment, process)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] < 9
    train(tiny_config(tmp_path / "killed", *LONG), resume=True, quiet=True)
    assert shown(tmp_path / "killed") == shown(tmp_path / "whole"), f"killed at step {moment}"
    assert_same_state(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_the_step_finished_and_everything_saved(number, tmp_path):
    endless = [*LONG, "optim.steps=100000", "optim.schedule=constant", "run.save_every=0"]
    process = in_another_process(tiny_config(tmp_path / "run", *endless))
    wait_for_step(tmp_path / "run", 2, process)
    os.kill(process.pid or 0, number)
    process.join(30)
    assert process.exitcode == 0
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == metrics(tmp_path / "run")[-1]["step"] >= 2
    assert load(tmp_path / "run" / "model.safetensors").spec.input_shape_zyx == (16, 16, 16)
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_stopped_run_says_so_and_goes_on_as_if_unbroken(tmp_path, monkeypatch, caplog):
    settings = [*LONG, "optim.steps=6"]
    train(tiny_config(tmp_path / "whole", *settings), quiet=True)
    write = loop.RunLog.step

    def signalled(self: Any, done: int, lr: float) -> None:
        write(self, done, lr)
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "step", signalled)
        with caplog.at_level(logging.WARNING, logger="samed3d"):
            train(tiny_config(tmp_path / "stopped", *settings), quiet=True)
    assert "stopped at step 4 of 6: by SIGTERM; resume with --resume" in caplog.text
    assert [row["step"] for row in metrics(tmp_path / "stopped")] == [1, 2, 3, 4]
    train(tiny_config(tmp_path / "stopped", *settings), resume=True, quiet=True)
    assert shown(tmp_path / "stopped") == shown(tmp_path / "whole")
    assert_same_state(tmp_path / "stopped", tmp_path / "whole")


def test_the_signals_are_given_back_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and stop.reason == "by SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before


def leader(config: TrainConfig) -> None:
    os.setpgid(0, 0)
    train(config, quiet=True)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find the loader's process")
@pytest.mark.parametrize("reach", ["group", "all"])
def test_a_signal_to_the_loader_as_well_ends_like_one_to_the_run(reach, tmp_path):
    """A terminal signals the process group, a cluster every process; neither loses a step, and no process stays
    behind."""
    endless = [*LONG, "optim.steps=100000", "optim.schedule=constant", "run.save_every=0", "data.workers=1"]
    process = multiprocessing.get_context("fork").Process(
        target=leader, args=(tiny_config(tmp_path / "run", *endless),)
    )
    process.start()
    wait_for_step(tmp_path / "run", 2, process)
    pid = process.pid or 0
    loaders = children(pid)
    assert loaders
    for one in loaders if reach == "all" else []:
        os.kill(one, signal.SIGTERM)
    os.killpg(pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 2
    assert not any(Path(f"/proc/{one}").exists() for one in loaders)


# What is kept


def test_the_last_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path):
    train(tiny_config(tmp_path, "optim.steps=8", "run.save_every=2", "run.keep=3"), quiet=True)
    assert sorted(p.name for p in tmp_path.glob("step_*.pt")) == ["step_000004.pt", "step_000006.pt", "step_000008.pt"]
    assert [torch.load(p, weights_only=True)["step"] for p in sorted(tmp_path.glob("step_*.pt"))] == [4, 6, 8]
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "step_000008.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(b"half a fi")
    again = tiny_config(tmp_path, "optim.steps=10", "run.save_every=2", "run.keep=3")
    with pytest.raises(
        InputError, match=r"last\.pt is damaged .*; copy an earlier one over it: step_000004\.pt, step_000006\.pt"
    ):
        train(again, resume=True, quiet=True)
    (tmp_path / "last.pt").write_bytes((tmp_path / "step_000006.pt").read_bytes())
    train(again, resume=True, quiet=True)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 11))
    assert sorted(p.name for p in tmp_path.glob("step_*.pt")) == ["step_000006.pt", "step_000008.pt", "step_000010.pt"]


def test_keep_0_keeps_last_alone_and_no_link_is_no_loss(tmp_path, monkeypatch):
    train(tiny_config(tmp_path / "none", "optim.steps=2", "run.keep=0"), quiet=True)
    assert not list((tmp_path / "none").glob("step_*")) and (tmp_path / "none" / "last.pt").exists()

    def refuse(*_paths: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(checkpoints.os, "link", refuse)
    train(tiny_config(tmp_path / "copied", "optim.steps=2", "run.keep=1"), quiet=True)
    assert torch.load(tmp_path / "copied" / "step_000002.pt", weights_only=True)["step"] == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    train(tiny_config(tmp_path, "optim.steps=1", "run.keep=0"), quiet=True)
    before = (tmp_path / "last.pt").read_bytes()

    def broken(_body: Any, path: Path) -> None:
        path.write_text("ne")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(InputError, match="cannot write .*last.pt: disk full"):
        train(tiny_config(tmp_path, "optim.steps=2", "run.keep=0"), resume=True, quiet=True)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".part-*"))


def test_a_checkpoint_of_an_older_version_is_taken(tmp_path):
    """It knew no samples, no best, no scaler, and its config lacked the newer keys."""
    train(tiny_config(tmp_path / "whole", "optim.steps=4"), quiet=True)
    train(tiny_config(tmp_path / "old", "optim.steps=4", "run.save_every=2", "optim.max_minutes=0"), quiet=True)
    saved = torch.load(tmp_path / "old" / "step_000002.pt", weights_only=True)
    config = json.loads(saved["config"])
    for section, key in (("run", "keep"), ("optim", "lr_scale"), ("loss", "turns")):
        del config[section][key]
    del config["validation"]
    for group in saved["optimiser"]["param_groups"]:
        del group["scale"]
    old = {k: v for k, v in saved.items() if k not in ("samples", "best", "scaler", "corpora")} | {
        "config": json.dumps(config)
    }
    torch.save(old, tmp_path / "old" / "last.pt")
    train(tiny_config(tmp_path / "old", "optim.steps=4"), resume=True, quiet=True)
    assert shown(tmp_path / "old") == shown(tmp_path / "whole")


# What goes wrong


def test_a_loss_that_is_not_finite_leaves_what_is_needed_to_draw_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr("samed3d.losses.dice_loss", lambda logits, target, *form: logits.sum() * float("nan"))
    with pytest.raises(RuntimeError, match=r"loss is nan at step 0; .* is in .*nonfinite\.json"):
        train(tiny_config(tmp_path, "optim.steps=2", "run.seed=3"), quiet=True)
    told = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (told["step"], told["loss"], told["cases"], told["samples"], told["seed"]) == (
        0,
        "nan",
        ["generated"] * 2,
        [0, 1],
        3,
    )
    again = loop.data_of(tiny_config(tmp_path, "run.seed=3"), loop.start_model(tiny_config(tmp_path)))
    assert again[told["samples"][1]]["index"] == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(error, tmp_path, monkeypatch):
    def full(*_values: Any) -> None:
        raise error

    monkeypatch.setattr("samed3d.losses.dice_loss", full)
    wanted = r"out of memory with optim\.batch=2, data\.crop=16x16x16, clicks\.interactions=2; lower one of them .*activation_checkpointing"
    with pytest.raises(InputError, match=wanted) as caught:
        train(tiny_config(tmp_path, "optim.steps=2"), quiet=True)
    assert "\n" not in str(caught.value)


def test_another_error_is_not_called_out_of_memory():
    assert memory_error(RuntimeError("shapes differ"), TrainConfig()) is None


def test_a_run_folder_tells_what_it_ran_on(tmp_path):
    train(tiny_config(tmp_path, "optim.steps=1", "run.seed=5"), quiet=True)
    train(tiny_config(tmp_path, "optim.steps=2", "run.seed=5"), resume=True, quiet=True)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["from_step"], second["from_step"], first["seed"], first["processes"]) == (0, 1, 5, 1)
    assert (
        first["packages"]["torch"] == torch.__version__.split("+")[0] or first["packages"]["torch"] == torch.__version__
    )
    assert first["device"] == "cpu" and first["command"] and isinstance(first["revision"], str)
    curves = (tmp_path / "curves.svg").read_text()
    assert all(f">{name}<" in curves for name in ("loss", "turn 1", "turn 2", "Dice on training crops"))


def test_a_tracker_that_cannot_start_is_one_line_and_leaves_no_run(tmp_path, monkeypatch):
    class UsageError(Exception):
        __module__ = "wandb.errors"

    def refuse(*_args, **_kwargs):
        raise UsageError("No API key configured.")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    config = tiny_config(tmp_path / "run", "optim.steps=2", "run.trackers=[wandb]")
    with pytest.raises(
        InputError, match=r"wandb cannot start \(No API key.*log in with: wandb login, or set WANDB_MODE=offline"
    ):
        train(config, quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_of_minutes_ends_with_the_rate_at_zero(tmp_path, caplog):
    settings = ["optim.steps=100000", "optim.schedule=cosine_minutes", "optim.max_minutes=0.04", "optim.lr=0.01"]
    with caplog.at_level(logging.WARNING):
        train(tiny_config(tmp_path / "run", *settings), quiet=True)
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    assert len(rates) > 3 and rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.003
    assert "stopped" not in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()

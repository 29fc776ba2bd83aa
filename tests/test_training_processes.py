"""Two processes on the CPU: gradients are shared, weights stay equal, a run ends at the same step everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from samed3d.config import TrainConfig, load_config
from samed3d.models import load
from samed3d.training import start
from samed3d.training.loop import train
from tests.two_processes import ACCUMULATE, CURVE, SMALL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run ``two_processes.py`` once; its files lie in the folder."""
    out = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "tests/two_processes.py",
        str(out),
    ]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate-launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"], 1),
        pytest.param(["torchrun", "--standalone", "--nproc_per_node", "2"], 2, marks=pytest.mark.slow),
    ],
    ids=["accelerate-launch", "torchrun"],
)
def test_both_launchers_of_docs_scale_run_in_this_environment(launcher, processes, tmp_path):
    """``accelerate launch`` imports timm, and with it a torchvision that may not fit torch; ``accelerate-launch`` does
    not."""
    assert launcher[0] in (ROOT / "docs" / "scale.md").read_text()
    changes = [*SMALL, "optim.steps=1", "optim.warmup_steps=0", "run.device=cpu", f"run.folder={tmp_path / 'run'}"]
    command = [Path(sys.executable).with_name(launcher[0]), *launcher[1:], "train.py", "--quiet"]
    command += ["--config", "configs/tiny_cpu.yaml", *(part for change in changes for part in ("--set", change))]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (start_of_run,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert start_of_run["processes"] == processes


def test_there_are_two_processes(ranks):
    assert [(r["processes"], r["rank"]) for r in ranks] == [(2, 0), (2, 1)]


def test_gradients_are_equal_on_both_ranks_and_not_those_of_one_rank(ranks):
    one, other = (r["together"] for r in ranks)
    assert one.keys() == other.keys() and len(one) > 40
    assert max(float((one[name] - other[name]).abs().max()) for name in one) == 0.0
    for rank in ranks:
        differing = [
            name
            for name, gradient in rank["alone"].items()
            if not torch.allclose(gradient / ACCUMULATE, one[name], atol=1e-6)
        ]
        assert len(differing) > 0.9 * len(rank["alone"])


def test_gradients_are_the_mean_over_ranks(ranks):
    one, other = (r["alone"] for r in ranks)
    for name, gradient in ranks[0]["together"].items():
        torch.testing.assert_close(gradient, (one[name] + other[name]) / 2 / ACCUMULATE, atol=1e-5, rtol=1e-3)


def test_weights_are_equal_after_a_step_and_have_moved(ranks):
    one, other = (r["after"] for r in ranks)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not all(torch.equal(ranks[0]["before"][k], one[k]) for k in one)


def test_the_time_limit_ends_both_at_the_same_step_and_one_set_of_files_is_written(folder):
    saved = torch.load(folder / "run" / "last.pt", weights_only=True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, saved["step"] + 1)) and 1 <= saved["step"] < 100000
    assert load(folder / "run" / "model.safetensors").spec.input_shape_zyx == (16, 16, 16)


def test_each_sample_is_drawn_by_one_process_only(ranks):
    one, other = (r["drawn"] for r in ranks)
    shared = min(len(one), len(other))
    assert (
        shared >= 2
        and one[:shared] == list(range(0, 2 * shared, 2))
        and other[:shared] == list(range(1, 2 * shared, 2))
    )


def test_two_processes_give_the_losses_of_one_with_the_doubled_batch(folder, tmp_path):
    """The same samples, clicked alike: but for the order of sums, the curve is the same."""
    train(load_config(TrainConfig, None, [*CURVE, "optim.batch=2", f"run.folder={tmp_path}"]), quiet=True)
    one, two = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path, folder / "curve")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=2e-4)
    assert len({row["loss"] for row in one}) == 4
    saved = [torch.load(f / "last.pt", weights_only=True) for f in (tmp_path, folder / "curve")]
    assert saved[0]["samples"] == saved[1]["samples"] == 16
    for name, mean in saved[0]["average"].items():
        torch.testing.assert_close(mean, saved[1]["average"][name], atol=2e-3, rtol=1e-2)


def test_a_run_of_two_processes_goes_on_with_one_where_its_samples_stopped(folder, tmp_path):
    shutil.copytree(folder / "curve", tmp_path / "curve")
    train(
        load_config(TrainConfig, None, [*CURVE, "optim.batch=1", "optim.steps=6", f"run.folder={tmp_path / 'curve'}"]),
        resume=True,
        quiet=True,
    )
    saved = torch.load(tmp_path / "curve" / "last.pt", weights_only=True)
    assert (saved["step"], saved["samples"]) == (6, 16 + 2 * ACCUMULATE), "two steps of one process after four of two"
    processes = [start["processes"] for start in json.loads((tmp_path / "curve" / "environment.json").read_text())]
    assert processes == [2, 1]


# Accumulation, in this process


def test_an_optimiser_step_takes_as_many_batches_as_are_accumulated(tmp_path):
    """A run is counted in optimiser steps, so there are never too few batches for one."""
    config = load_config(
        TrainConfig, None, [*SMALL, f"run.folder={tmp_path / 'run'}", "optim.steps=1", "optim.accumulate=3"]
    )
    torch.manual_seed(config.run.seed)
    before = start.start_model(config).state_dict()
    train(config, quiet=True)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 1
    assert not all(torch.equal(before[k], saved["model"][k]) for k in before)


def test_the_optimiser_steps_when_data_end_before_the_accumulation(tmp_path, monkeypatch):
    """A loader with two batches under an accumulation of eight still moves the weights, once."""
    config = load_config(
        TrainConfig, None, [*SMALL, f"run.folder={tmp_path / 'run'}", "optim.steps=1", "optim.accumulate=8"]
    )

    class Short(start.CropDataset):
        def __len__(self) -> int:
            return 2

    monkeypatch.setattr(start, "CropDataset", Short)
    torch.manual_seed(config.run.seed)
    before = start.start_model(config).state_dict()
    train(config, quiet=True)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 1
    assert not all(torch.equal(before[k], saved["model"][k]) for k in before)

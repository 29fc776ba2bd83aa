"""The benchmark that trains all systems on one budget: same run for all, models that take its crop, one table."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from samed3d.models import create_model

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "compare_systems.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("compare_systems", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(tmp_path, **more) -> argparse.Namespace:
    given = {
        "corpus": ["corpus"],
        "minutes": 0.0,
        "samples": 100,
        "crop": 32,
        "batch": 4,
        "lr": 1e-3,
        "seed": 0,
        "out": tmp_path,
    }
    return argparse.Namespace(**{**given, **more})


def test_all_systems_take_the_crop_and_share_the_run(bench, tmp_path):
    configs = {system: bench.config_of(system, options(tmp_path)) for system in bench.SMALLER}
    for config in configs.values():
        with torch.device("meta"):
            model = create_model(config.model.name, **config.model.overrides)
        assert model.spec.input_shape_zyx == (32, 32, 32) == config.data.crop
    assert len({(c.data, c.clicks, c.optim, c.loss) for c in map(hashable, configs.values())}) == 1
    assert configs["samu_no_prompt"].model.overrides["prompt_levels"] == "none"
    assert configs["samu"].optim.steps == 25


def hashable(config):
    """Sections as text: they hold lists."""
    return argparse.Namespace(**{name: str(getattr(config, name)) for name in ("data", "clicks", "optim", "loss")})


def test_minutes_limit_a_long_run(bench, tmp_path):
    config = bench.config_of("samu", options(tmp_path, samples=0, minutes=2.5))
    assert config.optim.max_minutes == 2.5 and config.optim.steps == 1_000_000 and config.optim.schedule == "constant"


def test_the_table_has_a_line_per_system(bench, tmp_path):
    row = {
        "system": "samu",
        "trained": 12_034_342,
        "gflop_encode": 4.2,
        "gflop_decode": 11.1,
        "encode_ms": 40.0,
        "decode_ms": 90.0,
    }
    row |= {
        "peak_mib": 900.0,
        "samples": 100,
        "s_per_sample": 0.5,
        "dice": {"1": 0.5, "3": 0.6, "5": 0.7},
        "structures": 6,
        "subjects": 3,
    }
    lines = bench.write_table([row, {**row, "s_per_sample": None}], options(tmp_path)).splitlines()
    assert lines[0].startswith("From random weights, 100 samples each, crops of 32^3")
    assert lines[4] == "| samu | 12,034,342 | 4.2 | 11.1 | 40 | 90 | 0.50 | 900 | 100 | 0.500 | 0.600 | 0.700 |"
    assert " - |" in lines[5]

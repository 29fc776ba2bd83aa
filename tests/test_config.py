"""Reading, overriding and refusing configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from samed3d.config import DataConfig, TrainConfig, config_of, load_config, to_dict
from samed3d.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_no_file_gives_the_defaults():
    assert load_config(TrainConfig) == TrainConfig()


def test_plain_values_of_an_older_run_get_the_defaults_of_newer_keys():
    told = to_dict(TrainConfig())
    del told["validation"], told["optim"]["lr_scale"]
    assert config_of(TrainConfig, told) == TrainConfig()
    with pytest.raises(InputError, match=r"unknown config key 'optim\.lrr'"):
        config_of(TrainConfig, {"optim": {"lrr": 1}})


def test_file_then_overrides_the_last_wins(tmp_path):
    path = write(tmp_path, "optim:\n  lr: 0.5\n  steps: 7\n")
    config = load_config(TrainConfig, path, ["optim.lr=1e-4", "optim.lr=2e-4", "run.trackers=[wandb]"])
    assert (config.optim.lr, config.optim.steps, config.run.trackers) == (2e-4, 7, ["wandb"])


def test_round_trip_through_plain_values(tmp_path):
    import yaml

    config = load_config(
        TrainConfig, None, ["data.crop=[32,48,64]", "model.overrides={width: 8}", "clicks.policy=centre"]
    )
    path = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert load_config(TrainConfig, path) == config


def test_values_keep_their_types():
    config = load_config(TrainConfig, None, ["data.fill=[1, 1]", "optim.grad_clip=2", "data.crop=[32, 32, 32]"])
    assert isinstance(config.data.fill, tuple) and isinstance(config.data.fill[0], float)
    assert isinstance(config.optim.grad_clip, float) and config.data.crop == (32, 32, 32)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().optim.lr = 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown config key 'optim\.lrr'; did you mean optim\.lr\?"),
        ("optm.lr=1", r"unknown config key 'optm'; did you mean optim\?"),
        ("optim.zzzzzz=1", r"known here: name, lr, lr_scale, weight_decay"),
        ("optim.lr=fast", r"'optim\.lr' must be a finite number, got 'fast'"),
        ("optim.lr=.inf", r"'optim\.lr' must be a finite number, got inf"),
        ("optim.lr=true", r"'optim\.lr' must be a number, got True"),
        ("optim.batch=1.5", r"'optim\.batch' must be a whole number, got 1\.5"),
        ("optim.batch=true", r"'optim\.batch' must be a whole number, got True"),
        ("clicks.detach=1", r"'clicks\.detach' must be true or false, got 1"),
        ("run.folder=3", r"'run\.folder' must be text, got 3"),
        ("data.crop=[32, 32]", r"'data\.crop' must be a list of 3 values, got \[32, 32\]"),
        ("data.crop=[32, 32, x]", r"'data\.crop\[2\]' must be a whole number, got 'x'"),
        ("data.corpus=one", r"'data\.corpus' must be a list of values, got 'one'"),
        ("clicks.policy=random", r"'clicks\.policy' must be one of uniform, centre, ritm, mixed, got 'random'"),
        ("model.overrides=3", r"'model\.overrides' must be a mapping, got 3"),
        ("data.spacing_mm=-1", r"data\.spacing_mm must be 0 \(the object's scale\) or more, got -1"),
        ("clicks.mask_only_turns=[first]", r"clicks\.mask_only_turns may hold last and random, got \['first'\]"),
        (
            "optim.milestones=[0.6, 0.5]",
            r"optim\.milestones must be rising shares of a cycle, above 0 and at most 1, got \[0\.6, 0\.5\]",
        ),
        ("optim.lr_scale={mask_decoder: 0}", r"optim\.lr_scale\.mask_decoder must be a number above 0, got 0"),
        ("optim.cycles=0", r"optim\.cycles must be 1 or more, got 0"),
        ("run.keep=-1", r"run\.keep must be 0 \(last\.pt alone\) or more, got -1"),
        ("validation.clicks=0", r"validation\.clicks must be 1 or more, got 0"),
        ("loss.distill=1", r"loss\.teacher must name a checkpoint when loss\.distill is above 0, got ''"),
        ("optim=3", r"'optim' must be a section of keys, got 3"),
        ("optim.lr", r"--set needs section\.key=value, got 'optim\.lr'"),
        ("optim..lr=1", r"--set needs section\.key=value"),
        ("optim.lr=[", r"not valid YAML: --set optim\.lr=\[, line 1"),
    ],
)
def test_refused_overrides(override, message):
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.synthetic_share=0.5",
            r"data\.synthetic_share must be 1 while data\.corpus is empty, got 0\.5; .*data\.corpus",
        ),
        ("data.corpus=[a]", r"data\.synthetic_share must be below 1 when data\.corpus is given"),
        ("data.fill=[0.9, 0.2]", r"data\.fill must be two rising numbers above 0, got \(0\.9, 0\.2\)"),
        ("data.crop=[4, 32, 32]", r"data\.crop must be at least 8 voxels"),
        ("clicks.interactions=0", r"clicks\.interactions must be 1 or more, got 0"),
        ("clicks.box_probability=1.5", r"clicks\.box_probability must be from 0 to 1, got 1\.5"),
        ("optim.warmup_steps=-1", r"optim\.warmup_steps must be 0 or more, got -1"),
        ("optim.lr=0", r"optim\.lr must be above 0"),
        ("run.ema=1", r"run\.ema must be from 0 \(off\) to below 1"),
        ("run.trackers=[mlflow]", r"run\.trackers may hold wandb and tensorboard, got \['mlflow'\]"),
        ("loss.dice=-1", r"loss\.dice, loss\.ce, loss\.iou must be 0 or more"),
    ],
)
def test_cross_checks_name_the_keys(override, message):
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, [override])


def test_corpus_with_a_share_is_accepted():
    config = load_config(DataConfig, None, ["corpus=[a, b]", "synthetic_share=0.25"])
    assert config.corpus == ["a", "b"] and config.synthetic_share == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [1, 2", r"not valid YAML: .*c\.yaml, line 1"),
        ("- a\n- b\n", r"config file must be a mapping of sections, got a list: .*c\.yaml"),
        ("optim: 3\n", r"'optim' must be a section of keys, got 3"),
    ],
)
def test_refused_files(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, write(tmp_path, text))


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    assert load_config(TrainConfig, write(tmp_path, "# nothing\noptim:\n")) == TrainConfig()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config file cannot be read: .*nope\.yaml \(No such file"):
        load_config(TrainConfig, tmp_path / "nope.yaml")


def test_there_are_configs():
    assert any(p.name == "tiny_cpu.yaml" for p in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_file_loads_and_opens_with_its_command(path):
    lines = path.read_text().splitlines()
    opening = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    assert any(f"configs/{path.name}" in line and ("train.py" in line or "samed3d train" in line) for line in opening)
    load_config(TrainConfig, path)


def test_every_field_says_what_it_means():
    import ast

    tree = ast.parse((ROOT / "samed3d" / "config" / "sections.py").read_text())
    checked = 0
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "TrainConfig":
            continue
        for at, item in enumerate(node.body):
            if isinstance(item, ast.AnnAssign):
                after = node.body[at + 1] if at + 1 < len(node.body) else None
                said = (
                    isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                )
                assert said, f"{node.name}.{ast.unparse(item.target)} has no text under it"
                checked += 1
    assert checked > 25

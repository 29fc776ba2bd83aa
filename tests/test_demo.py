"""The demo: what it clicks, what it counts and what it leaves behind. The session is a stand-in that needs no model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samed3d.apps import demo
from samed3d.cli import main
from samed3d.geometry import Grid
from samed3d.volume import read_volume, write_mask

GRID = Grid((12, 14, 16), (1.0, 1.0, 2.0))
NAMES = {2: "liver", 5: "spleen", 7: "absent"}


def body(generator, **_named):
    """Two blocks as organs."""
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[2:9, 2:9, 2:7] = 2
    labels[3:8, 3:8, 10:15] = 5
    return (generator.integers(0, 9, GRID.shape_zyx) + 50 * labels).astype(np.int16), labels, GRID, NAMES


class StandIn:
    """Masks one more slice of the clicked organ at each click."""

    def __init__(self, volume):
        self.volume, self.clicked = volume, []
        self.truth = body(np.random.default_rng(0))[1]
        self.labels = np.zeros(GRID.shape_zyx, np.uint8)

    @classmethod
    def open(cls, volume, model, device):
        assert (model, device) == ("tiny", "cpu")
        return cls(volume)

    def add(self, prompt, object_id, name):
        self.clicked.append((object_id, name, prompt.at, prompt.positive))
        count = sum(o == object_id for o, *_ in self.clicked)
        self.mask = ((self.truth == object_id) & (np.arange(GRID.shape_zyx[0])[:, None, None] < 1 + 2 * count)).astype(
            np.uint8
        )
        self.labels[self.mask > 0] = object_id
        return type("Update", (), {"seconds": 0.5})()

    def objects(self):
        return []

    def save(self, path):
        write_mask(path, self.labels, GRID)

    def report(self):
        return {"clicked": self.clicked}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(demo, "Session", StandIn)
    monkeypatch.setattr(demo, "load_promptable", lambda name: name)
    monkeypatch.setattr(demo, "anatomical_phantom", body)
    monkeypatch.setattr(demo, "write_preview", lambda path, *_values, **_named: path.write_bytes(b"png"))


def test_demo_clicks_each_organ_until_nothing_is_wrong(stand_in, tmp_path, capsys):
    results = demo.run_demo(tmp_path / "new" / "demo", model="tiny", device="cpu")
    assert [r.name for r in results] == ["liver", "spleen"]
    for result, clicks in zip(results, (4, 4), strict=True):
        assert len(result.dice) == len(result.seconds) == clicks
        assert result.dice == sorted(result.dice) and result.dice[-1] == 1.0 and result.dice[0] < 0.6
    out = capsys.readouterr().out
    assert "liver" in out and "mean" in out and "absent" not in out and "preview.png" in out


def test_the_first_click_is_the_middle_of_the_organ(stand_in, tmp_path):
    demo.run_demo(tmp_path, model="tiny", device="cpu", quiet=True)
    clicked = json.loads((tmp_path / "results.json").read_text())["session"]["clicked"]
    number, name, ijk, positive = clicked[0]
    assert (number, name, positive) == (2, "liver", True)
    assert ijk[0] == 4 and 4 <= ijk[1] <= 6 and 4 <= ijk[2] <= 6


def test_demo_leaves_the_volume_the_masks_and_the_figures(stand_in, tmp_path, capsys):
    demo.run_demo(tmp_path, model="tiny", device="cpu", quiet=True)
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ct.nii.gz",
        "masks.nii.gz",
        "preview.png",
        "prompts.json",
        "results.json",
    ]
    assert read_volume(tmp_path / "ct.nii.gz").grid == read_volume(tmp_path / "masks.nii.gz").grid


def test_a_file_in_the_way_of_the_folder_is_the_users_to_mend(stand_in, tmp_path, capsys):
    (tmp_path / "demo").write_text("in the way")
    assert main(["demo", "-o", str(tmp_path / "demo"), "--model", "tiny", "--device", "cpu"]) == 2
    assert "--output must be a folder that can be made" in capsys.readouterr().err

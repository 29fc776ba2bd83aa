"""The default checkpoint's card: its numbers are those of the saved runs, and each is counted as the card says."""

from __future__ import annotations

import json

import pytest
from saved_results import make_rows, save_run
from test_collect import FOLDER, ROOT, module

from samed3d.evaluation.results import read_run

card = module("card")


def test_the_card_holds_the_numbers_of_the_file():
    body = json.loads((FOLDER / "results" / "default_evaluation.json").read_text())
    page = (ROOT / "checkpoints" / "README.md").read_text()
    assert card.card_with_blocks(page, body) == page, "run python benchmarks/card.py --page"


def saved(tmp_path):
    """Clicks of eight unseen subjects and of eight of a held-out source, a box first, and a control."""
    flags = {"positive": 1, "added_voxels": 5}
    own = make_rows({"default": (0.3, 0.6, 0.5)}, **flags) + make_rows(
        {"default": (0.1, 0.2, 0.3)}, group="held-out source", **flags
    )
    for row in own:
        if row["click"] == 2:
            row |= {
                "positive": 0,
                "added_voxels": -3 if row["group"] == "unseen subject" else 2,
                "obeyed": 0 if row["subject"] == "p0" else 1,
            }
    box = [row | {"click": 0, "prompt": "box", "obeyed": None} for row in make_rows({"default": (0.8,)})]
    controls = make_rows({"default": (0.3, 0.6), "region_growing": (0.1, 0.05)})
    about = {"environment": {"processor": "P", "cores": 2, "torch": "2.x"}}
    runs = {"clicks": own, "box": box, "controls": controls}
    return {name: read_run(save_run(tmp_path / name, rows, **about)) for name, rows in runs.items()}


def test_means_by_group_and_what_clicks_do(tmp_path):
    body = card.body_of(saved(tmp_path))
    unseen = body["group"]["unseen subject"]
    assert (unseen["subjects"], unseen["structures"]) == (8, 8)
    assert unseen["dice"]["1"]["mean"] == pytest.approx(0.335) and unseen["dice"]["3"]["mean"] == pytest.approx(0.535)
    assert "2" not in unseen["dice"]  # not among the clicks that are shown
    assert set(body["source"]) == {"a", "b", "a (held out)", "b (held out)"}
    assert body["by_seed"]["unseen subject"] == {"1": [pytest.approx(0.335)], "3": [pytest.approx(0.535)]}
    assert body["box"]["unseen subject"]["mean"] == pytest.approx(0.835)
    assert body["controls"]["unseen subject"]["region_growing"]["dice"]["1"]["mean"] == pytest.approx(0.135)
    found = body["behaviour"]
    assert (found["clicks"], found["negative clicks"], found["negative clicks that added volume"]) == (48, 16, 8)
    assert found["obeyed"] == pytest.approx(46 / 48)
    assert (found["steps"], found["steps that lowered Dice by more than 0.01"]) == (32, 8)


def test_the_blocks_show_them_beside_their_aims(tmp_path):
    body = card.body_of(saved(tmp_path))
    aims = card.block("aims", body)
    assert "| **unseen subject** | 8 | 8 | 0.34 [" in aims and "| aim |  |  | 0.75 |  | 0.85 | 0.88 |" in aims
    assert "| **unseen subject** | 8 | 0.83 [" in aims and "`samed3d evaluate DATA -o out`" in aims
    text = card.block("behaviour", body)
    assert (
        "| 95.8% of 48 | >= 99 % |" in text
        and "| 50.0% of 16 | >= 97 % |" in text
        and "| 25.0% of 32 | <= 5 % |" in text
    )
    assert "| `region_growing` | 0.14 [" in card.block("controls", body)
    assert "MR" in card.block("modalities", body)


def test_a_command_names_no_folder_of_this_machine(tmp_path):
    shown = card.without_paths(f"samed3d evaluate {tmp_path} --model default -o {tmp_path}")
    assert shown == f"samed3d evaluate DATA --model default -o {tmp_path}"


def test_a_card_must_hold_each_block_once():
    with pytest.raises(ValueError, match="must hold each block once"):
        card.card_with_blocks("<!-- measured: aims -->\n<!-- end -->", {})

"""The pointer tools of the web page, run by node with a page that is a stand-in."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import samed3d.apps

NODE = shutil.which("node")
TOOLS = Path(samed3d.apps.__file__).with_name("viewer") / "js" / "tools.js"
SCRIPT = """
const { Hand } = await import("data:text/javascript;base64," + process.argv[1]);
const area = { addEventListener() {} };
const stage = {
  pick: (e) => ({ ijk: [e.clientX, e.clientY, 7], axis: 2, x: e.clientX, y: e.clientY }),
  goTo() {},
  drawOverlay() {},
};
const prompts = [];
const hand = new Hand(area, stage, (prompt) => prompts.push(prompt));
for (const step of JSON.parse(process.argv[2])) {
  if (step.set) Object.assign(hand, step.set);
  else hand[step.kind]({ button: 0, clientX: 0, clientY: 0, timeStamp: 0, ...step });
}
console.log(JSON.stringify(prompts));
"""


def prompts_of(*steps: dict) -> list[dict]:
    if NODE is None:
        pytest.skip("needs node")
    import base64

    source = base64.b64encode(TOOLS.read_bytes()).decode()
    command = [NODE, "--input-type=module", "-e", SCRIPT, source, json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def click(x: int, y: int, time: int, button: int = 0) -> list[dict]:
    at = {"clientX": x, "clientY": y, "button": button}
    return [{"kind": "down", **at, "timeStamp": time}, {"kind": "up", **at, "timeStamp": time + 20}]


def drag(start: tuple[int, int], end: tuple[int, int], button: int = 0) -> list[dict]:
    first, last = ({"clientX": x, "clientY": y, "button": button} for x, y in (start, end))
    return [{"kind": "down", **first}, {"kind": "move", **last}, {"kind": "up", **last}]


def test_a_double_click_is_one_click():
    assert len(prompts_of(*click(20, 30, 0), *click(22, 31, 150))) == 1
    assert len(prompts_of(*click(20, 30, 0), *click(22, 31, 900))) == 2  # two clicks, one after the other
    assert len(prompts_of(*click(20, 30, 0), *click(40, 31, 150))) == 2  # at another place


def test_left_adds_right_removes_and_the_switch_turns_both():
    steps = [*click(20, 30, 0), *click(60, 30, 0, 2), {"set": {"positive": False}}, *click(90, 30, 0)]
    assert [p["positive"] for p in prompts_of(*steps)] == [True, False, False]


def test_a_box_is_a_box():
    steps = [{"set": {"tool": "box"}}, *drag((40, 50), (20, 80))]
    assert prompts_of(*steps) == [{"type": "box", "min": [20, 50, 7], "max": [40, 80, 7]}]


@pytest.mark.parametrize(
    "steps", [drag((20, 50), (40, 80), 2), [{"set": {"positive": False}}, *drag((20, 50), (40, 80))]]
)
def test_a_negative_box_is_a_negative_lasso_around_the_same_voxels(steps):
    (lasso,) = prompts_of({"set": {"tool": "box"}}, *steps)
    assert lasso["type"] == "lasso" and lasso["positive"] is False
    assert lasso["outline"] == [[19.51, 49.51, 7], [40.49, 49.51, 7], [40.49, 80.49, 7], [19.51, 80.49, 7]]

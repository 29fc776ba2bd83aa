"""A session with the shipped checkpoint on a real MR volume: every kind of prompt, undo, a journal opened again, a
session file; and the memory that a large volume needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samed3d.geometry import Grid, bounding_region, zyx_to_ijk
from samed3d.inference.session import Session
from samed3d.metrics import dice
from samed3d.models import load
from samed3d.prompts import Box, Lasso, Mask, Point, Scribble
from samed3d.volume import Volume, read_volume, write_volume
from samed3d.volume.contours import trace_contours
from samed3d.volume.label_maps import read_label_map


@pytest.fixture(scope="module")
def hippocampus(data_dir):
    """Image path, volume, and the mask of the anterior part."""
    path = sorted((data_dir / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))[0]
    labels, _ = read_label_map(data_dir / "msd_hippocampus" / "labelsTr" / path.name.replace("_0000", ""))
    return path, read_volume(path), labels == 1


@pytest.fixture(scope="module")
def network():
    return load("default")


def middle_slice(mask: np.ndarray) -> int:
    return int(mask.sum((1, 2)).argmax())


def first_prompts(mask: np.ndarray) -> dict[str, object]:
    """One prompt of each kind, as a user would draw it in the slice that shows most of the object."""
    k = middle_slice(mask)
    inside = np.argwhere(mask[k])
    j, i = inside[len(inside) // 2]
    outline = max(trace_contours(mask[k]), key=len)
    low, high = inside.min(0), inside.max(0)
    region = bounding_region(mask)
    corners = region.start_zyx[::-1], tuple(v - 1 for v in region.stop_zyx[::-1])
    return {
        "point": Point((float(i), float(j), float(k))),
        "2d box": Box((float(low[1]), float(low[0]), float(k)), (float(high[1]), float(high[0]), float(k))),
        "box": Box(*(tuple(map(float, c)) for c in corners)),
        "lasso": Lasso(tuple((float(a), float(b), float(k)) for a, b in outline)),
        "scribble": Scribble(
            tuple((float(a), float(b), float(k)) for b, a in inside[:: max(1, len(inside) // 4)]), radius_vox=0
        ),
    }


@pytest.mark.parametrize("kind", ["point", "2d box", "box", "lasso", "scribble"])
def test_every_kind_of_first_prompt_finds_the_structure(hippocampus, network, kind):
    _, volume, mask = hippocampus
    session = Session(volume, network, "cpu")
    session.add(first_prompts(mask)[kind])
    assert (
        dice(session.mask.astype(bool), mask) > 0.4
    )  # far above an empty or a full mask; how good it is, evaluate says


@pytest.mark.slow
def test_a_session_goes_on_from_its_journal_and_its_file(hippocampus, network, tmp_path):
    path, volume, mask = hippocampus
    said = first_prompts(mask)
    with Session.open(path, network, "cpu", journal=tmp_path / "j.jsonl", model_name="default") as session:
        session.add(said["point"], name="hippocampus")
        session.add(Point((1, 1, 1), positive=False))
        before = session.logits_of(1)
        session.add(said["scribble"])
        session.undo()
        np.testing.assert_array_equal(session.logits_of(1), before)
        session.add(Mask(session.mask), object_id=2)
        session.add(session.suggest_click(2), object_id=2)
        state = [session.logits_of(n) for n in (1, 2)]
        session.save(tmp_path / "s.json")
    for again in (
        Session.open(path, network, "cpu", journal=tmp_path / "j.jsonl"),
        Session.load(tmp_path / "s.json", device="cpu"),
    ):
        for n, expected in enumerate(state, start=1):
            np.testing.assert_array_equal(again.logits_of(n), expected)
        assert (
            again.objects()[0].name == "hippocampus" and zyx_to_ijk((1.0, 1.0, 1.0)) == again.objects()[0].prompts[1].at
        )


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.75), (0.7, 0.8)])
@pytest.mark.parametrize("axis", range(3))
def test_a_lasso_inside_its_object_is_not_one_slice(axis, share, least):
    """The crop around it lay inside the object and showed no border: a Dice of 0.01 to 0.07."""
    spacing, size, radius_mm = np.array([0.8, 0.8, 2.0]), np.array([100, 100, 40]), 20.0
    centre = (size - 1) / 2
    k, j, i = np.ogrid[: size[2], : size[1], : size[0]]
    offsets = [(at - c) * s for at, c, s in zip((i, j, k), centre, spacing, strict=True)]
    ball = offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2 <= radius_mm**2
    array = np.random.default_rng(0).normal(-50, 12, ball.shape) + 170 * ball
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    outline = np.tile(centre.round(), (32, 1))
    for other, part in zip([a for a in range(3) if a != axis], (np.cos(angles), np.sin(angles)), strict=True):
        outline[:, other] = centre[other] + share * radius_mm / spacing[other] * part
    with Session.open(Volume.from_array(array.astype(np.float32), spacing_mm=tuple(spacing))) as session:
        session.add(Lasso(tuple(map(tuple, outline.tolist()))))
        mask = session.mask > 0
    assert dice(mask, ball) > least


PEAK = r"""
import re, sys
from samed3d.cli import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_a_large_object_needs_little_more_memory_than_its_image(tmp_path):
    peaks = []
    for edge in (48, 400):
        z, y, x = np.ogrid[-1 : 1 : edge * 1j, -1 : 1 : edge * 1j, -1 : 1 : edge * 1j]
        array = np.where((z / 0.9) ** 2 + (y / 0.8) ** 2 + (x / 0.8) ** 2 < 1, 100, -900).astype(np.int16)
        write_volume(tmp_path / "body.nii", array, Grid(array.shape, (1.0, 1.0, 1.0)))
        low, high, middle = (",".join([str(round(edge * share))] * 3) for share in (0.07, 0.93, 0.5))
        prompts = ["--box", f"{low},{high}", "--point", middle, "--negative-point", low]
        output = str(tmp_path / "mask.nii.gz")
        command = [sys.executable, "-c", PEAK, "segment", str(tmp_path / "body.nii"), *prompts, "-o", output, "--quiet"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(1024 * int(found.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 2 * array.nbytes

"""What ``--model``, ``--external`` and ``--server`` name, and what each is told."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from samed3d.errors import InputError
from samed3d.evaluation.methods import ExternalProgram, ModelMethod, method_of
from samed3d.geometry import Grid
from samed3d.models import MODELS
from samed3d.models.base import ModelEntry
from samed3d.prompts import Point
from samed3d.volume import Volume
from tests.brightness_model import BrightnessModel
from tests.known_methods import measured

PROGRAM = """
import json, sys
import SimpleITK as sitk
image, prompts, out = (sitk.ReadImage(sys.argv[1]), json.load(open(sys.argv[2])), sys.argv[3])
assert prompts["space"] == "ijk" and prompts["version"] == 1
last = prompts["objects"][0]["prompts"][-1]
grown = sitk.ConnectedThreshold(image, [[round(v) for v in last["at"]]], 0.5, 2.0, 1) if last["type"] == "point" else image * 0
"""


def scene() -> tuple[Volume, np.ndarray]:
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[2:7, 3:9, 4:11] = 1
    image = labels + np.random.default_rng(0).normal(0, 0.02, labels.shape)
    return Volume(image.astype(np.float32), Grid(labels.shape, (1.0, 2.0, 1.5), (3.0, 4.0, 5.0)), "memory"), labels


def program(folder: Path, ending: str) -> str:
    path = folder / "program.py"
    path.write_text(PROGRAM + ending)
    return f"{sys.executable} {path} {{image}} {{prompts}} {{out}}"


def test_an_external_program_gets_prompts_and_answers(tmp_path):
    volume, labels = scene()
    rows = measured(
        ExternalProgram(program(tmp_path, "sitk.WriteImage(sitk.Cast(grown, sitk.sitkUInt8), out)")),
        volume,
        labels,
        clicks=2,
    ).rows
    assert rows[0]["dice"] == 1.0 and rows[0]["encode_seconds"] is None and rows[0]["seconds"] > 0
    empty = measured(
        ExternalProgram(program(tmp_path, "sitk.WriteImage(sitk.Cast(grown * 0, sitk.sitkUInt8), out)")),
        volume,
        labels,
        clicks=1,
    )
    assert empty.rows[0]["dice"] == 0, "an empty mask is an answer"


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("raise SystemExit('no memory left')", "ended with code 1 and no mask: no memory left"),
        ("", "ended with code 0 and no mask: nothing on stderr"),
        (
            "grown.SetSpacing([9, 9, 9]); sitk.WriteImage(sitk.Cast(grown, sitk.sitkUInt8), out)",
            r"must lie on the image's grid \(same size, but",
        ),
        ("sitk.WriteImage(sitk.Cast(grown[1:], sitk.sitkUInt8), out)", r"must lie on the image's grid \(sizes"),
    ],
)
def test_answers_that_cannot_be_used_are_named(tmp_path, ending, message):
    with pytest.raises(InputError, match=message):
        measured(ExternalProgram(program(tmp_path, ending)), *scene(), clicks=1)


def test_commands_that_cannot_be_run_are_named():
    with pytest.raises(
        InputError,
        match=r"--external needs \{image\} \{prompts\} \{out\} in the command, \{out\} missing: a \{image\} \{prompts\}",
    ):
        method_of("external:a {image} {prompts}")
    with pytest.raises(InputError, match="--external cannot be read as a command"):
        method_of("external:a 'b {image} {prompts} {out}")
    with pytest.raises(InputError, match="external program did not run: .*no-such-program"):
        measured(method_of("external:no-such-program {image} {prompts} {out}"), *scene(), clicks=1)


@pytest.mark.slow
def test_a_server_of_the_nninteractive_protocol_scores_as_the_session_behind_it(tmp_path):
    pytest.importorskip("nnInteractive.inference.remote", reason="needs the package nninteractive-client")
    from tests.server_tools import ServerProcess, write_ball

    volume = write_ball(tmp_path / "ball.nii.gz")
    labels = (volume.array > 0.5).astype(np.uint8)
    with ServerProcess(tmp_path) as server:
        rows = measured(
            method_of(f"server:{server.url}"), volume, labels, clicks=2, prompts=("click", "box", "scribble")
        ).rows
    local = measured(
        ModelMethod("m", BrightnessModel((16, 16, 16))),
        volume,
        labels,
        clicks=2,
        prompts=("click", "box", "scribble"),
    ).rows
    assert len(rows) == len(local) == 8
    assert all(abs(a["dice"] - b["dice"]) < 0.1 and a["dice"] > 0.5 for a, b in zip(rows, local, strict=True))


def test_a_server_that_is_not_there_is_named():
    pytest.importorskip("nnInteractive.inference.remote", reason="needs the package nninteractive-client")
    with pytest.raises(InputError, match=r"server cannot be used: http://127.0.0.1:9 \(ConnectError"):
        measured(method_of("server:http://127.0.0.1:9"), *scene(), clicks=1)


def test_an_architecture_is_measured_with_random_weights_and_says_so(monkeypatch):
    entry = MODELS["sam_med3d_b"]
    monkeypatch.setitem(
        MODELS, "sam_med3d_b", ModelEntry(lambda **more: entry.build(**{**entry.tiny, **more}), entry.tiny)
    )
    one, other = method_of("sam_med3d_b"), method_of("sam_med3d_b")
    assert one.name == "sam_med3d_b (random weights)" and one.takes == {"point", "scribble"}
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(t.std() > 0 for t in one.model.state_dict().values())


def test_the_control_without_a_prompt_is_told_a_random_place():
    volume, labels = scene()
    honest, misled = method_of("oracle_bound"), method_of("no_prompt:dilated_ball")
    assert (
        misled.name == "no_prompt:dilated_ball"
        and misled.takes == method_of("dilated_ball").takes
        and not honest.fingerprint
    )
    places = set()
    for i in range(12):
        opened = misled.open(volume, labels == 1)
        opened.add(Point((4.0 + i % 4, 5.0 + i % 3, 3.0 + i % 2)))
        opened.add(Point((0.0, 0.0, 0.0), positive=False))
        places.add(tuple(np.argwhere(opened.mask_of(1)).mean(axis=0).round(1)))
    assert len(places) > 6
    again = misled.open(volume, labels == 1)
    again.add(Point((4.0, 5.0, 3.0)))
    first = misled.open(volume, labels == 1)
    first.add(Point((4.0, 5.0, 3.0)))
    assert np.array_equal(again.mask_of(1), first.mask_of(1))


def test_any_object_with_encode_and_decode_can_be_measured():
    class Duck:
        def __init__(self) -> None:
            self._inner = BrightnessModel((16, 16, 16))
            self.spec, self.decode = self._inner.spec, self._inner.decode

        def encode(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return self._inner.encode(image)

        def eval(self) -> Duck:
            return self

        def to(self, device: torch.device) -> Duck:
            return self

    rows = measured(ModelMethod("duck", Duck()), *scene(), clicks=2).rows
    assert rows[0]["dice"] > 0.5 and rows[0]["encode_seconds"] is not None
    with pytest.raises(
        InputError,
        match="a model to measure needs spec, encode, decode, eval and to; 'x' lacks spec, encode, decode, eval, to",
    ):
        ModelMethod("x", object())


def test_names_that_mean_nothing_get_the_nearest(tmp_path):
    with pytest.raises(
        InputError, match=r"no checkpoint or file is called 'region_growin', nor .* nearest names: region_growing"
    ):
        method_of("region_growin")
    with pytest.raises(
        InputError, match=r"only oracle_bound takes a number, as oracle_bound@6 \(mm > 0\), got 'oracle_bound@0'"
    ):
        method_of("oracle_bound@0")
    assert method_of("oracle_bound@3mm").name == "oracle_bound@3mm"

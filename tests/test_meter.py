"""The cost of a prompt, and crops that are encoded again."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import Tensor

from samed3d.evaluation.meter import KEPT_MIB, Meter
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch

SLOW = 0.05


class SlowModel(PromptableModel):
    """Counts its encodings and takes a while for each."""

    def __init__(self, mib: int = 1) -> None:
        super().__init__()
        self.spec, self.config, self.count, self.mib = ModelSpec("slow", (4, 4, 4)), {}, 0, mib

    def encode(self, image: Tensor) -> Features:
        self.count += 1
        time.sleep(SLOW)
        return {"image": image.mean().expand(1, 1).clone().repeat(self.mib * 2**18, 1)}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        raise NotImplementedError


def encoded(meter: Meter, model: PromptableModel, value: float) -> tuple[float, float, float]:
    with meter.running() as cost:
        features = model.encode(torch.full((1, 1, 4, 4, 4), value))
    assert cost.encode_seconds is not None
    return float(features["image"][0]), cost.seconds, cost.encode_seconds


def test_a_crop_that_was_encoded_before_is_not_encoded_again_and_costs_the_same():
    model = SlowModel()
    meter = Meter(model)
    first, again, other = (encoded(meter, model, value) for value in (1.0, 1.0, 2.0))
    assert model.count == 2
    assert (first[0], again[0], other[0]) == (1.0, 1.0, 2.0)
    assert again[2] == first[2] >= SLOW and again[1] >= again[2]


def test_kept_features_are_bounded():
    model = SlowModel(mib=KEPT_MIB // 2)
    meter = Meter(model)
    for value in (1.0, 2.0, 3.0, 3.0, 1.0):
        encoded(meter, model, value)
    assert model.count == 4  # only the last two are kept, so the first is encoded anew


def test_an_object_of_ones_own_is_encoded_every_time():
    class Stateful:
        count = 0

        def encode(self, image: Tensor) -> Features:
            self.count += 1
            return {"image": image}

    model = Stateful()
    meter = Meter(model)
    for _ in range(2):
        with meter.running():
            model.encode(torch.zeros(1, 1, 2, 2, 2))
    assert model.count == 2


def test_the_model_is_as_it_was_after_each_prompt():
    model = SlowModel()
    meter = Meter(model)
    with pytest.raises(RuntimeError, match="out of memory"), meter.running():
        model.encode(torch.zeros(1, 1, 4, 4, 4))
        raise RuntimeError("out of memory")
    assert "encode" not in vars(model)
    mine = model.encode = lambda image: {"image": image.mean()[None]}
    assert encoded(meter, model, 3.0)[0] == 3.0
    assert vars(model)["encode"] is mine


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("samed3d.evaluation.meter._STATUS", tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    with Meter().running() as cost:
        pass
    assert cost.peak_mib is None and cost.seconds > 0

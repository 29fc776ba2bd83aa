"""One crop at a time: what is kept of it, and in which precision it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from samed3d.geometry import CropFrame
from samed3d.inference import predictor as module
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import CACHED_CROPS, CropPredictor
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch

CPU = torch.device("cpu")


class Watched(PromptableModel):
    """Notes whether it runs in bf16, and how often it encodes."""

    def __init__(self, bf16: bool, mib: int = 1) -> None:
        super().__init__()
        self.spec, self.config = ModelSpec("watched", (8, 8, 8), bf16=bf16), {}
        self.mib, self.encoded = mib, 0
        self.precisions: list[bool] = []

    def encode(self, image: Tensor) -> Features:
        self.precisions.append(torch.is_autocast_enabled("cpu"))
        self.encoded += 1
        return {"image": image[:, :1], "bulk": torch.zeros(self.mib * 2**18)}

    def decode(self, features: Features, prompts: PromptBatch) -> MaskOutput:
        self.precisions.append(torch.is_autocast_enabled("cpu"))
        return MaskOutput(features["image"], features["image"].mean(dim=(2, 3, 4)), features["image"])


def predictor_of(model: PromptableModel) -> CropPredictor:
    return CropPredictor(
        model, CPU, np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32), (1.0, 1.0, 1.0)
    )


def frame_at(middle: float) -> CropFrame:
    return CropFrame.centred((middle, 20.0, 20.0), (1.0, 1.0, 1.0), (8, 8, 8))


@pytest.mark.parametrize(
    ("trained", "able", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bf16_where_the_weights_were_trained_in_it_and_the_processor_has_it(trained, able, expected, monkeypatch):
    monkeypatch.setattr(module, "computes_bf16", lambda device: able)
    model = Watched(trained)
    found = predictor_of(model).decode(frame_at(20), ModelPrompts([((20.0, 20.0, 20.0), True)]))
    assert model.precisions == [expected, expected]
    assert found.logits.dtype == torch.float32


def test_float32_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SAMED3D_FP32", "1")
    assert not module.computes_bf16(CPU)


@pytest.mark.parametrize(("mib", "kept"), [(1, 20), (64, CACHED_CROPS)])
def test_small_features_are_kept_of_many_crops_and_large_ones_of_a_few(mib, kept):
    model = Watched(False, mib)
    predictor, prompts = predictor_of(model), ModelPrompts([((20.0, 20.0, 20.0), True)])
    for _ in range(2):
        for number in range(kept):
            predictor.decode(frame_at(8.0 + number), prompts)
    assert model.encoded == kept
    predictor.decode(frame_at(38.0), prompts)
    predictor.decode(frame_at(8.0), prompts)
    assert model.encoded == kept + (2 if kept == CACHED_CROPS else 1)  # the oldest has gone where there was no room

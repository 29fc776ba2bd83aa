"""One crop at a time: what is kept of it, and in which precision it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from samed3d.config import DataConfig
from samed3d.crops import normalise, sample_crop
from samed3d.data import sampling
from samed3d.geometry import RAS_DIRECTION, CropFrame, Grid
from samed3d.inference import predictor as module
from samed3d.inference.model_prompts import ModelPrompts
from samed3d.inference.predictor import CACHED_CROPS, CropPredictor
from samed3d.models.base import Features, MaskOutput, ModelSpec, PromptableModel, PromptBatch
from samed3d.volume import Volume
from tests.corpus_sources import store_case, store_corpus

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


class Seen(Watched):
    """Keeps the images that it encodes; clamps CT as the SAM-Med3D family does."""

    def __init__(self) -> None:
        super().__init__(bf16=False)
        self.spec = ModelSpec("seen", (8, 8, 8), normalisation="zscore_positive", ct_clamp_hu=(-1000.0, 1000.0))
        self.images: list[Tensor] = []

    def encode(self, image: Tensor) -> Features:
        self.images.append(image)
        return super().encode(image)


@pytest.mark.parametrize(
    ("modality", "lowest", "clamped"),
    [
        ("MR", -1024, False),
        ("PT", 0, False),
        ("CT", 0, True),
        ("CT (portal)", 0, True),
        ("", -1024, True),
        ("", 0, False),
    ],
)
def test_inference_and_training_clamp_the_same_images(modality, lowest, clamped, tmp_path, monkeypatch):
    """Intensities up to 4000 reach the model unless the image is CT: stated, or not stated and as low as air."""
    z, y, x = np.indices((24, 24, 24))
    array = np.where((z - 12) ** 2 + (y - 12) ** 2 + (x - 12) ** 2 < 30, 3000 + 40 * x, 200 + 3 * y).astype(np.int16)
    array[:4] = lowest
    labels = (array > 2000).astype(np.uint8)
    volume = Volume(array, Grid(array.shape, direction_lps=RAS_DIRECTION), "", modality)
    model = Seen()
    frame = CropFrame.centred((12.0, 12.0, 12.0), (1.0, 1.0, 1.0), (8, 8, 8))
    CropPredictor.of(model, CPU, volume).decode(frame, ModelPrompts([((12.0, 12.0, 12.0), True)]))
    crop, inside = sample_crop(array, frame)
    expected = normalise(crop, inside, "zscore_positive", (-1000.0, 1000.0) if clamped else None)
    torch.testing.assert_close(model.images[0][0], expected, rtol=0, atol=0)
    assert (float(expected.max() - expected.min()) > 1e-3) and not torch.equal(
        normalise(crop, inside, "zscore_positive", None), normalise(crop, inside, "zscore_positive", (-1000.0, 1000.0))
    )

    monkeypatch.setattr(sampling, "orient", lambda volumes, *_, **__: volumes)  # no mirroring
    store_case(tmp_path, "s", "case", array, labels, modality=modality)
    corpus = [str(store_corpus(tmp_path, modality))]
    config = DataConfig(
        corpus, 0.0, (8, 8, 8), spacing_mm=1.0, placement="centred", augment="flips", validation_share=0.0
    )
    data = sampling.CropDataset(config, 1, 0, normalisation="zscore_positive", ct_clamp_hu=model.spec.ct_clamp_hu)
    torch.testing.assert_close(data[0]["image"], expected, rtol=0, atol=0)

"""Measure the models on a GPU: a click's time, training throughput, peak memory.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Needs torch, numpy, accelerate, einops and safetensors only. Crops are seeded noise; what is measured is time, not
quality.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from collect import describe_machine, parser_of, write_result
from latency import default_model, one_click, random_crop, sam_med3d

from samed3d.config import ClickConfig, LossConfig, OptimConfig
from samed3d.models import create_model
from samed3d.models.base import PromptableModel, PromptBatch
from samed3d.training.optimiser import make_optimiser
from samed3d.training.step import InteractiveStep
from train import PUBLISHED

DEVICE = torch.device("cuda")


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a run on the GPU, after two warm-ups."""
    times = []
    for number in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


@torch.inference_mode()
def measure_clicks(model: PromptableModel, edge: int, bf16: bool, repeats: int) -> dict[str, float]:
    """Encoding a crop and decoding one click on it, in milliseconds; the highest memory of both."""
    crop, click = random_crop(model, edge).to(DEVICE), one_click(edge)
    prompts = PromptBatch(click.points.to(DEVICE), click.point_labels.to(DEVICE))
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        features = model.encode(crop)
        encode = milliseconds(lambda: model.encode(crop), repeats)
        decode = milliseconds(lambda: model.decode(features, prompts), repeats)
    return {"encode_ms": encode, "decode_ms": decode, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def measure_training(
    model: PromptableModel, clicks: ClickConfig, edge: int, batch: int, repeats: int
) -> dict[str, float]:
    """Samples per second of bf16 optimiser steps on a fixed batch, and their highest memory."""
    step = InteractiveStep(model.train().to(DEVICE), clicks, LossConfig())
    optimiser = make_optimiser(model, OptimConfig())
    image = random_crop(model, edge).to(DEVICE).repeat(batch, 1, 1, 1, 1)
    target = torch.zeros(batch, 1, edge, edge, edge, dtype=torch.bool, device=DEVICE)
    target[..., edge // 4 : edge // 2, edge // 3 : edge // 2, edge // 4 : edge // 2] = True

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(image, target, 0).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(run, repeats)
    return {
        "batch": batch,
        "edge": edge,
        "samples_per_s": 1e3 * batch / took,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = parser_of(__doc__, "gpu.json")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use")
    default, weights = default_model()
    result: dict[str, Any] = {"machine": describe_machine(), "clicks": {}, "training": {}, "default": weights}
    base = create_model("samed3d_base").eval()
    models = {"default": default, "sam_med3d_b": sam_med3d(), "samed3d_base": base}
    cases = [(name, 128) for name in models]
    for (name, edge), bf16 in itertools.product([("default", 64), *cases], (False, True)):
        key = f"{name} {edge} {'bf16' if bf16 else 'fp32'}"
        result["clicks"][key] = measure_clicks(models[name].to(DEVICE), edge, bf16, options.repeats)
    del models["default"]
    ours = ClickConfig(interactions=4, policy="mixed")
    few = max(3, options.repeats // 4)
    result["training"]["samed3d_unet"] = measure_training(create_model("samed3d_unet"), ours, 64, 64, few)
    result["training"]["sam_med3d_b, 11 published interactions"] = measure_training(
        models.pop("sam_med3d_b"), PUBLISHED, 128, 6, few
    )
    result["training"]["samed3d_base"] = measure_training(models.pop("samed3d_base"), ours, 128, 4, few)
    write_result(options.out, result)


if __name__ == "__main__":
    main()

"""Measure training: samples per second and memory against a plain loop, and the share of time spent waiting for data.

    python benchmarks/train.py --out benchmarks/results/train.json

The step of ``sam_med3d_b`` with eleven interactions (half its depth unless ``--full``, so that the padded encoder's
backward fits a small machine) is timed beside the same step with the padded encoder of the tests, which computes what
the released code does. Steps alternate, so that other load on the machine falls on both. ``--device cuda`` adds bf16
and a compiled encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from collect import describe_machine, parser_of, write_result
from latency import alternate, in_own_process, load_oracle, peak_mib, sam_med3d
from torch.utils.data import DataLoader

from samed3d.config import ClickConfig, LossConfig, TrainConfig, load_config
from samed3d.models.base import PromptableModel
from samed3d.training.optimiser import make_optimiser
from samed3d.training.start import data_of, start_model, step_of
from samed3d.training.step import InteractiveStep

HALF = {"depth": 6, "global_blocks": (2, 5)}
PUBLISHED = ClickConfig(
    interactions=11,
    box_probability=0.0,
    mask_only_probability=0.0,
    mask_only_turns=["last", "random"],
    detach=False,
    memory="newest",
)


def network(full: bool, padded: bool) -> PromptableModel:
    """``sam_med3d_b``, of half depth unless ``full``; ``padded`` through the encoder of the tests' oracle."""
    model = sam_med3d(**({} if full else HALF)).train()
    if padded:
        encoder, oracle = model.get_submodule("image_encoder"), load_oracle()
        encoder.forward = lambda x: oracle(encoder, x)  # type: ignore[method-assign]
    return model


def one_step(
    model: PromptableModel, batch: int, device: str, bf16: bool = False, compiled: bool = False
) -> Callable[[], float]:
    """A function that does one optimiser step on a fixed batch and returns its loss."""
    loss = LossConfig(iou=0.0, turns="sum", dice_smooth=1e-5)
    step = InteractiveStep(model, PUBLISHED, loss, compiled=compiled).to(device)
    config = load_config(TrainConfig, None, ["optim.lr=8e-4", "optim.weight_decay=0.1"])
    optimiser = make_optimiser(model, config.optim)
    edge = model.spec.input_shape_zyx[0]
    target = torch.zeros(batch, 1, edge, edge, edge, dtype=torch.bool, device=device)
    target[:, :, edge // 4 : edge // 2, edge // 3 : edge // 2, edge // 4 : edge // 2] = True
    image = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).to(device) + target

    def run() -> float:
        optimiser.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            output = step(image, target, 0)
        output.loss.backward()
        optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(output.loss.detach())

    return run


def measure_step(full: bool, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Samples per second of our step and of the plain loop, by turns; their losses must agree."""
    runs = {
        "ours": one_step(network(full, False), batch, device),
        "padded": one_step(network(full, True), batch, device),
    }
    if device == "cuda":
        runs["ours_bf16"] = one_step(network(full, False), batch, device, bf16=True)
        runs["ours_bf16_compiled"] = one_step(network(full, False), batch, device, bf16=True, compiled=True)
    losses: dict[str, list[float]] = {name: [] for name in runs}
    seconds, busy = alternate(
        {name: partial(lambda name, run: losses[name].append(run()), name, run) for name, run in runs.items()}, repeats
    )
    result: dict[str, Any] = {"samples_per_s": {name: batch / value for name, value in seconds.items()}}
    result["times_faster_than_padded"] = {
        name: seconds["padded"] / value for name, value in seconds.items() if name != "padded"
    }
    if device == "cpu":
        result["times_faster_processor_time"] = busy["padded"] / busy["ours"]
    return result | {"losses": {name: losses[name] for name in ("ours", "padded")}}


def peak_of_step(full: bool, padded: bool, batch: int) -> float:
    """Highest resident memory after one optimiser step; run it in a process of its own."""
    one_step(network(full, padded), batch, "cpu")()
    return peak_mib()


def measure_loader(batches: int, workers: int) -> dict[str, float]:
    """Share of the time in which the default network's step waits for generated samples."""
    config = load_config(TrainConfig, None, ["data.crop=[48,48,48]", "optim.batch=2", "run.precision=fp32"])
    model = start_model(config)
    step, data = step_of(config, model), data_of(config, model)
    data.length = (batches + 1) * config.optim.batch
    optimiser = make_optimiser(model, config.optim)
    waited, began, mark = 0.0, 0.0, time.perf_counter()
    for number, sample in enumerate(DataLoader(data, config.optim.batch, num_workers=workers)):
        now = time.perf_counter()
        if number == 0:
            began = now  # the first batch pays for the start
        else:
            waited += now - mark
        step(sample["image"], sample["target"], number, sample["index"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mark = time.perf_counter()
    return {
        "workers": workers,
        "waiting_share": waited / (mark - began),
        "samples_per_s": (batches + 1) * config.optim.batch / (mark - began),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = parser_of(__doc__, "train.json")
    parser.add_argument("--full", action="store_true", help="sam_med3d_b in full")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    options = parser.parse_args()
    memory = {
        f"peak_mib_{name}": in_own_process(peak_of_step, options.full, padded, options.batch)
        for name, padded in (("ours", False), ("padded", True))
        if options.device == "cpu"
    }
    result = {
        "machine": describe_machine(),
        "geometry": "sam_med3d_b" if options.full else f"sam_med3d_b with {HALF}",
        "step": measure_step(options.full, options.batch, options.device, options.repeats) | memory,
        "loader": measure_loader(12, options.workers),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()

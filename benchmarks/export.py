"""How fast and how exact an exported model is: ONNX under onnxruntime and TorchScript beside torch, one thread count,
one run.

    python benchmarks/export.py --model default --threads 1

Each round times all in turn, so that whatever else the machine does falls on all alike; the ratio of medians is the
figure. Results:
``benchmarks/results/export.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samed3d.inference.export import (
    DecoderGraph,
    EncoderGraph,
    decoder_example,
    export,
    feature_names,
    image_example,
    model_of,
)
from samed3d.models.base import PromptableModel


def main() -> None:
    """Export, compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="checkpoint, or an architecture with random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        body = compare(options.model, Path(folder), options.threads, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(body, indent=1) + "\n")


def compare(name: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Largest difference and time of each part in each form."""
    import onnxruntime

    model = model_of(name)
    assert isinstance(model, PromptableModel), "only promptable models have two graphs"
    export(name, "onnx", folder / "onnx")
    export(name, "torchscript", folder / "torchscript")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    names = feature_names(model)
    image = image_example(model)
    features = list(EncoderGraph(model, names)(image))
    example = decoder_example(model, features, names)
    body: dict[str, Any] = {
        "model": name,
        "threads": threads,
        "rounds": rounds,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    for part, graph, arguments in (
        ("encoder", EncoderGraph(model, names), (image,)),
        ("decoder", DecoderGraph(model, names), example),
    ):
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{part}.onnx", settings)
        flat = [t.numpy() for a in arguments for t in (a if isinstance(a, list) else [a])]
        feed = {i.name: array for i, array in zip(session.get_inputs(), flat, strict=True)}
        script = torch.jit.load(folder / "torchscript" / f"{part}.pt")
        body[part] = _race(
            {
                "torch": lambda graph=graph, arguments=arguments: graph(*arguments),
                "onnxruntime": lambda session=session, feed=feed: [
                    torch.from_numpy(a) for a in session.run(None, feed)
                ],
                "torchscript": lambda script=script, arguments=arguments: script(*arguments),
            },
            rounds,
        )
    return body


def _race(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    expected: list[Tensor] = list(runs["torch"]())
    difference = {
        name: max(float((a - b).abs().max()) for a, b in zip(run(), expected, strict=True))
        for name, run in runs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds": round(medians[name], 4),
            "times_as_fast": round(medians["torch"] / medians[name], 2),
            "difference": difference[name],
        }
        for name in runs
    }


if __name__ == "__main__":
    main()

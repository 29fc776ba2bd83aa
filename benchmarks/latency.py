"""Measure the time from a click to a mask, as ratios within one run. Prints one JSON and writes it to a file.

    python benchmarks/latency.py --out benchmarks/results/latency.json

    python benchmarks/latency.py --memory --out benchmarks/results/memory.json

The encoder of ``sam_med3d_b`` is timed beside the padded oracle of the tests and beside a plain matrix product of the
same FLOPs, the runs alternating, so that other load on the machine falls on all of them. Ratios are given in wall and
in processor time. With ``--memory``, the peak memory of the command line and of the server instead.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collect import ROOT, describe_machine, parser_of, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samed3d.crops import image_channels
from samed3d.devices import computes_bf16
from samed3d.errors import InputError
from samed3d.geometry import Grid, IntTriple
from samed3d.models import create_model, load
from samed3d.models.base import PromptableModel, PromptBatch
from samed3d.prompts import parse_prompts

DEFAULT_ARCHITECTURE = "samed3d_unet"
CT_CASE = Path("chaos_ct_liver/imagesTr/chaos_ct_sample_0000.nii.gz")
CT_POINT_IJK = "180,250,40"
EDGE = 128
LARGE_OBJECTS = {
    "liver": {"point": ["197,256,450"]},
    "body": {"box": ["61,113,27,451,399,873"], "point": ["256,256,450"]},
}
"""Prompts of two objects of ``write_body``."""


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and processor seconds of each run, after one warm-up each, all taking turns ``repeats`` times."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - start, time.process_time() - busy))
    wall, processor = ({name: statistics.median(t[i] for t in found) for name, found in times.items()} for i in (0, 1))
    return wall, processor


def load_oracle() -> Callable[..., torch.Tensor]:
    """``padded_encoder`` of the tests."""
    return runpy.run_path(str(ROOT / "tests" / "padded_oracle.py"))["padded_encoder"]


def random_crop(model: PromptableModel, edge: int = EDGE) -> torch.Tensor:
    """(1, C, edge, edge, edge) seeded noise with the channels that the model takes."""
    channels = image_channels(model.spec.normalisation)
    return torch.randn(1, channels, edge, edge, edge, generator=torch.Generator().manual_seed(0))


def one_click(edge: int = EDGE) -> PromptBatch:
    """A positive click in the middle."""
    return PromptBatch(torch.full((1, 1, 3), edge / 2), torch.ones(1, 1, dtype=torch.int64))


def sam_med3d(**overrides: Any) -> PromptableModel:
    """The released architecture with seeded weights; its relative positions are not zero, as they are at first."""
    torch.manual_seed(0)
    model = create_model("sam_med3d_b", **overrides).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.inference_mode()
def measure_encoder(repeats: int) -> dict[str, float]:
    """Encoder of ``sam_med3d_b`` against the oracle and a matrix product; its decode per click."""
    model, padded = sam_med3d(), load_oracle()
    crop = random_crop(model)
    encoder = model.get_submodule("image_encoder")
    difference = (encoder(crop) - padded(encoder, crop)).abs().max().item()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused CPU kernel is not counted
        encoder(crop)
    flops = counter.get_total_flops()
    edge = round((flops / 2) ** (1 / 3))
    left, right = torch.randn(edge, edge), torch.randn(edge, edge)
    runs = {"encoder": lambda: encoder(crop), "padded": lambda: padded(encoder, crop), "product": lambda: left @ right}
    wall, processor = alternate(runs, repeats)
    features, click = model.encode(crop), one_click()
    decode_wall, decode_processor = alternate({"decode": lambda: model.decode(features, click)}, 5 * repeats)
    return {
        "encoder_s": wall["encoder"],
        "padded_oracle_s": wall["padded"],
        "matrix_product_s": wall["product"],
        "times_faster_than_padded": wall["padded"] / wall["encoder"],
        "times_faster_than_padded_processor_time": processor["padded"] / processor["encoder"],
        "times_matrix_product": wall["encoder"] / wall["product"],
        "times_matrix_product_processor_time": processor["encoder"] / processor["product"],
        "max_abs_difference": difference,
        "encoder_gflop": flops / 1e9,
        "decode_ms": 1e3 * decode_wall["decode"],
        "decode_processor_ms": 1e3 * decode_processor["decode"],
    }


@torch.inference_mode()
def peak_memory_mib(padded: bool) -> float:
    """Highest resident memory of its own process after one encode and decode of ``sam_med3d_b``."""
    model = sam_med3d()
    crop, encoder = random_crop(model), model.get_submodule("image_encoder")
    model.decode({"image": load_oracle()(encoder, crop)} if padded else model.encode(crop), one_click())
    return peak_mib()


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


def in_own_process(function: Callable[..., float], *arguments: object) -> float:
    """Result of a function that runs alone in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def default_model() -> tuple[PromptableModel, str]:
    """The default checkpoint, or its architecture with random weights where none is shipped; and which of the two."""
    try:
        return load("default"), "default checkpoint"
    except InputError:
        return create_model(DEFAULT_ARCHITECTURE).eval(), "random weights"


@torch.inference_mode()
def measure_default(repeats: int) -> dict[str, Any]:
    """First mask (encode, decode) and later clicks of the default model, on a 128^3 crop and one of its own shape."""
    model, weights = default_model()
    result: dict[str, Any] = {"model": model.spec.name, "weights": weights, "own_edge": model.spec.input_shape_zyx[0]}
    bf16 = model.spec.bf16 and computes_bf16(torch.device("cpu"))  # as a session does
    result["precision"] = "bf16" if bf16 else "fp32"
    for label, edge in (("crop128", EDGE), ("own_crop", model.spec.input_shape_zyx[0])):
        crop, click = random_crop(model, edge), one_click(edge)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            start = time.perf_counter()
            first = model(crop, click)
            cold = time.perf_counter() - start
            features = model.encode(crop)
            points, labels = click.points.repeat(1, 3, 1), click.point_labels.repeat(1, 3)
            later = PromptBatch(points, labels, mask_logits=first.lowres_logits)
            runs = {"first": partial(model, crop, click), "later": partial(model.decode, features, later)}
            times, _ = alternate(runs, repeats)
        result[label] = {"first_mask_cold_s": cold, "first_mask_s": times["first"], "later_click_s": times["later"]}
    return result


def measure_shell(repeats: int) -> dict[str, Any]:
    """``infer.py`` on a real CT as a user runs it, and its imports alone; a reason instead where that is impossible."""
    folder = Path(os.environ.get("SAMED3D_DATA") or ROOT.parent / "shared" / "data")
    image = folder / CT_CASE
    if not image.is_file():
        return {"skipped": f"{CT_CASE} is not in the data folder; set SAMED3D_DATA"}
    imports = "import samed3d.cli, samed3d.inference.session, samed3d.models, samed3d.volume"
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(image), "--point", CT_POINT_IJK, "-o", str(Path(out) / "mask.nii.gz")]
        command = [sys.executable, "infer.py", *arguments]
        seconds: dict[str, list[float]] = {"end_to_end_s": [], "imports_s": []}
        for _ in range(repeats):
            for name, words in (("end_to_end_s", command), ("imports_s", [sys.executable, "-c", imports])):
                start = time.perf_counter()
                done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
                seconds[name].append(time.perf_counter() - start)
                if done.returncode:
                    last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    return {"skipped": f"{name}: exit code {done.returncode}: {last_line}"}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"image": str(CT_CASE), "point_ijk": CT_POINT_IJK, **medians}


def write_body(path: str, shape_zyx: IntTriple = (900, 512, 512)) -> float:
    """Write a body of 40 with a liver of 160 in noisy air, as a file or a folder of DICOM slices; its bytes."""
    from samed3d.volume import write_volume
    from tests.dicom_trees import image_series

    noise = np.random.default_rng(0).integers(-15, 16, shape_zyx[1:], dtype=np.int16)
    array = np.empty(shape_zyx, np.int16)
    y, x = (np.linspace(-1, 1, n) for n in shape_zyx[1:])
    for k, z in enumerate(np.linspace(-1, 1, shape_zyx[0])):
        across = (y[:, None] / 0.56) ** 2 + (x / 0.76) ** 2
        liver = (y[:, None] / 0.28) ** 2 + ((x + 0.23) / 0.28) ** 2 + (z / 0.16) ** 2 < 1
        array[k] = np.where(liver, 160, np.where(across + (z / 0.94) ** 2 < 1, 40, -1000)) + np.roll(noise, k, 0)
    if path.endswith("dicom"):
        image_series(Path(path), array, spacing=(0.8, 0.8, 1.0))
    else:
        write_volume(path, array, Grid(shape_zyx, (0.8, 0.8, 1.0)))
    return float(array.nbytes)


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process needed at most, once it ends."""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{process.args!r} ended with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve_once(image: Path, prompts: dict[str, list[str]]) -> int:
    """The peak of a server on which an image is opened, clicked, shown and exported."""
    from server_load import Server  # here: a bare GPU machine, for which gpu.py imports this file, has no server

    from samed3d.apps.client import Client

    server = Server(image.parent, image.parent / "sessions", "default", 1)
    session = Client(server.url, timeout=600).open_path(str(image))
    for prompt in parse_prompts(prompts, "ijk", "--"):
        session.add(prompt)
    session.refresh()
    assert session.mask_of(1).any()
    session.export(image.parent / "served.nii.gz")
    server.process.terminate()
    return peak_of(server.process)


def measure_memory() -> list[dict[str, Any]]:
    """Peaks by door, format and object; all memory of a process is counted, also Python's, torch's and the model's."""
    rows = []
    for kind in ("nii.gz", "nrrd", "mha", "dicom"):
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder, f"body.{kind}")
            size = in_own_process(write_body, str(image))
            for name, prompts in LARGE_OBJECTS.items():
                texts = [text for key, values in prompts.items() for text in (f"--{key}", *values)]
                command = [sys.executable, "-m", "samed3d", "segment", str(image), "-o", f"{folder}/mask.nii.gz"]
                peaks = {"segment": peak_of(subprocess.Popen([*command, "--quiet", *texts], cwd=ROOT))}
                if kind == "nii.gz":
                    peaks["serve"] = serve_once(image, prompts)
                for door, peak in peaks.items():
                    row = {"door": door, "format": kind, "object": name, "bytes": size, "peak": peak}
                    rows.append(row | {"ratio": round(peak / size, 3)})
    return rows


def main() -> None:
    parser = parser_of(__doc__, "latency.json")
    parser.add_argument("--quick", action="store_true", help="two repeats instead of seven")
    parser.add_argument("--threads", type=int, help="torch threads; with 1, processor times hold on a busy machine")
    parser.add_argument("--memory", action="store_true", help="peak memory of segment and serve on a large volume")
    options = parser.parse_args()
    if options.memory:
        write_result(options.out, {"peaks": measure_memory(), "machine": describe_machine()})
        return
    repeats = 2 if options.quick else 7
    if options.threads:
        torch.set_num_threads(options.threads)
    # Memory first: on Linux a child's peak counts from its parent's size at the time it was started.
    peak, padded_peak = (in_own_process(peak_memory_mib, padded) for padded in (False, True))
    memory = {"peak_memory_mib": peak, "padded_peak_memory_mib": padded_peak}
    result = {
        "machine": describe_machine(),
        "repeats": repeats,
        "sam_med3d_b": {**measure_encoder(repeats), **memory},
        "default": measure_default(repeats),
        "infer_py": measure_shell(min(repeats, 3)),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()

"""The measured tables of ``docs/benchmarks.md`` and of the checkpoint's card, made from the JSON files of ``results/``.

A page is written by hand but for its blocks, which begin with ``<!-- measured: NAME -->`` and end with
``<!-- end -->``: every measured number of the page comes from a file. A block whose file is missing says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

Body = dict[str, Any]
_MARK = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def replace_blocks(page: str, blocks: Collection[str], make: Callable[[str], str]) -> str:
    """A page with the content of every block made anew by ``make`` from the block's name.

    Raises:
        ValueError: if the page does not hold each of ``blocks`` once.
    """
    found = sorted(_MARK.findall(page))
    if found != sorted(blocks):
        listed = ", ".join(sorted(blocks))
        raise ValueError(f"the page must hold each block once: {listed}; it holds {', '.join(found)}")
    return _MARK.sub(lambda mark: f"<!-- measured: {mark[1]} -->\n{make(mark[1])}\n<!-- end -->", page)


def page_with_blocks(page: str, results: Path) -> str:
    """``docs/benchmarks.md`` with every block made from the JSON files of ``results``."""
    return replace_blocks(page, BLOCKS, lambda name: block(name, results))


def block(name: str, results: Path) -> str:
    """The Markdown of one block, with the command and the machine it was measured by."""
    file, make = BLOCKS[name]
    path = results / file
    if not path.is_file():
        return f"*Not measured: `benchmarks/results/{file}` is not there (`make bench`).*"
    body = json.loads(path.read_text())
    about = body | body.get("collected", {})
    commands = [about["command"]] if about.get("command") else list(body.get("commands", {}).values())
    revisions = [about["revision"]] if about.get("revision") else list(body.get("revisions", {}).values())
    machine = about.get("machine") or body.get("environment")
    quick = ["a quick run, few repeats"] if about.get("quick") else []
    return f"{make(body)}\n\n{origin([f'benchmarks/results/{file}', *commands], revisions, machine, quick)}"


def origin(commands: Sequence[str], revisions: Iterable[str], machine: Body | None, notes: Sequence[str] = ()) -> str:
    """Where a table comes from, in one line."""
    parts = [f"`{command}`" for command in commands]
    if shown := ", ".join(dict.fromkeys(map(str, revisions))):
        parts.append(f"revision {shown}")
    if machine:
        cores, torch = machine.get("cores") or machine.get("cpus"), machine.get("torch")
        torch = torch or machine.get("packages", {}).get("torch")
        about = [machine.get("processor"), cores and f"{cores} cores", machine.get("gpu"), torch and f"torch {torch}"]
        load = next((machine[k] for k in ("load_before", "load_average") if machine.get(k) is not None), None)
        about.append(None if load is None else f"load {load[0] if isinstance(load, list) else load:.1f}")
        parts.append(", ".join(str(a) for a in about if a))
    return f"*{'; '.join([*parts, *notes])}.*"


def accuracy(body: Body) -> str:
    """Dice of the default checkpoint by group and click, and of other methods on some of the same structures."""
    clicks = sorted({int(c) for found in body["group"].values() for c in found["dice"]})
    rows = [([group, f"`default`, {body['seeds']} seeds"], found) for group, found in body["group"].items()]
    for group, models in body["controls"].items():
        rows += [([group, f"`{model}`"], found) for model, found in models.items()]
    return dice_table(["group", "model"], rows, clicks)


def protocols(body: Body) -> str:
    """Every protocol's first and last Dice of every method, and what the whole run took."""
    rows = []
    for row in body["rows"]:
        name = row["protocol"] + ("" if row["prompt"] == "click" else f", {row['prompt']} first")
        last = f"{with_interval(row['last'])} ({row['last']['click']})"
        counts = [row["subjects"], row["structures"]]
        rows.append([name, f"`{row['model']}`", *counts, with_interval(row["first"]), last])
    head = ["protocol", "model", "subjects", "structures", "after the first prompt", "after the last (clicks)"]
    if "wall_s" not in body:
        return table(head, rows)
    wall, processor = body["wall_s"] / 60, body["processor_s"] / 60
    took = f"The whole run took {wall:.0f} minutes, {processor:.0f} minutes of processor time."
    return f"{table(head, rows)}\n\n{took}"


def latency(body: Body) -> str:
    """First mask and later clicks, and the exact cheap encoder beside the padded one."""
    sam, own = body["sam_med3d_b"], body["default"]
    about = f"`{own['model']}` ({own['weights']}, {own.get('precision', 'fp32')})"
    rows = []
    for name, key in ((f"crop of {own['own_edge']}³, its own", "own_crop"), ("crop of 128³", "crop128")):
        rows.append([f"{about}, {name}", _s(own[key]["first_mask_s"]), _s(own[key]["later_click_s"])])
    decode = sam["decode_ms"] / 1e3
    rows.append(["`sam_med3d_b` (random weights), crop of 128³", _s(sam["encoder_s"] + decode), _s(decode)])
    if seconds := body["infer_py"].get("end_to_end_s"):
        rows.append(["`infer.py` on a 512 x 512 x 78 CT, process start to file", _s(seconds), ""])
    faster = f"**{sam['times_faster_than_padded']:.1f} x** faster"
    memory = f"{sam['peak_memory_mib']:.0f} against {sam['padded_peak_memory_mib']:.0f} MiB"
    product = f"encoder ({sam['encoder_gflop']:.0f} GFLOP) against a matrix product of as many"
    ratios = [
        ["encoder of `sam_med3d_b` without its window padding, against a plain padded one", faster],
        ["the same, largest difference of outputs", f"{sam['max_abs_difference']:.1e}"],
        ["the same, peak memory of the process", memory],
        [product, f"{sam['times_matrix_product']:.2f} x its time"],
    ]
    return f"{table(['', 'first mask', 'later click'], rows)}\n\n{table(['', 'ratio within one run'], ratios)}"


def gpu(body: Body) -> str:
    """A click's time and a training step's throughput on a GPU, with the memory of each."""
    clicks, steps = [], []
    for name, found in body["clicks"].items():
        model, edge, precision = name.split(" ")
        times = [f"{found['encode_ms']:.1f} ms", f"{found['decode_ms']:.1f} ms"]
        clicks.append([f"`{model}`", f"{edge}³", precision, *times, f"{found['peak_mib']:.0f} MiB"])
    for name, found in body["training"].items():
        speed, memory = f"{found['samples_per_s']:.0f}", f"{found['peak_mib'] / 1024:.1f} GiB"
        steps.append([name, found["batch"], f"{found['edge']}³", speed, memory])
    first = table(["model", "crop", "precision", "encode", "decode a click", "peak memory"], clicks)
    head = ["training step, bf16, fixed batch", "batch", "crop", "samples per second", "peak memory"]
    return f"{first}\n\n{table(head, steps)}"


def preparation(body: Body) -> str:
    """A corpus against a plain loop."""
    loop = body["preparation"]["loop"]
    rows = [["plain loop, one process", _s(loop["wall_s"]), "", _mb(loop["bytes"]), "", loop["masks"]]]
    for name, found in body["preparation"].items():
        if isinstance(found, dict) and name != "loop":
            faster, smaller = f"{found['faster_wall']:.3g} x", f"{found['smaller']:.3g} x"
            rows.append([f"corpus, {name}", _s(found["wall_s"]), faster, _mb(found["bytes"]), smaller, found["masks"]])
    return table(["", "wall time", "faster", "size", "smaller", "masks"], rows)


def every_number(body: Body) -> str:
    """Every number of a file, by its name."""
    rows: list[list[str]] = []

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                collect(below, f"{name} {key}".strip().replace("_", " "))
        else:
            values = value if isinstance(value, list) else [value]
            rows.append([name, ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)])

    collect({key: value for key, value in body.items() if key not in ("collected", "machine")}, "")
    return table(["", "measured"], rows)


BLOCKS: dict[str, tuple[str, Callable[[Body], str]]] = {
    "accuracy": ("default_evaluation.json", accuracy),
    "protocols": ("protocols.json", protocols),
    "latency": ("latency.json", latency),
    "gpu": ("gpu.json", gpu),
    "training": ("train.json", every_number),
    "server": ("server_load.json", every_number),
    "preparation": ("prepare.json", preparation),
}


def dice_table(
    head: Sequence[str], rows: Iterable[tuple[Sequence[str], Body]], clicks: Sequence[int], least_subjects: int = 0
) -> str:
    """Subjects, structures and Dice after each number of clicks, with intervals from ``least_subjects`` on.

    Each row has the cells of the first columns, and ``subjects``, ``structures`` and ``dice`` by click.
    """
    cells = [
        [*names, found["subjects"], found["structures"]]
        + [with_interval(found["dice"].get(str(c)), found["subjects"] >= least_subjects) for c in clicks]
        for names, found in rows
    ]
    return table([*head, "subjects", "structures", *map(click_head, clicks)], cells)


def click_head(clicks: int) -> str:
    return f"{clicks} click{'s' * (clicks != 1)}"


def with_interval(found: Body | None, shown: bool = True) -> str:
    """A mean, with its interval where it has one that is to be shown."""
    if found is None:
        return ""
    ends = found["interval"] if shown else None
    return f"{found['mean']:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "/") for c in line) + " |" for line in lines)


def _s(seconds: float) -> str:
    return "under 1 ms" if seconds < 5e-4 else f"{1e3 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"

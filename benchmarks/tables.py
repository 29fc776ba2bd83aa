"""The measured tables of ``docs/benchmarks.md`` and of the checkpoint's card, made from the JSON files of ``results/``.

A page is written by hand but for its blocks, which begin with ``<!-- measured: NAME -->`` and end with
``<!-- end -->``: every measured number of the page comes from a file. A block whose file is missing says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

Body = dict[str, Any]
_MARK = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def replace_blocks(page: str, blocks: Collection[str], make: Callable[[str], str]) -> str:
    """A page with the content of every block made anew.

    Args:
        page: Its text.
        blocks: The names of the blocks, each of which the page must hold once.
        make: The content of a block by its name.

    Raises:
        ValueError: if the page has other blocks.
    """
    found = _MARK.findall(page)
    if sorted(found) != sorted(blocks):
        raise ValueError(
            f"the page must hold each block once: {', '.join(sorted(blocks))}; it holds {', '.join(sorted(found))}"
        )
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
    return f"{make(body)}\n\n{_origin(file, body)}"


def accuracy(body: Body) -> str:
    """Dice of the default checkpoint by group and click, and of other methods on some of the same structures."""
    clicks = sorted({int(c) for found in body["group"].values() for c in found["dice"]})
    head = ["group", "model", "subjects", "structures", *(f"{c} click{'s' * (c != 1)}" for c in clicks)]
    kinds = [(group, f"`default`, {body['seeds']} seeds", found) for group, found in body["group"].items()]
    kinds += [
        (group, f"`{model}`", found) for group, models in body["controls"].items() for model, found in models.items()
    ]
    cells = [[found["dice"].get(str(c)) for c in clicks] for *_, found in kinds]
    rows = [
        [group, model, found["subjects"], found["structures"], *(with_interval(one) for one in mine)]
        for (group, model, found), mine in zip(kinds, cells, strict=True)
    ]
    return table(head, rows)


def protocols(body: Body) -> str:
    """Every protocol's first and last Dice of every method, and what the whole run took."""
    rows = [
        [f"{row['protocol']}{'' if row['prompt'] == 'click' else ', ' + row['prompt'] + ' first'}", f"`{row['model']}`", row["subjects"],
         row["structures"], with_interval(row["first"]), f"{with_interval(row['last'])} ({row['last']['click']})"]
        for row in body["rows"]
    ]  # fmt: skip
    head = ["protocol", "model", "subjects", "structures", "after the first prompt", "after the last (clicks)"]
    if "wall_s" not in body:
        return table(head, rows)
    took = f"The whole run took {body['wall_s'] / 60:.0f} minutes, {body['processor_s'] / 60:.0f} minutes of processor time."
    return f"{table(head, rows)}\n\n{took}"


def latency(body: Body) -> str:
    """First mask and later clicks, and the exact cheap encoder beside the padded one."""
    sam, own = body["sam_med3d_b"], body["default"]
    rows = []
    for name, key in ((f"crop of {own['own_edge']}³, its own", "own_crop"), ("crop of 128³", "crop128")):
        about = f"{own['weights']}, {own.get('precision', 'fp32')}"
        rows.append(
            [f"`{own['model']}` ({about}), {name}", _s(own[key]["first_mask_s"]), _s(own[key]["later_click_s"])]
        )
    first = sam["encoder_s"] + sam["decode_ms"] / 1e3
    rows.append(["`sam_med3d_b` (random weights), crop of 128³", _s(first), _s(sam["decode_ms"] / 1e3)])
    if "end_to_end_s" in body["infer_py"]:
        rows.append(
            ["`infer.py` on a 512 x 512 x 78 CT, process start to file", _s(body["infer_py"]["end_to_end_s"]), ""]
        )
    ratios = [
        [
            "encoder of `sam_med3d_b` without its window padding, against a plain padded one",
            f"**{sam['times_faster_than_padded']:.1f} x** faster",
        ],
        ["the same, largest difference of outputs", f"{sam['max_abs_difference']:.1e}"],
        [
            "the same, peak memory of the process",
            f"{sam['peak_memory_mib']:.0f} against {sam['padded_peak_memory_mib']:.0f} MiB",
        ],
        [
            f"encoder ({sam['encoder_gflop']:.0f} GFLOP) against a matrix product of as many",
            f"{sam['times_matrix_product']:.2f} x its time",
        ],
    ]
    return table(["", "first mask", "later click"], rows) + "\n\n" + table(["", "ratio within one run"], ratios)


def gpu(body: Body) -> str:
    """A click's time and a training step's throughput on a GPU, with the memory of each."""
    clicks = [
        [f"`{model}`", f"{edge}³", precision]
        + [f"{found['encode_ms']:.1f} ms", f"{found['decode_ms']:.1f} ms", f"{found['peak_mib']:.0f} MiB"]
        for name, found in body["clicks"].items()
        for model, edge, precision in [name.split(" ")]
    ]
    steps = [
        [
            name,
            found["batch"],
            f"{found['edge']}³",
            f"{found['samples_per_s']:.0f}",
            f"{found['peak_mib'] / 1024:.1f} GiB",
        ]
        for name, found in body["training"].items()
    ]
    first = table(["model", "crop", "precision", "encode", "decode a click", "peak memory"], clicks)
    return (
        first
        + "\n\n"
        + table(["training step, bf16, fixed batch", "batch", "crop", "samples per second", "peak memory"], steps)
    )


def preparation(body: Body) -> str:
    """A corpus against a plain loop."""
    loop = body["preparation"]["loop"]
    rows = [["plain loop, one process", _s(loop["wall_s"]), "", _mb(loop["bytes"]), "", loop["masks"]]]
    for name, found in body["preparation"].items():
        if isinstance(found, dict) and name != "loop":
            faster, smaller = f"{found['faster_wall']:.3g} x", f"{found['smaller']:.3g} x"
            rows.append([f"corpus, {name}", _s(found["wall_s"]), faster, _mb(found["bytes"]), smaller, found["masks"]])
    more = [
        [f"random 128³ crop of image and labels, {name.removeprefix('crops_of_').replace('x', ' x ')}",
         f"{found['crop_ms']:.3g} ms, {found['faster']:.3g} x faster than reading both .nii.gz"]
        for name, found in body.items() if name.startswith("crops_of_")
    ]  # fmt: skip
    memory, manifest = body["memory"], body["manifest"]
    more.append(
        [
            "peak memory above idle, 512 x 512 x 600",
            f"{memory['peak_above_idle_in_volumes']:.2f} x the volume as stored",
        ]
    )
    more.append([f"open and filter a table of {manifest['rows']:,} structures", _s(manifest["open_and_filter_s"])])
    return table(["", "wall time", "faster", "size", "smaller", "masks"], rows) + "\n\n" + table(["", "measured"], more)


def training(body: Body) -> str:
    """Every number of the script, by its name."""
    return table(["", "measured"], _leaves({k: v for k, v in body.items() if k not in ("collected", "machine")}))


BLOCKS: dict[str, tuple[str, Callable[[Body], str]]] = {
    "accuracy": ("default_evaluation.json", accuracy),
    "protocols": ("protocols.json", protocols),
    "latency": ("latency.json", latency),
    "gpu": ("gpu.json", gpu),
    "training": ("train.json", training),
    "server": ("server_load.json", training),
    "preparation": ("prepare.json", preparation),
}


def _origin(file: str, body: Body) -> str:
    """Where a table comes from, in one line."""
    about = body.get("collected", {})
    command = about.get("command") or body.get("command") or "`; `".join(body.get("commands", {}).values())
    parts = [f"`benchmarks/results/{file}`"]
    parts += [f"`{command}`"] if command else []
    revision = (
        about.get("revision")
        or body.get("revision")
        or ", ".join(dict.fromkeys(map(str, body.get("revisions", {}).values())))
    )
    parts += [f"revision {revision}"] if revision else []
    machine = about.get("machine") or body.get("environment") or body.get("machine")
    if isinstance(machine, dict):
        cores = machine.get("cores") or machine.get("cpus")
        shown = [machine.get("processor"), f"{cores} cores" if cores else None, machine.get("gpu")]
        shown += [f"torch {machine['torch']}" if machine.get("torch") else None, _load(machine)]
        parts.append(", ".join(str(s) for s in shown if s))
    elif machine:
        parts.append(f"{machine}, {body.get('processors', '?')} cores")
    if about.get("quick"):
        parts.append("a quick run, few repeats")
    return f"*{'; '.join(parts)}.*"


def _load(machine: Body) -> str | None:
    """How busy the machine was: times of a busy one are ratios at best."""
    load = next((machine[k] for k in ("load_before", "load_average", "load") if machine.get(k) is not None), None)
    load = load[0] if isinstance(load, list) else load
    return None if load is None else f"load {load:.1f}"


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


def _leaves(body: Any, prefix: str = "") -> list[list[str]]:
    if isinstance(body, dict):
        return [
            line for key, value in body.items() for line in _leaves(value, f"{prefix} {key}".strip().replace("_", " "))
        ]
    if isinstance(body, list):
        return [[prefix, ", ".join(_number(v) for v in body)]]
    return [[prefix, _number(body)]]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _s(seconds: float) -> str:
    return "under 1 ms" if seconds < 5e-4 else f"{1e3 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"

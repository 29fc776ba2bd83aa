"""The measured tables of ``docs/benchmarks.md``: one function per JSON of ``results/``, and where each stands on the
page.

The page is written by hand but for its blocks, which begin with ``<!-- measured: NAME -->`` and end with ``<!-- end
-->``. A block whose JSON is not there says so: no number of ours is on the page that is not in a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Body = dict[str, Any]
_MARK = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def page_with_blocks(page: str, results: Path) -> str:
    """The page with every block made from the JSON files of ``results``.

    Raises:
        ValueError: if the page asks for a block that nobody makes, or lacks one.
    """
    asked = _MARK.findall(page)
    if sorted(asked) != sorted(BLOCKS):
        raise ValueError(
            f"the page must hold each block once: {', '.join(sorted(BLOCKS))}; it holds {', '.join(sorted(asked))}"
        )
    return _MARK.sub(lambda found: f"<!-- measured: {found[1]} -->\n{block(found[1], results)}\n<!-- end -->", page)


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


def synthesis(body: Body) -> str:
    """Generated volumes per second of one thread."""
    rows = [
        [
            f"{edge}³",
            f"{found['case_ms']:.0f} ms",
            f"{found['cases_per_s']:.2f}",
            f"{found['elementwise_passes_per_case']:.0f}",
        ]
        for edge, found in body["edges"].items()
    ]
    return table(["volume", "processor time each", "per second and thread", "in plain passes over the volume"], rows)


def storage(body: Body) -> str:
    """The table that the script prints."""
    return table(body["columns"], body["rows"])


def export(body: Body) -> str:
    """Exported graphs beside torch."""
    rows = [
        [part, form, _s(found["seconds"]), f"{found['times_as_fast']:.2f} x", f"{found['difference']:.1e}"]
        for part in ("encoder", "decoder")
        for form, found in body[part].items()
    ]
    return f"Model `{body['model']}`, {body['threads']} thread.\n\n" + table(
        ["", "form", "time", "speed", "largest difference"], rows
    )


def training(body: Body) -> str:
    """Every number of the script, by its name."""
    return table(["", "measured"], _leaves({k: v for k, v in body.items() if k not in ("collected", "machine")}))


def augmentation(body: Body) -> str:
    """Milliseconds of a crop by every way, and how many times ours is as fast."""
    names = list(next(iter(body["crops"].values()))["ms"])
    rows = [
        [name.replace("_", " "), *(_number(found["ms"][name]) + " ms" for found in body["crops"].values())]
        for name in names
    ]
    for name in ("torchio", "torchio_with_affine"):
        ratios = [found.get("ours_times_as_fast_as", {}).get(name) for found in body["crops"].values()]
        if None not in ratios:
            rows.append(
                [f"ours with blur beside {name.replace('_', ' ')}", *(f"{_number(r)} x as fast" for r in ratios)]
            )
    return table(["", *body["crops"]], rows)


def session(body: Body) -> str:
    """What a session's doings take, per case, and beside a later click."""
    head = ["", *(f"{name}, {' x '.join(map(str, found['size_ijk']))}" for name, found in body["cases"].items())]
    names = dict.fromkeys(name for found in body["cases"].values() for name in found["seconds"])
    rows = []
    for name in names:
        cells = [
            (found["seconds"].get(name), found["ratio to a later click"].get(name)) for found in body["cases"].values()
        ]
        rows.append([name, *("" if s is None else f"{_s(s)} ({_number(r)} x)" for s, r in cells)])
    same = all(found["same after opening again"] for found in body["cases"].values())
    note = "the same as" if same else "NOT the same as"
    return (
        table(head, rows)
        + f"\n\nIn brackets the ratio to a later click. The masks after opening again were {note} before."
    )


def server(body: Body) -> str:
    """Every number of the script, by its name."""
    return training(body)


BLOCKS: dict[str, tuple[str, Callable[[Body], str]]] = {
    "accuracy": ("default_evaluation.json", accuracy),
    "protocols": ("protocols.json", protocols),
    "latency": ("latency.json", latency),
    "gpu": ("gpu.json", gpu),
    "training": ("train.json", training),
    "augmentation": ("augment.json", augmentation),
    "session": ("session.json", session),
    "server": ("server_load.json", server),
    "preparation": ("prepare.json", preparation),
    "storage": ("storage.json", storage),
    "synthesis": ("synthesis.json", synthesis),
    "export": ("export.json", export),
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

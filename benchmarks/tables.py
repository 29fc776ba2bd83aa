"""The measured tables of ``docs/benchmarks.md`` and of the checkpoint's card, from the JSON files of ``results/``.

A page is written by hand but for its blocks, which begin with ``<!-- measured: NAME -->`` and end with
``<!-- end -->``: every measured number of the page comes from a file, through a macro of ``blocks.md.jinja``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from samed3d.pages import count, seconds_text

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
    file, macro = BLOCKS[name]
    path = results / file
    if not path.is_file():
        return f"*Not measured: `benchmarks/results/{file}` is not there (`make bench`).*"
    body = json.loads(path.read_text())
    about = body | body.get("collected", {})
    commands = [about["command"]] if about.get("command") else list(body.get("commands", {}).values())
    revisions = [about["revision"]] if about.get("revision") else list(body.get("revisions", {}).values())
    machine = about.get("machine") or body.get("environment")
    quick = ["a quick run, few repeats"] if about.get("quick") else []
    return f"{markdown(macro, body)}\n\n{origin([f'benchmarks/results/{file}', *commands], revisions, machine, quick)}"


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


def markdown(name: str, body: Body, **more: Any) -> str:
    """The Markdown of a macro of ``blocks.md.jinja`` for the content of a JSON file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    blocks = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True)
    blocks.filters |= {"count": count, "seconds": seconds_text}
    text = getattr(blocks.get_template("blocks.md.jinja", globals=more).module, name)(body)
    lines = [line for line in text.splitlines() if line.strip()]
    # A table begins at the line before its rule, a paragraph at any line that is in no table.
    begins = [line[0] != "|" or below.startswith("| --- |") for line, below in pairwise([*lines, ""])]
    return "".join("\n" * (1 + new) + line for new, line in zip(begins, lines, strict=True)).strip()


BLOCKS = {
    "accuracy": ("default_evaluation.json", "accuracy"),
    "protocols": ("protocols.json", "protocols"),
    "latency": ("latency.json", "latency"),
    "memory": ("memory.json", "memory"),
    "gpu": ("gpu.json", "gpu"),
    "training": ("train.json", "every_number"),
    "server": ("server_load.json", "every_number"),
    "preparation": ("prepare.json", "preparation"),
}
"""File and macro of each block of ``docs/benchmarks.md``."""

"""``samed3d demo``: clicks the organs of a generated body, as a user would through ``Session``, and reports the Dice.

The body has tissue-like intensities and needs neither data nor a licence. It is not a patient: its Dice shows only that
the program works. Read ``inference/session.py`` next, ``data/phantom.py`` for the body.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.clicks import next_click
from samed3d.data.phantom import anatomical_phantom
from samed3d.devices import pick_device
from samed3d.drawing import write_preview
from samed3d.errors import InputError
from samed3d.geometry import zyx_to_ijk
from samed3d.inference.session import Session
from samed3d.metrics import dice
from samed3d.models import load_promptable
from samed3d.output import check_results_folder, write_json
from samed3d.prompts import Point, dump_prompts
from samed3d.volume import Volume, write_volume

CLICKS = 5
logger = logging.getLogger(__name__)


@dataclass
class OrganResult:
    """One organ of the demo.

    Attributes:
        name: The organ.
        dice: Dice with the generated label after each click, 0 to 1; fewer than ``CLICKS`` if a mask became perfect.
        seconds: Duration of each click's prediction.
    """

    name: str
    dice: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def run_demo(
    out: Path, model: str = "default", seed: int = 0, device: str = "auto", *, quiet: bool = False
) -> list[OrganResult]:
    """Generate a body, click each organ up to five times, write volume, masks, prompts, picture and table to ``out``.

    Raises:
        InputError: if the folder cannot be written, or the model or the device is not available.
    """
    started = time.perf_counter()
    pick_device(device)
    network = load_promptable(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output must be a folder that can be made, got {out} ({error.strerror})") from error
    written = ("results.json", "ct.nii.gz", "masks.nii.gz", "prompts.json", "preview.png")
    check_results_folder(out, written, lambda path: "organs" in json.loads(path.read_text()))
    array, labels, grid, names = anatomical_phantom(np.random.default_rng(seed))
    logger.info("generated a body of %s voxels (i, j, k)", grid.size_ijk)
    session = Session.open(Volume(array, grid, "phantom"), model=network, device=device)
    present = [label for label in np.unique(labels).tolist() if label in names and label != 0]
    results = [_click_organ(session, labels == label, label, names[label]) for label in present]

    write_volume(out / "ct.nii.gz", array, grid)
    session.save(out / "masks.nii.gz")
    dump_prompts(session.objects(), out / "prompts.json")
    title = "samed3d demo: a generated body"
    write_preview(out / "preview.png", session.volume, session.labels, session.objects(), title=title)
    organs = [asdict(result) for result in results]
    body = {"model": model, "seed": seed, "organs": organs, "session": session.report()}
    write_json(out / "results.json", body)
    if not quiet:
        _print_table(results, out, time.perf_counter() - started)
    return results


def _click_organ(session: Session, target_mask: NDArray[np.bool_], label: int, name: str) -> OrganResult:
    """Click the organ's most central voxel, then the centre of the largest error."""
    result = OrganResult(name)
    mask = np.zeros_like(target_mask)
    for _ in range(CLICKS):
        click = next_click(mask, target_mask, policy="centre")
        if click is None:
            break
        zyx, positive = click
        update = session.add(Point(zyx_to_ijk(zyx), positive=positive), object_id=label, name=name)
        mask = session.mask.astype(bool)
        result.dice.append(dice(mask, target_mask))
        result.seconds.append(update.seconds)
    logger.info("%s: Dice %.2f after one click, %.2f after %d", name, result.dice[0], result.dice[-1], len(result.dice))
    return result


def _print_table(results: list[OrganResult], out: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Dice after n clicks", title_justify="left", box=None)
    table.add_column("organ", no_wrap=True)
    for name in (*map(str, range(1, CLICKS + 1)), "s/click"):
        table.add_column(name, justify="right")
    # A mask that became perfect needs no further click: its last Dice stands.
    scores = np.array([result.dice + result.dice[-1:] * (CLICKS - len(result.dice)) for result in results])
    for result, row in zip(results, scores, strict=True):
        table.add_row(result.name, *(f"{d:.2f}" for d in row), f"{np.mean(result.seconds):.2f}")
    table.add_row("mean", *(f"{d:.2f}" for d in scores.mean(axis=0)))
    console = Console()
    console.print(table)
    hint = f"look at {out / 'preview.png'}, or open ct.nii.gz with masks.nii.gz over it"
    console.print(f"{seconds:.0f} s; {hint}", highlight=False, soft_wrap=True)

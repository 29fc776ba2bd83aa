"""Measure corpus preparation against a plain loop, as ratios within one run. Prints one JSON and writes it to a file.

    python benchmarks/prepare.py --data DATA --out benchmarks/results/prepare.json

The loop does what SAM-Med3D's released script does: for each data set, each class and each case, resample to 1.5 mm,
write a binary label and a copy of the image as .nii.gz. It resamples with SimpleITK alone, which is quicker than the
released torchio pipeline. Microscopy is left out: at 1.5 mm nothing remains of it. The corpus is made twice from the
same images, at 1.5 mm (the same work) and at native spacing. Reading and memory: ``docs/design_notes.md``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from collect import describe_machine, parser_of, write_result

from data_prep.clean import rules_from
from data_prep.convert import Settings
from data_prep.pipeline import prepare

SPACING_MM = 1.5
LEAST_MM3 = 10.0


def clock(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds of this process and its finished children, and the result."""

    def busy() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    start, used = time.perf_counter(), busy()
    result = run()
    return time.perf_counter() - start, busy() - used, result


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def data_sets(data: Path, names: list[str]) -> list[Path]:
    """Data sets with images and a scale in mm."""
    found = []
    for about in sorted(data.glob("*/dataset.json")):
        wanted = about.parent.name in names if names else (about.parent / "imagesTr").is_dir()
        if wanted and "microscopy" not in json.loads(about.read_text()).get("modality", ""):
            found.append(about.parent)
    return found


def plain_loop(sets: list[Path], out: Path) -> int:
    """The released script's work: one binary label and one image copy per class and case; the number of masks."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def resample(image: sitk.Image, how: int) -> sitk.Image:
        size = [max(1, round(n * s / SPACING_MM)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
        grid = (image.GetOrigin(), (SPACING_MM,) * 3, image.GetDirection())
        return sitk.Resample(image, size, sitk.Transform(), how, *grid, 0, image.GetPixelID())

    masks = 0
    for folder in sets:
        about = json.loads((folder / "dataset.json").read_text())
        resampled = out / folder.name
        resampled.mkdir(parents=True)
        for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
            image = sitk.ReadImage(str(folder / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz")))
            sitk.WriteImage(resample(image, sitk.sitkLinear), str(resampled / path.name))
        for name, value in about["labels"].items():
            if value == 0:
                continue
            target = out / name.replace("/", "_") / folder.name
            for sub in ("imagesTr", "labelsTr"):
                (target / sub).mkdir(parents=True, exist_ok=True)
            for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
                label = resample(sitk.ReadImage(str(path)), sitk.sitkNearestNeighbor)
                binary = label == value
                if sitk.GetArrayViewFromImage(binary).sum() * SPACING_MM**3 < LEAST_MM3:
                    continue
                sitk.WriteImage(binary, str(target / "labelsTr" / path.name))
                shutil.copy(resampled / path.name, target / "imagesTr" / path.name)
                masks += 1
        shutil.rmtree(resampled)
    return masks


def compare_preparation(data: Path, names: list[str], place: Path) -> dict[str, Any]:
    """The loop, the corpus at the loop's spacing by one process and by all, the corpus at native spacing by one."""
    sets = data_sets(data, names)
    wall, busy, masks = clock(lambda: plain_loop(sets, place / "loop"))
    size = folder_bytes(place / "loop")
    loop = {"wall_s": wall, "processor_s": busy, "bytes": size, "masks": masks}
    result: dict[str, Any] = {"data_sets": len(sets), "loop": loop}
    rules, jobs = rules_from("lenient", []), os.cpu_count() or 1
    runs = (
        ("at 1.5 mm, 1 process", SPACING_MM, 1),
        (f"at 1.5 mm, {jobs} processes", SPACING_MM, jobs),
        ("native, 1 process", None, 1),
    )
    for number, (title, spacing, processes) in enumerate(runs):
        target = place / f"corpus{number}"
        make = partial(prepare, sets, target, Settings(rules, spacing), jobs=processes)
        one_wall, one_busy, made = clock(make)
        held, masks = folder_bytes(target), made.counts["masks"]
        found = {"wall_s": one_wall, "bytes": held, "masks": masks}
        result[title] = found | {"faster_wall": wall / one_wall, "smaller": size / held}
        if processes == 1:  # the processor time of pooled processes cannot be read here
            result[title] |= {"processor_s": one_busy, "faster_processor": busy / one_busy}
    return result


def main() -> None:
    parser = parser_of(__doc__, "prepare.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of nnU-Net data sets")
    parser.add_argument("--sets", nargs="*", default=[], help="only these data sets")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as place:
        result = {"machine": machine, "preparation": compare_preparation(options.data, options.sets, Path(place))}
    digits = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.3g}"))
    write_result(options.out, digits)


if __name__ == "__main__":
    main()

"""Measure corpus preparation against a plain loop, as ratios within one run. Prints one JSON and writes it to a file.

    python benchmarks/prepare.py --data DATA --out benchmarks/results/prepare.json

The loop does what SAM-Med3D's released script does: for each data set, each class and each case, resample to 1.5 mm,
write a binary label and a copy of the image as .nii.gz. It resamples with SimpleITK alone, which is quicker than the
released torchio pipeline. Microscopy is left out: at 1.5 mm nothing remains of it. The corpus is made twice from the
same images, at 1.5 mm (the same work) and at native spacing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.collect import describe_machine, write_result  # noqa: E402
from data_prep.clean import rules_from  # noqa: E402
from data_prep.convert import Settings  # noqa: E402
from data_prep.pipeline import prepare  # noqa: E402
from samed3d.data.corpus import Corpus  # noqa: E402
from samed3d.geometry import Grid  # noqa: E402
from samed3d.volume import read_volume, write_volume  # noqa: E402

SPACING_MM = 1.5
LEAST_MM3 = 10.0
CROP = 128
LARGE = (600, 512, 512)


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


def large_case(folder: Path) -> Path:
    """A source of one noisy 512 x 512 x 600 volume with eight blocks."""
    rng = np.random.default_rng(0)
    image, labels = np.empty(LARGE, np.int16), np.zeros(LARGE, np.uint8)
    for value in range(1, 9):
        start = rng.integers(50, 400, 3)
        labels[tuple(slice(a, a + 90) for a in start)] = value
    for z in range(LARGE[0]):
        image[z] = rng.normal(0, 30, LARGE[1:]) + 60.0 * labels[z]
    grid = Grid(LARGE, (0.8, 0.8, 1.0))
    for sub, name, array in (("imagesTr", "big_0000", image), ("labelsTr", "big", labels)):
        (folder / sub).mkdir(parents=True)
        write_volume(folder / sub / f"{name}.nii.gz", array, grid)
    names = {"background": 0} | {f"block {v}": v for v in range(1, 9)}
    about = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def measure_memory(source: Path, out: Path) -> dict[str, float]:
    """Peak memory of a process that prepares the large case, beside that of one that only imports."""
    code = (
        "import sys; from pathlib import Path; import SimpleITK, blosc2, cc3d, scipy.ndimage, rich.progress\n"
        "from data_prep.pipeline import prepare\n"
        "if len(sys.argv) > 1: prepare([Path(sys.argv[1])], Path(sys.argv[2]))\n"
        "print(next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    commands = ([sys.executable, "-c", code, *words] for words in ((), (str(source), str(out))))
    idle, used = (int(subprocess.check_output(words, cwd=ROOT, text=True).split()[-1]) for words in commands)
    volume = int(np.prod(LARGE)) * 3  # int16 image, uint8 labels
    above = (used - idle) / volume
    return {"idle_bytes": idle, "peak_bytes": used, "volume_bytes": volume, "peak_above_idle_in_volumes": above}


def measure_crops(corpus: Path, source: Path, repeats: int = 20) -> dict[str, float]:
    """A random crop of image and labels from newly opened files of the corpus, beside reading the two .nii.gz."""
    rng = np.random.default_rng(0)
    case = Corpus(corpus).cases[0]
    times = []
    for _ in range(repeats):
        at = [int(rng.integers(0, max(1, n - CROP + 1))) for n in case.shape_zyx]
        index = tuple(slice(a, a + CROP) for a in at)
        fresh = Corpus(corpus)
        start = time.process_time()
        fresh.image(case)[index]
        fresh.labels(case)[index]
        times.append(time.process_time() - start)
    paths = [next((source / sub).glob("*.nii.gz")) for sub in ("imagesTr", "labelsTr")]
    start = time.process_time()
    for path in paths:
        read_volume(path)
    whole = time.process_time() - start
    crop = statistics.median(times)
    return {"crop_ms": 1e3 * crop, "nii_gz_ms": 1e3 * whole, "faster": whole / crop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of nnU-Net data sets")
    parser.add_argument("--sets", nargs="*", default=[], help="only these data sets")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        result = {"machine": describe_machine()}
        result["preparation"] = compare_preparation(options.data, options.sets, place)
        large = large_case(place / "large")
        result["memory"] = measure_memory(large, place / "large_corpus")
        result["crops_of_512x512x600"] = measure_crops(place / "large_corpus", large)
        real = options.data / "chaos_ct_liver"
        if real.is_dir():
            prepare([real], place / "real", Settings(rules_from("lenient", [])))
            result["crops_of_512x512x78"] = measure_crops(place / "real", real)
    digits = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.3g}"))
    write_result(options.out, digits)


if __name__ == "__main__":
    main()

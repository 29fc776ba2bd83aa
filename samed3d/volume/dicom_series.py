"""Which slices of a folder of DICOM files make which volumes, and where they lie: decided in patient space, never by
file names or instance numbers.

A series is divided into stacks wherever its slices cannot be one volume: other sizes, directions, echoes, b-values,
times, acquisitions, or a gap. A stack is a volume if its slices lie one behind the other at equal distances; all others
are refused, or resampled by position where the user asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, as_triple
from samed3d.volume.dicom_headers import ORDER, TRAITS, ImageFile, Slice, read_image_file

logger = logging.getLogger(__name__)

_SAME_DIRECTION = 1e-3  # difference of direction cosines up to which slices are parallel
_SAME_PLACE_MM = 1e-3
_WIDEST_GAP = 4.0  # slice distances; what lies farther apart is another piece
# How far a slice may lie from its place on the grid: up to the first share nothing is said, up to the second a note is
# given, beyond that the stack is refused. Of the distance between slices, and of the pixel.
_OFF_ALONG, _OFF_IN_PLANE = (0.01, 0.05), (0.1, 0.5)
_ALWAYS_APART = ("echo {}", "b {}", "time {} of {count}")
_INSTANCE = ORDER.index("InstanceNumber")

T = TypeVar("T")
Parts = list[tuple[str, list[Slice]]]


@dataclass
class Stack:
    """Slices that could be one volume.

    Attributes:
        series: Series instance UID.
        description: Series description.
        modality: "CT", "MR", ...
        slices: From the first to the last along the normal.
        name: What tells it from other stacks of its series, as it follows "N slices".
        count: Slices and frames, also of files whose place is not known.
        fault: Why it is no volume, if an attribute is missing or wrong.
        notes: What the user must know of how it was put together.
    """

    series: str
    description: str
    modality: str
    slices: list[Slice]
    name: str
    count: int
    fault: str = ""
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        slices = f"{self.count} slice{'s' * (self.count != 1)}{self.name}"
        return f"{self.description or 'no description'!r}, {slices}, UID {self.series}"


@dataclass(frozen=True, eq=False)
class Layout:
    """How the slices of a stack lie on the grid of its image.

    Attributes:
        grid: Of the image.
        slices: From the first to the last.
        places_kji: (N, 3) voxel index of each slice's first pixel; whole numbers unless the image is resampled.
        resampled: Whether the image is interpolated between and within slices.
        notes: What the user must know.
    """

    grid: Grid
    slices: list[Slice]
    places_kji: NDArray[np.float64]
    resampled: bool
    notes: tuple[str, ...]

    def on_slices(self, mask: NDArray) -> NDArray:
        """An array on the grid (D, H, W) as seen on the slices themselves (N, rows, columns): the nearest voxels."""
        _, rows, columns = self.slices[0].encoding.shape
        whole = np.rint(self.places_kji).astype(int)
        return np.stack([mask[k, j : j + rows, i : i + columns] for k, j, i in whole])


def pick_stack(path: Path, series: str | int | None) -> Stack:
    """The picked stack of a folder or file.

    Args:
        path: A folder of DICOM files, or one file.
        series: A series' UID, or a number in the list that the error message gives; None where there is only one.

    Raises:
        InputError: if there is none, or several and none was picked; if a file is empty or damaged, or the stack lacks
            an attribute.
    """
    stacks = find_stacks(path)
    if not stacks:
        raise InputError(f"no DICOM series in folder: {path}; give the folder that holds the slices")
    listed = "; ".join(f"{n} = {stack}" for n, stack in enumerate(stacks, start=1))
    asked = "" if series is None else str(series)
    among = [s for s in stacks if s.series == asked] if asked else stacks
    if asked.isdigit() and 1 <= int(asked) <= len(stacks):
        among = [stacks[int(asked) - 1]]
    elif not among:
        raise InputError(f"--series must be a number or UID of {path}, got {asked!r}; it holds: {listed}")
    volumes = [s for s in among if s.count > 1 or " from " in s.name] or among
    if len(volumes) > 1:
        several = len({s.series for s in volumes}) == len(volumes)
        what, how = (f"{len(volumes)} series", "N or UID") if several else (f"{len(volumes)} volumes", "N")
        raise InputError(f"DICOM folder holds {what}, pick one with --series {how}: {path} holds: {listed}")
    picked = volumes[0]
    if picked.fault:
        raise InputError(picked.fault)
    picked.notes += tuple(f"left out: {s}" for s in among if s is not picked)
    return picked


def find_stacks(path: Path) -> list[Stack]:
    """All stacks of a folder or file, by UID of the series.

    Raises:
        InputError: if a file is empty, cut or damaged.
    """
    paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    files = [found for p in paths if (found := read_image_file(p)) is not None]
    stacks: list[Stack] = []
    for uid, mine in _grouped(files, lambda f: f.series):
        about, copies = (uid, mine[0].description, mine[0].modality), _copies(mine)
        mine = [f for f in mine if f.path not in copies]
        notes = (f"left out: copies of other files: {', '.join(p.name for p in copies)}",) if copies else ()
        if fault := next((f.fault for f in mine if f.fault), ""):
            stacks.append(Stack(*about, [], "", sum(f.encoding.shape[0] for f in mine), fault))
            continue
        frames = _grouped(mine, lambda f: f.frame_of_reference)
        for number, (_, same) in enumerate(frames, start=1):
            name = f", coordinate system {number} of {len(frames)}" if len(frames) > 1 else ""
            for part, full_name in _divided([s for f in same for s in f.slices], name):
                stacks.append(Stack(*about, part, full_name, len(part), notes=notes))
    return stacks


def _grouped(items: Sequence[T], key: Callable[[T], Any]) -> list[tuple[Any, list[T]]]:
    """The items by key, in the order of the keys."""
    return [(k, list(same)) for k, same in groupby(sorted(items, key=key), key=key)]


def _copies(files: list[ImageFile]) -> list[Path]:
    """Files that repeat another one byte for byte."""
    found = []
    for uid, (first, *others) in _grouped(files, lambda f: f.instance):
        found += [f.path for f in others if uid and f.path.read_bytes() == first.path.read_bytes()]
    return found


def _divided(slices: list[Slice], name: str) -> Iterator[tuple[list[Slice], str]]:
    """The stacks that slices of one series and one coordinate system make, with their names."""
    for rule in (_by_size, _by_direction, _by_trait, _by_rank, _by_run, _by_gap):
        parts = rule(slices)
        if len(parts) > 1:
            for label, part in parts:
                yield from _divided(part, name + label)
            return
    yield [slices[n] for n in np.argsort(_along(slices), kind="stable")], name


def _by_size(slices: list[Slice]) -> Parts:
    parts = _grouped(slices, lambda s: (s.encoding.shape[1:], s.encoding.samples, s.encoding.is_grey))
    return [(f" of {size[1]} x {size[0]} pixels", part) for (size, *_), part in parts]


def _by_direction(slices: list[Slice]) -> Parts:
    """Parallel slices; angles are those to the largest part. A localiser lies apart even if it is parallel."""
    parts: list[list[Slice]] = []
    for one in slices:
        near = (p for p in parts if np.abs(p[0].axes_lps - one.axes_lps).max() <= _SAME_DIRECTION)
        if (part := next(near, None)) is None:
            parts.append(part := [])
        part.append(one)
    if len(parts) == 1:
        return [(f", {kind}", part) for kind, part in _grouped(slices, _kind)]
    normals = [np.cross(*part[0].axes_lps) for part in parts]
    largest = normals[int(np.argmax([len(part) for part in parts]))]
    angles = np.degrees(np.arccos(np.clip([n @ largest for n in normals], -1, 1)))
    return [(f" at {angle:.3g} degrees", part) for angle, part in zip(angles, parts, strict=True)]


def _kind(one: Slice) -> str:
    return "localizer" if "LOCALIZER" in one.traits.get("{}", "") else "image"


def _by_trait(slices: list[Slice]) -> Parts:
    """Slices at one place that differ in what a header says of them, and echoes, b-values and times in any case."""
    places = _places(slices)
    most = int(np.bincount(places).max())
    columns = {name: [s.traits.get(name, "") for s in slices] for name, *_ in TRAITS}
    if slices[0].encoding.shape[0] > 1:
        columns["file {}"] = [s.file.name for s in slices]
    in_plane = [np.rint(s.axes_lps @ s.origin_lps_mm) for s in slices]
    columns["at {} mm"] = [f"{x:.0f}, {y:.0f}" for x, y in in_plane]
    for name, values in columns.items():
        distinct = sorted(set(values), key=_numeric)
        if not 2 <= len(distinct) <= max(most, len(slices) // 2):
            continue
        parts = [[s for s, v in zip(slices, values, strict=True) if v == value] for value in distinct]
        differ_at_one_place = len(distinct) <= most and len(set(zip(places, values, strict=True))) > max(places) + 1
        if differ_at_one_place or (name in _ALWAYS_APART and _overlap(parts)):
            shown = [f"{float(v):g}" if _numeric(v)[0] == 0 else v.replace("\\", " ") for v in distinct]
            return [(f", {name.format(v, count=len(shown))}", p) for v, p in zip(shown, parts, strict=True)]
    return []


def _by_rank(slices: list[Slice]) -> Parts:
    """As many volumes as there are slices at each place, told apart by acquisition and instance numbers."""
    places = _places(slices)
    counts = np.bincount(places)
    if counts.max() == 1 or counts.min() != counts.max():
        return []
    parts: list[list[Slice]] = [[] for _ in range(counts[0])]
    for place in range(len(counts)):
        here = sorted((s for s, p in zip(slices, places, strict=True) if p == place), key=_order)
        if len({_order(s) for s in here}) < len(here):
            return []
        for part, one in zip(parts, here, strict=True):
            part.append(one)
    return [(f", volume {n} of {len(parts)}", part) for n, part in enumerate(parts, start=1)]


def _by_run(slices: list[Slice]) -> Parts:
    """Interleaved acquisitions: by number or time the slices run through the volume several times.

    One acquisition may also take its odd slices first. Evenly spaced slices are therefore divided only where they would
    otherwise overlap, or where instance numbers occur several times.
    """
    along, thickness = _along(slices), slices[0].thickness_mm
    if len(set(_places(slices))) < len(slices):
        return []
    even = _unevenness(along) <= _OFF_ALONG[1]
    for column, name in enumerate(ORDER):
        values = np.array([np.nan if s.order[column] is None else s.order[column] for s in slices], float)
        if np.isnan(values).any() or np.ptp(values) == 0:
            continue
        numberings = [(min((_runs(values, along, sign) for sign in (1, -1)), key=lambda r: int(r.max())), False)]
        if column == _INSTANCE and slices[0].encoding.shape[0] == 1:
            numberings.append((((values[:, None] == values) & (along[:, None] > along)).sum(axis=1), True))
        for numbers, is_sure in numberings:
            parts = [[slices[n] for n in np.flatnonzero(numbers == k)] for k in range(max(numbers) + 1)]
            if len(parts) < 2 or min(map(len, parts)) < 3 or not _overlap(parts):
                continue
            if max(_unevenness(_along(part)) for part in parts) > _OFF_ALONG[1]:
                continue
            pitch = np.ptp(_along(parts[0])) / (len(parts[0]) - 1)
            overlapping = thickness >= 0.75 * pitch or (thickness == 0 and name == "AcquisitionNumber")
            if is_sure or overlapping or not even:
                return [(f", acquisition {k} of {len(parts)}", part) for k, part in enumerate(parts, start=1)]
    return []


def _by_gap(slices: list[Slice]) -> Parts:
    """Pieces between which many slices are missing."""
    order = np.argsort(_along(slices))
    along = _along(slices)[order]
    gaps = np.diff(along)
    if not gaps.size or gaps.min() < _SAME_PLACE_MM:
        return []
    pieces = np.split(np.arange(len(along)), np.flatnonzero(gaps > _WIDEST_GAP * np.median(gaps)) + 1)
    return [(f" from {along[p[0]]:.4g} to {along[p[-1]]:.4g} mm", [slices[order[n]] for n in p]) for p in pieces]


def _along(slices: list[Slice]) -> NDArray[np.float64]:
    """Positions along the normal of the slices, mm."""
    return np.array([s.origin_lps_mm for s in slices]) @ np.cross(*slices[0].axes_lps)


def _places(slices: list[Slice]) -> NDArray[np.intp]:
    """For each slice the number of its place along the normal."""
    along = _along(slices)
    order = np.argsort(along)
    places = np.zeros(len(along), np.intp)
    places[order[1:]] = np.cumsum(np.diff(along[order]) > _SAME_PLACE_MM)
    return places


def _unevenness(along: NDArray[np.float64]) -> float:
    """How far a slice lies from its place among evenly spaced ones, as a share of their distance."""
    found = np.sort(along)
    pitch = max((found[-1] - found[0]) / max(len(found) - 1, 1), 1e-9)
    return float(np.abs(found - found[0] - pitch * np.arange(len(found))).max() / pitch)


def _runs(values: NDArray[np.float64], along: NDArray[np.float64], sign: int) -> NDArray[np.intp]:
    """For each slice, which run through the volume it belongs to when the slices are taken in the order of values."""
    order = np.lexsort((sign * along, values))
    numbers = np.zeros(len(along), np.intp)
    numbers[order[1:]] = np.cumsum(np.diff(sign * along[order]) < 0)
    return numbers


def _overlap(parts: list[list[Slice]]) -> bool:
    """Whether the parts lie in one another instead of one behind the other."""
    spans = [_along(part) for part in parts]
    return bool(max(s.min() for s in spans) < min(s.max() for s in spans))


def _order(one: Slice) -> tuple[float, ...]:
    return tuple(-1.0 if value is None else value for value in one.order)


def _numeric(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


def _check_pixel_spacing(slices: list[Slice], path: Path) -> None:
    first = slices[0]
    for one in slices:
        if not np.allclose(one.spacing_mm, first.spacing_mm, rtol=1e-3, atol=0):
            shown = " and ".join(f"{s.spacing_mm[1]:g}\\{s.spacing_mm[0]:g} in {s.file.name}" for s in (first, one))
            raise InputError(f"PixelSpacing (0028,0030) must be the same in all slices, got {shown}: {path}")


def layout_of(stack: Stack, path: Path, untilt: bool) -> Layout:
    """The grid of a stack, and where its slices lie on it.

    Args:
        stack: With at least two slices.
        path: Of the image, for messages.
        untilt: Resample slices that are tilted or unevenly spaced instead of refusing them.

    Raises:
        InputError: if slices differ in pixel spacing, lie on one another, or are tilted or unevenly spaced.
    """
    slices, first = stack.slices, stack.slices[0]
    _check_pixel_spacing(slices, path)
    spacing = np.array(first.spacing_mm)
    relative = np.array([s.origin_lps_mm for s in slices]) - first.origin_lps_mm
    normal = np.cross(*first.axes_lps)
    along, in_plane = relative @ normal, relative @ first.axes_lps.T
    gaps, last = np.diff(along), len(slices) - 1
    if gaps.min() < _SAME_PLACE_MM:
        names = " and ".join(s.file.name for s in slices[int(gaps.argmin()) :][:2])
        raise InputError(f"DICOM series has several slices at one position, such as {names}: {path}; keep one of each")
    drift = float(np.linalg.norm(in_plane, axis=1).max())
    faults = []
    uneven, tilted = _unevenness(along), drift / spacing.min()
    if uneven > _OFF_ALONG[0]:
        names = " and ".join(s.file.name for s in slices[int(gaps.argmax()) :][:2])
        faults.append(f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart (most between {names})")
    if tilted > _OFF_IN_PLANE[0]:
        degrees = np.degrees(np.arctan2(drift, along[-1]))
        faults.append(f"slices are displaced in plane by up to {drift:.3g} mm, a gantry tilt of {degrees:.2g} degrees")
    resampled = uneven > _OFF_ALONG[1] or tilted > _OFF_IN_PLANE[1]
    if resampled and not untilt:
        raise InputError(
            f"DICOM {' and '.join(faults)}, from {first.file.name} on: {path}; give --untilt to resample them by "
            "position, or restore missing slices"
        )
    count = round(along[-1] / float(np.median(gaps))) + 1 if uneven > _OFF_ALONG[1] else last + 1
    step = float(along[-1]) / (count - 1)
    _, rows, columns = first.encoding.shape
    low = high = np.zeros(2)
    places: NDArray[np.float64] = np.eye(1, 3) * np.arange(last + 1)[:, None]
    if resampled:
        shift = in_plane / spacing
        low, high = np.floor(shift.min(axis=0) + 1e-6), np.ceil(shift.max(axis=0) - 1e-6)
        places = np.column_stack([along / step, (shift - low)[:, ::-1]])
    wide, tall = (high - low).astype(int).tolist()
    origin = first.origin_lps_mm + (low * spacing) @ first.axes_lps
    direction = np.stack([*first.axes_lps, normal], axis=1)
    grid = Grid(
        (count, rows + tall, columns + wide),
        as_triple((*first.spacing_mm, step)),
        as_triple(origin),
        tuple(direction.ravel().tolist()),
    )
    how = f"resampled by position to slices {step:.4g} mm apart" if resampled else "read as they are"
    notes = tuple(f"{fault}; {how}" for fault in faults)
    if first.encoding.photometric == "MONOCHROME1":
        notes += ("MONOCHROME1: viewers show low values bright; the values are kept as stored",)
    return Layout(grid, slices, places, resampled, (*stack.notes, *notes))

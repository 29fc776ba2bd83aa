"""A CT-like torso with exact labels, for the demo and for tests that need anatomy without data. Numpy and scipy only.

The patient is modelled in millimetres, right (r), anterior (a) and superior (s) of a point in the upper abdomen, by
warped ellipsoids, tubes and shells; the scanner's grid may lie obliquely to the patient. Sizes, places and Hounsfield
units are those of a textbook adult: nothing learnt on this drawing holds for people.
"""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from samed3d.geometry import Grid, IntTriple, Triple, as_triple

Field = NDArray[np.floating]
Mask = NDArray[np.bool_]


class Tissue(NamedTuple):
    """Number, mean and standard deviation in Hounsfield units, and the labelled organ, "" for what is not labelled."""

    number: int
    hu: float
    texture_hu: float
    organ: str


@cache
def tissues() -> dict[str, Tissue]:
    """By name, from ``phantom_tissues.csv``."""
    with Path(__file__).with_name("phantom_tissues.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {name: Tissue(n, float(hu), float(texture), organ) for n, (name, hu, texture, organ) in enumerate(rows)}


def organ_names() -> dict[int, str]:
    """Label number (1 up) to organ name."""
    return dict(enumerate(dict.fromkeys(t.organ for t in tissues().values() if t.organ), start=1))


def anatomical_phantom(
    generator: np.random.Generator,
    *,
    shape_zyx: IntTriple = (96, 160, 176),
    spacing_xyz_mm: Triple = (2.2, 2.2, 4.0),
    oblique: bool = True,
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid, dict[int, str]]:
    """Draw one patient.

    The default grid shows lower chest to pelvis; a smaller field of view cuts the anatomy off. With ``oblique`` it is
    turned by a few degrees against the patient.

    Returns:
        ``(hu, labels, grid, names)``: int16 Hounsfield units and uint8 organ labels, both (D, H, W); the grid (i runs
        roughly to the patient's left, j to the back, k to the head); and the organ of every label present. Each organ
        is one connected piece.
    """
    grid = _scanner_grid(generator, shape_zyx, spacing_xyz_mm, oblique)
    patient = _Patient(generator, grid)
    patient.paint_trunk()
    patient.paint_chest()
    patient.paint_abdomen()
    patient.paint_skeleton_and_vessels()
    labels = _one_piece_each(patient.tissue)
    present = set(np.unique(labels).tolist())
    names = {number: organ for number, organ in organ_names().items() if number in present}
    return _scan(generator, patient.tissue, grid), labels, grid, names


def _scanner_grid(generator: np.random.Generator, shape_zyx: IntTriple, spacing_xyz_mm: Triple, oblique: bool) -> Grid:
    """A grid about the patient's origin; i runs left, j back, k up, as a CT lying on the back."""
    turn = np.eye(3)
    if oblique:
        for axis, degrees in enumerate(generator.uniform(-1, 1, 3) * (4.0, 3.0, 6.0)):
            angle = math.radians(degrees + math.copysign(1.5, degrees))
            one = np.eye(3)
            a, b = (axis + 1) % 3, (axis + 2) % 3
            one[a, a] = one[b, b] = math.cos(angle)
            one[a, b], one[b, a] = -math.sin(angle), math.sin(angle)
            turn = turn @ one
    middle_vox = (np.array(shape_zyx[::-1]) - 1) / 2
    centre_lps = generator.uniform(-3, 3, 3) + (0.0, 12.0, 0.0)  # a little behind the patient, so that the table shows
    origin = centre_lps - turn @ (middle_vox * np.array(spacing_xyz_mm))
    return Grid(shape_zyx, as_triple(list(spacing_xyz_mm)), as_triple(origin.round(3)), tuple(turn.ravel().tolist()))


class _Patient:
    """Positions of all voxels in the patient, and the tissue painted there so far."""

    def __init__(self, generator: np.random.Generator, grid: Grid) -> None:
        self.generator = generator
        self.grid = grid
        self.tissue: NDArray[np.uint8] = np.zeros(grid.shape_zyx, np.uint8)
        matrix = grid.affine_ras
        k, j, i = np.ogrid[tuple(slice(n) for n in grid.shape_zyx)]
        size = float(generator.uniform(0.96, 1.03))
        self.straight: list[Field] = [
            ((matrix[row, 0] * i + matrix[row, 1] * j + matrix[row, 2] * k + matrix[row, 3]) / size).astype(np.float32)
            for row in range(3)
        ]
        # Bends shared by neighbouring organs, and finer bumps.
        self.r, self.a, self.s = (x + self.noise(70.0, 4.0) + self.noise(28.0, 1.2) for x in self.straight)

    def noise(self, wave_mm: float, amplitude: float) -> Field:
        """(D, H, W) smooth Gaussian noise with bumps about ``wave_mm`` wide."""
        lines = []
        for n, mm in zip(self.grid.shape_zyx, self.grid.spacing_zyx_mm, strict=True):
            knots = np.arange(-1.5, n * mm / wave_mm + 2) * wave_mm
            weights = np.exp(-0.5 * ((np.arange(n)[:, None] * mm - knots) / (0.6 * wave_mm)) ** 2)
            lines.append((weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32))
        z, y, x = lines
        coarse = self.generator.standard_normal((z.shape[1], y.shape[1], x.shape[1]), dtype=np.float32)
        planes = np.tensordot(z, coarse, axes=(1, 0))
        return np.float32(amplitude) * ((y @ planes) @ x.T)

    def paint(self, name: str, mask: Mask) -> None:
        """Put a tissue over whatever is there."""
        self.tissue[mask] = tissues()[name].number

    def ellipsoid(self, centre_ras: Triple, radii_ras: Triple, *, lean: float = 0.0, tilt: float = 0.0) -> Field:
        """Distance from a randomly varied ellipsoid's middle: 1 on its surface.

        ``lean`` moves the axis right per mm up, ``tilt`` forward.
        """
        c = np.asarray(centre_ras) + self.generator.normal(0, 2.0, 3)
        f = np.asarray(radii_ras) * np.exp(self.generator.normal(0, 0.04, 3))
        up = self.s - np.float32(c[2])
        right = (self.r - np.float32(c[0]) - np.float32(lean) * up) / np.float32(f[0])
        front = (self.a - np.float32(c[1]) - np.float32(tilt) * up) / np.float32(f[1])
        return np.sqrt(right**2 + front**2 + (up / np.float32(f[2])) ** 2)

    def tube(self, r: Field | float, a: Field | float, radius: Field | float) -> Mask:
        """Voxels within ``radius`` mm of a line that runs mostly upwards, given by its r and a at each voxel's s."""
        return (self.r - r) ** 2 + (self.a - a) ** 2 < np.square(radius)

    def paint_trunk(self) -> None:
        """Table, skin fat, muscle wall, cavity, and the diaphragm that divides it."""
        r, a, s = self.r, self.a, self.s
        flat_r, flat_a = self.straight[0], self.straight[1]
        bed = flat_a - flat_r**2 / 900
        self.paint("table", (bed > -150) & (bed < -140) & (np.abs(flat_r) < 190))
        width, depth = 172 + 5 * np.sin((s + 60) / 70), 121 + 4 * np.cos(s / 80)
        skin = (np.abs(r) / width) ** 2.4 + (np.abs(a) / depth) ** 2.4
        self.inside: Mask = skin < 1
        self.paint("fat", self.inside)
        wall = (np.abs(r) / (width - 15)) ** 2.4 + (np.abs(a - 2) / (depth - 15)) ** 2.4
        self.paint("muscle", wall < 1)
        self.cavity: Field = (np.abs(r) / (width - 31)) ** 2.3 + (np.abs(a - 9) / (depth - 36)) ** 2.3
        dome_right = 62 - (r - 75) ** 2 / 130 - (a - 14) ** 2 / 95
        dome_left = 48 - (r + 75) ** 2 / 120 - (a - 14) ** 2 / 95
        self.dome: Field = np.maximum(np.maximum(dome_right, dome_left), 34 - r**2 / 300 - (a - 30) ** 2 / 60)
        self.belly: Mask = (self.cavity < 1) & (s < self.dome - 3)
        self.paint("visceral fat", self.belly)

    def paint_chest(self) -> None:
        """Mediastinum, lungs with vessels, heart, windpipe."""
        r, a, s = self.r, self.a, self.s
        chest = (self.cavity < 1) & (s > self.dome)
        self.paint("mediastinum", chest)
        middle = 27 - 10 * np.clip(np.abs(a - 10) / 60, 0, 1)
        lung = chest & (s > self.dome + 3) & (self.cavity < 0.97)
        heart = self.ellipsoid((-22, 24, 92), (56, 45, 58), lean=0.35, tilt=-0.15)
        lung &= heart > 1.08
        threads = (np.abs(self.noise(20.0, 1.0)) < 0.17) & (np.abs(self.noise(20.0, 1.0)) < 0.17)
        for side, mask in (("right", lung & (r > middle)), ("left", lung & (r < -middle))):
            self.paint(f"{side} lung", mask)
            self.paint(f"{side} lung vessel", mask & threads)
        self.paint("mediastinum", (heart < 1.08) & (s > self.dome))
        self.paint("heart muscle", (heart < 1) & (s > self.dome))
        split = self.noise(45.0, 1.0)
        self.paint("heart chamber", (heart < 0.82) & (np.abs(split) > 0.18) & (s > self.dome))
        self.paint("trachea", self.tube(3.0, -22.0, 9.0) & (s > 135))

    def paint_abdomen(self) -> None:
        """Bowel, liver, gallbladder, stomach, spleen and kidneys."""
        r, a, s = self.r, self.a, self.s
        loops = self.noise(19.0, 1.0)
        low = self.belly & (self.cavity < 0.9) & (s < 10) & (a > -35)
        self.paint("bowel", low & (np.abs(loops) > 0.25))
        self.paint("bowel gas", low & (loops > 1.5) & (a > 10))

        stomach = self.ellipsoid((-68, 30, 8), (40, 38, 52), lean=-0.35, tilt=-0.25)
        self.paint("stomach wall", self.belly & (stomach < 1))
        self.paint("stomach content", self.belly & (stomach < 0.88) & (s < self.dome - 6))

        spleen = self.ellipsoid((-108, -30, 8), (32, 46, 54), lean=0.1, tilt=-0.25)
        hilum = self.ellipsoid((-60, 0, 5), (34, 45, 70))
        self.paint("spleen", self.belly & (self.cavity < 0.97) & (spleen < 1) & (hilum > 1))

        right_lobe = self.ellipsoid((72, 8, 2), (78, 86, 82), lean=-0.12)
        left_lobe = self.ellipsoid((2, 44, 18), (72, 36, 34), lean=0.2)
        under = s > -62 + 0.55 * np.clip(105 - r, 0, None) + 0.1 * a
        liver = self.belly & (self.cavity < 0.97) & (((right_lobe < 1) & under) | (left_lobe < 1))
        self.paint("liver", liver)
        veins = (np.abs(self.noise(38.0, 1.0)) < 0.18) & (np.abs(self.noise(38.0, 1.0)) < 0.18)
        self.paint("liver vessel", liver & veins & (self.cavity < 0.85))
        gallbladder = self.ellipsoid((42, 44, -30), (16, 16, 30), tilt=0.3)
        self.paint("visceral fat", self.belly & ~liver & (gallbladder < 1.5))
        self.paint("gallbladder", self.belly & (gallbladder < 1))

        for side, sign, height in (("right", 1.0, -58.0), ("left", -1.0, -42.0)):
            kidney = self.ellipsoid((66 * sign, -44, height), (28, 25, 54), lean=-0.22 * sign, tilt=-0.1)
            sinus = self.ellipsoid((46 * sign, -38, height), (17, 10, 24), lean=-0.22 * sign)
            self.paint("visceral fat", (kidney < 1.22) & (self.cavity < 1.1) & (r * sign > 0))
            self.paint(f"{side} kidney cortex", kidney < 1)
            self.paint(f"{side} kidney medulla", (kidney < 0.78) & (self.noise(14.0, 1.0) > -0.3))
            self.paint("visceral fat", sinus < 1)

    def paint_skeleton_and_vessels(self) -> None:
        """Back muscles, ribs, pelvis, vertebral column with discs and canal, aorta and vena cava."""
        r, a, s = self.r, self.a, self.s
        side = np.abs(r)
        psoas = 10 + np.clip(-s / 9, 0, 13)
        self.paint("muscle", ((side - 36) ** 2 + (a + 58) ** 2 < psoas**2) & (s < 0))
        self.paint("muscle", ((side - 34) / 30) ** 2 + ((a + 90) / 17) ** 2 < 1)
        shell = (self.cavity > 1.04) & (self.cavity < 1.28)  # ribs slope down to the front
        slope = s + 0.45 * a
        band = shell & (np.mod(slope, 27.0) < 11) & (slope > -30 + np.clip(a, 0, None) * 1.0) & (side > 24)
        self.paint("rib", band)
        self.paint("cartilage", band & (a > 62))
        self.paint("rib", (self.cavity > 1.04) & (self.cavity < 1.3) & (side < 20) & (a > 0) & (s > 60))
        hip = np.sqrt(((side - 55) / 68) ** 2 + ((a + 5) / 75) ** 2 + ((s + 212) / 85) ** 2)
        self.paint("pelvis", (np.abs(hip - 1) < 0.07) & (side > 52 - 0.4 * a) & (a < 40) & self.inside)

        bow = 10 * np.cos(s / 85)  # the spine's curve, forward in the lumbar part
        column = np.sqrt((r / 24) ** 2 + ((a + 66 - bow / 2) / 18) ** 2)
        beat = np.mod(s + 8, 34.0)
        self.paint("spongy bone", column < 1)
        self.paint("cortical bone", (column < 1) & ((column > 0.86) | (beat < 9.5) | (beat > 31.5)))
        self.paint("disc", (column < 0.97) & (beat < 7))
        arch_a = a + 93 - bow / 2
        arch = (r**2 + arch_a**2 < 16**2) | ((side < 4) & (arch_a < 0) & (arch_a > -30) & (beat > 12) & (beat < 28))
        arch |= (side < 42) & (np.abs(arch_a - 2) < 5) & (beat > 14) & (beat < 25)
        self.paint("cortical bone", arch & (column >= 1))
        self.paint("canal", self.tube(0.0, -91 + bow / 2, 9.5))

        front = -66 + bow / 2 + 20
        fork = np.clip(-118 - s, 0, None) * 0.45
        off = -12 - np.clip(s / 14, 0, 12)
        self.paint("vena cava", self.tube(19 + fork, front + 12 + np.clip(s / 6, 0, 14), 11.0) & (s < 70))
        depth, radius = front + 12 - np.clip(s / 12, 0, 14), 11.5 - np.clip(fork / 8, 0, 4)
        self.paint("aorta", self.tube(off + fork, depth, radius) | self.tube(off - fork, depth, radius))


def _one_piece_each(tissue: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels of the tissues; fragments that other organs cut off become visceral fat, in ``tissue`` too."""
    numbers = {organ: number for number, organ in organ_names().items()}
    table = np.array([numbers.get(t.organ, 0) for t in tissues().values()], np.uint8)
    labels = table[tissue]
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is None:
            continue
        mask = labels[window] == number
        pieces, count = ndimage.label(mask)
        if count > 1:
            largest = int(np.bincount(pieces.ravel())[1:].argmax()) + 1
            lost = mask & (pieces != largest)
            labels[window][lost] = 0
            tissue[window][lost] = tissues()["visceral fat"].number
    return labels


def _scan(generator: np.random.Generator, tissue: NDArray[np.uint8], grid: Grid) -> NDArray[np.int16]:
    """Hounsfield units as a scanner gives them: texture, blur by the point spread, correlated noise, int16."""
    mean = np.array([t.hu for t in tissues().values()], np.float32)[tissue]
    spread = np.array([t.texture_hu for t in tissues().values()], np.float32)[tissue]
    grain = generator.standard_normal(tissue.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(grain, [max(0.6, 3.0 / mm) for mm in grid.spacing_zyx_mm])
    image = ndimage.gaussian_filter(mean + spread * (grain / grain.std()), [0.55, 0.7, 0.7])
    noise = ndimage.gaussian_filter(generator.standard_normal(tissue.shape, dtype=np.float32), [0.0, 0.55, 0.55])
    image += noise * (13.0 / noise.std())
    return np.clip(np.rint(image), -1024, 2000).astype(np.int16)

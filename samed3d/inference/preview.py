"""A picture of a result: three orthogonal slices through the first prompt, with contours, prompts, directions and a
scale bar.

Slices are drawn in radiological view (the patient's right at the picture's left) whatever the storage order of the
file; an oblique volume is drawn along its own axes. Needs Pillow, imported inside the functions. Not here: anything
interactive (``apps/``).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Triple, as_triple, bounding_region, ijk_to_zyx, zyx_to_ijk
from samed3d.prompts import Box, Lasso, ObjectPrompts, Point, Prompt, Scribble, box_in_grid, path_in_grid, point_in_grid
from samed3d.volume import Volume

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

WIDTH = 1500
_MAX_PANEL_HEIGHT = 900
_MARGIN = 18
_MARKER = 9
_LEGEND_ENTRIES = 24
_DRAW = 2  # everything is drawn this many times larger and then reduced, which smooths all edges
_BACKGROUND, _TEXT, _FAINT = (16, 17, 20), (232, 232, 232), (150, 154, 160)
_POSITIVE, _NEGATIVE, _BOX = (70, 225, 95), (255, 70, 70), (110, 205, 255)
OBJECT_COLOURS: tuple[Colour, ...] = (
    (255, 150, 30),
    (60, 180, 255),
    (190, 110, 255),
    (255, 215, 60),
    (255, 105, 165),
    (45, 215, 190),
    (170, 215, 70),
    (225, 130, 95),
    (130, 150, 255),
    (215, 180, 215),
)


@dataclass(frozen=True)
class Plane:
    """One panel: which canonical axes run down and across, both against the picture, and the letters at its borders."""

    name: str
    down: int
    across: int
    normal: int
    letters: tuple[str, str, str, str]  # left, right, top, bottom


# Canonical z, y, x run to superior, anterior, right; the picture runs to inferior, posterior and left: every axis is
# drawn reversed.
PLANES = (
    Plane("axial", 1, 2, 0, ("R", "L", "A", "P")),
    Plane("coronal", 0, 2, 1, ("R", "L", "S", "I")),
    Plane("sagittal", 0, 1, 2, ("A", "P", "S", "I")),
)


@dataclass
class _Scene:
    """What is drawn, in canonical order."""

    image: NDArray
    labels: NDArray
    spacing_zyx_mm: Triple
    centre_zyx: Triple
    points: list[tuple[Triple, bool]]
    boxes: list[tuple[Triple, Triple]]
    tone: tuple[NDArray[np.float64], NDArray[np.float64]]
    pixels_per_mm: float

    def panel_size(self, plane: Plane) -> tuple[int, int]:
        """Width and height of a panel in drawn pixels."""
        across, down = (
            self.image.shape[a] * self.spacing_zyx_mm[a] * self.pixels_per_mm for a in (plane.across, plane.down)
        )
        return max(1, round(across * _DRAW)), max(1, round(down * _DRAW))

    def to_panel(self, plane: Plane, zyx: Triple) -> tuple[float, float]:
        """Drawn x, y pixel of a canonical voxel position."""
        width, height = self.panel_size(plane)
        x = (1 - (zyx[plane.across] + 0.5) / self.image.shape[plane.across]) * width
        return x, (1 - (zyx[plane.down] + 0.5) / self.image.shape[plane.down]) * height

    def cut(self, array: NDArray, plane: Plane) -> NDArray:
        """The slice of a canonical array through the centre, as the picture shows it."""
        index = min(max(0, round(self.centre_zyx[plane.normal])), array.shape[plane.normal] - 1)
        flat = np.take(array, index, axis=plane.normal)  # keeps the order of the two other axes, down before across
        return flat[::-1, ::-1]

    def is_near(self, plane: Plane, zyx: Triple) -> bool:
        """Whether a position lies within one and a half voxels of the slice, or nearer to it than a marker's arm is
        long.
        """
        off = abs(zyx[plane.normal] - self.centre_zyx[plane.normal])
        return off <= 1.5 or off * self.spacing_zyx_mm[plane.normal] * self.pixels_per_mm <= _MARKER


def write_preview(
    path: str | Path,
    volume: Volume,
    mask: NDArray,
    prompts: Sequence[ObjectPrompts] | Sequence[Prompt],
    *,
    title: str = "",
) -> None:
    """Write a PNG of three slices through the first positive prompt (a point, or the centre of a box).

    Args:
        path: Output file, replaced as a whole.
        volume: The image.
        mask: (D, H, W) mask, or integer label map whose values are object ids; 0 is background.
        prompts: The objects with their prompts, or the prompts of one object.
        title: Text above the slices.

    Raises:
        InputError: if the file cannot be written.
        ValueError: if the mask's shape is not the volume's.
    """
    if mask.shape != volume.array.shape:
        raise ValueError(f"mask must have the volume's shape {volume.array.shape}, got {mask.shape}")
    objects = [p for p in prompts if isinstance(p, ObjectPrompts)]
    loose = [p for p in prompts if not isinstance(p, ObjectPrompts)]
    if loose:
        objects.append(ObjectPrompts(prompts=loose))
    picture = _drawn(_scene(volume, mask, objects), volume, mask, objects, title)
    data = io.BytesIO()
    picture.save(data, "PNG")
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data.getvalue())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _scene(volume: Volume, mask: NDArray, objects: Sequence[ObjectPrompts]) -> _Scene:
    view, grid = volume.view, volume.grid
    points, boxes, firsts = [], [], []
    for prompt in (p for o in objects for p in o.prompts):
        if isinstance(prompt, Point):
            at = view.position_to_canonical(ijk_to_zyx(point_in_grid(prompt, grid)))
            points.append((at, prompt.positive))
            firsts += [at] if prompt.positive else []
        elif isinstance(prompt, Scribble | Lasso):
            path = [view.position_to_canonical(ijk_to_zyx(at)) for at in path_in_grid(prompt, grid)]
            points += [(at, prompt.positive) for at in path]
            firsts += path[len(path) // 2 :][:1] if prompt.positive else []
        elif isinstance(prompt, Box):
            corners = np.array([view.position_to_canonical(ijk_to_zyx(c)) for c in box_in_grid(prompt, grid)])
            boxes.append((as_triple(corners.min(0)), as_triple(corners.max(0))))
            firsts.append(as_triple(corners.mean(0)))
    labels = view.to_canonical(mask)
    image = view.to_canonical(volume.array)
    if not firsts:
        region = bounding_region(labels)
        ends = (region.start_zyx, region.stop_zyx) if not region.is_empty else ((0, 0, 0), image.shape)
        firsts.append(as_triple([(a + b - 1) / 2 for a, b in zip(*ends, strict=True)]))
    d, h, w = np.multiply(image.shape, view.spacing_zyx_mm)
    pixels_per_mm = min((WIDTH - 4 * _MARGIN) / (2 * w + h), _MAX_PANEL_HEIGHT / max(d, h))
    return _Scene(image, labels, view.spacing_zyx_mm, firsts[0], points, boxes, tone_curve(image), float(pixels_per_mm))


def tone_curve(image: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intensities and their grey in [0, 1]: half linear between robust percentiles, half by rank.

    By rank alone would flatten the picture, linear alone would leave CT's soft tissue a few greys between air and bone.
    The darkest voxels (air, zero padding) are left out, so that they do not use up the greys.
    """
    step = tuple(max(1, n // 100) for n in image.shape)
    values = image[:: step[0], :: step[1], :: step[2]].astype(np.float64).ravel()
    low, high = np.percentile(values, [0.5, 99.8])
    tissue = values[values > low + 0.03 * (high - low)]
    ranks = np.linspace(0.5, 99.5, 100)
    knots = np.percentile(tissue if tissue.size > 100 else values, ranks)
    knots, first = np.unique(np.concatenate([[low], knots]), return_index=True)
    grey = np.concatenate([[0.0], ranks / 100])[first]
    linear = (knots - knots[0]) / max(1e-12, knots[-1] - knots[0])
    return knots, 0.5 * (grey + linear)


def _drawn(scene: _Scene, volume: Volume, mask: NDArray, objects: Sequence[ObjectPrompts], title: str) -> Image.Image:
    """The whole picture: title, panels, legend."""
    from PIL import Image, ImageDraw

    sizes = [scene.panel_size(plane) for plane in PLANES]
    legend = _legend(volume, mask, objects)
    margin, row = _MARGIN * _DRAW, 30 * _DRAW
    top = margin + (row + margin // 2 if title else 0)
    panels_height = max(height for _, height in sizes)
    rows = _wrapped([_text_width(text) + 2 * row for _, text in legend], WIDTH * _DRAW - 2 * margin)
    height = top + panels_height + margin + row * (len(rows) + 1)
    picture = Image.new("RGB", (WIDTH * _DRAW, height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((margin, margin), title, fill=_TEXT, font=_font(24))
    gap = (WIDTH * _DRAW - sum(width for width, _ in sizes)) / 4
    x = gap
    for plane, (width, panel_height) in zip(PLANES, sizes, strict=True):
        picture.paste(_panel(scene, plane), (round(x), top + (panels_height - panel_height) // 2))
        x += width + gap
    y = top + panels_height + margin
    for indices in rows:
        x = margin
        for n in indices:
            colour, text = legend[n]
            draw.rounded_rectangle((x, y + 6 * _DRAW, x + 12 * _DRAW, y + 18 * _DRAW), 3 * _DRAW, fill=colour)
            draw.text((x + 19 * _DRAW, y), text, fill=_TEXT, font=_font(18))
            x += _text_width(text) + 2 * row
        y += row
    i, j, k = (round(v) for v in zyx_to_ijk(volume.view.position_to_stored(scene.centre_zyx)))
    note = f"slices through voxel i, j, k = {i}, {j}, {k}   ·   radiological view: R is the patient's right"
    draw.text((margin, y), note, fill=_FAINT, font=_font(16))
    return picture.reduce(_DRAW)


def _legend(volume: Volume, mask: NDArray, objects: Sequence[ObjectPrompts]) -> list[tuple[Colour, str]]:
    """Colour and text of each object that is in the mask or has prompts."""
    counts = np.bincount(mask.ravel().astype(np.int64, copy=False))
    names = {o.id: o.name for o in objects}
    voxel_ml = math.prod(volume.grid.spacing_xyz_mm) / 1000
    lines = []
    for object_id in sorted({int(n) + 1 for n in np.flatnonzero(counts[1:])} | set(names)):
        ml = (counts[object_id] if object_id < counts.size else 0) * voxel_ml
        size = f"{ml:.0f} ml" if ml >= 100 else f"{ml:.3g} ml" if ml >= 0.1 else f"{1000 * ml:.3g} mm\u00b3"
        lines.append((_colour(object_id), f"{names.get(object_id, f'object {object_id}')}  {size}"))
    if len(lines) > _LEGEND_ENTRIES:
        lines[_LEGEND_ENTRIES:] = [(_FAINT, f"and {len(lines) - _LEGEND_ENTRIES} more")]
    return lines


def _wrapped(widths: Sequence[float], available: float) -> list[list[int]]:
    """Indices of legend entries, row by row."""
    rows: list[list[int]] = []
    used = math.inf
    for n, width in enumerate(widths):
        if used + width > available:
            rows.append([])
            used = 0.0
        rows[-1].append(n)
        used += width
    return rows


def _panel(scene: _Scene, plane: Plane) -> Image.Image:
    """One slice with everything on it."""
    from PIL import Image, ImageDraw

    size = scene.panel_size(plane)
    grey = np.interp(scene.cut(scene.image, plane), *scene.tone).astype(np.float32)
    smooth = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)
    panel = Image.fromarray((np.asarray(smooth).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    labels = scene.cut(scene.labels, plane)
    for object_id in np.unique(labels[labels > 0]):
        _draw_object(panel, labels == object_id, _colour(int(object_id)))
    draw = ImageDraw.Draw(panel)
    _draw_prompts(draw, scene, plane)
    _draw_letters(draw, size, plane)
    if plane is PLANES[0]:
        _draw_scale(draw, size, scene.pixels_per_mm * _DRAW)
    return panel


def _draw_object(panel: Image.Image, mask: NDArray[np.bool_], colour: Colour) -> None:
    """Tint a mask and draw its contour, the half level of the mask enlarged to the panel and freed of its voxel
    steps.
    """
    from PIL import Image, ImageChops, ImageFilter

    step = (panel.width / mask.shape[1], panel.height / mask.shape[0])
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # Only the part around the object, cut at whole panel pixels, so that many objects stay quick.
    left, top = max(0, int((columns[0] - 2) * step[0])), max(0, int((rows[0] - 2) * step[1]))
    right = min(panel.width, math.ceil((columns[-1] + 3) * step[0]))
    bottom = min(panel.height, math.ceil((rows[-1] + 3) * step[1]))
    box = (left / step[0], top / step[1], min(mask.shape[1], right / step[0]), min(mask.shape[0], bottom / step[1]))
    flat = Image.fromarray(mask.astype(np.uint8) * 255)
    soft = flat.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=box)
    soft = soft.filter(ImageFilter.GaussianBlur((0.4 * step[0], 0.4 * step[1])))
    inside = soft.point(lambda v: 255 if v > 127 else 0)
    eroded = inside.filter(ImageFilter.MinFilter(2 * _DRAW + 3))
    panel.paste(colour, (left, top), mask=inside.point(lambda v: v // 5))
    panel.paste(colour, (left, top), mask=ImageChops.subtract(inside, eroded))


def _draw_prompts(draw: ImageDraw.ImageDraw, scene: _Scene, plane: Plane) -> None:
    for low, high in scene.boxes:
        if low[plane.normal] - 0.5 <= scene.centre_zyx[plane.normal] <= high[plane.normal] + 0.5:
            corner = scene.to_panel(plane, as_triple([v + 0.5 for v in high]))
            draw.rectangle(
                (*corner, *scene.to_panel(plane, as_triple([v - 0.5 for v in low]))), outline=_BOX, width=2 * _DRAW
            )
    for at, positive in scene.points:
        if scene.is_near(plane, at):
            _draw_marker(draw, scene.to_panel(plane, at), positive)


def _draw_marker(draw: ImageDraw.ImageDraw, at: tuple[float, float], positive: bool) -> None:
    """A green plus or a red cross, on a dark rim that keeps it visible on any ground."""
    x, y = at
    reach = (_MARKER if positive else 0.7 * _MARKER) * _DRAW
    arms = [((-1, 0), (1, 0)), ((0, -1), (0, 1))] if positive else [((-1, -1), (1, 1)), ((-1, 1), (1, -1))]
    for colour, width, extra in (((0, 0, 0), 6, 1.5), (_POSITIVE if positive else _NEGATIVE, 3, 0)):
        r = reach + extra * _DRAW
        for (ax, ay), (bx, by) in arms:
            draw.line((x + ax * r, y + ay * r, x + bx * r, y + by * r), fill=colour, width=width * _DRAW)


def _draw_letters(draw: ImageDraw.ImageDraw, size: tuple[int, int], plane: Plane) -> None:
    width, height = size
    inset = 6 * _DRAW
    places = [
        (inset, height / 2, "lm"),
        (width - inset, height / 2, "rm"),
        (width / 2, inset, "ma"),
        (width / 2, height - inset, "md"),
    ]
    style: dict[str, Any] = {"fill": _TEXT, "font": _font(18), "stroke_width": _DRAW, "stroke_fill": (0, 0, 0)}
    for letter, (x, y, anchor) in zip(plane.letters, places, strict=True):
        draw.text((x, y), letter, anchor=anchor, **style)
    draw.text((inset, inset), plane.name, anchor="la", **(style | {"font": _font(16), "fill": (200, 203, 208)}))


def _draw_scale(draw: ImageDraw.ImageDraw, size: tuple[int, int], pixels_per_mm: float) -> None:
    """A bar of a round length, at most a third of the panel."""
    length = _round_length(size[0] / pixels_per_mm / 3)
    x, y = 10 * _DRAW, size[1] - 12 * _DRAW
    draw.rectangle((x - _DRAW, y - _DRAW, x + length * pixels_per_mm + _DRAW, y + 5 * _DRAW), fill=(0, 0, 0))
    draw.rectangle((x, y, x + length * pixels_per_mm, y + 4 * _DRAW), fill=_TEXT)
    draw.text(
        (x, y - 4 * _DRAW),
        f"{length:g} mm",
        anchor="ld",
        fill=_TEXT,
        font=_font(16),
        stroke_width=_DRAW,
        stroke_fill=(0, 0, 0),
    )


def _round_length(limit: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above ``limit``."""
    power = 10.0 ** math.floor(math.log10(limit))
    return next(float(f"{m * power:.6g}") for m in (5, 2, 1) if m * power <= limit * (1 + 1e-9))


def _colour(object_id: int) -> Colour:
    return OBJECT_COLOURS[(object_id - 1) % len(OBJECT_COLOURS)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size * _DRAW)


def _text_width(text: str) -> float:
    return _font(18).getlength(text)

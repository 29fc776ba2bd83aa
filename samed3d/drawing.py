"""Pictures of volumes: slices in radiological view with mask outlines, prompts, direction letters and a scale bar.

``write_preview`` draws what a session segmented. ``ThreePlanes`` and ``SlicePicture`` draw the slices of that preview,
of the cases of an evaluation report and of the corpus overview. Whatever the storage order of the file, the patient's
right is at the left of a picture and the front or the head at its top; an oblique volume is drawn along its own axes.
Pillow is imported inside the functions. Charts of numbers are in ``pages.py``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samed3d.geometry import Triple, as_triple, bounding_region, ijk_to_zyx, zyx_to_ijk
from samed3d.output import write_bytes
from samed3d.prompts import Box, Lasso, ObjectPrompts, Point, Prompt, Scribble, box_in_grid, path_in_grid, point_in_grid
from samed3d.volume import Volume

if TYPE_CHECKING:
    from PIL import Image, ImageFont

OBJECT_COLOURS = (
    *("#ff961e", "#3cb4ff", "#be6eff", "#ffd73c", "#ff69a5"),
    *("#2dd7be", "#aad746", "#e1825f", "#8296ff", "#d7b4d7"),
)
"""Colours of new objects by their number, in sessions, previews and viewers."""
PREDICTION, TRUTH = OBJECT_COLOURS[:2]
POSITIVE, NEGATIVE = "#46e15f", "#ff4646"
SOFT_TISSUE_HU = (-160.0, 240.0)
PREVIEW_WIDTH = 1500
"""Pixels of a preview."""
BACKGROUND = "#101114"
Shown = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Start and stop in voxels of what is shown, along each axis; voxel i reaches from i to i + 1."""

_MAX_PANEL_HEIGHT, _MARGIN, _LINE = 900, 18, 30
_LEGEND_ENTRIES = 24
_TEXT, _FAINT_TEXT = "#e8e8e8", "#969aa0"
_ENLARGED = 2  # slices are drawn this many times larger and then reduced, which smooths all edges


def colour_of(object_id: int) -> str:
    """The colour ``#rrggbb`` that an object has at first; ids begin at 1."""
    return OBJECT_COLOURS[(object_id - 1) % len(OBJECT_COLOURS)]


@dataclass(frozen=True)
class Plane:
    """A viewing plane: which canonical axes run down and across (both against the picture), and the border letters."""

    name: str
    down: int
    across: int
    normal: int
    letters: tuple[str, str, str, str]  # left, right, top, bottom


# Canonical z, y, x run to superior, anterior and right; every axis is drawn reversed.
PLANES = (
    Plane("axial", 1, 2, 0, ("R", "L", "A", "P")),
    Plane("coronal", 0, 2, 1, ("R", "L", "S", "I")),
    Plane("sagittal", 0, 1, 2, ("A", "P", "S", "I")),
)


def grey_range(values: NDArray, object_values: NDArray | None = None) -> tuple[float, float]:
    """The intensities of an image that are drawn black and white.

    Values look like Hounsfield units where at least one in a hundred is that of air (under -700) and some are over 200:
    then the range is the soft-tissue window, widened to hold most of the outlined object's own values (lung, bone). Any
    other image is drawn between its 1st and 99.5th percentile.
    """
    thinned = values[tuple(slice(None, None, max(1, n // 100)) for n in values.shape)].astype(np.float64)
    if np.mean(thinned < -700) > 0.01 and thinned.max() > 200:
        low, high = SOFT_TISSUE_HU
        if object_values is not None and object_values.size:
            own_low, own_high = np.percentile(object_values, [5, 95])
            low, high = min(low, float(own_low)), max(high, float(own_high))
        return low, high
    low, high = (float(v) for v in np.percentile(thinned, [1, 99.5]))
    if not high > low:
        low, high = float(thinned.min()), float(thinned.max())
    return low, high if high > low else low + 1.0


class SlicePicture:
    """One slice of a volume, drawn step by step: grey values, outlines, prompts, text."""

    def __init__(
        self, values: NDArray, spacing_mm: ArrayLike, pixels_per_mm: float, greys: tuple[float, float], shown: Shown
    ) -> None:
        """Draw (down, across) intensities along two canonical axes; ``greys`` are those drawn black and white.

        The part of the slice that is ``shown`` may go beyond the slice; ``pixels_per_mm`` are of the finished picture.
        """
        from PIL import Image

        low, self.high = shown
        self.scale = np.asarray(spacing_mm, float) * pixels_per_mm * _ENLARGED
        self.shape = np.array(values.shape)
        self.mm_per_pixel = 1 / pixels_per_mm
        height, width = (max(_ENLARGED, round(n)) for n in (self.high - low) * self.scale)
        self.picture = Image.new("RGB", (width, height), BACKGROUND)
        box = self._pixels(np.zeros(2), self.shape)
        share = (np.asarray(self._sample(values, box)) - greys[0]) / (greys[1] - greys[0])
        self.picture.paste(Image.fromarray((255 * share.clip(0, 1)).astype(np.uint8)), box[:2])

    def place(self, position: ArrayLike) -> tuple[float, float]:
        """Pixel x, y, before reduction, of a position (down, across) whose whole numbers are voxel centres."""
        y, x = (self.high - 0.5 - np.asarray(position)) * self.scale
        return float(x), float(y)

    def outline(self, mask: NDArray[np.bool_], colour: str, tint: float = 0.0) -> None:
        """Draw the border of a (down, across) mask, the half level of the interpolated mask, on a dark rim.

        ``tint`` is the opacity of the colour inside, 0 to 1.
        """
        from PIL import Image, ImageChops, ImageFilter

        if not mask.any():
            return
        used = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
        start = np.maximum([u[0] - 2 for u in used], 0)
        left, top, right, bottom = self._pixels(start, np.minimum([u[-1] + 3 for u in used], self.shape))
        if left >= right or top >= bottom:
            return
        soft = 255 * np.asarray(self._sample(mask, (left, top, right, bottom))).clip(0, 1)
        blur = ImageFilter.GaussianBlur((0.4 * self.scale[1], 0.4 * self.scale[0]))
        inside = Image.fromarray(soft.astype(np.uint8)).filter(blur).point(lambda v: 255 if v > 127 else 0)
        if tint:
            self.picture.paste(colour, (left, top), mask=inside.point(lambda v: round(tint * v)))
        inner = inside.filter(ImageFilter.MinFilter(5))
        for ink, width in (("#000000", 5), (colour, 3)):
            rim = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(width)), inner)
            self.picture.paste(ink, (left, top), mask=rim)

    def mark(self, prompt: Prompt, positions: NDArray[np.float64], near: bool = True) -> None:
        """Draw a point, the rectangle of a box or the line of a scribble or lasso; fainter if it is not ``near`` this
        slice.

        ``positions`` are (n, 2) of the point, the two corners or the path, as in ``place``.
        """
        from PIL import ImageDraw

        draw = ImageDraw.Draw(self.picture)
        if isinstance(prompt, Box):
            corners = (*self.place(positions.max(0) + 0.5), *self.place(positions.min(0) - 0.5))
            draw.rectangle(corners, outline=POSITIVE, width=2 * _ENLARGED)
            return
        positive = bool(getattr(prompt, "positive", True))
        colour = POSITIVE if positive else NEGATIVE
        colour = colour if near else _fainter(colour)
        if not isinstance(prompt, Point):
            closed = [*positions, positions[0]] if isinstance(prompt, Lasso) else positions
            draw.line([self.place(p) for p in closed], fill=colour, width=2 * _ENLARGED)
            return
        x, y = self.place(positions[0])
        reach = (8 if near else 5) * (1 if positive else 0.75)
        arms = ((1, 0), (0, 1)) if positive else ((1, 1), (1, -1))
        for ink, width, more in (("#000000", 5, 1), (colour, 2.5, 0)):
            r = (reach + more) * _ENLARGED
            for a, b in arms:
                draw.line((x - a * r, y - b * r, x + a * r, y + b * r), fill=ink, width=round(width * _ENLARGED))

    def finish(self, plane: Plane | None = None, text_px: int = 0, scale: bool = False) -> Image.Image:
        """The picture at its final size, with the plane's name and letters and a scale bar if asked for."""
        from PIL import ImageDraw

        picture = self.picture.reduce(_ENLARGED)
        if plane is None or not text_px:
            return picture
        draw, (width, height), inset = ImageDraw.Draw(picture), picture.size, 6
        style: dict[str, Any] = {"font": _font(text_px), "fill": _TEXT, "stroke_width": 1, "stroke_fill": "#000000"}
        left, right, top, bottom = plane.letters
        draw.text((inset, height / 2), left, anchor="lm", **style)
        draw.text((width - inset, height / 2), right, anchor="rm", **style)
        draw.text((width / 2, inset), top, anchor="ma", **style)
        draw.text((width / 2, height - inset), bottom, anchor="md", **style)
        draw.text((inset, inset), plane.name, anchor="la", **style)
        if scale:
            length = round_length(width * self.mm_per_pixel / 3)
            x, y = inset + 2, height - inset - 4
            draw.rectangle((x, y, x + length / self.mm_per_pixel, y + 3), fill=_TEXT)
            told = f"{length:g} mm" if length >= 0.1 else f"{1000 * length:g} \u00b5m"
            draw.text((x, y - 3), told, anchor="ld", **style)
        return picture

    def _pixels(self, start: NDArray, stop: NDArray) -> tuple[int, int, int, int]:
        """Left, top, right and bottom pixel of a range of voxels, clipped to the picture."""
        top, left = np.floor((self.high - stop) * self.scale).clip(0).astype(int)
        bottom, right = np.ceil((self.high - start) * self.scale).astype(int)
        return int(left), int(top), min(int(right), self.picture.width), min(int(bottom), self.picture.height)

    def _sample(self, values: NDArray, box: tuple[int, int, int, int]) -> Image.Image:
        """The slice interpolated at the pixels of a box that lies inside it; float32."""
        from PIL import Image

        reversed_values = Image.fromarray(np.ascontiguousarray(values[::-1, ::-1], np.float32))
        left, top, right, bottom = box
        pixels = np.array(((top, left), (bottom, right)))
        (v0, u0), (v1, u1) = (self.shape - self.high + pixels / self.scale).clip(0, self.shape)
        size = (max(1, right - left), max(1, bottom - top))
        return reversed_values.resize(size, Image.Resampling.BICUBIC, box=(u0, v0, u1, v1))


@dataclass
class ThreePlanes:
    """What three planes show, on canonical axes: a part of an image, in voxels, with outlines and prompts."""

    image: NDArray
    spacing_zyx_mm: Triple
    centre_zyx: Triple
    shown: Shown
    outlined: list[tuple[NDArray, Callable[[int], str]]]  # label maps, and the colour of each value
    marks: list[tuple[Prompt, NDArray[np.float64]]]
    greys: tuple[float, float]
    pixels_per_mm: float

    def draw(self, plane: Plane, tint: float, text_px: int, far_marks: bool) -> Image.Image:
        """One plane; ``far_marks`` adds, fainter, the points and paths of other slices."""
        n, axes = plane.normal, [plane.down, plane.across]
        index = min(max(0, round(self.centre_zyx[n])), self.image.shape[n] - 1)
        spacing, shown = np.asarray(self.spacing_zyx_mm)[axes], (self.shown[0][axes], self.shown[1][axes])
        picture = SlicePicture(self.image.take(index, n), spacing, self.pixels_per_mm, self.greys, shown)
        for labels, colour in self.outlined:
            flat = labels.take(index, n)
            for value in np.unique(flat[flat > 0]):
                picture.outline(flat == value, colour(int(value)), tint)
        for prompt, zyx in self.marks:
            if isinstance(prompt, Box):
                near = zyx[:, n].min() - 0.5 <= index <= zyx[:, n].max() + 0.5
            else:
                distance = np.abs(zyx[:, n] - index).min()
                near = distance <= 1.5 or distance * self.spacing_zyx_mm[n] * self.pixels_per_mm <= 8
            if near or (far_marks and not isinstance(prompt, Box)):
                picture.mark(prompt, zyx[:, axes], bool(near))
        return picture.finish(plane, text_px, scale=plane is PLANES[0])


def write_preview(
    path: str | Path, volume: Volume, mask: NDArray, objects: Sequence[ObjectPrompts], *, title: str = ""
) -> None:
    """Write a PNG of three slices through the first positive prompt (a point, or the centre of a box).

    The picture shows the objects and prompts with a margin of half their extent, not the whole image. ``mask`` is a
    (D, H, W) mask, or an integer label map whose values are object ids; 0 is background.

    Raises:
        InputError: if the file cannot be written.
        ValueError: if the mask's shape is not the volume's.
    """
    if mask.shape != volume.array.shape:
        raise ValueError(f"mask must have the volume's shape {volume.array.shape}, got {mask.shape}")
    scene = _preview_planes(volume, mask, [p for o in objects for p in o.prompts])
    panels = [scene.draw(plane, tint=0.2, text_px=18, far_marks=False) for plane in PLANES]
    i, j, k = (round(v) for v in zyx_to_ijk(volume.view.position_to_stored(scene.centre_zyx)))
    note = f"slices through voxel i, j, k = {i}, {j}, {k}   \u00b7   radiological view: R is the patient's right"
    write_bytes(path, png_bytes(_sheet(panels, title, _legend(volume, mask, objects), note)))


def round_length(limit: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above ``limit``."""
    power = 10.0 ** math.floor(math.log10(limit))
    return next(float(f"{m * power:.6g}") for m in (5, 2, 1) if m * power <= limit * (1 + 1e-9))


def _preview_planes(volume: Volume, mask: NDArray, prompts: Sequence[Prompt]) -> ThreePlanes:
    """The box around all objects and prompts with a margin, and the slices through the first positive prompt."""
    image, labels = volume.view.to_canonical(volume.array), volume.view.to_canonical(mask)
    spacing, marks = np.asarray(volume.view.spacing_zyx_mm), prompt_positions(volume, prompts)
    region = bounding_region(labels)
    ends = [zyx + 0.5 for _, zyx in marks]
    if not region.is_empty or not ends:
        ends.append(np.array([(0, 0, 0), image.shape] if region.is_empty else [region.start_zyx, region.stop_zyx]))
    low, high = np.concatenate(ends).min(0), np.concatenate(ends).max(0)
    margin = np.maximum(0.5 * max((high - low) * spacing) / spacing, 8)
    low, high = np.maximum(low - margin, 0), np.minimum(high + margin, image.shape)
    centre = ends[-1].mean(0) - 0.5
    for prompt, zyx in marks[::-1]:
        if getattr(prompt, "positive", True):
            centre = zyx.mean(0) if isinstance(prompt, Box) else zyx[len(zyx) // 2]
    d, h, w = (high - low) * spacing
    pixels_per_mm = float(min((PREVIEW_WIDTH - 4 * _MARGIN) / (2 * w + h), _MAX_PANEL_HEIGHT / max(d, h)))
    greys = grey_range(image, image[labels > 0])
    outlined: list[tuple[NDArray, Callable[[int], str]]] = [(labels, colour_of)]
    at, spacing_mm = as_triple(centre), volume.view.spacing_zyx_mm
    return ThreePlanes(image, spacing_mm, at, (low, high), outlined, marks, greys, pixels_per_mm)


def prompt_positions(volume: Volume, prompts: Sequence[Prompt]) -> list[tuple[Prompt, NDArray[np.float64]]]:
    """Each drawn prompt with its canonical positions (n, 3): one of a point, two corners of a box, a path."""
    grid = volume.grid
    found: list[tuple[Prompt, NDArray[np.float64]]] = []
    for prompt in prompts:
        if isinstance(prompt, Point):
            ijk = [point_in_grid(prompt, grid)]
        elif isinstance(prompt, Box):
            ijk = list(box_in_grid(prompt, grid))
        elif isinstance(prompt, Scribble | Lasso):
            ijk = list(path_in_grid(prompt, grid))
        else:
            continue
        found.append((prompt, np.array([volume.view.position_to_canonical(ijk_to_zyx(at)) for at in ijk])))
    return found


def _legend(volume: Volume, mask: NDArray, objects: Sequence[ObjectPrompts]) -> list[tuple[str, str]]:
    """Colour and text of each object that is in the mask or has prompts."""
    counts = np.bincount(mask.ravel().astype(np.int64, copy=False))
    names = {o.id: o.name for o in objects}
    voxel_ml = math.prod(volume.grid.spacing_xyz_mm) / 1000
    lines = []
    for object_id in sorted({int(n) + 1 for n in np.flatnonzero(counts[1:])} | set(names)):
        ml = (counts[object_id] if object_id < counts.size else 0) * voxel_ml
        size = f"{ml:.0f} ml" if ml >= 100 else f"{ml:.3g} ml" if ml >= 0.1 else f"{1000 * ml:.3g} mm\u00b3"
        lines.append((colour_of(object_id), f"{names.get(object_id, f'object {object_id}')}  {size}"))
    if len(lines) > _LEGEND_ENTRIES:
        lines[_LEGEND_ENTRIES:] = [(_FAINT_TEXT, f"and {len(lines) - _LEGEND_ENTRIES} more")]
    return lines


def _sheet(panels: Sequence[Image.Image], title: str, legend: Sequence[tuple[str, str]], note: str) -> Image.Image:
    """A preview: title, panels side by side, legend, note."""
    from PIL import Image, ImageDraw

    top = _MARGIN + (_LINE + _MARGIN // 2 if title else 0)
    tallest = max(panel.height for panel in panels)
    places, x, y = [], _MARGIN, top + tallest + _MARGIN
    for _, text in legend:
        width = round(_font(18).getlength(text)) + 2 * _LINE
        if x + width > PREVIEW_WIDTH - _MARGIN and x > _MARGIN:
            x, y = _MARGIN, y + _LINE
        places.append((x, y))
        x += width
    y += _LINE if legend else 0
    picture = Image.new("RGB", (PREVIEW_WIDTH, y + _LINE), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_TEXT, font=_font(24))
    gap = (PREVIEW_WIDTH - sum(panel.width for panel in panels)) / (len(panels) + 1)
    left = gap
    for panel in panels:
        picture.paste(panel, (round(left), top + (tallest - panel.height) // 2))
        left += panel.width + gap
    for (colour, text), at in zip(legend, places, strict=True):
        draw.rounded_rectangle((at[0], at[1] + 6, at[0] + 12, at[1] + 18), 3, fill=colour)
        draw.text((at[0] + 19, at[1]), text, fill=_TEXT, font=_font(18))
    draw.text((_MARGIN, y), note, fill=_FAINT_TEXT, font=_font(16))
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _fainter(colour: str) -> str:
    return "#" + "".join(f"{round(0.55 * int(colour[n : n + 2], 16) + 40):02x}" for n in (1, 3, 5))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)

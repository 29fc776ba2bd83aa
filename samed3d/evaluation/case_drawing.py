"""One case as a picture: three planes around a structure, the contours of truth and prediction, and the prompts that
were given.

Drawn like the preview of a result (``inference/preview.py``: radiological view, the same greys), but close to the
structure and with two contours that may cross: blue the label, orange the prediction. Planes go through the slice of
each axis in which the label is largest. Needs Pillow, imported inside the functions. Read ``pictures.py`` for which
cases are drawn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.geometry import Triple, as_triple, bounding_region, ijk_to_zyx
from samed3d.inference.preview import PLANES, Plane, tone_curve
from samed3d.prompts import Box, Point, Prompt, Scribble, box_in_grid, path_in_grid, point_in_grid
from samed3d.volume import Volume

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

EDGE = 250
"""Pixels of a panel; three stand side by side."""
TRUTH, PREDICTION = (90, 175, 255), (255, 140, 40)
_POSITIVE, _NEGATIVE, _BOX = (80, 235, 110), (255, 80, 80), (240, 240, 240)
_GAP, _FINE = 4, 2  # drawn twice as large, then reduced
_BACKGROUND = (16, 17, 20)


def case_png(
    volume: Volume, truth: NDArray[np.bool_], prediction: NDArray[np.bool_] | None, prompts: Sequence[Prompt]
) -> bytes:
    """A PNG of three panels.

    Args:
        volume: The image.
        truth: (D, H, W) bool in the file's own order, with at least one voxel.
        prediction: The mask that was made, same shape; None draws the label alone.
        prompts: In the order they were given; a mark off the slice is drawn faint.
    """
    from PIL import Image

    view = volume.view
    image, target = view.to_canonical(volume.array), view.to_canonical(truth)
    answer = None if prediction is None else view.to_canonical(prediction)
    centre = tuple(int(target.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))
    spacing = view.spacing_zyx_mm
    window = _window(target, answer, spacing)
    marks = _marks(volume, prompts)
    tone = tone_curve(image)
    picture = Image.new("RGB", (3 * EDGE + 2 * _GAP, EDGE), _BACKGROUND)
    for number, plane in enumerate(PLANES):
        panel = _Panel(plane, centre[plane.normal], window, spacing)
        drawn = _draw(panel, image, target, answer, marks, tone)
        picture.paste(drawn.reduce(_FINE), (number * (EDGE + _GAP), 0))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the address of an image in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


class _Panel:
    """One slice of the window: which voxels it shows, and where a voxel is drawn. Axes run against the picture, as in
    the preview.
    """

    def __init__(self, plane: Plane, index: int, window: tuple[Triple, float], spacing: Triple) -> None:
        self.plane, self.index, self.spacing = plane, index, spacing
        self.middle, self.edge_mm = window
        self.size = EDGE * _FINE

    def place(self, zyx: Sequence[float]) -> tuple[float, float]:
        """Drawn x, y of a canonical voxel position."""
        x, y = (
            self.size * (0.5 - (zyx[axis] - self.middle[axis]) * self.spacing[axis] / self.edge_mm)
            for axis in (self.plane.across, self.plane.down)
        )
        return x, y

    def sample(self, array: NDArray, index: int | None = None) -> NDArray[np.float32]:
        """The slice of a canonical array by linear interpolation, (size, size), 0 outside the image."""
        flat = np.take(array, self.index if index is None else index, axis=self.plane.normal).astype(np.float32)
        for axis, along in ((self.plane.down, 0), (self.plane.across, 1)):
            steps = (0.5 - (np.arange(self.size) + 0.5) / self.size) * self.edge_mm / self.spacing[axis] + self.middle[
                axis
            ]
            flat = _interpolated(flat, steps, along)
        return flat


def _draw(
    panel: _Panel,
    image: NDArray,
    target: NDArray,
    answer: NDArray | None,
    marks: Sequence[tuple[str, NDArray[np.float64]]],
    tone: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Image.Image:
    from PIL import Image, ImageDraw

    inside = panel.sample(np.ones(image.shape, np.uint8)) > 0.5
    grey = np.where(inside, np.interp(panel.sample(image), *tone), 0.06)
    drawn = Image.fromarray((grey.clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    for mask, colour in ((target, TRUTH), (answer, PREDICTION)):
        if mask is not None:
            _contour(drawn, panel.sample(mask), colour, 0.4 * panel.size * min(panel.spacing) / panel.edge_mm)
    draw = ImageDraw.Draw(drawn)
    for kind, at in marks:
        _mark(draw, panel, kind, at)
    _scale(draw, panel)
    return drawn


def _contour(drawn: Image.Image, soft: NDArray[np.float32], colour: tuple[int, int, int], blur: float) -> None:
    """The half level of an interpolated mask, freed of its voxel steps by a blur (in pixels), on a dark rim."""
    from PIL import Image, ImageChops, ImageFilter

    smooth = Image.fromarray((255 * soft).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    inside = smooth.point(lambda v: 255 if v > 127 else 0)
    for ink, width in (((0, 0, 0), 7), (colour, 5)):
        rim = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(3)), inside.filter(ImageFilter.MinFilter(width)))
        drawn.paste(ink, (0, 0), mask=rim)


def _marks(volume: Volume, prompts: Sequence[Prompt]) -> list[tuple[str, NDArray[np.float64]]]:
    """Kind and canonical positions of each prompt: one for a point, two corners for a box, the path of a stroke."""
    view, grid = volume.view, volume.grid
    found = []
    for prompt in prompts:
        if isinstance(prompt, Point):
            kind, ijk = "positive" if prompt.positive else "negative", [point_in_grid(prompt, grid)]
        elif isinstance(prompt, Box):
            kind, ijk = "box", list(box_in_grid(prompt, grid))
        elif isinstance(prompt, Scribble):
            kind, ijk = "stroke", path_in_grid(prompt, grid)
        else:
            continue
        found.append((kind, np.array([view.position_to_canonical(ijk_to_zyx(at)) for at in ijk])))
    return found


def _mark(draw: ImageDraw.ImageDraw, panel: _Panel, kind: str, at: NDArray[np.float64]) -> None:
    axis = panel.plane.normal
    if kind == "box":
        low, high = at.min(0) - 0.5, at.max(0) + 0.5
        if low[axis] <= panel.index <= high[axis]:
            draw.rectangle((*panel.place(high), *panel.place(low)), outline=_BOX, width=_FINE)
        return
    near = bool(np.abs(at[:, axis] - panel.index).min() <= 1.5)
    if kind == "stroke":
        draw.line([panel.place(p) for p in at], fill=_POSITIVE if near else _faint(_POSITIVE), width=2 * _FINE)
        return
    x, y = panel.place(at[0])
    reach = (7 if near else 4.5) * _FINE
    colour = _POSITIVE if kind == "positive" else _NEGATIVE
    arms = [(1, 0), (0, 1)] if kind == "positive" else [(0.7, 0.7), (0.7, -0.7)]
    for ink, width, more in (((0, 0, 0), 4.5, _FINE), (colour if near else _faint(colour), 2.5, 0)):
        for a, b in arms:
            r = reach + more
            draw.line((x - a * r, y - b * r, x + a * r, y + b * r), fill=ink, width=round(width * _FINE))


def _scale(draw: ImageDraw.ImageDraw, panel: _Panel) -> None:
    """A bar of a round length in the first panel, the name of the plane in each."""
    from PIL import ImageFont

    font = ImageFont.load_default(12 * _FINE)
    draw.text(
        (5 * _FINE, 4 * _FINE), panel.plane.name, fill=(210, 213, 218), font=font, stroke_width=1, stroke_fill=(0, 0, 0)
    )
    if panel.plane is PLANES[0]:
        power = 10.0 ** np.floor(np.log10(panel.edge_mm / 3))
        length = next(m * power for m in (5, 2, 1) if m * power <= panel.edge_mm / 3)
        x, y = 6 * _FINE, panel.size - 8 * _FINE
        draw.rectangle(
            (x, y, x + length / panel.edge_mm * panel.size, y + 2 * _FINE), fill=(235, 235, 235), outline=(0, 0, 0)
        )
        told = f"{length:g} mm"
        draw.text(
            (x, y - 3 * _FINE),
            told,
            anchor="ld",
            fill=(235, 235, 235),
            font=font,
            stroke_width=1,
            stroke_fill=(0, 0, 0),
        )


def _window(target: NDArray, answer: NDArray | None, spacing: Triple) -> tuple[Triple, float]:
    """Middle (canonical voxels) and edge (mm) of the cube that is shown: the label with room, and as much of the
    prediction as fits.
    """
    region = bounding_region(target)
    extent = max(n * s for n, s in zip(region.shape_zyx, spacing, strict=True))
    middle = as_triple([(a + b - 1) / 2 for a, b in zip(region.start_zyx, region.stop_zyx, strict=True)])
    reach = 0.75 * extent
    if answer is not None and answer.any():
        other = bounding_region(answer)
        ends = zip(other.start_zyx, other.stop_zyx, middle, spacing, strict=True)
        reach = max(reach, min(1.5 * extent, max(max(m - a, b - 1 - m) * s for a, b, m, s in ends)))
    return middle, float(max(2.1 * reach, 10 * max(spacing)))


def _interpolated(flat: NDArray[np.float32], steps: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    """Values at fractional positions along one axis; 0 outside."""
    size = flat.shape[axis]
    low = np.floor(steps).astype(np.int64)
    share = (steps - low).astype(np.float32)
    shape = (-1, 1) if axis == 0 else (1, -1)
    inside = ((steps >= -0.5) & (steps <= size - 0.5)).astype(np.float32)
    a, b = (np.take(flat, np.clip(n, 0, size - 1), axis=axis) for n in (low, low + 1))
    return (a * (1 - share).reshape(shape) + b * share.reshape(shape)) * inside.reshape(shape)


def _faint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (round(0.55 * c + 40) for c in colour)
    return r, g, b

"""Charts as inline SVG: click curves with bands, differences with intervals, spreads of seconds.

Drawn here so that a report needs no other file and no library: colours are CSS variables of the page (``page.py``), so
one drawing serves light, dark and paper; every mark has a ``<title>`` with its number, and series differ by marker and
dash as well as by colour. Nothing is computed here but positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 8
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_CHARACTER = 6.9  # mean width of a letter at 12 px


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Shown in the legend.
        x: Positions.
        y: Values; nan is left out.
        low: Lower ends of the intervals, nan where there is none.
        high: Upper ends.
        style: Number of its colour, marker and dash: the same model has the same in every chart.
        notes: Added to each mark's title.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Spread:
    """How numbers of one kind are spread: five percentiles (5, 25, 50, 75, 95) under a label."""

    label: str
    percentiles: tuple[float, float, float, float, float]
    style: int = 0


@dataclass(frozen=True)
class Difference:
    """One line of a chart of differences: a mean with the ends of its interval (nan for none)."""

    label: str
    mean: float
    low: float
    high: float
    note: str = ""


@dataclass
class _Canvas:
    """Marks of one drawing, and the scales that place them."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)
    marks: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        a, b = self.x_range
        return self.left + (value - a) / ((b - a) or 1.0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        a, b = self.y_range
        return self.height - self.bottom - (value - a) / ((b - a) or 1.0) * (self.height - self.top - self.bottom)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.marks.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(
        self, x: float, y: float, text: str, kind: str = "label", anchor: str = "middle", turn: bool = False
    ) -> None:
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.marks.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'
        )

    def svg(self, title: str) -> str:
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"'
        return (
            f'<svg class="chart" {size} role="img" aria-label="{escape(title, quote=True)}">{"".join(self.marks)}</svg>'
        )


def click_chart(
    series: Sequence[Series], title: str, y_label: str = "Dice", *, small: bool = False, bands: bool = True
) -> str:
    """Scores in [0, 1] over clicks, one line per series, intervals as bands, a legend at the right unless ``small``.

    Args:
        series: The lines, at least one.
        title: Above the chart.
        y_label: Name of the score.
        small: For a grid of charts, whose legend stands above it.
        bands: Draw intervals.
    """
    ticks = sorted({x for s in series for x in s.x})
    longest = max((len(s.name) for s in series), default=0)
    legend = 0.0 if small else 58 + min(longest, 34) * _CHARACTER
    width, height = (264.0, 196.0) if small else (396.0 + legend, 310.0)
    pad = 0.06 * max(1.0, ticks[-1] - ticks[0])
    canvas = _Canvas(width, height, 42, 10 + legend, 30, 38, (ticks[0] - pad, ticks[-1] + pad))
    canvas.text(canvas.left, 17, _cut(title, int((width - canvas.left) / 6.8)), "title", "start")
    for value in (0.0, 0.25, 0.5, 0.75, 1.0) if small else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        canvas.line(canvas.left, canvas.y(value), width - canvas.right, canvas.y(value), "grid" if value else "axis")
        canvas.text(canvas.left - 6, canvas.y(value) + 4, f"{value:g}", anchor="end")
    for number, value in enumerate(ticks):
        if len(ticks) <= 12 or number % 2 == 0:
            canvas.text(canvas.x(value), height - canvas.bottom + 16, "prompt" if value == 0 else f"{value:g}")
    canvas.text((canvas.left + width - canvas.right) / 2, height - 6, "clicks")
    canvas.text(11, (canvas.top + height - canvas.bottom) / 2, y_label, turn=True)
    for s in series:
        if bands:
            _band(canvas, s)
    for s in series:
        _curve(canvas, s, 2.6 if small else 3.6)
    if not small:
        for number, s in enumerate(series):
            y = canvas.top + 10 + 20 * number
            canvas.marks.append(_key(width - legend + 6, y, s.style))
            canvas.text(width - legend + 38, y + 4, _cut(s.name, 34), anchor="start")
    return canvas.svg(title)


def legend_of(names: Sequence[tuple[str, int]]) -> str:
    """A legend as HTML, for a grid of charts: names with their styles."""
    entries = [
        f'<span><svg width="30" height="12" aria-hidden="true">{_key(1, 6, style)}</svg>{escape(name)}</span>'
        for name, style in names
    ]
    return f'<p class="legend">{"".join(entries)}</p>'


def difference_chart(lines: Sequence[Difference], title: str, x_label: str) -> str:
    """Differences with their intervals, one under the other, around a line at zero.

    Args:
        lines: From top to bottom.
        title: Above.
        x_label: What is subtracted from what.
    """
    ends = [v for d in lines for v in (d.mean, d.low, d.high) if not math.isnan(v)]
    step = _round_step(max([0.05, *map(abs, ends)]))
    reach = step * math.ceil(max([0.05, *map(abs, ends)]) / step)
    left = 24 + min(60, max(len(d.label) for d in lines)) * _CHARACTER
    canvas = _Canvas(left + 430, 66 + 26 * len(lines), left, 70, 30, 36, (-reach, reach))
    canvas.text(8, 17, title, "title", "start")
    bottom = canvas.height - canvas.bottom
    for number in range(-round(reach / step), round(reach / step) + 1):
        value = number * step
        canvas.line(canvas.x(value), canvas.top, canvas.x(value), bottom, "grid" if number else "axis")
        canvas.text(canvas.x(value), bottom + 15, f"{value:+.3g}" if number else "0")
    canvas.text(canvas.x(0), canvas.height - 5, x_label)
    for number, d in enumerate(lines):
        y = canvas.top + 13 + 26 * number
        told = f"{d.label}: {d.mean:+.3f}{interval_text(d.low, d.high)} {d.note}".strip()
        canvas.text(left - 10, y + 4, _cut(d.label, 60), anchor="end")
        canvas.marks.append(f"<g><title>{escape(told)}</title>")
        if not math.isnan(d.low):
            canvas.line(canvas.x(d.low), y, canvas.x(d.high), y, "whisker s0")
        canvas.marks.append(f'<circle class="dot s0" cx="{canvas.x(d.mean):.1f}" cy="{y:.1f}" r="4.5"/></g>')
        canvas.text(canvas.width - 62, y + 4, f"{d.mean:+.3f}", anchor="start")
    return canvas.svg(title)


def spread_chart(lines: Sequence[Spread], title: str, x_label: str) -> str:
    """Spreads on a logarithmic axis: a thin line from the 5th to the 95th percentile, a bar between quartiles, a mark
    at the median.

    Args:
        lines: From top to bottom; percentiles above zero.
        title: Above.
        x_label: With its unit.
    """
    logs = [math.log10(v) for s in lines for v in s.percentiles]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = high if high > low else low + 1
    left = 24 + min(60, max(len(s.label) for s in lines)) * _CHARACTER
    canvas = _Canvas(left + 460, 66 + 26 * len(lines), left, 80, 30, 36, (low, high))
    canvas.text(8, 17, title, "title", "start")
    bottom = canvas.height - canvas.bottom
    for power in range(low, high + 1):
        canvas.line(canvas.x(power), canvas.top, canvas.x(power), bottom, "axis" if power == low else "grid")
        canvas.text(canvas.x(power), bottom + 15, f"{10.0**power:g}")
    canvas.text((canvas.x(low) + canvas.x(high)) / 2, canvas.height - 5, x_label)
    for number, s in enumerate(lines):
        y = canvas.top + 13 + 26 * number
        a, b, c, d, e = (canvas.x(math.log10(v)) for v in s.percentiles)
        colour = f"s{s.style % COLOURS}"
        told = f"{s.label}: median {seconds_text(s.percentiles[2])}, 5 % to 95 %: {seconds_text(s.percentiles[0])} to "
        canvas.text(left - 10, y + 4, _cut(s.label, 60), anchor="end")
        canvas.marks.append(f"<g><title>{escape(told + seconds_text(s.percentiles[4]))}</title>")
        canvas.line(a, y, e, y, f"whisker {colour}")
        canvas.marks.append(
            f'<rect class="bar {colour}" x="{b:.1f}" y="{y - 6:.1f}" width="{max(1.0, d - b):.1f}" height="12" rx="2"/>'
        )
        canvas.line(c, y - 8, c, y + 8, "median")
        canvas.marks.append("</g>")
        canvas.text(canvas.width - 70, y + 4, seconds_text(s.percentiles[2]), anchor="start")
    return canvas.svg(title)


def interval_text(low: float, high: float, form: str = "+.3f") -> str:
    """`` [low, high]``, or nothing where there is no interval."""
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:{form}}, {high:{form}}]"


def seconds_text(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 0.9995:
        return (
            f"{1000 * seconds:.0f} ms"
            if seconds >= 0.0095
            else f"{1000 * seconds:.1f} ms"
            if seconds >= 0.001
            else "under 1 ms"
        )
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def _band(canvas: _Canvas, s: Series) -> None:
    """The area between the ends of the intervals, in the pieces that have both."""
    known = [(x, a, b) for x, a, b in zip(s.x, s.low, s.high, strict=False) if not (math.isnan(a) or math.isnan(b))]
    if len(known) == 1:
        x, a, b = known[0]
        canvas.line(canvas.x(x), canvas.y(a), canvas.x(x), canvas.y(b), f"whisker s{s.style % COLOURS}")
    elif known:
        outline = [(x, b) for x, _, b in known] + [(x, a) for x, a, _ in reversed(known)]
        points = " ".join(f"{canvas.x(x):.1f},{canvas.y(y):.1f}" for x, y in outline)
        canvas.marks.append(f'<polygon class="band s{s.style % COLOURS}" points="{points}"/>')


def _curve(canvas: _Canvas, s: Series, radius: float) -> None:
    """Line and marks of one series."""
    at = [n for n, y in enumerate(s.y) if not math.isnan(y)]
    points = " ".join(f"{canvas.x(s.x[n]):.1f},{canvas.y(s.y[n]):.1f}" for n in at)
    canvas.marks.append(f'<polyline class="curve s{s.style % COLOURS}" {_dash(s.style)} points="{points}"/>')
    for n in at:
        ends = interval_text(s.low[n], s.high[n], ".3f") if s.low else ""
        note = f", {s.notes[n]}" if s.notes else ""
        told = f"{s.name}, {s.x[n]:g} clicks: {s.y[n]:.3f}{ends}{note}"
        canvas.marks.append(_marker(canvas.x(s.x[n]), canvas.y(s.y[n]), s.style, radius, told))


def _key(x: float, y: float, style: int) -> str:
    """A piece of a series' line with its marker, 26 wide."""
    line = f'<line class="curve s{style % COLOURS}" {_dash(style)} x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}"/>'
    return line + _marker(x + 13, y, style, 3.4)


def _dash(style: int) -> str:
    dash = _DASHES[(style // 2 + style // COLOURS) % len(_DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _marker(x: float, y: float, style: int, radius: float, told: str = "") -> str:
    """Circle, square, triangle or diamond."""
    r = radius
    shapes: tuple[list[tuple[float, float]], ...] = (
        [],
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    )
    corners = shapes[style % len(shapes)]
    title = f"<title>{escape(told)}</title>" if told else ""
    kind = f'class="dot s{style % COLOURS}"'
    if not corners:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{r}">{title}</circle>'
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon {kind} points="{points}">{title}</polygon>'


def _round_step(reach: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides the reach into two to five."""
    power = 10.0 ** math.floor(math.log10(reach / 2))
    return next(m * power for m in (1, 2, 5, 10) if reach / (m * power) <= 4)


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "\u2026"

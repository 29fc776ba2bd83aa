"""HTML pages made by Jinja2 and charts drawn by matplotlib, as SVG; a page is one file that needs no network.

Both packages belong to the extra ``samed3d[evaluate]`` and are imported inside the functions. Within a page the colours
of a chart become CSS variables, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from samed3d.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = str | tuple[str, str]
"""Text, or text with a smaller line below it."""

SERIES_COLOURS = ("#0068a8", "#c04f00", "#00805c", "#b0578e", "#8a6d00", "#2f8fc4", "#6b4bb5", "#555555")
"""Eight colours that colour-blind readers tell apart (after Okabe and Ito 2008), for a white ground."""
TEXT, FAINT, GRID = "#1d1f21", "#5d6268", "#e6e8ea"
_VARIABLES = {
    **{colour: f"var(--s{n})" for n, colour in enumerate(SERIES_COLOURS)},
    **{TEXT: "var(--text)", FAINT: "var(--faint)", GRID: "var(--grid)"},
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "samed3d",
}


@dataclass(frozen=True)
class Table:
    """A table of a page; the first ``left`` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    left: int = 1

    def as_text(self, intervals: bool = False) -> str:
        """Columns of equal width, words to the left and numbers to the right, with or without ``intervals``."""
        rows = [
            [cell if isinstance(cell, str) else " ".join(cell).strip() if intervals else cell[0] for cell in row]
            for row in (self.head, *self.rows)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{text:{'<' if n < self.left else '>'}{widths[n]}}" for n, text in enumerate(row)).rstrip()
            for row in rows
        )


def check_installed(what: str, *packages: str) -> None:
    """Refuse to begin ``what``, such as ``"a report"``, without the packages that it needs.

    Raises:
        InputError: if one of the packages is not installed.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(f"{what} needs {' and '.join(missing)}; install with: pip install 'samed3d[evaluate]'")


def render(template: str, **values: Any) -> str:
    """The text of a page from a file in ``samed3d/templates``; every value is escaped.

    Raises:
        InputError: if Jinja2 is not installed.
    """
    check_installed("a page", "jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("samed3d", "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(values) + "\n"


@contextmanager
def chart(
    width_px: float, height_px: float, *, left: float, right: float = 12, bottom: float = 40, top: float = 28
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes and margins in pixels; inside the block matplotlib has the style of the pages.

    Raises:
        InputError: if matplotlib is not installed.
    """
    check_installed("a chart", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width_px / 96, height_px / 96))
        size = ((width_px - left - right) / width_px, (height_px - bottom - top) / height_px)
        yield figure, figure.add_axes((left / width_px, bottom / height_px, *size))


def svg_of(figure: Figure, ground: str = "white") -> str:
    """A figure as the text of an SVG file; called in the block of ``chart``."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None}, facecolor=ground)
    return data.getvalue()


def svg_in_page(figure: Figure, label: str) -> Any:
    """A figure as an ``<svg>`` element that a template does not escape; called in the block of ``chart``.

    ``label`` describes it for readers who do not see it.
    """
    from markupsafe import Markup, escape

    text = svg_of(figure, ground="none")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names would recur in each drawing of a page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text.replace("<svg", f'<svg class="chart" role="img" aria-label="{escape(label)}"', 1))


def count(number: int, noun: str) -> str:
    """``"1 click"``, ``"3 clicks"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A time in ms or s with two or three digits; empty for nan."""
    if math.isnan(seconds):
        return ""
    if seconds >= 0.9995:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 0.001:
        return "under 1 ms"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.0095 else f"{1000 * seconds:.1f} ms"


def interval_text(low: float, high: float, form: str = "+.3f") -> str:
    """``[low, high]``, empty where there is no interval."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{low:{form}}, {high:{form}}]"

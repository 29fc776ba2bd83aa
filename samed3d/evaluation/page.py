"""One self-contained HTML page: head, style, tables. It opens without a network, in light and dark, and prints.

No script and no outside resource: what is folded away uses ``<details>``, what is told on pointing uses ``title``. Read
``report.py`` and
``compare.py`` for the pages that are made with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from samed3d.errors import InputError

# Eight colours that colour-blind readers tell apart (after Okabe and Ito 2008), darker on white and lighter on black.
_LIGHT = ("#0068a8", "#c04f00", "#00805c", "#b0578e", "#8a6d00", "#2f8fc4", "#6b4bb5", "#555555")
_DARK = ("#56b4f0", "#ff9a4d", "#3ccf9f", "#e695c6", "#e3c23f", "#9bd4f5", "#b79cf2", "#b5b5b5")

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1d1f21; --faint: #5d6268; --rule: #dcdfe2; --grid: #e6e8ea;
  --warn: #fff4d6; --warn-edge: #d9a400; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1b1e22; --text: #e6e7e9; --faint: #a0a6ad; --rule: #363b41;
  --grid: #2b3036; --warn: #362c10; --warn-edge: #b58a00; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; } h3 { font-size: 16px; margin: 26px 0 6px; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
p { max-width: 92ch; margin: 8px 0; } ul { margin: 8px 0; padding-left: 22px; }
.faint, figcaption { color: var(--faint); font-size: 13.5px; max-width: 100ch; } figcaption { padding-top: 5px; }
a { color: var(--s0); } nav a { margin-right: 16px; white-space: nowrap; } nav { margin: 14px 0; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.warn { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: 8px 12px; border-radius: 3px; max-width: 100ch; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; margin: 10px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 11px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: top; }
th { font-weight: 600; color: var(--faint); vertical-align: bottom; } th:first-child, td:first-child, .l { text-align: left; }
td.wrap { white-space: normal; min-width: 14ch; } td small { display: block; color: var(--faint); font-size: 12px; line-height: 1.25; }
tbody tr:hover { background: color-mix(in srgb, var(--text) 5%, transparent); }
figure { margin: 14px 0; } .charts { display: flex; flex-wrap: wrap; gap: 13px; }
svg.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, "Segoe UI", Roboto, sans-serif; fill: var(--faint); } svg text.title { font-size: 13px; font-weight: 600;
  fill: var(--text); } svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--faint); } svg .curve { fill: none; stroke-width: 2; }
svg .whisker { stroke-width: 2; }
svg .median { stroke: var(--text); stroke-width: 2; }
COLOURS
svg.chart .band { stroke: none; fill-opacity: .15; } svg.chart .bar { stroke: none; fill-opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; max-width: none; font-size: 14px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); gap: 16px; }
.cases figure { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 10px; margin: 0; }
.cases img { width: 100%; height: auto; display: block; border-radius: 3px; } .cases figcaption { padding-top: 7px; color: var(--text); }
.cases figcaption span { color: var(--faint); }
summary { cursor: pointer; color: var(--faint); } details { margin: 8px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 8px 0; } dt { color: var(--faint); } dd { margin: 0;
  overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #000; --faint: #444; --rule: #bbb; --grid: #ddd;
  LIGHT }
  @page { margin: 13mm; } main { max-width: none; padding: 0; } nav, details:not([open]) { display: none; } body { font-size: 11px; }
  .scroll { overflow: visible; } table { font-size: 9px; } td small { font-size: 8px; } th, td { padding: 2px 5px; }
  h2 { margin-top: 22px; } svg, tr, .cases figure { break-inside: avoid; } h2, h3, .legend { break-after: avoid; }
  .charts { display: block; } .charts svg { display: inline-block; max-width: 32%; margin: 0 3px 3px 0; }
  .charts svg:only-child { max-width: 65%; } .cases { grid-template-columns: 1fr 1fr; gap: 8px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    styles = "\n".join(
        f"svg .s{n} {{ stroke: var(--s{n}); }} svg :is(.dot, .band, .bar).s{n} {{ fill: var(--s{n}); }}"
        for n in range(8)
    )
    style = _STYLE.replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK)).replace("COLOURS", styles)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{escape(title)}</title><style>{style}</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body><main>{body}</main></body></html>\n'


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of cells that are HTML already; the first ``left`` columns are words, the others numbers."""
    kinds = [' class="l"' if n < left else "" for n in range(len(head))]
    titles = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, head, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Content behind a line to open."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def pairs(entries: Sequence[tuple[str, str]]) -> str:
    """Names with their values, both plain text."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries) + "</dl>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; its line breaks are spaces."""
    text = " ".join(text.split())
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--s{n}: {colour};" for n, colour in enumerate(colours))

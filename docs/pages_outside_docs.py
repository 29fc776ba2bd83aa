"""mkdocs hook: adds pages of the repository that lie outside ``docs/`` to the site and points links at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"card.md": "checkpoints/README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Any, *, config: Any) -> Any:
    """Add each page of ``PAGES``; its links to ``docs/`` become links within the site."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("../docs/", "").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the pages of ``PAGES``."""
    for name, source in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    return markdown

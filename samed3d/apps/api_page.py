"""The page ``/docs``: every route of the OpenAPI description, without scripts and without anything from another
site.
"""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;background:#14171c;color:#dfe4ea}
h2{margin:1.8rem 0 .4rem;font-size:1.05rem;color:#9fb3c8;text-transform:uppercase;letter-spacing:.06em}
details{border-bottom:1px solid #2a313b;padding:.35rem 0}summary{cursor:pointer}code{color:#8fd3ff}b{display:inline-block;width:4.2rem}
a{color:#8fd3ff}pre{white-space:pre-wrap;background:#1c2128;padding:.6rem;border-radius:.4rem}
"""


def api_page(description: dict[str, Any]) -> str:
    """An OpenAPI description as HTML.

    Args:
        description: What ``/openapi.json`` answers.
    """
    groups: dict[str, list[str]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            groups.setdefault((operation.get("tags") or ["other"])[0], []).append(
                _operation(method, path, operation, description)
            )
    info = description["info"]
    body = "".join(f"<h2>{escape(name)}</h2>{''.join(entries)}" for name, entries in groups.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API</title><style>{_STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>{body}"
    )


def _operation(method: str, path: str, operation: dict[str, Any], description: dict[str, Any]) -> str:
    head = f"<b>{method.upper()}</b><code>{escape(path)}</code> {escape(operation.get('summary', ''))}"
    lines = [
        f"{p['name']} ({p['in']}{', required' if p.get('required') else ''})" for p in operation.get("parameters", [])
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        lines.append(f"body {kind}: {_schema(content.get('schema', {}), description)}")
    return f"<details><summary>{head}</summary><pre>{escape(chr(10).join(lines) or 'no parameters')}</pre></details>"


def _schema(schema: dict[str, Any], description: dict[str, Any]) -> str:
    for choice in schema.get("anyOf", []):
        if "$ref" in choice:
            schema = choice
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    fields = schema.get("properties")
    if not fields:
        return str(schema.get("format") or schema.get("type") or "any")
    needed = schema.get("required", [])
    return "{" + ", ".join(f"{name}{'' if name in needed else '?'}" for name in fields) + "}"

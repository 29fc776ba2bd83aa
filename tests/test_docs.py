"""The documentation: tutorials and notebooks run as they are written, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ("tutorial_click", "tutorial_finetune", "tutorial_evaluate")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def reader(monkeypatch, tmp_path) -> Path:
    """An empty folder to work in, with ``samed3d`` on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", PROGRAMS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page of ``docs/``."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", TUTORIALS)
def test_every_command_of_a_tutorial_works_as_written(page, reader):
    commands = blocks(page, "bash")
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for code in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    for name in re.findall(r"`(out/\w+/[\w.]+)`", (ROOT / "docs" / f"{page}.md").read_text()):
        assert (reader / name).exists(), f"{page} names {name}, which its commands did not write"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, reader):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'samed3d[docs]'")
    import nbformat

    body = nbformat.read(notebook, as_version=4)
    assert not [cell for cell in body.cells if cell.get("outputs")], "notebooks are kept without outputs"
    nbclient.NotebookClient(body, timeout=1200, resources={"metadata": {"path": str(reader)}}).execute()
    shown = [
        output for cell in body.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert shown, "a notebook draws what it did"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'samed3d[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'samed3d[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    assert "samed3d.Session" in page and "undo" in page


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/]+\.md)$", text, flags=re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed

"""Copies the volume viewer (NiiVue, pinned in ``viewer/package-lock.json``) and the checkpoints into the package.

``make``, pip and wheel builds run it; the viewer needs npm and a network once. Without npm the package is built without
it. This file imports nothing of the project, because setuptools loads it alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools.command.build_py import build_py

VIEWER = Path(__file__).resolve().parent / "viewer"
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
BUILT = Path("vendor") / "niivue.js"
PUBLISHED = Path("node_modules/@niivue/niivue/dist/index.js")
COMMAND = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
NPM_SECONDS = 120
_REMEDY = "check the network, then run: make viewer"

logger = logging.getLogger(__name__)


class ViewerError(RuntimeError):
    """npm is missing or failed; the message says which."""


def fetch(into: Path = VIEWER) -> Path:
    """Install the pinned viewer with npm and copy its build, with a notice, to ``into``; an existing copy is kept.

    Raises:
        ViewerError: if npm is missing or fails.
    """
    target = into / BUILT
    if target.is_file():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise ViewerError("npm is not on this machine; install node, then run: make viewer")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(VIEWER / name, folder)
        command = [npm, *COMMAND]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ViewerError(f"npm did not answer within {NPM_SECONDS} s; {_REMEDY}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ViewerError(f"npm could not install the viewer ({reason}); {_REMEDY}")
        body = (Path(folder) / PUBLISHED).read_bytes()
        version = json.loads((Path(folder) / "package.json").read_text())["dependencies"]["@niivue/niivue"]
    target.parent.mkdir(parents=True, exist_ok=True)
    source = f"NiiVue {version}, https://github.com/niivue/niivue; licence in ../LICENSE.niivue"
    (target.parent / "NOTICE").write_text(f"{source}; sha256 of niivue.js:\n{hashlib.sha256(body).hexdigest()}\n")
    partial = target.with_name("niivue.js.part")
    partial.write_bytes(body)
    partial.replace(target)
    return target


class BuildPackage(build_py):
    """``build_py`` that adds the viewer, where npm is installed, and the checkpoints of the source tree."""

    def run(self) -> None:
        """Build, then add the viewer's files and the checkpoints."""
        try:
            fetch()
        except ViewerError as error:
            logger.warning("building without the web viewer: %s", error)
        super().run()
        if not self.editable_mode:  # an editable installation uses the source tree's own checkpoints
            shutil.copytree(CHECKPOINTS, Path(self.build_lib) / "samed3d" / "checkpoints", dirs_exist_ok=True)
            recipe = Path(self.build_lib) / "samed3d" / "configs" / "finetune.yaml"
            recipe.parent.mkdir(exist_ok=True)
            shutil.copyfile(CHECKPOINTS.parent / "configs" / "finetune.yaml", recipe)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="samed3d: %(message)s")
    try:
        logger.info("viewer in %s", fetch())
    except ViewerError as error:
        raise SystemExit(f"samed3d: error: {error}") from None

"""Programs and servers of others, behind the same face: a command that is run per prompt, a server that speaks the
nnInteractive protocol.

A command gets files: the image, all prompts of the structure so far as our JSON (``docs/click.md``, ijk), and where to
write the mask. Nothing is passed through a shell. Read ``contender.py`` for the face.
"""

from __future__ import annotations

import importlib
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.contender import Clickable, Contender
from samed3d.geometry import Triple, ijk_to_zyx
from samed3d.prompts import Box, ObjectPrompts, Point, Prompt, Scribble, box_in_grid, dump_prompts, point_in_grid
from samed3d.volume import Volume, write_volume
from samed3d.volume.label_maps import EmptyLabelError, grid_difference, read_label_map

PLACES = ("{image}", "{prompts}", "{out}")


class ExternalProgram(Contender):
    """``--external "command {image} {prompts} {out}"``."""

    def __init__(self, command: str, timeout_seconds: float = 600.0) -> None:
        """Split the command as a shell would, without running one.

        Raises:
            InputError: if a place for a file is missing.
        """
        super().__init__(f"external:{command}", frozenset({"point", "box", "scribble"}))
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--external cannot be read as a command ({error}): {command}") from error
        if missing := [place for place in PLACES if not any(place in word for word in self._words)]:
            raise InputError(
                f"--external needs {' '.join(PLACES)} in the command, {' '.join(missing)} missing: {command}"
            )
        self._timeout = timeout_seconds

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """The image goes to a file of its own; the truth does not."""
        return _Program(self._words, volume, self._timeout)


class _Program:
    def __init__(self, words: list[str], volume: Volume, timeout: float) -> None:
        self._words, self._volume, self._timeout = words, volume, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="samed3d-external-")
        self._image = Path(self._folder.name) / "image.nii.gz"
        write_volume(self._image, volume.array, volume.grid)
        self._prompts: dict[int, list[Prompt]] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Run the program with all prompts of the object."""
        listed = self._prompts.setdefault(object_id, [])
        listed.append(prompt)
        prompts, out = (Path(self._folder.name) / name for name in ("prompts.json", "mask.nii.gz"))
        out.unlink(missing_ok=True)
        dump_prompts([ObjectPrompts(1, "structure", listed)], prompts)
        files = dict(zip(PLACES, (self._image, prompts, out), strict=True))
        words = list(self._words)
        for place, path in files.items():
            words = [word.replace(place, str(path)) for word in words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=self._timeout, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"external program did not run: {error}") from error
        if done.returncode != 0 or not out.exists():
            said = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise InputError(
                f"external program ended with code {done.returncode} and {'a' if out.exists() else 'no'} mask: {said}"
            )
        self._masks[object_id] = self._read(out)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        return self._masks[object_id]

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            array, grid = read_label_map(path)
        except EmptyLabelError:
            return np.zeros(self._volume.grid.shape_zyx, np.uint8)
        if difference := grid_difference(self._volume.grid, grid):
            raise InputError(
                f"mask of the external program must lie on the image's grid ({difference}); write it with the image's header"
            )
        return (array > 0).astype(np.uint8)


class NnInteractiveServer(Contender):
    """``--server URL``: a server that speaks the nnInteractive protocol, through the client that its authors
    publish.
    """

    def __init__(self, url: str) -> None:
        """Find the client.

        Raises:
            InputError: if it is not installed.
        """
        super().__init__(f"server:{url}", frozenset({"point", "box", "scribble"}))
        self._url = url
        try:
            remote = importlib.import_module("nnInteractive.inference.remote")
        except ImportError as error:
            raise InputError("--server needs the client of nnInteractive: pip install nninteractive-client") from error
        self._connect: Any = remote.nnInteractiveRemoteInferenceSession

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """The image is sent with the first prompt of each object."""
        return _Served(self._session, volume)

    def _session(self) -> Any:
        try:
            return self._connect(self._url)
        except Exception as error:  # whatever the client's HTTP library raises
            raise InputError(f"server cannot be used: {self._url} ({type(error).__name__}: {error})") from error


class _Served:
    """One session of the server per object, because the protocol holds one object at a time."""

    def __init__(self, connect: Callable[[], Any], volume: Volume) -> None:
        self._connect, self._volume = connect, volume
        self._sessions: dict[int, tuple[Any, NDArray[np.uint8]]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Send a prompt; positions are indices of the (D, H, W) array that the server was sent."""
        if object_id not in self._sessions:
            self._sessions[object_id] = self._begun()
        session, _ = self._sessions[object_id]
        grid = self._volume.grid
        if isinstance(prompt, Point):
            session.add_point_interaction(_nearest(point_in_grid(prompt, grid)), prompt.positive)
        elif isinstance(prompt, Box):
            low, high = (_nearest(corner) for corner in box_in_grid(prompt, grid))
            if not session.supported_interactions.get("bbox3d"):  # then boxes lie in one slice: the middle one
                low[0] = high[0] = (low[0] + high[0]) // 2
            session.add_bbox_interaction([[a, b + 1] for a, b in zip(low, high, strict=True)], True)
        elif isinstance(prompt, Scribble):
            painted = np.zeros(grid.shape_zyx, np.uint8)
            for at in prompt.path:
                painted[tuple(_nearest(at))] = 1
            session.add_scribble_interaction(painted, prompt.positive)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        return (self._sessions[object_id][1] > 0).astype(np.uint8)

    def _begun(self) -> tuple[Any, NDArray[np.uint8]]:
        session = self._connect()
        session.set_image(self._volume.array[None], {"spacing": np.array(self._volume.grid.spacing_zyx_mm)})
        buffer = np.zeros(self._volume.grid.shape_zyx, np.uint8)
        session.set_target_buffer(buffer)
        return session, buffer


def _nearest(ijk: Triple) -> list[int]:
    """The zyx voxel of an ijk position."""
    return [int(np.floor(v + 0.5)) for v in ijk_to_zyx(ijk)]

"""Common interface of everything that can be evaluated: models, baselines, external programs and servers.

A ``Method`` opens a volume and returns a ``MethodSession``, which takes prompts and returns masks.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES, BaselineSession, nearest_voxel
from samed3d.evaluation.meter import Cost, Meter
from samed3d.geometry import as_triple
from samed3d.inference.session import Session
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptableModel, SemanticModel
from samed3d.models.weights import find_checkpoint, list_checkpoints
from samed3d.prompts import Box, ObjectPrompts, Point, Prompt, Scribble, box_in_grid, dump_prompts, point_in_grid
from samed3d.volume import Volume, write_volume
from samed3d.volume.label_maps import EmptyLabelError, grid_difference, read_label_map

NO_PROMPT = "no_prompt:"
RANDOM_WEIGHTS = " (random weights)"
PLACEHOLDERS = ("{image}", "{prompts}", "{out}")
ALL_PROMPTS = frozenset({"point", "box", "scribble"})
TIMEOUT_SECONDS = 600.0


class MethodSession(Protocol):
    """One opened volume: a ``Session``, a baseline, an external program, a server."""

    def add(self, prompt: Prompt, object_id: int = 1) -> Any:
        """Take a prompt."""

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """The object's mask after all prompts so far, (D, H, W)."""


class Method(ABC):
    """Something that can be evaluated.

    Attributes:
        takes: Kinds of prompt that may come first, of ``"point" "box" "scribble"``; ``{"none"}`` for models without
            prompts.
        model: The network, for protocols that choose the crop themselves; None for all others.
        knows_truth: Whether it is a bound, made from the reference mask.
        fingerprint: Changes when its weights do.
    """

    model: Any = None
    knows_truth: bool = False
    fingerprint: str = ""
    device: str = "cpu"

    def __init__(self, name: str, takes: frozenset[str], meter: Meter | None = None) -> None:
        self.name, self.takes, self.meter = name, takes, meter or Meter()

    @abstractmethod
    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """Begin on a volume. ``truth`` is for bounds only."""


class MeteredSession:
    """A method's session on one volume; every prompt is timed and every mask is checked."""

    def __init__(self, session: MethodSession, volume: Volume, name: str, meter: Meter | None = None) -> None:
        """``meter`` None measures no cost."""
        self._session, self._shape, self._name, self._meter = session, volume.grid.shape_zyx, name, meter

    @classmethod
    def open(cls, method: Method, volume: Volume, truth: NDArray[np.bool_]) -> MeteredSession:
        """Open a volume; the time that this takes counts for no prompt."""
        return cls(method.open(volume, truth), volume, method.name, method.meter)

    def give(self, prompts: Sequence[Prompt], object_id: int = 1) -> tuple[NDArray[np.bool_], Cost]:
        """Give prompts and take the object's whole mask (D, H, W).

        Raises:
            InputError: if the mask is not on the image's grid.
        """
        with self._meter.running() if self._meter else contextlib.nullcontext(Cost()) as cost:
            for prompt in prompts:
                self._session.add(prompt, object_id=object_id)
            mask = self._session.mask_of(object_id)
        if mask.shape != self._shape:
            raise InputError(
                f"mask of {self._name!r} must have the image's shape {self._shape} (D, H, W), got {mask.shape}"
            )
        return mask.astype(bool), cost


class ModelMethod(Method):
    """A promptable network through ``Session``: the same crops and pasting as a user gets."""

    def __init__(self, name: str, model: Any, device: str = "cpu", fingerprint: str = "") -> None:
        """Wrap a ``PromptableModel``, or any object with ``spec``, ``encode``, ``decode``, ``eval`` and ``to``.

        Raises:
            InputError: if the model lacks one of these.
        """
        lacks = [part for part in ("spec", "encode", "decode", "eval", "to") if not hasattr(model, part)]
        if lacks:
            raise InputError(
                f"a model to measure needs spec, encode, decode, eval and to; {name!r} lacks {', '.join(lacks)}"
            )
        # A session gives strokes to a model that takes points as points along them.
        takes = frozenset(model.spec.prompts) & {"point", "box"}
        super().__init__(name, takes | ({"scribble"} if "point" in takes else set()), Meter(model))
        self.model, self.device, self.fingerprint = cast(PromptableModel, model), device, fingerprint

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """A session."""
        return Session(volume, self.model, self.device)


class SemanticMethod(Method):
    """A semantic segmentation model, which takes no prompts; only the protocol ``automatic`` evaluates it."""

    def __init__(self, name: str, model: SemanticModel, device: str = "cpu", fingerprint: str = "") -> None:
        super().__init__(name, frozenset({"none"}))
        self.model, self.device, self.fingerprint = model, device, fingerprint

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """Raises ``InputError``: there is nothing to prompt."""
        raise InputError(f"model {self.name!r} takes no prompt; it is measured by protocol automatic")


class BaselineMethod(Method):
    """A method without training."""

    def __init__(self, name: str, **settings: float) -> None:
        """One of ``BASELINES`` (what follows an ``@`` in the name is free), with constants other than its own."""
        self._baseline, self._settings = name.partition("@")[0], settings
        super().__init__(name, BASELINES[self._baseline].takes)
        self.knows_truth = BASELINES[self._baseline].knows_truth

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> BaselineSession:
        """The baseline on a volume."""
        return BaselineSession(self._baseline, volume, truth, **self._settings)


class _MisledSession:
    """Moves every prompt to a random place, the same prompt always to the same place."""

    def __init__(self, inner: MethodSession, volume: Volume) -> None:
        self._inner, self._size = inner, volume.grid.size_ijk
        self.mask_of = inner.mask_of

    def add(self, prompt: Prompt, object_id: int = 1) -> Any:
        if isinstance(prompt, Point) and not prompt.positive:
            return None  # a click off the object would still tell where the object is not
        seed = hashlib.sha256(repr((prompt, self._size)).encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        if isinstance(prompt, Box):
            edges = [int(b - a) for a, b in zip(prompt.min, prompt.max, strict=True)]
            low = [float(rng.integers(0, max(n - e, 1))) for n, e in zip(self._size, edges, strict=True)]
            high = [min(a + e, n - 1.0) for a, e, n in zip(low, edges, self._size, strict=True)]
            return self._inner.add(Box(as_triple(low), as_triple(high)), object_id=object_id)
        at = as_triple([float(rng.integers(n)) for n in self._size])
        return self._inner.add(Point(at), object_id=object_id)


class NoPrompt(Method):
    """The control without a prompt: the same method, prompted at random places. Its score needs no prompt at all."""

    def __init__(self, inner: Method) -> None:
        super().__init__(f"{NO_PROMPT}{inner.name}", inner.takes, inner.meter)
        self._inner, self.fingerprint = inner, inner.fingerprint

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """The inner method's session with moved prompts."""
        return _MisledSession(self._inner.open(volume, truth), volume)


class ExternalProgram(Method):
    """``--external "command {image} {prompts} {out}"``: a command that runs after every prompt.

    It gets files: the image, all prompts of the structure so far as JSON (``docs/click.md``, ijk), and where to write
    the mask. Nothing is passed through a shell.
    """

    def __init__(self, command: str) -> None:
        """Split the command as a shell would, without running one.

        Raises:
            InputError: if a placeholder for a file is missing.
        """
        super().__init__(f"external:{command}", ALL_PROMPTS)
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--external cannot be read as a command ({error}): {command}") from error
        if missing := [place for place in PLACEHOLDERS if not any(place in word for word in self._words)]:
            raise InputError(
                f"--external needs {' '.join(PLACEHOLDERS)} in the command, {' '.join(missing)} missing: {command}"
            )

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """Write the image to a file of its own."""
        return _ProgramSession(self._words, volume)


class _ProgramSession:
    def __init__(self, words: list[str], volume: Volume) -> None:
        self._words, self._grid = words, volume.grid
        self._folder = tempfile.TemporaryDirectory(prefix="samed3d-external-")
        names = ("image.nii.gz", "prompts.json", "mask.nii.gz")
        self._files = dict(zip(PLACEHOLDERS, (Path(self._folder.name) / name for name in names), strict=True))
        write_volume(self._files["{image}"], volume.array, volume.grid)
        self._prompts: dict[int, list[Prompt]] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Run the program with all prompts of the object."""
        prompts, out = self._prompts.setdefault(object_id, []), self._files["{out}"]
        prompts.append(prompt)
        out.unlink(missing_ok=True)
        dump_prompts([ObjectPrompts(1, "structure", prompts)], self._files["{prompts}"])
        words = self._words
        for place, path in self._files.items():
            words = [word.replace(place, str(path)) for word in words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"external program did not run: {error}") from error
        if done.returncode != 0 or not out.exists():
            said = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            found = "a" if out.exists() else "no"
            raise InputError(f"external program ended with code {done.returncode} and {found} mask: {said}")
        try:
            array, grid = read_label_map(out)
        except EmptyLabelError:
            array, grid = np.zeros(self._grid.shape_zyx, np.uint8), self._grid
        if difference := grid_difference(self._grid, grid):
            raise InputError(
                f"mask of the external program must lie on the image's grid ({difference}); write it with its header"
            )
        self._masks[object_id] = (array > 0).astype(np.uint8)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        return self._masks[object_id]


class NnInteractiveServer(Method):
    """``--server URL``: a server of the nnInteractive protocol, through the client that its authors publish."""

    def __init__(self, url: str) -> None:
        """Find the client.

        Raises:
            InputError: if it is not installed.
        """
        super().__init__(f"server:{url}", ALL_PROMPTS)
        try:
            remote = importlib.import_module("nnInteractive.inference.remote")
        except ImportError as error:
            raise InputError("--server needs the client of nnInteractive: pip install nninteractive-client") from error
        self._connect: Any = functools.partial(remote.nnInteractiveRemoteInferenceSession, url)

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """The image is sent with the first prompt of each object."""
        return _ServerSession(self.name, self._connect, volume)


class _ServerSession:
    """One session of the server per object, because the protocol holds one object at a time."""

    def __init__(self, name: str, connect: Callable[[], Any], volume: Volume) -> None:
        self._name, self._connect, self._volume = name, connect, volume
        self._sessions: dict[int, tuple[Any, NDArray[np.uint8]]] = {}

    def add(self, prompt: Prompt, object_id: int = 1) -> None:
        """Send a prompt; positions are indices of the (D, H, W) array that the server was sent."""
        grid = self._volume.grid
        if object_id not in self._sessions:
            try:
                session = self._connect()
            except Exception as error:  # whatever the client's HTTP library raises
                url = self._name.removeprefix("server:")
                raise InputError(f"server cannot be used: {url} ({type(error).__name__}: {error})") from error
            session.set_image(self._volume.array[None], {"spacing": np.array(grid.spacing_zyx_mm)})
            buffer = np.zeros(grid.shape_zyx, np.uint8)
            session.set_target_buffer(buffer)
            self._sessions[object_id] = session, buffer
        session, _ = self._sessions[object_id]
        if isinstance(prompt, Point):
            session.add_point_interaction(list(nearest_voxel(point_in_grid(prompt, grid))), prompt.positive)
        elif isinstance(prompt, Box):
            low, high = (list(nearest_voxel(corner)) for corner in box_in_grid(prompt, grid))
            if not session.supported_interactions.get("bbox3d"):  # then a box lies in one slice: the middle one
                low[0] = high[0] = (low[0] + high[0]) // 2
            session.add_bbox_interaction([[a, b + 1] for a, b in zip(low, high, strict=True)], True)
        elif isinstance(prompt, Scribble):
            painted = np.zeros(grid.shape_zyx, np.uint8)
            for at in prompt.path:
                painted[nearest_voxel(at)] = 1
            session.add_scribble_interaction(painted, prompt.positive)

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        return (self._sessions[object_id][1] > 0).astype(np.uint8)


def method_of(name: str, device: str = "cpu") -> Method:
    """The method that ``--model``, ``--external`` or ``--server`` names.

    Args:
        name: A checkpoint or ``.safetensors`` file; an architecture, which gets random weights and a name that says so;
            a baseline; ``oracle_bound@MM`` for another output grid; ``no_prompt:NAME`` for the control without a
            prompt; ``external:COMMAND``; ``server:URL``.
        device: For networks.

    Raises:
        InputError: if it is none of these.
    """
    kind, _, rest = name.partition(":")
    if rest and kind in ("external", "server"):
        return ExternalProgram(rest) if kind == "external" else NnInteractiveServer(rest)
    if name.startswith(NO_PROMPT):
        return NoPrompt(method_of(name.removeprefix(NO_PROMPT), device))
    baseline, at, number = name.partition("@")
    if baseline in BASELINES and not at:
        return BaselineMethod(name)
    if baseline in BASELINES:
        with contextlib.suppress(ValueError):
            lattice_mm = float(number.removesuffix("mm"))
            if baseline == "oracle_bound" and lattice_mm > 0:
                return BaselineMethod(name, lattice_mm=lattice_mm)
        raise InputError(f"only oracle_bound takes a number, as oracle_bound@6 (mm > 0), got {name!r}")
    if path := find_checkpoint(name):
        model: Any = load(name)
        made = SemanticMethod if isinstance(model, SemanticModel) else ModelMethod
        return made(name, model, device, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    if name in MODELS:
        return ModelMethod(name + RANDOM_WEIGHTS, _with_random_weights(name), device)
    if Path(name).suffix:
        load(name)  # raises with the reason
    known = [*list_checkpoints(), *MODELS, *BASELINES]
    near = ", ".join(difflib.get_close_matches(name, known, 3, 0.3)) or ", ".join(known[:4])
    raise InputError(
        f"no checkpoint or file is called {name!r}, nor a model or baseline; nearest names: {near} "
        "(all: samed3d models)"
    )


def _with_random_weights(name: str) -> PromptableModel:
    """The architecture with random weights, the same in every run and every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    model = create_model(name)
    if not isinstance(model, PromptableModel):
        raise InputError(f"model {name!r} takes no prompt; it is measured by --protocol automatic with its weights")
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.ndim > 1:
                bound = 1.0 / max(tensor[0].numel(), 1) ** 0.5
                tensor.uniform_(-bound, bound, generator=generator)
            elif key.endswith("bias"):
                tensor.zero_()
        for key, buffer in model.named_buffers():
            if "gaussian" in key:
                buffer.normal_(generator=generator)
    return model.eval()

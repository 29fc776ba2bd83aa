"""What can be measured, behind one face: our models, any object with ``encode`` and ``decode``, classical baselines,
the no-prompt control, programs and servers of others (``external.py``).

Read ``contender.py`` for the face, ``protocols/base.py`` for who clicks.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.baselines import BASELINES
from samed3d.evaluation.baselines.base import ClassicalMethod
from samed3d.evaluation.contender import Clickable, Contender
from samed3d.evaluation.external import ExternalProgram, NnInteractiveServer
from samed3d.evaluation.meter import Meter
from samed3d.geometry import as_triple
from samed3d.inference.session import Session
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptableModel
from samed3d.models.weights import find_checkpoint, list_checkpoints
from samed3d.prompts import Box, Point, Prompt
from samed3d.volume import Volume

__all__ = ["BaselineContender", "Clickable", "Contender", "ModelContender", "NoPrompt", "contender_of"]

NO_PROMPT = "no_prompt:"
RANDOM_WEIGHTS = " (random weights)"


class ModelContender(Contender):
    """A network through ``Session``: the same crops, pasting and obedience as a user gets."""

    def __init__(self, name: str, model: Any, device: str = "cpu", fingerprint: str = "") -> None:
        """Wrap a model.

        Args:
            name: In the results.
            model: A ``PromptableModel``, or any object with ``spec``, ``encode``, ``decode``, ``eval`` and ``to``.
            device: Where it runs.
            fingerprint: Of its weights.

        Raises:
            InputError: if it lacks one of these.
        """
        lacks = [part for part in ("spec", "encode", "decode", "eval", "to") if not hasattr(model, part)]
        if lacks:
            raise InputError(
                f"a model to measure needs spec, encode, decode, eval and to; {name!r} lacks {', '.join(lacks)}"
            )
        # Sessions show strokes to a model that takes points as points along them.
        takes = frozenset(model.spec.prompts) & {"point", "box"}
        super().__init__(name, takes | ({"scribble"} if "point" in takes else set()), Meter(model))
        self.model, self.device, self.fingerprint = cast(PromptableModel, model), device, fingerprint

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """A session."""
        assert self.model is not None
        return Session(volume, self.model, self.device)


class BaselineContender(Contender):
    """A method without training."""

    def __init__(self, name: str, **settings: float) -> None:
        """One of ``BASELINES``, with numbers other than its own."""
        kind = BASELINES[name.partition("@")[0]]
        super().__init__(name, kind.takes)
        self._kind, self._settings, self.knows_truth = kind, settings, kind.knows_truth

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> ClassicalMethod:
        """Begin on a volume."""
        return self._kind(volume, truth if self.knows_truth else None, **self._settings)


class _MisledClickable:
    """Moves every prompt to a place that has nothing to do with the structure; the same prompt always to the same
    place.
    """

    def __init__(self, inner: Clickable, volume: Volume) -> None:
        self._inner, self._size = inner, volume.grid.size_ijk

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

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        return self._inner.mask_of(object_id)


class NoPrompt(Contender):
    """The control without a prompt: the same contender, told a random place. What it scores is what the data give away
    for nothing.
    """

    def __init__(self, inner: Contender) -> None:
        super().__init__(f"{NO_PROMPT}{inner.name}", inner.takes, inner.meter)
        self._inner, self.fingerprint = inner, inner.fingerprint

    def open(self, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """The inner one, misled."""
        return _MisledClickable(self._inner.open(volume, truth), volume)


def contender_of(name: str, device: str = "cpu") -> Contender:
    """What ``--model`` names.

    Args:
        name: A checkpoint or ``.safetensors`` file; an architecture, which is measured with random weights and called
            so; a baseline;
            ``oracle_bound@MM`` for another output grid; ``no_prompt:NAME`` for the control without a prompt;
            ``external:COMMAND`` and
            ``server:URL`` (``external.py``).
        device: For networks.

    Raises:
        InputError: if it is none of these.
    """
    if name.startswith(("external:", "server:")):
        kind, _, rest = name.partition(":")
        return ExternalProgram(rest) if kind == "external" else NnInteractiveServer(rest)
    if name.startswith(NO_PROMPT):
        return NoPrompt(contender_of(name.removeprefix(NO_PROMPT), device))
    baseline, at, number = name.partition("@")
    if baseline in BASELINES:
        return BaselineContender(name, **_bound_settings(name, number)) if at else BaselineContender(name)
    path = find_checkpoint(name)
    if path is not None:
        return ModelContender(name, load(name), device, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    if name in MODELS:
        return ModelContender(name + RANDOM_WEIGHTS, _with_random_weights(name), device)
    if Path(name).suffix:
        load(name)  # says what is wrong with it
    known = [*list_checkpoints(), *MODELS, *BASELINES]
    near = ", ".join(difflib.get_close_matches(name, known, 3, 0.3)) or ", ".join(known[:4])
    raise InputError(
        f"no checkpoint or file is called {name!r}, nor a model or baseline; nearest names: {near} (all: samed3d models)"
    )


def _bound_settings(name: str, number: str) -> dict[str, float]:
    try:
        lattice_mm = float(number.removesuffix("mm"))
    except ValueError:
        lattice_mm = 0.0
    if not name.startswith("oracle_bound@") or not lattice_mm > 0:
        raise InputError(f"only oracle_bound takes a number, as oracle_bound@6 (mm > 0), got {name!r}")
    return {"lattice_mm": lattice_mm}


def _with_random_weights(name: str) -> PromptableModel:
    """The architecture with weights that are the same in every run and every process."""
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

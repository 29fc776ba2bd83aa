"""Makes a mask again from its saved line of ``prompts.jsonl``: the same prompts to the same method."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.cases import LoadedCase, TrainingSplit, find_cases
from samed3d.evaluation.methods import RANDOM_WEIGHTS, Method, MethodSession, method_of
from samed3d.evaluation.protocols import PROTOCOLS
from samed3d.prompts import Prompt, prompt_from_json
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import read_label_map

REPLAYABLE = tuple(name for name, protocol in PROTOCOLS.items() if protocol.replayable)
"""Protocols whose masks can be made again: those that give prompts on the whole volume through a session."""


@dataclass(frozen=True)
class Replayed:
    """A mask that was made again: image, label and mask (D, H, W) bool, and all prompts in order."""

    volume: Volume
    truth: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    prompts: list[Prompt]


@dataclass
class ReplayCache:
    """Kept between lines: methods, and the newest image with its sessions, so that an image is read once."""

    methods: dict[str, Method] = field(default_factory=dict)
    sessions: dict[str, MethodSession] = field(default_factory=dict)
    case: tuple[str, str] | None = None
    loaded: LoadedCase | None = None
    object_ids: itertools.count = field(default_factory=lambda: itertools.count(1))

    def read(self, line: dict[str, Any]) -> LoadedCase:
        """The case of a line; ``InputError`` if its files do not exist any more."""
        case = (line["image"], line["case"])
        if self.case != case or self.loaded is None:
            self.loaded = _read(line)
            self.case, self.sessions = case, {}
        return self.loaded

    def session(self, model: str, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """The method's session on the newest image; a bound, which is told the truth, gets one per structure."""
        if model not in self.methods:
            self.methods[model] = method_of(model.removesuffix(RANDOM_WEIGHTS))
        if model not in self.sessions or self.methods[model].knows_truth:
            self.sessions[model] = self.methods[model].open(volume, truth)
        return self.sessions[model]


def replay(line: dict[str, Any], cache: ReplayCache) -> Replayed:
    """Give a method the prompts of one line of ``prompts.jsonl`` again; ``cache`` is shared by the lines of a run.

    Raises:
        InputError: if the image, the label or the model does not exist any more, or there was no prompt.
    """
    loaded = cache.read(line)
    truth = loaded.labels == int(line["label"])
    prompts = [prompt_from_json(entry) for turn in line["turns"] for entry in turn["prompts"]]
    if not prompts:
        raise InputError("no prompt was given")
    session, object_id = cache.session(line["model"], loaded.volume, truth), next(cache.object_ids)
    for prompt in prompts:
        session.add(prompt, object_id=object_id)
    return Replayed(loaded.volume, truth, session.mask_of(object_id).astype(bool), prompts)


def _read(line: dict[str, Any]) -> LoadedCase:
    """The case: an nnU-Net folder's by its files, a corpus's or a challenge folder's by its name."""
    image, labels = Path(line["image"]), Path(line["labels_file"])
    for path in (image, labels):
        if not path.exists():
            raise InputError(f"the file is not there any more: {path}")
    if image.is_file() and image.suffix != ".npz":
        return LoadedCase(read_volume(image, modality=line.get("modality")), read_label_map(labels)[0])
    folder = image if image.is_dir() else image.parent
    for case in find_cases([folder], TrainingSplit(), "all"):
        if (case.source, case.case) == (line["source"], line["case"]):
            return case.loaded()
    raise InputError(f"the case is not there any more: {line['case']} in {folder}")

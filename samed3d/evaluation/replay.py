"""A saved line of ``prompts.jsonl`` answered again: the image is read, the model is given the same prompts, its last
mask is returned.

One image and its models are kept at a time, so that several structures of one image cost one reading. Only protocols
that answer on the whole volume through a session can be made again here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.cases import Split, find_cases
from samed3d.evaluation.methods import RANDOM_WEIGHTS, Method, MethodSession, method_of
from samed3d.prompts import Prompt, prompt_from_json
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import read_label_map

REPLAYED = ("samed3d", "radioactive-3d", "vista3d-points")


@dataclass(frozen=True)
class Replayed:
    """What came of it: the image, the label and the mask (D, H, W) bool, and all prompts in order."""

    volume: Volume
    truth: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    prompts: list[Prompt]


@dataclass
class Answers:
    """What is kept between lines: loaded models, and the latest image with who answers on it."""

    methods: dict[str, Method] = field(default_factory=dict)
    case: tuple[str, str] | None = None
    volume: Volume | None = None
    labels: NDArray | None = None
    subjects: dict[str, MethodSession] = field(default_factory=dict)
    objects: itertools.count = field(default_factory=lambda: itertools.count(1))

    def read(self, line: dict[str, Any]) -> tuple[Volume, NDArray]:
        """The image and the label map of a line, kept until another case is asked for.

        Raises:
            InputError: if either is not there any more.
        """
        case = (line["image"], line["case"])
        if self.case != case or self.volume is None or self.labels is None:
            self.volume, self.labels = _read(line)
            self.case, self.subjects = case, {}
        return self.volume, self.labels

    def subject(self, model: str, volume: Volume, truth: NDArray[np.bool_]) -> MethodSession:
        """Who answers for that model on the latest image; a bound, which is told the truth, begins anew for each
        structure.

        Raises:
            InputError: if there is no such model any more.
        """
        if model not in self.methods:
            self.methods[model] = method_of(model.removesuffix(RANDOM_WEIGHTS))
        if model not in self.subjects or self.methods[model].knows_truth:
            self.subjects[model] = self.methods[model].open(volume, truth)
        return self.subjects[model]


def replay(line: dict[str, Any], answers: Answers) -> Replayed:
    """Give a model the prompts of one line again.

    Args:
        line: Of ``prompts.jsonl``.
        answers: What is kept between lines.

    Raises:
        InputError: if the image, the label or the model is not there any more, or there was no prompt.
    """
    volume, labels = answers.read(line)
    truth = labels == int(line["label"])
    subject, number = answers.subject(line["model"], volume, truth), next(answers.objects)
    prompts = [prompt_from_json(entry) for turn in line["turns"] for entry in turn["prompts"]]
    if not prompts:
        raise InputError("no prompt was given")
    for prompt in prompts:
        subject.add(prompt, object_id=number)
    mask = subject.mask_of(number).astype(bool)
    return Replayed(volume, truth, mask, prompts)


def _read(line: dict[str, Any]) -> tuple[Volume, NDArray]:
    """Image and labels of an nnU-Net folder by their files, of a corpus or a challenge folder by the case's name."""
    image, labels = Path(line["image"]), Path(line["labels_file"])
    for path in (image, labels):
        if not path.exists():
            raise InputError(f"the file is not there any more: {path}")
    if image.is_file() and image.suffix != ".npz":
        return read_volume(image), read_label_map(labels)[0]
    folder = image if image.is_dir() else image.parent
    for case in find_cases([folder], Split(), "all"):
        if (case.source, case.case) == (line["source"], line["case"]):
            return case.read()
    raise InputError(f"the case is not there any more: {line['case']} in {folder}")

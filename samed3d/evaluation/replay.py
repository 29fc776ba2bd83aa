"""A saved line of ``prompts.jsonl`` answered again: the image is read, the model is given the same prompts, its last mask is returned.

One image and its models are kept at a time, so that several structures of one image cost one reading. Only protocols that answer on the
whole volume through a session can be made again here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.evaluation.contenders import RANDOM_WEIGHTS, Clickable, Contender, contender_of
from samed3d.prompts import Prompt, prompt_from_json
from samed3d.volume import Volume, read_volume
from samed3d.volume.label_maps import read_label_map

REPLAYED = ("samed3d",)


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

    contenders: dict[str, Contender] = field(default_factory=dict)
    image: tuple[str, str] | None = None
    volume: Volume | None = None
    labels: NDArray | None = None
    subjects: dict[str, Clickable] = field(default_factory=dict)
    objects: itertools.count = field(default_factory=lambda: itertools.count(1))

    def read(self, image: str, labels: str) -> tuple[Volume, NDArray]:
        """The image and its label map, kept until another one is asked for.

        Raises:
            InputError: if either is not there any more.
        """
        if self.image != (image, labels) or self.volume is None or self.labels is None:
            for path in (image, labels):
                if not Path(path).exists():
                    raise InputError(f"the file is not there any more: {path}")
            self.volume, self.labels, self.subjects = read_volume(image), read_label_map(Path(labels))[0], {}
            self.image = (image, labels)
        return self.volume, self.labels

    def subject(self, model: str, volume: Volume, truth: NDArray[np.bool_]) -> Clickable:
        """Who answers for that model on the latest image; a bound, which is told the truth, begins anew for each structure.

        Raises:
            InputError: if there is no such model any more.
        """
        if model not in self.contenders:
            self.contenders[model] = contender_of(model.removesuffix(RANDOM_WEIGHTS))
        if model not in self.subjects or self.contenders[model].knows_truth:
            self.subjects[model] = self.contenders[model].open(volume, truth)
        return self.subjects[model]


def replay(line: dict[str, Any], answers: Answers) -> Replayed:
    """Give a model the prompts of one line again.

    Args:
        line: Of ``prompts.jsonl``.
        answers: What is kept between lines.

    Raises:
        InputError: if the image, the label or the model is not there any more, or there was no prompt.
    """
    volume, labels = answers.read(line["image"], line["labels_file"])
    truth = labels == int(line["label"])
    subject, number = answers.subject(line["model"], volume, truth), next(answers.objects)
    prompts = [prompt_from_json(entry) for turn in line["turns"] for entry in turn["prompts"]]
    if not prompts:
        raise InputError("no prompt was given")
    for prompt in prompts:
        subject.add(prompt, object_id=number)
    mask = subject.mask_of(number).astype(bool)
    return Replayed(volume, truth, mask, prompts)

"""What a model was trained on: the one rule that says on which side of its training a case is.

Evaluation, fine-tuning and training ask ``TrainingHistory.side``. It knows a subject by the names in the checkpoint's
header, and an image under any name by its hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from samed3d.config import TrainConfig
from samed3d.data.corpus import GROUP_SEPARATOR, CaseRecord, Corpus, image_hash, in_validation
from samed3d.data.sampling import training_cases
from samed3d.errors import InputError
from samed3d.models.weights import find_checkpoint, manifest_entries, read_header

TRAINED_ON, PERHAPS_TRAINED_ON = "trained on", "perhaps trained on"
UNSEEN_SUBJECT, HELD_OUT_SOURCE, UNSEEN_SOURCE = "unseen subject", "held-out source", "unseen source"
UNKNOWN = "unknown"
SIDES = (TRAINED_ON, PERHAPS_TRAINED_ON, UNSEEN_SUBJECT, HELD_OUT_SOURCE, UNSEEN_SOURCE, UNKNOWN)
"""Of several models the first in this order counts."""
HISTORY_KEYS = ("training", "sources", "trained_on", "training_images", "base")
"""Fields of a checkpoint's header that say what it was trained on."""
NOT_UNSEEN = (TRAINED_ON, PERHAPS_TRAINED_ON)


@dataclass(frozen=True)
class TrainingHistory:
    """What a model's training used and held out; None where the header does not say.

    Attributes:
        validation_share: Share of subjects that were held out, with ``seed``.
        hold_out: Whole sources that were held out.
        trained_on: All subjects by source.
        images: Hashes of the training images, each with ``SOURCE/SUBJECT``.
        base: Of the model that the training started from.
        others: Of further models that are measured with this one.
    """

    validation_share: float | None = None
    seed: int = 0
    hold_out: tuple[str, ...] = ()
    sources: frozenset[str] | None = None
    trained_on: Mapping[str, Sequence[str]] | None = None
    images: Mapping[str, str] = field(default_factory=dict, repr=False)
    base: TrainingHistory | None = None
    others: tuple[TrainingHistory, ...] = ()

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> TrainingHistory:
        """From a checkpoint's header, or what another header keeps of it."""
        data, trained_on = header.get("training", {}).get("data") or {}, header.get("trained_on")
        sources = header.get("sources", trained_on)
        earlier = header.get("base", {}).get("history")
        return cls(
            data.get("validation_share"),
            data.get("split_seed", 0),
            tuple(data.get("hold_out", ())),
            None if sources is None else frozenset(sources),
            trained_on,
            header.get("training_images", {}),
            None if earlier is None else cls.of_header(earlier),
        )

    @classmethod
    def of_models(cls, names: Iterable[Any]) -> TrainingHistory:
        """Of methods by name (``evaluation.methods.method_of``), together; the first with a split is named first.

        Baselines and random weights were trained on nothing. Of external programs, servers and objects nothing is
        known.
        """
        found = []
        for name in names:
            if not isinstance(name, str) or name.startswith(("external:", "server:")):
                found.append(cls())
            elif (path := find_checkpoint(name.rpartition(":")[2])) is not None:
                found.append(cls.of_header(known_history(path)))
        found.sort(key=lambda history: history.validation_share is None)
        return replace(found[0], others=tuple(found[1:])) if found else cls(sources=frozenset())

    def side(self, source: str, subjects: Iterable[str], image: str = "") -> str:
        """On which side of the training a case is: one of ``SIDES``.

        ``subjects`` are its own and those that are split together with it, ``image`` is its ``image_hash`` or "".
        """
        subjects = tuple(subjects)
        own = self._own_side(source, subjects, image)
        if self.base is not None and own != TRAINED_ON:
            earlier = self.base.side(source, subjects, image)
            own = UNKNOWN if earlier == UNKNOWN else min(own, earlier, key=SIDES.index)
        return min([own, *(other.side(source, subjects, image) for other in self.others)], key=SIDES.index)

    def _own_side(self, source: str, subjects: tuple[str, ...], image: str) -> str:
        listed = None if self.trained_on is None else self.trained_on.get(source, ())
        if (image and image in self.images) or (listed and any(subject in listed for subject in subjects)):
            return TRAINED_ON
        if self.validation_share is None and self.sources is None:
            return UNKNOWN
        if source in self.hold_out:
            return HELD_OUT_SOURCE
        if self.sources is not None and source not in self.sources:
            return UNSEEN_SOURCE
        share = self.validation_share or 0.0
        if listed is not None or any(in_validation(subject, share, self.seed) for subject in subjects):
            return UNSEEN_SUBJECT
        return PERHAPS_TRAINED_ON if self.sources is None else TRAINED_ON

    def known_image(self, image: str) -> str:
        """``SOURCE/SUBJECT`` under which an image was trained on, or ""."""
        found = self.images.get(image, "") if image else ""
        return found or next((name for part in self._related if (name := part.known_image(image))), "")

    @property
    def shapes(self) -> set[str]:
        """The shapes of all known images, as their hashes begin: an image of another shape is none of them."""
        return {image.partition(":")[0] for image in self.images}.union(*(part.shapes for part in self._related))

    @property
    def _related(self) -> tuple[TrainingHistory, ...]:
        return (*((self.base,) if self.base else ()), *self.others)

    @property
    def kept_from(self) -> dict[str, Any]:
        """The split as ``results.json`` states it."""
        share = 0.2 if self.validation_share is None else self.validation_share
        return {"validation_share": share, "seed": self.seed, "hold_out": self.hold_out}


def subjects_of(case: CaseRecord) -> tuple[str, ...]:
    """The subject of a case and all that are split together with it."""
    return tuple(dict.fromkeys([case.subject, *filter(None, case.split_group.split(GROUP_SEPARATOR))]))


def known_history(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint's header and manifest entry that say what it was trained on."""
    listed = [entry for folder, entry in manifest_entries().values() if folder / entry["file"] == Path(path).resolve()]
    header = {**read_header(path), **(listed[0] if listed else {})}
    return {key: header[key] for key in HISTORY_KEYS if key in header}


def history_of_run(config: TrainConfig) -> dict[str, Any]:
    """The header's fields for a model that a config trains: subjects, image hashes and the base's own history."""
    trained_on: dict[str, set[str]] = {}
    images: dict[str, str] = {}
    for _, corpus, case in training_cases(config.data):
        if case.labels and not (case.has_image and config.data.synthetic_share >= 1):
            trained_on.setdefault(case.source, set()).add(case.subject)
            if case.has_image and (image := stored_hash(corpus, case)):
                images[image] = f"{case.source}/{case.subject}"
    facts: dict[str, Any] = {"trained_on": {source: sorted(trained_on[source]) for source in sorted(trained_on)}}
    facts["training_images"] = dict(sorted(images.items()))
    path = find_checkpoint(config.model.weights) if config.model.weights else None
    return facts if path is None else facts | {"base": {"name": config.model.weights, "history": known_history(path)}}


def stored_hash(corpus: Corpus, case: CaseRecord) -> str:
    """The hash of a case's image as it was before preparation; of the stored one in corpora that do not list it; "" for
    a damaged one, which training and evaluation report themselves.
    """
    try:
        return case.image_hash or image_hash(corpus.image(case))
    except (InputError, OSError, RuntimeError, ValueError):
        return ""

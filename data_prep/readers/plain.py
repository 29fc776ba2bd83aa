"""Any folder of images and labels that a pattern can describe.

A pattern is a path below the source with ``{case}``, as in ``images/{case}.nii.gz`` and ``labels/{case}_seg.nii.gz``.
An image pattern may have ``{channel}`` (one file per channel), a label pattern ``{label}`` (one file per structure);
``{suffix}`` is any image suffix and
``*`` any text within a name. Without patterns, a few usual layouts are tried. A label map's names come from ``labels``
in ``source.json`` (name to value), else they are numbered.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from data_prep.cases import LabelLayer, Problem, RawArrays, RawCase, SourceFacts
from data_prep.readers.assembly import check_named, pack_layers, present_values, read_images, read_label_on
from data_prep.readers.facts import facts_of, source_json_path, subject_rule, value_names
from data_prep.readers.names import safe_name
from data_prep.readers.totalseg import structure_masks
from samed3d.errors import InputError
from samed3d.volume import SUFFIXES
from samed3d.volume.label_maps import EmptyLabelError

# Tried in this order.
USUAL_PATTERNS = (
    ("images/{case}{suffix}", "labels/{case}{suffix}"),
    ("images/{case}{suffix}", "masks/{case}{suffix}"),
    ("image/{case}{suffix}", "label/{case}{suffix}"),
    ("imagesTr/{case}{suffix}", "labelsTr/{case}{suffix}"),
    ("{case}/imaging{suffix}", "{case}/segmentation{suffix}"),
    ("{case}/image{suffix}", "{case}/label{suffix}"),
    ("{case}_image{suffix}", "{case}_label{suffix}"),
)
_PLACES = ("case", "channel", "label", "suffix")


class PlainReader:
    """Folders described by patterns; see the module."""

    name = "plain"
    looks_for = "images/ and labels/, or what --image-pattern and --label-pattern say"

    def __init__(self, image_pattern: str | None = None, label_pattern: str | None = None) -> None:
        """Patterns given together, or none to try ``USUAL_PATTERNS``.

        Raises:
            InputError: if only one is given, or one has no ``{case}``, an unknown place, or leads out of the source.
        """
        if (image_pattern is None) != (label_pattern is None):
            raise InputError("--image-pattern and --label-pattern must be given together")
        for flag, pattern, other in (
            ("--image-pattern", image_pattern, "channel"),
            ("--label-pattern", label_pattern, "label"),
        ):
            if pattern is None:
                continue
            places = re.findall(r"\{(.*?)\}", pattern)
            if "case" not in places or set(places) - {"case", "suffix", other}:
                raise InputError(f"{flag} must have {{case}}, and may have {{{other}}} and {{suffix}}, got {pattern!r}")
            if pattern.startswith("/") or ".." in Path(pattern).parts:
                raise InputError(f"{flag} must be a path below the source, got {pattern!r}")
        self.given = (image_pattern, label_pattern) if image_pattern is not None and label_pattern is not None else None

    def recognises(self, folder: Path) -> bool:
        """Whether some image has a label by the patterns."""
        return self._patterns(folder) is not None

    def source(self, folder: Path) -> SourceFacts:
        """Facts from ``source.json``."""
        return facts_of(folder, self.name)

    def cases(self, folder: Path) -> tuple[list[RawCase], list[Problem]]:
        """Every image with its label or labels.

        Raises:
            InputError: if no image has a label by the patterns.
        """
        patterns = self._patterns(folder)
        if patterns is None:
            raise InputError(
                f"no image with a label in {folder}; say where they are with --image-pattern and --label-pattern"
            )
        facts, person = self.source(folder), subject_rule(folder)
        labels, images = match_files(folder, patterns[1]), match_files(folder, patterns[0])
        of_labels = {path for files in labels.values() for _, path in files}
        images = {case: [f for f in files if f[1] not in of_labels] for case, files in images.items()}
        cases, problems = [], []
        for case in sorted(set(labels) | {c for c, files in images.items() if files}):
            mine, masks = images.get(case, []), labels.get(case, [])
            reason = "" if mine and masks else "image has no label" if mine else "label has no image"
            names = [name for name, _ in mine]
            twice = len(set(names)) < len(names) or len({name for name, _ in masks}) < len(masks)
            if twice:
                where = ", ".join(p.name for _, p in (*mine, *masks))
                reason = f"two cases have the id {case!r}: {where}; rename one of them"
            if reason:
                problems.append(Problem(str((mine or masks)[0][1]), reason))
                continue
            paths = {f"image:{name}": str(path) for name, path in mine} | {
                f"label:{name}": str(path) for name, path in masks
            }
            paths |= source_json_path(folder)
            cases.append(RawCase(safe_name(case), facts.name, person(case), facts.modality, None, self.name, paths))
        return cases, problems

    def load(self, case: RawCase, *, repair_geometry: bool = False) -> RawArrays:
        """The channels of a case and its label map, or its structures packed into layers.

        Raises:
            InputError: if a file cannot be used, grids differ, or ``source.json`` names labels but not all that are
                there.
        """
        named = [
            (k.removeprefix("image:") or case.modality, p) for k, p in case.paths.items() if k.startswith("image:")
        ]
        images = read_images(named, repair_geometry=repair_geometry)
        grid, source = images[0][1].grid, images[0][1].source
        labels = {k.removeprefix("label:"): p for k, p in case.paths.items() if k.startswith("label:")}
        if set(labels) != {""}:
            masks = structure_masks(
                [(n, Path(p)) for n, p in labels.items()], grid, source, repair_geometry=repair_geometry
            )
            try:
                return RawArrays(images, grid, pack_layers(masks, grid.shape_zyx))
            except EmptyLabelError as error:
                raise EmptyLabelError(f"{error}: {', '.join(labels.values())}") from error
        array = read_label_on(grid, labels[""], source, repair_geometry=repair_geometry)
        stated, values = value_names(case.paths), present_values(array)
        if stated:
            check_named(values, stated, labels[""], "source.json")
        return RawArrays(
            images, grid, [LabelLayer(array, {value: stated.get(value, f"label {value}") for value in values})]
        )

    def _patterns(self, folder: Path) -> tuple[str, str] | None:
        """The patterns given, or the first usual ones, if an image of the folder has a label by them."""
        tried = [self.given] if self.given else USUAL_PATTERNS
        return next((p for p in tried if set(match_files(folder, p[0])) & set(match_files(folder, p[1]))), None)


def match_files(folder: Path, pattern: str) -> dict[str, list[tuple[str, Path]]]:
    """The files of a folder that follow a pattern.

    Args:
        folder: Where the pattern starts.
        pattern: A relative path with ``{case}`` and possibly ``{channel}`` or ``{label}``; a place that comes twice
            must match alike.

    Returns:
        Case to (channel or label or "", path), sorted.
    """
    expression, seen = "", set()
    for piece in re.split(r"(\{\w+\})", pattern):
        place = piece[1:-1]
        if piece[:1] != "{" or place not in _PLACES:
            expression += re.escape(piece).replace(r"\*", "[^/]*")
        elif place == "suffix":
            expression += "(?:" + "|".join(map(re.escape, SUFFIXES)) + ")"
        elif place in seen:
            expression += f"(?P={place})"
        else:
            expression += (
                f"(?P<{place}>[^/]+{'' if place == 'case' else '?'})"  # what follows a case is short: BraTS_001_t1
            )
            seen.add(place)
    regex = re.compile(expression)
    levels = "/".join("*" for _ in Path(pattern).parts)
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(folder.glob(levels)):
        relative = path.relative_to(folder)
        match = regex.fullmatch(relative.as_posix())
        if match and path.is_file() and not any(part.startswith(".") for part in relative.parts):
            groups = match.groupdict()
            found[groups["case"]].append((groups.get("channel") or groups.get("label") or "", path))
    return dict(found)

"""The training config: frozen dataclasses (``sections.py``) from YAML and dotted overrides, and back to plain values.

A key that no dataclass has is refused with the nearest name, a value of the wrong type with the key, the rule and the
value. ``configs/tiny_cpu.yaml`` is the smallest file that trains.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from samed3d.config.sections import (
    ClickConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    check,
)
from samed3d.errors import InputError, nearest_name

T = TypeVar("T")


def load_config(cls: type[T], path: Path | str | None = None, overrides: Sequence[str] = ()) -> T:
    """A config dataclass from a YAML file and overrides; what they leave out has its default.

    Overrides are ``"section.key=value"`` strings, the value in YAML; later ones win.

    Raises:
        InputError: for a missing or broken file, an unknown key (with the nearest name), a wrong type or a broken rule.
    """
    tree: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return _build(cls, tree, "")


def config_of(cls: type[T], tree: Mapping[str, Any]) -> T:
    """A config dataclass from plain values, such as those of ``to_dict``; what is left out has its default.

    Raises:
        InputError: for an unknown key, a wrong type or a broken rule.
    """
    return _build(cls, dict(tree), "")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts and lists, ready for YAML or JSON; ``load_config`` reads it back to an equal object."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config file cannot be read: {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config file must be UTF-8 text: {path}") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict | None):
        raise InputError(f"config file must be a mapping of sections, got a {type(tree).__name__}: {path}")
    return tree or {}


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # here, so that importing the dataclasses costs nothing on a bare GPU machine

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"not valid YAML: {where}{line} ({problem})") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise InputError(f"--set needs section.key=value, got {override!r}")
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise InputError(f"--set {override!r}: {part!r} is a value, not a section")
    node[parts[-1]] = _parse_yaml(text, f"--set {override}")


def _build(cls: type[T], tree: Any, prefix: str) -> T:
    """A dataclass; ``prefix`` is its section with a dot, empty for the whole config."""
    tree = {} if tree is None else tree
    check(isinstance(tree, dict), f"config key {prefix.removesuffix('.')!r}", "must be a section of keys", tree)
    hints = get_type_hints(cls)
    for unknown in (key for key in tree if key not in hints):
        raise InputError(f"unknown config key '{prefix}{unknown}'; {nearest_name(unknown, hints, prefix)}")
    return cls(**{key: _coerce(value, hints[key], f"{prefix}{key}") for key, value in tree.items()})


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, changed only where nothing is lost (int to float, list to tuple, "1e-4" to float)."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")  # type: ignore[arg-type]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(value, next(k for k in inner if k is not type(None)), key)
    if origin is Literal:
        check(value in inner, f"config key {key!r}", f"must be one of {', '.join(map(str, inner))}", value)
        return value
    if origin in (list, tuple):
        fixed = len(inner) if origin is tuple and inner[-1] is not Ellipsis else None
        good = isinstance(value, list | tuple) and (fixed is None or len(value) == fixed)
        check(good, f"config key {key!r}", f"must be a list of {f'{fixed} ' if fixed else ''}values", value)
        kinds = inner if fixed is not None else [inner[0]] * len(value)
        return origin(_coerce(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        check(value is None or isinstance(value, dict), f"config key {key!r}", "must be a mapping", value)
        return {str(k): v for k, v in (value or {}).items()}
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as text
        except (TypeError, ValueError):
            number = math.nan
        check(math.isfinite(number), f"config key {key!r}", "must be a finite number", value)
        return number
    rules = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    good = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    check(good, f"config key {key!r}", f"must be {rules.get(kind) or f'a {kind.__name__}'}", value)
    return value

"""The one exception for what the user can correct, and checks that many places share.

The command line prints the exception as one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable


class InputError(ValueError):
    """Bad input: the message is one line that names the argument, the rule, the value received and the remedy."""


def check_choice(what: str, value: object, known: Collection[str]) -> None:
    """Refuse a value that is not one of the ``known`` ones.

    Raises:
        InputError: that lists them.
    """
    if value not in list(known):  # a value that cannot be hashed is no member either
        raise InputError(f"{what} must be one of {', '.join(known)}, got {value!r}")


def check_keys(given: Iterable[object], known: Collection[str], where: str, what: str = "key") -> None:
    """Refuse a key that is not one of the ``known`` ones: it may be a misspelt one and must not be ignored.

    Raises:
        InputError: with the nearest known one; the message begins with ``where``.
    """
    for key in given:
        if key not in known:
            raise InputError(f"{where} has no {what} {key!r}; {nearest_name(key, known)}")


def whole_number(value: object, what: str, most: int = 2**16 - 1, least: int = 1) -> int:
    """A number of any integral type, such as an id, as ``int``.

    Raises:
        InputError: if it is of another type (``True`` and 1.0 are) or out of range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise InputError(f"{what} must be a whole number from {least} to {most}, got {value!r}")
    return number


def nearest_name(name: object, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"

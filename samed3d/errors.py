"""The one exception for what the user can correct, a check of a choice, and the nearest known name for messages.

The command line prints the exception as one line and exits with code 2.
"""

from __future__ import annotations

import difflib
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


def nearest_name(name: object, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    return f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"

"""A process that edits a session with a journal and says each edit aloud once it is acknowledged; it is made to be
killed.

Arguments: image, journal, seed. After each acknowledged edit it prints a line: the edit's number.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Box, Point, Scribble
from tests.clicked_model import ClickedModel


def edit(session: Session, rng: np.random.Generator) -> None:
    """One random edit; the same for the same state and generator."""
    at = tuple(int(rng.integers(4, 16)) for _ in range(3))
    kind, known = int(rng.integers(0, 8)), [n for o in session.objects() for n in o.prompt_ids]
    number = int(rng.integers(1, 4))
    if kind == 0 and known:
        session.remove(int(rng.choice(known)))
    elif kind == 1 and known:
        session.move(int(rng.choice(known)), Point(at))
    elif kind == 2:
        session.undo()
    elif kind == 3:
        session.redo()
    elif kind == 4:
        session.add(Scribble((at, (8, 8, 8)), bool(rng.integers(0, 2))), object_id=number)
    elif kind == 5:
        session.add(Box(at, tuple(v + 3 for v in at)), object_id=number)
    else:
        session.add(Point(at, bool(rng.integers(0, 2))), object_id=number)


def main(image: str, journal: str, seed: int) -> None:
    """Edit for ever."""
    torch.set_num_threads(1)
    session = Session.open(image, ClickedModel(), journal=journal)
    rng = np.random.default_rng(seed)
    for number in range(100_000):
        try:
            edit(session, rng)
        except InputError:  # a negative prompt first: refused, and therefore not in the journal
            pass
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

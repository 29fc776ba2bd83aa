"""The ways of measuring an interactive method, by name: ours, and those that others publish with.

Each file says what its rules are, what about them flatters, and where ours differs. Read ``base.py`` next.
"""

from __future__ import annotations

import difflib

from samed3d.errors import InputError
from samed3d.evaluation.protocols.base import CaseProtocol, StructureProtocol
from samed3d.evaluation.protocols.cvpr25 import Cvpr25
from samed3d.evaluation.protocols.radioactive import Radioactive3d
from samed3d.evaluation.protocols.sam_med3d import SamMed3d, SamMed3dReleased
from samed3d.evaluation.protocols.samed3d import Samed3dProtocol
from samed3d.evaluation.protocols.vista3d import Vista3dPoints, Vista3dPointsFlattering

__all__ = ["PROTOCOLS", "AnyProtocol", "protocol_of"]

AnyProtocol = StructureProtocol | CaseProtocol

PROTOCOLS: dict[str, type[StructureProtocol] | type[CaseProtocol]] = {
    "samed3d": Samed3dProtocol,
    "sam-med3d": SamMed3d,
    "sam-med3d-released": SamMed3dReleased,
    "cvpr25": Cvpr25,
    "radioactive-3d": Radioactive3d,
    "vista3d-points": Vista3dPoints,
    "vista3d-points-flattering": Vista3dPointsFlattering,
}


def protocol_of(name: str) -> AnyProtocol:
    """A protocol by name.

    Raises:
        InputError: for an unknown name; the message gives the nearest.
    """
    if name not in PROTOCOLS:
        near = ", ".join(difflib.get_close_matches(name, PROTOCOLS, 2, 0.4)) or "samed3d"
        raise InputError(f"unknown protocol {name!r}; nearest: {near} (all: {', '.join(PROTOCOLS)})")
    return PROTOCOLS[name]()

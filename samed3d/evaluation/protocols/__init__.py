"""Evaluation protocols by name: ours, and those with which other groups publish.

Each file states its rules, its source, what makes its scores optimistic, and where ours differs from the original.
"""

from __future__ import annotations

import difflib

from samed3d.errors import InputError
from samed3d.evaluation.protocols.base import EvaluationProtocol
from samed3d.evaluation.protocols.click_rules import Radioactive3d, Vista3dPoints, Vista3dPointsReleased
from samed3d.evaluation.protocols.cvpr25 import Cvpr25
from samed3d.evaluation.protocols.sam_med3d import SamMed3d, SamMed3dReleased
from samed3d.evaluation.protocols.samed3d import Samed3dProtocol
from samed3d.evaluation.protocols.semantic import SemanticProtocol

_KINDS: tuple[type[EvaluationProtocol], ...] = (
    Samed3dProtocol,
    SamMed3d,
    SamMed3dReleased,
    Cvpr25,
    Radioactive3d,
    Vista3dPoints,
    Vista3dPointsReleased,
    SemanticProtocol,
)
PROTOCOLS = {kind.name: kind for kind in _KINDS}


def protocol_of(name: str) -> EvaluationProtocol:
    """A protocol by name.

    Raises:
        InputError: for an unknown name; the message gives the nearest.
    """
    if name not in PROTOCOLS:
        near = ", ".join(difflib.get_close_matches(name, PROTOCOLS, 2, 0.4)) or "samed3d"
        raise InputError(f"unknown protocol {name!r}; nearest: {near} (all: {', '.join(PROTOCOLS)})")
    return PROTOCOLS[name]()

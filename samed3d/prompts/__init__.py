"""What a user says about an object: points, boxes, scribbles, lassos and masks, as an ordered list, and their JSON
form.

Positions are kept exactly as given, each with its space (``ijk`` voxels or ``ras`` millimetres); ``point_in_grid`` and
its like turn them into voxels of one image. Nothing here knows a model or an image's voxels. Read ``kinds.py`` for what
each prompt means, ``schema.py`` for the JSON, ``inference/strokes.py`` for what a model is told of them,
``inference/session.py`` next.
"""

from __future__ import annotations

from samed3d.prompts.kinds import (
    MASK_LOGIT_THRESHOLD,
    SPACES,
    Box,
    Lasso,
    Mask,
    ObjectPrompts,
    Point,
    Prompt,
    Scribble,
    box_in_grid,
    is_positive,
    path_in_grid,
    point_in_grid,
)
from samed3d.prompts.packed import PackedMask
from samed3d.prompts.schema import (
    SCHEMA_VERSION,
    dump_prompts,
    load_prompts,
    parse_numbers,
    prompt_from_json,
    prompt_to_json,
)

__all__ = [
    "MASK_LOGIT_THRESHOLD",
    "SCHEMA_VERSION",
    "SPACES",
    "Box",
    "Lasso",
    "Mask",
    "ObjectPrompts",
    "PackedMask",
    "Point",
    "Prompt",
    "Scribble",
    "box_in_grid",
    "dump_prompts",
    "is_positive",
    "load_prompts",
    "parse_numbers",
    "path_in_grid",
    "point_in_grid",
    "prompt_from_json",
    "prompt_to_json",
]

"""What a user gives for an object (points, boxes, scribbles, lassos, masks) and its JSON form.

Positions are kept exactly as given, each with its space (``ijk`` voxels or ``ras`` millimetres); ``point_in_grid`` and
similar functions turn them into voxels of one image. ``kinds.py`` defines each prompt, ``schema.py`` the JSON.
"""

from __future__ import annotations

from samed3d.prompts.kinds import (
    MASK_LOGIT_THRESHOLD,
    MAX_NAME,
    SPACES,
    Box,
    Lasso,
    Mask,
    ObjectPrompts,
    Point,
    Prompt,
    Scribble,
    box_in_grid,
    checked_flag,
    checked_name,
    is_positive,
    path_in_grid,
    point_in_grid,
)
from samed3d.prompts.packed import MaskUpdate, PackedMask
from samed3d.prompts.schema import (
    SCHEMA_VERSION,
    checked_code,
    dump_prompts,
    load_prompts,
    objects_from_json,
    parse_numbers,
    parse_prompts,
    prompt_from_json,
    prompt_to_json,
)

"""Segment Anything's own checkpoints (2D) as our weights files: what SAM3D, MA-SAM and 3DSAM-adapter build on.

The file keeps SAM's names (``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*``) and is given to those models
as
``backbone_weights``, as the ``.pth`` itself can be. It is no model that ``load`` builds. The encoder is in
``nn/vit2d.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samed3d.errors import InputError
from samed3d.models.base import ModelSpec
from samed3d.models.weights import import_upstream, save_weights
from samed3d.nn.vit2d import SAM_SIZES, build_encoder, encoder_state

SOURCE = "Segment Anything (Kirillov et al., ICCV 2023, arXiv:2304.02643), weights under Apache-2.0"
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


class _SamTensors:
    """A state dict with what ``save_weights`` asks of a model."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        self.config: dict[str, Any] = {}
        self.spec = ModelSpec(name, (1, 1024, 1024), prompts=frozenset(), source=SOURCE)
        self._state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def import_sam(source: Path, output: Path, name: str) -> int:
    """Convert ``sam_vit_{b,l,h}_*.pth`` to one ``.safetensors`` file.

    Args:
        source: The checkpoint; nothing in it is executed.
        output: File to write.
        name: ``sam_vit_b``, ``sam_vit_l`` or ``sam_vit_h``.

    Returns:
        How many tensors were written.

    Raises:
        InputError: for another name, or a file that does not hold that encoder whole.
    """
    if name not in SAM_SIZES:
        raise InputError(f"model must be one of {', '.join(SAM_SIZES)}, got {name!r}")
    state = import_upstream(source)
    with torch.device("meta"):
        own = build_encoder(name).state_dict()
    found = encoder_state(state, name)
    wrong = sorted({*own} ^ {*found} | {k for k in own if k in found and own[k].shape != found[k].shape})
    if wrong:
        raise InputError(
            f"{source} is no {name}: {len(wrong)} tensors of its encoder differ, first {wrong[0]}; give --model another name"
        )
    kept = {k: v for k, v in state.items() if k.startswith(PARTS)} or {
        f"image_encoder.{k}": v for k, v in found.items()
    }
    save_weights(_SamTensors(name, kept), output, {"imported_from": source.name, "licence": "Apache-2.0"})  # type: ignore[arg-type]
    return len(kept)

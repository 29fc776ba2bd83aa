"""From prompts to a low-resolution mask as SAM-Med3D's released code does it; shared by the models that keep its
decoder.

The parts are ``prompt_encoder.py`` and ``mask_decoder.py``; which crop and which clicks a model sees is said by its
spec. Our own models decode in their own way: ``models/samed3d_vit.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samed3d.nn.mask_decoder import MaskDecoder
from samed3d.nn.prompt_batch import PromptBatch
from samed3d.nn.prompt_encoder import PADDING, PromptEncoder

LOWRES_PER_TOKEN = 4


def decode_released(
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    image: Tensor,
    prompts: PromptBatch,
    newest_only: bool,
    zeros_first: bool,
) -> tuple[Tensor, Tensor]:
    """One mask per sample.

    Args:
        prompt_encoder: Clicks and mask to embeddings.
        mask_decoder: Embeddings and features to a mask.
        image: (B, C, d, h, w) features.
        prompts: Clicks, the earlier mask and, where the prompt encoder has embeddings for them, boxes.
        newest_only: Quirk: only the last click of each sample is seen.
        zeros_first: Quirk: no mask yet is a mask of zero logits.

    Returns:
        Logits (B, 1, 4d, 4h, 4w) and the predicted overlap (B, 1).
    """
    points, labels = prompts.points, prompts.point_labels
    if newest_only:
        points, labels = newest_click(points, labels)
    sparse, counts = prompt_encoder.embed_points(points, labels)  # with pad_point, all of them count
    if prompts.boxes is not None:
        corners, counted = prompt_encoder.embed_boxes(prompts.boxes, prompts.box_valid)
        sparse, counts = torch.cat([sparse, corners], 1), torch.cat([counts, counted], 1)
    mask, there = prompts.mask_logits, prompts.mask_valid
    if zeros_first:
        if mask is None:
            mask = image.new_zeros(image.shape[0], 1, *(LOWRES_PER_TOKEN * n for n in image.shape[2:]))
        elif there is not None:
            mask, there = torch.where(there[:, None, None, None, None], mask, 0.0), None
    dense = prompt_encoder.embed_mask(mask, image.shape[0], there)
    lowres, iou = mask_decoder(image, prompt_encoder.dense_positions(), sparse, dense, maps=1, sparse_valid=counts)
    return lowres, iou[:, :1]


def newest_click(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's last point that is not padding, as (B, 1, 3) and (B, 1); no points stay no points."""
    if points.shape[1] <= 1:
        return points, labels
    order = torch.arange(1, points.shape[1] + 1, device=labels.device)
    last = (order * (labels != PADDING)).argmax(1)
    rows = torch.arange(points.shape[0], device=labels.device)
    return points[rows, last][:, None], labels[rows, last][:, None]

"""SAM's prompt encoder and mask decoder on slices (2D), the decoder with MA-SAM's upsampling to full size.

State-dict names are SAM's, so that ``prompt_encoder.*`` and the shared part of ``mask_decoder.*`` of a SAM checkpoint
load by name. The image encoder is in ``vit2d.py``; in 3D, see ``prompt_encoder.py`` and ``mask_decoder.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from samed3d.nn.mask_decoder import DeepMlp
from samed3d.nn.norm import LayerNorm3d
from samed3d.nn.two_way import TwoWayTransformer


class FourierPositions2d(nn.Module):
    """Positions (x, y) in [0, 1]^2 as sine and cosine of fixed random directions."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, unit: Tensor) -> Tensor:
        """(..., 2) to (..., dim)."""
        angles = 2 * math.pi * ((2 * unit - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def dense(self, height: int, width: int) -> Tensor:
        """(1, dim, height, width): the position of every token centre."""
        device = self.positional_encoding_gaussian_matrix.device
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        unit = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
        return self(unit).permute(2, 0, 1)[None]


class PromptEncoder2d(nn.Module):
    """SAM's prompt encoder, of which boxes and "no mask" are used here; the other parameters are kept for the
    checkpoint's sake.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe_layer = FourierPositions2d(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=2, stride=2),
            LayerNorm3d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, kernel_size=2, stride=2),
            LayerNorm3d(16),
            nn.GELU(),
            nn.Conv2d(16, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def embed_boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 2, 2) low and high (y, x) corners, voxel edges, on slices of ``size`` (H, W), as two tokens (B, 2,
        dim).
        """
        centres = boxes + boxes.new_tensor([[0.5], [-0.5]])  # of the box's first and last pixel, as SAM takes its boxes
        unit = centres.flip(-1) / boxes.new_tensor([size[1], size[0]])
        kinds: list[Tensor] = [self.point_embeddings.get_submodule(str(i)).get_parameter("weight") for i in (2, 3)]
        return self.pe_layer(unit) + torch.cat(kinds)

    def no_mask(self, batch: int, height: int, width: int) -> Tensor:
        """(B, dim, height, width): what stands for no mask prompt."""
        return self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(batch, -1, height, width)


class ProgressiveMaskDecoder(nn.Module):
    """Two-way transformer, four doublings to full size, one hypernetwork per class.

    Args:
        dim: Channels.
        classes: Output maps, background included.
        heads: Attention heads.
        mlp_dim: Hidden channels of the transformer's MLPs.

    Source: MA-SAM, section 3.3; channels as in the code. Its IoU head exists there too and is trained by nothing.
    """

    def __init__(self, dim: int, classes: int, heads: int = 8, mlp_dim: int = 2048) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim, 2, heads, mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(classes, dim)
        widths = [dim, *(max(4, dim // n) for n in (4, 8, 16, 32))]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
            layers += [LayerNorm3d(after)] if index < 3 else []
            layers.append(nn.GELU())
        self.output_upscaling = nn.Sequential(*layers)
        self.output_hypernetworks_mlps = nn.ModuleList(DeepMlp(dim, dim, widths[-1]) for _ in range(classes))
        self.iou_prediction_head = DeepMlp(dim, dim, classes)

    def forward(self, image: Tensor, image_pos: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            image: (B, C, h, w) features.
            image_pos: (1, C, h, w) positions.
            sparse: (B, T, C) prompt tokens, T may be 0.
            dense: (B, C, h, w) mask prompt features.

        Returns:
            (B, classes, 16 h, 16 w).
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])[None].expand(image.shape[0], -1, -1)
        tokens, positions = self.transformer(image + dense, image_pos, torch.cat([own, sparse], 1))
        fine = self.output_upscaling(positions.transpose(1, 2).unflatten(2, image.shape[2:]))
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        return (hyper @ fine.flatten(2)).unflatten(2, fine.shape[2:])

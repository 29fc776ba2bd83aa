"""scikit-image's random walker from clicks, on a bounded and coarse crop so that it answers in about a second.

Read ``controls.py`` next.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from samed3d.crops import paste_crop, sample_crop
from samed3d.errors import InputError
from samed3d.evaluation.baselines.base import ClassicalMethod, Said, longest_edge_mm
from samed3d.geometry import CropFrame, as_triple
from samed3d.volume import Volume

REACH, BETA = 0.3, 30.0
"""Room around the positive clicks as a share of the image's longest edge; how much an edge of the image holds a walker
back."""


class RandomWalker(ClassicalMethod):
    """Which kind of click would a walker meet first, who rarely crosses an edge of the image?

    The crop reaches a share ``reach`` of the image's longest edge beyond the positive clicks and is sampled with at
    most ``cells`` voxels along each axis. Its border counts as clicked negative, or a first click would take
    everything. A click paints a cube of
    ``2 * brush + 1`` cells: a walker hardly ever meets a single one.

    Source:
        Grady, Random walks for image segmentation, PAMI 2006; scikit-image's implementation. ``reach`` and ``beta``
        were chosen on training subjects (``benchmarks/tune_baselines.py``).
    """

    name = "random_walker"
    cells = 28
    brush = 1

    def __init__(
        self, volume: Volume, truth: NDArray[np.bool_] | None = None, reach: float = REACH, beta: float = BETA
    ) -> None:
        super().__init__(volume, truth)
        self.reach_mm, self.beta = reach * longest_edge_mm(volume), beta

    def segment(self, said: Said) -> NDArray[np.bool_]:
        """Probability above one half, on the volume's own voxels."""
        try:
            from skimage.segmentation import random_walker
        except ImportError as error:
            raise InputError("random_walker needs scikit-image: pip install scikit-image") from error
        spacing, shape = self.volume.grid.spacing_zyx_mm, self.volume.grid.shape_zyx
        frame = self._frame(said)
        crop, inside = sample_crop(self.volume.array, frame)
        labels = np.full(frame.shape_zyx, 0, np.int32)
        for axis in range(3):
            if frame.shape_zyx[axis] > 2:
                index: list[slice | list[int]] = [slice(None)] * 3
                index[axis] = [0, -1]
                labels[tuple(index)] = 2
        labels[~inside.numpy()] = -1
        for voxels, value in ((said.outside, 2), (said.inside, 1)):
            for voxel in voxels:
                at = tuple(int(np.floor(v + 0.5)) for v in frame.to_crop(as_triple(list(voxel))))
                if all(0 <= v < n for v, n in zip(at, frame.shape_zyx, strict=True)):
                    brush = labels[tuple(slice(max(v - self.brush, 0), v + self.brush + 1) for v in at)]
                    brush[brush != -1] = value
        if not (labels == 2).any():
            return np.ones(shape, bool)
        step_mm = [s * t for s, t in zip(spacing, frame.step_zyx_vox, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advises other solvers
            walked = random_walker(
                crop.numpy(), labels, beta=self.beta, mode="cg_j", tol=1e-3, return_full_prob=True, spacing=step_mm
            )
        probability = torch.from_numpy(np.nan_to_num(walked[0]).astype(np.float32))
        region, pasted = paste_crop(probability, frame, shape)
        mask = np.zeros(shape, bool)
        mask[region.slices] = pasted.numpy() > 0.5
        return mask

    def _frame(self, said: Said) -> CropFrame:
        """A box around the positive clicks with nearly cubic cells, never finer than the image."""
        spacing = self.volume.grid.spacing_zyx_mm
        low = [min(v[a] for v in said.inside) * s - self.reach_mm for a, s in enumerate(spacing)]
        high = [max(v[a] for v in said.inside) * s + self.reach_mm for a, s in enumerate(spacing)]
        low = [max(v, -0.5 * s) for v, s in zip(low, spacing, strict=True)]
        high = [min(v, (n - 0.5) * s) for v, n, s in zip(high, self.volume.grid.shape_zyx, spacing, strict=True)]
        cell = max(b - a for a, b in zip(low, high, strict=True)) / self.cells
        steps = as_triple([max(1.0, cell / s) for s in spacing])
        d, h, w = (max(1, int(np.ceil((b - a) / s / t))) for a, b, s, t in zip(low, high, spacing, steps, strict=True))
        middle = as_triple([(a + b) / 2 / s for a, b, s in zip(low, high, spacing, strict=True)])
        return CropFrame.centred(middle, steps, (d, h, w))

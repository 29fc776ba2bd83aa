"""What each of two processes does in ``test_training_processes.py``; started by torchrun, writes what it saw as
``rank<N>.pt``.

Usage: torchrun --nproc_per_node 2 two_processes.py OUT_FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from samed3d.config import ClickConfig, LossConfig, TrainConfig, load_config
from samed3d.models import create_model
from samed3d.training import start
from samed3d.training.loop import train
from samed3d.training.start import make_accelerator
from samed3d.training.step import InteractiveStep

NARROW = {
    "widths": [8] * 4,
    "decoder_widths": [8] * 4,
    "encoder_blocks": [1] * 4,
    "joint_blocks": 1,
    "similarity_heads": [0, 2, 2],
}
ACCUMULATE = 2
SMALL = [
    f"model.overrides={NARROW}",
    "data.crop=[16,16,16]",
    "clicks.interactions=2",
    "clicks.box_probability=0.5",
    "optim.batch=1",
    "run.precision=fp32",
    "run.log_every=1",
]

CURVE = [*SMALL, "clicks.mask_only_probability=0.3", "optim.steps=4", "optim.accumulate=2", "run.ema=0.9"]
"""A run whose losses must not depend on how many processes share its batches."""


def new_step(rank: int) -> InteractiveStep:
    """The same weights on every rank, none at zero; one rank's user draws boxes, the other's clicks."""
    torch.manual_seed(0)
    model = create_model("samed3d_unet", input_shape=(16, 16, 16), **NARROW)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return InteractiveStep(
        model, ClickConfig(interactions=2, mask_only_probability=0.0, box_probability=float(rank)), LossConfig()
    )


def sample(rank: int) -> tuple[Tensor, Tensor]:
    """A crop that differs from rank to rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    target = torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool)
    target[:, :, 2 : 8 + 4 * rank, 3:11, 4:12] = True
    return torch.randn(1, 2, 16, 16, 16, generator=generator) + target, target


def gradients(step: torch.nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}


def one_backward(accelerator: Accelerator) -> dict[str, Any]:
    """Gradients of one backward alone and of the same backward in the group, then the weights after an optimiser
    step."""
    rank = accelerator.process_index
    image, target = sample(rank)
    alone, together = new_step(rank), new_step(rank)
    alone(image, target, rank).loss.backward()
    optimiser = torch.optim.AdamW(together.parameters(), lr=1e-2)
    before = {k: v.clone() for k, v in together.state_dict().items()}
    together, optimiser = accelerator.prepare(together, optimiser)
    accelerator.backward(together(image, target, rank).loss)
    seen = gradients(together)
    optimiser.step()
    after = accelerator.unwrap_model(together).state_dict()
    return {"alone": gradients(alone), "together": seen, "before": before, "after": after}


def main(out: Path) -> None:
    """Run both parts and write what was seen."""
    drawn: list[int] = []

    class Watched(start.CropDataset):
        def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
            drawn.append(index)
            return super().__getitem__(index)

    start.CropDataset = Watched
    minutes = (
        0.02 if os.environ["RANK"] == "0" else 60.0
    )  # as if the other's clock were behind: both must still stop together
    limits = ["optim.steps=100000", f"optim.max_minutes={minutes}", f"optim.accumulate={ACCUMULATE}", "run.ema=0.9"]
    config = load_config(TrainConfig, None, [*SMALL, f"run.folder={out / 'run'}", *limits])
    accelerator = make_accelerator(config)
    found = {"processes": accelerator.num_processes, "rank": accelerator.process_index, **one_backward(accelerator)}
    train(config, quiet=True)  # hangs if the ranks do not stop at the same step
    found["drawn"] = list(drawn)
    train(load_config(TrainConfig, None, [*CURVE, "optim.batch=1", f"run.folder={out / 'curve'}"]), quiet=True)
    torch.save(found, out / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

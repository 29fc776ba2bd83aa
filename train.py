"""Train a promptable model with simulated clicks: the same as ``samed3d train``.

    python train.py --config configs/tiny_cpu.yaml
    torchrun --standalone --nproc_per_node 4 train.py --config configs/stage1.yaml

Everything is in ``samed3d/training/loop.py`` (the run) and ``samed3d/training/step.py`` (the click loop).
"""

import sys

from samed3d.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

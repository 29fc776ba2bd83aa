"""A mask from clicks and boxes on one image: the same as ``samed3d segment``.

    python infer.py ct.nii.gz --point 120,95,40 -o mask.nii.gz --preview mask.png

The options are in ``samed3d/cli/segment.py``. Read ``samed3d/inference/session.py`` next.
"""

import sys

from samed3d.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))

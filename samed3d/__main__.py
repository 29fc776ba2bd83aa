"""``python -m samed3d``: the same program as ``samed3d``."""

import sys

from samed3d.cli import main

if __name__ == "__main__":
    sys.exit(main())

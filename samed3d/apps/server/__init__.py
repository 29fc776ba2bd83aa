"""The server behind ``samed3d serve`` and ``samed3d app``: sessions over HTTP. Begin with ``app.py``."""

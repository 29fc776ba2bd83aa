"""Sessions for napari: in this process, or on a server. Needs neither napari nor Qt. Used by ``widget.py``; read
``controller.py`` next.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from samed3d.volume import SUFFIXES, Volume, write_volume


def open_local(volume: Volume, model: str = "default") -> Any:
    """A session of this process.

    Raises:
        InputError: if there is no such model.
    """
    from samed3d.inference.session import Session  # brings torch, which napari should not load before it is needed

    return Session.open(volume, model)


def load_local(path: str) -> Any:
    """A session file of ``Session.save``, with its image, prompts and history.

    Raises:
        InputError: if it is damaged, or its image is gone.
    """
    from samed3d.inference.session import Session

    return Session.load(path)


def open_remote(volume: Volume, url: str, token: str | None = None, model: str | None = None) -> Any:
    """A session on a server of ours, which is sent the image.

    The file that a volume was read from is sent as it is; any other volume as an NRRD file on the same grid.

    Raises:
        InputError: if the URL is not one.
        RemoteError: if the server does not answer, or refuses.
    """
    from samed3d.apps.client import Client

    client = Client(url, token or None)
    source = Path(volume.source)
    if source.is_file() and source.name.lower().endswith(tuple(SUFFIXES)):
        return client.open(source, model)
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder) / "image.nrrd"
        write_volume(sent, volume.array, volume.grid)
        return client.open(sent, model)


def resume_remote(session_id: str, url: str, token: str | None = None) -> Any:
    """A session that a server keeps.

    Raises:
        RemoteError: if it knows no such session.
    """
    from samed3d.apps.client import Client

    return Client(url, token or None).resume(session_id)

"""What a server writes down of a session beside its journal, and the lock on the folder of all sessions. Read
``sessions.py`` next.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from samed3d.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What ``session.json`` holds: how to open the session again."""

    image: str
    name: str
    model: str
    channel: int | None = None
    series: str | None = None
    kind: str = "rest"
    created: str = ""


def write_json(path: Path, body: object) -> None:
    """Whole or not at all, and on the disk when this returns."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_about(folder: Path) -> About | None:
    """What a session's folder says of it; None where it has no image yet, or the file is damaged."""
    try:
        return About(**json.loads((folder / "session.json").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("session %s has a damaged session.json: %s", folder.name[:6], error)
        return None


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def locked(folder: Path) -> IO[str]:
    """The folder's lock, held until closed; the system lets go of it when a process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"--sessions must be a folder that can be written, got {folder} ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(
            f"another server uses the sessions in {folder}; stop it, or give --sessions another folder"
        ) from error
    return lock

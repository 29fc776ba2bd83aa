"""A corpus of a raw folder in the user's cache: made at the first use, found at the next, made anew when a file of the
folder changed.

For commands that want labelled volumes without asking where a corpus shall lie. Everything that can be clicked on is
kept (the lenient rules), at native resolution. Read ``pipeline.py`` for the work itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from data_prep.clean import rules_from
from data_prep.convert import Settings
from data_prep.pipeline import prepare
from data_prep.readers.facts import safe_name
from samed3d.data.corpus import VERSION
from samed3d.errors import InputError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "XDG_CACHE_HOME"


def cached_corpus(data: Path, *, jobs: int = 1, progress: bool = False) -> Path:
    """The corpus of a folder of labelled volumes.

    Args:
        data: A data set of any layout that ``samed3d prepare`` recognises, a folder of them, or a corpus, which is
            returned as it is.
        jobs: Processes.
        progress: Show a progress bar.

    Returns:
        Folder of the corpus.

    Raises:
        InputError: if the folder is missing or not recognised, or holds no labelled image that could be used.
    """
    if not data.is_dir():
        raise InputError(
            f"data must be a folder of labelled volumes, got {'a file' if data.exists() else 'nothing there'}: {data}"
        )
    if (data / "corpus.json").is_file():
        return data
    out = cache_folder() / f"{safe_name(data.resolve().name)}-{content_key(data)}"
    result = prepare([data], out, Settings(rules_from("lenient", []), storage="b2nd"), jobs=jobs, progress=progress)
    for problem in result.failed:
        logger.warning("left out %s: %s", problem.path, " ".join(problem.reason.split()))
    if not result.counts["masks"]:
        why = (
            f"; the first of {len(result.failed)} problems: {' '.join(result.failed[0].reason.split())}"
            if result.failed
            else ""
        )
        raise InputError(
            f"data must hold labelled structures of at least {rules_from('lenient', []).min_voxels} voxels, got none: {data}{why}"
        )
    return out


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/samed3d/corpora``, under ``~/.cache`` where the variable is not set."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen if chosen else Path.home() / ".cache") / "samed3d" / "corpora"


def content_key(data: Path) -> str:
    """Changes with the names, sizes and times of the files under a folder, with where it is, and with the version of
    corpora.
    """
    files = sorted(p for p in data.rglob("*") if p.is_file())
    about = [[str(p.relative_to(data)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    text = json.dumps([VERSION, str(data.resolve()), about])
    return hashlib.sha256(text.encode()).hexdigest()[:12]

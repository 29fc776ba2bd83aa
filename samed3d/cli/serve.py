"""``samed3d serve``: its options and how they become a server. The server is in ``apps/server.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samed3d.cli.options import Device, Model, Quiet, check_exists
from samed3d.errors import InputError

if TYPE_CHECKING:
    from samed3d.apps.service import ServerOptions

TOKEN_VARIABLE = "SAMED3D_TOKEN"
DEFAULT_PORT = 1527
"""The port that programs for nnInteractive's server suggest."""


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on. Any but loopback demands a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = DEFAULT_PORT,
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose images clients may open by path; repeatable.")
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="Folder for sessions and their journals. [default: in the user's state]")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File that holds the token; or set {TOKEN_VARIABLE}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name that browsers reach this server by; repeatable.")
    ] = None,
    model: Model = "default",
    also: Annotated[
        list[str] | None, typer.Option("--also-model", help="Another model that clients may ask for; repeatable.")
    ] = None,
    device: Device = "auto",
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions in memory at once; others sleep on disk.")] = 16,
    idle_minutes: Annotated[
        float, typer.Option(min=0.05, help="After so long without a request a session sleeps. Nothing is lost.")
    ] = 10,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest upload, in MiB.")] = 2048,
    max_voxels: Annotated[int, typer.Option(min=1, help="Largest image.")] = 2**29,
    quiet: Quiet = False,
) -> None:
    """Serve sessions over HTTP: a REST API, and nnInteractive's protocol for napari, 3D Slicer and others."""
    check_installed()
    from samed3d.apps.security import Access, check_binding
    from samed3d.apps.server import run_server
    from samed3d.apps.service import ServerOptions
    from samed3d.apps.sessions import Limits
    from samed3d.volume.untrusted import ReadLimits

    secret = read_token(token_file)
    check_binding(host, secret)
    names = {host.lower(), *(name.lower() for name in allow_host or [])} - {"0.0.0.0", "::"}
    for folder in root or []:
        check_exists(folder, "--root")
    options = ServerOptions(
        sessions=sessions or default_sessions(),
        roots=tuple(folder.resolve() for folder in root or []),
        model=model,
        models=tuple(also or []),
        device=device,
        access=Access(secret, frozenset(names), largest_upload=max_upload_mb * 2**20),
        limits=Limits(awake=max_sessions, idle_seconds=60 * idle_minutes),
        images=ReadLimits(max_voxels),
    )
    check_models(options)
    if not quiet:
        shown = f"[{host}]" if ":" in host else host
        typer.echo(
            f"samed3d serves at http://{shown}:{port} (API: /docs, sessions in {options.sessions}); Ctrl+C stops it"
        )
    run_server(options, host, port)


def check_installed() -> None:
    """Say what to install where the server's libraries are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "python_multipart", "blosc2") if find_spec(name) is None]
    if missing:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'samed3d[serve]'")


def check_models(options: ServerOptions) -> None:
    """Refuse at once what would only fail at the first click.

    Raises:
        InputError: for a model or device that is not there.
    """
    from samed3d.inference.session import pick_device
    from samed3d.models import load_promptable

    pick_device(options.device)
    for name in (options.model, *options.models):
        load_promptable(name)


def read_token(file: Path | None) -> str:
    """The token of a file or of the environment; never of an option, which other users of the machine can read."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        return file.read_text().strip()
    except OSError as error:
        raise InputError(f"--token-file cannot be read: {file} ({error.strerror})") from error


def default_sessions() -> Path:
    """Where sessions are kept unless the user says otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "samed3d" / "sessions"

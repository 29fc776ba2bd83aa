"""``samed3d serve`` and ``samed3d app``: their options. The server is in ``apps/server``."""

from __future__ import annotations

import os
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samed3d.cli.options import Device, Model, Paths, Quiet, Texts, Untilt
from samed3d.errors import InputError
from samed3d.output import check_input

if TYPE_CHECKING:
    from samed3d.apps.server.service import ServerOptions

TOKEN_VARIABLE = "SAMED3D_TOKEN"
SERVE_PORT = 1527
"""The port that nnInteractive's clients suggest."""
APP_PORT = 1528

Sessions = Annotated[Path | None, typer.Option(help="Folder for sessions. [default: in the user's state]")]
OtherModels = Annotated[Texts, typer.Option("--also-model", help="Another model for clients to choose; repeatable.")]


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on. Any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = SERVE_PORT,
    root: Annotated[Paths, typer.Option(help="Folder whose images clients may open by path; repeatable.")] = None,
    sessions: Sessions = None,
    token_file: Annotated[Path | None, typer.Option(help=f"File with the token; or set {TOKEN_VARIABLE}.")] = None,
    allow_host: Annotated[Texts, typer.Option(help="Name under which browsers reach this server.")] = None,
    model: Model = "default",
    also: OtherModels = None,
    device: Device = "auto",
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions in memory at once; others stay on disk.")] = 16,
    max_memory_mb: Annotated[int, typer.Option(min=1, help="Memory of all of them together.")] = 1024,
    idle_minutes: Annotated[float, typer.Option(min=0.05, help="Unload a session without requests; it is kept.")] = 10,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest upload, in MiB.")] = 2048,
    max_voxels: Annotated[int, typer.Option(min=1, help="Largest image.")] = 2**29,
    quiet: Quiet = False,
) -> None:
    """Serve sessions over HTTP: a REST API, and nnInteractive's protocol for napari, 3D Slicer and others."""
    from samed3d.apps.server.app import run_server
    from samed3d.apps.server.security import check_binding
    from samed3d.apps.server.service import ServerOptions
    from samed3d.volume.files import ReadLimits

    token = _read_token(token_file)
    check_binding(host, token)
    names = {host.lower(), *(name.lower() for name in allow_host or [])} - {"0.0.0.0", "::"}
    for folder in root or []:
        check_input(folder, "--root")
    options = ServerOptions(
        sessions or default_sessions(),
        tuple(folder.resolve() for folder in root or []),
        model,
        tuple(also or []),
        device,
        token=token,
        hosts=frozenset(names),
        largest_upload=max_upload_mb * 2**20,
        loaded=max_sessions,
        memory_bytes=max_memory_mb * 2**20,
        idle_seconds=60 * idle_minutes,
        images=ReadLimits(max_voxels),
    )
    _check_models(options)

    def ready(address: str) -> None:
        if not quiet:
            place = f"API: /docs, sessions in {options.sessions}"
            typer.echo(f"samed3d serves at {address} ({place}); Ctrl+C stops it")

    run_server(options, host, port, ready=ready)


def app(
    volume: Annotated[Path | None, typer.Argument(help="Image or DICOM folder to open at once.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = APP_PORT,
    root: Annotated[Paths, typer.Option(help="Folder whose images the page may open; repeatable. [default: .]")] = None,
    sessions: Sessions = None,
    model: Model = "default",
    also: OtherModels = None,
    device: Device = "auto",
    untilt: Untilt = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    quiet: Quiet = False,
) -> None:
    """Click on volumes in the browser: three planes and 3D, on this machine only. Work is kept across restarts."""
    from samed3d.apps.server.app import run_server
    from samed3d.apps.server.service import ServerOptions
    from samed3d.volume import read_volume

    page = page_folder()
    if page is None:
        raise InputError("this installation lacks the web viewer; install node, then run: make viewer")
    for folder in root or []:
        check_input(folder, "--root")
    roots = [folder.resolve() for folder in root or [Path.cwd()]]
    if volume is not None:
        read_volume(volume, untilt=untilt)  # an image that cannot be opened is refused here, not in the page
        roots.append(volume.resolve() if volume.is_dir() else volume.resolve().parent)
    options = ServerOptions(sessions or default_sessions(), tuple(roots), model, tuple(also or []), device, page)
    _check_models(options)

    def ready(address: str) -> None:
        if not quiet:
            place = f"sessions in {options.sessions}"
            typer.echo(f"samed3d is at {address} ({place}); Ctrl+C stops it, and nothing is lost")
        threading.Thread(target=_open_page, args=(address, volume, untilt, browser, quiet), daemon=True).start()

    run_server(options, "127.0.0.1", port, ready=ready)


def _open_page(address: str, volume: Path | None, untilt: bool, browser: bool, quiet: bool) -> None:
    """Open the volume on the server, and the page on the volume."""
    from samed3d.apps.client import Client, RemoteError

    page = f"{address}/app/"
    if volume is not None:
        try:
            page += f"#{Client(address).open_path(str(volume.resolve()), untilt=untilt).id}"
            if not quiet:
                typer.echo(f"{volume.name} is open at {page}")
        except RemoteError as error:
            typer.echo(f"samed3d: error: {error}", err=True)
    if browser:
        webbrowser.open(page)


def _check_models(options: ServerOptions) -> None:
    """Refuse a missing model or device at the start instead of at the first click."""
    from samed3d.devices import pick_device
    from samed3d.models import load_promptable

    pick_device(options.device)
    for name in (options.model, *options.models):
        load_promptable(name)


def _read_token(file: Path | None) -> str:
    """The token of a file or of the environment; never of an option, which other users of the machine can read."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        return file.read_text().strip()
    except OSError as error:
        raise InputError(f"--token-file cannot be read: {file} ({error.strerror})") from error


def page_folder() -> Path | None:
    """Folder of the web page, or None where it was installed without the volume viewer."""
    import samed3d.apps

    folder = Path(samed3d.apps.__file__).with_name("viewer")
    return folder if (folder / "vendor" / "niivue.js").is_file() else None


def default_sessions() -> Path:
    """Where sessions are kept unless the user chooses another folder."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "samed3d" / "sessions"

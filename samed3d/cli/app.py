"""``samed3d app``: the web page, served to this machine only and opened in the browser. The page is in
``apps/viewer``.
"""

from __future__ import annotations

import threading
import time
import urllib.request
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

import samed3d.apps
from samed3d.cli.options import Device, Model, Quiet, check_exists
from samed3d.cli.serve import check_installed, check_models, default_sessions
from samed3d.errors import InputError

DEFAULT_PORT = 1528
_START_SECONDS = 30.0


def app(
    volume: Annotated[
        Path | None, typer.Argument(help="Image or DICOM folder to open at once; others are opened in the page.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = DEFAULT_PORT,
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose images the page may open; repeatable. [default: here]")
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="Folder for sessions and their journals. [default: in the user's state]")
    ] = None,
    model: Model = "default",
    also: Annotated[
        list[str] | None, typer.Option("--also-model", help="Another model that the page offers; repeatable.")
    ] = None,
    device: Device = "auto",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    quiet: Quiet = False,
) -> None:
    """Click on volumes in the browser: three planes and 3D, on this machine only. Work is kept across restarts."""
    check_installed()
    from samed3d.apps.server import run_server
    from samed3d.apps.service import ServerOptions
    from samed3d.volume import read_volume

    page = Path(samed3d.apps.__file__).with_name("viewer")
    if not (page / "vendor" / "niivue.js").is_file():
        raise InputError(
            "the web viewer is not in this installation; with node there, run: make viewer, or install samed3d again"
        )
    for folder in root or []:
        check_exists(folder, "--root")
    roots = [folder.resolve() for folder in root or [Path.cwd()]]
    if volume is not None:
        check_exists(volume, "image")
        read_volume(volume)  # what cannot be opened is refused here, not in the page
        roots.append(volume.resolve() if volume.is_dir() else volume.resolve().parent)
    options = ServerOptions(
        sessions=sessions or default_sessions(),
        roots=tuple(roots),
        model=model,
        models=tuple(also or []),
        device=device,
        page=page,
    )
    check_models(options)
    address = f"http://127.0.0.1:{port}"
    if not quiet:
        typer.echo(f"samed3d is at {address} (sessions in {options.sessions}); Ctrl+C stops it, and nothing is lost")
    threading.Thread(target=_open_page, args=(address, volume, browser, quiet), daemon=True).start()
    run_server(options, "127.0.0.1", port)


def _open_page(address: str, volume: Path | None, browser: bool, quiet: bool) -> None:
    """Once the server answers, open the volume on it and the page on the volume."""
    from samed3d.apps.client import Client, RemoteError

    client = Client(address)
    ends = time.monotonic() + _START_SECONDS
    while not _answers(f"{address}/healthz"):
        if time.monotonic() > ends:
            return
        time.sleep(0.1)
    page = f"{address}/app/"
    if volume is not None:
        try:
            page += f"#{client.open_path(str(volume.resolve())).id}"
        except RemoteError as error:
            typer.echo(f"samed3d: error: {error}", err=True)
        if not quiet:
            typer.echo(f"{volume.name} is open at {page}")
    if browser:
        webbrowser.open(page)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False

"""The command line: every command of ``samed3d``, ``python -m samed3d``, ``infer.py`` and ``train.py``.

Here is the list of commands and what an error becomes; each command's options are in the file named after it, and the
work is elsewhere, imported inside the commands, so that ``--help`` answers at once. Exit codes: 0 done, 2 the user's
input (one line on stderr), 1 our fault (one line, or the traceback with ``--debug``), 130 interrupted. Read
``inference/session.py`` next for what ``segment`` does,
``training/loop.py`` for ``train``.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence

import typer

from samed3d.cli import compare, doctor, evaluate, masks, models, prepare, segment, serve, train
from samed3d.errors import InputError

# A file system that refuses is the user's to mend, whatever was being written.
_USER_ERRNOS = {getattr(errno, name) for name in "ENOSPC EDQUOT EACCES EPERM EROFS ENAMETOOLONG ENOTDIR ELOOP".split()}

_INTERRUPTED = 130

# Commands of two words. Their first is a command as well, which takes any number of folders, so that no group can hold
# them.
_TWO_WORDS = ("prepare info", "evaluate compare", "evaluate report")

_LONG_JOBS = ("train", "evaluate", "prepare", "serve", "app")


def commands() -> typer.Typer:
    """Every command, in the order of the help."""
    app = typer.Typer(
        name="samed3d",
        help="Fully-3D promptable segmentation. Every command takes --debug: show the traceback of an internal error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(segment.demo)
    app.command()(segment.segment)
    app.command()(masks.clean)
    app.command()(masks.measure)
    app.command()(serve.app)
    app.command()(serve.serve)
    app.command()(prepare.prepare)
    app.command("prepare info", hidden=True)(prepare.prepare_info)
    app.command()(train.train)
    app.command()(evaluate.evaluate)
    app.command("evaluate compare", hidden=True)(compare.compare)
    app.command("evaluate report", hidden=True)(compare.report)
    app.command()(models.models)
    app.command()(doctor.doctor)
    app.command("import-weights")(models.import_weights)
    app.command()(models.export)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if " ".join(arguments[:2]) in _TWO_WORDS:
        arguments[:2] = [" ".join(arguments[:2])]
    _set_up_logging(arguments)
    try:
        result = commands()(arguments, prog_name="samed3d", standalone_mode=False)
        if result == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            return _fail("interrupted", _INTERRUPTED)
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if message := getattr(error, "format_message", None):  # typer's own errors: unknown option, missing argument
            return (
                _fail(f"{message()} (see samed3d --help)", 2) if message() else 2
            )  # empty: the help was asked for and is printed
        if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
            return _fail(f"{error.strerror}: {error.filename or 'a file that was being written'}", 2)
        if debug:
            raise
        return _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1)


def _set_up_logging(arguments: list[str]) -> None:
    """Long jobs say what they do wherever they write to; the others only to a terminal, so that an error stays one
    line.
    """
    long_job = arguments[:1] and arguments[0] in _LONG_JOBS
    quiet = "--quiet" in arguments or "-q" in arguments
    logger = logging.getLogger("samed3d")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("samed3d: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(
        logging.INFO if not quiet and (long_job or sys.stderr.isatty()) else logging.ERROR if quiet else logging.WARNING
    )


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(f"samed3d: {line}" if code == 1 else f"samed3d: error: {line}", err=True)
    return code

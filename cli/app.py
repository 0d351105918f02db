"""The command `detachnet`: one function per command, in files of their own.

Nothing here imports torch; a command imports what it needs when it runs, so help and mistakes answer at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .cascade import cascade
from .compare import compare
from .console import show_tracebacks
from .detach import detach
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .predict import predict
from .profile import profile
from .recalibrate import recalibrate
from .recipes import recipes
from .report import report
from .train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One CNN, many devices: train a network and its detachable sub-models in one file.",
)
COMMANDS = (
    *(train, inspect, evaluate, compare, recalibrate, detach),
    *(export, profile, cascade, predict, report, recipes),
)
for command in COMMANDS:
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"detachnet {version('detachnet')}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    show_tracebacks(traceback)


def main() -> None:
    """Run the command line."""
    app()

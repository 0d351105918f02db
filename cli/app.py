"""The command `detachnet`: one function per command, in files of their own.

Nothing here imports torch; a command imports what it needs when it runs, so help and mistakes answer at once.
"""

from __future__ import annotations

import io
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .cascade import cascade
from .compare import compare
from .console import show_tracebacks, show_what_is_said
from .demo import demo
from .detach import detach
from .evaluate import evaluate
from .export import export
from .init import init
from .inspect import inspect
from .predict import predict
from .profile import profile
from .push import push
from .recalibrate import recalibrate
from .recipes import recipes
from .report import report
from .search import search
from .train import train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One CNN, many devices: train a network and its detachable sub-models in one file.",
)
COMMANDS = (
    *(init, train, inspect, evaluate, compare, search, recalibrate, detach),
    *(export, profile, cascade, predict, report, demo, push, recipes),
)
PACKAGES = (
    *("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "pillow"),
    *("onnx", "onnxruntime", "executorch", "webdataset", "datasets"),
)
"""What a report of a mistake should name, as far as it is installed."""
for command in COMMANDS:
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"detachnet {version('detachnet')}")
        typer.echo(f"python {platform.python_version()}, {platform.platform()}")
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                typer.echo(f"{package} {version(package)}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions, for reports of mistakes."
        ),
    ] = False,
) -> None:
    show_tracebacks(traceback)
    show_what_is_said()


def main() -> None:
    """Run the command line.

    What a stream cannot write is a question mark there, and one that is closed takes nothing.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()

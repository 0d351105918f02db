"""All that the terminal shows: tables, the progress of a training, errors."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from detachnet.errors import DetachNetError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from detachnet.detachable import DetachableNet
    from detachnet.plan import DetachPlan

P = ParamSpec("P")
R = TypeVar("R")
_settings = {"traceback": False}


def show_tracebacks(show: bool) -> None:
    """Whether an error is shown with its traceback."""
    _settings["traceback"] = show


def console(stderr: bool = False) -> Console:
    """A rich console on standard output or standard error."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160  # a log file is no narrow terminal
    return Console(stderr=stderr, highlight=False, width=width)


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Show a user's mistake as its message and leave with exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except DetachNetError as error:
            if _settings["traceback"]:
                raise
            show_error(error)
            raise typer.Exit(2) from None

    return run


def show_error(error: DetachNetError, label: str = "Error") -> None:
    """Print an error's message on standard error."""
    first, *rest = str(error).splitlines()
    out = console(stderr=True)
    out.print(f"[bold red]{label}:[/] {_escape(first)}", soft_wrap=True)
    for line in rest:
        out.print(f"[dim]{_escape(line[:11])}[/]{_escape(line[11:])}", soft_wrap=True)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table; the first `left` columns stand on the left, the others on the right."""
    from rich.table import Table

    grid = Table(header_style="dim", box=None, pad_edge=False)
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i < left else "right", no_wrap=i != left - 1 or i == 0)
    for row in rows:
        grid.add_row(*map(_escape, row))
    out = console()
    out.print(f"\n[bold]{_escape(title)}[/]", soft_wrap=True)
    out.print(grid)


def plan_table(plan: DetachPlan) -> None:
    """Print a family's plan."""
    table(plan.title, plan.header, plan.rows(), left=4)
    for hint in plan.hints:
        console().print(f"[yellow]hint:[/] {_escape(hint)}")


def note(text: str) -> None:
    """Print a line of plain text, not wrapped: commands in it are meant to be copied."""
    console().print(_escape(text), soft_wrap=True)


class TrainingDisplay:
    """A `Listener` that shows a progress bar with images per second and time left, and a line per epoch."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.images = 0
        self.began = self.shown = time.monotonic()

    def on_start(self, net: DetachableNet, done: int, total: int) -> None:
        """Show the plan, then the bar."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        plan_table(net.plan)
        note("")
        if done:
            note(f"going on after step {done} of {total}")
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[speed]} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
        )
        self.progress = Progress(*columns, console=console(), transient=True, speed_estimate_period=600)
        self.task = self.progress.add_task("", total=total, completed=done, epoch="", speed="–", loss="–")
        self.progress.start()
        self.began = time.monotonic()

    def on_step(self, epoch: int, images: int, losses: Mapping[str, Any]) -> None:
        """Advance the bar, at most twice a second; in a log file, print a line a minute."""
        self.images += images
        if self.progress is None or self.task is None:
            return
        self.progress.update(self.task, advance=1)
        now = time.monotonic()
        in_terminal = self.progress.console.is_terminal
        if now - self.shown < (0.5 if in_terminal else 60):
            return
        self.shown = now
        loss = " ".join(f"{float(value.detach()):.3f}" for value in losses.values())
        speed = f"{self.images / (now - self.began):,.0f}"
        self.progress.update(self.task, epoch=str(epoch + 1), speed=speed, loss=loss)
        if not in_terminal:
            task = self.progress.tasks[0]
            left = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
            note(f"step {task.completed:.0f} of {task.total:.0f}, {speed} images/s, {left} left, loss {loss}")

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """Print the epoch's accuracies."""
        accuracy = "  ".join(f"{name} {100 * value:5.2f} %" for name, value in row["test_accuracy"].items())
        loss = " ".join(f"{value:.3f}" for value in row["train_loss"].values())
        line = f"epoch {row['epoch']:>3}  accuracy  {accuracy}  training loss {loss}"
        (self.progress.console if self.progress else console()).print(line)

    def close(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()


def print_json(value: object) -> None:
    """Print JSON for programs."""
    import json

    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)

"""All that the terminal shows: tables, the progress of a training, errors."""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.cells import cell_len

from detachnet.errors import DetachNetError, TrainingError, one_line
from detachnet.ranks import is_first

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from detachnet.surgery.detachable import DetachableNet
    from detachnet.text import Table

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
    return Console(stderr=stderr, highlight=False, emoji=False, width=width)  # `:b:` is a span


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Show a user's mistake as its message and leave with exit code 2; a training that went wrong with 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except DetachNetError as error:
            if _settings["traceback"]:
                raise
            show_error(error, takes=get_type_hints(command))
            raise typer.Exit(1 if isinstance(error, TrainingError) else 2) from None
        except OSError as error:  # a path that is none, a disk that fails: no mistake of the program
            if _settings["traceback"] or isinstance(error, BrokenPipeError):
                raise
            show_error(DetachNetError(f"cannot read or write: {error}"))
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:
            from detachnet.memory import is_shortage

            if _settings["traceback"] or not is_shortage(error):
                raise
            show_error(DetachNetError("there is no memory left for that", what=one_line(error)))
            raise typer.Exit(2) from None

    return run


def show_error(error: DetachNetError, label: str = "Error", takes: Mapping[str, Any] | None = None) -> None:
    """Print an error's message on standard error; what it says to try, in the words of what the command takes."""
    first, *rest = str(error).splitlines()
    out = console(stderr=True)
    out.print(f"[bold red]{label}:[/] {_escape(first)}", soft_wrap=True)
    for line in rest:
        kind, text = line[:11], line[11:]
        text = as_options(text, takes or {}) if kind.strip() == "try" else text
        out.print(f"[dim]{_escape(kind)}[/]{_escape(text)}", soft_wrap=True)


def as_options(text: str, takes: Mapping[str, Any]) -> str:
    """A text in which arguments of the library, `drop=['a:b']`, are options, `--drop a:b`, where there are such.

    Args:
        text: Calls in it stay as they are.
        takes: The options of a command, and their types.
    """

    def option(found: re.Match[str]) -> str:
        known = (name for name in (found[1], found[1].removesuffix("s")) if takes.get(name, bool) is not bool)
        before = text[: found.start()]
        if (name := next(known, None)) is None or before.count("(") > before.count(")"):
            return found[0]
        values = re.findall(r"[^\s,()\[\]']+", found[2])
        flag = f"--{name.replace('_', '-')}"
        several = any(get_origin(kind) is list for kind in (takes[name], *get_args(takes[name])))
        return " ".join(f"{flag} {value}" for value in values) if several else f"{flag} {','.join(values)}"

    return re.sub(r"\b([a-z_]+)=(\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\d[\d.]*)", option, text)


def show(table: Table) -> None:
    """Print a table and its notes, and nothing of it is cropped where there is little room.

    Names of columns and text wrap; where that is not enough, each row is a block with a line for each column.
    """
    out = console()
    lines = table.lines()
    fits = max(map(cell_len, lines), default=0) <= out.width
    wrapped = table if fits else _wrapped(table, out.width)
    out.print(f"\n[bold]{_escape(table.title)}[/]", soft_wrap=True)
    if wrapped is None:
        _show_blocks(table, out)
    else:
        _show_grid(wrapped, out, gap=2 if fits else 1)
    for line in table.notes:
        word, colon, rest = line.partition(":")
        out.print(f"[yellow]{_escape(word)}{colon}[/]{_escape(rest)}", soft_wrap=True)


def _show_grid(table: Table, out: Console, gap: int) -> None:
    """Print a table that fits."""
    from rich.table import Table as Grid

    grid = Grid(header_style="dim", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for i, name in enumerate(table.header):
        grid.add_column(name, justify="left" if i < table.left else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*map(_escape, row))
    out.print(grid)


def _show_blocks(table: Table, out: Console) -> None:
    """Print the rows below each other, each with the names of its columns."""
    from rich.table import Table as Grid

    for name, *cells in table.rows:
        out.print(_escape(name), overflow="fold")
        grid = Grid(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for column, cell in zip(table.header[1:], cells, strict=True):
            if cell:
                grid.add_row(f"  {column}", _escape(cell))
        out.print(grid)


def _wrapped(table: Table, room: int) -> Table | None:
    """A table whose columns of text, but the first, take several lines; None where that does not make it fit.

    They break at spaces; if they must, behind the colons of spans, too.
    """
    header = tuple(name.replace(" ", "\n") for name in table.header)
    columns = list(zip(header, *table.rows, strict=True))
    for at in (r"\s*\S+", r"\s*:?[^\s:]+:?"):
        widest = [max(map(_width, column)) for column in columns]
        least = [
            max(cell_len(part.strip()) for cell in column for part in re.findall(at, cell) or [""])
            if 0 < i < table.left
            else widest[i]
            for i, column in enumerate(columns)
        ]
        spare = room - sum(least) - len(columns) + 1
        if spare < 0:
            continue
        wanted = [most - few for most, few in zip(widest, least, strict=True)]
        given = [want if sum(wanted) <= spare else want * spare // sum(wanted) for want in wanted]
        widths = [few + more for few, more in zip(least, given, strict=True)]
        rows = tuple(tuple(_filled(c, w, at) for c, w in zip(row, widths, strict=True)) for row in table.rows)
        return replace(table, header=header, rows=rows)
    return None


def _filled(text: str, width: int, at: str) -> str:
    """A text in lines that are no longer than a width, of the parts that a pattern finds."""
    lines = [""]
    for part in re.findall(at, text):
        if cell_len(lines[-1] + part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    return "\n".join(lines)


def _width(text: str) -> int:
    """The width of the longest line."""
    return max(map(cell_len, text.split("\n")))


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

        show(net.plan.table)
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
        (self.progress.console if self.progress else console()).print(_escape(line))

    def close(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()


@contextmanager
def progress() -> Iterator[None]:
    """A bar on standard error for what the library tells inside; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from detachnet.progress import listening

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    # It is drawn between two steps and by no thread of its own: what is timed meanwhile must not wait for it.
    bar = Progress(*columns, console=console(stderr=True), transient=True, auto_refresh=False)
    tasks: dict[str, TaskID] = {}
    shown = 0.0

    def told(what: str, done: int, total: int) -> None:
        nonlocal shown
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total, visible=done < total)
        if (now := time.monotonic()) - shown > 0.1 or done == total:
            shown = now
            bar.refresh()

    with bar, listening(told):
        yield


class Said(logging.Handler):
    """What the library logs, on standard error as it is then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        label = "Warning" if record.levelno >= logging.WARNING else "Note"
        console(stderr=True).print(f"[yellow]{label}:[/] {_escape(record.getMessage())}", soft_wrap=True)


def show_what_is_said() -> None:
    """Show what the library logs, in the first of the processes that torchrun starts."""
    if not is_first():
        return
    logger = logging.getLogger("detachnet")
    if not any(isinstance(handler, Said) for handler in logger.handlers):
        logger.addHandler(Said())
        logger.setLevel(logging.INFO)


def print_json(value: object) -> None:
    """Print JSON for programs."""
    import json

    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _escape(text: str) -> str:
    """Text as it is shown: rich's brackets stay brackets, and nothing in it speaks to the terminal."""
    from rich.markup import escape

    return escape(plain(text))


def plain(text: str) -> str:
    """A text whose control characters are written out, as `\\x1b` and the like; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SHOWN else repr(c)[1:-1] for c in text)


_SHOWN = "\n\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""Neither printable, as Python has it, nor of any harm."""

"""How far something is, told to whoever listens: the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]
"""Is called with what is done, how many are done and how many there are."""
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of all progress inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(what: str, done: int, total: int) -> None:
    """Say that `done` of `total` are done."""
    if listener := _listener.get():
        listener(what, done, total)


def counted(things: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The same things, told one by one as they are done."""
    for done, thing in enumerate(things):
        tell(what, done, total)
        yield thing
    tell(what, total, total)

"""A disk that is full, and one that fails."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Failing:
    """The n-th operation on the disk fails, once or from then on; `failed` says whether there was one."""

    def __init__(self, number: int, *, for_good: bool) -> None:
        self.number, self.for_good, self.failed = number, for_good, False

    def _wrapped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.number -= 1
            if self.number == 0 or (self.number < 0 and self.for_good):
                self.failed = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return operation(*args, **kwargs)

        return run

    def __enter__(self) -> "Failing":
        self._patch = pytest.MonkeyPatch()
        for name in ("write", "fsync", "replace", "rename", "mkdir"):
            self._patch.setattr(os, name, self._wrapped(getattr(os, name)))
        self._patch.setattr(Path, "write_bytes", self._wrapped(Path.write_bytes))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def each_failure(most: int = 1000) -> Iterator[Failing]:
    """Failures of the first operation, the second, and so on, once and for good, until there are no more."""
    for for_good in (False, True):
        for number in range(1, most):
            failing = Failing(number, for_good=for_good)
            yield failing
            if not failing.failed:
                break

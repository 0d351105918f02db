"""Freed memory: kept by the C library for the next tensor, or given back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of `mallopt(3)`."""


def keep_freed() -> None:
    """Have this process keep the memory it frees, where glibc is its C library; elsewhere nothing happens.

    By default tensors above 32 MiB come from the system each time and go back to it, and the system clears every
    page of them anew. Kept, they are reused; the process stays as large as it was at its largest.

    Source: mallopt(3): without mmap and trimming.
    """
    if set_option := _function("mallopt"):
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Return what the C library has kept so far, where it can."""
    if trim := _function("malloc_trim"):
        trim(0)


def _function(name: str) -> Callable[..., Any] | None:
    """A function of glibc; nothing where that is not the C library."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None

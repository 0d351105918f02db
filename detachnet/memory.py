"""The memory of this process: what is freed and kept, and how much there was at the highest."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of `mallopt(3)`."""
RUNS = 5
Run = Callable[[], object]


_SHORT = ("out of memory", "allocate memory", "not enough memory", "could not create a primitive", "bad_alloc")
"""What torch's errors say where there was no memory: CUDA's, the CPU's, those of oneDNN and of C++."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error is of memory that was not there."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SHORT)


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


def measure_here(prepare: Callable[[], Run], runs: int = RUNS) -> int:
    """Bytes that making something and running it add to this process's resident memory at their highest."""
    gc.collect()
    give_back()
    before = _resident("VmRSS")
    run = prepare()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(runs):
        run()
    return _resident("VmHWM") - before


class TooMuchError(RuntimeError):
    """More tensors, or larger ones, than something may take."""


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it so many tensors, of so many bytes, may be made in all; those without memory are counted, too.

    Args:
        num_bytes: Of all of them, also of those that are freed again.
        num_tensors: How many.

    Raises:
        TooMuchError: There would be more; of those that are made of a size, before they are made.
    """

    def __init__(self, num_bytes: int, num_tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes, self._tensors = num_bytes, num_tensors
        self._exceeded = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, if what it makes is not too much."""
        kwargs = kwargs or {}
        if size := _size_of_new(func._schema, args, kwargs):
            self._take(4 * size, 0)  # before it is there
            self._bytes += 4 * size
        made = func(*args, **kwargs)
        if any(value.alias_info is None for value in func._schema.returns):
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, Tensor):
                    self._take(0 if tensor.is_meta else tensor.nbytes, 1)
        return made

    def _take(self, num_bytes: int, num_tensors: int) -> None:
        self._bytes -= num_bytes
        self._tensors -= num_tensors
        self._exceeded |= min(self._bytes, self._tensors) < 0
        if self._exceeded:  # whoever catches it and tries another way gets nothing either
            raise TooMuchError("more memory or layers than the file has weights for")


class Brief(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it so many operators may run, and so many modules be put into others.

    Args:
        num_calls: How many operators.
        num_layers: How many modules.

    Raises:
        TooMuchError: There would be more.
    """

    def __init__(self, num_calls: int, num_layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._layers = num_calls, num_layers
        self._thread = threading.get_ident()

    def __enter__(self) -> Brief:
        self._hook = register_module_module_registration_hook(self._put)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, if there were not too many."""
        self._take(1, 0)
        return func(*args, **(kwargs or {}))

    def _put(self, *_: Any) -> None:
        """A module becomes part of another one, in whatever thread."""
        if threading.get_ident() == self._thread:
            self._take(0, 1)

    def _take(self, num_calls: int, num_layers: int) -> None:
        self._calls -= num_calls
        self._layers -= num_layers
        if min(self._calls, self._layers) < 0:  # whoever catches it and tries another way gets nothing either
            raise TooMuchError("more layers, or more to do, than the file has weights for")


def _size_of_new(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Values of the tensor that an operator makes of a size, or like another one; 0 if it takes no memory."""
    first = schema.arguments[0].name if schema.arguments and args else ""
    like = args[0] if first == "self" and schema.name.endswith("_like") else None
    device = kwargs.get("device") or ("cpu" if like is None else like.device)
    if torch.device(device).type == "meta" or (like is None and first != "size"):
        return 0
    return math.prod(args[0]) if like is None else int(like.numel())


def _resident(field: str) -> int:
    """A field of `/proc/self/status`, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {field}")

"""value -> what it holds, in a form to be compared; and its parts."""

from __future__ import annotations

import random
import sys
import warnings
import weakref
import zlib
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial
from inspect import ismodule
from threading import local
from types import (
    BuiltinFunctionType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MethodType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

PLAIN = (int, float, complex, str, bytes, type(None))
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
SINGLE = (Tensor, fx.Proxy, fx.Node, nn.Module, type, FunctionType, BuiltinFunctionType, MethodType)
OPAQUE = (*sys.stdlib_module_names, "torch", "numpy", "detachnet")
"""Packages whose objects hold nothing that counts here, generators of random numbers and containers apart."""
_HOLDERS = (SimpleNamespace, Namespace, UserDict, UserList, ChainMap, local)
"""What of them holds what a user puts there."""
_SINGLETONS = (torch.dtype, torch.memory_format, torch.layout)
_COMMON = (random._inst, np.random.mtrand._rand)
"""What `from random import random` and NumPy's functions are methods of."""
TRACED = "a traced value"
"""The mark of what a pass makes while it is traced."""
MOST = 256
"""Items of a container that are looked at; of longer ones only their number."""
LONGEST = 1 << 14
"""Of lists of plain numbers: up to so many are looked at."""
DEEPEST = 4096
"""Objects and containers inside of one another that are looked into."""
LARGEST = 1 << 20
"""Bytes of an array of NumPy's whose values are looked at; of larger ones only the shape."""


def content(  # noqa: PLR0911  # one for each kind
    value: Any, mark: Callable[[Any], Any] | None = None, seen: set[int] | None = None
) -> Any:
    """What a value holds; of tensors, modules and functions what `mark` makes of them, or nothing.

    Each object is looked into once, and so many of them in all.
    """
    seen = set() if seen is None else seen
    if isinstance(value, PLAIN):
        return value if value == value else "nan"  # noqa: PLR0124
    if isinstance(value, GENERATORS):
        return None if mark else generator_state(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.shape, zlib.crc32(value.tobytes()) if value.nbytes <= LARGEST else None
    if isinstance(value, bytearray | array):
        return len(value), zlib.crc32(value) if len(value) <= LARGEST else None
    if isinstance(value, ContextVar) and not mark:
        return None  # a pass sets one for its own time; marks, of before and after it, tell what it leaves
    if isinstance(value, SINGLE) and not is_bound(value):
        return mark(value) if mark else None
    if isinstance(value, Optimizer):  # its rates; weights are looked after by others
        rates = [pair for group in value.param_groups for pair in group.items() if pair[0] != "params"]
        return tuple((key, content(part, mark, seen)) for key, part in rates)
    parts = parts_of(value)
    if parts is None:
        return _text_of(value)
    if id(value) in seen or len(seen) > DEEPEST:
        return None
    seen.add(id(value))
    if (
        isinstance(value, list | tuple)
        and MOST < len(value) <= LONGEST
        and all(isinstance(p, PLAIN) for p in value)
    ):
        return len(value), hash(tuple(value))
    if (
        isinstance(value, dict)
        and MOST < len(value) <= LONGEST
        and all(isinstance(p, PLAIN) for p in value.values())
    ):
        return len(value), hash(tuple((str(key), part) for key, part in value.items()))
    parts = [*parts, *_of_class(value)]
    grows = isinstance(value, list | deque)
    inner = [(k, p) for k, p in parts if mark or grows or not isinstance(p, SINGLE)]
    if len(inner) > MOST:
        return len(inner)
    return tuple((key, content(part, mark, seen)) for key, part in inner)


def _text_of(value: Any) -> str | None:
    """How something without parts that never becomes another is written, such as a dtype, a date or a fraction."""
    kind: Any = type(value)
    is_value = kind.__hash__ not in (None, object.__hash__) or isinstance(value, _SINGLETONS)
    if not is_value or kind.__repr__ is object.__repr__:
        return None
    with suppress(Exception):  # whatever an object of any class raises
        return repr(value)
    return None


def _of_class(value: Any) -> list[tuple[str, Any]]:
    """The variables of a user's class that an object reads where it has none of its own."""
    own, kind = getattr(value, "__dict__", None), type(value)
    if own is None or kind.__module__.partition(".")[0] in OPAQUE:
        return []
    every = [pair for base in own_bases(kind) for pair in vars(base).items() if is_variable(*pair)]
    return [(name, part) for name, part in every if name not in own]


def mark_of(value: Any) -> Any:
    """Which tensor, traced value, module or function something is."""
    if isinstance(value, fx.Proxy | fx.Node):
        return TRACED
    written = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
    return type(value).__name__, id(value), written


def generator_state(generator: Any) -> Any:
    """The state of such an object, to be compared."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    state = generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else None
    return repr(generator.bit_generator.state if state is None else (state["state"]["key"].tobytes(), state))


def parts_of(value: Any) -> list[tuple[str, Any]] | None:  # noqa: PLR0911  # one for each kind
    """The parts of a container or of an object of a user's class; None where it has none that count."""
    if is_bound(value):
        return [(value.__name__, value.__self__)]
    if isinstance(value, SINGLE) or ismodule(value):
        return None
    if isinstance(value, dict | MappingProxyType):
        return [*((str(key), part) for key, part in value.items()), *_beside_items(value)]
    if isinstance(value, ContextVar):
        return [(value.name, value.get(None))]
    if isinstance(value, weakref.ref):
        return [("", value())]
    if isinstance(value, slice | range):
        return [("", part) for part in (value.start, value.stop, value.step)]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*(("", part) for part in value), *_beside_items(value)]
    if isinstance(value, Iterator):
        return _rest_of(value)
    if isinstance(value, partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    opaque = type(value).__module__.partition(".")[0] in OPAQUE and type(value) not in _HOLDERS
    kind: Any = type(value)
    slots = () if opaque else slots_of(kind)
    if opaque or not (slots or hasattr(value, "__dict__")):
        return None
    own = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *own]


def _beside_items(container: Any) -> list[tuple[str, Any]]:
    """The attributes of a container of a user's class, where they are not its items again."""
    if type(container).__module__ == "builtins" or type(container).__module__.partition(".")[0] in OPAQUE:
        return []
    own = getattr(container, "__dict__", None)
    return [] if own is None or own is container else list(own.items())


def is_variable(name: str, value: Any) -> bool:
    """Whether something in the namespace of a class is no part of its code."""
    return name[:2] != "__" and not (isinstance(value, SINGLE) or hasattr(type(value), "__get__"))


def own_bases(kind: type) -> list[type]:
    """A class and those it is made of, torch's not counted."""
    return [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]


def is_bound(value: Any) -> bool:
    """Whether something is a method of an object that holds something itself."""
    if not isinstance(value, MethodType | BuiltinFunctionType) or any(value.__self__ is own for own in _COMMON):
        return False
    return not (value.__self__ is None or isinstance(value.__self__, SINGLE) or ismodule(value.__self__))


@cache
def slots_of(kind: type) -> tuple[str, ...]:
    """The names of the attributes that objects of a class have in slots."""
    both = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in both for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name[:2] != "__")


def _rest_of(iterator: Iterator[Any]) -> list[tuple[str, Any]] | None:
    """What an iterator has yet to give, where it says; of a generator where it is."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return [("at", frame and frame.f_lasti), *(frame.f_locals.items() if frame else ())]
    with warnings.catch_warnings(), suppress(Exception):  # some cannot be stored, each in its own way
        warnings.simplefilter("ignore", DeprecationWarning)
        return [("", part) for part in iterator.__reduce__()[1:]]
    return None

"""module -> what it holds besides tensors, to be compared before and after a pass.

Counters in lists and objects, global and class variables that its methods read, and what random numbers are drawn
from: a trace holds what they gave once.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from inspect import ismodule, unwrap
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MethodType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_PLAIN = (int, float, complex, str, bytes, type(None))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook"}
_SINGLE = (Tensor, fx.Proxy, fx.Node, nn.Module, type, FunctionType, BuiltinFunctionType, MethodType)
_LIBRARIES = ("timm", "torchvision")
_OPAQUE = (*sys.stdlib_module_names, "torch", "numpy", "detachnet")
"""Packages whose objects hold nothing that counts here, generators of random numbers and containers apart."""
_COMMON = (random._inst, np.random.mtrand._rand)
"""What `from random import random` and NumPy's functions are methods of."""
MOST = 256
"""Items of a container that are looked at; of longer ones only their number."""
LARGEST = 1 << 16
"""Bytes of an array of NumPy's whose values are looked at; of larger ones only the shape."""


def state_of(module: nn.Module) -> dict[str, Any]:
    """Name of an attribute, or of a variable that methods read → what it holds, in a form to be compared."""
    return _by_name((name, _content(value)) for _, name, value in _held(module))


def drawn_from(module: nn.Module, name: str) -> bool:
    """Whether an attribute or a variable is, or holds, what random numbers are drawn from."""
    return any(True for _, other, value in _held(module) if other == name for _ in _generators(value))


def generators_of(model: nn.Module) -> list[Any]:
    """All objects that random numbers are drawn from by a model's modules, as far as it is seen."""
    found = {
        id(generator): generator
        for module in model.modules()
        for _, _, value in _held(module)
        for generator in _generators(value)
    }
    return list(found.values())


def generator_state(generator: Any) -> Any:
    """The state of such an object, to be compared."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    state = generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else None
    return repr(generator.bit_generator.state if state is None else (state["state"]["key"].tobytes(), state))


@contextmanager
def generators_kept(generators: list[Any]) -> Iterator[None]:
    """Leave the states of such objects as found."""
    states = [_whole_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            if isinstance(generator, random.Random):
                generator.setstate(state)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            else:
                generator.set_state(state)


def _whole_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _held(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Place, name and value of a module's own attributes, and of what its methods read outside of it."""
    if type(module).__module__.startswith("torch."):
        return
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_MODULES]
    yield from [(vars(module), *pair) for pair in own]
    for function in functions_of(module):
        yield from _outside(function)
    for base in own_bases(type(module)):
        space = _ClassSpace(base)
        yield from [(space, name, value) for name, value in vars(base).items() if is_variable(name, value)]


def functions_of(module: nn.Module) -> list[FunctionType]:
    """A module's methods, the functions that it holds, and those of a user's that any of them calls."""
    kind: Any = type(module)
    functions = dict.fromkeys(_methods(kind))
    for _, function in functions_in(module):
        functions |= dict.fromkeys(_called(function))
    return list(functions)


def functions_in(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Name of an attribute → the function that it is."""
    for name, value in vars(module).items():
        if name not in _OF_MODULES and (function := _function_in(value)):
            yield name, function


def reached_by(function: FunctionType) -> Iterator[Any]:
    """What the variables around a function, and around those that it calls, and their default arguments are."""
    for called in _called(function):
        for value in [*(called.__defaults__ or ()), *(called.__kwdefaults__ or {}).values()]:
            yield from _single_parts(value)
        for cell in called.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield from _single_parts(cell.cell_contents)


def _single_parts(value: Any, seen: tuple[int, ...] = ()) -> Iterator[Any]:
    """A value, or what is in it; of a method its object."""
    if isinstance(value, MethodType):
        value = value.__self__
    yield value
    parts = [] if id(value) in seen or isinstance(value, _SINGLE) else parts_of(value) or []
    for _, part in parts[:MOST]:
        yield from _single_parts(part, (*seen, id(value)))


def _function_in(value: Any) -> FunctionType | None:
    """The function that is called where a function, a method or one with some arguments is."""
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__func__
    value = unwrap(value) if isinstance(value, FunctionType | type(_called)) else None
    return value if isinstance(value, FunctionType) else None


def is_variable(name: str, value: Any) -> bool:
    """Whether something in the namespace of a class is no part of its code."""
    return name[:2] != "__" and not (isinstance(value, _SINGLE) or hasattr(type(value), "__get__"))


def own_bases(kind: type) -> list[type]:
    """A class and those it is made of, torch's not counted."""
    return [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]


@cache
def _methods(kind: type) -> tuple[FunctionType, ...]:
    """The methods of a class but for the one that makes it, and the functions of a user's that they call."""
    found: dict[FunctionType, None] = {}
    for base in own_bases(kind):
        for name, method in vars(base).items():
            function = unwrap(getattr(method, "__func__", method)) if callable(method) else None
            if isinstance(function, FunctionType) and name != "__init__":  # what it reads, a pass does not
                found |= dict.fromkeys(_called(function))
    return tuple(found)


@lru_cache(maxsize=1024)
def _called(function: FunctionType) -> tuple[FunctionType, ...]:
    """A function, and those of a user's that it calls by a variable's name."""
    found, pending = dict[FunctionType, None](), [function]
    while pending:
        current = pending.pop()
        if current not in found:
            found[current] = None
            named = [_function_in(value) for _, _, value in _named(current)]
            pending += [function for function in named if function and is_users(function.__module__)]
    return tuple(found)


class _Cell:
    """A variable of the function around a function, as the dict that others are in."""

    def __init__(self, cell: CellType) -> None:
        self.owner = cell

    def get(self, _: str) -> Any:
        """What it is now."""
        return self.owner.cell_contents


class _ClassSpace:
    """What a class has in its own namespace, likewise."""

    def __init__(self, kind: type) -> None:
        self.owner = kind
        self.get = vars(kind).get


class _Environment:
    """The environment of the process, likewise."""

    owner = os.environ

    def get(self, _: str) -> Any:
        """What it is now."""
        return dict(os.environ)


class _Defaults:
    """Default arguments of a function and its attributes, likewise."""

    def __init__(self, function: FunctionType) -> None:
        self.owner = function

    def get(self, _: str) -> Any:
        """What they are now."""
        function = self.owner
        return [function.__defaults__, function.__kwdefaults__, vars(function)]


def _named(function: FunctionType) -> Iterator[tuple[Any, str, Any]]:
    """The variables outside of a function that its code names: where they are, and what they are now."""
    for name in names_in(function):
        if name in function.__globals__:
            value = function.__globals__[name]
            yield function.__globals__, name, value
            if _is_environment(value, names_in(function)):
                yield _Environment(), "os.environ", dict(os.environ)
            if (space := space_of(value)) is not None:
                yield from [(space, n, vars(value)[n]) for n in names_in(function) if is_variable_of(value, n)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            yield _Cell(cell), name, cell.cell_contents


def _is_environment(value: Any, names: Collection[str]) -> bool:
    """Whether what code names is the environment, or `os`, of which it reads that."""
    in_os = value is os and ("environ" in names or "getenv" in names)
    return in_os or value is os.environ or value is os.getenv


def space_of(value: Any) -> Any:
    """The namespace of a user's module or class that code names, whose variables it may read; else None."""
    if ismodule(value):
        return vars(value) if is_users(value.__name__) else None
    return _ClassSpace(value) if isinstance(value, type) and is_users(value.__module__) else None


def is_variable_of(owner: Any, name: str) -> bool:
    """Whether a module or class has a variable of that name."""
    value = vars(owner).get(name, ismodule)
    return is_variable(name, value) and not ismodule(value)


def _outside(function: FunctionType) -> Iterator[tuple[Any, str, Any]]:
    """What a function reads that is no module, class or function; its defaults and attributes, too."""
    yield from [named for named in _named(function) if not (_is_single(named[2]) or ismodule(named[2]))]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if is_users(function.__module__) and (vars(function) or any(map(_can_change, defaults))):
        space = _Defaults(function)
        yield space, function.__name__, space.get(function.__name__)


def _is_single(value: Any) -> bool:
    """Whether something holds nothing that a pass may change; a weight is looked after by others."""
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return isinstance(value, _SINGLE) and not is_tensor and not is_bound(value)


def _can_change(value: Any) -> bool:
    """Whether a default argument may hold something else after a call."""
    if isinstance(value, tuple):
        return any(map(_can_change, value))
    return not isinstance(value, (*_PLAIN, type, FunctionType, torch.dtype, torch.device, nn.Module))


def is_users(module: str | None) -> bool:
    """Whether a module of that name is neither a part of Python nor of what networks are made of."""
    return bool(module) and str(module).partition(".")[0] not in (*_OPAQUE, *_LIBRARIES)


@lru_cache(maxsize=1024)
def names_in(function: FunctionType) -> tuple[str, ...]:
    """The names in a function's code and in that of functions inside of it."""
    names, pending = dict[str, None](), [function.__code__]
    while pending:
        code = pending.pop()
        names |= dict.fromkeys(code.co_names)
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return tuple(names)


def _generators(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """What random numbers are drawn from, in containers and objects too."""
    seen = set() if seen is None else seen
    if isinstance(value, _GENERATORS):
        yield value
    elif id(value) not in seen and len(parts := parts_of(value) or []) <= MOST:
        seen.add(id(value))
        for _, part in parts:
            yield from _generators(part, seen)


def marks_of(module: nn.Module) -> dict[str, Any]:
    """The same with a mark for each tensor and function: which one it is, and how often it was written to."""
    return _by_name((name, _content(value, _mark)) for _, name, value in _held(module))


def _by_name(contents: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Contents by name; where several things have one name, all of them."""
    found: dict[str, Any] = {}
    for name, content in contents:
        found[name] = (found[name], content) if name in found else content
    return found


@dataclass(frozen=True)
class Reading:
    """What a module's methods have read.

    Attributes:
        place: The namespace that it is in.
        name: Its name there.
        value: What it was.
        marks: What that held.
    """

    place: Any
    name: str
    value: Any
    marks: Any

    @property
    def now(self) -> Any:
        """What it is now."""
        return self.place.get(self.name)

    @property
    def is_fixed(self) -> bool:
        """Whether what it was cannot become something else itself."""
        parts = self.value if isinstance(self.value, tuple) else (self.value,)
        return all(isinstance(part, _PLAIN) or type(part) is FunctionType for part in parts)

    @property
    def has_changed(self) -> bool:
        """Whether it is, or holds, something else now."""
        now = self.now
        if now is self.value and self.is_fixed:
            return False
        return bool(_content(now, _mark) != self.marks)

    def __str__(self) -> str:
        plain = isinstance(self.value, _PLAIN) and isinstance(self.now, _PLAIN)
        return f"{self.name!r} was {self.value!r}, is {self.now!r}" if plain else f"{self.name!r} is another"


class Readings:
    """What a family's modules have read, each once; asked before each pass, so little is done if nothing changes.

    Args:
        every: All of it.
    """

    def __init__(self, every: Iterable[Reading] = ()) -> None:
        owned = {(id(getattr(reading.place, "owner", reading.place)), reading.name): reading for reading in every}
        self._fixed = [reading for reading in owned.values() if reading.is_fixed]
        self._others = [reading for reading in owned.values() if not reading.is_fixed]
        self._looks = [(reading.place.get, reading.name, reading.value) for reading in self._fixed]

    def changed(self) -> list[Reading]:
        """What is, or holds, something else now."""
        found = [reading for reading in self._others if reading.has_changed] if self._others else []
        if not [name for get, name, value in self._looks if get(name) is not value]:
            return found
        return [*(reading for reading in self._fixed if reading.has_changed), *found]


def readings(module: nn.Module, names: Collection[str]) -> Iterator[Reading]:
    """What a module holds under some names, and what its methods read outside of it."""
    for place, name, value in _held(module):
        if name in names or place is not vars(module):
            yield Reading(place, name, value, _content(value, _mark))


def _mark(value: Any) -> Any:
    """Which tensor, traced value, module or function something is."""
    if isinstance(value, fx.Proxy | fx.Node):
        return "a traced value"
    written = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
    return type(value).__name__, id(value), written


def _content(  # noqa: PLR0911  # one for each kind
    value: Any, mark: Callable[[Any], Any] | None = None, seen: tuple[int, ...] = ()
) -> Any:
    """What a value holds; of tensors, modules and functions what `mark` makes of them, or nothing."""
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"  # noqa: PLR0124
    if isinstance(value, _GENERATORS):
        return None if mark else generator_state(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.shape, zlib.crc32(value.tobytes()) if value.nbytes <= LARGEST else None
    if isinstance(value, bytearray | array):
        return len(value), zlib.crc32(value) if len(value) <= LARGEST else None
    if isinstance(value, _SINGLE) and not is_bound(value):
        return mark(value) if mark else None
    parts = parts_of(value)
    if parts is None or id(value) in seen:
        return None
    grows = isinstance(value, list | deque)
    inner = [(k, p) for k, p in parts if mark or grows or not isinstance(p, _SINGLE)]
    if len(inner) > MOST:
        return len(inner)
    return tuple((key, _content(part, mark, (*seen, id(value)))) for key, part in inner)


def parts_of(value: Any) -> list[tuple[str, Any]] | None:  # noqa: PLR0911  # one for each kind
    """The parts of a container or of an object of a user's class; None where it has none that count."""
    if is_bound(value):
        return [(value.__name__, value.__self__)]
    if isinstance(value, _SINGLE) or ismodule(value):
        return None
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [("", part) for part in value]
    if isinstance(value, Iterator):
        return _rest_of(value)
    if isinstance(value, partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    opaque = type(value).__module__.partition(".")[0] in _OPAQUE and type(value) is not SimpleNamespace
    kind: Any = type(value)
    slots = () if opaque else slots_of(kind)
    if opaque or not (slots or hasattr(value, "__dict__")):
        return None
    own = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *own]


def is_bound(value: Any) -> bool:
    """Whether something is a method of an object that holds something itself."""
    if not isinstance(value, MethodType | BuiltinFunctionType) or any(value.__self__ is own for own in _COMMON):
        return False
    return not (value.__self__ is None or isinstance(value.__self__, _SINGLE) or ismodule(value.__self__))


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

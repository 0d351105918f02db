"""module -> the variables that it has, and those that its methods read outside of it."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache, cached_property, lru_cache, partial
from inspect import ismodule
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.surgery.contents import (
    MOST,
    OPAQUE,
    PLAIN,
    SINGLE,
    is_bound,
    is_variable,
    own_bases,
    parts_of,
)

OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook"}
"""What every module has."""
CALLED = (type, FunctionType, BuiltinFunctionType, staticmethod)
_LIBRARIES = ("timm", "torchvision")


def held(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Place, name and value of a module's own attributes, and of what its methods read outside of it."""
    if type(module).__module__.startswith("torch."):
        return
    own = [(name, value) for name, value in vars(module).items() if name not in OF_MODULES]
    yield from [(vars(module), *pair) for pair in own]
    for function in functions_of(module):
        yield from _outside(function)
    for base in own_bases(type(module)):
        for kind in (base, *filter(_is_users_class, vars(base).values())):
            space = ClassSpace(kind)
            every = [(space, name, value) for name, value in vars(kind).items()]
            yield from [named for named in every if is_variable(*named[1:]) or isinstance(named[2], Tensor)]


def called_by(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Place, name and value of the functions and classes that a module's methods name, outside of it."""
    if not type(module).__module__.startswith("torch."):
        every = (named for function in functions_of(module) for named in _named(function))
        yield from [named for named in every if type(named[2]) in CALLED]


def functions_of(module: nn.Module) -> list[FunctionType]:
    """A module's methods, the functions and objects that it holds, and what of a user's any of them calls."""
    kind: Any = type(module)
    functions = dict.fromkeys(_methods(kind))
    for _, function in functions_in(module):
        functions |= dict.fromkeys(_called(function))
    for name, value in vars(module).items():
        helper: Any = type(value)
        if name not in OF_MODULES and _is_near(helper, kind.__module__) and not isinstance(value, SINGLE):
            functions |= dict.fromkeys(_methods(helper))
    return list(functions)


def functions_in(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Name of an attribute → the functions that it is, or has."""
    for name, value in vars(module).items():
        if name not in OF_MODULES:
            for part in _items_of(value):
                yield from [(name, function) for function in _functions_in(part)]


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
    parts = [] if id(value) in seen or isinstance(value, SINGLE) else parts_of(value) or []
    for _, part in parts[:MOST]:
        yield from _single_parts(part, (*seen, id(value)))


def _functions_in(value: Any) -> list[FunctionType]:
    """The function that is called where a function, a method, a property or one with some arguments is.

    Of one that was decorated, what a user's decorator has made of it, too.
    """
    while (inner := _within(value)) is not None:
        value = inner
    found: list[FunctionType] = []
    while isinstance(value, FunctionType | type(_called)):
        found += [value] if isinstance(value, FunctionType) else []
        value = getattr(value, "__wrapped__", None)
    last = found[-1] if found and value is None else None
    return [function for function in found if function is last or _is_of_users(function)]


def _within(value: Any) -> Any:
    """What a method, a property or a function with some arguments is made of; None for others."""
    if isinstance(value, MethodType | classmethod | staticmethod):
        return value.__func__
    if isinstance(value, partial | cached_property):
        return value.func
    return value.fget if isinstance(value, property) else None


def _is_of_users(function: FunctionType) -> bool:
    """Whether a function was written in a user's file, whatever it says that it is of."""
    return is_users(function.__globals__.get("__name__"))


@cache
def _methods(kind: type) -> tuple[FunctionType, ...]:
    """The methods of a class but for the one that makes it, and the functions of a user's that they call."""
    found: dict[FunctionType, None] = {}
    for base in own_bases(kind):
        for name, method in vars(base).items():
            for function in _functions_in(method) if name != "__init__" else ():  # what it reads, a pass does not
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
            named = [f for _, _, value in _named(current) for f in _functions_held_by(value, current.__module__)]
            pending += [function for function in named if is_users(function.__module__)]
    return tuple(found)


def _items_of(value: Any) -> list[Any] | tuple[Any, ...]:
    """What is in a container; a value itself where it is none."""
    items = list(value.values()) if isinstance(value, dict) else value
    return items[:MOST] if isinstance(items, list | tuple) else [value]


def _functions_held_by(value: Any, reader: str | None) -> Iterator[FunctionType]:
    """The functions that a value is, or that are in a container, and the methods of a user's object."""
    for part in _items_of(value):
        yield from _functions_in(part)
        kind: Any = type(part)
        if not isinstance(part, SINGLE) and _is_near(kind, reader):
            for base in own_bases(kind):
                yield from [f for name, m in vars(base).items() if name != "__init__" for f in _functions_in(m)]


class _Cell:
    """A variable of the function around a function, as the dict that others are in."""

    def __init__(self, cell: CellType) -> None:
        self.owner = cell

    def get(self, _: str) -> Any:
        """What it is now."""
        return self.owner.cell_contents


class ClassSpace:
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
    names, seen = names_in(function), set[int]()
    variables = _globals_in(function) if is_users(function.__module__) else frozenset(names)
    for name in names:
        if name in variables and name in function.__globals__:
            value = function.__globals__[name]
            yield function.__globals__, name, value
            if _is_environment(value, names):
                yield _Environment(), "os.environ", dict(os.environ)
            yield from _below(value, names, seen, function.__module__)
        for imported in _imported(name, function.__globals__.get("__package__")):
            yield from _below(imported, names, seen, function.__module__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            yield _Cell(cell), name, cell.cell_contents
            yield from _below(cell.cell_contents, names, seen, function.__module__)


def _imported(name: str, package: str | None) -> list[Any]:
    """The modules that code which imports a name itself may mean, where these are loaded by now."""
    every = [sys.modules.get(known) for known in (name, f"{package}.{name}".rstrip("."))]
    return [module for module in every if module is not None]


def _below(
    owner: Any, names: Collection[str], seen: set[int], reader: str | None
) -> Iterator[tuple[Any, str, Any]]:
    """What code of some module may read by some names of a user's module or class, and of those that this has."""
    if id(owner) in seen or not (isinstance(owner, type) or ismodule(owner)) or not _is_near(owner, reader):
        return
    seen.add(id(owner))
    for part in own_bases(owner) if isinstance(owner, type) else [owner]:
        space = space_of(part)
        called = [f for name in names if name in vars(part) for f in _functions_in(vars(part)[name])]
        more = () if ismodule(part) else [name for f in called for name in names_in(f)]
        inner = dict.fromkeys([*names, *more])
        for name in [name for name in inner if name[:2] != "__" and name in vars(part)] if space else ():
            value = vars(part)[name]
            yield space, name, value
            yield from _below(value, names, seen, reader)


def _is_near(owner: Any, reader: str | None) -> bool:
    """Whether a module, or a class's, is a user's, and of the same package as what reads it or not installed."""
    name = owner.__name__ if ismodule(owner) else owner.__module__
    return is_users(name) and _is_in_reach(name, str(reader).partition(".")[0])


@lru_cache(maxsize=1024)
def _is_in_reach(name: str, package: str) -> bool:
    """Whether a module is of a package, or not installed."""
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    is_installed = bool({"site-packages", "dist-packages"}.intersection(path.parts))
    return not is_installed or name.partition(".")[0] == package


def _is_users_class(value: Any) -> bool:
    return isinstance(value, type) and is_users(value.__module__)


def _is_environment(value: Any, names: Collection[str]) -> bool:
    """Whether what code names is the environment, or `os`, of which it reads that."""
    in_os = value is os and ("environ" in names or "getenv" in names)
    return in_os or value is os.environ or value is os.getenv


def space_of(value: Any) -> Any:
    """The namespace of a user's module or class that code names, whose variables it may read; else None."""
    if ismodule(value):
        return vars(value) if is_users(value.__name__) else None
    return ClassSpace(value) if isinstance(value, type) and is_users(value.__module__) else None


def _outside(function: FunctionType) -> Iterator[tuple[Any, str, Any]]:
    """What a function reads that is no module, class or function; its defaults and attributes, too."""
    yield from [named for named in _named(function) if not (_is_single(named[2]) or _is_code(named[2]))]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if is_users(function.__module__) and (vars(function) or any(map(_can_change, defaults))):
        space = _Defaults(function)
        yield space, function.__name__, space.get(function.__name__)


def _is_single(value: Any) -> bool:
    """Whether something holds nothing that a pass may change; a weight is looked after by others."""
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return isinstance(value, SINGLE) and not is_tensor and not is_bound(value)


def _is_code(value: Any) -> bool:
    """Whether something is a module, or a part of a class that is no variable of it."""
    return ismodule(value) or isinstance(value, property | cached_property | classmethod | staticmethod)


def _can_change(value: Any) -> bool:
    """Whether a default argument may hold something else after a call."""
    if isinstance(value, tuple):
        return any(map(_can_change, value))
    return not isinstance(value, (*PLAIN, type, FunctionType, torch.dtype, torch.device, nn.Module))


def is_users(module: str | None) -> bool:
    """Whether a module of that name is neither a part of Python nor of what networks are made of."""
    return bool(module) and str(module).partition(".")[0] not in (*OPAQUE, *_LIBRARIES)


@lru_cache(maxsize=1024)
def _globals_in(function: FunctionType) -> frozenset[str]:
    """The names of the global variables in a function's code; others are names of attributes."""
    steps = (step for code in _codes_in(function) for step in dis.get_instructions(code))
    return frozenset(step.argval for step in steps if step.opname.endswith(("_GLOBAL", "_NAME")))


@lru_cache(maxsize=1024)
def names_in(function: FunctionType) -> tuple[str, ...]:
    """The names in a function's code and in that of functions inside of it."""
    return tuple(dict.fromkeys(name for code in _codes_in(function) for name in code.co_names))


def _codes_in(function: FunctionType) -> Iterator[CodeType]:
    """A function's code, and that of functions inside of it."""
    pending = [function.__code__]
    while pending:
        yield (code := pending.pop())
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]

"""model -> what its methods reach outside of its modules, put back after a pass.

Global and class variables, variables of a function around a function, default arguments, attributes of functions:
no copy of a model has its own. What is in them is noted; names are bound, and containers and objects filled, as
they were.
"""

from __future__ import annotations

import copy
import warnings
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from detachnet.errors import TraceError
from detachnet.surgery.contents import DEEPEST, MOST, is_bound, is_variable, own_bases, parts_of, slots_of
from detachnet.surgery.variables import functions_of, names_in, space_of

LARGEST = 1 << 26
"""Bytes of a tensor or an array that is noted; larger ones stay as a pass leaves them."""
_ABSENT: Any = object()
_ARRAYS = (np.ndarray, bytearray, array, set)
_FIXED = (nn.Module, type, FunctionType, ModuleType)
Taken = list["_Kept"]
"""What was in each place."""


class _Place(Protocol):
    """Where something is that passes may change."""

    def read(self) -> Any:
        """What it is now."""

    def write(self, value: Any) -> None:
        """Bring back what was read."""


@dataclass(frozen=True)
class _Variable:
    """A global variable."""

    space: dict[str, Any]
    name: str

    def read(self) -> Any:
        """What it is now."""
        return self.space.get(self.name, _ABSENT)

    def write(self, value: Any) -> None:
        """Bring back what was read."""
        if value is not _ABSENT:
            self.space[self.name] = value
        else:
            self.space.pop(self.name, None)


@dataclass(frozen=True)
class _Cell:
    """A variable of the function around a function."""

    cell: CellType

    def read(self) -> Any:
        """What it is now."""
        try:
            return self.cell.cell_contents
        except ValueError:  # an empty one
            return _ABSENT

    def write(self, value: Any) -> None:
        """Bring back what was read."""
        if value is not _ABSENT:
            self.cell.cell_contents = value
        elif self.read() is not _ABSENT:
            del self.cell.cell_contents


@dataclass(frozen=True)
class _Function:
    """Default arguments of a function, and its attributes."""

    function: FunctionType

    def read(self) -> Any:
        """What they are now."""
        return self.function.__defaults__, self.function.__kwdefaults__, vars(self.function)

    def write(self, value: Any) -> None:
        """Bring back what was read."""
        self.function.__defaults__, self.function.__kwdefaults__, _ = value


@dataclass(frozen=True)
class _Class:
    """The variables of a class."""

    kind: type

    def read(self) -> Any:
        """What they are now."""
        return {name: value for name, value in vars(self.kind).items() if is_variable(name, value)}

    def write(self, value: Any) -> None:
        """Bring back what was read."""
        now = self.read()
        for name in now.keys() - value.keys():
            delattr(self.kind, name)
        for name in [name for name in value if value[name] is not now.get(name, _ABSENT)]:
            setattr(self.kind, name, value[name])


@dataclass(frozen=True)
class _Owner:
    """What a module holds a method of, such as a list whose `pop` it calls; copies of the module share it."""

    method: BuiltinFunctionType

    def read(self) -> Any:
        """What it is now."""
        return self.method.__self__

    def write(self, value: Any) -> None:
        """Bring back what was read: it is there."""


@dataclass(frozen=True)
class _Kept:
    """A value, and what was in it."""

    value: Any
    inner: Any = None


class Outside:
    """What the methods of a model's modules reach that no copy of the model has.

    Raises:
        TraceError: A generator is there, which can be neither copied nor put back.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [module for module in model.modules() if not type(module).__module__.startswith("torch.")]
        functions = dict.fromkeys(function for module in own for function in functions_of(module))
        classes = dict.fromkeys(kind for module in own for kind in own_bases(type(module)))
        found: dict[tuple[int, str], Any] = {(id(kind), ""): _Class(kind) for kind in classes}
        found |= {key: place for function in functions for key, place in _named(function)}
        methods = [v for module in own for v in vars(module).values() if isinstance(v, BuiltinFunctionType)]
        self.places = [*map(_Function, functions), *map(_Owner, filter(is_bound, methods)), *found.values()]
        for place in found.values():
            if isinstance(place.read(), GeneratorType):
                said = repr(place.name) if isinstance(place, _Variable) else "a variable"
                raise TraceError(
                    f"cannot make {type(model).__name__} detachable: {said} outside of it is a generator",
                    what="what a generator has given cannot be taken back",
                    hint="use an iterator that can be copied, such as iter(range(1000)), or a number that counts",
                )

    def taken(self) -> Taken:
        """What is there now, to be put back once or several times."""
        return [_keep(place.read(), set()) for place in self.places]

    def put(self, taken: Taken, anew: bool = False) -> None:
        """Bring back what was there; iterators as copies, if they are to be asked again."""
        for place, kept in zip(self.places, taken, strict=True):
            place.write(_filled(kept, anew))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave all of it as found."""
        before = self.taken()
        self.put(before, anew=True)
        try:
            yield
        finally:
            self.put(before)


def _named(function: FunctionType) -> Iterator[tuple[tuple[int, str], _Place]]:
    """The variables outside of a function that its code names, those that are yet to be made too."""
    spaces = [function.__globals__]
    for value in map(function.__globals__.get, names_in(function)):
        if isinstance(value, type) and space_of(value):
            yield (id(value), ""), _Class(value)
        elif isinstance(value, ModuleType) and space_of(value) is not None:
            spaces.append(vars(value))
    for space in spaces:
        for name in names_in(function):
            if not isinstance(space.get(name), _FIXED):
                yield (id(space), name), _Variable(space, name)
    for cell in function.__closure__ or ():
        if not isinstance((place := _Cell(cell)).read(), _FIXED):
            yield (id(cell), ""), place


def _keep(value: Any, seen: set[int]) -> _Kept:
    """Note a value and what is in it; each thing once, and so many of them in all."""
    if isinstance(value, (Tensor, *_ARRAYS)):
        return _Kept(value, _numbers_in(value))
    known = id(value) in seen or len(seen) > DEEPEST
    parts = None if known or isinstance(value, _FIXED) else parts_of(value)
    if parts is None or (isinstance(value, Iterator) and not hasattr(value, "__dict__")):
        return _Kept(value)
    seen.add(id(value))

    def keep(part: Any) -> _Kept:
        return _keep(part, seen) if len(parts) <= MOST else _Kept(part)

    if isinstance(value, dict):
        return _Kept(value, {key: keep(part) for key, part in value.items()})
    if isinstance(value, list | tuple | deque):
        return _Kept(value, [keep(part) for part in value])
    return _Kept(value, [(name, keep(part)) for name, part in parts])


def _numbers_in(value: Any) -> Any:
    """A copy of the numbers in a tensor, an array or a set; None for what stays as a pass leaves it."""
    if isinstance(value, Tensor):
        fits = not value.is_meta and not value.is_inference() and value.nbytes <= LARGEST
        return value.detach().clone() if fits else None
    if isinstance(value, np.ndarray) and (value.nbytes > LARGEST or value.dtype.hasobject):
        return None
    return copy.copy(value)


def _filled(kept: _Kept, anew: bool) -> Any:
    """A value with what was in it."""
    value, inner = kept.value, kept.inner
    if inner is None:
        return _copied(value) if anew and isinstance(value, Iterator) else value
    if isinstance(value, (Tensor, *_ARRAYS)):
        _fill_numbers(value, inner)
    elif isinstance(value, dict):
        _fill_dict(value, {key: _filled(part, anew) for key, part in inner.items()})
    elif isinstance(value, tuple):
        made = [_filled(part, anew) for part in inner]
        changed = any(one is not two for one, two in zip(made, value, strict=True))
        return value if not changed else type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    elif isinstance(value, list | deque):
        made = [_filled(part, anew) for part in inner]
        if len(made) != len(value) or any(one is not two for one, two in zip(made, value, strict=True)):
            value.clear()
            value.extend(made)
    else:
        parts = {name: _filled(part, anew) for name, part in inner}
        if not isinstance(value, partial | MethodType | BuiltinFunctionType):
            _fill_object(value, parts)
    return value


def _fill_numbers(value: Any, inner: Any) -> None:
    if isinstance(value, Tensor):
        if value.shape == inner.shape and not torch.equal(value, inner):
            value.data.copy_(inner)
    elif isinstance(value, set):
        if value != inner:
            value.clear()
            value.update(inner)
    elif isinstance(value, np.ndarray):
        if not np.array_equal(value, inner):
            value[...] = inner
    else:
        value[:] = inner


def _fill_dict(value: dict[Any, Any], made: dict[Any, Any]) -> None:
    if list(value) != list(made) or any(value[key] is not part for key, part in made.items()):
        value.clear()
        value.update(made)


def _fill_object(value: Any, made: dict[str, Any]) -> None:
    kind: Any = type(value)
    slots = slots_of(kind)
    if hasattr(value, "__dict__"):
        _fill_dict(vars(value), {name: part for name, part in made.items() if name not in slots})
    for name in slots:
        if name in made and getattr(value, name, _ABSENT) is not made[name]:
            object.__setattr__(value, name, made[name])
        elif name not in made and hasattr(value, name):
            object.__delattr__(value, name)


def _copied(iterator: Any) -> Any:
    """A copy of an iterator, where it can be copied."""
    with warnings.catch_warnings(), suppress(Exception):  # each refuses in its own way
        warnings.simplefilter("ignore", DeprecationWarning)
        return copy.deepcopy(iterator)
    return iterator

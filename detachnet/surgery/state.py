"""module -> what it holds besides tensors, to be compared before and after a pass.

Counters in lists and objects, global and class variables that its methods read, and what random numbers are drawn
from: a trace holds what they gave once.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_PLAIN = (int, float, complex, str, bytes, type(None))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook"}
_OPAQUE = (*sys.stdlib_module_names, "torch", "numpy", "detachnet")
"""Packages whose objects hold nothing that counts here, generators of random numbers and containers apart."""
MOST = 256
"""Items of a container that are looked at; of longer ones only their number."""


def state_of(module: nn.Module) -> dict[str, Any]:
    """Name of an attribute, or of a variable that methods read → what it holds, in a form to be compared."""
    return {name: _content(value) for name, value in _held(module)}


def drawn_from(module: nn.Module, name: str) -> bool:
    """Whether an attribute or a variable is, or holds, what random numbers are drawn from."""
    return any(True for other, value in _held(module) if other == name for _ in _generators(value))


def generators_of(model: nn.Module) -> list[Any]:
    """All objects that random numbers are drawn from by a model's modules, as far as it is seen."""
    found = {
        id(generator): generator
        for module in model.modules()
        for _, value in _held(module)
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


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own attributes, and the variables outside of it that its methods read."""
    if type(module).__module__.startswith("torch."):
        return
    yield from [(name, value) for name, value in vars(module).items() if name not in _OF_MODULES]
    kind: Any = type(module)
    for names, name in _variables(kind):
        value = names.get(name)
        if not (callable(value) or inspect.ismodule(value)):
            yield name, value
    for base in _own_bases(type(module)):
        yield from [
            (name, value)
            for name, value in vars(base).items()
            if name[:2] != "__" and isinstance(value, (*_PLAIN, list, dict, *_GENERATORS))
        ]


def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]


@cache
def _variables(kind: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """The global variables that the methods of a class name."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for base in _own_bases(kind):
        for method in vars(base).values():
            function = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else None
            code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
            for name in _names(code):
                if name in names and not callable(names[name]) and not inspect.ismodule(names[name]):
                    found[id(names), name] = (names, name)
    return tuple(found.values())


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names(constant)


def _generators(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """What random numbers are drawn from, in containers and objects too."""
    seen = set() if seen is None else seen
    if isinstance(value, _GENERATORS):
        yield value
    elif id(value) not in seen and len(parts := _parts(value) or []) <= MOST:
        seen.add(id(value))
        for _, part in parts:
            yield from _generators(part, seen)


def _content(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """What a value holds besides tensors and modules."""
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"  # noqa: PLR0124
    if isinstance(value, _GENERATORS):
        return generator_state(value)
    parts = _parts(value)
    if parts is None or id(value) in seen:
        return None
    inner = [(key, part) for key, part in parts if not isinstance(part, Tensor | fx.Proxy | fx.Node | nn.Module)]
    if len(inner) > MOST:
        return len(inner)
    return tuple((key, _content(part, (*seen, id(value)))) for key, part in inner)


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container or of an object of a user's class; None where it has none that count."""
    if isinstance(value, Tensor | fx.Proxy | fx.Node | nn.Module | type) or inspect.ismodule(value):
        return None
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [("", part) for part in value]
    if type(value).__module__.partition(".")[0] in _OPAQUE or not hasattr(value, "__dict__"):
        return None
    return list(vars(value).items())

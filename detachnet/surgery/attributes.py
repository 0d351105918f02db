"""modules whose forward was traced -> the names of what that read, of which a trace holds the values."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType

import torch
from torch import fx, nn

from detachnet.surgery.variables import OF_MODULES, functions_of, names_in


def attributes_read(opened: Mapping[str, nn.Module], written: set[str]) -> dict[str, frozenset[str]]:
    """Path of an opened module → the names in its methods, of what a trace holds as it was.

    Of methods that no forward pass names, nothing is read, unless something is asked for by a name that is made.
    """
    methods = {path: _methods_of(module) for path, module in opened.items()}
    called = {f for module in opened.values() for f in functions_of(module) if "." not in f.__qualname__}
    helpers = {name for function in called for name in names_in(function)}  # which may be given the module
    every = helpers | {name for named in methods.values() for names in named.values() for name in names}
    starts = {"forward", *(name for named in methods.values() for name in named if name[:2] == "__")}
    found, pending = set[str](), starts | helpers
    while pending:
        found |= pending
        names = {name for named in methods.values() for key in pending & named.keys() for name in named[key]}
        pending = names - found
    read = frozenset((every if found & _BY_NAME else found) - written - {"training"})
    return dict.fromkeys(opened, read)


def read_of_layers(opened: Mapping[str, nn.Module]) -> dict[str, frozenset[str]]:
    """Path of a layer → the names by which methods of an opened module around it read what it holds.

    As far as they say so at once, as in `self.conv.gain` or `self.layers[0].gain`.
    """
    found: dict[str, set[str]] = {}
    for place, layer, name in _asked_of_parts(opened):
        is_read = place in opened and not type(layer).__module__.startswith("torch.")
        if name not in OF_MODULES and name in vars(layer) and not is_read:
            found.setdefault(place, set()).add(name)
    return {place: frozenset(names) for place, names in found.items()}


def asking_for_mode(opened: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Paths of the modules whose `training` the methods of opened modules may read; a trace holds it."""
    own = [path for path, module in opened.items() if "training" in names_read(module)]
    parts = [place for place, _, name in _asked_of_parts(opened) if name == "training"]
    return tuple(dict.fromkeys([*own, *parts]))


def _asked_of_parts(opened: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str]]:
    """Paths and modules below opened ones, and names that methods of these read of what is called as they are."""
    for path, module in opened.items():
        pairs = {pair for function in functions_of(module) for pair in _chained(function.__code__)}
        for place, part in module.named_modules(prefix=path) if pairs else ():
            last = place.rpartition(".")[2]
            if place != path:
                yield from ((place, part, name) for first, name in pairs if first == last)


_BY_NAME = {"getattr", "hasattr", "getattribute", "__getattr__", "__dict__", "vars", "attrgetter", "methodcaller"}
"""What asks an object for something by a name that is made."""


def names_read(module: nn.Module) -> set[str]:
    """The names in the code of a module's methods, torch's not counted, and of functions it holds."""
    return {name for names in _methods_of(module).values() for name in names}


def _methods_of(module: nn.Module) -> dict[str, set[str]]:
    """Name of a method, or of a function that a module holds → the names in its code."""
    bases = [base for base in type(module).__mro__ if not base.__module__.startswith("torch.")]
    methods = [(key, method) for base in bases for key, method in vars(base).items() if key != "__init__"]
    found: dict[str, set[str]] = {}
    for key, method in [*methods, *vars(module).items()]:
        if not isinstance(method, torch.Tensor | fx.Proxy):
            function = getattr(method, "fget", None) or getattr(method, "__func__", method)
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if isinstance(code, CodeType):
                found.setdefault(key, set()).update(_names_in(code))
    return found


def _names_in(code: CodeType) -> set[str]:
    """The names in code and in functions inside of it; texts that may be names, where it asks by a text."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    asks = not _BY_NAME.isdisjoint(code.co_names)
    texts = {text for text in code.co_consts if asks and isinstance(text, str) and text.isidentifier()}
    return texts.union(code.co_names, *map(_names_in, inner))


@lru_cache(maxsize=1024)
def _chained(code: CodeType) -> frozenset[tuple[str, str]]:
    """Pairs of names of which code reads the second of the first, as in `.conv.gain` or `[0].gain`."""
    steps, pairs = list(dis.get_instructions(code)), set[tuple[str, str]]()
    for i, step in enumerate(steps[1:], 1):
        before, index = steps[i - 1], steps[i - 2].argval
        is_item = before.opname == "BINARY_SUBSCR" or before.argrepr == "[]"  # an operator from Python 3.14 on
        if step.opname in _READS and before.opname in _READS:
            pairs.add((before.argval, step.argval))
        elif step.opname in _READS and is_item and type(index) in (int, str):
            pairs.add((str(index), step.argval))
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(pairs.union(*map(_chained, inner)))


_READS = ("LOAD_ATTR", "LOAD_METHOD")

"""modules whose forward was traced -> the names of what that read, of which a trace holds the values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import CodeType

import torch
from torch import fx, nn

from detachnet.surgery.variables import functions_of, names_in


def attributes_read(opened: Mapping[str, nn.Module], written: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    """Path of an opened module → the names in its methods, of what a trace holds as it was; not those it writes.

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
    read = frozenset((every if found & _BY_NAME else found) - {"training"})
    return {path: read - written[path] if written.get(path) else read for path in opened}


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
                found.setdefault(key, set()).update(names_of(code))
    return found


def names_of(code: CodeType) -> set[str]:
    """The names in code and in functions inside of it; texts that may be names, where it asks by a text."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    asks = not _BY_NAME.isdisjoint(code.co_names)
    texts = {text for text in code.co_consts if asks and isinstance(text, str) and text.isidentifier()}
    return texts.union(code.co_names, *map(names_of, inner))

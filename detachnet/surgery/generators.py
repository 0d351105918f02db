"""module -> what it draws random numbers from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from detachnet.surgery.contents import GENERATORS, MOST, parts_of
from detachnet.surgery.variables import held


def generators_of(model: nn.Module) -> list[Any]:
    """All objects that random numbers are drawn from by a model's modules, as far as it is seen."""
    found = {
        id(generator): generator
        for module in model.modules()
        for _, _, value in held(module)
        for generator in _generators_in(value)
    }
    return list(found.values())


def drawn_from(module: nn.Module, name: str) -> bool:
    """Whether an attribute or a variable is, or holds, what random numbers are drawn from."""
    return any(True for _, other, value in held(module) if other == name for _ in _generators_in(value))


def _generators_in(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """What random numbers are drawn from, in containers and objects too."""
    seen = set() if seen is None else seen
    if isinstance(value, GENERATORS):
        yield value
    elif id(value) not in seen and len(parts := parts_of(value) or []) <= MOST:
        seen.add(id(value))
        for _, part in parts:
            yield from _generators_in(part, seen)


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

"""module -> what it holds besides tensors, to be compared before and after a pass.

Counters in lists and objects, global and class variables that its methods read: a trace holds what they gave once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from detachnet.surgery.contents import PLAIN, content, mark_of, own_bases
from detachnet.surgery.variables import CALLED, ClassSpace, called_by, held


def state_of(module: nn.Module) -> dict[str, Any]:
    """Name of an attribute, or of a variable that methods read → what it holds, in a form to be compared."""
    return _by_name((name, content(value)) for _, name, value in held(module))


def marks_of(module: nn.Module) -> dict[str, Any]:
    """The same with a mark for each tensor and function: which one it is, and how often it was written to."""
    return _by_name((name, content(value, mark_of)) for _, name, value in held(module))


def _by_name(contents: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Contents by name; where several things have one name, all of them."""
    found: dict[str, Any] = {}
    for name, held_there in contents:
        found[name] = (found[name], held_there) if name in found else held_there
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
        return all(isinstance(part, PLAIN) or type(part) in CALLED for part in parts)

    @property
    def has_changed(self) -> bool:
        """Whether it is, or holds, something else now."""
        now = self.now
        if now is self.value:
            return not self.is_fixed and bool(content(now, mark_of) != self.marks)
        return bool(content(now, mark_of) != self.marks) or (self.marks is None and not _is_equal(now, self.value))

    def __str__(self) -> str:
        plain = isinstance(self.value, PLAIN) and isinstance(self.now, PLAIN)
        return f"{self.name!r} was {self.value!r}, is {self.now!r}" if plain else f"{self.name!r} is another"


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two objects that cannot be looked into are of one class and say that they are equal."""
    with suppress(Exception):  # whatever an object of any class raises
        return type(one) is type(other) and bool(one == other)
    return False


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

    @property
    def choices(self) -> int:
        """A number for what all of it is now, but for what numbers and tensors among it are."""
        every = [*self._fixed, *self._others]
        return hash(repr([_without_numbers(content(reading.now, _which_function)) for reading in every]))


def _which_function(value: Any) -> Any:
    return id(value) if type(value) in CALLED else None


def _without_numbers(held_there: Any) -> Any:
    """What something holds, with no more than the type of each number."""
    if isinstance(held_there, tuple):
        return tuple(map(_without_numbers, held_there))
    return type(held_there) if type(held_there) in (int, float, complex) else held_there


def readings(module: nn.Module, names: Collection[str]) -> Iterator[Reading]:
    """What a module holds under some names, and what its methods read and call outside of it."""
    for place, name, value in chain(held(module), called_by(module)):
        if name in names or place is not vars(module):
            yield Reading(place, name, value, content(value, mark_of))


def own_readings(module: nn.Module, names: Collection[str]) -> Iterator[Reading]:
    """What a module itself holds under some names, and what its class does where it holds nothing."""
    places: list[Any] = [vars(module), *map(ClassSpace, own_bases(type(module)))]
    for name in names:
        for place in places:
            value = place.get(name)
            yield Reading(place, name, value, content(value, mark_of))
            if value is not None:
                break

"""Values with named, checked fields, and what is said of those that do not fit: in our words, not pydantic's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from detachnet.errors import DetachNetError, ModelError, nearest, one_line, shorten

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
    "greater": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal": "one of {expected}",
}
"""Beginnings of pydantic's names for problems, and what a value must be; the longest that fits counts."""


def wanted(problem: Mapping[str, Any]) -> str:
    """What a value must be: `a whole number`, `above 0`; pydantic's words where there are no others."""
    kind, context = str(problem["type"]), problem.get("ctx") or {}
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"a text like {context['pattern']}"
    context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
    for start in sorted(_KINDS, key=len, reverse=True):
        if kind.startswith(start):
            return _KINDS[start].format(**context)
    return f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"


def place_of(problem: Mapping[str, Any], given: Any) -> str:
    """Where in what was given a problem is: `train.epochs`; pydantic puts the members of unions in between."""
    parts, here = list[str](), given
    for part in problem["loc"]:
        known = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list | tuple) else ()
        if part in known:
            here = here[part]
            parts.append(str(part))
    return ".".join(parts)


def read_error(error: Exception, given: Any) -> str:
    """What is wrong with what was read from a file, in our words; the first lines of any other error.

    Args:
        error: What reading raised.
        given: What was read, as far as it could be.
    """
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "extra_forbidden":
        return f"there is no field {place}"
    place = place_of(first, given)
    if first["type"] == "value_error":
        return ": ".join(filter(None, [place, wanted(first)]))
    kinds = [wanted(problem) for problem in error.errors() if place_of(problem, given) == place]
    return (
        f"{place or 'it'} is {shorten(repr(first['input']), 60)}: it must be {' or '.join(dict.fromkeys(kinds))}"
    )


class _Refusing(ModelMetaclass):
    """Makes a call of a class say what is wrong in our words; what is read from files is left to who reads it."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        if args:
            raise cls._refuse(f"{cls.__name__} takes its fields by name: {cls._written(given)}")
        try:
            return super().__call__(**given)
        except ValidationError as error:
            raise cls._refusal(error, given) from error

    def _refusal(cls, error: ValidationError, given: dict[str, Any]) -> DetachNetError:
        """The first of the problems, with what else might stand there."""
        first = error.errors()[0]
        name, known = str(first["loc"][0]) if first["loc"] else "", list(getattr(cls, "model_fields", {}))
        if first["type"] == "extra_forbidden" and name not in known:
            return cls._refuse(f"{cls.__name__} has no field {name!r}", nearest=nearest(name, known) or known)
        if first["type"] == "missing":
            missing = ".".join(map(str, first["loc"]))
            return cls._refuse(f"{cls.__name__} lacks {missing!r}", hint=cls._written(given))
        if first["type"] == "value_error":
            return cls._refuse(wanted(first), field=name)
        place = place_of(first, given)
        kinds = [wanted(problem) for problem in error.errors() if place_of(problem, given) == place]
        value = f"{cls.__name__}({place}={first['input']!r})"
        return cls._refuse(f"{value}: it must be {' or '.join(dict.fromkeys(kinds))}", field=name)

    def _refuse(cls, summary: str, field: str = "", **details: Any) -> DetachNetError:
        kinds: Mapping[str, type[DetachNetError]] = getattr(cls, "refused_as", {})
        return kinds.get(field, kinds[""])(summary, **details)

    def _written(cls, given: Mapping[str, Any]) -> str:
        """A call with all that is needed."""
        fields = getattr(cls, "model_fields", {})
        needed = [name for name, field in fields.items() if field.is_required() or name in given]
        return f"{cls.__name__}({', '.join(f'{name}=…' for name in needed or fields)})"


class Fields(BaseModel, metaclass=_Refusing):
    """A value with checked fields that people make, too; it does not change.

    Attributes:
        refused_as: Field → the error that a wrong value of it is; that of `""` for all others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    refused_as: ClassVar[Mapping[str, type[DetachNetError]]] = {"": ModelError}

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise type(self)._refuse(
                f"a {type(self).__name__} does not change: {name!r} cannot be set",
                hint=f"value.model_copy(update={{{name!r}: …}}) is a changed copy",
            ) from error

"""What is wrong with the tables of a recipe, in its own words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import (
    ValidationError,
)

from detachnet.errors import nearest
from detachnet.fields import wanted
from detachnet.surgery.routes import MOST_CHOSEN, MOST_MODELS
from detachnet.training.tables import IN_FILES, IN_MEMORY, DataTable, FilesTable, RecipeTable

Problem = tuple[str, list[str]]
"""A sentence, and known keys near an unknown one."""


def explain(error: ValidationError, tables: Mapping[str, Any], recipe: type[RecipeTable]) -> list[Problem]:
    """All problems of a recipe's tables; first, each once, those with keys that take several kinds of values."""
    choices = [_choice(tables, problem["loc"]) for problem in error.errors()]
    several: list[Problem] = [(text, []) for text in dict.fromkeys(choices) if text]
    left: list[dict[str, Any]] = [
        dict(problem) for problem, text in zip(error.errors(), choices, strict=True) if not text
    ]
    if any(problem["loc"][:1] == ("data",) and problem["loc"][-1] == "name" for problem in left):
        left = [problem for problem in left if not _is_of_another_kind(problem)]
    return several + [_explain(problem, tables, recipe) for problem in left]


def _is_of_another_kind(problem: Mapping[str, Any]) -> bool:
    """Whether a key of `[data]` is one of the other kind of data set, which a wrong name may have meant."""
    fields = DataTable.model_fields | FilesTable.model_fields
    return problem["type"] == "extra_forbidden" and problem["loc"][0] == "data" and problem["loc"][-1] in fields


def _choice(tables: Mapping[str, Any], loc: tuple[Any, ...]) -> str:
    """A problem with one of the keys that take several kinds of values, all of its kinds in one sentence."""
    if loc[:3] == ("data", IN_MEMORY, "flip"):
        value = json.dumps(tables["data"]["flip"], default=str)
        return f"data.flip = {value}: it must be true, false or 'alternating'"
    names = {"cuts": "names of nodes, own names of sub-models to them, ", "sub_models": ""}
    if len(loc) < 2 or loc[0] != "family" or loc[1] not in names:
        return ""
    most = MOST_MODELS if loc[1] == "cuts" else MOST_CHOSEN
    value = json.dumps(tables["family"][loc[1]], default=str)
    return (
        f"family.{loc[1]} = {value}: give {names[loc[1]]}'auto', a number from 1 to {most}, "
        "or shares such as [0.7, 0.4]"
    )


def _explain(problem: dict[str, Any], tables: Mapping[str, Any], recipe: type[RecipeTable]) -> Problem:
    """One problem in the words of the recipe."""
    path = _keys(problem["loc"], tables, problem["type"] == "missing")
    key, table = ".".join(path), path[:-1]
    if problem["type"] == "extra_forbidden":
        if path[0] == "data":
            return _unknown_in_data(key, path[-1], problem["loc"][1])
        known = _fields(table, recipe)
        place = f"[{'.'.join(table)}]" if table else "the recipe"
        return f"unknown key {path[-1]!r} in {place}", nearest(path[-1], known) or known
    if problem["type"] == "missing":
        return f"{key} is missing", []
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]), []
    said = f"{key} = {json.dumps(problem['input'], default=str)}: it must be"
    if key == "data.name":
        memory = f"{wanted(problem)}; or " if problem["type"] == "literal_error" else ""
        return f"{said} {memory}'folder', 'FILE.csv', 'wds/NAME' or 'hfds/NAME'", []
    return f"{said} {wanted(problem)}", []


def _unknown_in_data(key: str, field: str, kind: str) -> Problem:
    """The same of `[data]`, whose keys depend on where the images are."""
    tables: dict[str, type[RecipeTable]] = {IN_MEMORY: DataTable, IN_FILES: FilesTable}
    other = IN_FILES if kind == IN_MEMORY else IN_MEMORY
    if field in tables[other].model_fields:
        return f"{key} is for {other.strip('()')}, not for {kind.strip('()')}", []
    known = list(tables[kind].model_fields)
    return f"unknown key {field!r} in [data]", nearest(field, known) or known


def _keys(location: Sequence[str | int], tables: Any, missing: bool) -> list[str]:
    """The keys of the file in a location; pydantic puts members of unions in between."""
    keys: list[str] = []
    here = tables
    for part in location:
        known = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list | tuple) else ()
        if part in known:
            here = here[part]
        elif not (missing and part == location[-1]):
            continue
        keys.append(str(part))
    return keys


def _fields(table: Sequence[str], recipe: type[RecipeTable]) -> list[str]:
    """The keys a table knows."""
    model: Any = recipe
    for key in table:
        fields = getattr(model, "model_fields", {})
        model = fields[key].annotation if key in fields else (get_args(model) or (None,))[-1]
    return list(getattr(model, "model_fields", {}))

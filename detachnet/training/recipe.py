"""TOML -> Recipe: one experiment, frozen and completely validated before anything else is loaded."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    PrivateAttr,
    ValidationError,
    model_validator,
)

from detachnet.errors import RecipeError, one_line
from detachnet.storage import read_file
from detachnet.text import parse_json
from detachnet.training.presets import PRESETS, with_preset
from detachnet.training.problems import explain
from detachnet.training.shipped import find_recipe
from detachnet.training.tables import (
    AnyData,
    FamilyTable,
    LossTable,
    ModelTable,
    OptimizerTable,
    RecipeTable,
    ScheduleTable,
    TrainTable,
)
from detachnet.zoo import WEIGHTS


class Recipe(RecipeTable):
    """One experiment. Every table and key of the TOML file is a field here."""

    description: str
    """One line for `detachnet recipes`."""
    preset: Literal["", "paper"] = ""
    """What `family`, `optimizer`, `schedule` and `train` are where they say nothing: `paper`, the paper's way."""
    model: ModelTable
    family: FamilyTable
    data: AnyData
    optimizer: OptimizerTable
    schedule: ScheduleTable = ScheduleTable()
    loss: LossTable = LossTable()
    train: TrainTable
    _name: str = PrivateAttr("")
    _folder: Path | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """Whether every key has the same value, whatever files they come from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        """Equal of equal recipes."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        names = self.family.names
        mentioned = {
            "train.models": self.train.models,
            "loss.weights": self.loss.weights,
            "optimizer.weight_decay_alone": self.optimizer.weight_decay_alone,
        }
        for key, given in mentioned.items():
            for name in given:
                if name not in names:
                    raise ValueError(f"{key} names {name!r}, but the models are {', '.join(names)}")
        if len(set(self.train.models)) < len(self.train.models):
            raise ValueError("train.models names a model twice")
        self._check_teachers()
        if self.train.strategy == "separate" and self.loss.hint:
            raise ValueError("loss.hint compares two models in one pass: it needs train.strategy 'joint'")
        if self.train.sample and self.train.compile:
            raise ValueError("train.compile is for steps that all train the same models: not with train.sample")
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError("schedule.warmup_epochs is longer than train.epochs")
        return self

    def _check_teachers(self) -> None:
        """What learns from a base-model needs one, and a base-model that stays as it is should be worth it."""
        if (self.loss.distillation or self.loss.hint) and len(self.models) > 1 and "base" not in self.models:
            raise ValueError("loss.distillation and loss.hint need 'base' among train.models: it is the teacher")
        published = any(self.model.kwargs.get(name) for name in WEIGHTS)
        if self.train.freeze_base and not (self.train.init or published):
            raise ValueError("train.freeze_base needs a trained base-model: train.init, or pretrained weights")

    @property
    def name(self) -> str:
        """That of its file, without the ending; empty if it comes from none."""
        return self._name

    @property
    def folder(self) -> Path | None:
        """Where its file is; None if it comes from none."""
        return self._folder

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are trained, in the family's order."""
        return tuple(n for n in self.family.names if not self.train.models or n in self.train.models)

    @property
    def weight_decay(self) -> float:
        """The weight decay that applies to the models that are trained."""
        alone = self.optimizer.weight_decay_alone
        only = self.models[0] if len(self.models) == 1 else ""
        return alone.get(only, self.optimizer.weight_decay)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights of the models that are trained."""
        return {n: w for n, w in self.loss.weights.items() if n in self.models and len(self.models) > 1}

    def to_toml(self) -> str:
        """The recipe with every default written out."""
        return tomli_w.dumps(json.loads(self.model_dump_json()))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        name: A TOML file, or the name of a recipe that comes with detachnet.
        overrides: `table.key=value`, the value written as in TOML; a bare word is a string.

    Raises:
        RecipeError: The file is missing or no TOML, a key is unknown, a type is wrong, a value is out of range.

    Examples:
        >>> recipe = detachnet.load_recipe("quickstart", ["train.epochs=1"])
    """
    path = find_recipe(name)
    try:
        text = read_file(path).decode("utf-8-sig")  # some editors begin with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}", what=str(error)) from error
    return parse_text(text, path, overrides)


def parse_text(text: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of what is, or will be, in a file."""
    if isinstance(overrides, str):
        raise RecipeError(
            f"overrides is a list, not a text: {overrides!r}", hint=f"load_recipe({path.name!r}, [{overrides!r}])"
        )
    try:
        tables = _parse_toml(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML", what=one_line(error)) from error
    for override in overrides:
        _override(tables, override)
    recipe = parse_recipe(tables, " with --set ".join([str(path), *overrides]))
    recipe._name, recipe._folder = path.stem, path.parent
    return recipe


def recipe_schema() -> str:
    """The JSON schema of recipes, for editors: a recipe's first line `#:schema FILE` names its file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    has_preset = {"required": ["preset"], "properties": {"preset": {"enum": [*PRESETS]}}}
    schema |= {"if": has_preset, "else": _take_what_presets_give(schema)}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _take_what_presets_give(schema: dict[str, Any]) -> dict[str, Any]:
    """Take from a schema what a recipe with a preset need not have; the schema of that."""
    tables = {
        table: schema["$defs"][schema["properties"][table]["$ref"].rpartition("/")[2]]
        for table in {table for preset in PRESETS.values() for table in preset} & {*schema["required"]}
    }
    schema["required"] = [key for key in schema["required"] if key not in tables]
    keys = {table: {"required": part.pop("required", [])} for table, part in sorted(tables.items())}
    return {"required": [*keys], "properties": keys}


def _parse_toml(text: str) -> dict[str, Any]:
    """TOML that anybody may have written.

    Raises:
        ValueError: It is none, a number has thousands of digits, or it is nested too deeply.
    """
    try:
        tables = tomllib.loads(text)
        parse_json(json.dumps(tables, default=str))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return tables


def parse_recipe(tables: Mapping[str, Any], where: str = "") -> Recipe:
    """Check the tables of a recipe; `where` is the file, for messages."""
    tables = with_preset(tables)
    try:
        return Recipe.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        problems = explain(error, tables, Recipe)
        first, *others = (text for text, _ in problems)
        more, known = "; ".join(others), next((names for _, names in problems if names), [])
        raise RecipeError(first, what=f"also: {more}" if more else "", where=where, nearest=known) from error


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply one `table.key=value`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set takes table.key=value, not {override!r}", hint="--set train.epochs=10")
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except ValueError as error:
        raise RecipeError(f"--set {override}: it cannot be read", what=one_line(error)) from error
    table = tables
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {key!r} is a value, not a table")
    table[keys[-1]] = value

"""`detachnet recipes`, and how a recipe is found."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

from detachnet.errors import RecipeError, nearest

from .console import friendly, note, table


@friendly
def recipes() -> None:
    """List the recipes that come with detachnet; `train NAME` runs one."""
    rows = [
        (name, tomllib.loads(path.read_text(encoding="utf-8"))["description"]) for name, path in shipped().items()
    ]
    table("Recipes", ("name", "what it does"), rows, left=2)
    note("\nTrain one: detachnet train NAME. See or copy one: the recipes/ folder of the repository.")


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(resources.files("detachnet_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a shipped one.

    Raises:
        RecipeError: There is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if path.stem in known and (path.suffix in ("", ".toml")):
        return known[path.stem]
    raise RecipeError(
        f"there is no recipe {name}",
        hint="give a TOML file, or a name that detachnet recipes lists",
        nearest=nearest(path.stem, known) or list(known),
    )

"""name -> the file of a recipe: one of those that come with detachnet, or any other by its path."""

from __future__ import annotations

import logging
import os
from importlib import resources
from pathlib import Path

from detachnet.errors import RecipeError, nearest

logger = logging.getLogger("detachnet")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with detachnet, by name."""
    folder = Path(str(resources.files("detachnet_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(name: str | Path) -> Path:
    """A recipe's file: a path, or the name of a shipped one.

    Raises:
        RecipeError: There is neither.
    """
    path = Path(name)
    if os.path.isfile(path):
        return path
    if (path / "recipe.toml").is_file():
        raise RecipeError(
            f"{path} is the folder of a run, not a recipe",
            hint=f"to go on with it: detachnet train {path / 'recipe.toml'} --out {path} --resume",
        )
    known = shipped_recipes()
    is_name = path.name == str(name) and path.suffix in ("", ".toml")
    if is_name and path.stem in known:
        if path.suffix:
            logger.info("there is no file %s: it is the recipe that comes with detachnet", path)
        return known[path.stem]
    raise RecipeError(
        f"there is no recipe {name}",
        hint="give a TOML file, or a name that detachnet recipes lists",
        nearest=nearest(path.stem, known) or list(known),
    )

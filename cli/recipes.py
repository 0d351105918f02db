"""`detachnet recipes`."""

from __future__ import annotations

import tomllib
from typing import Annotated

import typer

from detachnet.training.shipped import find_recipe, shipped_recipes

from .console import friendly, note, show


@friendly
def recipes(
    name: Annotated[str | None, typer.Option("--show", metavar="NAME", help="Print that one, to copy.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print their JSON schema, for editors.")] = False,
) -> None:
    """List the recipes that come with detachnet; `train NAME` runs one."""
    if name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    if schema:
        from detachnet.training.recipe import recipe_schema

        typer.echo(recipe_schema(), nl=False)
        return
    from detachnet.text import Table

    rows = [
        (name, tomllib.loads(path.read_text(encoding="utf-8"))["description"])
        for name, path in shipped_recipes().items()
    ]
    show(Table(("name", "what it does"), tuple(rows), "Recipes", left=2))
    note("\nTrain one: detachnet train NAME. Copy one: detachnet recipes --show NAME > mine.toml")

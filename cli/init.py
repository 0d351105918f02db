"""`detachnet init`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from detachnet.errors import RecipeError

from .console import friendly, note, show
from .opening import check_new
from .options import DataRoot, Download

BUDGET = "0.7,0.4"


@friendly
def init(
    out: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("mine.toml"),
    model: Annotated[
        str | None, typer.Option(help="torchvision:NAME, timm:NAME, or path/to/file.py:FUNCTION.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A folder with a folder per class, a CSV file of paths and labels, or cifar10."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="N|SHARES", help="Sub-models: how many, or shares of the MACs such as 0.7,0.4."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Of image files: pixels of the sides; what the model declares, else 224."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 30,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published weights.")] = False,
    data_root: DataRoot = None,
    download: Download = False,
) -> None:
    """Write a recipe for your model and your images, with comments; what is not given is asked in a terminal."""
    check_new(out)
    if out.suffix != ".toml":
        raise RecipeError(f"{out} is no name of a recipe", hint="detachnet init mine.toml")
    model = model or _ask("--model", "Model (timm:NAME, torchvision:NAME, FILE.py:FUNCTION)")
    data = data or _ask("--data", "Images (a folder, a CSV file, or the name of a data set)")
    budget = budget or _ask("--budget", "Sub-models (shares of the MACs, or how many)", BUDGET)
    shares = _parse_budget(budget)
    from detachnet.storage import replace_file
    from detachnet.training.draft import SCHEMA, draft, find_data
    from detachnet.training.preview import preview
    from detachnet.training.recipe import parse_text, recipe_schema
    from detachnet.training.trainer import open_source

    images = find_data(data)
    _check(model, images.name, image_size, pretrained)
    root = images.root or data_root
    options: dict[str, Any] = {
        "image_size": image_size or _declared(model),
        "epochs": epochs,
        "pretrained": pretrained,
    }
    first = parse_text(draft(model, images, 2, shares, **options), out)
    num_train = open_source(first, root, download).num_train
    text = draft(model, images, num_train, shares, **options)
    seen = preview(parse_text(text, out), root)
    replace_file(out, text.encode())
    replace_file(out.with_name(SCHEMA), recipe_schema().encode())
    show(seen.plan.table)
    note(f"\n{seen.data.name}: {num_train} training images, {len(seen.data.classes)} classes")
    note(f"Written: {out}, and {out.with_name(SCHEMA)} for editors. Look at it, then train:")
    where = ["--data-root", str(root)] if root else []
    note(f"  {shlex.join(['detachnet', 'train', str(out), *where])}")


def _check(model: str, data: str, image_size: int | None, pretrained: bool) -> None:
    """Refuse options that would say nothing about such a model or such images."""
    from detachnet.data.datasets import is_files

    if image_size is not None and not is_files(data):
        raise RecipeError(
            f"--image-size {image_size}: the images of {data} have a size of their own, which is taken",
            hint="leave --image-size out; a folder or a CSV file of images is brought to a size",
        )
    if pretrained and model.startswith("detachnet:"):
        raise RecipeError(
            f"--pretrained: there are no published weights for {model}",
            hint="leave --pretrained out, or --model timm:NAME or torchvision:NAME",
        )


def asks() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def _ask(option: str, question: str, default: str | None = None) -> str:
    """What a person answers."""
    if not asks():
        raise RecipeError(f"{option} is missing, and there is nobody to ask: this is no terminal")
    return str(typer.prompt(question, default=default)).strip()


def _parse_budget(text: str) -> int | list[float]:
    """`2`, or falling shares such as `0.7,0.4`."""
    try:
        shares = int(text) if text.isdecimal() else [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    values = [shares] if isinstance(shares, int) else shares
    fits = isinstance(shares, int) or all(0 < share < 1 for share in shares)
    if not values or min(values) <= 0 or not fits or values != sorted(set(values), reverse=True):
        raise RecipeError(
            f"--budget {text}: write shares of the MACs that fall, or how many sub-models",
            hint="--budget 0.7,0.4, or --budget 2",
        )
    return shares


def _declared(model: str) -> int:
    """The size of an image that a model declares, in pixels."""
    from detachnet.zoo import build_model, default_input_size, is_own

    size = None if is_own(model) else default_input_size(build_model(model))
    return size[-1] if size else 224

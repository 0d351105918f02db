"""a model, images and budgets -> the text of a recipe, with a comment beside every choice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detachnet.data.datasets import data_names, is_files
from detachnet.errors import RecipeError, nearest

SCHEMA = "recipe.schema.json"
"""The file beside a recipe that says to editors which keys there are."""
BATCHES, LARGEST_BATCH = 4, 128
"""Steps that an epoch has at least, and images of a step at most."""
IN_PROCESS = 1000
"""Images below which the training reads them itself: starting workers would take longer."""


@dataclass(frozen=True)
class Images:
    """Where the images of a recipe are.

    Attributes:
        name: What `data.name` is.
        root: What `--data-root` is; None if none is needed.
    """

    name: str
    root: Path | None


def find_data(given: str) -> Images:
    """Which images are meant: a folder's, a CSV file's, or those of a data set by its name.

    Raises:
        RecipeError: There is nothing of that name.
    """
    path = Path(given).expanduser()
    if path.suffix == ".csv" and path.is_file():
        return Images(path.name, path.parent)
    if path.is_dir():
        return Images("folder", path)
    if given in data_names() or given.startswith(("wds/", "hfds/")):
        return Images(given, None)
    raise RecipeError(
        f"there are no images at {given!r}",
        hint="a folder with a folder per class, a CSV file of paths and labels, or a data set's name",
        nearest=nearest(given, [*data_names(), *map(str, Path(path.parent).glob("*"))]),
    )


def draft(
    model: str,
    images: Images,
    num_train: int,
    budget: int | Sequence[float],
    *,
    image_size: int = 224,
    epochs: int = 30,
    pretrained: bool = False,
) -> str:
    """The text of a recipe.

    Args:
        model: A name of the zoo, or `path/to/file.py:FUNCTION`.
        images: Where they are.
        num_train: How many of them are trained on.
        budget: Shares of the base-model's MACs that sub-models keep, falling; or how many sub-models there are.
        image_size: Height and width of what the models take in, in pixels; of image files.
        epochs: Passes over the images.
        pretrained: Start from the weights that the model's library publishes.
    """
    wanted = json.dumps(budget if isinstance(budget, int) else list(budget))
    size = batch_size(num_train)
    lines = [
        f"#:schema ./{SCHEMA}",
        "# An experiment. Every key: detachnet recipes --schema, and the page Recipes.",
        _key("description", f"{model} on {images.root or images.name}, sub-models {wanted}"),
        "",
        "[model]",
        _key("name", model),
        *(["kwargs = { pretrained = true }  # published weights; the classifier is new"] if pretrained else []),
        "# It has as many outputs as there are classes; kwargs = { num_classes = 12 } says another number.",
        "",
        "[family]",
        f"sub_models = {wanted}".ljust(26) + "# shares of the base-model's MACs; or how many, or 'auto'",
        'head = "private"          # each sub-model has a last layer of its own',
        'stepdown = "stem"         # a sub-model without the front enters through a few convolutions',
        "",
        "[data]",
        *_data(images, image_size, num_train),
        "",
        "[optimizer]",
        *_optimizer(size, pretrained),
        "",
        "[schedule]",
        f"warmup_epochs = {min(2, epochs // 2)}".ljust(26) + "# then the learning rate falls along a cosine",
        "",
        "[loss]",
        "# distillation = 1.0      # learn from the base-model's answers, too: for those without the front",
        "",
        "[train]",
        f"epochs = {epochs}",
        f"batch_size = {size}",
        "seed = 0",
        '# init = "weights.pth"    # start from the base-model\'s weights: a state dict, a family or a run',
    ]
    return "\n".join(lines) + "\n"


def batch_size(num_train: int) -> int:
    """The largest power of two that leaves some steps to an epoch, 2 at least."""
    most = max(2, min(LARGEST_BATCH, num_train // BATCHES))
    return 1 << (most.bit_length() - 1)


def _data(images: Images, image_size: int, num_train: int) -> list[str]:
    """What is in `[data]`."""
    name = _key("name", images.name)
    if not is_files(images.name):
        return [name, "flip = true               # mirror half of the images"]
    where = f"# detachnet train FILE --data-root {images.root}" if images.root else ""
    workers = 0 if num_train < IN_PROCESS else min(4, os.cpu_count() or 1)
    return [
        name.ljust(26) + where,
        f"image_size = {image_size}".ljust(26) + "# pixels of the sides of what the models take in",
        "val_share = 0.2           # of each class, tested on and not trained on; where nothing says the splits",
        "split_seed = 0            # decides which images those are",
        f"num_workers = {workers}".ljust(26) + "# processes that read images beside the training",
    ]


def _optimizer(size: int, pretrained: bool) -> list[str]:
    """What is in `[optimizer]`; the learning rate is that of a batch of 64, in proportion."""
    name, rate, decay = ("adamw", 5e-4, 0.05) if pretrained else ("nesterov", 0.05, 5e-4)
    return [_key("name", name), f"lr = {rate * size / 64:.3g}", f"weight_decay = {decay:g}"]


def _key(name: str, value: str) -> str:
    """A line of TOML, whose strings are JSON's but for what JSON leaves to be."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"

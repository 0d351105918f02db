"""TOML -> Recipe: one experiment, frozen and completely validated before anything else is loaded."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from detachnet.errors import RecipeError, nearest
from detachnet.stepdown import Stem

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelTable(_Table):
    """The base-model: `create_model(name, **kwargs)`."""

    name: str
    """A name of the zoo, such as `torchvision:vgg16_bn`."""
    kwargs: dict[str, int | float | bool | str] = {}
    """Arguments of the model's constructor."""


class FamilyTable(_Table):
    """How the base-model is made detachable."""

    cuts: tuple[str, ...] | dict[str, str]
    """Names of nodes, front to back; or own names of sub-models to them."""
    norm: Literal["private", "shared"] = "private"
    """Batch norms: each sub-model's own, or the base-model's (the paper)."""
    head: Literal["private", "shared"] = "shared"
    """The last layer with weights, which makes the output: likewise."""
    stepdown: Literal["conv", "stem", "identity"] = "conv"
    """One convolution (the paper); several with batch norms; the flattened image as it is (NSN)."""
    stem: Stem = Stem()
    """Its `depth` and `width`, if `stepdown` is `stem`."""

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", …)`."""
        own = tuple(self.cuts) if isinstance(self.cuts, dict) else (f"sub{i}" for i in range(len(self.cuts)))
        return ("base", *own)


class DataTable(_Table):
    """A small data set, which is held in memory, and how its images are augmented."""

    name: Literal["cifar10", "cifar10-mini", "mnist"]
    """A data set of `load_data`."""
    pad: Annotated[int, Field(ge=0)] = 0
    """Zero padding in pixels before a random crop of the image's size; 0 for no crop."""
    num_train: Annotated[int, Field(ge=0)] = 0
    """Train on the first so many images; 0 for all."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Evaluate on the last so many training images, which are not trained on, instead of the test images: for
    choosing settings. Files of such a run quote no accuracy; `test_*` in its metrics is of the held-out images."""
    flip: bool = False
    """Mirror each image left to right with probability one half."""
    normalize: Literal["channel", "none"] = "channel"
    """Mean 0 and standard deviation 1 for each channel of the training images; or values in [0, 1] as they are."""


class FilesTable(_Table):
    """A data set of image files, read by worker processes, and how its images are augmented: all of it timm's."""

    name: Annotated[str, Field(pattern=r"^(folder|wds/.+|hfds/.+)$")]
    """`folder`: a folder of images per class. `wds/NAME`: WebDataset shards. `hfds/NAME`: Hugging Face's."""
    train_split: str = "train"
    """The training images: a folder, a split that the shards' `_info.json` knows or `NAME-{0000..0127}.tar|COUNT`,
    or a split of the data set."""
    val_split: str = "validation"
    """The images accuracies are measured on."""
    image_size: Positive = 224
    """Height and width in pixels of the images a family takes in; training images are cut out at random and
    brought to it."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the resized picture's side that is kept for an evaluation."""
    auto_augment: str = ""
    """A policy of timm's, such as `rand-m9-mstd0.5-inc1`; empty for its jitter of the colours."""
    reprob: Share = 0.0
    """Probability that a part of a training image is erased."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of cutmix; 0 for none. With both, one is chosen for each batch."""
    num_workers: Annotated[int, Field(ge=0)] = 4
    """Processes that read and augment images, for each process that trains; 0 for none beside it."""

    @property
    def holdout(self) -> int:
        """Held-out training images: none, `val_split` may name any."""
        return 0


_MEMORY, _FILES = "(data sets in memory)", "(image files)"
"""The two kinds of `[data]`; in brackets, which `_is_key` looks for."""


def _kind_of_data(table: Any) -> str:
    """Which of the two tables a `[data]` is, by its name; as `data.is_files` has it."""
    name = table.get("name") if isinstance(table, dict) else getattr(table, "name", None)
    files = isinstance(name, str) and (name == "folder" or name.startswith(("wds/", "hfds/")))
    return _FILES if files else _MEMORY


AnyData = Annotated[
    Annotated[DataTable, Tag(_MEMORY)] | Annotated[FilesTable, Tag(_FILES)], Discriminator(_kind_of_data)
]


class OptimizerTable(_Table):
    """The optimizer, one of timm's."""

    name: Literal["momentum", "nesterov", "adamw"] = "momentum"
    """`momentum` and `nesterov` are SGD."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty on every parameter."""
    weight_decay_alone: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Model → its weight decay when `train.models` names it alone."""


class ScheduleTable(_Table):
    """The learning rate over time, one of timm's schedules, set at every step."""

    name: Literal["multistep", "cosine"] = "cosine"
    """`multistep` multiplies by `decay` after each milestone; `cosine` goes down to 0."""
    milestones: tuple[Positive, ...] = ()
    """Epochs after which `multistep` decays."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of `multistep`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises linearly from 0."""

    @model_validator(mode="after")
    def _milestones_fit(self) -> ScheduleTable:
        if self.name == "multistep" and not self.milestones:
            raise ValueError("schedule.milestones is needed for 'multistep'")
        if self.name != "multistep" and self.milestones:
            raise ValueError("schedule.milestones is for 'multistep' only")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("schedule.milestones must rise")
        return self


class LossTable(_Table):
    """The multi-model loss."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Model → weight of its loss; 1 where none is given (the paper's sum), and for a model trained alone."""
    label_smoothing: Share = 0.0
    """Of the cross entropy."""
    distillation: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence of each sub-model's prediction from its teacher's; there is none alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both predictions' logits are divided by it."""
    teacher: Literal["base", "larger"] = "base"
    """Of each sub-model: the base-model, or the next larger model."""
    hint: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared error of each step-down's output against the base-model's feature at the cut."""


class TrainTable(_Table):
    """The training itself."""

    epochs: Positive
    """Passes over the training images."""
    batch_size: Positive
    """Images per step, over all processes together."""
    models: tuple[str, ...] = ()
    """The models that are trained; empty for all. `["base"]` is the baseline, `["sub1"]` that sub-model alone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the weights, the order of the images and the augmentation."""
    init: str = ""
    """A family's file whose base-model's weights and statistics all models start from."""
    freeze_base: bool = False
    """Train only what sub-models have for themselves: the base-model stays bit for bit as it is. Layers of it run
    in evaluation mode; dropout that a forward pass calls as a function stays on."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights, which accuracies are then those of, and the
    weights in the run's files; it rises to it, as timm's warm-up has it. 0 for none."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs under bfloat16 autocast."""
    strategy: Literal["joint", "separate"] = "joint"
    """One pass for all models; or one model after another, each freeing its activations before the next: the same
    gradients, less memory, more time."""
    compile: bool = False
    """Forward pass and losses through `torch.compile`, on CUDA into CUDA graphs; on a CPU it gains nothing."""


class Recipe(_Table):
    """One experiment. Every table and key of the TOML file is a field here."""

    description: str
    """One line for `detachnet recipes`."""
    model: ModelTable
    family: FamilyTable
    data: AnyData
    optimizer: OptimizerTable
    schedule: ScheduleTable = ScheduleTable()
    loss: LossTable = LossTable()
    train: TrainTable

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
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError("schedule.warmup_epochs is longer than train.epochs")
        return self

    def _check_teachers(self) -> None:
        """What learns from a base-model needs one, and a base-model that stays as it is should be worth it."""
        if (self.loss.distillation or self.loss.hint) and len(self.models) > 1 and "base" not in self.models:
            raise ValueError("loss.distillation and loss.hint need 'base' among train.models: it is the teacher")
        published = {"pretrained", "weights", "checkpoint_path"} & set(self.model.kwargs)
        if self.train.freeze_base and not (self.train.init or published):
            raise ValueError("train.freeze_base needs a trained base-model: train.init, or pretrained weights")

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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        path: A TOML file.
        overrides: `table.key=value`, the value written as in TOML; a bare word is a string.

    Raises:
        RecipeError: The file is missing or no TOML, a key is unknown, a type is wrong, a value is out of range.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}", hint="detachnet recipes lists the shipped ones") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}", what=str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML", what=str(error)) from error
    for override in overrides:
        _override(tables, override)
    return parse_recipe(tables, str(path))


def parse_recipe(tables: Mapping[str, Any], where: str = "") -> Recipe:
    """Check the tables of a recipe; `where` is the file, for messages."""
    try:
        return Recipe.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        first, known = problems[0]
        more = "; ".join(text for text, _ in problems[1:])
        raise RecipeError(first, what=f"also: {more}" if more else "", where=where, nearest=known) from error


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply one `table.key=value`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set takes table.key=value, not {override!r}", hint="--set train.epochs=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tables
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {key!r} is a value, not a table")
    table[keys[-1]] = value


def _explain(problem: dict[str, Any]) -> tuple[str, list[str]]:
    """One problem in the recipe's own words, and the known keys near an unknown one."""
    path = [str(part) for part in problem["loc"] if isinstance(part, int) or _is_key(part)]
    key, table = ".".join(path), path[:-1]
    if problem["type"] == "extra_forbidden":
        if path[0] == "data":
            return _unknown_in_data(key, path[-1], problem["loc"][1])
        known = _fields(table)
        place = f"[{'.'.join(table)}]" if table else "the recipe"
        return f"unknown key {path[-1]!r} in {place}", nearest(path[-1], known) or known
    if problem["type"] == "missing":
        return f"{key} is missing", []
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]), []
    given = problem["input"]
    if key == "data.name" and problem["type"] == "literal_error":
        problem["msg"] += "; or 'folder', 'wds/NAME' or 'hfds/NAME'"
    return f"{key} = {json.dumps(given, default=str)}: {problem['msg'][0].lower()}{problem['msg'][1:]}", []


def _unknown_in_data(key: str, field: str, kind: str) -> tuple[str, list[str]]:
    """The same of `[data]`, whose keys depend on where the images are."""
    tables: dict[str, type[_Table]] = {_MEMORY: DataTable, _FILES: FilesTable}
    other = _FILES if kind == _MEMORY else _MEMORY
    if field in tables[other].model_fields:
        return f"{key} is for {other.strip('()')}, not for {kind.strip('()')}", []
    known = list(tables[kind].model_fields)
    return f"unknown key {field!r} in [data]", nearest(field, known) or known


def _is_key(part: object) -> bool:
    """pydantic adds the member of a union to a location; those are no keys of the file."""
    return (
        isinstance(part, str) and not any(c in part for c in "[(") and part not in ("int", "float", "str", "bool")
    )


def _fields(table: Sequence[str]) -> list[str]:
    """The keys a table knows."""
    model: Any = Recipe
    for key in table:
        model = model.model_fields[key].annotation
    return list(model.model_fields)

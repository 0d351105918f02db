"""The tables of a recipe: what every key means, and which values it may have."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from detachnet.data.datasets import is_files, synonyms
from detachnet.errors import RecipeError
from detachnet.fields import Fields
from detachnet.models import MOST
from detachnet.surgery.routes import MOST_CHOSEN, MOST_MODELS, SubModel, narrow_models
from detachnet.surgery.stepdown import Stem

Positive = Annotated[int, Field(gt=0)]
SubModels = Annotated[int, Field(gt=0, le=MOST_MODELS)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class RecipeTable(Fields):
    """Keys that are all known, of the right types and frozen."""

    refused_as = {"": RecipeError}
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelTable(RecipeTable):
    """The base-model: `create_model(name, **kwargs)`."""

    name: str
    """A name of the zoo, such as `torchvision:vgg16_bn` or `timm:resnet18.a1_in1k`; or `path/to/file.py:FUNCTION`,
    your own code, which returns the model. A path is looked for here, then beside the recipe."""
    kwargs: dict[str, int | float | bool | str] = {}
    """Arguments of the model's constructor."""

    @model_validator(mode="after")
    def _can_be_built(self) -> ModelTable:
        for name, most in MOST.items() if self.name.startswith("detachnet:") else ():
            value = self.kwargs.get(name)
            if isinstance(value, int | float) and not 0 < value <= most:
                raise ValueError(f"model.kwargs.{name} = {value}: it must be above 0 and at most {most}")
        return self


class FamilyTable(RecipeTable):
    """How the base-model is made detachable."""

    cuts: tuple[str, ...] | dict[str, str] | Literal["auto"] | SubModels | tuple[Fraction, ...] = ()
    """Sub-models that drop the front: names of nodes, front to back; own names of sub-models to them; or as
    `make_detachable` chooses them, `"auto"`, a number of them or shares of the MACs."""
    sub_models: Literal["auto"] | Annotated[int, Field(gt=0, le=MOST_CHOSEN)] | tuple[Fraction, ...] = ()
    """Instead of cuts, sub-models whose routes are chosen likewise: `"auto"`, a number, or shares of the MACs."""
    widths: tuple[Fraction, ...] = ()
    """Instead of cuts, sub-models with these shares of the filters: `[0.75, 0.5]`."""
    models: dict[str, SubModel] = {}
    """Sub-models by own names, and the spans or filters each leaves out: `[family.models.small]` with
    `drop = ["a:b"]`, `width = 0.5` or both."""
    norm: Literal["private", "shared"] = "private"
    """Batch norms: each sub-model's own, or the base-model's (the paper)."""
    head: Literal["private", "shared"] = "shared"
    """The last layer with weights, which makes the output: likewise."""
    stepdown: Literal["conv", "stem", "identity"] = "conv"
    """One convolution (the paper); several with batch norms; the flattened image as it is (NSN)."""
    stem: Stem = Stem()
    """Its `depth` and `width`, if `stepdown` is `stem`."""

    chosen: str = ""
    """Written by a run: what the recipe asked for, where its cuts or routes were chosen."""

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", …)`: first those of `cuts`, `sub_models` or `widths`, then those of `models`."""
        return ("base", *self._in_front, *self.models)

    @property
    def asked(self) -> str:
        """What is to be chosen when a run starts; empty if nothing is."""
        for key, value in (("cuts", self.cuts), ("sub_models", self.sub_models)):
            if _is_choice(value):
                return f"{key} = {json.dumps(value)}"
        return ""

    @property
    def routes(self) -> dict[str, str | SubModel]:
        """What `make_detachable` takes, where nothing is to be chosen: sub-model → cut, or what it leaves out."""
        names = [f"sub{i}" for i in range(len(self._cut_names))]
        cuts = self.cuts if isinstance(self.cuts, dict) else dict(zip(names, self._cut_names, strict=True))
        narrow = narrow_models(self.widths) if self.widths else {}
        return {**cuts, **narrow, **self.models}

    @property
    def _cut_names(self) -> tuple[str, ...]:
        """The cuts of a list of names."""
        return tuple(str(cut) for cut in self.cuts) if isinstance(self.cuts, tuple) else ()

    @property
    def _in_front(self) -> tuple[str, ...]:
        """Names of the sub-models that are not in `models`."""
        if isinstance(self.cuts, dict):
            return tuple(self.cuts)
        number = _count(self.cuts) or _count(self.sub_models) or len(self.widths)
        return tuple(f"sub{i}" for i in range(number))

    @model_validator(mode="after")
    def _has_sub_models(self) -> FamilyTable:
        if sum(map(bool, (self.cuts, self.sub_models, self.widths))) > 1:
            raise ValueError("give either family.cuts, family.sub_models or family.widths")
        if len(set(self.widths)) < len(self.widths):
            raise ValueError(f"family.widths = {list(self.widths)}: each width once")
        for value in (self.cuts, self.sub_models):
            if _is_choice(value) and isinstance(value, tuple) and list(value) != sorted(value, reverse=True):
                raise ValueError(f"family: shares of the MACs fall from front to back, unlike {list(value)}")
        if twice := set(self._in_front) & set(self.models):
            key = "cuts" if self.cuts else "sub_models" if self.sub_models else "widths"
            raise ValueError(f"{', '.join(sorted(twice))} is in family.{key} and in family.models")
        if "base" in self.names[1:]:
            raise ValueError("'base' is the base-model: a sub-model of family.cuts needs another name")
        return self


def _is_choice(value: object) -> bool:
    """Whether cuts or routes are to be chosen, and not given by name."""
    return (
        value == "auto"
        or isinstance(value, int)
        or bool(isinstance(value, tuple) and value and _is_share(value[0]))
    )


def _is_share(value: object) -> bool:
    return isinstance(value, float)


def _count(value: object) -> int:
    """How many sub-models that makes."""
    if isinstance(value, int):
        return value
    return 2 if value == "auto" else len(value) if isinstance(value, tuple) else 0


class DataTable(RecipeTable):
    """A small data set, which is held in memory, and how its images are augmented."""

    name: Literal["cifar10", "cifar10-mini", "mnist"]
    """A data set of `load_data`."""
    pad: Annotated[int, Field(ge=0, le=32)] = 0
    """Zero padding in pixels before a random crop of the image's size, at most that; 0 for no crop."""
    num_train: Annotated[int, Field(ge=0)] = 0
    """Train on the first so many images; 0 for all."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Evaluate on so many training images, evenly spaced ones, which are not trained on, instead of the test
    images: for choosing settings. Files of such a run quote no accuracy; `test_*` in its metrics is of the
    held-out images."""
    flip: bool | Literal["alternating"] = False
    """Mirror each image left to right with probability one half; or `"alternating"`, with that probability in the
    first epoch and from then on in every other one (arXiv 2404.00498), which helps short trainings."""
    normalize: Literal["channel", "none"] = "channel"
    """Mean 0 and standard deviation 1 for each channel of the training images; or values in [0, 1] as they are."""


class FilesTable(RecipeTable):
    """A data set of image files, read by worker processes, and how its images are augmented: all of it timm's."""

    name: Annotated[str, Field(pattern=r"^(folder|.*\.csv|wds/.+|hfds/.+)$")]
    """`folder`: a folder of images per class. `FILE.csv`: paths and labels. `wds/NAME`: WebDataset shards.
    `hfds/NAME`: Hugging Face's."""
    train_split: str = "train"
    """The training images: a folder, a value of the column `split`, a split that the shards' `_info.json` knows or
    `NAME-{0000..0127}.tar|COUNT`, or a split of the data set."""
    val_split: str = "validation"
    """The images accuracies are measured on."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class that they are, where a folder has no splits or a CSV file no column `split`."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides which images those are."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Evaluate on so many training images, which are not trained on, instead of `val_split`: for choosing
    settings, and to search with. Evenly spaced ones; of shards the last, as many as hold them."""
    image_size: Annotated[int, Field(gt=0, le=4096)] = 224
    """Height and width in pixels of the images a family takes in; training images are cut out at random and
    brought to it."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the resized image's side that is kept for an evaluation."""
    auto_augment: str = ""
    """A policy of timm's, such as `rand-m9-mstd0.5-inc1`; empty for its jitter of the colours."""
    reprob: Share = 0.0
    """Probability that a part of a training image is erased."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of cutmix; 0 for none. With both, one is chosen for each batch."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Processes that read and augment images, for each process that trains; 0 for none beside it."""

    @model_validator(mode="after")
    def _splits_differ(self) -> FilesTable:
        if self.val_split in synonyms(self.train_split):
            names = f"data.train_split = {self.train_split!r} and data.val_split = {self.val_split!r}"
            raise ValueError(f"{names} are the same images")
        return self


IN_MEMORY, IN_FILES = "(data sets in memory)", "(image files)"
"""The two kinds of `[data]`."""


def _kind_of_data(table: Any) -> str:
    """Which of the two tables a `[data]` is, by its name."""
    name = table.get("name") if isinstance(table, dict) else getattr(table, "name", None)
    return IN_FILES if isinstance(name, str) and is_files(name) else IN_MEMORY


AnyData = Annotated[
    Annotated[DataTable, Tag(IN_MEMORY)] | Annotated[FilesTable, Tag(IN_FILES)], Discriminator(_kind_of_data)
]


class OptimizerTable(RecipeTable):
    """The optimizer, one of timm's."""

    name: Literal["momentum", "nesterov", "adamw"] = "momentum"
    """`momentum` and `nesterov` are SGD."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty on every parameter."""
    norm_bias_lr: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the learning rate of norms' biases, and divisor of their weight decay; 64 in arXiv 2404.00498."""
    weight_decay_alone: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Model → its weight decay when `train.models` names it alone."""


class ScheduleTable(RecipeTable):
    """The learning rate over time, one of timm's schedules, set at every step."""

    name: Literal["multistep", "cosine", "linear"] = "cosine"
    """`multistep` multiplies by `decay` after each milestone; `cosine` and `linear` go down to 0."""
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


class LossTable(RecipeTable):
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


class TrainTable(RecipeTable):
    """The training itself."""

    epochs: Annotated[int, Field(gt=0, le=1_000_000)]
    """Passes over the training images."""
    batch_size: Annotated[int, Field(gt=0, le=1_000_000)]
    """Images per step, over all processes together."""
    models: tuple[str, ...] = ()
    """The models that are trained; empty for all. `["base"]` is the baseline, `["sub1"]` that sub-model alone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the weights, the order of the images and the augmentation."""
    init: str = ""
    """What all models start from: the weights and statistics of a family's file or run, the base-model's and
    those of the same sub-models; or a state dict of the base-model alone, in `.safetensors` or `.pth`. A
    classifier that does not fit stays new."""
    freeze_base: bool = False
    """Train only what sub-models have for themselves: the base-model stays bit for bit as it is, and runs in
    evaluation mode."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights, which accuracies are then those of, and the
    weights in the run's files; it rises to it, as timm's warm-up has it. 0 for none."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs under bfloat16 autocast."""
    strategy: Literal["joint", "separate"] = "joint"
    """One pass for all models; or one model after another, each freeing its activations before the next: the same
    gradients, less memory, more time."""
    sample: Annotated[int, Field(ge=0)] = 0
    """Of many models each step trains the largest, the smallest and so many random others (the sandwich rule of
    arXiv 1903.05134), so that a step costs no more the more there are. 0 for all of them."""
    compile: bool = False
    """Forward pass and losses through `torch.compile`, on CUDA into CUDA graphs; on a CPU it gains nothing."""
    log_with: str = ""
    """An experiment tracker that is told losses and accuracies after each epoch: `tensorboard`, `wandb`, `mlflow`,
    `trackio` or another one that accelerate knows and you have installed. Empty for none."""

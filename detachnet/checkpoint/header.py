"""Header: what a checkpoint says about its family, in JSON that is checked against the classes below."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from detachnet.facts import DataInfo, Facts
from detachnet.surgery.plan import DetachPlan
from detachnet.text import by

LARGEST_IMAGE = 1 << 26
"""Values of one image of a family that is read: 3×4096×4096 are fewer."""
_Plain = str | int | float | bool | None


class Source(BaseModel):
    """How the base-model is built: `create_model(name, **kwargs)`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kwargs: dict[str, _Plain | tuple[_Plain, ...]]


class TrainingState(BaseModel):
    """Where a training is; with the recipe and the file's tensors enough to go on exactly.

    Attributes:
        recipe: The resolved recipe, as JSON.
        epoch: Epochs completed.
        step: Steps completed in the current epoch.
        sums: Model → sum of its training losses over these steps.
        counts: Model → how many of these steps trained it; all where there is none, as in older files.
        rows: One row of metrics per completed epoch.
        train_s: Seconds spent training so far.
        wait_s: Seconds of these spent waiting for images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    recipe: str
    epoch: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    sums: dict[str, float]
    counts: dict[str, int] = {}
    rows: tuple[dict[str, Any], ...]
    train_s: float
    wait_s: float = 0.0


class Header(BaseModel):
    """What a checkpoint says about itself.

    Attributes:
        format_version: Raised when the meaning of a file changes.
        source: None where the base-model is a user's own.
        plan: The family.
        dtype: Of the weights.
        tied: Names of tensors that are stored once under another name.
        data: What it was trained on, if that is known.
        trained: The models that were trained; empty if that is not known.
        accuracy: Model → its test accuracy, in [0, 1], when it was last measured.
        detached: The one model whose weights the file holds, under the names of the detached module; None for a
            whole family.
        training: Present in the files a training goes on from.
        fingerprint: Of the base-model's layers; empty in files from before it was kept.
        entries: The same of a user's own step-downs; empty where there are none.
        input_dtype: Of images that are no floating-point numbers, which the family was made for; else empty.
        unstored: Tensors that no file holds (buffers that are not persistent, plain attributes) → their size and a
            number that tells one from another.
        answer: What the base-model, or the one model of the file, answers to one image (`checkpoint.answer`); None
            where that says nothing.
        extra_state: What layers keep besides tensors (`get_extra_state`), by its name in the state dict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    source: Source | None
    plan: DetachPlan
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    tied: dict[str, str] = {}
    data: DataInfo | None = None
    trained: tuple[str, ...] = ()
    accuracy: dict[str, float] = {}
    detached: str | None = None
    training: TrainingState | None = None
    fingerprint: str = ""
    entries: str = ""
    input_dtype: Literal["", "bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128"] = ""
    extra_state: dict[str, Any] = {}
    unstored: dict[str, tuple[float, float]] = {}
    answer: tuple[float, float] | None = None

    @property
    def facts(self) -> Facts:
        """What is known of the family's training."""
        return Facts(data=self.data, trained=self.trained, accuracy=self.accuracy)

    @model_validator(mode="after")
    def _is_of_one_family(self) -> Header:
        """Whatever it says of a model is of a model there is, and in its range."""
        named = {"detached": [self.detached] if self.detached is not None else [], "trained": self.trained}
        for key, names in (named | {"accuracy": self.accuracy}).items():
            for name in names:
                if name not in self.plan.names:
                    raise ValueError(f"{key} names {name!r}, which is none of the models {self.plan.names}")
        if len(set(self.plan.names)) < len(self.plan.names):
            raise ValueError("a model is there twice")
        for name, value in self.accuracy.items():
            if not 0 <= value <= 1:
                raise ValueError(f"the accuracy of {name} is {value}, not in [0, 1]")
        for text in (self.plan.model, *self.plan.names):
            if not text.isprintable():
                raise ValueError(f"{text!r} is no name")
        if min(self.plan.input_size, default=0) < 1 or math.prod(self.plan.input_size) > LARGEST_IMAGE:
            raise ValueError(f"images of {by(self.plan.input_size)} values are none, or too large")
        for model in self.plan.models:
            counts = [model.macs, model.num_params, model.shared_macs, model.own_params]
            if min(counts + [value for span in model.spans for value in (span.begins, span.ends)]) < 0:
                raise ValueError(f"a count of {model.name} is negative")
        _check_data(self.data)
        return self


def _check_data(data: DataInfo | None) -> None:
    """Refuse a normalization that no images have.

    Raises:
        ValueError: It is such.
    """
    if data is None:
        return
    values = (*data.mean, *data.std, data.crop_pct or 1.0)
    wrong = not all(map(math.isfinite, values)) or min(data.std, default=1.0) <= 0 or data.num_test < 0
    shares = 0 < (data.crop_pct or 1.0) <= 1 and 0 <= data.test_share < 1
    if wrong or len(data.mean) != len(data.std) or not shares:
        raise ValueError("mean, std, crop_pct, test_share or num_test is none of any images")

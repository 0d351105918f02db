"""Family + split -> accuracy and loss of each of its models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detachnet.data.batches import Batches, BatchSource, GivenBatches
from detachnet.data.datasets import Split
from detachnet.errors import CheckpointError, DataError
from detachnet.losses import logits
from detachnet.machine import find_device
from detachnet.progress import counted
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.modules import copy_for, evaluating, in_type_of, on_device, weight_of
from detachnet.text import number_of

EVAL_BATCH = 500
"""Images per batch of an evaluation."""


def evaluate(
    net: DetachableNet,
    images: Split | BatchSource | Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Test accuracy, in [0, 1], and mean cross entropy of each trained model of a family.

    It runs in evaluation mode; afterwards each submodule is in the mode it was in, and the family where it was.

    Args:
        net: A family; of a split it must know the data, as the trainer writes it.
        images: Of the same classes: a split, or batches of normalized images and labels, such as a `DataLoader`.
        device: Where to run; by default where the family is.

    Raises:
        TraceError: This is no family.
        DataError: These are no images, there are none, or a label is of no class that a model knows.
        CheckpointError: The family does not know what it was trained on, or a model gives no finite numbers.
        MeasurementError: There is no such device.
    """
    net = family_in(net)
    models = net.facts.models(net.names)
    batches: BatchSource
    asked = None if device is None else find_device(device)
    with on_device(net, images.device if isinstance(images, BatchSource) else asked) as there:
        match images:
            case Split():
                check_fits(net, images)
                batches = Batches(images, net.facts.known_data, EVAL_BATCH, there)
            case BatchSource():
                batches = images
            case _:
                batches = GivenBatches(images, there)
        found = scores(score_batches(net, batches, models), models)
    for name, score in found.items():
        _check_finite(name, score["loss"])
    return found


def score_batches(net: DetachableNet, batches: BatchSource, models: Sequence[str]) -> Tensor:
    """Number of right answers, sum of losses and number of images, per model: `(len(models), 3)`, float64.

    Labels are looked at when all batches have run: a device is not waited for meanwhile.

    Raises:
        DataError: Images have other channels than the family takes, or a model has no output for a label.
    """
    device = batches.device
    rows = torch.zeros(len(models), 3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    weight, num_outputs = weight_of(net), dict[str, int]()
    extremes: list[Tensor] = []
    with evaluating(net), torch.no_grad():
        for images, labels in counted(batches.epoch(), len(batches), "batches of images"):
            _check_channels(net, images)
            outputs = net(in_type_of(weight, images), which=tuple(models))
            rows[:, 2] += len(labels)
            extremes += torch.aminmax(labels) if len(labels) else ()
            for i, name in enumerate(models):
                out = logits(outputs[name]).float()
                num_outputs[name] = out.shape[1]
                rows[i, 0] += (out.argmax(1) == labels).sum().to(rows.device)
                rows[i, 1] += criterion(out, labels.clamp(0, out.shape[1] - 1)).to(rows.device)
    if extremes:
        seen = torch.stack(extremes).cpu()
        for name, count in num_outputs.items():
            check_labels(seen, count, name)
    return rows


def scores(totals: Tensor, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """What `score_batches` counted, as shares: accuracy in [0, 1] and mean loss of each model.

    Raises:
        DataError: It counted no image.
    """
    if not totals[:, 2].all():
        raise DataError("there are no images to evaluate on")
    return {
        name: {"accuracy": right / count, "loss": loss / count}
        for name, (right, loss, count) in zip(models, totals.tolist(), strict=True)
    }


def check_fits(net: DetachableNet, images: Split) -> None:
    """Refuse what is no split, images of other channels than a family takes, and classes in another order.

    Raises:
        DataError: They are such.
    """
    if not isinstance(images, Split):
        raise DataError(
            f"images are a Split here, as load_data gives two of them, not a {type(images).__name__}",
            hint="detachnet.data.datasets.Split(images, labels, classes), images of uint8, (N, C, H, W)",
        )
    images.check()
    known = net.facts.data.classes if net.facts.data else images.classes
    if known != images.classes and sorted(known) == sorted(images.classes):
        first = next(name for name, theirs in zip(images.classes, known, strict=True) if name != theirs)
        raise DataError(
            f"the classes of the images are in another order than the family's: {first!r} is class "
            f"{known.index(first)} there, counted from 0",
            hint="labels are places in net.facts.data.classes",
        )
    _check_channels(net, images.images)


def _check_channels(net: DetachableNet, images: Tensor) -> None:
    """Refuse images of other channels than a family takes; `(B, C, H, W)`.

    Raises:
        DataError: They are such.
    """
    given, taken = images.shape[1] if images.ndim > 1 else 0, net.plan.input_size[0]
    if given != taken:
        raise DataError(
            f"the images have {number_of(given, 'channel')}, the family takes {taken}",
            hint="evaluate on images like those that it was trained on",
        )


def check_labels(labels: Tensor, outputs: int, model: str) -> None:
    """Refuse labels that a model has no output for.

    Raises:
        DataError: There is one.
    """
    for label in map(int, torch.aminmax(labels)):
        if not 0 <= label < outputs:
            raise DataError(
                f"an image is of class {label}, counted from 0; {model} has {number_of(outputs, 'output')}",
                hint="leave out images without a class"
                if label < 0
                else "evaluate on images of the classes that it was trained on",
            )


def _check_finite(model: str, value: float) -> None:
    """Refuse what a model says that has no finite weights: of such outputs the first class would be the largest.

    Raises:
        CheckpointError: It is no finite number.
    """
    if not math.isfinite(value):
        raise CheckpointError(
            f"{model} gives no finite numbers", hint="a weight of it is not finite: train again with a smaller lr"
        )


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        labels: Names of classes, the most probable first.
        probabilities: Of each, in [0, 1]: the softmax of the model's output.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(net: DetachableNet, images: Tensor, model: str, top: int = 5) -> list[Prediction]:
    """What one model of a family says about each image.

    Args:
        net: The family, in evaluation mode.
        images: Normalized images `(B, C, H, W)`, as `images.to_tensor` makes them.
        model: Which model.
        top: How many classes; all of them where there are fewer.

    Raises:
        CheckpointError: The family does not know its classes, or the model gives no finite numbers.
    """
    classes = net.facts.known_data.classes
    with torch.inference_mode():
        shares = logits(net(copy_for(weight_of(net), images), which=model)).float().softmax(1)
    if shares.shape[1] != len(classes):
        raise CheckpointError(f"{model} has {shares.shape[1]} outputs, but {len(classes)} classes are named")
    _check_finite(model, float(shares.sum()))
    best, indices = shares.topk(min(top, len(classes)))
    return [
        Prediction(tuple(classes[i] for i in row), tuple(values))
        for row, values in zip(indices.tolist(), best.tolist(), strict=True)
    ]

"""family + pictures -> answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detachnet.data import DataInfo
from detachnet.detachable import DetachableNet
from detachnet.errors import CheckpointError, nearest
from detachnet.losses import logits


@dataclass(frozen=True)
class Prediction:
    """What a model says about one picture.

    Attributes:
        labels: Names of classes, the most probable first.
        probabilities: Of each, in [0, 1]: the softmax of the model's output.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(net: DetachableNet, images: Tensor, model: str, top: int = 5) -> list[Prediction]:
    """What one model of a family says about each picture.

    Args:
        net: The family, in evaluation mode.
        images: Normalized pictures `(B, C, H, W)`, as `images.to_tensor` makes them.
        model: Which model.
        top: How many classes; all of them where there are fewer.

    Raises:
        CheckpointError: The family does not know its classes.
    """
    classes = known_data(net).classes
    like = next(p for p in net.parameters() if p.is_floating_point())
    with torch.inference_mode():
        shares = logits(net(images.to(like.device, like.dtype), which=model)).float().softmax(1)
    if shares.shape[1] != len(classes):
        raise CheckpointError(f"{model} has {shares.shape[1]} outputs, but {len(classes)} classes are named")
    best, indices = shares.topk(min(top, len(classes)))
    return [
        Prediction(tuple(classes[i] for i in row), tuple(values))
        for row, values in zip(indices.tolist(), best.tolist(), strict=True)
    ]


def known_data(net: DetachableNet) -> DataInfo:
    """What the family was trained on.

    Raises:
        CheckpointError: It does not say.
    """
    if net.data is None:
        raise CheckpointError(
            "the family does not say what it was trained on: its classes and normalization are unknown",
            hint="set net.data = detachnet.data.DataInfo(...) before saving it, or use a file that train wrote",
        )
    return net.data


def trained_model(net: DetachableNet, name: str | None = None) -> str:
    """A model of the family that was trained: the one named, else the largest.

    Raises:
        CheckpointError: There is no such model, or it was not trained.
    """
    models = net.trained or net.names
    if name is None:
        return models[0]
    if name not in models:
        missing = f"{name!r} was not trained" if name in net.names else f"the family has no model {name!r}"
        raise CheckpointError(missing, hint=f"the models are {', '.join(models)}", nearest=nearest(name, models))
    return name

"""outputs, target -> loss: the multi-model loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detachnet.errors import DataError, RecipeError, nearest
from detachnet.text import number_of

Teacher = Literal["base", "larger"]
Features = Mapping[str, tuple[Tensor, Tensor]]
"""Sub-model → the base-model's feature at its cut, and its step-down's output."""


class MultiModelLoss(nn.Module):
    """The sum of all models' losses, each with its weight: cross entropy, and distillation from a larger model.

    Args:
        weights: Model → weight of its loss; 1 for a model that is not named (the paper's plain sum).
        label_smoothing: As in `torch.nn.functional.cross_entropy`, in [0, 1].
        distillation: Weight of the Kullback-Leibler divergence of each sub-model's prediction from its teacher's,
            which gets no gradient from it. The first model of the outputs has no teacher.
        temperature: Both predictions' logits are divided by it, the divergence multiplied by its square.
        teacher: Of each sub-model: `base`, the first model of the outputs; or `larger`, the one before it.
        hint: Weight of the squared error of each step-down's output against the base-model's feature at the cut,
            relative to that feature's mean square; it needs `features`.

    Raises:
        RecipeError: One of these is out of its range.

    Examples:
        >>> loss = detachnet.MultiModelLoss()(net(images, which="all"), target)

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021, section 2.3, the sum; Hinton et al., arXiv 1503.02531, the
    distillation, added to the cross entropy within one step as in arXiv 1903.05134; the weights are ours.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        distillation: float = 0.0,
        temperature: float = 1.0,
        teacher: Teacher = "base",
        hint: float = 0.0,
    ) -> None:
        super().__init__()
        _check(weights, {"distillation": distillation, "hint": hint})
        if teacher not in get_args(Teacher):
            raise RecipeError(f"teacher is 'base' or 'larger', not {teacher!r}")
        if not 0 < temperature < math.inf:
            raise RecipeError(f"temperature is {temperature}, not a finite number above 0")
        if not 0 <= label_smoothing <= 1:
            raise RecipeError(f"label_smoothing is {label_smoothing}, not in [0, 1]")
        self.weights = dict(weights or {})
        self.label_smoothing = label_smoothing
        self.distillation, self.temperature, self.teacher = distillation, temperature, teacher
        self.hint = hint

    def forward(self, outputs: Mapping[str, Any], target: Tensor, features: Features | None = None) -> Tensor:
        """The weighted sum, a scalar.

        Args:
            outputs: Model → logits `(B, num_classes)`, as `net(images, which="all")` returns them.
            target: Class indices, `(B,)`; or the probability of each class, `(B, num_classes)`, as mixing images
                gives it.
            features: As `net(images, which="all", features=True)` returns them.

        Raises:
            RecipeError: A weight belongs to no model, or there is a hint but no features; or these are the outputs
                of one model only.
            DataError: The target is not one of so many images.
        """
        return self.total(self.per_model(outputs, target, features))

    def per_model(
        self,
        outputs: Mapping[str, Any],
        target: Tensor,
        features: Features | None = None,
    ) -> dict[str, Tensor]:
        """Each model's own loss, without its weight."""
        if not isinstance(outputs, Mapping) or not outputs:
            given = "none" if isinstance(outputs, Mapping) else f"one {type(outputs).__name__}"
            raise RecipeError(
                f"the multi-model loss takes the outputs of all models by name, not {given}",
                hint='loss(net(images, which="all"), target)',
            )
        predictions = {name: logits(out) for name, out in outputs.items()}
        losses = {name: self.criterion(prediction, target) for name, prediction in predictions.items()}
        if self.distillation:
            for name, teacher in self._teachers(predictions).items():
                distance = self.divergence(predictions[name], teacher)
                losses[name] = losses[name] + self.distillation * distance
        if self.hint and len(outputs) > 1 and not features:
            raise RecipeError("a hint needs features", hint='net(images, which="all", features=True)')
        for name, (feature, made) in (features or {}).items() if self.hint else ():
            theirs = feature.detach()
            error = F.mse_loss(made, theirs) / theirs.pow(2).mean().clamp_min(1e-12)
            losses[name] = losses[name] + self.hint * error
        return losses

    def total(self, losses: Mapping[str, Tensor], models: Collection[str] = ()) -> Tensor:
        """The weighted sum of what `per_model` returned.

        Args:
            losses: Model → its loss.
            models: All that there are, where these are some of them.

        Raises:
            RecipeError: A weight belongs to no model.
        """
        for name in self.weights:
            if name not in (models or losses):
                raise RecipeError(
                    f"there is a loss weight for {name!r}, but no such model",
                    nearest=nearest(name, losses) or list(losses),
                )
        terms = [self.weights.get(name, 1.0) * loss for name, loss in losses.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _teachers(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whose prediction each model learns from, without gradient."""
        names, given = list(predictions), [prediction.detach() for prediction in predictions.values()]
        teachers = given[:1] * len(names) if self.teacher == "base" else given
        return dict(zip(names[1:], teachers, strict=False))

    def divergence(self, prediction: Tensor, teacher: Tensor) -> Tensor:
        """Kullback-Leibler divergence of softmax(prediction) from softmax(teacher), both `(B, num_classes)`."""
        ours, theirs = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (prediction, teacher))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of logits `(B, num_classes)` against class indices or the classes' probabilities."""
        _check_target(target, prediction)
        return F.cross_entropy(prediction, target, label_smoothing=self.label_smoothing)


def _check(weights: Mapping[str, float] | None, others: Mapping[str, float]) -> None:
    """Refuse weights of losses that are none.

    Raises:
        RecipeError: There is one.
    """
    if not isinstance(weights, Mapping | None):
        raise RecipeError(f"weights is a weight for each model by its name, not {weights!r}")
    named = {f"weights[{name!r}]": weight for name, weight in (weights or {}).items()}
    given: dict[str, Any] = {**others, **named}
    for name, value in given.items():
        if not (hasattr(value, "__float__") and 0 <= value < math.inf):
            raise RecipeError(f"{name} is {value!r}, not a finite number from 0 on")


def _check_target(target: Tensor, prediction: Tensor) -> None:
    """Refuse what stands for other images or for no classes, and outputs that do not.

    Raises:
        DataError: It does.
    """
    if len(target) != len(prediction):
        raise DataError(f"the target is of {number_of(len(target), 'image')}, the outputs of {len(prediction)}")
    if prediction.ndim < 2:
        raise DataError(f"the outputs have the shape {tuple(prediction.shape)}, not (B, num_classes)")
    batch, num_classes, *others = prediction.shape
    if list(target.shape) not in ([batch, *others], [batch, num_classes, *others]):
        right = f"{(batch, *others)}, or {(batch, num_classes, *others)} of probabilities"
        raise DataError(f"the target has the shape {tuple(target.shape)}, not {right}")
    if target.ndim == 1 and target.dtype not in (torch.int64, torch.uint8):
        kind = str(target.dtype).removeprefix("torch.")
        raise DataError(f"class indices are whole numbers of int64, not {kind}", hint="target.long()")


def logits(output: Any) -> Tensor:
    """The main output of a model that may also return others: the first of a tuple, a dict or a dataclass."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif is_dataclass(output):
        output = getattr(output, fields(output)[0].name)
    if isinstance(output, tuple | list):
        output = output[0]
    tensor: Tensor = output
    return tensor

"""outputs, target -> loss: the multi-model loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detachnet.errors import RecipeError, nearest


class MultiModelLoss(nn.Module):
    """The sum of all models' cross entropies, each with its weight.

    Args:
        weights: Model → weight of its loss; 1 for a model that is not named (the paper's plain sum).
        label_smoothing: As in `torch.nn.functional.cross_entropy`, in [0, 1].

    Examples:
        >>> loss = detachnet.MultiModelLoss()(net(images, which="all"), target)

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021, section 2.3; the weights are ours.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Mapping[str, Any], target: Tensor) -> Tensor:
        """The weighted sum, a scalar.

        Args:
            outputs: Model → logits `(B, num_classes)`, as `net(images, which="all")` returns them.
            target: Class indices, `(B,)`.
        """
        return self.total(self.per_model(outputs, target))

    def per_model(self, outputs: Mapping[str, Any], target: Tensor) -> dict[str, Tensor]:
        """Each model's own loss, without its weight."""
        return {name: self.criterion(logits(out), target) for name, out in outputs.items()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `per_model` returned.

        Raises:
            RecipeError: A weight belongs to no model.
        """
        for name in self.weights:
            if name not in losses:
                raise RecipeError(
                    f"there is a loss weight for {name!r}, but no such model",
                    nearest=nearest(name, losses) or list(losses),
                )
        terms = [self.weights.get(name, 1.0) * loss for name, loss in losses.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of logits `(B, num_classes)` against class indices `(B,)`."""
        return F.cross_entropy(prediction, target, label_smoothing=self.label_smoothing)


def logits(output: Any) -> Tensor:
    """The main output of a model that may also return auxiliary ones: the first of a tuple or of a dict."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    if isinstance(output, tuple | list):
        output = output[0]
    tensor: Tensor = output
    return tensor

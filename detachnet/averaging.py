"""weights over time -> their exponential moving average, timm's."""

from __future__ import annotations

from itertools import chain

import torch
from timm.utils import ModelEmaV3
from torch import nn


class AveragedWeights(ModelEmaV3):  # type: ignore[misc]
    """timm's average of parameters and statistics, in which a tensor with several names counts once a step.

    timm goes through the state dict, where tied weights are as often as they have names.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards the model; whole numbers are copied."""
        pairs = list(
            zip(
                chain(self.module.parameters(), self.module.buffers()),
                chain(model.parameters(), model.buffers()),
                strict=True,
            )
        )
        averaged, moved = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, moved, weight=1 - decay)
        if counts := [pair for pair in pairs if not pair[0].is_floating_point()]:
            ours, theirs = zip(*counts, strict=True)
            torch._foreach_copy_(ours, theirs)

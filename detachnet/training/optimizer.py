"""recipe -> the loss and the optimizer of a run and its learning rate over time, the latter two timm's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from detachnet.losses import MultiModelLoss
from detachnet.training.recipe import Recipe

_OPTIMIZERS = {"momentum": "momentum", "nesterov": "sgd", "adamw": "adamw"}
"""Our names to timm's, whose `sgd` is Nesterov's."""


def make_loss(recipe: Recipe) -> MultiModelLoss:
    """The recipe's multi-model loss."""
    table = recipe.loss
    return MultiModelLoss(
        recipe.loss_weights,
        table.label_smoothing,
        table.distillation,
        table.temperature,
        table.teacher,
        table.hint,
    )


def make_optimizer(
    recipe: Recipe, net: nn.Module, parameters: Sequence[nn.Parameter], fused: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer of a network's `parameters`; `fused` makes one kernel of its updates."""
    table = recipe.optimizer
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        _groups(recipe, net, parameters) if table.norm_bias_lr != 1 else parameters,
        opt=_OPTIMIZERS[table.name],
        lr=table.lr,
        momentum=table.momentum,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
    return optimizer


def _groups(recipe: Recipe, net: nn.Module, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters, those that are no norm's bias first: a run's learning rate is that of the first group."""
    factor = recipe.optimizer.norm_bias_lr
    biases = set(_norm_biases(net)) & set(parameters)
    rates = {"lr": recipe.optimizer.lr * factor, "weight_decay": recipe.weight_decay / factor}
    of_norms, others = ([p for p in parameters if (p in biases) == wanted] for wanted in (True, False))
    return [{"params": others}, {"params": of_norms, **rates}]


def _norm_biases(net: nn.Module) -> Iterator[nn.Parameter]:
    """The biases of a network's norms."""
    for layer in net.modules():
        if isinstance(layer, _NormBase | nn.LayerNorm | nn.GroupNorm) and layer.bias is not None:
            yield layer.bias


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """The recipe's schedule, which is told every update; `steps` are those of an epoch."""
    table = recipe.schedule
    warmup_steps = round(table.warmup_epochs * steps)
    warmup: dict[str, Any] = {"warmup_t": warmup_steps, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if table.name == "multistep":
        milestones = [epoch * steps + 1 for epoch in table.milestones]  # timm's m applies at step m - 1
        warmup["warmup_prefix"] = False
        return MultiStepLRScheduler(optimizer, milestones, decay_rate=table.decay, **warmup)
    rest = max(2, recipe.train.epochs * steps - warmup_steps)  # timm takes a cosine of one step for a mistake
    if table.name == "linear":
        return PolyLRScheduler(optimizer, t_initial=rest, power=1.0, warmup_prefix=True, **warmup)
    return CosineLRScheduler(optimizer, t_initial=rest, warmup_prefix=True, **warmup)


class AveragedWeights(ModelEmaV3):  # type: ignore[misc]
    """timm's average of parameters and statistics, in which a tensor with several names counts once a step.

    timm goes through the state dict, where tied weights are as often as they have names.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards the model; whole numbers, and what layers keep besides, are copied."""
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
        for mine, its in zip(self.module.modules(), model.modules(), strict=True):
            if type(its).get_extra_state is not nn.Module.get_extra_state:
                mine.set_extra_state(its.get_extra_state())

"""Recipe -> the optimizer of a training and its learning rate over time, both timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from detachnet.errors import RecipeError
from detachnet.recipe import Recipe

_OPTIMIZERS = {"momentum": "momentum", "nesterov": "sgd", "adamw": "adamw"}
"""Our names to timm's, whose `sgd` is Nesterov's."""


def make_optimizer(recipe: Recipe, parameters: Sequence[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer; `fused` makes one kernel of its updates.

    Raises:
        RecipeError: There is nothing to train.
    """
    if not parameters:
        raise RecipeError("train.freeze_base leaves nothing to train: no step-down has weights")
    table = recipe.optimizer
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        parameters,
        opt=_OPTIMIZERS[table.name],
        lr=table.lr,
        momentum=table.momentum,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
    return optimizer


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """The recipe's schedule, which is told every update; `steps` are those of an epoch."""
    table = recipe.schedule
    warmup_steps = round(table.warmup_epochs * steps)
    warmup: dict[str, Any] = {"warmup_t": warmup_steps, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if table.name == "multistep":
        milestones = [epoch * steps + 1 for epoch in table.milestones]  # timm's m applies at step m - 1
        warmup["warmup_prefix"] = False
        return MultiStepLRScheduler(optimizer, milestones, decay_rate=table.decay, **warmup)
    rest = recipe.train.epochs * steps - warmup_steps
    return CosineLRScheduler(optimizer, t_initial=max(1, rest), warmup_prefix=True, **warmup)

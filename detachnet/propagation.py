"""images + labels -> gradients of the multi-model loss, in one pass or model by model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detachnet.detachable import DetachableNet
from detachnet.losses import MultiModelLoss, logits
from detachnet.recipe import Recipe


class Propagation:
    """Forward pass, losses and backward pass of one training step.

    Args:
        recipe: Which models, losses and strategy.
        net: The family.
        model: The family as the accelerator prepared it.
        accelerator: Runs the backward pass.
    """

    def __init__(self, recipe: Recipe, net: DetachableNet, model: nn.Module, accelerator: Accelerator) -> None:
        table = recipe.loss
        self.models, self.joint = recipe.models, recipe.train.strategy == "joint"
        self.net, self.model, self.accelerator = net, model, accelerator
        self.loss = MultiModelLoss(
            recipe.loss_weights,
            table.label_smoothing,
            table.distillation,
            table.temperature,
            table.teacher,
            table.hint,
        )
        self.wants_features = bool(table.hint) and len(self.models) > 1
        self.run: Callable[..., Any] = self._total if self.joint else self._losses
        if recipe.train.compile:
            self.run = self._compiled(self.run)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add the gradients; each model's loss without its weight, `(num_models,)`.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, or the probability of each class, `(B, num_classes)`.
        """
        return self._joint(images, labels) if self.joint else self._separate(images, labels)

    def _joint(self, images: Tensor, labels: Tensor) -> Tensor:
        total, losses = self.run(images, labels)
        self.accelerator.backward(total)
        kept: Tensor = losses.clone()  # a CUDA graph writes the next step's to the same place
        return kept

    def _total(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The multi-model loss, and each model's own."""
        losses, _ = self._losses(images, labels, self.models, {})
        return self.loss.total(losses), torch.stack([loss.detach() for loss in losses.values()])

    def _separate(self, images: Tensor, labels: Tensor) -> Tensor:
        """One model after another: the backward pass of each frees its activations before the next one runs."""
        losses = []
        teacher: dict[str, Tensor] = {}
        for name in self.models:
            found, made = self.run(images, labels, (name,), teacher)
            self.accelerator.backward(self.loss.weights.get(name, 1.0) * found[name])
            losses.append(found[name].detach())
            if not teacher or self.loss.teacher == "larger":
                teacher = {name: made[name].detach()}
        return torch.stack(losses)

    def _losses(
        self, images: Tensor, labels: Tensor, models: tuple[str, ...], teacher: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and logits of some models; `teacher` has logits of one that ran before."""
        out = self.model(images, which=models, features=self.wants_features)
        out, features = out if self.wants_features else (out, None)
        outputs = teacher | {name: logits(output) for name, output in out.items()}
        losses = self.loss.per_model(outputs, labels, features)
        return {name: losses[name] for name in models}, outputs

    def _compiled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A pass through torch.compile; the joint one on CUDA as a CUDA graph: small batches wait for launches."""
        self.net.train()
        for models in (self.models,) if self.joint else ((name,) for name in self.models):
            self.net.prepare(models, self.wants_features)
        graphs = self.joint and self.accelerator.device.type == "cuda"  # several would free each other's gradients
        mode = "reduce-overhead" if graphs else None
        return torch.compile(run, mode=mode)

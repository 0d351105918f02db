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
        self.losses = self._compiled() if recipe.train.compile else self._losses

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Add the gradients; each model's loss without its weight.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, or the probability of each class, `(B, num_classes)`.
        """
        return self._joint(images, labels) if self.joint else self._separate(images, labels)

    def _joint(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses, _ = self.losses(images, labels, self.models, {})
        self.accelerator.backward(self.loss.total(losses))
        return losses

    def _separate(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One model after another: the backward pass of each frees its activations before the next one runs."""
        losses: dict[str, Tensor] = {}
        teacher: dict[str, Tensor] = {}
        for name in self.models:
            found, made = self.losses(images, labels, (name,), teacher)
            self.accelerator.backward(self.loss.weights.get(name, 1.0) * found[name])
            losses[name] = found[name].detach()
            if not teacher or self.loss.teacher == "larger":
                teacher = {name: made[name].detach()}
        return losses

    def _losses(
        self, images: Tensor, labels: Tensor, models: tuple[str, ...], teacher: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and logits of some models; `teacher` has logits of one that ran before."""
        out = self.model(images, which=models, features=self.wants_features)
        out, features = out if self.wants_features else (out, None)
        outputs = teacher | {name: logits(output) for name, output in out.items()}
        losses = self.loss.per_model(outputs, labels, features)
        return {name: losses[name] for name in models}, outputs

    def _compiled(self) -> Callable[..., Any]:
        """`_losses` through torch.compile; on CUDA as a CUDA graph: small batches would wait for launches."""
        self.net.train()
        for models in (self.models,) if self.joint else ((name,) for name in self.models):
            self.net.prepare(models, self.wants_features)
        graphs = self.joint and self.accelerator.device.type == "cuda"  # several would free each other's gradients
        mode = "reduce-overhead" if graphs else None
        return torch.compile(self._losses, mode=mode)

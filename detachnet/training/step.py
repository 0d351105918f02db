"""net + images + labels -> one update of its weights, in one pass for all models or in one for each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from detachnet.errors import RecipeError
from detachnet.losses import MultiModelLoss, logits
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.modules import in_type_of, random_states_kept, weight_of
from detachnet.surgery.turns import Turns

Strategy = Literal["joint", "separate"]


class TrainingStep:
    """Forward pass, losses, backward pass and update of a family, one after the other.

    `strategy` is `joint`: one pass for all models; or `separate`: one model after another, the backward pass of
    each freeing its activations before the next one runs. The gradients are the same.

    Args:
        net: The family, in the mode it is trained in.
        models: Which of its models are trained.
        loss: Of each of them, and their weighted sum.
        optimizer: Of their parameters, or what stands for it.
        strategy: One of the two.
        forward: What runs in the place of `net`: the same wrapped, say.
        backward: Adds the gradients of a loss.
        compiled: Forward pass and losses through `torch.compile`, the joint one on CUDA as a CUDA graph.

    Raises:
        RecipeError: Each model is to learn from the next larger one, and they do not go from large to small.

    Examples:
        >>> step = TrainingStep(net.train(), net.names, MultiModelLoss(), torch.optim.SGD(net.parameters(), 0.1))
        >>> losses = step(images, labels)
    """

    def __init__(
        self,
        net: DetachableNet,
        models: Sequence[str],
        loss: MultiModelLoss,
        optimizer: torch.optim.Optimizer,
        *,
        strategy: Strategy = "joint",
        forward: Callable[..., Any] | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
        compiled: bool = False,
    ) -> None:
        self.net, self.models, self.loss, self.optimizer = net, tuple(models), loss, optimizer
        self.joint, self.forward, self.backward = strategy == "joint", forward or net, backward
        self.wants_features = bool(loss.hint) and len(self.models) > 1
        _check_teachers(net, self.models, loss)
        self._weight = weight_of(net)
        self._run: Callable[..., Any] = self._total if self.joint else self._losses
        if compiled:
            self._run = self._compiled(self._run)

    def __call__(self, images: Tensor, labels: Tensor, models: Sequence[str] | None = None) -> Tensor:
        """Update the weights; the gradients are gone afterwards.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, or the probability of each class, `(B, num_classes)`.
            models: Those that this step trains, in their order; all by default. What others have of their own
                stays as it is.

        Returns:
            Each trained model's loss before the update, without its weight, `(num_models,)`.
        """
        losses = self.add_gradients(images, labels, models)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def add_gradients(self, images: Tensor, labels: Tensor, models: Sequence[str] | None = None) -> Tensor:
        """The step without the update: the gradients are added to those there are."""
        chosen = self.models if models is None else tuple(models)
        images = in_type_of(self._weight, images)
        return self._joint(images, labels, chosen) if self.joint else self._separate(images, labels, chosen)

    def _joint(self, images: Tensor, labels: Tensor, models: tuple[str, ...]) -> Tensor:
        """One pass."""
        total, losses = self._run(images, labels, models)
        self.backward(total)
        kept: Tensor = losses.clone()  # a CUDA graph writes the next step's to the same place
        return kept

    def _total(self, images: Tensor, labels: Tensor, models: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """The multi-model loss, and each model's own."""
        losses, _ = self._losses(images, labels, models, {})
        return self.loss.total(losses, self.models), torch.stack([loss.detach() for loss in losses.values()])

    def _separate(self, images: Tensor, labels: Tensor, models: tuple[str, ...]) -> Tensor:
        """A pass for each model."""
        losses = []
        teacher: dict[str, Tensor] = {}
        turns = Turns(self.net, models)
        for name in models:
            with turns.of(name):
                found, made = self._run(images.clone(), labels, (name,), teacher)  # some models change theirs
            if found[name].requires_grad:  # a frozen base-model's does not
                self.backward(self.loss.weights.get(name, 1.0) * found[name])
            losses.append(found[name].detach())
            if not teacher or self.loss.teacher == "larger":
                teacher = {name: made[name].detach()}
        return torch.stack(losses)

    def _losses(
        self, images: Tensor, labels: Tensor, models: tuple[str, ...], teacher: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and logits of some models; `teacher` has logits of one that ran before."""
        made: Any = self.forward(images, which=models, features=self.wants_features)
        out, features = made if self.wants_features else (made, None)
        outputs = teacher | {name: logits(output) for name, output in out.items()}
        losses = self.loss.per_model(outputs, labels, features)
        return {name: losses[name] for name in models}, outputs

    def _compiled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A pass through torch.compile; small batches wait for launches, which a CUDA graph saves."""
        for models in (self.models,) if self.joint else ((name,) for name in self.models):
            self.net.prepare(models, self.wants_features)
        on_cuda = next(self.net.parameters()).is_cuda
        graphs = self.joint and on_cuda  # several would free each other's gradients
        mode = "reduce-overhead" if graphs else None
        return torch.compile(run, mode=mode)


def _check_teachers(net: DetachableNet, models: Sequence[str], loss: MultiModelLoss) -> None:
    """Refuse to have a model learn from a smaller one that was named before it.

    Raises:
        RecipeError: It would.
    """
    if not loss.distillation or loss.teacher != "larger":
        return
    for before, name in pairwise(models):
        if net.plan[name].macs > net.plan[before].macs:
            raise RecipeError(
                f"loss.teacher = 'larger': {name} would learn from {before}, which is smaller",
                hint="name sub-models from large to small; or loss.teacher = 'base'",
            )


def without_gradient(net: DetachableNet, models: Sequence[str], loss: MultiModelLoss) -> list[str]:
    """Names of parameters that ask for a gradient and that the loss gives none, such as those of auxiliary heads.

    Args:
        net: The family; a copy of it makes a pass in training mode.
        models: Which of its models are trained.
        loss: Of each of them.
    """
    like = next(net.parameters())
    with random_states_kept(like.device):
        alone = net.copied().train()
        optimizer = torch.optim.SGD([like], 0.0)
        images = torch.rand(2, *net.plan.input_size, device=like.device).to(net.input_dtype)
        labels = torch.zeros(2, dtype=torch.long, device=like.device)
        TrainingStep(alone, models, loss, optimizer).add_gradients(images, labels)
    every = alone.named_parameters()
    return [name for name, parameter in every if parameter.requires_grad and parameter.grad is None]


def sample_models(models: Sequence[str], macs: Mapping[str, int], count: int, seed: int) -> tuple[str, ...]:
    """The models that one step trains, in their order: the first, from which others may learn, the largest, the
    smallest and so many others.

    Args:
        models: All that are trained.
        macs: Model → its costs.
        count: How many others.
        seed: Decides which.

    Source: the sandwich rule of arXiv 1903.05134.
    """
    largest, smallest = max(models, key=macs.__getitem__), min(models, key=macs.__getitem__)
    always = {models[0], largest, smallest}
    others = [name for name in models if name not in always]
    chosen = {*always, *random.Random(seed).sample(others, min(count, len(others)))}
    return tuple(name for name in models if name in chosen)

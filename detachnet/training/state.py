"""optimizer, averages and progress of a run <-> tensors and numbers of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.checkpoint.content import LIVE, TRAINER, split_state, untied, with_prefix, without_prefix
from detachnet.checkpoint.header import TrainingState
from detachnet.checkpoint.loading import load_weights
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import folder
from detachnet.training.optimizer import AveragedWeights, make_optimizer
from detachnet.training.recipe import Recipe
from detachnet.training.runs import Saved
from detachnet.training.weights import OWN


@dataclass(eq=False)
class RunState:
    """All that changes while a family is trained.

    Attributes:
        net: The family, with the weights that are trained.
        models: Those of its models that are trained.
        parameters: Those of the trained models, by name.
        optimizer: Of those among them that are not frozen.
        averaged: The average of the weights, if the recipe wants one.
        sums: Sum of each model's training losses over the steps of the current epoch, `(num_models,)`, float64.
        counts: How many of these steps trained it, `(num_models,)`, on the CPU.
        finite: After how many of these steps its sum was finite, `(num_models,)`.
        epoch: Epochs completed.
        step: Steps completed in the current one.
        train_s: Seconds spent training.
        wait_s: Seconds of these spent waiting for images.
        rows: One row of metrics per completed epoch.
    """

    net: DetachableNet
    models: tuple[str, ...]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    averaged: AveragedWeights | None
    sums: Tensor
    counts: Tensor
    finite: Tensor
    epoch: int = 0
    step: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wait_share(self) -> float | None:
        """Share of the training time spent waiting for images, to a thousandth; None before any."""
        return round(self.wait_s / self.train_s, 3) if self.train_s else None

    @property
    def family(self) -> DetachableNet:
        """What is evaluated and written: the averaged weights if there are such, else those that are trained."""
        family: DetachableNet = self.averaged.module if self.averaged else self.net
        return family

    def count(self, losses: Tensor, models: Sequence[str], updates: int) -> None:
        """Take note of a step: the losses of the models it trained, and that it was update so many, from 1."""
        if self.averaged:
            self.averaged.update(self.net, updates)
        made = losses.to(self.sums.device, torch.float64)
        which = [self.models.index(name) for name in models]
        self.counts[which] += 1
        if len(models) == len(self.models):
            self.sums += made
        else:
            self.sums[which] += made
        self.finite += self.sums.isfinite()
        self.step += 1

    def not_finite(self) -> str:
        """A weight or running statistic that is not finite, and whose it is; empty if there is none."""
        nets = [self.net, self.averaged.module] if self.averaged else [self.net]
        for net in nets:
            statistics = {n: t for n, t in net.named_buffers() if n.endswith(("running_mean", "running_var"))}
            tensors = {**dict(net.named_parameters()), **statistics}
            finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors.values()])
            wrong = [name for name, fine in zip(tensors, finite.tolist(), strict=True) if not fine]
            if wrong:
                kind = "running statistic" if wrong[0] in statistics else "weight"
                return f"{wrong[0]!r}, a {kind} of {self._owner(wrong[0])}"
        return ""

    def _owner(self, name: str) -> str:
        """The model that a tensor is of: the first of the trained ones that reads it, or has it for itself."""
        place = name.split(".")[1]
        own = (model for model in self.models if name.startswith(OWN) and place == folder(model))
        reads = (model for model in self.models if name in self.net.parameters_of([model]))
        return next(chain(own, reads), BASE)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Keep an epoch's metrics; the next one begins."""
        self.rows.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        self.counts.zero_()
        self.finite.zero_()

    def numbers(self, recipe: Recipe) -> TrainingState:
        """The part that a checkpoint's header holds."""
        return TrainingState(
            recipe=recipe.model_dump_json(),
            epoch=self.epoch,
            step=self.step,
            sums=dict(zip(recipe.models, self.sums.tolist(), strict=True)),
            counts=dict(zip(recipe.models, self.counts.tolist(), strict=True)),
            rows=tuple(self.rows),
            train_s=self.train_s,
            wait_s=self.wait_s,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the family: the optimizer's state, and the weights behind an average."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        state = {
            f"{names[parameter]}.{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        live = untied(split_state(self.net.state_dict())[0])[0] if self.averaged else {}
        return with_prefix(state, TRAINER) | with_prefix(live, LIVE)

    def restore(self, saved: Saved) -> None:
        """Put everything back as a checkpoint has it."""
        load_weights(self.family, saved.header, saved.tensors)
        if self.averaged:
            load_weights(self.net, saved.header, without_prefix(saved.tensors, LIVE))
        self.family.facts = saved.header.facts
        self._restore_optimizer(without_prefix(saved.tensors, TRAINER))
        state = saved.training
        self.epoch, self.step, self.rows = state.epoch, state.step, list(state.rows)
        self.train_s, self.wait_s = state.train_s, state.wait_s
        self.sums.copy_(torch.tensor(list(state.sums.values()), dtype=torch.float64))
        self.counts.copy_(torch.tensor([state.counts.get(name, state.step) for name in state.sums]))
        self.finite.fill_(state.step)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """The optimizer's state, each tensor where and as its update wants it."""
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition(".")
            owner = self.parameters[parameter]
            on_cpu = key == "step" and not self.optimizer.defaults.get("fused")  # which has it on the device
            alike = tensor.shape == owner.shape  # fused updates want the parameter's layout, too
            here = torch.empty_like(owner, dtype=tensor.dtype) if alike else tensor.to(owner.device)
            self.optimizer.state[owner][key] = tensor.clone() if on_cpu else here.detach().copy_(tensor)


def fuses(recipe: Recipe, device: torch.device) -> bool:
    """Whether one kernel makes all updates: on CUDA, unless a step trains some of the models only.

    torch's kernel fails where some of the parameters it updates have a momentum and others none yet, as after such
    a step (seen with torch 2.11 to 2.15).
    """
    return device.type == "cuda" and not recipe.train.sample


def new_state(recipe: Recipe, net: DetachableNet, device: torch.device) -> RunState:
    """The state before the first step."""
    parameters = net.parameters_of(recipe.models)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimizer = make_optimizer(recipe, net, trained, fused=fuses(recipe, device))
    decay = recipe.train.ema_decay
    averaged = AveragedWeights(net, decay, use_warmup=True) if decay else None
    sums_on = "cpu" if device.type == "mps" else device  # no float64 there
    sums = torch.zeros(len(recipe.models), dtype=torch.float64, device=sums_on)
    counts = torch.zeros(len(recipe.models), dtype=torch.int64)
    finite = torch.zeros(len(recipe.models), dtype=torch.int64, device=sums_on)
    return RunState(net, recipe.models, parameters, optimizer, averaged, sums, counts, finite)

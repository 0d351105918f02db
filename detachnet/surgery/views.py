"""family -> the passes through some of its models, each written when it is first asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from detachnet.errors import CutError
from detachnet.surgery.codegen import Run, compile_graph
from detachnet.surgery.modules import random_states_kept
from detachnet.surgery.own_layers import Sources
from detachnet.surgery.rewrite import JointError, build_view, changes_image
from detachnet.surgery.turns import Turns

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

logger = logging.getLogger("detachnet")
Models = tuple[str, ...]


class Views:
    """The passes that are written so far.

    Args:
        sources: What they are made from.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._written: dict[tuple[Models, bool, bool], Run] = {}

    def forget_joint(self) -> None:
        """Have passes written anew, by what joins the images of a batch now: hooks of layers may."""
        self._written = {}
        for both in self._sources.values():
            for source in both.values():
                source.is_found = False

    def get(self, net: DetachableNet, models: Models, features: bool) -> Run:
        """The function of the family and images `(B, C, H, W)` that runs some models in the family's mode.

        Args:
            net: The family.
            models: Their names, each once and in order.
            features: Whether it also gives the features of sub-models, as `DetachableNet.forward` has them.

        Raises:
            CutError: No model has one of the names, or they are in another order.
        """
        key = (models, net.training, features)
        if key not in self._written:
            with random_states_kept():  # layers are run to learn their shapes
                self._written[key] = self._write(net, models, features)
        return self._written[key]

    def _write(self, net: DetachableNet, models: Models, features: bool) -> Run:
        """A pass; separate passes where the models cannot share one batch."""
        for name in models:
            net._check(name)
        if not models or list(models) != sorted(set(models), key=net.names.index):
            raise CutError(f"name each model once and in order, {list(net.names)}, not {list(models)}")
        source = self._sources[models[0]][net.training]
        if any(name not in source.routes for name in models):
            return self._one_width_after_another(net, models, features)
        if len(models) > 1:
            source.find_coupling(net)
        try:
            label = f"{'+'.join(models)} {'train' if net.training else 'eval'}"
            return compile_graph(build_view(source, models, features), label)
        except JointError as error:
            if len(models) == 1 or features:
                raise
            logger.warning("%s models run one after another, not in one pass: %s", net.plan.model, error)
            singles = {name: self.get(net, (name,), features=False) for name in models}
            return partial(_in_turn, singles, changes_image(source))

    def _one_width_after_another(self, net: DetachableNet, models: Models, features: bool) -> Run:
        """The pass through models of several widths: those of one in one pass."""
        alike: dict[int, list[str]] = {}
        for name in models:
            alike.setdefault(id(self._sources[name]), []).append(name)
        runs = {tuple(names): self.get(net, tuple(names), features) for names in alike.values()}
        copies = any(changes_image(self._sources[names[0]][net.training]) for names in runs)
        return partial(_by_width, runs, models, features, copies)


def _in_turn(runs: Mapping[str, Run], copies: bool, net: DetachableNet, x: Tensor) -> dict[str, Any]:
    """The outputs of models that cannot share a pass."""
    outputs, turns = {}, Turns(net, tuple(runs))
    for name, run in runs.items():
        with turns.of(name):
            outputs[name] = run(net, x.clone() if copies else x)
    return outputs


def _by_width(
    runs: Mapping[Models, Run], models: Models, features: bool, copies: bool, net: DetachableNet, x: Tensor
) -> Any:
    """The outputs of models of several widths, in their order."""
    outputs: dict[str, Any] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names, run in runs.items():
        made = run(net, x.clone() if copies else x)
        if features:
            made, seen = made
            found |= seen
        outputs |= made if len(names) > 1 else {names[0]: made}
    ordered = {name: outputs[name] for name in models}
    return (ordered, found) if features else ordered

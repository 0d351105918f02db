"""trace -> what a family has of it: the graphs of its models, their passes, and what is looked at before each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.surgery.attributes import attributes_read
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.modules import place_of_weight
from detachnet.surgery.own_layers import Sources
from detachnet.surgery.ownership import ViewSource
from detachnet.surgery.plan import BASE
from detachnet.surgery.state import Readings, own_readings, readings
from detachnet.surgery.structure import Structure
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import PREFIX, Leaves
from detachnet.surgery.views import Views
from detachnet.surgery.whole import Reason

Others = Mapping[bool, frozenset[str]]
"""Mode → paths of the base-model's modules that are in the other one."""


@dataclass(frozen=True, eq=False)
class Tracing:
    """How a family's base-model is traced.

    Attributes:
        example: An image of the size and the type it is made for, `(1, C, H, W)`.
        leaves: What is kept whole.
        others: Which modules are in another mode than the rest.
    """

    example: Tensor
    leaves: Leaves
    others: Others

    def trace(self, base: nn.Module) -> TracedModel:
        """The base-model's trace, as it is now."""
        # The family may have another dtype by now; what is no floating-point input has not.
        example_input = None if self.example.is_floating_point() else self.example
        return trace(base, tuple(self.example.shape[1:]), example_input, self.leaves, self.others)


@dataclass(frozen=True, eq=False)
class Derived:
    """What of a family follows from a trace of its base-model: made anew with that, not saved, not copied.

    Attributes:
        sources: Of its models, in each mode.
        views: Their passes.
        lost: What the model's own forward does that no trace holds.
        filled: Path of a module → what its pass leaves otherwise than it was.
        modal: The modules whose mode may be read.
        read: What modules hold besides tensors.
        structure: What they are made of.
        weight: Where the weight is whose type the family has (`place_of_weight`).
        dtype: Its type.
        asks_for_dtype: Whether the model decides by a dtype.
    """

    sources: Sources
    views: Views
    lost: tuple[Reason, ...]
    filled: Mapping[str, Reason]
    modal: tuple[tuple[str, nn.Module], ...]
    read: Readings
    structure: Structure
    weight: tuple[dict[str, Any], str]
    dtype: torch.dtype
    asks_for_dtype: bool

    @property
    def of_base(self) -> Mapping[bool, ViewSource]:
        """What the base-model's views are made from, in each mode."""
        return self.sources[BASE]

    def settled(self, base: nn.Module) -> Derived:
        """The same for a copy of the base-model that stays as it is, but for its type."""
        structure = Structure(base, {}, ())
        return replace(self, modal=(), read=Readings(), structure=structure, weight=place_of_weight(base))


def derive(base: nn.Module, traced: TracedModel, sources: Sources, example: Tensor) -> Derived:
    """What follows from a trace.

    Args:
        base: The base-model.
        traced: Its trace.
        sources: Of the family's models, from that.
        example: An image, whose type a family without weights has.
    """
    read = traced.read | _read_where_narrow(base, traced, sources)
    every = [r for path, names in read.items() for r in readings(base.get_submodule(path), names)]
    for path, names in traced.of_layers.items():
        every += own_readings(base.get_submodule(path), names)
    sliced = {path for both in sources.values() for path in both[False].sliced_layers}
    held, name = place_of_weight(base)
    return Derived(
        sources,
        Views(sources),
        traced.lost,
        traced.filled,
        tuple((path, base.get_submodule(path)) for path in traced.modal),
        Readings(every),
        Structure(base, read, sorted(sliced)),
        (held, name),
        held.get(name, example).dtype,
        any(reason.what.endswith(".dtype") for reason in traced.lost),
    )


def _read_where_narrow(base: nn.Module, traced: TracedModel, sources: Sources) -> dict[str, frozenset[str]]:
    """Path of a layer that only narrower graphs go through → the names of what that reads."""
    narrower = {id(both): both[False].traced for both in sources.values()}.values()
    whole, *others = [
        {str(node.target) for node in graph.live if node.op == "call_module"} for graph in (traced.eval, *narrower)
    ]
    opened = {path.removeprefix(PREFIX) for layers in others for path in whole - layers}
    return attributes_read({path: base.get_submodule(path) for path in sorted(opened)}, {})

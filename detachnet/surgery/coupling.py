"""Which nodes of a traced graph join the images of a batch: they run model by model, or end the joint pass.

What is known without running anything is here; `finding` finds the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from detachnet.surgery.graph import TracedGraph, writes_in_place
from detachnet.surgery.listening import Applied, Scripted
from detachnet.surgery.tracer import PROBE_BATCH, Spec, leaves_of

_BATCH_FUNCTIONS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}
_KNOWN_LAYERS = ("torch.nn.modules.", "timm.", "torchvision.")
_KNOWN = ("torch.", "timm.", "torchvision.", "numpy.", "detachnet.")


@dataclass(frozen=True)
class Verdict:
    """How a node runs where several models share a batch.

    Attributes:
        how: `once` for all of them; `per model`, on each one's part of the batch; `never`, so that the models need
            passes of their own.
        why: For what is not `once`, a clause that begins with a verb.
    """

    how: Literal["once", "per model", "never"]
    why: str = ""


ONCE = Verdict("once")


@dataclass
class Coupling:
    """The verdict on each node of a graph.

    Attributes:
        traced: The graph.
        training: Its mode.
        found: Verdicts that running the graph has given; they count before what is known of operations.
    """

    traced: TracedGraph
    training: bool
    found: Mapping[fx.Node, Verdict] = field(default_factory=dict)

    def verdict(self, node: fx.Node) -> Verdict:
        """How a node that reads pixels runs."""
        if node in self.found:
            return self.found[node]
        if self._fills(node):
            return Verdict("never", "fills a tensor that does not follow the image")
        if node in self.traced.needs_values:
            return Verdict("per model", "decides by its input's values")
        if node.op == "call_module":
            module = self.traced.module.get_submodule(str(node.target))
            return layer_verdict(module, self.training)
        return function_verdict(node.target) if node.op == "call_function" else ONCE

    def _fills(self, node: fx.Node) -> bool:
        """Whether a node writes pixels into a tensor that is no image's."""
        data = self.traced.data
        return writes_in_place(node) and node.args[0] not in data and any(n in data for n in node.all_input_nodes)


def function_verdict(function: Any) -> Verdict:
    """How a function runs; one of the user's own may do anything, as a layer may."""
    if function in _BATCH_FUNCTIONS:
        return Verdict("per model", "normalizes over the batch")
    return Verdict("per model", "is a function of the user's own, kept whole") if _is_users(function) else ONCE


def _is_users(function: Any) -> bool:
    """Whether a node's function is neither Python's nor one of the libraries'."""
    if isinstance(function, Scripted):
        return True
    of = function.function if isinstance(function, Applied) else function
    module = f"{getattr(of, '__module__', None) or 'torch'}."
    return module.partition(".")[0] not in sys.stdlib_module_names and not module.startswith(_KNOWN)


def layer_verdict(module: nn.Module, training: bool) -> Verdict:
    """How a layer that is kept whole runs.

    Known: batch norms, and instance norms with running statistics. A user's own layer that is kept whole may do
    anything, so it is taken to.
    """
    if not type(module).__module__.startswith(_KNOWN_LAYERS):
        return Verdict("per model", "is a layer of the user's own, kept whole")
    for part in module.modules():
        if isinstance(part, _NormBase):
            tracks = part.running_mean is not None
            if (training and tracks) or (isinstance(part, _BatchNorm) and (training or not tracks)):
                return Verdict("per model", "normalizes over the batch")
    return ONCE


def has_batch(value: object) -> bool:
    """Whether a value, or a tensor in it, has the batch as its first axis."""
    specs = [leaf for leaf in leaves_of(value) if isinstance(leaf, Spec)]
    return any(spec.shape[:1] == (PROBE_BATCH,) for spec in specs)

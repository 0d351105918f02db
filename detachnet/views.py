"""The graphs of a family: one function rewrites a traced graph for any set of its models.

A view of one model is the graph as traced (base) or its tail behind a step-down (sub-model). A view of
several is the joint graph: where a cut is passed, the value becomes `cat([value, stepdown(image)])` along the
batch, so the tail runs once for all models; what sees the whole batch at once runs model by model. That is
the same mathematics as separate passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import getitem, mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from detachnet.errors import CutError, DetachNetError
from detachnet.norms import norm_parts
from detachnet.plan import BASE
from detachnet.trace import TracedGraph, has_tensor, writes_in_place
from detachnet.tracer import PREFIX, PROBE_BATCH, Spec, leaves_of

STEPDOWNS = "stepdowns"
NORMS = "norms"
HEADS = "heads"
_BATCH_FUNCTIONS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}
_AXIS_FUNCTIONS = {
    *(
        "amax",
        "amin",
        "cat",
        "concat",
        "concatenate",
        "cumsum",
        "flip",
        "log_softmax",
        "max",
        "mean",
        "median",
        "min",
    ),
    *("norm", "normalize", "prod", "roll", "softmax", "sort", "std", "sum", "var"),
}
"""Operations that join the images of a batch when they work along the first axis."""
_KNOWN_LAYERS = ("torch.nn.modules.", "timm.", "torchvision.")


class JointError(DetachNetError):
    """A graph whose models cannot share one batch; separate passes still work."""


@dataclass
class ViewSource:
    """What the views of a family are made from.

    Attributes:
        traced: The graph in one mode.
        training: Which mode that is.
        cuts: Sub-model → the node it is cut at, front to back.
        private: Sub-model → paths of the layers it has a copy of its own of → where that is, `norms` or `heads`.
    """

    traced: TracedGraph
    training: bool
    cuts: Mapping[str, fx.Node]
    private: Mapping[str, Mapping[str, str]]

    @cached_property
    def second_probe(self) -> dict[fx.Node, Any]:
        """Values at another batch size, to tell which numbers follow the batch."""
        return self.traced.propagate(PROBE_BATCH + 1).values


def build_view(source: ViewSource, models: Sequence[str], features: bool = False) -> fx.Graph:
    """The graph that runs `models` (in the family's order) on one image batch.

    Its targets refer to a `DetachableNet`. With one model it returns what that model returns; with several, a
    dict from name to that. An output a sub-model cannot have (an auxiliary head in front of its cut) is None.
    With `features` it returns a pair of that and a dict from each sub-model to two tensors of the shape at its
    cut: the base-model's, and what its step-down made.

    Raises:
        JointError: The models cannot share one batch.
    """
    return _ViewBuilder(source, models, features).build()


def sees_whole_batch(module: nn.Module, training: bool) -> bool:
    """Whether a layer's output for one image depends on the other images of the batch.

    Known: batch norms, and instance norms with running statistics. A user's own layer that is kept whole may do
    anything, so it is taken to; one of timm or torchvision with floating-point buffers is in training.
    """
    if not type(module).__module__.startswith(_KNOWN_LAYERS):
        return True
    for part in module.modules():
        if isinstance(part, _NormBase):
            tracks = part.running_mean is not None
            if (training and tracks) or (isinstance(part, _BatchNorm) and (training or not tracks)):
                return True
    known = type(module).__module__.startswith("torch.nn.modules.")
    return training and not known and any(b.is_floating_point() for b in module.buffers())


def _has_batch(value: Any) -> bool:
    """Whether a value, or a tensor in it, has the batch as its first axis."""
    specs = [leaf for leaf in leaves_of(value) if isinstance(leaf, Spec)]
    return any(spec.shape[:1] == (PROBE_BATCH,) for spec in specs)


class _ViewBuilder:
    """Walks the traced graph once, front to back, and keeps for each node what stands for it in the view."""

    def __init__(self, source: ViewSource, models: Sequence[str], features: bool) -> None:
        self.source = source
        self.traced = source.traced
        self.models = tuple(models)
        self.graph = fx.Graph()
        self.image = self.graph.placeholder("x")
        self.stack: list[str] = [BASE] if models[0] == BASE else []
        """The models whose batches are stacked at this point of the walk."""
        self.made: dict[fx.Node, tuple[fx.Node, int]] = {}
        """Traced value that depends on the pixels -> its counterpart, and how many batches it holds."""
        self.remade: dict[tuple[fx.Node, int], Any] = {}
        """Any other traced value, and for how many batches -> its counterpart."""
        self.features: dict[str, Any] | None = {} if features else None
        self.entries = {node: name for name, node in source.cuts.items() if name in self.models}

    def build(self) -> fx.Graph:
        """Walk the graph and return the view."""
        for node in self.traced.live:
            if len(self.models) > 1 and self._joins_images(node):
                raise JointError(f"{self.traced.describe(node)} joins the images of a batch")
            if node.op == "placeholder":
                self.made[node] = (self._own_image(node), 1)
            elif node.op == "output":
                outputs = self._output(node.args[0])
                self.graph.output(outputs if self.features is None else (outputs, self.features))
            elif node in self.traced.readers and (count := self._count(node)):
                coupled = count > 1 and self._is_coupled(node, count)
                self.made[node] = (
                    self._per_model(node, count) if coupled else self._copy(node, count),
                    count,
                )
            if node in self.entries:
                self._enter(node, self.entries[node])
        self._drop_unused()
        self.graph.lint()
        return self.graph

    def _own_image(self, node: fx.Node) -> fx.Node:
        """The image, cloned for a base-model that changes it in place while step-downs still need it."""
        changed = any(writes_in_place(user) or self._is_in_place_layer(user) for user in node.users)
        if changed and len(self.models) > 1:
            return self.graph.call_method("clone", (self.image,))
        return self.image

    def _is_in_place_layer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return getattr(self.traced.module.get_submodule(str(node.target)), "inplace", False) is True

    def _joins_images(self, node: fx.Node) -> bool:
        """Whether a traced operation mixes the images of a batch, or fills a tensor that is no image's."""
        inputs = self._inputs(node)
        if writes_in_place(node) and inputs:
            return node.args[0] not in self.traced.data
        if node not in self.traced.data or node.op not in ("call_function", "call_method"):
            return False
        value = self.traced.values[node]
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if isinstance(value, Spec) and not value.shape:
            # `scale.type_as(feature)` takes nothing but the dtype of the feature.
            return name != "type_as" or node.args[0] in self.traced.data
        batched = any(_has_batch(self.traced.values[n]) for n in inputs)
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = axis if isinstance(axis, tuple | list) else [axis]
        stacks = name in ("cat", "concat", "concatenate") and axis is None
        return batched and name in _AXIS_FUNCTIONS and (stacks or any(a == 0 and a is not False for a in axes))

    def _enter(self, node: fx.Node, name: str) -> None:
        """A cut: from here on the batch of `name` is stacked below the others."""
        fed = self.graph.call_module(f"{STEPDOWNS}.{name}", (self.image,))
        if self.features is not None and self.stack[:1] == [BASE]:
            feature, count = self.made[node]
            chunks = self.graph.call_function(torch.chunk, (feature, count))
            self.features[name] = (self.graph.call_function(getitem, (chunks, 0)), fed)
        if self.stack:
            fed = self.graph.call_function(torch.cat, ([self.made[node][0], fed],))
        self.stack.append(name)
        self.made[node] = (fed, len(self.stack))

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that depend on the pixels; without a base-model the image itself feeds no layer."""
        return [n for n in node.all_input_nodes if n in self.traced.data]

    def _count(self, node: fx.Node) -> int:
        """How many models' batches a node works on; 0 where it belongs to a dropped front."""
        inputs = self._inputs(node)
        if not inputs:
            raise JointError(
                f"{self.traced.describe(node)} changes a value in place that does not follow the image"
            )
        known = {
            self.made[n][1] if n in self.made and (self.models[0] == BASE or n.op != "placeholder") else 0
            for n in inputs
        }
        if len(known) > 1:
            raise CutError(
                f"{self.traced.describe(node)} joins values from both sides of a cut "
                f"in {'training' if self.source.training else 'evaluation'} mode",
                node=self.traced.name_of.get(node),
            )
        return known.pop()

    def _is_coupled(self, node: fx.Node, count: int) -> bool:
        """Whether a node must run model by model."""
        if node in self.traced.needs_values:
            return True
        if node.op == "call_module":
            path = str(node.target).removeprefix(PREFIX)
            if any(path in self.source.private.get(name, ()) for name in self.stack[:count]):
                return True
            return sees_whole_batch(self.traced.module.get_submodule(str(node.target)), self.source.training)
        return node.op == "call_function" and node.target in _BATCH_FUNCTIONS

    def _copy(self, node: fx.Node, count: int) -> fx.Node:
        """The same operation on the view's values."""
        new = self.graph.node_copy(node, lambda n: self._value(n, count))
        if node.op == "call_module":
            new.target = self._target(node, self.stack[0])
        return new

    def _per_model(self, node: fx.Node, count: int) -> fx.Node:
        """Split the batch, run each model's part through its own layer, stack the results."""
        if self._is_norm(node):
            self._check_batch_first(node, self.traced.values[node], self.source.second_probe[node])
            layers = [self.graph.get_attr(self._target(node, name)) for name in self.stack[:count]]
            return self.graph.call_function(norm_parts, (self.made[self._inputs(node)[0]][0], layers))
        pieces = {n: self.graph.call_function(torch.chunk, (self.made[n][0], count)) for n in self._inputs(node)}
        outs = []
        for i, name in enumerate(self.stack[:count]):
            parts = {n: self.graph.call_function(getitem, (piece, i)) for n, piece in pieces.items()}

            def part(n: fx.Node, parts: dict[fx.Node, fx.Node] = parts) -> Any:
                return parts[n] if n in parts else self._value(n, 1)

            new = self.graph.node_copy(node, part)
            if node.op == "call_module":
                new.target = self._target(node, name)
            outs.append(new)
        return self._stacked(node, self.traced.values[node], self.source.second_probe[node], outs)

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch norm and nothing else."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return False
        return isinstance(self.traced.module.get_submodule(str(node.target)), _BatchNorm)

    def _stacked(self, node: fx.Node, first: Any, second: Any, outs: list[fx.Node]) -> fx.Node:
        """The models' outputs of one layer, each tensor of them stacked along its first axis.

        That axis must follow the batch, as it does where images and positions are one axis, too.
        """
        if isinstance(first, tuple | list):
            pairs = enumerate(zip(first, second, strict=True))
            parts = [
                self._stacked(node, *pair, [self.graph.call_function(getitem, (out, i)) for out in outs])
                for i, pair in pairs
            ]
            return self.graph.call_function(type(first), (parts,))
        self._check_batch_first(node, first, second)
        return self.graph.call_function(torch.cat, (outs,))

    def _check_batch_first(self, node: fx.Node, first: Any, second: Any) -> None:
        """Refuse a value that cannot be stacked, known at two batch sizes."""
        sizes = [value.shape[0] for value in (first, second) if isinstance(value, Spec) and value.shape]
        if len(sizes) < 2 or sizes[0] * (PROBE_BATCH + 1) != sizes[1] * PROBE_BATCH:
            raise JointError(f"{self.traced.describe(node)} gives a value without the batch as its first axis")

    def _target(self, node: fx.Node, name: str) -> str:
        """The layer `name` runs a node with: its own copy if it has one."""
        path = str(node.target).removeprefix(PREFIX)
        own = self.source.private.get(name, {})
        return f"{own[path]}.{name}.{path}" if path in own else str(node.target)

    def _value(self, node: fx.Node, count: int) -> Any:
        """What stands for a traced value where `count` batches are stacked."""
        if node in self.traced.data:
            return self.made[node][0]
        if (node, count) not in self.remade:
            if node.op == "get_attr" or has_tensor(self.traced.values[node]) or self._can_ask(node, count):
                new: Any = self.graph.node_copy(node, lambda n: self._value(n, count))
            else:
                new = self._shape_value(node, count)
            self.remade[node, count] = new
        return self.remade[node, count]

    def _can_ask(self, node: fx.Node, count: int) -> bool:
        """Whether the tensors whose shape a value comes from are at hand with the right batch."""
        return all(
            (n in self.made and self.made[n][1] == count) if n in self.traced.data else self._can_ask(n, count)
            for n in node.all_input_nodes
        )

    def _shape_value(self, node: fx.Node, count: int) -> Any:
        """A value known from shapes alone: a constant, or a multiple of the batch size."""
        first, second = self.traced.values[node], self.source.second_probe[node]
        if isinstance(first, torch.device):
            return self.graph.call_function(getattr, (self.image, "device"))
        return self._follow_batch(node, first, second, count)

    def _follow_batch(self, node: fx.Node, first: Any, second: Any, count: int) -> Any:
        if isinstance(first, tuple | list):
            pairs = zip(first, second, strict=True)
            return tuple(self._follow_batch(node, a, b, count) for a, b in pairs)
        if first == second:
            return first
        if not isinstance(first, int) or first != (second - first) * PROBE_BATCH:
            raise JointError(f"{self.traced.describe(node)} follows the batch size in no simple way")
        shape = self.graph.call_function(getattr, (self.image, "shape"))
        batch = self.graph.call_function(getitem, (shape, 0))
        return self.graph.call_function(mul, (batch, (second - first) * count))

    def _output(self, traced_output: Any) -> Any:
        """The view's output: each tensor split into one part per model."""
        if len(self.models) == 1:
            return self._map_output(traced_output, lambda leaf: self.made[leaf][0] if leaf in self.made else None)
        pieces: dict[fx.Node, fx.Node] = {}

        def part(leaf: fx.Node, i: int) -> Any:
            if leaf not in self.made or i >= self.made[leaf][1]:
                return None
            if not _has_batch(self.traced.values[leaf]):
                raise JointError(f"the output {self.traced.describe(leaf)} has no batch as its first axis")
            if leaf not in pieces:
                pieces[leaf] = self.graph.call_function(torch.chunk, self.made[leaf])
            return self.graph.call_function(getitem, (pieces[leaf], i))

        outputs = {name: self._map_output(traced_output, partial(part, i=i)) for i, name in enumerate(self.models)}
        # A call, because the code generator writes a literal dict of named tuples wrongly.
        return self.graph.call_function(dict, (), outputs)

    def _map_output(self, output: Any, of: Callable[[fx.Node], Any]) -> Any:
        def leaf_value(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            return of(leaf) if leaf in self.traced.data else self._value(leaf, 1)

        return map_aggregate(output, leaf_value)

    def _drop_unused(self) -> None:
        """Remove what nothing reads, from the back."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("output", "placeholder") and not writes_in_place(node):
                self.graph.erase_node(node)

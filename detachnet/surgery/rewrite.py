"""The graphs of a family: one function rewrites a traced graph for any set of its models.

A view of one model is the graph as traced without the spans that its route leaves out, each of them replaced by
its bridge. A view of several is the joint graph. Models that have not parted yet are one part of the batch, which
runs once. At the start of a span a model's part leaves the batch, at its end it comes back: the value becomes
`cat([value, bridge(kept)])`. What sees the whole batch at once runs part by part. That is the same mathematics as
separate passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from operator import getitem, mul
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import CutError, DetachNetError
from detachnet.surgery.coupling import has_batch
from detachnet.surgery.graph import has_tensor, has_torch_names, writes_in_place
from detachnet.surgery.legs import Leg
from detachnet.surgery.norms import norm_parts
from detachnet.surgery.ownership import ViewSource
from detachnet.surgery.plan import BASE
from detachnet.surgery.tracer import PROBE_BATCH, Spec

Parts = tuple[tuple[str, ...], ...]
"""The parts of a stacked batch: the models that each belongs to."""


@dataclass(frozen=True)
class _Away:
    """A part that left the batch: its models, and the value their bridges need."""

    names: tuple[str, ...]
    kept: fx.Node


class JointError(DetachNetError):
    """A graph whose models cannot share one batch; separate passes still work."""


def build_view(source: ViewSource, models: Sequence[str], features: bool = False) -> fx.Graph:
    """The graph that runs `models` (in the family's order) on one image batch.

    Its targets refer to a `DetachableNet`. With one model it returns what that model returns; with several, a
    dict from name to that. An output a sub-model cannot have (an auxiliary head in a span it leaves out) is None.
    With `features` it returns a pair of that and a dict from each sub-model to two tensors of the shape at the end
    of its last span: the base-model's, and what its bridge made.

    Raises:
        JointError: The models cannot share one batch.
    """
    return _ViewBuilder(source, models, features).build()


def build_leg(source: ViewSource, leg: Leg) -> fx.Graph:
    """The graph of what lies between two places where models part, from feature `(B, …)` to feature or output."""
    builder = _ViewBuilder(source, leg.models[:1], False)
    builder.begin, builder.end = (source.traced.names.get(name) for name in (leg.start, leg.end))
    return builder.build()


def changes_image(source: ViewSource) -> bool:
    """Whether models alone may change the images they are given."""
    image = next(node for node in source.traced.live if node.op == "placeholder")
    return is_overwritten(source, image)


def changes_input(source: ViewSource, leg: Leg) -> bool:
    """Whether a leg may change the image or the feature it is given."""
    start = source.traced.names.get(leg.start)
    return changes_image(source) if start is None else is_overwritten(source, start)


def is_overwritten(source: ViewSource, node: fx.Node) -> bool:
    """Whether a traced value is changed in place later, itself or through a view of it."""
    in_place = (
        getattr(source.traced.module.get_submodule(str(user.target)), "inplace", False) is True
        for user in node.users
        if user.op == "call_module"
    )
    return any(in_place) or source.traced.is_changed(node)


class _ViewBuilder:
    """Walks the traced graph once, front to back, and keeps for each node what stands for it in the view."""

    def __init__(self, source: ViewSource, models: Sequence[str], features: bool) -> None:
        self.source = source
        self.traced = source.traced
        self.models = tuple(models)
        self.graph = fx.Graph()
        self.image = self.graph.placeholder("x")
        self.stack: Parts = (self.models,)
        """The parts of the batch at this point of the walk, each of models that are the same network so far."""
        self.away: list[_Away] = []
        """The parts that left the batch, until their spans end."""
        self.made: dict[fx.Node, tuple[fx.Node, Parts]] = {}
        """Traced value that depends on the pixels -> its counterpart, and the parts of its batch."""
        self.remade: dict[tuple[fx.Node, int], Any] = {}
        """Any other traced value, and for how many parts -> its counterpart."""
        self.features: dict[str, Any] | None = {} if features else None
        self.begin: fx.Node | None = None
        """The value that is taken in, if it is not the image."""
        self.end: fx.Node | None = None
        """The value that is given, if it is not the output."""

    def build(self) -> fx.Graph:
        """Walk the graph and return the view."""
        for node in self._walk():
            verdict = self.source.coupling.verdict(node)
            if len(self.models) > 1 and verdict.how == "never":
                raise JointError(f"{self.traced.describe(node)} {verdict.why}")
            if node.op == "placeholder" or node is self.begin:
                self.made[node] = (self._own_image(node), self.stack)
            elif node.op == "output":
                outputs = self._output(node.args[0])
                self.graph.output(outputs if self.features is None else (outputs, self.features))
            elif node in self.traced.readers and (parts := self._parts(node)):
                coupled = len(parts) > 1 and self._is_coupled(node, parts)
                self.made[node] = (
                    self._per_part(node, parts) if coupled else self._copy(node, parts),
                    parts,
                )
            self._come_back(node)
            if node is self.end:
                self.graph.output(self.made[node][0])
            else:
                self._leave(node)
        self._drop_unused()
        self.graph.lint()
        return self.graph

    def _walk(self) -> Sequence[fx.Node]:
        """The nodes from the value that is taken in to the one that is given."""
        first = 0 if self.begin is None else self.source.position[self.begin]
        last = len(self.traced.live) - 1 if self.end is None else self.source.position[self.end]
        return self.traced.live[first : last + 1]

    def _own_image(self, node: fx.Node) -> fx.Node:
        """What is taken in, cloned where it is changed in place while bridges or other models still need it."""
        if self._is_changed(node) and (len(self.models) > 1 or node is self.begin):
            return self.graph.call_method("clone", (self.image,))
        return self.image

    def _is_changed(self, node: fx.Node) -> bool:
        return is_overwritten(self.source, node)

    def _leave(self, node: fx.Node) -> None:
        """The start of spans: the parts of the models that leave them out leave the batch, with what they need."""
        position = self.source.position[node]
        left: dict[tuple[int, ...], list[str]] = {}
        stays = [
            tuple(name for name in part if not self._starting(name, position, i, left))
            for i, part in enumerate(self.stack)
        ]
        if not left:
            return
        value, remain = self.made[node][0], [i for i, part in enumerate(stays) if part]
        pieces = self._pieces(value, len(self.stack))
        overwritten = bool(remain) and node.op != "placeholder" and self._is_changed(node)
        for (i, _), names in left.items():
            kept = self.image if node.op == "placeholder" else pieces[i]
            kept = self.graph.call_method("clone", (kept,)) if overwritten else kept
            self.away.append(_Away(tuple(names), kept))
        self.stack = tuple(stays[i] for i in remain)
        if remain and len(remain) < len(stays):
            few = [pieces[i] for i in remain]
            value = few[0] if len(few) == 1 else self.graph.call_function(torch.cat, (few,))
        self.made[node] = (value, self.stack)

    def _starting(self, name: str, position: int, part: int, left: dict[tuple[int, ...], list[str]]) -> bool:
        """Whether a span of a model starts at a position; models of a part that leave out the same go together."""
        for span in self.source.routes[name]:
            if span.start == position:
                left.setdefault((part, span.end), []).append(name)
                return True
        return False

    def _pieces(self, value: fx.Node, count: int) -> Sequence[fx.Node]:
        """A stacked value, part by part."""
        if count < 2:
            return [value] * count
        chunks = self.graph.call_function(torch.chunk, (value, count))
        return [self.graph.call_function(getitem, (chunks, i)) for i in range(count)]

    def _come_back(self, node: fx.Node) -> None:
        """The end of spans: what their bridges make of what was kept is stacked with the others."""
        position = self.source.position[node]
        for away in list(self.away):
            number = next(i for i, span in enumerate(self.source.routes[away.names[0]]) if span.end >= position)
            if self.source.routes[away.names[0]][number].end != position:
                continue
            self.away.remove(away)
            fed = self._bridged(node, away, number)
            if self.features is not None and BASE in self.models:
                base = self._pieces(self.made[node][0], len(self.stack))[self._part_of(BASE, self.stack)]
                self.features |= dict.fromkeys(away.names, (base, fed))
            self._insert(node, away.names, fed)

    def _insert(self, node: fx.Node, names: tuple[str, ...], fed: fx.Node) -> None:
        """Stack a part; parts stand in the family's order, in which separate passes would run."""
        at = sum(self.models.index(part[0]) < self.models.index(names[0]) for part in self.stack)
        if self.stack:
            value = self.made[node][0]
            rest = [value] if at == len(self.stack) else self._pieces(value, len(self.stack))
            fed = self.graph.call_function(torch.cat, ([*rest[:at], fed, *rest[at:]],))
        self.stack = (*self.stack[:at], names, *self.stack[at:])
        self.made[node] = (fed, self.stack)

    def _bridged(self, node: fx.Node, away: _Away, number: int) -> fx.Node:
        """What stands for a span: its bridge's output, or what was kept where both shapes are the same."""
        name = away.names[0]
        if (name, number) not in self.source.identities:
            return self.graph.call_module(self.source.bridge(name, number), (away.kept,))
        alone = not self.stack  # else it is stacked, which copies
        return self.graph.call_method("clone", (away.kept,)) if alone and self._is_changed(node) else away.kept

    @staticmethod
    def _part_of(name: str, parts: Parts) -> int:
        """Which part a model belongs to; -1 for none."""
        return next((i for i, part in enumerate(parts) if name in part), -1)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that depend on the pixels."""
        return [n for n in node.all_input_nodes if n in self.traced.data]

    def _parts(self, node: fx.Node) -> Parts:
        """The parts of the batch that a node works on; none where all models leave it out."""
        inputs = self._inputs(node)
        if not inputs:
            raise JointError(
                f"{self.traced.describe(node)} changes a value in place that does not follow the image",
                node=self.traced.name_of.get(node),
            )
        known = {self.made[n][1] if n in self.made else () for n in inputs}
        if len(known) > 1:
            raise CutError(
                f"{self.traced.describe(node)} joins values from both sides of a cut "
                f"in {'training' if self.source.training else 'evaluation'} mode",
                node=self.traced.name_of.get(node),
            )
        return known.pop()

    def _is_coupled(self, node: fx.Node, parts: Parts) -> bool:
        """Whether a node must run part by part."""
        if node.op == "call_module" and len({self.source.target(node, part[0]) for part in parts}) > 1:
            return True
        own_mode = self._is_norm(node)  # it may be set to the statistics of a batch in evaluation mode, too
        return own_mode or self.source.coupling.verdict(node).how == "per model"

    def _copy(self, node: fx.Node, parts: Parts) -> fx.Node:
        """The same operation on the view's values."""
        new = self.graph.node_copy(node, lambda n: self._value(n, len(parts)))
        if node.op == "call_module":
            new.target = self.source.target(node, parts[0][0])
        return new

    def _per_part(self, node: fx.Node, parts: Parts) -> fx.Node:
        """Split the batch, run each part through its own layer, stack the results."""
        if self._is_norm(node):
            self._check_batch_first(node, self.traced.values[node], self.source.second_probe[node])
            layers = [self.graph.get_attr(self.source.target(node, part[0])) for part in parts]
            return self.graph.call_function(norm_parts, (self.made[self._inputs(node)[0]][0], layers))
        pieces = {n: self._pieces(self.made[n][0], len(parts)) for n in self._inputs(node)}
        changes = self.traced.changes_input(node)
        if changes:  # autograd lets no view of several be changed in place
            clone = partial(self.graph.call_method, "clone")
            pieces = {n: [clone((piece,)) for piece in split] for n, split in pieces.items()}
        outs = []
        for i, names in enumerate(parts):

            def piece(n: fx.Node, i: int = i) -> Any:
                return pieces[n][i] if n in pieces else self._value(n, 1)

            new = self.graph.node_copy(node, piece)
            if node.op == "call_module":
                new.target = self.source.target(node, names[0])
            outs.append(new)
        if changes:
            for n, split in pieces.items():
                self.made[n] = (self.graph.call_function(torch.cat, (split,)), parts)
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

    def _value(self, node: fx.Node, count: int) -> Any:
        """What stands for a traced value where `count` parts are stacked."""
        if node in self.traced.data:
            return self.made[node][0]
        if (node, count) not in self.remade:
            self._check_number(node, count)
            if node.op == "get_attr" or has_tensor(self.traced.values[node]) or self._can_ask(node, count):
                new: Any = self.graph.node_copy(node, lambda n: self._value(n, count))
                if node.op == "get_attr" and (part := self.source.part_of_tensor(node)):
                    new = self.graph.call_module(part, (new,))
            else:
                new = self._shape_value(node, count)
            self.remade[node, count] = new
        return self.remade[node, count]

    def _check_number(self, node: fx.Node, count: int) -> None:
        """Refuse a number that follows the batch, but is no multiple of it: of several models it is another."""
        if count > 1 and isinstance(self.traced.values[node], int | float) and not self.source.is_multiple(node):
            raise JointError(f"{self.traced.describe(node)} follows the batch size in no simple way")

    def _can_ask(self, node: fx.Node, count: int) -> bool:
        """Whether the tensors whose shape a value comes from are at hand with the right batch."""
        return all(
            (n in self.made and len(self.made[n][1]) == count)
            if n in self.traced.data
            else self._can_ask(n, count)
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
            return self._map_output(traced_output, lambda leaf: self.made[leaf][0] if self._has(leaf) else None)
        pieces: dict[fx.Node, Sequence[Any]] = {}

        def part(leaf: fx.Node, name: str) -> Any:
            i = self._part_of(name, self.made[leaf][1]) if leaf in self.made else -1
            if i < 0:
                return None
            if leaf not in pieces:
                value, parts = self.made[leaf]
                pieces[leaf] = self._output_parts(leaf, value, self.traced.values[leaf], len(parts))
            return pieces[leaf][i]

        outputs = {name: self._map_output(traced_output, partial(part, name=name)) for name in self.models}
        # A call, because the code generator writes a literal dict of named tuples wrongly.
        return self.graph.call_function(dict, (), outputs)

    def _output_parts(self, leaf: fx.Node, value: fx.Node, spec: Any, count: int) -> Sequence[Any]:
        """A stacked output part by part; if it holds several tensors, as that of `topk` does, each of them."""
        if isinstance(spec, tuple | list):
            items = [self.graph.call_function(getitem, (value, i)) for i in range(len(spec))]
            each = [self._output_parts(leaf, item, inner, count) for item, inner in zip(items, spec, strict=True)]
            return [self._like(spec, [parts[i] for parts in each]) for i in range(count)]
        if not has_batch(spec):
            raise JointError(f"the output {self.traced.describe(leaf)} has no batch as its first axis")
        return self._pieces(value, count)

    def _like(self, output: tuple[Any, ...] | list[Any], items: Sequence[Any]) -> Any:
        """Items in what an output holds them in."""
        if has_torch_names(output):
            return self.graph.call_function(type(output), (tuple(items),))
        # A call, because torch 2.11's code generator forgets what a named tuple's class is called by.
        named = isinstance(output, tuple) and hasattr(output, "_fields")
        return self.graph.call_function(type(output), tuple(items)) if named else type(output)(items)

    def _has(self, leaf: fx.Node) -> bool:
        """Whether a traced value is made in the view."""
        return leaf in self.made and bool(self.made[leaf][1])

    def _map_output(self, output: Any, of: Callable[[fx.Node], Any]) -> Any:
        def leaf_value(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if _makes_an_object(leaf):
                target, args, kwargs = leaf.target, map_aggregate(leaf.args, leaf_value), leaf.kwargs
                return self.graph.call_function(target, args, map_aggregate(kwargs, leaf_value))  # type: ignore[arg-type]
            return of(leaf) if leaf in self.traced.data else self._value(leaf, 1)

        named = isinstance(output, tuple) and hasattr(output, "_fields")
        made = map_aggregate(tuple(output) if named else output, leaf_value)
        return self._like(output, made) if named else made

    def _drop_unused(self) -> None:
        """Remove what nothing reads, from the back."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("output", "placeholder") and not writes_in_place(node):
                self.graph.erase_node(node)


def _makes_an_object(node: fx.Node) -> bool:
    """Whether a node puts outputs into an object of a dataclass, which torch.fx has no other way to write."""
    return node.op == "call_function" and isinstance(node.target, type) and is_dataclass(node.target)

"""graph as torch.fx writes it -> graph that means what the forward pass says.

`x += y` is written as `x = x + y`. That is the same unless x shares its memory with a value that is read later: a
slice's original, a shortcut. Values share memory where their twins on the meta device do. What was made inside
`torch.no_grad` is detached where it leaves it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from detachnet.surgery.tracer import Probe, Tracer, leaves_of

_FRESH_LAYERS = (_ConvNd, _NormBase, nn.Linear)
_FRESH = {operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.cat, torch.mul}
"""What makes a new tensor, as far as it is worth knowing without running anything."""


def cut_gradients(tracer: Tracer, graph: fx.Graph) -> None:
    """Detach what is made without gradients where something with gradients reads it; it keeps its name."""
    inside = dict.fromkeys(node for node in tracer.without_gradients if node.graph is graph)
    if not inside:
        return
    probe = tracer.probe()
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.args[0] in inside:
            inside[node] = None  # of several values
        readers = [user for user in node.users if user not in inside and user.target is not getattr]
        if node not in inside or not readers or not _is_floating(probe, node):
            continue
        with graph.inserting_after(node):
            detached = graph.call_method("detach", (node,))
        for user in readers:
            user.replace_input_with(node, detached)
        for calls in tracer.calls.values():
            calls[:] = [detached if call is node else call for call in calls]


def _is_floating(probe: Probe, node: fx.Node) -> bool:
    """Whether a node's value is a tensor that could have a gradient."""
    try:
        value = probe.value(node)
    except Exception:  # whatever an operation raises where there are shapes only
        return True
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def settle_augmented(tracer: Tracer, graph: fx.Graph) -> None:
    """Write augmented assignments as torch.fx does where that is the same, else in place."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    open_cases = [node for node in tracer.augmented if node in position and not _is_plain(tracer, node)]
    if not open_cases:
        return
    memory = _Memory(tracer, graph)
    for node in open_cases:
        changed = node.args[0]
        if not isinstance(changed, fx.Node):
            continue
        alike = memory.sharing(changed)
        readers = [user for other in alike if other is not node for user in other.users if user is not node]
        kept = any(other.op == "get_attr" for other in alike)
        if kept or any(position[user] > position[node] for user in readers):
            node.target = tracer.augmented[node]
            memory.join(node, changed)


def _is_plain(tracer: Tracer, node: fx.Node) -> bool:
    """Whether what an assignment changes is new and read by nothing else."""
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or set(changed.users) != {node}:
        return False
    if changed.op == "call_module":
        return isinstance(tracer.root.get_submodule(str(changed.target)), _FRESH_LAYERS)
    return changed.op == "call_function" and changed.target in _FRESH and changed not in tracer.augmented


class _Memory:
    """Which values of a graph share their memory."""

    def __init__(self, tracer: Tracer, graph: fx.Graph) -> None:
        self.of: dict[fx.Node, set[int]] = {}
        self.joined: dict[int, int] = {}
        probe = tracer.probe()
        for node in graph.nodes:
            try:
                value = None if node.op == "output" else probe.value(node)
            except Exception:  # whatever an operation raises where there are shapes only
                return
            tensors = [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)]
            self.of[node] = {tensor.untyped_storage()._cdata for tensor in tensors}

    def _root(self, storage: int) -> int:
        while storage in self.joined:
            storage = self.joined[storage]
        return storage

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """The values that share memory with one, itself among them."""
        own = {self._root(storage) for storage in self.of.get(node, ())}
        return [other for other, found in self.of.items() if own & {self._root(storage) for storage in found}]

    def join(self, one: fx.Node, other: fx.Node) -> None:
        """Two values are one in place."""
        for storage in self.of.get(other, ()):
            for mine in self.of.get(one, ()):
                if self._root(mine) != self._root(storage):
                    self.joined[self._root(mine)] = self._root(storage)

"""TracedGraph -> TracedGraph: layers that were kept whole are traced into, where nothing is known of them.

A trace keeps modules without children whole, and those on timm's list. Which channels go together inside of them
shows their forward pass alone.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from detachnet.errors import TraceError
from detachnet.surgery.graph import Root, TracedGraph, writes_in_place
from detachnet.surgery.modules import copy_model, random_states_kept
from detachnet.surgery.tracer import PREFIX, PROBE_BATCH, Leaves, Spec, Tracer, leaves_of


def open_layers(traced: TracedGraph, is_known: Callable[[nn.Module], bool], leaves: Leaves) -> TracedGraph:
    """Replace calls of layers by what their forward pass does, and those inside of it, too.

    Args:
        traced: The graph; it is not changed.
        is_known: Whether a layer needs no look inside.
        leaves: What the user wants kept whole.

    Returns:
        A graph that computes the same, with the same names for the same values. A layer that cannot be traced
        stays.
    """
    with random_states_kept():
        while (opened := _opened(traced, is_known, leaves)) is not traced:
            traced = opened
    return traced


def _opened(traced: TracedGraph, is_known: Callable[[nn.Module], bool], leaves: Leaves) -> TracedGraph:
    """The graph with the layers opened that it calls; the graph itself if there are none."""
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    inner: dict[str, fx.Node] = {}
    any_opened = False
    for node in traced.graph.nodes:
        forward = None
        if node.op == "call_module":
            module = traced.root.get_submodule(str(node.target))
            by_name = str(node.target).removeprefix(PREFIX) in leaves.paths
            if not (by_name or is_known(module) or isinstance(module, leaves.classes)):
                forward = _forward(traced, node, module, leaves)
        if forward is None:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        else:
            copies[node] = _inline(graph, forward, node, copies, inner)
            any_opened = True
    if not any_opened:
        return traced
    names = {name: copies[node] for name, node in traced.names.items() if isinstance(copies[node], fx.Node)}
    calls = {
        path: [copies[node] for node in nodes if isinstance(copies[node], fx.Node)]
        for path, nodes in traced.calls.items()
    }
    graph.lint()
    return TracedGraph(traced.root, graph, {**inner, **names}, traced.image, calls)


def _forward(traced: TracedGraph, node: fx.Node, module: nn.Module, leaves: Leaves) -> fx.Graph | None:
    """The forward pass of a layer that takes one tensor; nothing if it cannot be traced."""
    inputs = [leaf for leaf in leaves_of((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
    takes_one = len(inputs) == len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    spec = traced.values[inputs[0]] if takes_one else None
    of_torch = type(module).__module__.startswith("torch.") or hasattr(module, "parametrizations")
    if of_torch or not isinstance(spec, Spec) or spec.shape[0] != PROBE_BATCH or node.kwargs:
        return None
    if _may_assign(module):
        return None
    root, tracer = Root(copy_model(module)), Tracer(Leaves(leaves.classes, leaves.functions), spec)
    try:
        forward = tracer.trace(root)
    except Exception:  # whatever a forward pass raises that cannot be traced
        return None
    watch = tracer.watch
    if watch.found or watch.lost or watch.filled() or _writes_aside(TracedGraph(root, forward, {}, spec, {})):
        return None
    # torch.fx keeps tensors that a forward pass makes on the root; the model has none of that name.
    return None if any(isinstance(value, torch.Tensor) for value in vars(root).values()) else forward


def _writes_aside(traced: TracedGraph) -> bool:
    """Whether a graph changes a value in place that does not follow its input: no family's graph may."""
    written = [node for node in traced.graph.nodes if writes_in_place(node)]
    try:
        return any(traced.data.isdisjoint(node.all_input_nodes) for node in written)
    except TraceError:  # of which the shapes cannot be told
        return True


def _may_assign(module: nn.Module) -> bool:
    """Whether a layer's forward pass assigns something the layer holds, whichever way it goes.

    What it holds may be of another pass: a cache that is empty before the first, and is filled by it. A graph
    would read it as it is.
    """
    held = {*vars(module), *module._buffers, *module._parameters}
    pending, seen = ["forward"], set[str]()
    while pending:
        name = pending.pop()
        method = getattr(type(module), name, None)
        function = inspect.unwrap(method) if callable(method) else None
        code = getattr(function, "__code__", None)
        if name in seen or code is None or f"{function.__module__}".startswith("torch."):
            continue
        seen.add(name)
        assigned = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
        if assigned & held or {"setattr", "register_buffer"} & {*code.co_names}:
            return True
        pending += code.co_names
    return False


def _inline(
    graph: fx.Graph, forward: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], names: dict[str, fx.Node]
) -> Any:
    """Add a layer's forward pass to a graph; what it returns."""
    inner: dict[fx.Node, Any] = {}
    path, result = str(node.target), None

    def given(leaf: Any) -> Any:
        return inner[leaf] if isinstance(leaf, fx.Node) else leaf

    for part in forward.nodes:
        args, kwargs = map_aggregate(part.args, given), map_aggregate(part.kwargs, given)
        if part.op == "placeholder":
            inner[part] = copies[node.all_input_nodes[0]]
        elif part.op == "output":
            result = args[0]
        else:
            inside = part.op in ("get_attr", "call_module")
            target = f"{path}.{str(part.target).removeprefix(PREFIX)}" if inside else part.target
            new = graph.create_node(part.op, target, args, kwargs, name=f"{node.name}_{part.name}")
            inner[part] = names[f"{path.removeprefix(PREFIX)}.{part.name}"] = new
    return result

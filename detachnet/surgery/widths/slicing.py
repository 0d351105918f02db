"""Kept -> a plain narrower network: the same graph, small layers with weights of their own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from detachnet.surgery.codegen import written
from detachnet.surgery.detached import Code, DetachedModel
from detachnet.surgery.graph import Root, TracedGraph, TracedModel
from detachnet.surgery.modules import attribute, copies_of_computed_tensors, silence_hooks, unwrap, with_leaves
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.channels import Layer
from detachnet.surgery.widths.choice import Kept
from detachnet.surgery.widths.patch import kept_along_axes

_MADE = ("out_channels", "out_features")
_READ = ("in_channels", "in_features", "num_features", "num_channels", "num_parameters", "channels")


def slice_model(model: nn.Module, traced: TracedModel, kept: Kept) -> nn.Module:
    """Make the narrower network of a choice, in evaluation mode.

    It computes what the model would if nothing read the channels that go: layers read fewer columns. Norms over
    channels and standardized convolutions normalize over what there is.

    Args:
        model: The model; it is not changed.
        traced: Its trace.
        kept: What `choose` chose for it.

    Returns:
        A `detached.DetachedModel` with the model's names, whose layers are small and have their own contiguous
        weights; layers that shared a weight no longer do where it was cut.
    """
    graph, model = _patched(kept)[0], unwrap(model)
    memo: dict[int, Any] = copies_of_computed_tensors(model)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        target = str(node.target)
        node.target = target.removeprefix(PREFIX)
        if target in traced.constants:
            value: Any = traced.constants[target]
        else:
            copied = copy.deepcopy(attribute(model, node.target), memo)
            value = with_leaves(copied) if isinstance(copied, nn.Module) else copied
        if node.target not in parts:
            parts[node.target] = _narrow(target, value, kept)
    code = written(graph)
    narrow = DetachedModel(traced.class_name, Code(code.src, code.globals), parts)
    narrow.zero_grad()
    return silence_hooks(narrow).eval()


def narrow_graph(kept: Kept) -> TracedGraph:
    """The narrower network's traced graph: with its shapes and costs, under the same names."""
    traced = kept.channels.traced
    graph, copies = _patched(kept)
    names = {name: copies[node] for name, node in traced.names.items() if node in copies}
    calls = {path: [copies[n] for n in nodes if n in copies] for path, nodes in traced.calls.items()}
    return TracedGraph(narrow_root(traced.root, kept), graph, names, traced.image, calls, traced.whole)


def narrow_root(root: Root, kept: Kept) -> Root:
    """A copy of what a graph's targets refer to, with small layers and tensors."""
    root = copy.deepcopy(root, copies_of_computed_tensors(root))
    done = set[int]()
    for path, layer in kept.channels.layers.items():
        module = root.get_submodule(path)
        if id(module) not in done:
            slice_layer(module, layer, kept)
            done.add(id(module))
    for target, atoms in kept.channels.tensors.items():
        if picks := kept_along_axes(atoms, kept.mask):
            folder, _, last = target.rpartition(".")
            owner = attribute(root, folder) if folder else root
            setattr(owner, last, _narrow_tensor(getattr(owner, last), picks))
    return root


def _patched(kept: Kept) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph with the numbers that follow the width, and what each node became."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()

    def copied(leaf: Any) -> Any:
        return copies[leaf] if isinstance(leaf, fx.Node) else leaf

    for node in kept.channels.traced.live:
        new = copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        if node in kept.patches:
            patch = kept.patches[node]
            new.op = "call_method" if isinstance(patch.target, str) else "call_function"
            new.target = patch.target
            new.args = map_aggregate(patch.args, copied)
            new.kwargs = map_aggregate(patch.kwargs, copied)
    graph.lint()
    return graph, copies


def _narrow(target: str, value: Any, kept: Kept) -> Any:
    """The kept part of what a graph's target names."""
    if target in kept.channels.layers:
        return slice_layer(value, kept.channels.layers[target], kept)
    if target in kept.channels.tensors:
        return _narrow_tensor(value, kept_along_axes(kept.channels.tensors[target], kept.mask))
    return value


def slice_layer(module: nn.Module, layer: Layer, kept: Kept) -> nn.Module:
    """Cut a layer to the kept channels, in place: its weights, and the attributes that say their number.

    Args:
        module: The layer, with weights that are its own.
        layer: Its channels.
        kept: The choice.
    """
    if not is_cut(layer, kept):
        return module
    picks = layer_picks(module, layer, kept)
    set_counts(module, layer, kept)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        setattr(module, name, _narrow_tensor(tensor, picks[name]))
    return module


def is_cut(layer: Layer, kept: Kept) -> bool:
    """Whether a layer has fewer channels."""
    return any(len(kept.indices(atoms)) < len(atoms) for _, atoms in layer.sides())


def layer_picks(module: nn.Module, layer: Layer, kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Name of each of a layer's own tensors → axis → the kept indices, for the axes along which some may go."""
    reads = kept.indices(layer.reads)
    makes = reads if layer.makes is None else kept.indices(layer.makes)
    count_made = len(layer.reads if layer.makes is None else layer.makes)
    found = {}
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if name == "weight" and layer.makes is not None:
            made, read = (1, 0) if layer.kind == "transposed" else (0, 1)
            picks = {made: makes} if tensor.shape[read] != len(layer.reads) else {made: makes, read: reads}
        else:
            picks = {0: makes} if tensor.ndim and tensor.shape[0] == count_made else {}
        found[name] = picks
    return found


def set_counts(module: nn.Module, layer: Layer, kept: Kept) -> None:
    """Make a layer's attributes say how many channels it has."""
    of, num_reads = len(layer.reads), len(kept.indices(layer.reads))
    num_makes = num_reads if layer.makes is None else len(kept.indices(layer.makes))
    for name in ("groups", "num_groups"):
        if getattr(module, name, 1) > 1:
            setattr(module, name, getattr(module, name) * num_reads // of)
    counts = dict.fromkeys(_MADE, num_makes) | dict.fromkeys(_READ, num_reads)
    for name, count in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, count)
    for name in ("normalized_shape", "shape"):
        if isinstance(getattr(module, name, None), tuple):
            setattr(module, name, (num_reads, *getattr(module, name)[1:]))


def _narrow_tensor(tensor: Tensor, picks: dict[int, Tensor]) -> Tensor:
    """What is kept along some axes, contiguous; a parameter stays one."""
    new = tensor.detach()
    for axis, pick in picks.items():
        new = new.index_select(axis, pick.to(new.device))
    new = new.clone() if not picks else new.contiguous()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
